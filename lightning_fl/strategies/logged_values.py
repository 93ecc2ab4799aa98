"""Sums the values that clients log with ``self.log``, and writes the cohort's means back to Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_fl.federation.metric_entries import Entries, add_entry, value_of
from lightning_fl.strategies import results as logged
from lightning_fl.strategies.results import ResultCollection

LATE_HOOK = "on_train_batch_end"
"""Runs once more after the round has been closed; what it logs is joined at the epoch's end."""


class LoggedValues:
    """Sums, in float64, the values that this rank's clients log with ``self.log`` in a round."""

    def __init__(self) -> None:
        self.entries: Entries = {}
        self._client: Entries = {}
        self._phase: Entries = {}
        self._counts: dict[str, int] = {}

    def before_clients(self, results: ResultCollection, num_ranks: int) -> None:
        """Adds values logged before the first client, by a hook that every rank runs for all clients.

        Args:
            results: Lightning's collection of the logged values.
            num_ranks: On how many ranks the hook has run for the same clients; a sum counts it once.
        """
        self.after_phase(results, counts=True)
        for key, entry in self._client.items():
            share = num_ranks if entry["reduction"] == "sum" else 1
            add_entry(self.entries, key, {**entry, "value": entry["value"] / share})
        self._client = {}

    def after_batch(self, results: ResultCollection, num_examples: int) -> None:
        """Adds values logged with ``on_epoch=False``, which Lightning does not accumulate."""
        for key, result in results.items():
            if result.is_tensor and not result.meta.on_epoch and self._was_updated(key, result):
                entry = logged.step_entry(result, num_examples)
                if entry is not None:
                    add_entry(self._phase, key, entry)

    def after_phase(self, results: ResultCollection, counts: bool) -> None:
        """Adds the values that a client has logged in a phase, or drops them if they do not count."""
        for key, result in results.items():
            of_training = result.is_tensor and result.meta.on_epoch and result.meta.fx != LATE_HOOK
            if of_training and not result.has_reset and self._was_updated(key, result):
                add_entry(self._phase, key, logged.entry(result))
                # Taken over into this class's sums; what stayed in Lightning's would be counted again with the next
                # client.
                logged.empty(result)
        if counts:
            for key, entry in self._phase.items():
                add_entry(self._client, key, entry)
        self._phase = {}

    def after_client(
        self, results: ResultCollection, accepted: bool, corrected: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, float]:
        """Adds the values that a client, or a group, has logged, or drops them if no update was accepted.

        Args:
            results: Lightning's collection of the logged values.
            accepted: Whether an update was accepted.
            corrected: Values and weights of the accepted clients of a group, if others were refused.

        Returns:
            The logged values by name.
        """
        self.after_phase(results, accepted)
        if accepted:
            for key, entry in self._client.items():
                add_entry(self.entries, key, {**entry, **(corrected or {}).get(key, {})})
        own, self._client = self._client, {}
        return {entry["name"]: value_of(entry) for entry in own.values()}

    def _was_updated(self, key: str, result: Any) -> bool:
        before, self._counts[key] = self._counts.get(key, 0), logged.num_updates(result)
        return self._counts[key] != before


def monitor_names(entries: Entries) -> set[str]:
    """The names under which a callback or a schedule may monitor logged values."""
    return {form for entry in entries.values() for form in _forms(entry["name"])}


def _forms(name: str) -> tuple[str, ...]:
    return name, f"{name}_epoch", f"{name}_step"


def late_entries(results: ResultCollection) -> Entries:
    """The epoch's values that are logged in a hook which runs after the round has been closed."""
    return {
        key: logged.entry(result)
        for key, result in results.items()
        if result.is_tensor and result.meta.on_epoch and not result.has_reset and result.meta.fx == LATE_HOOK
    }


def logged_metric_entries(results: ResultCollection) -> Entries:
    """The logged torchmetrics; their states are reported separately."""
    return {
        key: logged.entry(result) for key, result in results.items() if not result.is_tensor and not result.has_reset
    }


def evaluation_entries(results: ResultCollection) -> Entries:
    """The values that this rank has logged over the current evaluation loader."""
    return {
        key: logged.entry(result)
        for key, result in results.valid_items()
        if result.meta.on_epoch and not logged.is_computed(result)
    }


def hide_unmerged(results: ResultCollection, merged: Entries) -> None:
    """Hides values that only refused clients have logged in this round."""
    for key, result in results.items():
        if result.is_tensor and result.meta.on_epoch and result.meta.fx != LATE_HOOK and key not in merged:
            # Lightning leaves out only entries that are marked as reset.
            result.has_reset = True


def publish(
    entries: Entries, results: ResultCollection, module: nn.Module, device: torch.device, of_step: bool = True
) -> list[str]:
    """Writes joined values into the result collection, where Lightning reads them.

    Args:
        entries: The joined values.
        results: The collection.
        module: Holds the torchmetrics.
        device: The device of values that this rank has not logged.
        of_step: Whether values by step become the joined ones too; else they stay those of the last batch.

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
            logged.show_metric(result, module.get_submodule(entry["metric_attribute"]), of_step)
            continue
        logged.show(result, value_of(entry), entry["dtype"], of_step)
    return added
