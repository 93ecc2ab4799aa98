"""How updates become one: the aggregator's interface and the weighted mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_fl.aggregation.transform import RoundContext
from lightning_fl.communication import Group, Message
from lightning_fl.tree import Flat, Layout, update_trees
from lightning_fl.types import Aggregate, Tree, Update


class ClientLost(Exception):
    """A client has vanished before its update could be taken in."""


@dataclass(frozen=True)
class FederationFacts:
    """What everyone in a federation may know before it trains or evaluates.

    Args:
        silos: Whether each rank is a silo with its own data.
        cohort_size: Clients in a round.
        is_training: Whether training is about to start, rather than an evaluation.
        max_weight: Tells the largest weight of a client, or None if nobody may know.
        min_cohort_size: The fewest clients that a round may have. None: ``cohort_size``.
    """

    silos: bool
    cohort_size: int
    is_training: bool
    max_weight: Callable[[], float | None] = lambda: None
    min_cohort_size: int | None = None


class Aggregator(ABC):
    """Turns the updates of a round into one aggregate, in four steps.

    ``init`` and ``add`` run on each rank for its clients, ``merge`` once a round over all ranks, ``result`` last.
    """

    is_sum: ClassVar[bool] = False
    """Whether the aggregate is the weighted sum of the updates, up to floating-point rounding: then one client moves it
    by no more than its weight times the norm of its update."""
    hides_reports: ClassVar[bool] = False
    """Whether :meth:`merge` and :meth:`gather` tell only the sums of what stands in a report's field ``"sums"``, a
    dict of numbers by name. The first report that they give then holds the sums of all ranks."""

    def open(self, group: Group, facts: FederationFacts) -> None:
        """Called on every rank before ranks tell each other anything, at least once.

        Args:
            group: The ranks of the federation.
            facts: Who is going to train or evaluate.

        Raises:
            ValueError: If updates can't be joined among these; on every rank.
        """
        return

    @abstractmethod
    def init(self, like: Update, device: torch.device) -> Any:
        """An empty accumulator.

        Args:
            like: An update with the names and shapes of all that will come; in a round, its delta and buffers hold the
                global model.
            device: Where the updates will be.
        """

    @abstractmethod
    def add(self, acc: Any, update: Update, ctx: RoundContext) -> Any:
        """Takes in one client's update.

        Raises:
            ClientLost: If the client has vanished; the round goes on without it.
        """

    @property
    def adds_groups(self) -> bool:
        """Whether :meth:`add_group` does for several updates what :meth:`add` does for one."""
        owner = {name: next(c for c in type(self).__mro__ if name in vars(c)) for name in ("add", "add_group")}
        return issubclass(owner["add_group"], owner["add"])

    def add_group(self, acc: Any, updates: Update, weights: Sequence[float], ctx: RoundContext) -> Any:
        """Takes in the updates of clients that were trained together.

        Args:
            acc: This rank's accumulator.
            updates: Their updates, each tensor stacked over the clients.
            weights: The clients' weights; the ``weight`` of ``updates`` does not count.
            ctx: Facts of the round.
        """
        raise NotImplementedError

    @abstractmethod
    def merge(self, acc: Any, group: Group, report: Message, ctx: RoundContext) -> tuple[Any, list[Message]]:
        """Joins the ranks' accumulators; the only place with the tensor collective.

        Args:
            acc: This rank's accumulator.
            group: The ranks of the federation.
            report: What this rank tells the others of the round (metrics, timings); it goes through the aggregator
                so that one that hides updates can hide it as well.
            ctx: Facts of the round.

        Returns:
            The federation's accumulator, the same on every rank, and the reports of all ranks.
        """

    def gather(self, group: Group, report: Message, topic: str) -> list[Message]:
        """The reports of all ranks, outside a round: what an evaluation has found."""
        return group.all_gather(report, topic)

    @abstractmethod
    def result(self, acc: Any, ctx: RoundContext) -> Aggregate:
        """The aggregate of the merged accumulator.

        Raises:
            ValueError: If the weights add up to nothing.
        """


@dataclass(frozen=True)
class WeightedSum:
    """Accumulator of :class:`WeightedMean`: running sums, so that memory does not grow with the number of clients.

    In each flat buffer the weighted tensors (delta, buffers) stand before the side channels, which are not weighted.
    """

    layout: Layout
    num_weighted: dict[torch.dtype, int]
    sums: Flat
    weight: float = 0.0
    num_clients: int = 0


class WeightedMean(Aggregator):
    r"""The weighted mean :math:`\sum_i w_i u_i / \sum_i w_i`, as running sums and one all-reduce a dtype.

    Sums run in the tensors' own dtype, at least float32; integer buffers in float64.
    """

    is_sum = True

    def init(self, like: Update, device: torch.device) -> WeightedSum:
        layout = Layout.of(update_trees(like))
        weighted = Layout.of({"delta": like.delta, "buffers": like.buffers})
        return WeightedSum(layout, {dtype: weighted.size(dtype) for dtype in layout.dtypes}, layout.zeros(device))

    def add(self, acc: WeightedSum, update: Update, ctx: RoundContext) -> WeightedSum:
        for dtype, flat in acc.layout.flatten(update_trees(update)).items():
            split = acc.num_weighted[dtype]
            acc.sums[dtype][:split].add_(flat[:split], alpha=update.weight)
            acc.sums[dtype][split:].add_(flat[split:])
        return replace(acc, weight=acc.weight + update.weight, num_clients=acc.num_clients + 1)

    def add_group(self, acc: WeightedSum, updates: Update, weights: Sequence[float], ctx: RoundContext) -> WeightedSum:
        sums = acc.layout.unflatten(acc.sums)
        for tree, tensors in update_trees(updates).items():
            own = [1.0] * len(weights) if tree.startswith("aux/") else weights
            for name, tensor in tensors.items():
                _add_weighted(sums[tree][name], tensor, own)
        return replace(acc, weight=acc.weight + sum(weights), num_clients=acc.num_clients + len(weights))

    def merge(
        self, acc: WeightedSum, group: Group, report: Message, ctx: RoundContext
    ) -> tuple[WeightedSum, list[Message]]:
        shares = {"weight": acc.weight, "num_clients": acc.num_clients}
        messages = group.all_gather(Message({**report.fields, **shares}, report.tensors), f"end of round {ctx.round}")
        merged = replace(
            acc,
            sums={dtype: group.all_reduce(flat) for dtype, flat in acc.sums.items()},
            weight=sum(message.fields["weight"] for message in messages),
            num_clients=sum(message.fields["num_clients"] for message in messages),
        )
        return merged, messages

    def result(self, acc: WeightedSum, ctx: RoundContext) -> Aggregate:
        return aggregate_of(acc.layout.unflatten(acc.sums), acc.weight, acc.num_clients, ctx)


def aggregate_of(trees: Mapping[str, Tree], weight: float, num_clients: int, ctx: RoundContext) -> Aggregate:
    """The aggregate of sums of what :func:`update_trees` gives.

    Raises:
        ValueError: If the weights add up to nothing.
    """
    if not weight > 0:
        raise ValueError(
            f"The weights of round {ctx.round} add up to {weight} over {num_clients} updates; a weighted mean needs a "
            "positive sum. Give the clients data, or weigh them alike with `weighting='uniform'`."
        )
    rest = dict(trees)
    return Aggregate(
        delta=rest.pop("delta", {}),
        buffers=rest.pop("buffers", {}),
        weight=weight,
        aux={name.removeprefix("aux/"): tree for name, tree in rest.items()},
        num_clients=num_clients,
        population=ctx.population,
    )


def _add_weighted(total: Tensor, stacked: Tensor, weights: Sequence[float]) -> None:
    if all(weight == weights[0] for weight in weights):
        total.add_(stacked.sum(0), alpha=weights[0])
    else:
        total.add_((stacked * stacked.new_tensor(weights).view(-1, *[1] * total.dim())).sum(0))
