"""The weighted mean, the default aggregator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_fl.aggregation.aggregator import Aggregator
from lightning_fl.aggregation.context import RoundContext
from lightning_fl.communication import Group, Message
from lightning_fl.tree import Flat, Layout, update_trees
from lightning_fl.types import Aggregate, Tree, Update


@dataclass(frozen=True)
class WeightedSum:
    """Accumulator of :class:`WeightedMean`: running sums, so that memory does not grow with the number of clients.

    Args:
        layout: The position of each tensor in the flat buffers.
        sums: The flat buffers, one per dtype, which the ranks all-reduce.
        views: Views of the same memory as trees.
        weight: The sum of the weights.
        num_clients: Number of updates added.
    """

    layout: Layout
    sums: Flat
    views: Mapping[str, Tree]
    weight: float = 0.0
    num_clients: int = 0


class WeightedMean(Aggregator):
    r"""The weighted mean :math:`\sum_i w_i u_i / \sum_i w_i`, from running sums and one all-reduce per dtype.

    Sums are accumulated in the tensors' dtype, at least float32; integer buffers in float64.
    """

    is_sum = True

    def init(self, template: Update, device: torch.device, session: Any = None) -> WeightedSum:
        layout = Layout.of(update_trees(template))
        sums = layout.zeros(device)
        return WeightedSum(layout, sums, layout.unflatten(sums))

    def add(self, acc: WeightedSum, update: Update, ctx: RoundContext) -> WeightedSum:
        trees = update_trees(update)
        acc.layout.check(trees)
        for tree, tensors in trees.items():
            # Side channels are unweighted sums over the clients, such as counts.
            weight = 1.0 if tree.startswith("aux/") else update.weight
            for name, tensor in tensors.items():
                # Adds into the flat buffer through its view, which avoids a weighted and a flattened copy.
                acc.views[tree][name].add_(tensor, alpha=weight)
        return WeightedSum(acc.layout, acc.sums, acc.views, acc.weight + update.weight, acc.num_clients + 1)

    def add_group(self, acc: WeightedSum, updates: Update, weights: Sequence[float], ctx: RoundContext) -> WeightedSum:
        if len(weights) == 1:
            return self.add(acc, replace(updates.part(0), weight=weights[0]), ctx)
        # Stacked tensors have the same shape for every client, so checking one client's part is enough.
        acc.layout.check(update_trees(updates.part(0)))
        for tree, tensors in update_trees(updates).items():
            factors = [1.0] * len(weights) if tree.startswith("aux/") else weights
            for name, tensor in tensors.items():
                _add_weighted(acc.views[tree][name], tensor, factors)
        weight, num_clients = acc.weight + sum(weights), acc.num_clients + len(weights)
        return WeightedSum(acc.layout, acc.sums, acc.views, weight, num_clients)

    def merge(
        self, acc: WeightedSum, group: Group, report: Message, ctx: RoundContext
    ) -> tuple[WeightedSum, list[Message]]:
        # The weights are sent with the reports as Python floats (float64): in the tensors' dtype a sum of many example
        # counts would be rounded.
        counts = {"weight": acc.weight, "num_clients": acc.num_clients}
        # The small messages go first: their topic reveals ranks that are not at the end of the same round before
        # tensors are exchanged.
        messages = group.all_gather(Message({**report.fields, **counts}, report.tensors), f"end of round {ctx.round}")
        # `all_reduce` returns a new tensor, so that the accumulator stays valid for another attempt.
        sums = {dtype: self.total(flat, group, ctx) for dtype, flat in acc.sums.items()}
        # Every rank sums in the order of the ranks, so that all get the same float.
        weight = sum(message.fields["weight"] for message in messages)
        num_clients = sum(message.fields["num_clients"] for message in messages)
        return WeightedSum(acc.layout, sums, acc.layout.unflatten(sums), weight, num_clients), messages

    def total(self, flat: Tensor, group: Group, ctx: RoundContext) -> Tensor:
        """The sum of the ranks' flat buffers, as a new tensor."""
        return group.all_reduce(flat)

    def result(self, acc: WeightedSum, ctx: RoundContext) -> Aggregate:
        return aggregate_of(acc.views, acc.weight, acc.num_clients, ctx)


def aggregate_of(trees: Mapping[str, Tree], weight: float, num_clients: int, ctx: RoundContext) -> Aggregate:
    """Builds the aggregate from sums of the trees that :func:`update_trees` returns.

    Raises:
        ValueError: If the weights do not add up to a positive number.
    """
    # Written so that a weight of NaN is refused too.
    if not weight > 0:
        raise ValueError(
            f"The weights of round {ctx.round} add up to {weight} over {num_clients} updates; a weighted mean needs a "
            "positive sum. Give the clients data, or weight them equally with `weighting='uniform'`."
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
    # Equal weights need no weighted copy of all updates, which would double the memory of a client group.
    if all(weight == weights[0] for weight in weights):
        total.add_(stacked.sum(0), alpha=weights[0])
    else:
        total.add_((stacked * stacked.new_tensor(weights).view(-1, *[1] * total.dim())).sum(0))
