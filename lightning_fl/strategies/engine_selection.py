"""Selects the engine that trains a rank's clients."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_fl.engines import LocalTrainer, OptimizerStates, SequentialEngine, Vectorized, VectorizedEngine
from lightning_fl.engines.isolation import Isolation
from lightning_fl.engines.vectorized.step_replay import StepReplays
from lightning_fl.engines.within_silo import WithinSilo
from lightning_fl.strategies import internals
from lightning_fl.strategies.batch_steps import step_functions
from lightning_fl.strategies.hooks import batch_hook
from lightning_fl.strategies.out_of_loop import OUTSIDE
from lightning_fl.strategies.vectorized.compatibility import unprofitable_reason, unsupported_reason
from lightning_fl.strategies.vectorized.driver import VectorizedDriver


def select_engine(
    strategy: Any, trainer: L.Trainer, optimizers: OptimizerStates
) -> tuple[LocalTrainer, VectorizedDriver | None]:
    """The engine for the strategy's ``engine`` setting, and the driver of client groups if clients train side by side.

    Raises:
        MisconfigurationException: If the vectorized engine is requested but can't train these clients.
    """
    module, arguments = trainer.lightning_module, (optimizers, strategy.personal, strategy.client_optimizer)
    isolation = Isolation(module, OUTSIDE, internals.bookkeeping)
    if strategy.engine == "sequential" or strategy.silo is not None:
        within = WithinSilo(strategy.federation)
        return SequentialEngine(module, *arguments, step_functions(trainer), isolation, within), None
    settings = strategy.engine if isinstance(strategy.engine, Vectorized) else Vectorized()
    is_asked_for, is_secure = strategy.engine != "auto", strategy.participation.secure
    engine = VectorizedEngine(module, *arguments, isolation=isolation)
    vectorized = VectorizedDriver(trainer, engine, settings, is_asked_for, is_asked_for and not is_secure)
    # Set last, because the engine and the driver of its groups need each other.
    engine.functions = step_functions(trainer, vectorized.step, vectorized.silent_step)
    reason = unsupported_reason(trainer, module, strategy)
    if reason is None and not is_asked_for:
        reason = unprofitable_reason(module, vectorized.grouping.max_clients)
    hook = batch_hook(trainer, strategy.active_driver.strategy_type)
    if reason is None and hook is not None and not is_asked_for:
        reason = f"{hook} would see several clients at once"
    if reason is not None:
        vectorized.refuse(reason)
        return engine, None
    if settings.capture_steps:
        engine.replays = StepReplays(engine, vectorized)
        engine.stacks_one = settings.stacks_one
    internals.clip_norms_with(strategy.precision_plugin, vectorized.clip_norms)
    return engine, vectorized
