"""Weights & Biases with one run per silo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_fl.communication.attendance import NAME_VARIABLE


class SiloWandbLogger(WandbLogger):
    """A W&B logger with one run per silo, all in one W&B group; Lightning's own logger writes one run, on rank 0.

    Each run has the global metrics and, with :class:`~lightning_fl.callbacks.ClientMetrics`, the silo's own loss,
    seconds and drift under ``silo/``.

    Args:
        group: The W&B group: a name of the federation, the same for all silos.
        name: The silo's name. None: the variable ``LIGHTNING_FL_SILO_NAME``, or ``silo-RANK``.
        **kwargs: Arguments of :class:`lightning.pytorch.loggers.WandbLogger`.
    """

    def __init__(self, group: str, name: str | None = None, **kwargs: Any) -> None:
        name = name or os.environ.get(NAME_VARIABLE) or f"silo-{os.environ.get('RANK', '0')}"
        super().__init__(name=name, group=group, **kwargs)

    @property
    def experiment(self) -> Any:
        """This silo's run."""
        with _on_every_rank():
            return super().experiment

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        with _on_every_rank():
            super().log_metrics(metrics, step)

    def log_hyperparams(self, params: Any) -> None:
        with _on_every_rank():
            super().log_hyperparams(params)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        with _on_every_rank():
            super().log_table(*args, **kwargs)

    def log_image(self, *args: Any, **kwargs: Any) -> None:
        with _on_every_rank():
            super().log_image(*args, **kwargs)

    def finalize(self, status: str) -> None:
        with _on_every_rank():
            super().finalize(status)


@contextmanager
def _on_every_rank() -> Iterator[None]:
    """Makes Lightning's rank-zero functions run on this rank too, inside the block."""
    # Lightning's loggers are decorated with rank_zero_only, which compares an attribute of the function with 0.
    functions: tuple[Any, ...] = (rank_zero_only, fabric_rank_zero_only)
    before = [getattr(function, "rank", 0) for function in functions]
    for function in functions:
        function.rank = 0
    try:
        yield
    finally:
        for function, rank in zip(functions, before, strict=True):
            function.rank = rank
