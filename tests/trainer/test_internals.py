"""What strategies/internals.py and loops.py rely on; a failure here means that Lightning has changed."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultCollection, _ResultMetric
from packaging.version import Version

from lightning_fl import FederatedStrategy
from lightning_fl.strategies import internals, loops
from lightning_fl.strategies import results as logged
from tests.helpers.training import Ordinary, Plain, loader, trainer


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_version_is_one_that_was_studied() -> None:
    assert Version("2.6") <= Version(L.__version__) < Version("2.7")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (_TrainingEpochLoop._accumulated_batches_reached, ["self"]),
        (_TrainingEpochLoop.update_lr_schedulers, ["self", "interval", "update_plateau_schedulers"]),
        (_TrainingEpochLoop.advance, ["self", "data_fetcher"]),
        (_TrainingEpochLoop._should_check_val_fx, ["self", "data_fetcher"]),
        (_TrainingEpochLoop._num_ready_batches_reached, ["self"]),
        (_TrainingEpochLoop._build_kwargs, ["self", "kwargs", "batch", "batch_idx"]),
        (_TrainingEpochLoop._update_learning_rates, ["self", "interval", "update_plateau_schedulers"]),
        (_AutomaticOptimization._make_zero_grad_fn, ["self", "batch_idx", "optimizer"]),
        (_EvaluationLoop._store_dataloader_outputs, ["self"]),
        (_EvaluationLoop._on_evaluation_epoch_end, ["self"]),
        (_EvaluationLoop.setup_data, ["self"]),
        (_FitLoop.setup_data, ["self"]),
        (_FitLoop.on_advance_end, ["self"]),
        (_TrainingEpochLoop.on_advance_end, ["self", "data_fetcher"]),
        (L.LightningModule._on_before_batch_transfer, ["self", "batch", "dataloader_idx"]),
        (call._call_strategy_hook, ["trainer", "hook_name", "args", "kwargs"]),
        (call._call_lightning_module_hook, ["trainer", "hook_name", "args", "pl_module", "kwargs"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_overridden_methods_are_there(function: Any, expected: list[str]) -> None:
    assert parameters(function) == expected


def test_overridden_properties_are_there_and_the_overrides_are_used() -> None:
    assert isinstance(inspect.getattr_static(_TrainingEpochLoop, "_is_training_done"), property)
    assert isinstance(inspect.getattr_static(_TrainingEpochLoop, "done"), property)
    assert "max_batches" in vars(trainer("auto").fit_loop)
    fit = trainer("fedavg")
    fit.fit(Plain(), loader(20))
    assert type(fit.fit_loop) is loops.RoundFitLoop
    assert type(fit.fit_loop.epoch_loop) is loops.RoundEpochLoop
    assert type(fit.fit_loop.epoch_loop.automatic_optimization) is loops.RoundOptimization
    assert type(fit.fit_loop.epoch_loop.val_loop) is loops.RoundEvaluationLoop


def test_logged_values_carry_what_ranks_tell_each_other() -> None:
    told = {"fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "add_dataloader_idx"}
    assert told | {"dataloader_idx", "metric_attribute", "enable_graph", "_sync"} == {f.name for f in fields(_Metadata)}
    settings = {
        "fx": "training_step",
        "name": "loss",
        "prog_bar": False,
        "logger": True,
        "on_step": True,
        "on_epoch": True,
        "reduction": "mean",
        "add_dataloader_idx": True,
        "dataloader_idx": None,
        "metric_attribute": None,
        "is_tensor": True,
        "dtype": "float32",
    }
    placeholder = logged.placeholder(settings, torch.device("cpu"))
    assert isinstance(placeholder, _ResultMetric)
    assert logged.describe(placeholder) == settings
    assert set(placeholder._defaults) == {"value", "cumulated_batch_size"}
    placeholder._computed = torch.tensor(3.0)
    results = _ResultCollection(training=True)
    results["training_step.loss"] = placeholder
    assert results.metrics(on_step=False)["callback"] == {"loss": 3.0, "loss_epoch": 3.0}


def test_logged_values_are_read_and_shown() -> None:
    results = _ResultCollection(training=True)
    for value in (1.0, 3.0):
        results.log("training_step", "loss", torch.tensor(value), on_step=True, on_epoch=True, batch_size=2)
    result = results["training_step.loss"]
    assert logged.num_updates(result) == 2
    assert logged.step_entry(result, 4)["value"] == 12.0
    assert not logged.is_computed(result)
    assert result.compute() == 2.0
    assert logged.is_computed(result)
    logged.show(result, 5.0, "float64", of_step=True)
    assert result.compute().dtype == torch.float64
    assert results.metrics(on_step=True)["callback"] == {"loss": 5.0, "loss_step": 5.0}
    assert results.metrics(on_step=False)["callback"] == {"loss": 5.0, "loss_epoch": 5.0}
    logged.empty(result)
    assert (result.value, result.cumulated_batch_size) == (0.0, 0)
    assert not logged.is_computed(result)


def test_a_stand_in_is_put_where_there_is_no_optimizer() -> None:
    assert internals.has_no_optimizer([_MockOptimizer()])
    assert not internals.has_no_optimizer(trained(Plain()).strategy.optimizers)


def trained(module: Any) -> L.Trainer:
    fit = trainer("auto")
    fit.fit(module, loader(8))
    return fit


class Trace(L.Callback):
    """The order of events in the last batch of an epoch."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        norm = torch.stack([param.grad.norm() for param in module.parameters()]).norm()
        self.events.append("gradients are not yet clipped" if norm > 1e-3 else "gradients are clipped")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        last = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        self.events.append("last batch ends" if last else "batch ends")

    def on_validation_start(self, *_: Any) -> None:
        self.events.append("validation")

    def on_train_epoch_end(self, *_: Any) -> None:
        self.events.append("epoch ends")


