"""Logged values and torchmetrics of a client group: committed if its updates are accepted, else rolled back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_fl.strategies.logged_values import LoggedValues
from lightning_fl.strategies.metric_states import MetricStates
from lightning_fl.strategies.results import ResultCollection


class ClientSession:
    """The logged values and torchmetrics of one client group.

    Args:
        results: Lightning's collection of the logged values.
        values: Sums up the values of accepted clients.
        metric_states: The module's torchmetrics, as they are before the group trains.
    """

    def __init__(self, results: ResultCollection, values: LoggedValues, metric_states: MetricStates) -> None:
        self.results = results
        self.values = values
        self.metric_states = metric_states
        self._before = self._before_phase = metric_states.snapshot()

    def end_phase(self, counts: bool, is_last: bool = False) -> None:
        """Ends a phase of local training.

        Args:
            counts: Whether it trained the model that is sent, so that its logged values are used.
            is_last: Whether no other phase follows.
        """
        self.values.after_phase(self.results, counts)
        if not counts:
            self.metric_states.restore(self._before_phase)
        elif not is_last:
            self._before_phase = self.metric_states.snapshot()

    def finish(
        self,
        accepted: Sequence[bool],
        restrict_to: Callable[[Sequence[bool]], Mapping[str, Mapping[str, Any]]] | None = None,
    ) -> dict[str, float]:
        """Commits the logged values and metrics of the accepted clients, and rolls back the others.

        Args:
            accepted: For each client, whether its update was accepted.
            restrict_to: Updates the torchmetrics with the accepted clients only, and returns their logged values.

        Returns:
            The logged values by name.
        """
        corrected = None
        if not all(accepted):
            self.metric_states.restore(self._before)
            corrected = None if restrict_to is None else restrict_to(accepted)
        return self.values.after_client(self.results, any(accepted), corrected)

    def drop(self) -> None:
        """Rolls back, because the group will not be finished."""
        self.values.after_client(self.results, accepted=False)
        self.metric_states.restore(self._before)
