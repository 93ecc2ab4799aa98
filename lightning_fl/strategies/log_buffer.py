"""Sums up a client's logged values, so that Lightning's ``log`` runs once per client instead of once per batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_fl.strategies import internals
from lightning_fl.tree import sum_dtype


@dataclass
class _Entry:
    """The calls of ``self.log`` for one name: the metric, or the values weighted by their batches' examples."""

    arguments: dict[str, Any]
    metric: Metric | None = None
    total: Any = 0.0
    num_examples: int = 0


class LogBuffer:
    """Replaces a module's ``log`` while ``training_step`` runs without Lightning's hooks.

    Only means over the epoch are deferred: one call with the mean of several batches has the same result as one call
    per batch. All other calls go to Lightning directly.

    Args:
        module: The user's module.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module
        self._is_plain = type(module).log is L.LightningModule.log and "log" not in vars(module)
        self._log = module.log
        # As Lightning does with its own `log`: a compiled training_step must not trace this method.
        self._held_log = torch.compiler.disable(self._note)
        self._entries: dict[tuple[Any, ...], _Entry] = {}
        self._num_examples = 0

    @contextmanager
    def in_step(self, num_examples: int | None) -> Iterator[None]:
        """A block in which ``training_step`` runs.

        Args:
            num_examples: Examples in its batch. None: only Lightning can tell.
        """
        attributes = vars(self.module)  # bypasses `nn.Module.__setattr__`, which takes longer
        if self._is_plain and num_examples is not None:
            self._num_examples = num_examples
            attributes["log"] = self._held_log
        try:
            with internals.running_training_step(self.module):
                yield
        finally:
            if self._is_plain:
                attributes.pop("log", None)

    def flush(self) -> None:
        """Passes the values logged since the last flush on to Lightning."""
        entries, self._entries = self._entries, {}
        with internals.running_training_step(self.module):
            for entry in entries.values():
                if entry.metric is not None:
                    self._log(value=entry.metric, **entry.arguments)
                else:
                    mean, size = entry.total / max(1, entry.num_examples), entry.num_examples
                    with _as_default_dtype(mean):
                        self._log(value=mean, batch_size=size, **entry.arguments)

    def drop(self) -> None:
        """Drops the values logged since the last flush."""
        self._entries = {}

    def _note(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if args or not _is_epoch_mean(kwargs) or not (isinstance(value, Metric) or _is_number(value)):
            self._log(name, value, *args, **kwargs)
            return
        arguments = {key: own for key, own in kwargs.items() if key in _FREE}
        # With the arguments: two calls for one name that differ in them must both reach Lightning, which raises.
        key = (name, isinstance(value, Metric), *sorted(arguments.items()))
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry({"name": name, **arguments})
        if isinstance(value, Metric):
            entry.metric = value
        else:
            # Detached, or the sum would keep the graph of every batch in memory until the client ends.
            number = value.detach().to(sum_dtype(value.dtype)) if isinstance(value, Tensor) else value
            entry.total = entry.total + number * self._num_examples
            entry.num_examples += self._num_examples


@contextmanager
def _as_default_dtype(value: Tensor | float) -> Iterator[None]:
    """A block in which the default dtype, to which Lightning casts logged values, is that of ``value``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(value.dtype if isinstance(value, Tensor) else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_DEFAULTS = {name: own.default for name, own in inspect.signature(L.LightningModule.log).parameters.items()}
_FREE = {"on_step", "on_epoch", "prog_bar", "logger"}
"""Arguments that may have any value; calls with non-default values of other arguments are not deferred."""


def _is_epoch_mean(kwargs: dict[str, Any]) -> bool:
    is_of_epoch = kwargs.get("on_step") is False and kwargs.get("on_epoch") is True
    return is_of_epoch and all(kwargs[name] == _DEFAULTS[name] for name in kwargs.keys() - _FREE)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point()
    return type(value) in (int, float)
