"""Remote calls from the ranks of a launch to the first one, which answers them in the order of arrival.

These are not collectives: a calling rank waits for its own answer and for no other rank. Each rank has its own
connection to the first one, so that a rank that dies breaks no other connection, and its replacement gets a new one.
"""

from __future__ import annotations

import json
import logging
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fl.communication.attendance import Attendance
from lightning_fl.communication.group import RankLost
from lightning_fl.communication.rendezvous import meet_again
from lightning_fl.torch_internals import gloo_group

Transport = Literal["gloo", "rpc"]
MAX_FIELDS = 1 << 26
"""64 MiB: maximum size of a call's fields."""
NOTHING = torch.empty(0, dtype=torch.uint8)
_LOOKS_EVERY_S = 0.1
log = logging.getLogger("lightning_fl.communication")


class Called(Protocol):
    """Answers calls, from several threads at once."""

    @property
    def limit(self) -> int:
        """Maximum number of bytes in a call's body."""

    def answer(self, rank: int, fields: Mapping[str, Any], body: Tensor) -> tuple[Mapping[str, Any], Tensor]:
        """The answer to a rank's call; fields are JSON, bodies bytes."""

    def lost(self, rank: int) -> None:
        """Called when a rank's process has ended."""


class Line(ABC):
    """A rank's connection to the first one; one call at a time, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def call(self, fields: Mapping[str, Any], body: Tensor = NOTHING) -> tuple[dict[str, Any], Tensor]:
        """The answer to a call.

        Args:
            fields: Values that JSON can represent.
            body: Bytes, uint8.

        Raises:
            RankLost: If the first rank has left.
        """
        with self._lock:
            try:
                return self._call(fields, body)
            except RuntimeError as error:
                raise RankLost(
                    f"Rank 0, which holds the model, has left ({str(error).splitlines()[0]}). Look for an error in its "
                    "output."
                ) from error

    @abstractmethod
    def _call(self, fields: Mapping[str, Any], body: Tensor) -> tuple[dict[str, Any], Tensor]: ...

    def close(self) -> None:
        """Closes the connection."""
        return


class OwnLine(Line):
    """The first rank's connection to itself."""

    def __init__(self, called: Called) -> None:
        super().__init__()
        self.called = called

    def _call(self, fields: Mapping[str, Any], body: Tensor) -> tuple[dict[str, Any], Tensor]:
        answer, content = self.called.answer(0, fields, body)
        return dict(answer), content


class Lines(ABC):
    """The first rank's end of all connections."""

    @abstractmethod
    def close(self) -> None:
        """Closes all connections."""


class Meeting:
    """The rendezvous of the ranks of a launch, including those that join later.

    Args:
        rank: Index of this process, from 0.
        size: Number of processes.
        address: Host of the store: ``MASTER_ADDR`` under torchrun.
        port: Port of the store.
        timeout: Maximum time that the ranks wait for each other at the start, and for an answer.
        name: The name of this rank's silo; empty if silos have none.

    Raises:
        TimeoutError: If some ranks have not joined in time.
        ValueError: If not all or none have a name, or two have the same.
    """

    def __init__(self, rank: int, size: int, address: str, port: int, timeout: timedelta, name: str = "") -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.place = f"tcp://{address}:{port}"
        self.store, self.own_address = meet_again(rank, size, address, port, timeout)
        attendance = Attendance(dist.PrefixStore("attendance", self.store), rank, size)
        attendance.arrive(name, timeout)
        self.names = [own or str(other) for other, own in enumerate(attendance.names)]

    def tell(self, word: str) -> None:
        """Stores a message of the first rank for the others, including those that join later."""
        self.store.set("word", word)

    def told(self) -> str:
        """Waits for the first rank's message."""
        return self.store.get("word").decode()

    def listen(self, transport: Transport, called: Called) -> Lines:
        """The first rank's end of the connections."""
        return GlooLines(self, called) if transport == "gloo" else RpcLines(self, called)

    def line(self, transport: Transport) -> Line:
        """This rank's connection to the first one."""
        return GlooLine(self) if transport == "gloo" else RpcLine(self)


# ---- Gloo: a group of two for each connection


def _pair(meeting: Meeting, store: dist.Store, rank: int, number: int, end: int) -> Any:
    # A group of all ranks can't admit a process that replaces one of them, but a group of two can be recreated.
    prefix = dist.PrefixStore(f"lines/{rank}/{number}", store)
    return gloo_group(prefix, end, 2, meeting.timeout, meeting.own_address)


def _send(pair: Any, to: int, fields: Mapping[str, Any], body: Tensor) -> None:
    header = torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8)
    pair.send([torch.tensor([len(header), len(body)])], to, 0).wait()
    pair.send([header], to, 0).wait()
    if len(body):
        pair.send([body.contiguous()], to, 0).wait()


