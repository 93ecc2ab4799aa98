"""How much a client trains in a round."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from lightning_fl.types import Phase


@dataclass(frozen=True)
class LocalWork:
    """How much a client trains in a round.

    Args:
        epochs: Passes over the client's loader.
        steps: Optimizer steps instead of passes; the loader is cycled.
        accumulate: Batches whose gradients one optimizer step takes together.
        limit: Batches of one pass, as a count (int) or a share (float).
        part: The part of it that gets done, in (0, 1]: a straggler stops earlier, but not before its first step.
    """

    epochs: int = 1
    steps: int | None = None
    accumulate: int = 1
    limit: int | float = 1.0
    part: float = 1.0

    @property
    def max_pass_length(self) -> int | None:
        """Batches that a pass has at most, whatever the loader; None if the limit is a share."""
        return self.limit if isinstance(self.limit, int) else None

    def pass_length(self, num_batches: int | None) -> int | None:
        """Batches of one pass over a loader of ``num_batches``; None if the loader has no length.

        Raises:
            ValueError: If the limit leaves nothing of a loader that has batches, or is a share of an unknown length.
        """
        if isinstance(self.limit, int):
            return None if num_batches is None else min(self.limit, num_batches)
        if num_batches is None:
            if self.limit < 1.0:
                raise ValueError(
                    f"limit_train_batches={self.limit} is a share, but the client's loader has no length. Give a count."
                )
            return None
        limited = int(num_batches * self.limit)
        if num_batches and not limited:
            raise ValueError(
                f"limit_train_batches={self.limit} leaves none of the client's {num_batches} batches. Give a count "
                "such as limit_train_batches=1, or a larger share."
            )
        return limited

    def segments(self, num_batches: int | None) -> list[int | None]:
        """Numbers of batches between which no accumulation window reaches; None where it will show in training."""
        length = self.pass_length(num_batches)
        if length == 0:
            return []
        if self.steps is not None:
            return [math.ceil(self.part * self.steps) * self.accumulate]
        if length is None:
            return [None] * math.ceil(self.part * self.epochs)
        a_pass = -(-length // self.accumulate)
        passes, steps = divmod(math.ceil(self.part * (self.epochs * a_pass)), a_pass)
        return [*[length] * passes, *[min(steps * self.accumulate, length)] * (steps > 0)]

    def for_phase(self, phase: Phase) -> LocalWork:
        """How much of it is a phase."""
        return replace(self, epochs=phase.epochs or 1, steps=phase.steps) if phase.has_own_work else self

    def load(self, size: float) -> float:
        """How long a client with ``size`` examples is busy, beside others that train as many epochs or steps."""
        return self.part * (self.epochs * size if self.steps is None else self.steps)

    def num_steps(self, num_batches: int | None) -> int | None:
        """Optimizer steps that a client with ``num_batches`` a pass takes in a round."""
        segments = self.segments(num_batches)
        if None in segments:
            return None
        return sum(-(-length // self.accumulate) for length in segments if length is not None)


class BatchPosition(NamedTuple):
    """Where a batch stands in the local work of its client, or of its client group.

    Args:
        offset: Its index among the batches of the current phase, from 0.
        starts_window: Whether an accumulation window starts here, so that gradients are emptied.
        ends_window: Whether the window ends here, so that the optimizer steps.
        window: Batches of a full accumulation window, over which the loss is averaged.
        ends_pass: Whether it is the last batch of a pass over the client's data.
        ends_phase: Whether it is the last batch of the phase.
        is_last: Whether it is the last batch of the client, or group, in this round.
    """

    offset: int
    starts_window: bool = True
    ends_window: bool = True
    window: int = 1
    ends_pass: bool = False
    ends_phase: bool = False
    is_last: bool = False
