"""Steps of client groups that are captured once and replayed give what steps that are not give, bit for bit."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import lightning_fl as fl
from lightning_fl.engines.capture import RecordedFunction
from lightning_fl.engines.vectorized import step_replay
from lightning_fl.strategies.vectorized.driver import VectorizedDriver
from tests.helpers.training import Ordinary, Plain, image_clients, trainer, weights

SIZES = (32, 32, 32)
LOG = "lightning_fl.engines"


class Fit:
    """Rounds of three clients side by side, each with a run of eight equal steps; the third round captures the run."""

    def __init__(self, make: Callable[[], L.LightningModule], captures: bool, **options: Any) -> None:
        data = image_clients(options.pop("sizes", SIZES), validate=make is Ordinary)
        engine = options.pop("engine", fl.engines.Vectorized(capture_steps=captures))
        strategy = fl.FederatedStrategy(options.pop("algorithm", "fedavg"), engine=engine, seed=5)
        run = trainer(strategy, options.pop("rounds", 3), **options)
        torch.manual_seed(1)
        module = make()
        run.fit(module, data)
        self.weights = weights(module)
        self.metrics = {k: v for k, v in run.callback_metrics.items() if not k.startswith("fl/")}
        self.history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in strategy.history]
        self.groups = strategy.active_driver.trained_groups
        vectorized = strategy.active_driver.vectorized
        replays = None if vectorized is None else vectorized.engine.replays
        self.num_replays = replays.num_replays if replays is not None else 0
        self.num_launches = replays.num_launches if replays is not None else 0


def both(make: Callable[[], L.LightningModule], **options: Any) -> Fit:
    """A fit with replays, compared with one without."""
    plain, replayed = (Fit(make, captures, **dict(options)) for captures in (False, True))
    assert torch.equal(replayed.weights, plain.weights)
    torch.testing.assert_close(replayed.metrics, plain.metrics, rtol=0, atol=0, equal_nan=True)
    assert replayed.history == plain.history
    return replayed


class Logging(Plain):
    """Has buffers, and logs a mean and a torchmetric."""

    num_seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1, dtype=torch.float64)
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.num_seen = self.num_seen + len(x)
        logits = self.net(self.norm(x.double()))
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"size": float(len(x)), "accuracy": self.accuracy}, on_step=False, on_epoch=True)
        return loss


class LoggingItsOwn(Plain):
    """Logs a parameter and a buffer, which the next steps of a run write to in place."""

    num_seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_seen", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.num_seen.add_(len(batch[0]))
        self.log_dict({"seen": self.num_seen, "weight": self.net[1].bias[0]}, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


class Dropping(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, nn.Dropout(0.5))


class Recurrent(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 4, batch_first=True, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows = self.layer(batch[0][:, 0].double())[0].unsqueeze(1)
        return super().training_step((rows, batch[1]), batch_idx)


def optimizer(kind: Any, interval: str | None = None, **options: Any) -> Callable[[], Plain]:
    def make(params: Any) -> Any:
        own = kind(params, **{"lr": 0.1, **options})
        schedule = {"scheduler": torch.optim.lr_scheduler.ExponentialLR(own, 0.5), "interval": interval}
        return {"optimizer": own, "lr_scheduler": schedule} if interval else own

    return lambda: Plain(make_optimizer=make)


SGD = torch.optim.SGD
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "momentum and clipping": (
        optimizer(SGD, momentum=0.9, nesterov=True),
        {"gradient_clip_val": 0.05, "sizes": (16, 16, 16)},
    ),
    "logs and buffers": (Logging, {"sizes": (31, 31, 31)}),
    "logs of its own tensors": (LoggingItsOwn, {}),
    "unequal work": (Plain, {"sizes": (31, 31, 25, 13)}),
    "dropout": (Dropping, {"rounds": 5}),
    "schedule by step": (optimizer(SGD, "step", momentum=0.9), {}),
    "schedule by epoch": (optimizer(SGD, "epoch"), {}),
    "Adam": (optimizer(torch.optim.Adam), {}),
    "an ordinary module": (Ordinary, {}),
    "fedprox": (Plain, {"algorithm": fl.algorithms.FedProx(1.0)}),
    "scaffold": (Plain, {"algorithm": "scaffold", "sizes": (32, 32, 32, 24), "rounds": 5}),
    "perfedavg": (Plain, {"algorithm": fl.algorithms.PerFedAvg(0.1)}),
    "clipping by value": (Plain, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "a recurrent layer": (Recurrent, {}),
    "float32": (lambda: Plain(torch.float32), {}),
}
STEP_BY_STEP = ("schedule by step", "schedule by epoch", "Adam", "an ordinary module", "perfedavg")
"""Whose optimizer's step is not a part of the replay, so that each step is replayed by itself."""


