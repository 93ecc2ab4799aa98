"""What the contract suite of engines and steps compares: modules that log in every way, and what is seen of a fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

import lightning_fl as fl
from lightning_fl.callbacks import FederatedCallback
from lightning_fl.strategies.batch_steps import BatchSteps, HookedSteps, TightSteps
from lightning_fl.strategies.internals import logger_steps
from lightning_fl.torch_internals import unwrap
from tests.helpers.training import Ordinary, Plain, image_clients, images, trainer, weights

SIZES = (7, 5, 7, 1, 7)
"""Examples of the clients; with batches of 4, one of them takes one step and the others two."""
SEEN: list[list[float]] = []
"""For each training step of a client alone ``batch_idx``, ``global_step`` and the learning rate."""


# ---- modules


class Noted:
    """Notes what each training step sees."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        run = self.trainer  # type: ignore[attr-defined]
        noted = [batch_idx, run.global_step, run.optimizers[0].param_groups[0]["lr"]]
        # A step of several clients must change nothing.
        if all(unwrap(param) is None for param in self.parameters()):  # type: ignore[attr-defined]
            SEEN.append(noted)
        return super().training_step(batch, batch_idx)  # type: ignore[misc]


class NotedPlain(Noted, Plain):
    """A small network that logs nothing."""


class NotedOrdinary(Noted, Ordinary):
    """What users write: BatchNorm, Adam, a cosine schedule by step, a logged torchmetric, validation."""

    def __init__(self) -> None:
        super().__init__(torch.float64)


