"""The processes and devices of a strategy, and its collectives, which concern one rank only while ranks work alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightning_fl.communication import Group, LocalGroup, Message
from lightning_fl.communication.objects import decode_object, encode_object
from lightning_fl.strategies import internals
from lightning_fl.strategies.one_package import refuse_apart
from lightning_fl.strategies.validation import check_choice, check_not_in_notebook, warn_of_processes


class RankedStrategy(internals.ReusableStrategy):
    """A strategy of several ranks with a group of their own, which work alone for a while and then together again."""

    def __init__(self) -> None:
        super().__init__()
        self.num_nodes = 1
        self.federation: Group = LocalGroup()
        self._works_alone = False

    @property
    def root_device(self) -> torch.device:
        # Under torchrun `devices="auto"` is a single CPU device for any number of ranks, and ranks may share a GPU:
        # `local_rank` may lie beyond the list.
        devices = self.parallel_devices or [torch.device("cpu")]
        return devices[0] if devices[0].type == "cpu" else devices[self.local_rank % len(devices)]

    @property
    def num_processes(self) -> int:
        """Processes that Lightning starts on this machine."""
        return len(self.parallel_devices or ())

    @property
    def num_ranks(self) -> int:
        """Number of ranks, also while each works alone."""
        return super().world_size

    @property
    def started_by_launcher(self) -> bool:
        """Whether torchrun, SLURM, MPI or Ray started the ranks, rather than Lightning."""
        # Ray's environment derives from Lightning's own.
        return type(self.cluster_environment) is not LightningEnvironment

    @property
    def is_distributed(self) -> bool:
        """Whether there are several ranks; Lightning reads it to decide whether ``sync_dist`` has an effect."""
        # Not the `world_size` below: Lightning keeps the settings of a name's first `self.log`, of which this is one,
        # and raises if a later call has others. So it must be the same inside a round and after it.
        return self.num_ranks > 1

    @property
    def world_size(self) -> int:
        """Number of ranks; 1 while a rank trains its clients, which needs no other rank."""
        # With more than one rank Lightning refuses a `training_step` that returns None, and on SIGTERM it broadcasts
        # over the default process group, if there is one, to ranks that are busy with other clients.
        return 1 if self.in_local_phase else self.num_ranks

    @property
    def in_local_phase(self) -> bool:
        """Whether ranks work on their own, so that collectives concern one rank only."""
        return self._works_alone

    @contextmanager
    def local_phase(self) -> Iterator[None]:
        """Makes collectives concern this rank only, inside the block."""
        self._works_alone, before = True, self._works_alone
        try:
            yield
        finally:
            self._works_alone = before

    def set_world_ranks(self) -> None:
        """Sets this process's rank in the cluster environment and in Lightning's rank-zero functions."""
        refuse_apart(self.accelerator)  # here, because it is called when a Trainer takes the strategy
        assert self.cluster_environment is not None
        if self.started_by_launcher:
            started, asked = self.num_ranks, self.num_processes * self.num_nodes
            if asked not in (1, started) and self.root_device.type == "cpu":
                raise MisconfigurationException(
                    f"The launcher started {started} processes, but Trainer(devices={self.num_processes}, num_nodes="
                    f"{self.num_nodes}) asks for {asked}. Leave devices and num_nodes out."
                )
        else:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        for function in (rank_zero_only, fabric_rank_zero_only):
            function.rank = self.global_rank  # type: ignore[attr-defined]

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        # Without a launcher Lightning runs in this process, which is right where torchrun, SLURM or MPI has started it.
        if not self.cluster_environment.creates_processes_externally and self.num_processes * self.num_nodes > 1:
            check_not_in_notebook(self.num_processes)
            warn_of_processes(self.num_processes, self.root_device)
            self._launcher = internals.SubprocessLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    # ---- collectives: real between the local phases, the identity within them

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if self.in_local_phase or self.federation.is_alone or not isinstance(tensor, Tensor):
            return tensor
        # Callers give a name or torch's `ReduceOp`, whose text has the class in front.
        name = str(reduce_op).lower().rpartition(".")[2]
        name = {"avg": "mean"}.get(name, name)
        check_choice("reduce_op", name, ("sum", "mean", "min", "max"))
        return self.federation.all_reduce(tensor, name)

    def barrier(self, name: str | None = None) -> None:
        if not self.in_local_phase:
            self.federation.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self.in_local_phase or self.federation.is_alone:
            return obj
        # Not torch's `broadcast_object_list`, which unpickles what a peer has sent and so would run its code.
        return decode_object(self.federation.broadcast_message(encode_object(obj), src))

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        if self.in_local_phase or self.federation.is_alone:
            return tensor
        parts = self.federation.all_gather(Message(tensors={"value": tensor}))
        return torch.stack([part.tensors["value"] for part in parts]).to(tensor.device)