@pytest.mark.filterwarnings("ignore:training_step draws random numbers")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.spread(1)
def test_replays_change_nothing(name: str) -> None:
    make, options = CASES[name]
    run = both(make, **options)
    assert run.num_replays > 5
    assert (run.num_launches < run.num_replays) == (name not in STEP_BY_STEP)


@pytest.mark.slow
def test_a_capturable_optimizer_is_captured_once_it_has_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU torch refuses the option, though its formula is the same.
    monkeypatch.setattr(sys.modules[torch.optim.Adam.__module__], "_get_capturable_supported_devices", lambda: ["cpu"])
    run = both(optimizer(torch.optim.Adam, capturable=True), rounds=5)
    # A round is a step and a run of seven; the first two have none.
    assert (run.num_replays - run.num_launches) == 3 * 6


@pytest.mark.parametrize(("name", "with_step"), [("scaffold", True), ("perfedavg", False), ("Adam", False)])
@pytest.mark.slow
def test_the_optimizers_step_is_captured_where_it_repeats_itself(
    name: str, with_step: bool, caplog: pytest.LogCaptureFixture
) -> None:
    make, options = CASES[name]
    with caplog.at_level(logging.DEBUG, LOG):
        Fit(make, True, **options)
    captured = [record.message for record in caplog.records if record.message.startswith("Captured")]
    assert captured
    assert all((", with their" in message) == with_step for message in captured)


# ---- what can't be replayed


class AtIndex(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1.0 + batch_idx)


class AtEpoch(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1.0 + self.current_epoch)


class ShowsForward(Logging):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("own", self.accuracy(self.net(batch[0].double()), batch[1]))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (AtIndex, {}, "looks at the Trainer or at batch_idx"),
        (AtEpoch, {}, "looks at the Trainer or at batch_idx"),
        (ShowsForward, {}, "logs what a torchmetric has returned"),
        (Plain, {"accumulate_grad_batches": 2}, "accumulate"),
        (Plain, {"accumulate_grad_batches": 2, "sizes": (4, 4, 4)}, "accumulate"),
    ],
)
@pytest.mark.spread(1)
def test_other_steps_run_as_ever_and_the_log_says_why(
    make: Any, options: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, LOG):
        assert both(make, **options).num_replays == 0
    told = [(record.levelno, record.message) for record in caplog.records if record.name == LOG]
    assert len(told) == 1
    assert told[0][0] == logging.DEBUG
    assert reason in told[0][1]


class Profiled(PassThroughProfiler):
    """Makes each batch pass Lightning's hooks."""


def test_a_hook_that_looks_at_batches_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, LOG):
        assert Fit(Plain, True, profiler=Profiled(), rounds=1).num_replays == 0
    assert "Lightning's hooks" in caplog.text


# ---- what changes between replays


class Changes(Plain):
    """A hook changes what a step computes, in each round."""

    scale = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.scale

    def on_train_epoch_start(self) -> None:
        self.scale = 1.0 + self.current_epoch


def test_what_hooks_change_between_rounds_is_seen() -> None:
    assert both(Changes, rounds=2).num_replays > 5


@pytest.mark.slow
def test_without_the_version_of_what_a_step_sees_replays_would_be_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VectorizedDriver, "version", None)
    monkeypatch.setattr(step_replay, "CHECKED", (0,))
    plain, stale = (Fit(Changes, captures) for captures in (False, True))
    assert not torch.allclose(stale.weights, plain.weights)


@pytest.mark.slow
def test_options_of_the_optimizer_that_change_would_be_stale_too(monkeypatch: pytest.MonkeyPatch) -> None:
    make = optimizer(SGD, "step")
    monkeypatch.setattr(step_replay, "options_of", lambda optimizer: 0)
    monkeypatch.setattr(step_replay, "CHECKED", (0,))
    plain, stale = (Fit(make, captures) for captures in (False, True))
    assert not torch.allclose(stale.weights, plain.weights)


# ---- wrong replays


def wrong_from(
    monkeypatch: pytest.MonkeyPatch, number: int, spoil: Callable[[RecordedFunction, list[Tensor]], Any]
) -> None:
    """Spoils the replays of each captured function from one of them on."""
    right, counts = RecordedFunction._replay, {}  # type: ignore[var-annotated]

    def replay(self: RecordedFunction) -> list[Tensor]:
        counts[id(self)] = counts.get(id(self), -1) + 1
        outputs = right(self)
        if counts[id(self)] >= number:
            spoil(self, outputs)
        return outputs

    monkeypatch.setattr(RecordedFunction, "_replay", replay)


