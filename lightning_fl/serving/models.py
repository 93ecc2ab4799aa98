"""The models of a server: the newest round's, a canary, and those of single clients."""

from __future__ import annotations

import hashlib
import logging
import random
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.func import functional_call

from lightning_fl.serving.export import Forward, Outputs
from lightning_fl.serving.loading import Inputs, read, whole_state
from lightning_fl.strategies.checkpoint import KEY, state_files
from lightning_fl.tree import move
from lightning_fl.types import ClientId, Tree

logger = logging.getLogger(__name__)

NUM_CLIENTS_KEPT = 64
"""Number of clients whose tensors stay in memory; the least recently used are dropped."""
MAX_DIGITS = 19
"""Maximum number of digits of a simulated client's number; Python refuses to parse thousands of them."""


class Version:
    """One checkpoint's model, and those of its clients, whose files are read when they are requested.

    Args:
        checkpoint: The file.
        module: A module of the same class, for comparison; its frozen parameters replace those that the file lacks.

    Raises:
        ValueError: If the file can't be loaded safely, its tensors have other names or shapes than the module's, or
            one of them is not finite. A buffer may be infinite where the module's is, as masks are.
    """

    def __init__(self, checkpoint: Path, module: L.LightningModule) -> None:
        content = read(checkpoint)
        self.checkpoint = checkpoint
        self._buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
        state = self._checked(whole_state(content, module, checkpoint), module.state_dict())
        self.digest = _digest(state)
        self.device = next(iter(module.state_dict().values()), torch.zeros(())).device
        self.state: Tree = move(state, self.device)
        history = content.get(KEY, {}).get("history") or []
        self.round = len(history) if history else int(content.get("epoch", 0)) + 1
        self._files = state_files(checkpoint)
        # Read now, because the manifests are deleted when a newer checkpoint replaces this one.
        manifests = [self._files.read_manifest(name) or {} for name in content.get(KEY, {}).get("manifests") or []]
        self._names = {client: name for manifest in manifests for client, name in manifest.items()}
        self._of_clients: OrderedDict[str, Tree] = OrderedDict()

    def tensors(self, client: str | None) -> Tree:
        """The tensors of the global model, or of a client's as it was in this checkpoint.

        Raises:
            ValueError: If the checkpoint holds no state of the client.
            FileNotFoundError: If the state was deleted, because a newer checkpoint has replaced this one.
        """
        if client is None:
            return self.state
        if client not in self._of_clients:
            # No file is read for unknown clients, which anybody could request as often as they like.
            known: ClientId = client
            if client not in self._names and client.isdecimal() and len(client) < MAX_DIGITS:
                known = int(client)
            if known not in self._names:
                raise ValueError(f"{self.checkpoint} holds no state of client {client!r}.")
            personal = self._files.read(known, self._names[known]).get("personal", {})
            found = self._checked({**self.state, **personal}, self.state)
            # Shared tensors are held once; otherwise the models of 64 clients would need the memory of 64 models.
            self._of_clients[client] = move(found, self.device)
        self._of_clients.move_to_end(client)
        if len(self._of_clients) > NUM_CLIENTS_KEPT:
            self._of_clients.popitem(last=False)
        return self._of_clients[client]

    def _checked(self, state: Tree, expected: Tree) -> Tree:
        if state.keys() != expected.keys():
            differing = sorted(state.keys() ^ expected.keys())
            raise ValueError(f"{self.checkpoint} holds another model: {', '.join(differing[:5])} differ.")
        checked = {}
        for name, own in expected.items():
            value = state[name]
            if isinstance(value, Tensor) and value.is_floating_point() and own.is_floating_point():
                value = value.to(own.dtype)  # as load_state_dict does: a run in another precision has another dtype
            if not isinstance(value, Tensor) or value.shape != own.shape or value.dtype != own.dtype:
                raise ValueError(
                    f"{self.checkpoint} holds another model: {name} is not {tuple(own.shape)} of {own.dtype}."
                )
            is_bad = ~torch.isfinite(value)
            if name in self._buffers:
                is_bad &= ~((value == own.to(value.device)) & value.isinf())
            if is_bad.any():
                raise ValueError(f"{self.checkpoint} has values in {name} that are not finite.")
            checked[name] = value
        return checked


