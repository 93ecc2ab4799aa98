"""``engine="auto"`` gives what one client after the other gives, whatever else a step does."""

from __future__ import annotations

import logging
import random
from contextlib import nullcontext
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import DeviceStatsMonitor
from lightning.pytorch.callbacks.throughput_monitor import ThroughputMonitor
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_fl as fl
from lightning_fl.engines.module_state import Snapshot
from lightning_fl.strategies.vectorized import compatibility, step_watch
from lightning_fl.strategies.vectorized.step_watch import StepWatch
from tests.helpers.training import Plain, image_clients, trainer, weights
from tests.trainer.vectorized import quirks
from tests.trainer.vectorized.quirks import EXACT_TOGETHER, QUIRKS, Augmented, Quirky, Recorder

WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*training_step. returned .None", "ignore:The .* method of", "ignore:Trying to infer the"
)


def state_of(module: Any) -> dict[str, Any]:
    """All that the quirks of a module leave, as plain data."""
    counts = {"calls": quirks.CALLS[0], "class": quirks.Counts.total, "function": getattr(quirks.annealed, "calls", 0)}
    found: dict[str, Any] = dict(counts)
    for name in ("losses", "shapes", "examples", "deep"):
        found[name] = getattr(module, name, None)
    found["meter"] = vars(module.meter) if hasattr(module, "meter") else None
    found["last"] = list(getattr(module, "last", ()))
    for name in ("array", "seen", "tensor", "mean"):
        found[name] = getattr(module, name, None)
    found["metric"] = module.metrics_dict["loss"].metric_state if hasattr(module, "metrics_dict") else None
    for name, next_of in {"coin": "random", "rng": "random", "old": "rand"}.items():
        found[name] = getattr(getattr(module, name), next_of)() if hasattr(module, name) else None
    found["modes"] = [own.training for own in module.modules()]
    return found


class Outcome:
    """What is left of a fit."""

    def __init__(self, engine: str, make_module: Any, data: Any, rounds: int = 3, **options: Any) -> None:
        quirks.CALLS[0] = quirks.Counts.total = 0
        vars(quirks.annealed).clear()
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(7)
        self.module, self.recorder = make_module(), Recorder()
        strategy = fl.FederatedStrategy(options.pop("algorithm", "fedavg"), engine=engine, seed=3)
        self.groups: list[int] = []
        run = trainer(
            strategy,
            rounds,
            logger=self.recorder,
            callbacks=[Groups(self.groups), *options.pop("callbacks", ())],
            log_every_n_steps=1,
            **options,
        )
        data = data()
        run.fit(self.module, data)
        self.numbers = {
            "weights": weights(self.module),
            "metrics": {k: v for k, v in run.callback_metrics.items() if not k.startswith("fl/")},
            "step": run.global_step,
            "history": [
                {k: own[k] for k in ("num_clients", "num_examples", "num_steps", "refused", "update_norm")}
                for own in strategy.history
            ],
            "state": state_of(self.module),
            "experiment": self.recorder.experiment,
            "rows": [row for row in self.recorder.rows if row[1].keys() != {"epoch"}],
            "random": (random.random(), np.random.rand(), torch.rand(())),
            "reads": [getattr(own, "num_reads", 0) for own in getattr(data, "reads", ())],
        }


class Groups(fl.callbacks.FederatedCallback):
    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def on_group_end(self, trainer: Any, pl_module: Any, clients: Any) -> None:
        self.sizes.append(len(clients))


def clients(sizes: Any = (7, 7, 7, 7)) -> Any:
    return lambda: image_clients(sizes)


def augmented() -> Any:
    sets = [Augmented(7, seed) for seed in range(4)]
    data = fl.datamodules.ClientDatasets(sets, batch_size=4)
    data.reads = sets  # type: ignore[attr-defined]
    return data


