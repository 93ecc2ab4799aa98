"""The group of silos with several processes each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_fl.communication.group import Group, LocalGroup, RankLost
from lightning_fl.communication.message import Message

_ERRORS: dict[str, type[Exception]] = {"RankLost": RankLost, "ValueError": ValueError}


class SiloGroup(Group):
    """Silos as the ranks of a federation: all processes of a silo make the same calls and get the same results.

    Messages of a silo are those of its first process. If each process holds the whole model, only the first one
    communicates with the other silos, and broadcasts the result within its silo. If the parameters are sharded over the
    silo's processes, each process exchanges tensors with those of the other silos that hold the same shards.

    Args:
        inner: The processes of this silo.
        outer: The first processes of all silos; None on the others.
        mates: The processes of all silos that hold the same shards as this one. None: each holds all parameters.
        rank: Index of this silo.
        size: Number of silos.
        names: The silos' names, if they have any.
    """

    def __init__(
        self, inner: Group, outer: Group | None, mates: Group | None, rank: int, size: int, names: Sequence[str] = ()
    ) -> None:
        super().__init__(rank, size)
        self._inner, self._outer, self._mates = inner, outer, mates
        self.names = names
        # Traffic that leaves the silo, not that between its processes.
        talker = mates or outer
        self.traffic = self.traffic if talker is None else talker.traffic

    @property
    def inner(self) -> Group:
        return self._inner

    @property
    def talks(self) -> bool:
        return self._outer is not None

    @property
    def shards(self) -> Group:
        return LocalGroup() if self._mates is None else self._inner

    @property
    def is_spread(self) -> bool:
        return self._mates is not None

    def who(self, rank: int) -> str:
        return f"silo {self.names[rank] if self.names else rank}"

    def leave(self, reason: str) -> None:
        for group in (self._outer, self._inner):
            if group is not None:
                group.leave(reason)

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        answer, error = Message(), None
        if self._outer is not None:
            try:
                answer = _pack(self._outer.all_gather(message, topic))
            except (RuntimeError, ValueError) as raised:  # tell the rest of the silo, which would otherwise wait
                error, answer = raised, Message({"error": type(raised).__name__, "text": str(raised)})
        with self._within():
            answer = self._inner.broadcast_message(answer)
        if error is not None:
            raise error
        if "error" in answer.fields:
            raise _ERRORS.get(str(answer.fields["error"]), RuntimeError)(str(answer.fields["text"]))
        return _unpack(answer)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        # The mean of integers is a float.
        return self._collective(lambda group: group.all_reduce(tensor, op), tensor / 1 if op == "mean" else tensor)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        return self._collective(lambda group: group.broadcast(tensor, root), tensor)

    def gather_tensor(self, tensor: Tensor) -> Tensor:
        return self._collective(lambda group: group.gather_tensor(tensor), tensor.new_empty((self.size, *tensor.shape)))

    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        like = parts[0].new_empty(sum(sizes))
        received = self._collective(lambda group: torch.cat(group.all_to_all(parts, sizes)), like)
        return list(received.split(list(sizes)))

    def barrier(self) -> None:
        with self._within():
            self._inner.barrier()
        if self._outer is not None:
            self._outer.barrier()
        with self._within():
            self._inner.barrier()

    def _collective(self, call: Callable[[Group], Tensor], like: Tensor) -> Tensor:
        if self._mates is not None:
            return call(self._mates)
        answer = like if self._outer is None else call(self._outer)
        with self._within():
            return self._inner.broadcast(answer)

    @contextmanager
    def _within(self) -> Iterator[None]:
        try:
            yield
        except RankLost as error:
            raise RankLost(f"{self.who(self.rank).capitalize()} has lost one of its processes. {error}") from error


def _pack(messages: Sequence[Message]) -> Message:
    tensors = {f"{place}/{name}": own for place, each in enumerate(messages) for name, own in each.tensors.items()}
    return Message({"messages": [each.fields for each in messages]}, tensors)


def _unpack(packed: Message) -> list[Message]:
    messages = [Message(fields) for fields in packed.fields["messages"]]
    for name, own in packed.tensors.items():
        place, _, rest = name.partition("/")
        messages[int(place)].tensors[rest] = own
    return messages