class Logging(NotedPlain):
    """Logs in every way that a step may."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.by_hand = MeanMetric(nan_strategy="ignore")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        x, y = batch
        logits = self.net(x.to(self.net[1].weight.dtype))
        self.log("by_step", loss)
        self.log("sum_by_step", loss, reduce_fx="sum")
        self.log("by_epoch", loss, on_step=False, on_epoch=True)
        self.log("both", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("sum", loss, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("min", loss, on_step=True, on_epoch=True, reduce_fx="min")
        self.log("max", loss, on_step=False, on_epoch=True, reduce_fx="max", prog_bar=True)
        self.log("sized", loss, on_step=False, on_epoch=True, batch_size=7)
        self.log("unlogged", loss, on_step=False, on_epoch=True, logger=False)
        self.log("number", 3.0 + batch_idx, on_step=True, on_epoch=True)
        if batch_idx % 2 == 1:
            self.log("sometimes", loss, on_step=True, on_epoch=True)
            self.log("sometimes_step", loss, prog_bar=True)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True, prog_bar=True)
        self.by_hand.update(loss)
        return {"loss": loss, "logits": logits.detach()}

    def on_train_epoch_end(self) -> None:
        self.log("by_hand", self.by_hand.compute())
        self.by_hand.reset()


class EpochLogging(NotedPlain):
    """Logs for the epoch only, so that Lightning need not be called in each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accuracy = MulticlassAccuracy(4, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        x, y = batch
        self.accuracy(self.net(x.to(self.net[1].weight.dtype)), y)
        self.log("mean", loss, on_step=False, on_epoch=True)
        self.log("sized", loss, on_step=False, on_epoch=True, batch_size=7)
        self.log("max", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log_dict({"sum": loss, "half": loss / 2}, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log_dict({"number": batch_idx, "accuracy": self.accuracy}, on_step=False, on_epoch=True)
        return loss


class StepLogging(NotedPlain):
    """Logs for the step only, where Lightning does not ask for the size of a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("by_step", loss)
        return loss


class Skipping(NotedPlain):
    """Returns None for some batches, to learn nothing from them."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("both", loss, on_step=True, on_epoch=True)
        return None if batch_idx % 3 == 0 else loss


class WithoutIndex(Plain):
    """Its step takes no ``batch_idx``."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        loss = super().training_step(batch, 0)
        self.log("both", loss, on_step=True, on_epoch=True)
        return loss


class Counting(NotedPlain):
    """Has buffers that a step changes: those of BatchNorm, and an integer that counts examples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1, dtype=torch.float64)
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.num_seen = self.num_seen + len(x)
        return super().training_step((self.norm(x.double()), y), batch_idx)


class Frozen(Logging):
    """Its first layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1].requires_grad_(False)


class Tied(NotedPlain):
    """Two of its layers share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.Linear(4, 4, bias=False, dtype=torch.float64))
        self.net.append(nn.Linear(4, 4, bias=False, dtype=torch.float64))
        nn.init.eye_(self.net[4].weight)
        self.net[5].weight = self.net[4].weight


class Random(Logging):
    """Draws random numbers in its step."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, nn.Dropout(0.5))


class OnDicts(NotedPlain):
    """Its batches are mappings."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step((batch["x"], batch["y"]), batch_idx)
        self.log("by_step", loss)
        return loss


class Poisoned(Logging):
    """Gives NaN for the client whose images are shifted by 1000."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return super().training_step((x * torch.where(x.amax() > 500, float("nan"), 1.0), y), batch_idx)


def scheduled(interval: str, frequency: int = 1) -> Callable[[], Plain]:
    """A module whose learning rate is halved by step or by epoch."""

    def make(params: Any) -> dict[str, Any]:
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        config = {"scheduler": schedule, "interval": interval, "frequency": frequency}
        return {"optimizer": optimizer, "lr_scheduler": config}

    return lambda: Logging(make_optimizer=make)


# ---- data


def poisoned_clients() -> fl.datamodules.ClientDatasets:
    """Four clients of equal size; the loss of the second is NaN with :class:`Poisoned`."""
    datasets = [images(7, seed) for seed in range(4)]
    datasets[1].tensors[0].add_(1000)
    return fl.datamodules.ClientDatasets(datasets, batch_size=4)


class Broken(torch.utils.data.Dataset[Any]):
    """Six examples, one of which can't be read."""

    def __init__(self, damaged: int) -> None:
        self.damaged = damaged

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        if index == self.damaged:
            raise OSError("the file is damaged")
        return images(6)[index]


def failing_clients(damaged: int) -> fl.datamodules.ClientLoaders:
    """Four clients of six examples; the second one fails at its example ``damaged``."""
    datasets = [images(6, 0), Broken(damaged), images(6, 2), images(6, 3)]
    return fl.datamodules.ClientLoaders([torch.utils.data.DataLoader(dataset, batch_size=4) for dataset in datasets])


class Mappings(torch.utils.data.Dataset[Any]):
    """Images as mappings."""

    def __init__(self, num_examples: int, seed: int) -> None:
        self.images = images(num_examples, seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.images[index]
        return {"x": x, "y": y}


class Stream(torch.utils.data.IterableDataset[Any]):
    """Images without a length."""

    def __init__(self, num_examples: int, seed: int) -> None:
        self.images = images(num_examples, seed)

    def __iter__(self) -> Any:
        return iter([self.images[index] for index in range(len(self.images))])


def clients_of(kind: Callable[[int, int], Any]) -> Callable[[], fl.datamodules.ClientLoaders]:
    """Clients whose data sets are ``kind(num_examples, seed)``."""

    def make() -> fl.datamodules.ClientLoaders:
        datasets = [kind(size, seed) for seed, size in enumerate(SIZES)]
        return fl.datamodules.ClientLoaders([torch.utils.data.DataLoader(own, batch_size=4) for own in datasets])

    return make


def clients_with_missing_batches() -> fl.datamodules.ClientLoaders:
    """Three clients whose second batch is None, as from a collation that has found nothing to use."""

    def collate(examples: list[Any]) -> Any:
        return None if len(examples) == 3 else torch.utils.data.default_collate(examples)

    sampler = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10], [11, 12]]
    return fl.datamodules.ClientLoaders(
        [
            torch.utils.data.DataLoader(images(13, seed), batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]
            for seed in range(3)
        ]
    )


# ---- forms


class LooksAtBatches(L.Callback):
    """Does nothing; that it is there makes each batch pass Lightning's hooks."""

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        pass


class Profiled(PassThroughProfiler):
    """Does nothing; makes each batch pass Lightning's hooks, also that of a client group."""


@dataclass(frozen=True)
class Form:
    """A way in which clients are trained.

    Args:
        engine: The strategy's ``engine``.
        steps: The form of a step that it leads to.
        is_group: Whether clients train side by side.
        callbacks: Callbacks that force the form.
        options: Options of the Trainer that force the form.
    """

    engine: str
    steps: type[BatchSteps]
    is_group: bool = False
    callbacks: Callable[[], list[L.Callback]] = list
    options: Callable[[], dict[str, Any]] = dict


FORMS = {
    "hooked": Form("sequential", HookedSteps, callbacks=lambda: [LooksAtBatches()]),
    "tight": Form("sequential", TightSteps),
    "group": Form("vectorized", TightSteps, is_group=True),
    "hooked group": Form("vectorized", HookedSteps, is_group=True, options=lambda: {"profiler": Profiled()}),
}
REFERENCE = "hooked"


# ---- a fit, and what is seen of it