def _receive(pair: Any, source: int, limit: int) -> tuple[dict[str, Any], Tensor]:
    sizes = torch.empty(2, dtype=torch.int64)
    pair.recv([sizes], source, 0).wait()
    num_fields, num_body = sizes.tolist()
    if not (0 < num_fields <= MAX_FIELDS and 0 <= num_body <= limit):
        raise ValueError(f"a call of {num_fields} and {num_body} bytes; at most {MAX_FIELDS} and {limit} are taken")
    header, body = torch.empty(num_fields, dtype=torch.uint8), torch.empty(num_body, dtype=torch.uint8)
    pair.recv([header], source, 0).wait()
    if num_body:
        pair.recv([body], source, 0).wait()
    fields = json.loads(header.numpy().tobytes())
    if not isinstance(fields, dict):
        raise ValueError("a call without fields")
    return fields, body


class GlooLine(Line):
    """A connection over Gloo."""

    def __init__(self, meeting: Meeting) -> None:
        super().__init__()
        number = meeting.store.add(f"came/{meeting.rank}", 1)
        self._group = _pair(meeting, meeting.store, meeting.rank, number, 1)

    def _call(self, fields: Mapping[str, Any], body: Tensor) -> tuple[dict[str, Any], Tensor]:
        _send(self._group, 0, fields, body)
        return _receive(self._group, 0, 1 << 62)

    def close(self) -> None:
        self._group = None


class GlooLines(Lines):
    """The first rank's ends of connections over Gloo: one thread each, and one that accepts new ones."""

    def __init__(self, meeting: Meeting, called: Called) -> None:
        self._meeting, self._called = meeting, called
        self._ends = threading.Event()
        self._looking = self._start(self._look)

    def _start(self, target: Any, *args: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, name="line", daemon=True)
        thread.start()
        return thread

    def _look(self) -> None:
        meeting, seen = self._meeting, dict.fromkeys(range(1, self._meeting.size), 0)
        # One store per thread, because a waiting store blocks other threads that use it.
        store = meeting.store.clone()  # type: ignore[attr-defined]
        with suppress(RuntimeError):  # the store is gone with the agent that hosted it
            while not self._ends.wait(_LOOKS_EVERY_S):
                for rank, before in seen.items():
                    number = store.add(f"came/{rank}", 0)
                    if number > before:
                        seen[rank] = number
                        self._start(self._serve, rank, number, store.clone())

    def _serve(self, rank: int, number: int, store: dist.Store) -> None:
        try:
            pair = _pair(self._meeting, store, rank, number, 0)
            while True:
                fields, body = _receive(pair, 1, self._called.limit)
                _send(pair, 1, *self._called.answer(rank, fields, body))
        except Exception as error:  # a caller may send anything
            log.debug("The connection of rank %d has ended: %s", rank, error)
            if store.add(f"came/{rank}", 0) == number:  # no other process has taken its place meanwhile
                self._called.lost(rank)

    def close(self) -> None:
        self._ends.set()
        self._looking.join()


# ---- torch.distributed.rpc

_called: list[Called] = []
"""The object that answers RPC calls to this process; RPC can only call functions."""


def _answer(rank: int, fields: str, body: Tensor) -> tuple[str, Tensor]:
    answer, content = _called[-1].answer(rank, json.loads(fields), body)
    return json.dumps(answer), content


def _init_rpc(meeting: Meeting) -> Any:
    from torch.distributed import rpc

    if meeting.rank and meeting.store.add(f"came/{meeting.rank}", 1) > 1:
        raise ValueError(
            f"Rank {meeting.rank} has been restarted, but torch.distributed.rpc can't admit it again. The others "
            "continue without it. Use transport='gloo', which allows ranks to rejoin."
        )
    seconds = int(meeting.timeout.total_seconds())
    place = rpc.TensorPipeRpcBackendOptions(rpc_timeout=seconds, init_method=meeting.place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warnings about its own group
        rpc.init_rpc(f"rank{meeting.rank}", rank=meeting.rank, world_size=meeting.size, rpc_backend_options=place)
    return rpc


class RpcLine(Line):
    """A connection over ``torch.distributed.rpc``, which pickles without authentication: only for your own cluster."""

    def __init__(self, meeting: Meeting) -> None:
        super().__init__()
        self._rank, self._rpc = meeting.rank, _init_rpc(meeting)

    def _call(self, fields: Mapping[str, Any], body: Tensor) -> tuple[dict[str, Any], Tensor]:
        answer, content = self._rpc.rpc_sync("rank0", _answer, args=(self._rank, json.dumps(fields), body))
        return json.loads(answer), content

    def close(self) -> None:
        self._rpc.shutdown(graceful=False)


class RpcLines(Lines):
    """The first rank's end of connections over RPC, whose threads are torch's."""

    def __init__(self, meeting: Meeting, called: Called) -> None:
        _called.append(called)
        self._rpc = _init_rpc(meeting)

    def close(self) -> None:
        self._rpc.shutdown(graceful=False)
        _called.pop()
