"""Metrics over clients and ranks: means by example, torchmetrics by state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_sum

from lightning_fl.aggregation import Aggregator, FederationFacts
from lightning_fl.communication import Group, Message
from lightning_fl.federation.report_masking import mask, unmask
from lightning_fl.strategies import results as logged
from lightning_fl.strategies.results import ResultCollection
from lightning_fl.types import Tree

Entries = dict[str, dict[str, Any]]
"""By key of the result collection: the settings of the log call, a value and its weight."""

_LATE_HOOK = "on_train_batch_end"
"""Runs once more after the round has been closed; what it logs is joined at the epoch's end."""


class LoggedValues:
    """Adds up, in float64, what the clients of this rank log with ``self.log`` in a round."""

    def __init__(self) -> None:
        self.entries: Entries = {}
        self._client: Entries = {}
        self._phase: Entries = {}
        self._counts: dict[str, int] = {}

    def after_batch(self, results: ResultCollection, num_examples: int) -> None:
        """Takes in values logged for the step only, which Lightning does not add up."""
        for key, result in results.items():
            if result.is_tensor and not result.meta.on_epoch and self._was_updated(key, result):
                entry = logged.step_entry(result, num_examples)
                if entry is not None:
                    _join(self._phase, key, entry)

    def after_phase(self, results: ResultCollection, counts: bool) -> None:
        """Takes in what a client has logged in a phase, or drops it."""
        for key, result in results.items():
            of_training = result.is_tensor and result.meta.on_epoch and result.meta.fx != _LATE_HOOK
            if of_training and not result.has_reset and self._was_updated(key, result):
                _join(self._phase, key, logged.entry(result))
                logged.empty(result)
        if counts:
            for key, entry in self._phase.items():
                _join(self._client, key, entry)
        self._phase = {}

    def after_client(
        self, results: ResultCollection, accepted: bool, corrected: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, float]:
        """Takes in what a client, or several together, have logged, or drops it if no update was accepted.

        Args:
            results: Where Lightning collects what is logged.
            accepted: Whether an update was accepted.
            corrected: Values and weights of accepted clients only, where others have logged together with them.

        Returns:
            What was logged, by name.
        """
        self.after_phase(results, accepted)
        if accepted:
            for key, entry in self._client.items():
                _join(self.entries, key, {**entry, **(corrected or {}).get(key, {})})
        own, self._client = self._client, {}
        return {entry["name"]: _value(entry) for entry in own.values()}

    def _was_updated(self, key: str, result: Any) -> bool:
        before, self._counts[key] = self._counts.get(key, 0), logged.num_updates(result)
        return self._counts[key] != before


def _join(entries: Entries, key: str, entry: dict[str, Any]) -> None:
    if key not in entries:
        entries[key] = dict(entry)
        return
    old, reduction = entries[key], entry["reduction"]
    if reduction in ("mean", "sum"):
        old["value"] = old["value"] + entry["value"]
    else:
        both = torch.as_tensor(old["value"]), torch.as_tensor(entry["value"])
        old["value"] = (torch.minimum if reduction == "min" else torch.maximum)(*both)
    old["weight"] = old["weight"] + entry["weight"]


def _value(entry: dict[str, Any]) -> float:
    """The number that an entry, added up over batches or clients, stands for."""
    value, weight = float(entry["value"]), float(entry["weight"])
    if entry["reduction"] != "mean":
        return value
    return value / weight if weight else float("nan")


def late_entries(results: ResultCollection) -> Entries:
    """Values of the epoch logged in a hook that runs after the round has been closed."""
    return {
        key: logged.entry(result)
        for key, result in results.items()
        if result.is_tensor and result.meta.on_epoch and not result.has_reset and result.meta.fx == _LATE_HOOK
    }


def logged_metric_entries(results: ResultCollection) -> Entries:
    """The logged torchmetrics; their states travel by themselves."""
    return {
        key: logged.entry(result) for key, result in results.items() if not result.is_tensor and not result.has_reset
    }