class Recorder(Logger):
    """Keeps what it is given, without the federation's own figures."""

    name = version = "recorder"
    experiment = None

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {name: value for name, value in metrics.items() if not name.startswith("fl/")}
        if row.keys() - {"epoch"}:
            self.rows.append({"logger step": -1 if step is None else step, **row})


class ClipsFromRoundOne(L.Callback):
    """Turns clipping on after the first round."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.gradient_clip_val = 0.01 if trainer.current_epoch else None


def scaling() -> dict[str, Any]:
    """Half precision with a gradient scaler, whose scale is so large at first that gradients overflow in some steps."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


class Watch(FederatedCallback):
    """Notes each round's end, and which form its steps had; does not look at batches."""

    def __init__(self) -> None:
        self.steps: list[BatchSteps] = []
        self.group_sizes: list[int] = []
        self.rounds: list[dict[str, Any]] = []

    def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any) -> None:  # type: ignore[override]
        self.steps.append(trainer.strategy.active_driver.open_round.steps)

    def on_group_end(self, trainer: Any, module: Any, clients: Any) -> None:  # type: ignore[override]
        self.group_sizes.append(len(clients))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        lr = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.rounds.append(
            {"metrics": _own(trainer.callback_metrics), "bar": dict(trainer.progress_bar_metrics), "lr": lr}
        )


