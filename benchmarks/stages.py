"""Where the time of a round goes: what each stage of simulation takes by itself."""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from lightning_fl.engines import LocalTrainer
from lightning_fl.engines.vectorized.grouping import Grouping
from lightning_fl.federation.planner import Planner
from lightning_fl.federation.round import Round
from lightning_fl.strategies import driver
from lightning_fl.strategies.driver import RoundDriver
from lightning_fl.strategies.round_loaders import RoundLoaders

STAGES: dict[str, list[tuple[Any, str]]] = {
    "plan the round": [(Planner, "plan")],
    "read the clients' data": [(driver, "read_group"), (RoundLoaders, "open")],
    "load the clients": [(Round, "start")],
    "stack batches": [(Grouping, "stack")],
    "forward and backward": [(LocalTrainer, "step")],
    "optimizer": [(torch.optim.SGD, "step")],
    "hand on what is logged": [(RoundDriver, "_flush_logs")],
    "add up the updates": [(Round, "finish")],
    "close the round": [(RoundDriver, "_close")],
}
REST = "Lightning's loop and hooks"


class Stages:
    """Seconds of each stage by round, those of stages inside it not counted."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)
        self._inside: list[str] = [REST]
        self._since = 0.0

    def begin_round(self) -> None:
        """A round begins."""
        self._now.clear()
        self._since = time.perf_counter()

    def end_round(self) -> None:
        """It is over."""
        self._count()
        self.rounds.append(dict(self._now))

    def medians(self) -> dict[str, float]:
        """Median seconds of each stage over the rounds but the first."""
        names = [name for name in (*STAGES, REST) if any(name in own for own in self.rounds[1:])]
        return {name: statistics.median(own.get(name, 0.0) for own in self.rounds[1:]) for name in names}

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measures what happens inside."""
        with ExitStack() as stack:
            for stage, functions in STAGES.items():
                for owner, name in functions:
                    stack.enter_context(patch.object(owner, name, self._timed(stage, getattr(owner, name))))
            yield

    def _timed(self, stage: str, function: Any) -> Any:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._count()
            self._inside.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._count()
                self._inside.pop()

        return timed

    def _count(self) -> None:
        now = time.perf_counter()
        self._now[self._inside[-1]] += now - self._since
        self._since = now