class ServedModels:
    """The models of a server, which may be replaced while it is running.

    Args:
        module: The module.
        checkpoint: Its checkpoint.
        canary: Another checkpoint of the same module, which answers a share of the requests.
        share: The canary's share of the requests, from 0 to 1. Default 0.
    """

    def __init__(
        self, module: L.LightningModule, checkpoint: Path, canary: Path | None = None, share: float = 0.0
    ) -> None:
        self.module = module
        self.checkpoint = checkpoint
        self.share = share
        self.current = Version(checkpoint, module)
        self.canary = None if canary is None else Version(canary, module)
        self._forward = Forward(module)
        self._seen = _identity(checkpoint)
        self._refreshing = threading.Lock()

    def refresh(self) -> bool:
        """Reloads the checkpoint if its file was replaced; an invalid one is skipped with a warning.

        Returns:
            Whether there is a new model.
        """
        with self._refreshing:
            seen = _identity(self.checkpoint)
            if seen is None or seen == self._seen:
                return False
            self._seen = seen
            try:
                # Loaded separately: meanwhile requests are answered by the old model.
                self.current = Version(self.checkpoint, self.module)
            except ValueError as error:
                logger.warning(f"Still serving round {self.current.round}: {error}")
                return False
        logger.info(f"Now serving round {self.current.round}.")
        return True

    def watch(self, seconds: float = 0.5) -> None:
        """Calls :meth:`refresh` periodically in a daemon thread."""

        def follow() -> None:
            while True:
                threading.Event().wait(seconds)
                self.refresh()

        threading.Thread(target=follow, name="watch", daemon=True).start()

    def choose(self, request_id: str | None) -> Version:
        """The version that answers a request: the same one for the same id, a random one without an id."""
        if self.canary is None:
            return self.current
        if request_id is None:
            return self.canary if random.random() < self.share else self.current
        place = int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "big") / 2**64
        return self.canary if place < self.share else self.current

    def compute(self, tensors: Tree, inputs: Inputs) -> Outputs:
        """The outputs of ``forward`` with the given tensors."""
        device = self.current.device
        with torch.inference_mode():
            outputs = functional_call(
                self._forward,
                {f"module.{name}": value for name, value in tensors.items()},
                tuple(one.to(device) for one in inputs),
            )
            return tuple(one.cpu() for one in outputs)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _digest(state: Tree) -> str:
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def decode(inputs: object, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> Inputs:
    """Nested lists as a batch of inputs.

    Args:
        inputs: The examples if there is one input; for several inputs, a list with the examples of each.
        shapes: For each input, the shape of an example.
        dtypes: The dtype of each input.

    Raises:
        ValueError: If they are not numbers of these shapes; the message has the expected shapes.
    """
    given = [inputs] if len(shapes) == 1 else inputs
    expected = " and ".join(f"[examples, {', '.join(map(str, shape))}]" for shape in shapes)
    if not isinstance(given, list) or len(given) != len(shapes):
        raise ValueError(f'Expected {{"inputs": ...}} with numbers of shape {expected}.')
    found = []
    for one, shape, dtype in zip(given, shapes, dtypes, strict=True):
        try:
            tensor = torch.tensor(one, dtype=dtype)
            is_exact = dtype.is_floating_point or torch.equal(tensor, torch.tensor(one))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(f"Expected numbers of shape {expected}, as nested lists.") from None
        if tuple(tensor.shape[1:]) != shape or tensor.ndim != len(shape) + 1 or not len(tensor):
            raise ValueError(f"Expected numbers of shape {expected}, found {list(tensor.shape)}.")
        if not torch.isfinite(tensor).all():
            raise ValueError("Expected finite numbers.")
        if not is_exact:
            raise ValueError(f"Expected whole numbers ({dtype}), found fractions.")
        found.append(tensor)
    if len({len(one) for one in found}) != 1:
        raise ValueError("All inputs need the same number of examples.")
    return tuple(found)
