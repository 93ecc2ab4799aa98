"""The ranks of a federation and what they can do together."""

from __future__ import annotations

import time
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fl.communication.message import Message

MAX_MESSAGE_BYTES = 1 << 30


class RankLost(RuntimeError):
    """Another rank has left the federation, or has not answered in time."""


@dataclass
class Traffic:
    """What a rank has spent on the others so far.

    Args:
        num_bytes: Bytes of payload handed to collectives.
        seconds_waiting: Seconds in small messages, which wait for the slowest rank.
        seconds_reducing: Seconds in the sums of tensors.
    """

    num_bytes: int = 0
    seconds_waiting: float = 0.0
    seconds_reducing: float = 0.0


class Group(ABC):
    """The ranks of a federation.

    Args:
        rank: This process's place, from 0.
        size: Number of processes.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.traffic = Traffic()

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """A new tensor with the ranks' tensors joined by ``op`` (sum, mean, min, max); ``tensor`` stays as it is."""

    @abstractmethod
    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        """The messages of all ranks, in their order; sizes may differ.

        Args:
            message: This rank's message.
            topic: What it is about, to be told when ranks are not at the same place.

        Raises:
            RuntimeError: If another rank's message has another topic.
        """

    @abstractmethod
    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """A new tensor: the one of rank ``root``."""

    @abstractmethod
    def barrier(self) -> None:
        """Returns when all ranks have come here."""

    def broadcast_message(self, message: Message, root: int = 0) -> Message:
        """The message of rank ``root``."""
        return self.all_gather(message if self.rank == root else Message(), "broadcast")[root]


class LocalGroup(Group):
    """A federation in one process: every collective is the identity."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        joined = tensor.detach().clone()
        return joined / self.size if op == "mean" else joined

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        return [message]

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        return tensor.detach().clone()

    def barrier(self) -> None:
        return None


_OPS: dict[str, Any] = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}


class TorchGroup(Group):
    """Several processes over torch.distributed backends, in a group of their own.

    The default process group is left alone: Lightning broadcasts over it before each batch, which ranks with different
    numbers of batches would not survive, and a silo may want it for DDP or FSDP inside.

    Args:
        store: Where the ranks find each other.
        rank: This process's place, from 0.
        size: Number of processes.
        device: Device of the tensors; CUDA tensors travel over NCCL, all else over Gloo.
        timeout: How long a collective waits for the other ranks.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.timeout = timeout
        gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)
        self._backends: dict[str, Any] = {"cpu": gloo}
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._backends["cuda"] = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)
        weakref.finalize(self, self._backends.clear)  # at exit too: a process with an open Gloo group may abort there

    def _wait(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise RankLost(
                "Another rank has left the federation, or has not come to the same place within "
                f"{self.timeout.total_seconds():g} s ({str(error).splitlines()[0]})."
            ) from error

    def _backend(self, tensor: Tensor) -> Any:
        return self._backends.get(tensor.device.type, self._backends["cpu"])

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        joined = tensor.detach().clone(memory_format=torch.contiguous_format)
        options = dist.AllreduceOptions()
        options.reduceOp = _OPS[op]
        start = time.perf_counter()
        self._wait(self._backend(joined).allreduce([joined], options))
        self.traffic.seconds_reducing += time.perf_counter() - start
        self.traffic.num_bytes += joined.numel() * joined.element_size()
        if op != "mean":
            return joined
        return joined / self.size

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        data = Message({"topic": topic, "fields": message.fields}, message.tensors).encode()
        start = time.perf_counter()
        sizes = [int(size) for size in self._gather(torch.tensor([len(data)]))]
        self.traffic.seconds_waiting += time.perf_counter() - start
        self.traffic.num_bytes += len(data)
        if max(sizes) > MAX_MESSAGE_BYTES:
            raise ValueError(
                f"Rank {sizes.index(max(sizes))} wants to send a message of {max(sizes)} bytes; at most "
                f"{MAX_MESSAGE_BYTES} are taken. Does a metric keep every prediction? Use its binned form."
            )
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = self._gather(padded)
        messages = [Message.decode(bytes(part[:size].numpy())) for part, size in zip(parts, sizes, strict=True)]
        for rank, other in enumerate(messages):
            if other.fields["topic"] != topic:
                raise RuntimeError(
                    f"The ranks are out of sync: rank {rank} is at {other.fields['topic']!r}, rank {self.rank} at "
                    f"{topic!r}. Do all ranks have the same callbacks, and do these act alike on each rank?"
                )
        return [Message(other.fields["fields"], other.tensors) for other in messages]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._wait(self._backends["cpu"].allgather([parts], [tensor]))
        return parts

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        received = tensor.detach().clone(memory_format=torch.contiguous_format)
        options = dist.BroadcastOptions()
        options.rootRank = root
        self._wait(self._backend(received).broadcast([received], options))
        self.traffic.num_bytes += received.numel() * received.element_size()
        return received

    def barrier(self) -> None:
        self._wait(self._backends["cpu"].barrier())