def assert_exact(make_module: Any, data: Any = None, **options: Any) -> Outcome:
    data = clients() if data is None else data
    alone, auto = (Outcome(engine, make_module, data, **dict(options)) for engine in ("sequential", "auto"))
    for name, expected in alone.numbers.items():
        torch.testing.assert_close(
            auto.numbers[name],
            expected,
            rtol=1e-5 if name in ("metrics", "rows") else 1e-9,
            atol=1e-6 if name in ("metrics", "rows") else 1e-11,
            check_dtype=False,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    return auto


@WARNINGS
@pytest.mark.parametrize("name", QUIRKS)
@pytest.mark.spread(9)
def test_each_quirk(name: str) -> None:
    auto = assert_exact(lambda: Quirky([name]))
    if name in EXACT_TOGETHER:
        assert set(auto.groups) == {4}
    elif name.startswith("later") and name not in ("later: held parameters", "later: method of a metric"):
        # Side by side in the first round, and from where it fails on one after the other.
        assert auto.groups == [4, *[1] * 8]
    else:
        assert set(auto.groups) == {1}


@pytest.mark.parametrize("name", ["later: noise", "later: counter", "later: None"])
@WARNINGS
def test_a_fault_that_appears_later_is_told_in_one_line(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert_exact(lambda: Quirky([name]))
    told = [record.message for record in caplog.records if "one after the other" in record.message]
    assert len(told) == 1
    assert told[0].startswith("Clients train one after the other from round 1 on: ")
    assert "vmap" not in caplog.text
    assert "file an issue" not in caplog.text


class FailsAtStep(Plain):
    """Draws random numbers in the last step of a client, after steps that were logged."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("index", float(batch_idx), on_step=True)
        if self.current_epoch == 1 and batch_idx == 4:
            loss = loss * (1 + torch.rand(()))
        return loss


def test_nothing_remains_of_a_group_that_fails_at_its_end() -> None:
    auto = Outcome("auto", FailsAtStep, clients((20,) * 3))
    assert auto.groups == [3, *[1] * 6]
    alone = Outcome("sequential", FailsAtStep, clients((20,) * 3))
    for name in ("weights", "metrics", "step", "history", "random"):
        torch.testing.assert_close(auto.numbers[name], alone.numbers[name], rtol=1e-6, atol=1e-8, check_dtype=False)
    # From the failure on, the loggers get the rows of clients that train alone, and none of the group that failed.
    rows = [[row for row in own.numbers["rows"] if row[1]["epoch"] > 0] for own in (auto, alone)]
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-5, atol=1e-6)


@WARNINGS
@pytest.mark.parametrize("name", ["nothing", "later: noise", "later: counter", "Python's generator"])
def test_data_with_random_numbers_of_its_own(name: str) -> None:
    assert_exact(lambda: Quirky([name]), augmented)


@WARNINGS
@pytest.mark.parametrize(
    "name", ["nothing", "batch_idx", "global_step", "later: noise", "later: counter", "current_epoch"]
)
def test_clients_with_unequal_work(name: str) -> None:
    assert_exact(lambda: Quirky([name]), clients((3, 7, 12, 20, 7, 12, 5, 3, 11)))


def drawn_module(seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """Modules, data and settings at random."""
    draw = random.Random(seed)
    names = draw.sample(sorted(QUIRKS), draw.choice([1, 1, 2, 3]))
    data = draw.choice([clients(), clients((7, 3, 12, 7, 7, 3)), augmented, clients((9,) * 5)])
    options: dict[str, Any] = draw.choice([{}, {}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}])
    logs = draw.random() < 0.7
    if draw.random() < 0.2:
        options = {**options, "algorithm": "scaffold"}
    return lambda: Quirky(names, logs), data, options


@WARNINGS
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.slow] if seed >= 20 else []) for seed in range(500)]
)
@pytest.mark.spread(6)
def test_drawn_modules(seed: int) -> None:
    make_module, data, options = drawn_module(seed)
    assert_exact(make_module, data, **options)


# ---- these tests would show


@pytest.mark.parametrize(
    # Attributes are put back before each client, so that only what is not, or what changes within a client, shows.
    "name",
    ["Python's generator", "closure", "global", "later: counter"],
)
def test_a_watch_that_sees_nothing_would_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshot, "differences", lambda own: iter(()))
    monkeypatch.setattr(compatibility, "_compare", lambda *args: None)
    with pytest.raises(AssertionError):
        assert_exact(lambda: Quirky([name]))


@pytest.mark.parametrize("name", ["later: held parameters"])
def test_opaque_objects_that_are_let_through_would_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepWatch, "obstacle", lambda own: None)
    with pytest.raises(AssertionError):
        assert_exact(lambda: Quirky([name]))


def test_a_trainer_that_is_let_through_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepWatch, "view", lambda *args: nullcontext())
    with pytest.raises(AssertionError):
        assert_exact(lambda: Quirky(["logger"]))


@pytest.mark.parametrize("name", ["global draw", "later: coin"])
def test_random_numbers_that_are_let_through_would_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (step_watch, compatibility):
        monkeypatch.setattr(module, "random_states", lambda: (0,))
    monkeypatch.setattr(compatibility, "_compare", lambda *args: None)
    with pytest.raises(AssertionError):
        assert_exact(lambda: Quirky([name]))


def test_a_trial_that_leaves_its_traces_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshot, "restore", lambda own: None)
    with pytest.raises(AssertionError):
        assert_exact(lambda: Quirky(["meter"]))


# ---- callbacks of Lightning's that look at batches


class Sized(ThroughputMonitor):
    """Notes the sizes of batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        super().__init__(self._size, window_size=5)

    def _size(self, batch: Any) -> int:
        self.sizes.append(len(batch[0]))
        return len(batch[0])


@pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`")
@pytest.mark.parametrize("make", [Sized, DeviceStatsMonitor])
def test_callbacks_of_lightning_that_look_at_batches(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = make()
    auto = Outcome("auto", Plain, clients(), rounds=1, callbacks=[callback])
    assert set(auto.groups) == {1}
    if isinstance(callback, Sized):
        assert set(callback.sizes) == {4, 3}


# ---- data is not read twice in every round


class Sequences(torch.utils.data.Dataset):
    """Sequences whose length differs between clients, or between examples."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.num_reads = lengths, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        self.num_reads += 1
        return torch.full((self.lengths[index],), float(index), dtype=torch.float64)


class OfSequences(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (batch.mean() - self.net[1].bias).square().sum()


@pytest.mark.parametrize("lengths", [[[2] * 6, [3] * 6, [2] * 6, [4] * 6], [[2] * 6, [3] * 6, [4] * 6, [5] * 6]])
def test_data_that_can_not_be_stacked_is_read_twice_only_once(lengths: Any, caplog: pytest.LogCaptureFixture) -> None:
    sets = [Sequences(own) for own in lengths]
    reads: list[int] = []

    class Reads(fl.callbacks.FederatedCallback):
        def on_aggregate_end(self, trainer: Any, pl_module: Any, aggregate: Any) -> None:
            reads.append(sum(own.num_reads for own in sets))

    with caplog.at_level(logging.INFO):
        Outcome("auto", OfSequences, lambda: fl.datamodules.ClientDatasets(sets, batch_size=3), callbacks=[Reads()])
    per_round = [after - before for before, after in zip([0, *reads], reads, strict=False)]
    assert per_round[1:] == [24, 24]
    assert caplog.text.count("can't be stacked") == 1


def test_tensors_of_inference_mode_are_no_obstacle() -> None:
    class Inferring(Plain):
        def __init__(self) -> None:
            super().__init__()
            with torch.inference_mode():
                self.offset = torch.zeros(3)

    auto = assert_exact(Inferring)
    assert set(auto.groups) == {4}


class OfUsers(Plain):
    """Logs losses and torchmetrics, and has the layers of a transformer or of tables."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.double()
        self.accuracy = MulticlassAccuracy(4, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x.double().flatten(1))
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, prog_bar=True, on_step=False, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)}


def transformer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (4, 4)), layer, nn.Flatten(), nn.Linear(16, 4))


def table() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 4))


@pytest.mark.parametrize("make", [transformer, table])
def test_ordinary_modules_train_side_by_side(make: Any) -> None:
    auto = assert_exact(lambda: OfUsers(make()))
    assert set(auto.groups) == {4}


class LooksLater(L.Callback):
    """Looks at batches from the second round on."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.callbacks.append(Looks())


class Looks(L.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert len(batch) == 2


def test_a_callback_that_looks_at_batches_from_some_round_on() -> None:
    auto = Outcome("auto", Plain, clients(), callbacks=[LooksLater()])
    assert auto.groups == [4, *[1] * 8]


def rows(make_x: Any, num_classes: int) -> Any:
    """Four clients of seven examples."""

    def data() -> Any:
        torch.manual_seed(1)
        sets = [TensorDataset(make_x(), torch.randint(num_classes, (7,))) for _ in range(4)]
        return fl.datamodules.ClientDatasets(sets, batch_size=4)

    return data


REFERENCE_MODELS = {
    "digits": (lambda: fl.models.MLPClassifier(momentum=0.9), rows(lambda: torch.randn(7, 64), 10)),
    "logistic regression": (fl.models.LogisticRegression, rows(lambda: torch.randn(7, 784), 10)),
    "table": (lambda: fl.models.TabularMLP(6), rows(lambda: torch.randn(7, 6), 2)),
    "transformer": (
        lambda: fl.models.CharTransformer(9, every_place=False, max_length=5, width=8, num_heads=2, num_layers=1),
        rows(lambda: torch.randint(9, (7, 5)), 9),
    ),
}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("name", REFERENCE_MODELS)
@pytest.mark.spread(2)
def test_our_models_train_side_by_side(name: str) -> None:
    make_module, data = REFERENCE_MODELS[name]

    def make() -> Any:
        torch.manual_seed(0)
        return make_module()

    auto = Outcome("auto", make, data, precision="64-true")
    alone = Outcome("sequential", make, data, precision="64-true")
    assert set(auto.groups) == {4}
    torch.testing.assert_close(auto.numbers["weights"], alone.numbers["weights"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(auto.numbers["metrics"], alone.numbers["metrics"], rtol=1e-5, atol=1e-6)
