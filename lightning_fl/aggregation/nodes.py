"""Keeps the updates of a round separate, for federations in which each client has a model of its own."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fl.aggregation.aggregator import Aggregator, FederationFacts
from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.rows import RoundRows, Rows, complete
from lightning_fl.aggregation.weighted_mean import aggregate_of
from lightning_fl.algorithms import Algorithm
from lightning_fl.communication import Group, Message
from lightning_fl.tree import Layout, as_real, update_trees
from lightning_fl.types import Aggregate, ClientId, State, Tree, Update


@dataclass(frozen=True)
class NodeRows:
    """Accumulator of :class:`Nodes`.

    Args:
        rows: This rank's rows; after the merge those of all ranks, in the order of the nodes.
        weights: The weight of each row.
        nodes: All clients of the federation, in order; a row's position is an index into them.
        nominal: By position, the weights of the nodes whose data is known, whether they contribute in a round or not.
        all_weights: Between silos, which don't share their rows: the weight of each silo's update, by position.
        shared: Between silos, the sums of the trees that all have in common, such as the buffers.
        neighbours: Between silos, exchanges rows with the others.
    """

    rows: Rows
    weights: tuple[float, ...]
    nodes: Sequence[ClientId]
    nominal: Mapping[int, float] = field(default_factory=dict)
    all_weights: Mapping[int, float] = field(default_factory=dict)
    shared: Mapping[str, Tree] = field(default_factory=dict)
    neighbours: "SiloNeighbours | None" = None


class NodeSession(NamedTuple):
    """Who the nodes are, in order, and the weights that this rank knows, by place."""

    nodes: Sequence[ClientId] = ()
    nominal: Mapping[int, float] = {}


class SiloNeighbours:
    """Implements :class:`~lightning_fl.types.Neighbours` where each silo is a node.

    Args:
        group: The silos, in the order of the nodes.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    @property
    def place(self) -> int:
        """The index of this silo's node."""
        return self.group.rank

    def mix(self, matrix: Tensor, nodes: Tree) -> Tree:
        """Sends this node's rows to the nodes that mix them, and returns the mixture of the rows it received."""
        place, ranks = self.place, range(self.group.size)
        row, column = matrix[place].tolist(), matrix[:, place].tolist()
        found = {}
        for dtype in dict.fromkeys(own.dtype for own in nodes.values()):
            names = [name for name, own in nodes.items() if own.dtype == dtype]
            flat = torch.cat([as_real(nodes[name][place]).reshape(-1) for name in names])
            parts = [flat if column[rank] and rank != place else flat[:0] for rank in ranks]
            sizes = [len(flat) if row[rank] and rank != place else 0 for rank in ranks]
            received = self.group.all_to_all(parts, sizes)
            total = row[place] * flat
            for share, part in zip(row, received, strict=True):
                if len(part):
                    total = total + share * part
            found.update(self._placed(names, nodes, total))
        return {name: found[name] for name in nodes}

    def _placed(self, names: Sequence[str], nodes: Tree, flat: Tensor) -> Tree:
        """Tensors like those of ``nodes`` with a new row of this node; the others are zero."""
        placed = {name: torch.zeros_like(nodes[name]) for name in names}
        pieces = flat.split([as_real(nodes[name][self.place]).numel() for name in names])
        for name, piece in zip(names, pieces, strict=True):
            row = as_real(placed[name][self.place])
            row.copy_(piece.view_as(row))
        return placed

    def gather(self, nodes: Tree) -> Tree:
        """The rows of all silos."""
        found = {}
        for name, own in nodes.items():
            rows = self.group.gather_tensor(as_real(own[self.place]).contiguous())
            found[name] = torch.view_as_complex(rows) if own.is_complex() else rows
        return found