class WatchClients(FederatedCallback):
    """Notes what each client's training came to; clients then train alone."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:  # type: ignore[override]
        self.runs.append({**asdict(run), "client": client, "refused": update is None})


@dataclass
class Fit:
    """What is seen of a fit: only numbers, tensors, and containers of them.

    Args:
        weights: All values of the module's ``state_dict``.
        metrics: ``trainer.callback_metrics`` in the end.
        bar: ``trainer.progress_bar_metrics`` in the end.
        counters: ``global_step``, ``current_epoch`` and the x-axis of the loggers.
        rounds: Metrics and learning rates at the end of each round.
        history: ``strategy.history`` without seconds.
        states: The server's state, and what each client keeps.
        rows: What the logger got.
        seen: What each training step saw.
        runs: The facts of each client's training, if clients train alone.
        progress: The counters of Lightning's loops, as a checkpoint holds them.
    """

    weights: Tensor
    metrics: dict[str, Any]
    bar: dict[str, Any]
    counters: dict[str, int]
    rounds: list[Any]
    history: list[Any] = field(default_factory=list)
    states: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    seen: list[list[float]] = field(default_factory=list)
    runs: list[Any] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)


SHOWN = ("metrics", "bar", "rounds", "rows", "history", "runs", "progress")
"""What is logged: torchmetrics compute in float32, and a mean over the epoch has no fixed order of summation."""
OF_GROUPS = ("weights", "metrics", "bar", "counters", "rounds", "history", "states")
"""What is the same when clients train side by side; a logger then gets one row for a step of all of them."""
OF_STEPS = (*OF_GROUPS, "rows", "seen", "runs", "progress")
"""What is the same in both forms of a step: bit for bit, or to rounding if it is logged."""


@dataclass(frozen=True)
class Entry:
    """Something under which all forms must agree.

    Args:
        module: Makes the module.
        trainer: Options of the Trainer.
        strategy: Options of the strategy.
        data: Makes the clients.
        fresh: Makes options of the Trainer that each fit needs anew: callbacks that do not look at batches, plug-ins.
        groups: Whether clients can train side by side.
        plain: Whether one client that keeps its optimizer is a plain ``Trainer.fit``.
        rtol: Relative tolerance where results are equal to rounding only.
        rounds: Rounds of the fit.
        warns: A pattern that a warning in every form must match; all others are errors.
    """

    module: Callable[[], L.LightningModule] = Logging
    trainer: Mapping[str, Any] = field(default_factory=dict)
    strategy: Mapping[str, Any] = field(default_factory=dict)
    data: Callable[[], Any] = lambda: image_clients(SIZES)
    fresh: Callable[[], Mapping[str, Any]] = dict
    groups: bool = True
    plain: bool = False
    rtol: float = 1e-10
    rounds: int = 2
    warns: str = ""

    def fit(self, form: str, *, ckpt_path: str | None = None, data: Any = None, **changes: Any) -> Fit:
        """The fit under a form; ``changes`` are options of the Trainer.

        Raises:
            AssertionError: If the batches did not go the way of the form.
        """
        how, watch, clients = FORMS[form], Watch(), WatchClients()
        options = {"algorithm": "fedavg", "engine": how.engine, "seed": 5, **self.strategy}
        watchers = [watch] if how.is_group else [watch, clients]
        run, recorder, seen, module = self._run(
            fl.FederatedStrategy(**options),
            [*how.callbacks(), *watchers],
            {**how.options(), **changes},
            self.data() if data is None else data,
            ckpt_path,
        )
        assert watch.steps, "no round was trained"
        assert all(type(steps) is how.steps for steps in watch.steps)
        assert (max(watch.group_sizes, default=0) > 1) == how.is_group
        driver = run.strategy.active_driver
        kept = {str(client): driver.store.get(client) or {} for client in driver.store.clients()}
        history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in run.strategy.history]
        return Fit(
            weights(module),
            _own(run.callback_metrics),
            dict(run.progress_bar_metrics),
            _counters(run),
            watch.rounds,
            history=history,
            states={"server": dict(driver.state.server), "clients": kept},
            rows=recorder.rows,
            seen=seen,
            runs=clients.runs,
            progress=_progress(run),
        )

    def fit_plain(self, data: Any) -> Fit:
        """The fit of a plain Trainer, without a federation."""
        run, recorder, seen, module = self._run("auto", [], {}, data, None)
        metrics, bar = _own(run.callback_metrics), dict(run.progress_bar_metrics)
        return Fit(weights(module), metrics, bar, _counters(run), [], rows=recorder.rows, seen=seen)

    def _run(
        self, strategy: Any, callbacks: list[Any], options: dict[str, Any], data: Any, ckpt_path: str | None
    ) -> tuple[Any, Recorder, list[list[float]], L.LightningModule]:
        recorder, module = Recorder(), self.module()
        fresh = dict(self.fresh())
        callbacks = [*callbacks, *fresh.pop("callbacks", ()), *options.pop("callbacks", ())]
        options = {"max_epochs": self.rounds, "log_every_n_steps": 1, **self.trainer, **fresh, **options}
        run = trainer(strategy, **options, logger=recorder, callbacks=callbacks)
        SEEN.clear()
        Closure.warning_cache.clear()  # Lightning warns of a step that returns None once in a process
        with pytest.warns(UserWarning, match=self.warns) if self.warns else nullcontext():
            run.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return run, recorder, list(SEEN), module


def assert_same(found: Fit, expected: Fit, names: Sequence[str] = OF_STEPS, rtol: float = 0.0) -> None:
    """Compares what is seen of two fits, part by part; with ``rtol=0`` bit for bit what is not logged."""
    for name in names:
        own_rtol = max(rtol, 1e-6) if name in SHOWN else rtol
        torch.testing.assert_close(
            _plain(getattr(found, name)),
            _plain(getattr(expected, name)),
            rtol=own_rtol,
            atol=own_rtol / 100,
            equal_nan=True,
            check_dtype=False,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def assert_plain(found: Fit, plain: Fit, rounds: int, rtol: float) -> None:
    """Compares one client that keeps its optimizer with a plain Trainer.

    Values of a step are the same but for the last step of a round, where a federation shows the cohort's mean.
    """
    assert_same(found, plain, ("weights", "counters", "seen"), rtol)
    last = [plain.counters["logger"] // rounds * (number + 1) - 1 for number in range(rounds)]

    def epochs(metrics: Mapping[str, Any], is_last: bool = True) -> dict[str, Any]:
        return {name: value for name, value in metrics.items() if not (is_last and name.endswith("_step"))}

    def shown(fit: Fit) -> Fit:
        rows = [epochs(row, row["logger step"] in last) for row in fit.rows]
        return replace(fit, metrics=epochs(fit.metrics), bar=epochs(fit.bar), rows=rows)

    assert_same(shown(found), shown(plain), ("metrics", "bar", "rows"), rtol)
    for row, expected in zip(found.rows, plain.rows, strict=True):
        assert row.keys() == expected.keys()


def _own(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if not name.startswith("fl/")}


def _counters(run: Any) -> dict[str, int]:
    return {"global_step": run.global_step, "epoch": run.current_epoch, "logger": logger_steps(run)}


def _progress(run: Any) -> dict[str, Any]:
    state = run.fit_loop.state_dict()
    kept = ("epoch_progress", "epoch_loop.state_dict", "epoch_loop.batch_progress", "epoch_loop.scheduler_progress")
    optimizer = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    return {**{name: state[name] for name in kept}, "optimizer": optimizer}


def _plain(value: Any) -> Any:
    """The value with numbers for what `assert_close` does not take."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if not isinstance(item, str)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return value.double()
    return math.nan if value is None else float(value)
