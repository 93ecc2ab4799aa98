"""The exchange of activations and gradients between parties: checked tensors, and detection of lost parties."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lightning_fl.communication import Group, RankLost

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_DIMS = 6
MAX_ELEMENTS = 1 << 28
TENSOR, LOST = 0, 1
GRACE_S = 10.0
"""Seconds that a party that ends waits for the others to receive the reason."""


class PartyLost(RankLost):
    """Raised when another party has left the training."""


class Channel:
    """Exchanges tensors between the parties, in the order in which both sides expect them.

    Args:
        group: The parties.
        names: A display name of each party.

    Attributes:
        sent: Bytes of tensors sent to each party.
        received: Bytes of tensors received from each party.
    """

    def __init__(self, group: Group, names: Sequence[str]) -> None:
        self.group, self.names = group, names
        self.sent: Counter[int] = Counter()
        self.received: Counter[int] = Counter()
        self._steps: Counter[tuple[str, int]] = Counter()

    def name(self, rank: int) -> str:
        """A party's number and name."""
        return f"party {rank} ({self.names[rank]})" if self.names[rank] else f"party {rank}"

    def send(self, tensor: Tensor, to: int) -> None:
        """Sends a tensor.

        Raises:
            PartyLost: If the party has left.
        """
        tensor = tensor.detach()
        if tensor.dtype not in DTYPES or tensor.dim() > MAX_DIMS:
            raise ValueError(
                f"Parties exchange floating-point tensors of at most {MAX_DIMS} dimensions; found {tensor.dtype} of "
                f"shape {tuple(tensor.shape)}."
            )
        step = self._count("to", to)
        shape = [*tensor.shape, *[0] * (MAX_DIMS - tensor.dim())]
        header = torch.tensor([TENSOR, step, DTYPES.index(tensor.dtype), tensor.dim(), *shape])
        try:
            self.group.send(header, to)
            if tensor.numel():
                self.group.send(tensor, to)
        except RankLost as error:
            self._lost(to, error)
        self.sent[to] += tensor.numel() * tensor.element_size()

    def receive(self, source: int, shape: Sequence[int | None], dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the expected shape.

        Args:
            source: The party that sends it.
            shape: Its shape; None for a size that only the sender knows.
            dtype: Its dtype. None: any floating-point one.

        Raises:
            PartyLost: If the party has left, or says that another one has.
            ValueError: If the tensor is not the expected one.
        """
        step = self._count("from", source)
        try:
            kind, other, code, dim, *sizes = self.group.receive(
                torch.empty(4 + MAX_DIMS, dtype=torch.int64), source
            ).tolist()
        except RankLost as error:
            self._lost(source, error)
        if kind == LOST and 0 <= other < self.group.size:
            raise PartyLost(f"{self.name(other).capitalize()} has left the training, as {self.name(source)} reports.")
        who = self.name(source)
        if kind != TENSOR or not 0 <= code < len(DTYPES) or not 0 <= dim <= MAX_DIMS:
            raise ValueError(f"{who} sent something that is not a tensor.")
        if other != step:
            raise ValueError(
                f"{who} is at exchange {other}, this party at {step}: the parties have different numbers of batches."
            )
        found, expected = sizes[:dim], list(shape)
        fits = len(found) == len(expected) and all(b is None or a == b for a, b in zip(found, expected, strict=True))
        if not fits or min(found, default=1) < 0 or math.prod(found) > MAX_ELEMENTS:
            raise ValueError(f"{who} sent a tensor of shape {found}, expected {expected}, where None is any size.")
        if dtype is not None and DTYPES[code] != dtype:
            raise ValueError(f"{who} sent {DTYPES[code]}, expected {dtype}. Train with the same precision.")
        tensor = torch.empty(found, dtype=DTYPES[code])
        try:
            if tensor.numel():
                tensor = self.group.receive(tensor, source)
        except RankLost as error:
            self._lost(source, error)
        self.received[source] += tensor.numel() * tensor.element_size()
        return tensor

    def _count(self, direction: str, rank: int) -> int:
        self._steps[direction, rank] += 1
        return self._steps[direction, rank]

    def _lost(self, rank: int, error: RankLost) -> None:
        """Tells the others which party is lost; they wait for this party and would report it instead."""
        header = torch.tensor([LOST, rank, 0, 0, *[0] * MAX_DIMS])
        others = [other for other in range(self.group.size) if other not in (rank, self.group.rank)]
        telling = [_in_thread(self.group.send, header, other) for other in others]
        # A party that is sending does not listen: receive its tensor first, and discard it.
        for other in others:
            _in_thread(self._drain, other)
        end = time.monotonic() + GRACE_S
        for thread in telling:
            thread.join(max(0.0, end - time.monotonic()))
        raise PartyLost(
            f"{self.name(rank).capitalize()} has left the training, or did not answer in time. Look at its output."
        ) from error

    def _drain(self, source: int) -> None:
        while True:
            kind, _, code, dim, *sizes = self.group.receive(
                torch.empty(4 + MAX_DIMS, dtype=torch.int64), source
            ).tolist()
            if kind == TENSOR and min(sizes, default=0) >= 0 and 0 < math.prod(sizes[:dim]) <= MAX_ELEMENTS:
                self.group.receive(torch.empty(sizes[:dim], dtype=DTYPES[code]), source)


def _in_thread(function: Callable[..., None], *args: Any) -> threading.Thread:
    def run() -> None:
        with suppress(Exception):
            function(*args)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
