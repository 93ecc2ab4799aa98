"""The aggregator of a party that is one client, and whose update others add to theirs."""

from __future__ import annotations

from typing import Any

import torch

from lightning_fl.aggregation import Aggregator, RoundContext
from lightning_fl.communication import Group, Message
from lightning_fl.types import Aggregate, Update


class SingleUpdate(Aggregator):
    """Keeps a silo's own update, which the coordinator adds to those of the others."""

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
