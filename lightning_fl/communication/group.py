"""The process group of a federation: its ranks and their collectives."""

from __future__ import annotations

import logging
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fl.communication.attendance import Attendance
from lightning_fl.communication.message import Message
from lightning_fl.torch_internals import gloo_group, set_timeout
from lightning_fl.tree import num_bytes

log = logging.getLogger("lightning_fl.communication")

MAX_MESSAGE_BYTES = 1 << 30
"""1 GiB. A rank holds all ranks' messages at once, each padded to the largest, so a mistake could fill its memory."""


class RankLost(RuntimeError):
    """Another rank has left the federation or did not answer within the timeout."""


@dataclass
class Traffic:
    """Communication statistics of a rank since the group was created.

    Args:
        num_bytes: Bytes of payload passed to collectives.
        seconds_waiting: Seconds spent in message gathers, which is mostly waiting for the slowest rank.
        seconds_reducing: Seconds spent in all-reduces.
    """

    num_bytes: int = 0
    seconds_waiting: float = 0.0
    seconds_reducing: float = 0.0


class Group(ABC):
    """The ranks of a federation and their collectives; every rank must call the same ones in the same order.

    Args:
        rank: Index of this process, from 0.
        size: Number of processes.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.traffic = Traffic()
        self.names: Sequence[str] = ()
        """The names of the ranks, if each is a silo with a name."""

    @property
    def inner(self) -> Group:
        """The processes of this rank, if a rank is a silo of several processes; all of them make the same calls."""
        return LocalGroup()

    @property
    def talks(self) -> bool:
        """Whether this process communicates for its rank; it passes on messages to the silo's other processes."""
        return True

    @property
    def shards(self) -> Group:
        """The processes over which the silo's parameters are sharded; one if each process holds all parameters."""
        return LocalGroup()

    @property
    def is_spread(self) -> bool:
        """Whether parameters are sharded over :attr:`shards`."""
        return False

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process, in the federation or in this silo."""
        return self.size == 1 and self.inner.size == 1

    def who(self, rank: int) -> str:
        """The rank's display name, with the name of its silo if it has one."""
        return f"silo {self.names[rank]}" if self.names else f"rank {rank}"

    def leave(self, reason: str) -> None:
        """Tells the other ranks why this one is about to leave, if the transport supports it."""
        return

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """The element-wise sum, mean, min or max (``op``) of the ranks' tensors, as a new tensor.

        ``tensor`` is not modified: a failed in-place all-reduce leaves its buffer undefined, and with the input intact
        the caller can retry.
        """

    @abstractmethod
    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        """The messages of all ranks, in the order of ranks; sizes may differ.

        Args:
            message: This rank's message.
            topic: The subject of the message, such as ``"end of round 3"``. The ranks compare it.

        Raises:
            RuntimeError: If another rank's message has another topic: the ranks are out of sync.
        """

    @abstractmethod
    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """The tensor of rank ``root``, as a new tensor; all ranks pass one of the same shape and dtype."""

    @abstractmethod
    def barrier(self) -> None:
        """Returns once all ranks have called it."""

    def gather_tensor(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, stacked in the order of ranks; all pass one of the same shape and dtype.

        A transport that can gather tensors without wrapping them in messages overrides it.
        """
        parts = self.all_gather(Message(tensors={"part": tensor}), "tensors")
        return torch.stack([part.tensors["part"].to(tensor.device) for part in parts])

    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Sends ``parts[rank]`` to each rank, and returns the parts that the ranks sent to this one.

        A transport that can send to a single rank overrides it: here each rank receives everything.

        Args:
            parts: A flat tensor for each rank, all of the same dtype.
            sizes: For each rank the number of elements that it sends to this one.
        """
        own = {str(rank): part for rank, part in enumerate(parts)}
        messages = self.all_gather(Message(tensors=own), "all to all")
        received = [message.tensors[str(self.rank)].to(parts[0].device) for message in messages]
        assert [len(part) for part in received] == list(sizes), "the ranks do not agree on the sizes of their parts"
        return received

    def send(self, tensor: Tensor, rank: int) -> None:
        """Sends a tensor to one rank, which calls :meth:`receive` with one of the same shape and dtype.

        Not every transport supports it.
        """
        raise NotImplementedError(f"{type(self).__name__} can't send to a single rank; use a TorchGroup.")

    def receive(self, like: Tensor, rank: int) -> Tensor:
        """The tensor that one rank sends, as a new one with the shape and dtype of ``like``."""
        raise NotImplementedError(f"{type(self).__name__} can't receive from a single rank; use a TorchGroup.")

    def broadcast_message(self, message: Message, root: int = 0) -> Message:
        """The message of rank ``root``."""
        # The other ranks don't know the size of the message, which a broadcast would need. So gather empty ones.
        return self.all_gather(message if self.rank == root else Message(), "broadcast")[root]


class LocalGroup(Group):
    """A federation in one process: every collective is the identity."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        result = tensor.detach().clone()
        return result / self.size if op == "mean" else result  # as with several ranks, the mean of integers is a float

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        return [message]

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        return tensor.detach().clone()

    def gather_tensor(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone()[None]

    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        return [part.detach().clone() for part in parts]

    def barrier(self) -> None:
        return None


# Gloo has no mean, so it is a sum that is divided afterwards.
_OPS: dict[str, Any] = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}


class TorchGroup(Group):
    """Several processes, connected by ``torch.distributed`` backends in a private process group.

    The default process group is not used, for two reasons. Lightning broadcasts over it before each batch, which would
    hang ranks with different numbers of batches. And a silo needs it for DDP or FSDP among its own processes.

    Args:
        store: The rendezvous store of the ranks.
        rank: Index of this process, from 0.
        size: Number of processes.
        device: Device of the tensors. CUDA tensors are sent over NCCL if each rank has its own GPU; everything else is
            sent over Gloo, through main memory.
        timeout: Maximum time that a collective waits for the other ranks.
        address: The address at which the other ranks reach this one. None: Gloo determines it.
        name: The name of this rank's silo; empty if it has none.

    Raises:
        TimeoutError: If some ranks have not joined in time.
        ValueError: On every rank, if not all or none have a name, or two have the same.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        device: torch.device,
        timeout: timedelta,
        address: str | None = None,
        name: str = "",
    ) -> None:
        super().__init__(rank, size)
        self.timeout = timeout
        self.attendance = Attendance(dist.PrefixStore("attendance", store), rank, size)
        self.attendance.arrive(name, timeout)
        self.names = self.attendance.names if any(self.attendance.names) else ()
        self._num_collectives = 0
        gloo = gloo_group(dist.PrefixStore("gloo", store), rank, size, timeout, address)
        self._backends: dict[str, Any] = {"cpu": gloo}
        if device.type == "cuda" and self._each_has_its_own(_identify(device)):
            options = dist.ProcessGroupNCCL.Options()
            set_timeout(options, timeout)
            self._backends["cuda"] = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)
        # Finalizers also run at interpreter exit, where a process with an open Gloo group may abort.
        weakref.finalize(self, _close, self._backends, self.attendance)

    def _each_has_its_own(self, gpu: str) -> bool:
        gpus = [str(message.fields["gpu"]) for message in self.all_gather(Message({"gpu": gpu}), "gpu")]
        num_gpus = len(set(gpus))
        if num_gpus < self.size and self.rank == 0:
            # NCCL refuses two ranks on one GPU.
            log.warning(f"{self.size} ranks share {num_gpus} GPU(s): tensors are sent over Gloo, not NCCL.")
        return num_gpus == self.size

    def leave(self, reason: str) -> None:
        with suppress(RuntimeError):  # the store is gone with the rank that hosts it
            self.attendance.note_failure(reason)

    def _wait(self, work: Any, tensor: Tensor) -> None:
        self._num_collectives += 1
        try:
            # On a GPU, `wait` with a timeout would block the CPU, which otherwise continues.
            while self._backend(tensor) is self._backends["cpu"]:
                try:
                    return work.wait(self.attendance.patience)
                except RuntimeError:
                    if work.is_completed():
                        break
                with suppress(RuntimeError):
                    self.attendance.notice(self._num_collectives)
            work.wait()  # raises the error, if there was one
        except RuntimeError as error:
            raise RankLost(
                f"{self.attendance.explain_loss(self._num_collectives)}, or has not come to the same place within "
                f"{self.timeout.total_seconds():g} s ({str(error).splitlines()[0]}). Look for an error in the other "
                "ranks' output."
            ) from error

    def _wait_for_one(self, begin: Callable[[], Any], rank: int) -> None:
        # Not counted as a collective, because ranks make different numbers of these calls. If the other end is known to
        # be gone, Gloo raises when the operation begins.
        try:
            begin().wait()
        except RuntimeError as error:
            raise RankLost(
                f"Rank {rank} has left or has not answered within {self.timeout.total_seconds():g} s "
                f"({str(error).splitlines()[0]}). Look for an error in its output."
            ) from error

    def _backend(self, tensor: Tensor) -> Any:
        return self._backends[tensor.device.type]

    def _sendable(self, tensor: Tensor) -> Tensor:
        """The tensor, copied to main memory if no backend supports its device."""
        return tensor.detach() if tensor.device.type in self._backends else tensor.detach().cpu()

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        # The backend reduces in place and sees memory, not strides: reduce a contiguous copy.
        result = self._sendable(tensor).clone(memory_format=torch.contiguous_format)
        options = dist.AllreduceOptions()
        options.reduceOp = _OPS[op]
        start = time.perf_counter()
        self._wait(self._backend(result).allreduce([result], options), result)
        self.traffic.seconds_reducing += time.perf_counter() - start
        self.traffic.num_bytes += num_bytes([result])
        result = result.to(tensor.device)
        return result / self.size if op == "mean" else result

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        data = Message({"topic": topic, "fields": message.fields}, message.tensors).encode()
        # A collective needs the same size on each rank: gather the sizes first, then the data padded to the largest.
        # The sizes arrive when the slowest rank does, so this is the time spent waiting for it.
        start = time.perf_counter()
        sizes = [int(size) for size in self._gather(torch.tensor([len(data)]))]
        self.traffic.seconds_waiting += time.perf_counter() - start
        self.traffic.num_bytes += len(data)
        if max(sizes) > MAX_MESSAGE_BYTES:
            raise ValueError(
                f"{self.who(sizes.index(max(sizes))).capitalize()} wants to send a message of {max(sizes)} bytes; at "
                f"most {MAX_MESSAGE_BYTES} are allowed. If a metric keeps every prediction, use its binned form."
            )
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = self._gather(padded)
        messages = [Message.decode(bytes(part[:size].numpy())) for part, size in zip(parts, sizes, strict=True)]
        # Ranks get out of sync if, for example, one has another callback. Without this check a rank would misinterpret
        # a message, and fail much later or compute wrong results.
        for rank, other in enumerate(messages):
            if other.fields["topic"] != topic:
                raise RuntimeError(
                    f"The ranks are out of sync: {self.who(rank)} is at {other.fields['topic']!r}, "
                    f"{self.who(self.rank)} at {topic!r}. All ranks need the same callbacks, which must behave the "
                    "same on each rank."
                )
        return [Message(other.fields["fields"], other.tensors) for other in messages]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._wait(self._backends["cpu"].allgather([parts], [tensor]), tensor)
        return parts

    def gather_tensor(self, tensor: Tensor) -> Tensor:
        own = self._sendable(tensor).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._wait(self._backend(own).allgather([parts], [own]), own)
        self.traffic.num_bytes += num_bytes([own])
        return torch.stack(parts).to(tensor.device)

    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        own = self._sendable(torch.cat(list(parts)))
        received = own.new_empty(sum(sizes))
        given = [len(part) for part in parts]
        self._wait(self._backend(own).alltoall_base(received, own, list(sizes), given, dist.AllToAllOptions()), own)
        self.traffic.num_bytes += num_bytes([own])
        return list(received.to(parts[0].device).split(list(sizes)))

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        received = self._sendable(tensor).clone(memory_format=torch.contiguous_format)
        options = dist.BroadcastOptions()
        options.rootRank = root
        self._wait(self._backend(received).broadcast([received], options), received)
        self.traffic.num_bytes += received.numel() * received.element_size()
        return received.to(tensor.device)

    def send(self, tensor: Tensor, rank: int) -> None:
        own = tensor.detach().cpu().contiguous()
        self._wait_for_one(lambda: self._backends["cpu"].send([own], rank, 0), rank)
        self.traffic.num_bytes += num_bytes([own])

    def receive(self, like: Tensor, rank: int) -> Tensor:
        received = torch.empty(like.shape, dtype=like.dtype)
        self._wait_for_one(lambda: self._backends["cpu"].recv([received], rank, 0), rank)
        return received.to(like.device)

    def barrier(self) -> None:
        self._wait(self._backends["cpu"].barrier(), torch.empty(0))


def _identify(gpu: torch.device) -> str:
    """An identifier of a GPU that is unique across machines."""
    return str(torch.cuda.get_device_properties(gpu).uuid)


def _close(backends: dict[str, Any], attendance: Attendance) -> None:
    backends.clear()
    if attendance.has_failed:
        attendance.wait_until_seen()
