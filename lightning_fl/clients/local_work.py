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
        accumulate: Batches per optimizer step (gradient accumulation).
        limit: Batches of one pass, as a count (int) or a share (float); the Trainer's ``limit_train_batches``.
        part: The share of the work that the client finishes, in (0, 1]: a straggler stops early, but not before its
            first step.
        cut: Whether ``part`` is rounded down to whole steps rather than up, because time has run out.
    """

    epochs: int = 1
    steps: int | None = None
    accumulate: int = 1
    limit: int | float = 1.0
    part: float = 1.0
    cut: bool = False

    @property
    def max_pass_length(self) -> int | None:
        """Upper bound on the batches of a pass, whatever the loader; None if the limit is a share."""
        return self.limit if isinstance(self.limit, int) else None

    def pass_length(self, num_batches: int | None) -> int | None:
        """Batches of one pass over a loader of ``num_batches``; None if the loader has no length.

        Raises:
            ValueError: If the limit leaves no batch of a loader that has some, or is a share of an unknown length.
        """
        if isinstance(self.limit, int):
            return None if num_batches is None else min(self.limit, num_batches)
        if num_batches is None:
            if self.limit < 1.0:
                raise ValueError(
                    f"limit_train_batches={self.limit} is a share, but the client's loader has no length. Give a count."
                )
            return None
        # Rounded down, as Lightning does.
        limited = int(num_batches * self.limit)
        if num_batches and not limited:
            raise ValueError(
                f"limit_train_batches={self.limit} leaves none of the client's {num_batches} batches. Give a count "
                "such as limit_train_batches=1, or a larger share."
            )
        return limited

    def segments(self, num_batches: int | None) -> list[int | None]:
        """Lengths in batches of the segments at whose ends an optimizer step is due; None for an unknown length.

        With ``epochs`` each pass is a segment: Lightning steps at the end of an epoch even if the accumulation window
        is not full. With ``steps`` the loader is cycled and there is one segment.
        """
        length = self.pass_length(num_batches)
        if length == 0:
            return []
        if self.steps is not None:
            return [self._finished(self.steps) * self.accumulate]
        if length is None:
            return [None] * self._finished(self.epochs)
        # A straggler does a share of the optimizer steps, not of the batches, so it always ends on a step.
        steps_per_pass = -(-length // self.accumulate)
        passes, steps = divmod(self._finished(self.epochs * steps_per_pass), steps_per_pass)
        return [*[length] * passes, *[min(steps * self.accumulate, length)] * (steps > 0)]

    def _finished(self, count: int) -> int:
        """The number of steps, or passes, out of ``count`` that the client finishes."""
        # A share such as 2/3 of 3 steps may fall short of 2 by a rounding error.
        return max(1, math.floor(self.part * count + 1e-9)) if self.cut else math.ceil(self.part * count)

    def for_phase(self, phase: Phase) -> LocalWork:
        """The work of one phase: the phase's own setting, or else all of this work."""
        return replace(self, epochs=phase.epochs or 1, steps=phase.steps) if phase.has_own_work else self

    def load(self, size: float) -> float:
        """Relative cost of a client with ``size`` examples, to balance the ranks; only ratios are meaningful."""
        return self.part * (self.epochs * size if self.steps is None else self.steps)

    def num_steps(self, num_batches: int | None) -> int | None:
        """Optimizer steps per round of a client with ``num_batches`` batches per pass; None if unknown."""
        segments = self.segments(num_batches)
        if None in segments:
            return None
        return sum(-(-length // self.accumulate) for length in segments if length is not None)


class BatchPosition(NamedTuple):
    """The position of a batch in the local work of its client or client group.

    Args:
        offset: Its index among the batches of the pass over the client's data, from 0.
        starts_window: Whether an accumulation window starts here, so that gradients are zeroed.
        ends_window: Whether the window ends here, so that the optimizer steps.
        window: Batches of a full accumulation window, over which the loss is averaged.
        ends_pass: Whether it is the last batch of a pass over the client's data.
        ends_phase: Whether it is the last batch of the phase.
        is_last: Whether it is the last batch of the client, or group, in this round.
        ends_epoch: Whether it is the last batch of a pass, including one cut short because the client's work ends.
        epoch_length: Number of batches of the pass, as cut short; None if unknown.
    """

    offset: int
    starts_window: bool = True
    ends_window: bool = True
    window: int = 1
    ends_pass: bool = False
    ends_phase: bool = False
    is_last: bool = False
    ends_epoch: bool = False
    epoch_length: int | None = None