class Nodes(Aggregator):
    r"""Passes on the update of every client, along with their weighted mean.

    For algorithms with ``keeps_nodes``, in which each client has a model of its own. The updates are the aggregate's
    ``nodes``, their weights its ``node_weights``. A node's weight is that of its data, the same in each round: if its
    update is refused or lost, it keeps the weight, with a change of zero. Where the size of the data is unknown, it is
    the weight of the first update. In a simulation each rank holds all updates, which takes the memory of one model per
    client. A silo keeps its update to itself; through the aggregate's ``neighbours`` the algorithm sends rows to the
    silos that mix them.
    """

    def check(self, algorithm: Algorithm) -> None:
        if not algorithm.keeps_nodes:
            raise ValueError(
                f"Nodes() passes on each client's own update, but {type(algorithm).__name__} updates one model by "
                "their mean. Leave aggregator out, or use a decentralised algorithm such as 'dsgd'."
            )

    def open(self, group: Group, facts: FederationFacts) -> NodeSession:
        nodes, known = tuple(facts.clients), facts.weights()
        return NodeSession(nodes, {place: known[client] for place, client in enumerate(nodes) if client in known})

    def init(self, template: Update, device: torch.device, session: Any = None) -> NodeRows:
        nodes, nominal = session or NodeSession()
        return NodeRows(Rows(Layout.of(update_trees(template)), device), (), nodes, nominal)

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
            "nominal": list(map(list, acc.nominal.items())) if ctx.silos else [],
        }
        messages = group.all_gather(Message({**report.fields, **own}, report.tensors), f"end of round {ctx.round}")
        counts = [len(message.fields["rows"]) for message in messages]
        positions = list(chain.from_iterable(message.fields["rows"] for message in messages))
        weights = list(chain.from_iterable(message.fields["weights"] for message in messages))
        order = sorted(range(len(positions)), key=positions.__getitem__)
        rows = acc.rows
        if ctx.silos and group.size > 1:
            nominal = {int(place): float(own) for message in messages for place, own in message.fields["nominal"]}
            weights_of = dict(zip(positions, weights, strict=True))
            return self._between_silos(replace(acc, nominal=nominal), group, weights_of), messages
        found = RoundRows(rows, group, counts, order).everywhere() if positions else {}
        whole = Rows(rows.layout, rows.device, (found,), tuple(positions[row] for row in order))
        return replace(acc, rows=whole, weights=tuple(weights[row] for row in order)), messages

    def _between_silos(self, acc: NodeRows, group: Group, weights: Mapping[int, float]) -> NodeRows:
        """The silo's own row, and the sums of the trees that are not per node: buffers and side channels."""
        shared: dict[str, Tree] = {}
        if any(tree != "delta" for tree, *_ in acc.rows.layout.entries):
            own = next(acc.rows.trees(), {})
            for tree, name, shape, dtype in acc.rows.layout.entries:
                if tree != "delta":
                    share = 1.0 if tree.startswith("aux/") else sum(acc.weights)
                    part = own[tree][name] * share if own else torch.zeros(shape, dtype=dtype, device=acc.rows.device)
                    shared.setdefault(tree, {})[name] = group.all_reduce(part)
        return replace(acc, all_weights=weights, shared=shared, neighbours=SiloNeighbours(group))

    def result(self, acc: NodeRows, ctx: RoundContext) -> Aggregate:
        if acc.neighbours is not None:
            return self._own_result(acc, acc.neighbours, ctx)
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
        own_weights = self._nominal(acc, ctx).to(rows.device)
        return replace(aggregate, nodes=stacked.get("delta", {}), node_weights=own_weights / own_weights.sum())

    def _own_result(self, acc: NodeRows, neighbours: SiloNeighbours, ctx: RoundContext) -> Aggregate:
        """The aggregate as one silo knows it: its own change, and the weights of all."""
        total, rows = sum(acc.all_weights.values()), acc.rows
        weights = self._nominal(acc, ctx).to(rows.device)
        own = next(acc.rows.trees(), {"delta": {}})["delta"]
        nodes: Tree = {}
        for tree, name, shape, dtype in rows.layout.entries:
            if tree == "delta":
                nodes[name] = torch.zeros(len(acc.nodes), *shape, dtype=dtype, device=rows.device)
                if name in own:
                    nodes[name][neighbours.place] = own[name]
        # As if all nodes had changed like this one: the norm in the history is then that of its own change.
        delta = {name: total * rows_of[neighbours.place] for name, rows_of in nodes.items()}
        aggregate = aggregate_of({"delta": delta, **acc.shared}, total, len(acc.all_weights), ctx)
        return replace(aggregate, nodes=nodes, node_weights=weights / weights.sum(), neighbours=neighbours)

    def _nominal(self, acc: NodeRows, ctx: RoundContext) -> Tensor:
        """The nodes' own weights, float64 ``[nodes]``, on the CPU."""
        sent = acc.all_weights or dict(zip(acc.rows.positions, acc.weights, strict=True))
        before = dict(enumerate(ctx.memory["weights"].tolist())) if ctx.memory else {}
        first = {place: before.get(place) or weight for place, weight in sent.items()}
        found = {**before, **first, **acc.nominal}
        places = range(len(acc.nodes) or len(ctx.cohort))
        return torch.tensor([found.get(place, 0.0) for place in places], dtype=torch.float64)

    def remember(self, acc: NodeRows, ctx: RoundContext) -> State:
        is_known = len(acc.nominal) == len(acc.nodes)
        return {} if is_known else {"weights": self._nominal(acc, ctx)}


def _place(acc: NodeRows, client: ClientId, ctx: RoundContext) -> int:
    # Outside a fit the nodes are not known: use the clients of the round.
    return (acc.nodes or ctx.cohort).index(client)


def _weighted_sum(stacked: Tensor, weights: Tensor) -> Tensor:
    return torch.tensordot(weights.to(stacked.dtype), stacked, dims=1)