def spoil_loss(function: RecordedFunction, outputs: list[Tensor]) -> None:
    outputs[0] = outputs[0] * 1.001


def spoil_a_parameter(function: RecordedFunction, outputs: list[Tensor]) -> None:
    function.inputs[0].flatten()[3].mul_(1.001)


def spoil_the_second_step(function: RecordedFunction, outputs: list[Tensor]) -> None:
    if len(outputs) > 1:  # a step alone has a loss and nothing else
        outputs[1] = outputs[1] * 1.001


def fail(function: RecordedFunction, outputs: list[Tensor]) -> None:
    raise RuntimeError("CUDA error: operation not permitted")


@pytest.mark.parametrize(
    ("spoil", "num_replays", "level", "text"),
    [
        (spoil_loss, 0, logging.WARNING, "a replay differs from the step itself"),
        (spoil_a_parameter, 0, logging.WARNING, "a replay differs from the step itself"),
        (fail, 0, logging.DEBUG, "operation not permitted"),
        (spoil_the_second_step, 14, logging.WARNING, "a replay differs from the step itself"),
    ],
)
@pytest.mark.spread(1)
def test_a_wrong_replay_is_noticed_before_it_counts(
    spoil: Any,
    num_replays: int,
    level: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrong_from(monkeypatch, 0, spoil)
    with caplog.at_level(logging.DEBUG, LOG):
        assert both(Plain).num_replays == num_replays
    assert [record.message for record in caplog.records if record.levelno == level and text in record.message]


@pytest.mark.slow
def test_a_replay_that_goes_wrong_later_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step_replay, "CHECKED", (0, 1, 6))
    wrong_from(monkeypatch, 8, spoil_loss)  # two more, because a checked replay runs twice
    assert both(Plain, sizes=(32, 32)).num_replays == 6
    assert "a replay differs from the step itself" in caplog.text


# ---- clients one after the other


class Padding(Plain):
    """``torch.func.vmap`` gives the padding of an embedding a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 16, padding_idx=0, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words = batch[0].flatten(1).sum(1).abs().long() % 10
        return nn.functional.cross_entropy(self.net(self.words(words)), batch[1])


class Flipping(torch.autograd.Function):
    """A function without a rule for ``vmap``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -grad


class WithFunction(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return Flipping.apply(super().training_step(batch, batch_idx))


def one_by_one(make: Any, **options: Any) -> Fit:
    """A fit whose clients train one after the other by replays, compared with the sequential engine."""
    options = {"sizes": (16, 16, 13), **options}
    alone = fl.engines.Vectorized(clients_per_step=1, capture_steps=True)
    plain, replayed = (Fit(make, False, **{**options, "engine": engine}) for engine in ("sequential", alone))
    assert torch.equal(replayed.weights, plain.weights)
    torch.testing.assert_close(replayed.metrics, plain.metrics, rtol=1e-6, atol=0, equal_nan=True)
    assert replayed.groups == plain.groups
    return replayed


ALONE: dict[str, Any] = {
    "padding": (Padding, {"rounds": 1}),
    "a function of the user's": (WithFunction, {}),
    **{name: CASES[name] for name in ("momentum and clipping", "logs and buffers", "scaffold", "perfedavg", "Adam")},
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.spread(1)
def test_clients_one_after_the_other(name: str) -> None:
    make, options = ALONE[name]
    assert one_by_one(make, **options).num_replays > 5


@pytest.mark.slow
def test_a_wrong_replay_of_a_client_alone_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong_from(monkeypatch, 0, spoil_a_parameter)
    assert one_by_one(Plain).num_replays == 0
    assert "a replay differs from the step itself" in caplog.text


class Named(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """An example has a number of its own, which can't be stacked."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.randn(1, 4, 4), object()


class OutOfMemory(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise torch.OutOfMemoryError("it is too large")


def test_a_client_alone_that_does_not_fit_ends_the_fit() -> None:
    strategy = fl.FederatedStrategy("fedavg", engine=fl.engines.Vectorized(clients_per_step=1, capture_steps=True))
    with pytest.raises(torch.OutOfMemoryError):
        trainer(strategy).fit(OutOfMemory(), image_clients((4, 4)))
    loaders = [torch.utils.data.DataLoader(Named(), batch_size=2, collate_fn=list) for _ in range(2)]
    with pytest.raises(MisconfigurationException, match="only tensors can be stacked"):
        trainer(strategy).fit(Plain(), fl.datamodules.ClientLoaders(range(2), loaders.__getitem__))
