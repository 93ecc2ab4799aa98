"""The torchmetrics of a module, joined over ranks by their states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_sum

from lightning_fl.strategies.torchmetrics_internals import is_list_state, reductions, set_states
from lightning_fl.types import Tree


class MetricStates:
    """The torchmetrics of a module, joined over ranks by their states with each metric's own ``dist_reduce_fx``.

    After a merge every rank holds the union. If the user does not reset a metric, the union stays on rank 0 only, so
    that the next merge does not count it once for each rank.

    Args:
        module: The user's module.
        rank: This process's index in the federation.
    """

    def __init__(self, module: nn.Module, rank: int) -> None:
        self.metrics = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
        self.rank = rank
        self._merged: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self.mark()

    def mark(self) -> None:
        """Starts counting updates."""
        kept = {name for name, count in self._merged.items() if self.metrics[name].update_count == count}
        self._merged = {name: count for name, count in self._merged.items() if name in kept}
        if self.rank != 0:
            for name in kept:
                self.metrics[name].reset()
        self._counts = {name: metric.update_count for name, metric in self.metrics.items()}

    def snapshot(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """Copies of all states."""
        return {
            name: (metric.update_count, {key: _copy(state) for key, state in metric.metric_state.items()})
            for name, metric in self.metrics.items()
        }

    def restore(self, snapshot: Mapping[str, tuple[int, dict[str, Any]]]) -> None:
        """Restores a :meth:`snapshot`."""
        for name, (count, states) in snapshot.items():
            set_states(self.metrics[name], states, count)

    def report(self) -> tuple[dict[str, Any], Tree]:
        """The report for the other ranks: number of updates and state of each metric updated since :meth:`mark`."""
        fields: dict[str, Any] = {}
        tensors: Tree = {}
        for name, metric in self.metrics.items():
            # Rank 0 holds the last union for all ranks, so it reports it even without new updates.
            if metric.update_count == self._counts[name] and not (self.rank == 0 and name in self._merged):
                continue
            lengths: dict[str, int | None] = {}
            for key, state in metric.metric_state.items():
                lengths[key] = len(state) if isinstance(state, list) else None
                for index, tensor in enumerate(state if isinstance(state, list) else [state]):
                    tensors[f"{name}/{key}/{index}"] = tensor
            is_sum = all(length is None and reductions(metric)[key] is dim_zero_sum for key, length in lengths.items())
            fields[name] = {"count": metric.update_count, "lengths": lengths, "is_sum": is_sum}
        return fields, tensors

    def merge(self, reports: Sequence[tuple[Mapping[str, Any], Tree]], device: torch.device) -> None:
        """Joins the ranks' states into the metrics of this rank.

        Args:
            reports: The :meth:`report` of each rank.
            device: The device of the joined states.

        Raises:
            ValueError: If a rank reports a metric or a state that this rank's module does not have.
        """
        for name in dict.fromkeys(name for descriptions, _ in reports for name in descriptions):
            metric = self.metrics.get(name)
            reported = [(own[name], tensors) for own, tensors in reports if name in own]
            if metric is None or any(own["lengths"].keys() != metric.metric_state.keys() for own, _ in reported):
                raise ValueError(
                    f"The ranks' modules differ in their metric {name!r}. Start all ranks with the same module."
                )
            joined = {}
            for key in metric.metric_state:
                parts = [
                    [tensors[f"{name}/{key}/{index}"].to(device) for index in range(_length(own["lengths"][key]))]
                    for own, tensors in reported
                ]
                joined[key] = _join(metric, key, parts)
            set_states(metric, joined, sum(own["count"] for own, _ in reported))
            self._merged[name] = metric.update_count


def _length(length: int | None) -> int:
    """The number of tensors of a state: the length of a list state, or 1."""
    return 1 if length is None else length


def _copy(state: Any) -> Any:
    # `update` appends to a list state, so copying the list is enough; it may change a tensor state in place.
    return list(state) if isinstance(state, list) else state.clone()


def _join(metric: Metric, key: str, parts: list[list[Tensor]]) -> Any:
    if is_list_state(metric, key):
        return [tensor for part in parts for tensor in part]
    stacked = torch.stack([part[0] for part in parts])
    reduction = reductions(metric)[key]
    return stacked if reduction is None else reduction(stacked)
