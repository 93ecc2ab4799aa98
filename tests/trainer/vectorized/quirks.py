"""What training steps do beside computing a loss from a batch: state of every kind, special steps, random numbers."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric

from tests.helpers.training import Plain, images

LATER = 1
"""The round from which on some steps do something else."""
CALLS = [0]


Step = Callable[[Any, Tensor, Any, int], Any]
"""What a step does besides: ``(module, loss, batch, batch_idx) -> loss``."""


class Meter:
    def __init__(self) -> None:
        self.count, self.values = 0, []  # type: ignore[var-annotated]

    def update(self, value: Any, size: int) -> None:
        self.count += size
        self.values.append(value)


class Counts:
    total = 0


def annealed(loss: Tensor) -> Tensor:
    annealed.calls = getattr(annealed, "calls", 0) + 1  # type: ignore[attr-defined]
    return loss * (1 + 0.01 * (annealed.calls % 7))  # type: ignore[attr-defined]


class Quirk:
    """Something that a step does besides."""

    together = False
    """Whether its clients can train side by side to the end."""

    def __init__(self, step: Step, make: Callable[[Any], Any] = lambda own: None) -> None:
        self.step = step
        self.make = make


def coin(draw: Callable[[Any], float]) -> Step:
    return lambda own, loss, batch, idx: loss * 0 if draw(own) < 0.3 else loss


def scaled(number: Callable[[Any], float]) -> Step:
    return lambda own, loss, batch, idx: loss * (1 + 0.01 * number(own))


def later(step: Step) -> Step:
    return lambda own, loss, batch, idx: step(own, loss, batch, idx) if own.current_epoch >= LATER else loss


def attribute(name: str, make: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda own: object.__setattr__(own, name, make())


def noted(note: Callable[[Any, Tensor, Any], Any]) -> Step:
    def step(own: Any, loss: Tensor, batch: Any, idx: int) -> Tensor:
        note(own, loss, batch)
        return loss

    return step


def closure() -> Callable[[], int]:
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return count

    return step


def count_deep(own: Any) -> float:
    own.deep["a"][0]["b"][1] += 1
    return own.deep["a"][0]["b"][1]


def count_globally(own: Any) -> float:
    CALLS[0] += 1
    return CALLS[0] % 5


def count_on_class(own: Any) -> float:
    Counts.total += 1
    return Counts.total % 5


def count_in_array(own: Any) -> float:
    own.array[1] += 1
    return float(own.array[1])


def note_metric(own: Any, loss: Tensor, batch: Any) -> None:
    own.metrics_dict["loss"].update(loss.detach())


def move_mean(own: Any, loss: Tensor, batch: Any, idx: int) -> Tensor:
    own.mean = 0.9 * own.mean + 0.1 * loss.detach()
    return loss - 0.1 * own.mean * loss


def grad_norm(own: Any, loss: Tensor, batch: Any, idx: int) -> Tensor:
    grad = own.net[1].bias.grad
    return loss if grad is None else loss * (1 + grad.norm().detach())


def swallow(own: Any, loss: Tensor, batch: Any, idx: int) -> Tensor:
    try:
        own.log("swallowed", loss.item(), on_step=False, on_epoch=True)
    except RuntimeError:
        own.log("swallowed", 0.0, on_step=False, on_epoch=True)
    return loss


def collect(own: Any) -> None:
    own.shapes = []
    own.net[1].register_forward_hook(lambda module, args, out: own.shapes.append(tuple(out.shape)))


def penalise(own: Any, loss: Tensor, batch: Any, idx: int) -> Tensor:
    return loss + 0.01 * sum(param.square().sum() for param in own.parameters() if param.requires_grad)


def compute_early(own: Any, loss: Tensor, batch: Any, idx: int) -> Tensor:
    try:
        own.mean_metric.update(loss.detach())
        own.log("early", own.mean_metric.compute(), on_step=False, on_epoch=True)
    except Exception:
        return loss * 2
    return loss


def hold_method(own: Any) -> None:
    own.held_metric = MeanMetric()
    own.add_to = own.held_metric.update


def count_in_file(own: Any) -> float:
    from tests.trainer.vectorized import quirks

    quirks.CALLS[0] += 1
    return quirks.CALLS[0] % 5


def count_in_context(own: Any) -> float:
    own.context.set(own.context.get(0) + 1)
    return own.context.get() % 5


def write_batch(own: Any, loss: Tensor, batch: Any, idx: int) -> Tensor:
    batch[0].mul_(0.5)
    return loss


def restored_draw(own: Any) -> float:
    state = random.getstate()
    drawn = random.random()
    random.setstate(state)
    return drawn


QUIRKS: dict[str, Quirk] = {
    "nothing": Quirk(lambda own, loss, batch, idx: loss),
    "current_epoch": Quirk(scaled(lambda own: own.current_epoch)),
    "global_step": Quirk(scaled(lambda own: own.global_step)),
    "batch_idx": Quirk(lambda own, loss, batch, idx: loss * (1 + 0.1 * idx)),
    "Python's generator": Quirk(coin(lambda own: own.coin.random()), attribute("coin", lambda: random.Random(1))),
    "bound coin": Quirk(coin(lambda own: own.draw()), attribute("draw", lambda: random.Random(2).random)),
    "NumPy's generator": Quirk(coin(lambda own: own.rng.random()), attribute("rng", lambda: np.random.default_rng(1))),
    "RandomState": Quirk(coin(lambda own: own.old.rand()), attribute("old", lambda: np.random.RandomState(1))),
    "iterator": Quirk(
        coin(lambda own: next(own.fixed)), attribute("fixed", lambda: itertools.cycle([0.1, 0.9, 0.5, 0.2, 0.7]))
    ),
    "torch's generator": Quirk(
        coin(lambda own: float(torch.rand((), generator=own.gen))),
        attribute("gen", lambda: torch.Generator().manual_seed(1)),
    ),
    "function attribute": Quirk(lambda own, loss, batch, idx: annealed(loss)),
    "closure": Quirk(scaled(lambda own: own.count()), attribute("count", closure)),
    "deep container": Quirk(scaled(count_deep), attribute("deep", lambda: {"a": [{"b": [0, 0]}]})),
    "global": Quirk(scaled(count_globally)),
    "class attribute": Quirk(scaled(count_on_class)),
    "array": Quirk(scaled(count_in_array), attribute("array", lambda: np.zeros(3))),
    "deque": Quirk(noted(lambda own, loss, batch: own.last.append(1)), attribute("last", lambda: deque(maxlen=3))),
    "losses": Quirk(noted(lambda own, loss, batch: own.losses.append(loss.detach())), attribute("losses", list)),
    "meter": Quirk(
        noted(lambda own, loss, batch: own.meter.update(loss.detach(), len(batch[0]))), attribute("meter", Meter)
    ),
    "metrics in a dict": Quirk(noted(note_metric), attribute("metrics_dict", lambda: {"loss": MeanMetric()})),
    "forward hook": Quirk(lambda own, loss, batch, idx: loss, collect),
    "buffer": Quirk(
        noted(lambda own, loss, batch: own.seen.add_(1)),
        lambda own: own.register_buffer("seen", torch.zeros(()), persistent=False),
    ),
    "tensor": Quirk(
        noted(lambda own, loss, batch: own.tensor.data.add_(1)), attribute("tensor", lambda: torch.zeros(2))
    ),
    "running mean": Quirk(move_mean, attribute("mean", lambda: torch.zeros((), dtype=torch.float64))),
    "global draw": Quirk(coin(lambda own: random.random())),
    "global NumPy draw": Quirk(coin(lambda own: np.random.rand())),
    "draw that is taken back": Quirk(coin(restored_draw)),
    "dropout": Quirk(lambda own, loss, batch, idx: nn.functional.dropout(loss, 0.1)),
    "last gradients": Quirk(grad_norm),
    "batch in place": Quirk(write_batch),
    "caught error": Quirk(swallow),
    "NaN batches": Quirk(lambda own, loss, batch, idx: None if torch.isnan(loss) else loss),
    "held parameters": Quirk(
        lambda own, loss, batch, idx: loss + 0.01 * sum(p.square().sum() for p in own.held),
        lambda own: setattr(own, "held", list(own.parameters())),
    ),
    "held optimizer": Quirk(scaled(lambda own: own.optimizers().param_groups[0]["lr"])),
    "logger": Quirk(noted(lambda own, loss, batch: own.logger.experiment.append(1.0))),
    "flag of the Trainer": Quirk(scaled(lambda own: own.trainer.num_training_batches)),
    "later: noise": Quirk(later(lambda own, loss, batch, idx: loss * (1 + 0.1 * torch.randn(())))),
    "later: dropout": Quirk(later(lambda own, loss, batch, idx: nn.functional.dropout(loss, 0.1 * own.current_epoch))),
    "later: None": Quirk(later(lambda own, loss, batch, idx: None if idx == 1 else loss)),
    "later: histogram": Quirk(
        later(
            noted(
                lambda own, loss, batch: own.logger.experiment.append(float(own.net[1].weight.detach().numpy().sum()))
            )
        )
    ),
    "later: value": Quirk(later(lambda own, loss, batch, idx: loss * 2 if loss.item() > 1 else loss)),
    "later: example": Quirk(
        later(noted(lambda own, loss, batch: own.examples.append(batch[0][0]))), attribute("examples", list)
    ),
    "later: counter": Quirk(later(scaled(lambda own: own.count_later())), attribute("count_later", closure)),
    "later: coin": Quirk(later(coin(lambda own: random.random()))),
    "later: NumPy coin": Quirk(later(coin(lambda own: np.random.rand()))),
    "trainable only": Quirk(penalise),
    "later: trainable only": Quirk(later(penalise)),
    "later: computed metric": Quirk(later(compute_early), lambda own: setattr(own, "mean_metric", MeanMetric())),
    "later: method of a metric": Quirk(later(noted(lambda own, loss, batch: own.add_to(loss.detach()))), hold_method),
    "imported in the step": Quirk(scaled(count_in_file)),
    "context variable": Quirk(scaled(count_in_context), attribute("context", lambda: ContextVar("calls"))),
    "later: caught error": Quirk(later(swallow)),
    "later: eval": Quirk(later(noted(lambda own, loss, batch: own.net.eval()))),
    "later: gradients": Quirk(later(grad_norm)),
    "later: held parameters": Quirk(
        later(lambda own, loss, batch, idx: loss + 0.01 * sum(p.square().sum() for p in own.later_held)),
        lambda own: setattr(own, "later_held", list(own.parameters())),
    ),
}
EXACT_TOGETHER = ("nothing", "current_epoch", "global_step", "batch_idx")
"""With these alone, clients train side by side."""


class Recorder(Logger):
    """Keeps what it is given."""

    name = version = "recorder"

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.experiment: list[Any] = []  # type: ignore[assignment]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, {name: value for name, value in metrics.items() if not name.startswith("fl/")}))


class Quirky(Plain):
    """A small network whose step also does what some quirks do."""

    def __init__(self, names: list[str], logs: bool = True) -> None:
        super().__init__()
        # Not by their names: the step would then reach all quirks.
        self.steps, self.logs = [QUIRKS[name].step for name in names], logs
        for name in names:
            QUIRKS[name].make(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.logs:
            self.log("loss", loss, on_step=False, on_epoch=True)
        for step in self.steps:
            if loss is not None:
                loss = step(self, loss, batch, batch_idx)
        return loss


class Augmented(TensorDataset):
    """Adds noise of a generator that it holds itself, and counts its reads."""

    def __init__(self, num_examples: int, seed: int) -> None:
        super().__init__(*images(num_examples, seed).tensors)
        self.rng, self.num_reads = np.random.default_rng(seed), 0

    def __getitem__(self, index: Any) -> Any:
        self.num_reads += 1
        x, y = super().__getitem__(index)
        return x + float(self.rng.normal()), y