def evaluation_entries(results: ResultCollection) -> Entries:
    """What this rank has logged over the evaluation loader at hand."""
    return {
        key: logged.entry(result)
        for key, result in results.valid_items()
        if result.meta.on_epoch and not logged.is_computed(result)
    }


def plain(entries: Entries) -> Entries:
    """The entries with numbers instead of tensors."""
    return {
        key: {**entry, "value": float(entry["value"]), "weight": float(entry["weight"])}
        for key, entry in entries.items()
    }


def merge_entries(reports: Iterable[Entries]) -> Entries:
    """Joins the ranks' entries."""
    merged: Entries = {}
    for entries in reports:
        for key, entry in entries.items():
            _join(merged, key, entry)
    return merged


def hide_unmerged(results: ResultCollection, merged: Entries) -> None:
    """Hides what only refused clients have logged in this round."""
    for key, result in results.items():
        if result.is_tensor and result.meta.on_epoch and result.meta.fx != _LATE_HOOK and key not in merged:
            result.has_reset = True


def publish(entries: Entries, results: ResultCollection, module: nn.Module, device: torch.device) -> list[str]:
    """Writes joined values into the result collection, where Lightning reads them.

    Returns:
        Keys that this rank had not logged itself; they are to be removed before it logs again.
    """
    added = []
    for key, entry in entries.items():
        if key not in results:
            settings = {name: value for name, value in entry.items() if name not in ("value", "weight")}
            results[key] = logged.placeholder(settings, device)
            added.append(key)
        result = results[key]
        if not entry["is_tensor"]:
            logged.show_metric(result, module.get_submodule(entry["metric_attribute"]))
            continue
        logged.show(result, _value(entry))
    return added


