"""Joins the metrics of an evaluation over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule

from lightning_fl.aggregation import Aggregator, FederationFacts
from lightning_fl.communication import Message, all_hold_the_same
from lightning_fl.federation import Federation
from lightning_fl.federation.metric_entries import Entries, as_numbers, merge_entries
from lightning_fl.federation.report_masking import mask, unmask
from lightning_fl.strategies.logged_values import evaluation_entries, publish
from lightning_fl.strategies.metric_states import MetricStates
from lightning_fl.strategies.results import ResultCollection
from lightning_fl.types import Tree


class EvaluationMetrics:
    """Metrics of an evaluation, equal on all ranks.

    If all silos have read the same data, it counts once; otherwise the metrics are those of the union of the ranks'
    data. Silos that differential privacy or secure aggregation protects do not compare their data, so theirs is the
    union in any case.

    Args:
        federation: The communication with the other parties.
        module: The user's module.
        aggregator: Joins the reports of ranks that have their own data, and may hide them.
    """

    def __init__(self, federation: Federation, module: LightningModule, aggregator: Aggregator) -> None:
        self.federation = federation
        self.group = federation.group
        self.module = module
        self.aggregator = aggregator
        self.states = MetricStates(module, federation.place)
        self.hides = False
        self.per_rank = False
        self.compares = False
        self.first_batch = b""
        self._is_same: bool | None = None
        self._session: Any = None
        self._placeholders: list[str] = []

    def start(self, results: ResultCollection, per_rank: bool, silos: bool, is_private: bool) -> None:
        """Called when an evaluation begins.

        Args:
            results: Lightning's collection of the logged values.
            per_rank: Whether each rank may have its own data.
            silos: Whether each rank is a silo.
            is_private: Whether differential privacy or secure aggregation protects the ranks' data.
        """
        self.hides = silos and self.aggregator.hides_reports and self.federation.size > 1
        # One session for all evaluations: opening it is a handshake of all ranks.
        if self.hides and self._session is None and self.group.size > 1:
            self._session = self.aggregator.open(self.group, FederationFacts(silos, self.group.size, is_training=False))
        # They have other ranks' settings, which `self.log` of the same name on this rank would not match.
        for key in self._placeholders:
            results.pop(key, None)
        self._placeholders = []
        self.per_rank = per_rank
        self.compares = silos and not is_private and self.group.size > 1
        self.first_batch, self._is_same = b"", None
        self.states.mark()

    @contextmanager
    def merged(self, results: ResultCollection) -> Iterator[None]:
        """Inside the block, the values of the current loader are those of all ranks."""
        if self._is_alone:
            yield
            return
        # The union is only for Lightning to read. A metric that spans several loaders continues with this rank's own
        # part; otherwise the next merge would count the other ranks' batches twice.
        own = self.states.snapshot()
        reports = self._gather(as_numbers(evaluation_entries(results)))
        self.states.merge(_states(reports), self.module.device)
        entries = merge_entries(message.fields["metrics"] for message in reports)
        self._placeholders += publish(entries, results, self.module, self.module.device)
        yield
        self.states.restore(own)

    def end(self) -> None:
        """Called after the last loader: joins the torchmetrics, for users who compute them in ``..._epoch_end``."""
        if not self._is_alone:
            self.states.merge(_states(self._gather({})), self.module.device)

    @property
    def _is_alone(self) -> bool:
        # Not only because of other ranks' values: Lightning would warn that a silo's processes don't sync theirs.
        return self.federation.size == 1 and self.group.is_alone

    def _gather(self, entries: Entries) -> list[Message]:
        fields, tensors = self.states.report() if self.per_rank else ({}, {})
        report = Message({"metrics": entries, "metric_states": fields}, tensors)
        if self.hides:
            return unmask(self.federation.gather_sums(self.aggregator, self._session, mask(report), "evaluation"))
        reports = self.federation.gather(report, "evaluation")
        return reports if self.per_rank and not self._have_same_data() else reports[:1]

    def _have_same_data(self) -> bool:
        """Whether silos validate on the same data, which would otherwise count once for each silo."""
        if self._is_same is None:
            self._is_same = self.compares and all_hold_the_same(self.group, self.first_batch, "evaluation data")
        return self._is_same


def _states(reports: Sequence[Message]) -> list[tuple[dict[str, Any], Tree]]:
    return [(report.fields["metric_states"], report.tensors) for report in reports]