def test_the_first_callback_comes_where_a_round_must_end() -> None:
    trace = Trace()
    module = Ordinary()
    steps: list[str] = trace.events
    module.lr_scheduler_step = lambda scheduler, metric: (steps.append("schedule"), scheduler.step())  # type: ignore
    fit = trainer("auto", callbacks=[trace], gradient_clip_val=1e-6, num_sanity_val_steps=0)
    fit.fit(module, loader(8), loader(4))
    step = ["gradients are not yet clipped", "schedule"]
    assert trace.events == [*step, "batch ends", *step, "last batch ends", "validation", "epoch ends"]


def test_sampler_injection_can_be_turned_off() -> None:
    fit = trainer("auto")
    assert fit._accelerator_connector.use_distributed_sampler is True
    internals.keep_samplers(fit)
    assert fit._accelerator_connector.use_distributed_sampler is False


def test_what_is_logged_aside_leaves_no_trace_and_can_be_read() -> None:
    class Aside(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            connector, results = trainer._logger_connector, trainer._results
            before = (connector._current_fx, connector._first_loop_iter, dict(results), module._current_fx_name)
            with internals.logging_out_of_loop(trainer, training=False) as aside:
                assert trainer._results is aside
                internals.step_out_of_loop(trainer, "validation_step", batch, batch_idx)
                self.logged = internals.logged_out_of_loop(aside)
            assert trainer._results is results
            after = (connector._current_fx, connector._first_loop_iter, dict(results), module._current_fx_name)
            assert after == before

    aside = Aside()
    trainer("fedavg", callbacks=[aside], limit_val_batches=0).fit(Ordinary(), loader(20), loader(4))
    assert aside.logged.keys() == {"val_loss", "val_acc"}


def test_a_stand_in_is_found_as_the_trainer_of_a_module_and_its_submodules() -> None:
    module = Plain()
    module.inner = Plain()
    module.trainer = own = trainer("auto")
    stand_in = object()
    with internals.trainer_replaced(module, stand_in):
        assert module.trainer is stand_in
        assert module.inner.trainer is stand_in
    assert module.trainer is own
    assert module.inner.trainer is own


def test_a_trainer_reads_the_private_accelerator_of_its_strategy_first_and_sets_the_public_one_first() -> None:
    seen = []

    class Look(FederatedStrategy):
        def __getattribute__(self, name: str) -> Any:
            if name in ("_accelerator", "_precision_plugin", "_checkpoint_io", "cluster_environment"):
                seen.append(name)
            return super().__getattribute__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            seen.append(f"set {name}")
            super().__setattr__(name, value)

    strategy = Look()
    seen.clear()
    trainer(strategy)
    assert seen[0] == "_accelerator"
    assert next(name for name in seen if name.startswith("set ")) == "set accelerator"


def test_a_monitored_checkpoint_knows_the_step_at_which_it_saved_last() -> None:
    checkpoint = ModelCheckpoint("kept", save_last=True)
    run = trainer("fedavg", 2, callbacks=[checkpoint], enable_checkpointing=True)
    run.fit(Plain(), loader(20))
    assert checkpoint._last_global_step_saved == run.global_step > 0
    assert internals.outdated_last_checkpoints(run) == {}
    checkpoint._last_global_step_saved -= 1
    assert internals.outdated_last_checkpoints(run) == {checkpoint.last_model_path: False}
