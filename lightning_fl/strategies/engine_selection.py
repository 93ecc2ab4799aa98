"""Which engine trains a rank's clients."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_fl.engines import OptimizerStates, SequentialEngine, Vectorized, VectorizedEngine
from lightning_fl.strategies import internals as internals
from lightning_fl.strategies.vectorized.compatibility import unprofitable_reason, unsupported_reason
from lightning_fl.strategies.vectorized.driver import VectorizedDriver


def choose_engine(
    strategy: Any, trainer: L.Trainer, optimizers: OptimizerStates
) -> tuple[SequentialEngine, VectorizedDriver | None]:
    """The engine that the strategy's setting asks for, and what lets clients train together if it can.

    Raises:
        MisconfigurationException: If the vectorized engine is asked for but can't train these clients.
    """
    module = trainer.lightning_module
    if strategy.engine == "sequential":
        return SequentialEngine(module, optimizers, strategy.personal, strategy.client_optimizer), None
    engine = VectorizedEngine(module, optimizers, strategy.personal, strategy.client_optimizer)
    settings = strategy.engine if isinstance(strategy.engine, Vectorized) else Vectorized()
    is_asked_for, is_secure = strategy.engine != "auto", strategy.participation.secure
    together = VectorizedDriver(trainer, engine, settings, is_asked_for, allows_random=is_asked_for and not is_secure)
    reason = unsupported_reason(trainer, module, strategy)
    if reason is None and not is_asked_for:
        reason = unprofitable_reason(module, together.max_clients)
    if reason is not None:
        together.refuse(reason)
        return engine, None
    internals.clip_norms_with(strategy.precision_plugin, together.clip_norms)
    return engine, together
