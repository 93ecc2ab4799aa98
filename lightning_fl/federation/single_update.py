"""The aggregator of a silo that is a single client and whose update is aggregated elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from lightning_fl.aggregation import Aggregator, RoundContext
from lightning_fl.communication import Group, Message
from lightning_fl.types import Aggregate, Update


class SingleUpdate(Aggregator):
    """Keeps a silo's own update, which the coordinator aggregates with the others'."""

    is_sum = True

    def init(self, template: Update, device: torch.device, session: Any = None) -> Update | None:
        return None

    def add(self, acc: Update | None, update: Update, ctx: RoundContext) -> Update | None:
        assert acc is None, "a silo sends one update in a round"
        return update

    def merge(
        self, acc: Update | None, group: Group, report: Message, ctx: RoundContext
    ) -> tuple[Update | None, list[Message]]:
        raise AssertionError("the coordinator merges the updates")

    def result(self, acc: Update | None, ctx: RoundContext) -> Aggregate:
        raise AssertionError("the coordinator computes the aggregate")


class HiddenUpdate(SingleUpdate):
    """Keeps a silo's own update, which nobody else sees.

    Args:
        aggregator: The aggregator that adds it to the others' in secret.
    """

    hides_reports = True

    def __init__(self, aggregator: Aggregator) -> None:
        self.aggregator = aggregator

    @property
    def integer_bits(self) -> int | None:
        return self.aggregator.integer_bits

    def min_clients_of(self, cohort_size: int) -> int:
        # The minimum over all cohorts: the round may open again with fewer silos, and then adds up the same updates.
        return self.aggregator.min_clients_of(0)


def single_update(aggregator: Aggregator) -> SingleUpdate:
    """The replacement of an aggregator on a silo whose update is aggregated elsewhere."""
    return HiddenUpdate(aggregator) if aggregator.hides_reports else SingleUpdate()
