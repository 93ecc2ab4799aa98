"""The private parts of Lightning's collection of logged values, in one place. Holds for lightning >= 2.6, < 2.7."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_fl.data.client_loaders import batch_size as _size_of_batch

ResultCollection = _ResultCollection

REDUCTIONS: dict[str, Any] = {"mean": torch.mean, "sum": torch.sum, "min": torch.min, "max": torch.max}

DTYPES = {"float32": torch.float32, "float64": torch.float64}
"""The dtypes in which Lightning keeps logged values."""


def describe(result: _ResultMetric) -> dict[str, Any]:
    """The settings with which a value was logged, as plain data."""
    meta = result.meta
    reduction = next(name for name in REDUCTIONS if getattr(meta, f"is_{name}_reduction"))
    return {
        "fx": meta.fx,
        "name": meta.name,
        "prog_bar": meta.prog_bar,
        "logger": meta.logger,
        "on_step": meta.on_step,
        "on_epoch": meta.on_epoch,
        "reduction": reduction,
        "add_dataloader_idx": meta.add_dataloader_idx,
        "dataloader_idx": meta.dataloader_idx,
        "metric_attribute": meta.metric_attribute,
        "is_tensor": result.is_tensor,
        "dtype": str(result.value.dtype).removeprefix("torch.") if result.is_tensor else "",
    }


def placeholder(settings: dict[str, Any], device: torch.device) -> _ResultMetric:
    """An empty logged value, for a rank on which nothing was logged under that name."""
    settings = dict(settings)
    is_tensor, _ = settings.pop("is_tensor"), settings.pop("dtype")
    meta = _Metadata(reduce_fx=REDUCTIONS[settings.pop("reduction")], **settings)
    # Without a function of its own: the value is joined already, and syncing it again would be a collective of this
    # rank alone.
    meta.sync = _Sync()
    result = _ResultMetric(meta, is_tensor).to(device)
    result.has_reset = False
    return result


def entry(result: _ResultMetric) -> dict[str, Any]:
    """The values logged under a name so far: the settings, their sum in float64, and its weight."""
    settings = describe(result)
    if not result.is_tensor:
        return {**settings, "value": 0.0, "weight": 1}
    weight = result.cumulated_batch_size if result.meta.is_mean_reduction else 1
    return {**settings, "value": result.value.double(), "weight": weight}


def step_entry(result: _ResultMetric, num_examples: int) -> dict[str, Any] | None:
    """The last value logged with ``on_epoch=False``, which Lightning does not accumulate; None if there is none."""
    if result._forward_cache is None:
        return None
    weight = num_examples if result.meta.is_mean_reduction else 1
    return {**describe(result), "value": result._forward_cache.double() * weight, "weight": weight}


def num_updates(result: _ResultMetric) -> int:
    """How often something was logged under the name since the epoch began."""
    return result._update_count


def is_computed(result: _ResultMetric) -> bool:
    """Whether Lightning has read the value of the epoch."""
    return result._computed is not None


def empty(result: _ResultMetric) -> None:
    """Resets the accumulated value; that of the last step stays."""
    # The default itself, not a copy: Lightning never updates a value in place.
    result.value = result._defaults["value"].to(result.value.device)  # type: ignore[union-attr]
    if result.meta.is_mean_reduction:
        result.cumulated_batch_size = torch.zeros_like(result.cumulated_batch_size)
    result._computed = None


def show(result: _ResultMetric, value: float, dtype: str, of_step: bool) -> None:
    """Sets the value that Lightning reads for the epoch, and for the step too, in the dtype in which it was logged."""
    result.has_reset = False
    # Shown as the cached result, which Lightning reads without computing it from this rank's own sum.
    joined = torch.tensor(value, dtype=DTYPES[dtype], device=result.value.device)
    if of_step:
        _show_step(result, joined)
    if result.meta.on_epoch:
        result._computed = joined  # type: ignore[assignment]


def show_metric(result: _ResultMetric, metric: Any, of_step: bool) -> None:
    """Lets Lightning read the value of the epoch, and of the step too, from a torchmetric.

    An earlier epoch's value may be cached.
    """
    result.has_reset = False
    result.value = metric
    result._computed = None
    # The value of this rank's last batch would depend on which clients it has trained.
    if of_step and result.meta.on_step and metric.update_count:
        _show_step(result, metric.compute())


def _show_step(result: _ResultMetric, joined: torch.Tensor) -> None:
    """Sets the value of the step that callbacks monitor, and keeps that of this rank's last batch for the loggers."""
    if result.meta.on_step:
        vars(result)["_of_last_batch"] = result._forward_cache
        result._forward_cache = joined


@contextmanager
def showing_last_batch(results: _ResultCollection) -> Iterator[None]:
    """A block in which values by step are those of this rank's last batch again, not those of the round."""
    joined = [(result, result._forward_cache) for result in results.values() if "_of_last_batch" in vars(result)]
    for result, _ in joined:
        result._forward_cache = vars(result).pop("_of_last_batch")
    try:
        yield
    finally:
        for result, value in joined:
            result._forward_cache = value


def takes_batch_idx(module: LightningModule) -> bool:
    """Whether Lightning passes the batch's index to ``training_step``."""
    return bool(is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2))


def step_arguments(module: LightningModule, batch_idx: int) -> tuple[Any, ...]:
    """The arguments that Lightning passes to ``training_step`` after the batch."""
    return (batch_idx,) if takes_batch_idx(module) else ()


class _StayingMetric(_ResultMetric):
    """A logged value that is moved only to another device.

    Lightning moves it each time that the value is logged, and a move walks through all of its attributes and copies its
    settings: most of the cost of ``self.log``.
    """

    def to(self, *args: Any, **kwargs: Any) -> _ResultMetric:  # type: ignore[override]  # as in Lightning  # type: ignore[override]
        is_there = args == (getattr(vars(self).get("value"), "device", None),) and not kwargs
        return self if is_there else super().to(*args, **kwargs)


class ClientResults(_ResultCollection):
    """Lightning's collection of logged values, which notes the batch sizes that the module gives."""

    def log(self, *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
        """Notes ``batch_size``, of which Lightning keeps nothing for values that it does not accumulate."""
        if batch_size is not None:
            self.given_sizes.add(batch_size)
        super().log(*args, batch_size=batch_size, **kwargs)

    def __setitem__(self, key: str, result: _ResultMetric) -> None:
        if type(result) is _ResultMetric:
            result.__class__ = _StayingMetric
        super().__setitem__(key, result)

    @property
    def given_sizes(self) -> set[int]:
        """The batch sizes with which the module has logged since :meth:`forget_sizes`."""
        found: set[int] = vars(self).setdefault("_given_sizes", set())
        return found

    def forget_sizes(self) -> None:
        """Begins a batch."""
        self.given_sizes.clear()


def batch_size(results: _ResultCollection, batch: Any) -> tuple[int, bool]:
    """Number of examples in the batch of the step that has just run, and whether it is sure.

    It is what the batch shows, else the one size with which the module has logged. If it is not sure, the number is
    what Lightning has inferred for ``self.log``, or 1.
    """
    found = _size_of_batch(batch)
    given = results.given_sizes if isinstance(results, ClientResults) else ()
    if found is None and len(given) == 1:
        (found,) = given
    if found is not None:
        return found, True
    return (1 if results.batch_size is None else results.batch_size), False


def count_examples(batch: Any) -> int:
    """Number of examples in any other batch; 1 if it does not show."""
    found = _size_of_batch(batch)
    return 1 if found is None else found