class MetricStates:
    """The torchmetrics of a module, joined over ranks by their states, each in the way it declares itself.

    After a merge every rank holds the union. If the user does not reset a metric, the union goes on on rank 0 only, so
    that the next merge does not count it once for each rank.

    Args:
        module: The user's module.
        rank: This process's place in the federation.
    """

    def __init__(self, module: nn.Module, rank: int) -> None:
        self.metrics = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
        self.rank = rank
        self._merged: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self.mark()

    def mark(self) -> None:
        """Counts updates from here on."""
        kept = {name for name, count in self._merged.items() if self.metrics[name]._update_count == count}
        self._merged = {name: count for name, count in self._merged.items() if name in kept}
        if self.rank != 0:
            for name in kept:
                self.metrics[name].reset()
        self._counts = {name: metric._update_count for name, metric in self.metrics.items()}

    def snapshot(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """Copies of all states."""
        return {
            name: (metric._update_count, {key: _copy(getattr(metric, key)) for key in metric._defaults})
            for name, metric in self.metrics.items()
        }

    def restore(self, snapshot: Mapping[str, tuple[int, dict[str, Any]]]) -> None:
        """Puts back what :meth:`snapshot` copied."""
        for name, (count, states) in snapshot.items():
            metric = self.metrics[name]
            for key, value in states.items():
                setattr(metric, key, value)
            metric._update_count = count
            metric._computed = None

    def report(self) -> tuple[dict[str, Any], Tree]:
        """What to tell the other ranks: of each metric updated since :meth:`mark`, its number of updates and state."""
        fields: dict[str, Any] = {}
        tensors: Tree = {}
        for name, metric in self.metrics.items():
            if metric._update_count == self._counts[name] and not (self.rank == 0 and name in self._merged):
                continue
            lengths: dict[str, int | None] = {}
            for key in metric._defaults:
                state = getattr(metric, key)
                lengths[key] = len(state) if isinstance(state, list) else None
                for index, tensor in enumerate(state if isinstance(state, list) else [state]):
                    tensors[f"{name}/{key}/{index}"] = tensor
            is_sum = all(length is None for length in lengths.values()) and all(
                metric._reductions[key] is dim_zero_sum for key in metric._defaults
            )
            fields[name] = {"count": metric._update_count, "lengths": lengths, "is_sum": is_sum}
        return fields, tensors

    def merge(self, reports: Sequence[Message], device: torch.device) -> None:
        """Joins the ranks' states into the metrics of this rank.

        Raises:
            ValueError: If a rank reports a metric or a state that this rank's module does not have.
        """
        for name in dict.fromkeys(name for message in reports for name in message.fields["metric_states"]):
            metric = self.metrics.get(name)
            told = [message for message in reports if name in message.fields["metric_states"]]
            lengths = [message.fields["metric_states"][name]["lengths"] for message in told]
            if metric is None or any(set(own) != set(metric._defaults) for own in lengths):
                raise ValueError(f"The ranks' modules differ in their metric {name!r}; they must be the same.")
            for key in metric._defaults:
                parts = [
                    [message.tensors[f"{name}/{key}/{index}"].to(device) for index in range(own[key] or 1)]
                    if own[key] != 0
                    else []
                    for message, own in zip(told, lengths, strict=True)
                ]
                setattr(metric, key, _reduce(metric, key, parts))
            metric._update_count = sum(message.fields["metric_states"][name]["count"] for message in told)
            metric._computed = None
            self._merged[name] = metric._update_count


def _copy(state: Any) -> Any:
    return list(state) if isinstance(state, list) else state.clone()


def _reduce(metric: Metric, key: str, parts: list[list[Tensor]]) -> Any:
    if isinstance(metric._defaults[key], list):
        return [tensor for part in parts for tensor in part]
    stacked = torch.stack([part[0] for part in parts])
    reduction = metric._reductions[key]
    return stacked if reduction is None else reduction(stacked)  # type: ignore[operator]


class EvaluationMetrics:
    """Metrics of an evaluation, equal on all ranks.

    Ranks that have read the same data count once, others as the union of their data.

    Args:
        group: The ranks of the federation.
        module: The user's module.
        aggregator: Joins what ranks with data of their own report, and may hide it.
    """

    def __init__(self, group: Group, module: LightningModule, aggregator: Aggregator) -> None:
        self.group = group
        self.module = module
        self.aggregator = aggregator
        self.states = MetricStates(module, group.rank)
        self._session: Any = None
        self._placeholders: list[str] = []

    def start(self, results: ResultCollection, per_rank: bool, silos: bool) -> None:
        """An evaluation begins.

        Args:
            results: Where Lightning collects what is logged.
            per_rank: Whether ranks may have data of their own.
            silos: Whether it is that of silos.
        """
        self.hides = silos and self.aggregator.hides_reports and self.group.size > 1
        if self.hides and self._session is None:
            self._session = self.aggregator.open(self.group, FederationFacts(silos, self.group.size, is_training=False))
        for key in self._placeholders:
            results.pop(key, None)
        self._placeholders = []
        self.per_rank = per_rank
        self.first_batch = ""
        self.states.mark()

    @contextmanager
    def merged(self, results: ResultCollection) -> Iterator[None]:
        """Inside the block, the values of the loader at hand are those of all ranks."""
        if self.group.size == 1:
            yield
            return
        own = self.states.snapshot()
        reports = self._gather(plain(evaluation_entries(results)))
        self.states.merge(reports, self.module.device)
        entries = merge_entries(message.fields["metrics"] for message in reports)
        self._placeholders += publish(entries, results, self.module, self.module.device)
        yield
        self.states.restore(own)

    def end(self) -> None:
        """All loaders have been read: metrics that the user computes by hand are those of all ranks."""
        if self.group.size > 1:
            self.states.merge(self._gather({}), self.module.device)

    def _gather(self, entries: Entries) -> list[Message]:
        fields, tensors = self.states.report() if self.per_rank else ({}, {})
        report = Message({"metrics": entries, "metric_states": fields, "first_batch": self.first_batch}, tensors)
        if self.hides:
            return unmask(self.aggregator.gather(self._session, self.group, mask(report), "evaluation"))
        reports = self.group.all_gather(report, "evaluation")
        same_data = len({message.fields["first_batch"] for message in reports}) == 1
        return reports if self.per_rank and not same_data else reports[:1]
