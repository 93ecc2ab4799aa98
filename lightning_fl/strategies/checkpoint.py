"""A federation's additions to a Lightning checkpoint, and the client states in files next to it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_fl.algorithms import Algorithm
from lightning_fl.clients import ClientStore, Population
from lightning_fl.clients.state_files import StateFiles
from lightning_fl.communication import Group, Message
from lightning_fl.engines.spread import gather_state, locals_of, scatter_state
from lightning_fl.federation import FederationState
from lightning_fl.federation.server import some
from lightning_fl.federation.settings import Version
from lightning_fl.schedules import Clock
from lightning_fl.tree import move, to_sum_dtype
from lightning_fl.types import State, Tree, as_client_id

KEY = "lightning_fl"
FORMAT = 1
MAX_RECEIVED_BYTES = 1 << 40


def state_files(checkpoint_path: str | Path) -> StateFiles:
    """The folder of client states next to a checkpoint."""
    return StateFiles(Path(checkpoint_path).parent / "client_states")


def pack(algorithm: Algorithm, state: FederationState, module: nn.Module) -> dict[str, Any]:
    """The federation's state as tensors and plain values, loadable with ``weights_only=True``.

    The global parameters are left out where the module's own ``state_dict`` holds the same values.
    """
    server = dict(state.server)
    held = dict(module.named_parameters())
    params: Tree = server.pop("params", {})
    return {
        "format": FORMAT,
        "algorithm": repr(algorithm),
        "params": list(params),
        # A parameter in half precision is rounded in the module's state_dict; a resume from it would not be exact.
        "master": gather_state({n: value for n, value in params.items() if value.dtype != held[n].dtype}, held),
        # Whole tensors: a checkpoint is the same however many processes a silo has.
        "server": gather_state(server, held),
        "transforms": list(state.transforms),
        "moving": None if state.moving is None else list(state.moving),
        "clock": None if state.clock is None else state.clock.to_state(),
        "versions": {index: {"server": dict(v.server), "buffers": v.buffers} for index, v in state.versions.items()},
        "memory": state.memory,
    }


def unpack(packed: Mapping[str, Any], algorithm: Algorithm, module: nn.Module) -> FederationState:
    """Restores the state that :func:`pack` packed, on the module's device.

    Raises:
        MisconfigurationException: If it was written by another algorithm or in another format.
    """
    if packed["format"] != FORMAT:
        raise MisconfigurationException(
            f"The checkpoint's federated state has format {packed['format']}, but this version reads format {FORMAT}. "
            "Load it with the version that wrote it, or load the weights only: MyModule.load_from_checkpoint(...)."
        )
    # Only the class must match: a user may resume with another learning rate of the server.
    written_by = packed["algorithm"].partition("(")[0]
    if written_by != type(algorithm).__name__:
        raise MisconfigurationException(
            f"The checkpoint was written by {written_by}, whose state {type(algorithm).__name__} can't continue from. "
            "Resume with the same algorithm, or load the weights only: MyModule.load_from_checkpoint(...)."
        )
    held = dict(module.named_parameters())
    device = next(iter(held.values())).device
    master, rest = (scatter_state(move(packed[key], device), held) for key in ("master", "server"))
    params = {**to_sum_dtype(locals_of({name: held[name] for name in packed["params"]})), **master}
    server: State = {"params": params, **rest} if params else {}
    clock = packed.get("clock")
    # Checkpoints of older versions don't list moving parameters, and hold no aggregator memory and no clock.
    return FederationState(
        server,
        [move(state, device) for state in packed["transforms"]],
        packed.get("moving"),
        memory=move(packed.get("memory", {}), device),
        clock=None if clock is None else Clock.from_state(clock),
        versions={index: Version(**move(version, device)) for index, version in packed.get("versions", {}).items()},
    )


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically: a file appears under its name only when it is complete and on the disk.

    Lightning writes to the system's temporary folder first and copies from there if that is another file system. If the
    disk is full or the process is killed during the copy, half a file replaces the last checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a file next to ``path`` and renames it; URLs are left to Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        unfinished = Path(path).with_name(f"{os.getpid()}.unfinished")
        try:
            super().save_checkpoint(checkpoint, unfinished, storage_options)
            with unfinished.open("rb") as file:
                # A rename may reach the disk before the content does; after a power failure the file would be empty.
                os.fsync(file.fileno())
            # It holds secrets of differential privacy: exact counts, and noise that later rounds reuse.
            if checkpoint.get(KEY, {}).get("is_secret"):
                unfinished.chmod(0o600)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def silo_folder(root: str | Path, rank: int, process: int = 0) -> Path:
    """The folder of a silo's client states, one per process, in its own Trainer's ``default_root_dir``."""
    return Path(root, "client_states", f"silo{rank}-{process}" if process else f"silo{rank}")


class ClientStateFiles:
    """Writes the clients' states next to a checkpoint, each rank those of its own clients.

    Rank 0 chooses a checkpoint's path. A silo on another rank therefore writes its states to its own folder.

    Args:
        group: The ranks of the federation.
        path: The checkpoint's path.
        folder: This silo's own folder. None: next to the checkpoint.

    Raises:
        MisconfigurationException: If the path is not on a local file system.
    """

    def __init__(self, group: Group, path: str | Path, folder: Path | None = None) -> None:
        if "://" in str(path) and folder is None:
            raise MisconfigurationException(
                f"Client states are stored next to the checkpoint and need a local path, found {path}. Give "
                "ModelCheckpoint(dirpath=...) a local folder."
            )
        self.group = group
        self.is_own = folder is not None
        # In a folder shared by all runs, checkpoints of the same name must not replace one another.
        self.name = Path(path).name if folder is None else hashlib.blake2b(str(path).encode()).hexdigest()[:32]
        self.files = state_files(path) if folder is None else StateFiles(folder)

    def write(self, store: ClientStore, federation: Group, alone_as: str | None = None) -> list[str]:
        """Writes this rank's states and returns the manifests of all ranks; every rank must call it.

        Args:
            store: The states.
            federation: All ranks of the federation.
            alone_as: A name for manifests that each rank writes without waiting for the others. None: by content.
        """
        if alone_as is not None:
            manifests = [f"{alone_as}-rank{rank}" for rank in range(federation.size)]
            self.files.write_manifest(store.save(self.files), manifests[federation.rank])
            self.files.name(self.name, manifests, also_old=True)
            return manifests
        own = self.files.write_manifest(store.save(self.files))
        in_silo = self.group.inner.all_gather(Message({"manifest": own}), "checkpoint in the silo")
        sent = Message({"manifests": [message.fields["manifest"] for message in in_silo]})
        of_silos = [message.fields["manifests"] for message in self.group.all_gather(sent, "checkpoint")]
        manifests = [name for names in of_silos for name in names]
        # The existing checkpoint of this name needs its own manifests until it is replaced.
        self.files.name(self.name, manifests, also_old=True)
        return manifests

    def finish(self, manifests: list[str]) -> None:
        """Deletes states that no checkpoint refers to any more; called once the checkpoint has been written."""
        self.files.name(self.name, manifests, also_old=False)
        self.files.collect()

    def forget(self) -> None:
        """Deletes the states of a removed checkpoint, unless another one needs them."""
        if self.files.root.exists():
            self.files.forget(self.name)
            self.files.collect()


def read_client_states(
    path: str | Path,
    manifests: list[str],
    store: ClientStore,
    population: Population,
    group: Group,
    folder: Path | None = None,
) -> None:
    """Loads the states of this rank's clients into a store.

    Args:
        path: The checkpoint's path.
        manifests: Names of its manifests, one for each rank that wrote it.
        store: The store to fill.
        population: All clients.
        group: The ranks of the federation.
        folder: This silo's own folder, which is searched first.

    Raises:
        MisconfigurationException: If the states are not next to the checkpoint; a silo needs only its own.
    """
    files = state_files(path)
    if folder is not None and any(StateFiles(folder).read_manifest(name) is not None for name in manifests):
        files = StateFiles(folder)
    found = [files.read_manifest(name) for name in manifests]
    if (population.silos is None and None in found) or not any(manifest is not None for manifest in found):
        raise MisconfigurationException(
            f"The checkpoint {path} needs the states of its clients, but they are not in {files.root}"
            f"{'' if folder is None else f', nor in {folder}'}. Copy the folder `client_states` along with the "
            "checkpoint."
        )
    for manifest in found:
        # The number of ranks, and with it each client's home rank, may have changed, so every manifest is searched.
        at_home = {
            client: name
            for client, name in (manifest or {}).items()
            if client in population and population.position(client) % group.size == group.rank
        }
        store.restore(files, at_home)


def bytes_of_first_rank(path: str | Path, group: Group) -> bytes | None:
    """Rank 0's copy of a checkpoint's file, if this rank has none; every rank must call it.

    Silos on other machines find no file under the path at which rank 0 has written it.

    Returns:
        None if this rank has the file, or no rank has it.

    Raises:
        ValueError: On every rank, if one reports an impossible size.
    """
    if group.size == 1 or "://" in str(path):
        return None
    file = Path(path)
    size = file.stat().st_size if file.is_file() else -1
    sizes: list[Any] = [
        message.fields.get("size") for message in group.all_gather(Message({"size": size}), "checkpoint file")
    ]
    # Memory is allocated for a size that another organisation reports.
    if not all(type(one) is int and -1 <= one <= MAX_RECEIVED_BYTES for one in sizes):
        raise ValueError(
            f"The ranks say that their checkpoint files have {str(sizes)[:200]} bytes; expected whole numbers up to "
            f"{MAX_RECEIVED_BYTES:.3g}. Copy the checkpoint to {path} on this machine."
        )
    if -1 not in sizes or sizes[0] == -1:
        return None
    content = torch.zeros(sizes[0], dtype=torch.uint8)
    if group.rank == 0:
        content = torch.from_numpy(np.fromfile(file, dtype=np.uint8))
    content = group.broadcast(content)
    return content.numpy().tobytes() if size == -1 else None


def warn_of_plain_checkpoint(path: str | Path) -> None:
    """Warns that a checkpoint has no federated state."""
    rank_zero_warn(
        f"The checkpoint {path} was not written by a federation: its model, loops and schedules are restored, but the "
        "algorithm starts without state."
    )


def load_client(
    checkpoint_path: str | Path, client_id: int | str, folder: str | Path | None = None
) -> dict[str, Tensor]:
    """One client's model: the global ``state_dict`` of a checkpoint with the client's personal tensors in place.

    Args:
        checkpoint_path: A checkpoint that a federation has written, with its folder ``client_states`` next to it.
        client_id: The client.
        folder: The folder of client states, if it is not next to the checkpoint: a silo on rank r > 0 has them in
            ``client_states/silo{r}`` of its Trainer's ``default_root_dir``.

    Returns:
        A ``state_dict`` for ``module.load_state_dict``.

    Raises:
        ValueError: If the checkpoint holds no state of the client.
    """
    client_id = as_client_id(client_id)
    # With `weights_only`, because a checkpoint from somebody else could otherwise run code.
    checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    files = state_files(checkpoint_path) if folder is None else StateFiles(Path(folder))
    names = checkpoint.get(KEY, {}).get("manifests") or []
    manifests = [manifest for name in names if (manifest := files.read_manifest(name)) is not None]
    versions = {client: name for manifest in manifests for client, name in manifest.items()}
    if client_id not in versions:
        raise ValueError(
            f"The checkpoint {checkpoint_path} holds no state of client {client_id!r}; it holds those of "
            f"{some(list(versions)) or 'none'}. A client has state only after it has taken part, and with `personal` "
            "tensors, client_optimizer='keep', or an algorithm whose clients keep state."
        )
    personal = files.read(client_id, versions[client_id]).get("personal", {})
    return {**checkpoint["state_dict"], **personal}
