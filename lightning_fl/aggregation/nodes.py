"""Keeps the updates of a round apart, for federations in which each client has a model of its own."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_fl.aggregation.aggregator import Aggregator, FederationFacts
from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.rows import RoundRows, Rows, complete
from lightning_fl.aggregation.weighted_mean import aggregate_of
from lightning_fl.algorithms import Algorithm
from lightning_fl.communication import Group, LocalGroup, Message
from lightning_fl.tree import Layout, update_trees
from lightning_fl.types import Aggregate, ClientId, Tree, Update


@dataclass(frozen=True)
class NodeRows:
    """Accumulator of :class:`Nodes`.

    Args:
        rows: This rank's rows; after the merge those of all ranks, in the order of the nodes.
        weights: The weight of each row.
        nodes: All clients of the federation, in order; the position of a row is a place among them.
    """

    rows: Rows
    weights: tuple[float, ...]
    nodes: Sequence[ClientId]


class Nodes(Aggregator):
    r"""Hands the updates of all clients on, each by itself, beside their weighted mean.

    For algorithms that ``keep_nodes``, in which each client has a model of its own: they are the aggregate's ``nodes``
    and ``node_weights``. Each rank holds all of them: the memory is that of the clients' models.
    """

    def check(self, algorithm: Algorithm) -> None:
        if not algorithm.keeps_nodes:
            raise ValueError(
                f"Nodes() hands on each client's own update, but {type(algorithm).__name__} moves one model by their "
                "mean. Leave aggregator out, or use a decentralised algorithm such as 'dsgd'."
            )

    def open(self, group: Group, facts: FederationFacts) -> Sequence[ClientId]:
        return tuple(facts.clients)

    def init(self, template: Update, device: torch.device, session: Any = None) -> NodeRows:
        return NodeRows(Rows(Layout.of(update_trees(template)), device), (), session or ())

    def add(self, acc: NodeRows, update: Update, ctx: RoundContext) -> NodeRows:
        assert ctx.client is not None
        stacked = update.map(lambda tensor: tensor[None])
        return self.add_group(acc, stacked, [update.weight], replace(ctx, clients=[ctx.client]))

    def add_group(self, acc: NodeRows, updates: Update, weights: Sequence[float], ctx: RoundContext) -> NodeRows:
        acc.rows.layout.check(update_trees(updates.part(0)))
        places = [_place(acc, client, ctx) for client in ctx.clients]
        return replace(acc, rows=acc.rows.add(update_trees(updates), places), weights=(*acc.weights, *weights))

    def merge(self, acc: NodeRows, group: Group, report: Message, ctx: RoundContext) -> tuple[NodeRows, list[Message]]:
        own = {
            "weight": sum(acc.weights),
            "num_clients": len(acc.rows),
            "rows": list(acc.rows.positions),
            "weights": list(acc.weights),
        }
        messages = group.all_gather(Message({**report.fields, **own}, report.tensors), f"end of round {ctx.round}")
        counts = [len(message.fields["rows"]) for message in messages]
        positions = list(chain.from_iterable(message.fields["rows"] for message in messages))
        weights = list(chain.from_iterable(message.fields["weights"] for message in messages))
        order = sorted(range(len(positions)), key=positions.__getitem__)
        rows = acc.rows
        # Silos would have to trust each other with their coordinates; there each receives all rows.
        if ctx.silos and group.size > 1 and positions:
            rows, group, counts = rows.gather(group, counts, ctx.round), LocalGroup(), [len(positions)]
        found = RoundRows(rows, group, counts, order).everywhere() if positions else {}
        whole = Rows(rows.layout, rows.device, (found,), tuple(positions[row] for row in order))
        return NodeRows(whole, tuple(weights[row] for row in order), acc.nodes), messages

    def result(self, acc: NodeRows, ctx: RoundContext) -> Aggregate:
        rows, places = acc.rows, list(acc.rows.positions)
        size, total = len(acc.nodes) or len(ctx.cohort), sum(acc.weights)
        weights = torch.zeros(size, dtype=torch.float64, device=rows.device)
        weights[places] = torch.tensor(acc.weights, dtype=torch.float64, device=rows.device)
        trees: dict[str, Tree] = {}
        stacked: dict[str, Tree] = {}
        each = [
            rows.layout.unflatten(complete({dtype: own[row] for dtype, own in rows.blocks[0].items()}))
            for row in range(len(places))
        ]
        for tree, name, shape, dtype in rows.layout.entries:
            own = torch.zeros(size, *shape, dtype=dtype, device=rows.device)
            for place, found in zip(places, each, strict=True):
                own[place] = found[tree][name]
            stacked.setdefault(tree, {})[name] = own
            shares = torch.ones_like(weights) if tree.startswith("aux/") else weights
            trees.setdefault(tree, {})[name] = _weighted_sum(own, shares)
        aggregate = aggregate_of(trees, total, len(places), ctx)
        return replace(aggregate, nodes=stacked.get("delta", {}), node_weights=weights / total)


def _place(acc: NodeRows, client: ClientId, ctx: RoundContext) -> int:
    # Outside a fit nobody has told who the nodes are: then they are those of the round.
    return (acc.nodes or ctx.cohort).index(client)


def _weighted_sum(stacked: Tensor, weights: Tensor) -> Tensor:
    return torch.tensordot(weights.to(stacked.dtype), stacked, dims=1)
