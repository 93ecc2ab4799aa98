"""The same fit with each engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lightning_fl as fl
from lightning_fl.strategies.internals import logger_steps
from tests.helpers.training import image_clients, trainer, weights

OF_TRAINER = ("gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches", "precision")
TWINS = (7, 23, 7, 1, 7, 1, 23)


def fit(engine: Any, module: Any, data: Any = None, rounds: int = 2, **options: Any) -> Any:
    """The Trainer after a fit; options of the Trainer and of the strategy are told apart."""
    of_trainer = {key: options.pop(key) for key in OF_TRAINER if key in options}
    strategy = fl.FederatedStrategy(options.pop("algorithm", "fedavg"), engine=engine, seed=5, **options)
    run = trainer(strategy, rounds, **of_trainer)
    run.fit(module, image_clients(TWINS) if data is None else data)
    return run


def both(make_module: Any, data: Any = None, rtol: float = 1e-9, **options: Any) -> tuple[Any, Any]:
    """Fits with each engine, and compares weights and logged values."""
    modules = make_module(), make_module()
    alone, together = (
        fit(engine, module, data, **dict(options))
        for engine, module in zip(("sequential", "vectorized"), modules, strict=True)
    )
    assert max(map(len, together.strategy.active_driver.trained_groups)) > 1
    torch.testing.assert_close(weights(modules[1]), weights(modules[0]), rtol=rtol, atol=rtol / 100)
    logged = [{k: v for k, v in run.callback_metrics.items() if not k.startswith("fl/")} for run in (alone, together)]
    torch.testing.assert_close(logged[1], logged[0], rtol=1e-5, atol=1e-6, check_dtype=False)
    assert together.global_step == alone.global_step
    if "on_client_error" not in options:  # a round whose last client fails ends with a batch of its own
        assert logger_steps(together) == logger_steps(alone)
    for own, other in zip(together.strategy.history, alone.strategy.history, strict=True):
        for name in ("num_clients", "num_examples", "num_steps", "refused", "update_norm", "update_spread"):
            assert own[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
    return alone, together
