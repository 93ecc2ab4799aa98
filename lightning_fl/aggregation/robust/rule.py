"""Base classes of the robust rules: aggregators that compare the updates of all clients."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_fl.aggregation.aggregator import Aggregator, FederationFacts
from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram
from lightning_fl.aggregation.robust.rows import RoundRows, Rows, complete
from lightning_fl.aggregation.weighted_mean import aggregate_of
from lightning_fl.algorithms import Algorithm
from lightning_fl.communication import Group, LocalGroup, Message
from lightning_fl.tree import Flat, Layout, update_trees
from lightning_fl.types import Aggregate, ClientId, State, Update


class PreAggregator(ABC):
    """Mixes the rows before the rule sees them."""

    def num_rows(self, num_rows: int) -> int:
        """The number of rows after mixing ``num_rows``; by default the same."""
        return num_rows

    @abstractmethod
    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        """The mixing matrix ``[m, n]``, float64; each of its rows adds up to 1."""


@dataclass(frozen=True)
class Merged:
    """The joint result of the ranks.

    Args:
        num_rows: The number of rows of all ranks.
        num_attackers: The number of rows that may be attackers'.
        flat: The combined rows, by dtype; None if there were too few rows.
        clients: The client of each row.
        matrix: The mixing matrix ``[m, n]``; None if all rows enter each coordinate.
        memory: What the rule keeps for the next round.
        reasons: Why clients are left out, as far as known.
    """

    num_rows: int
    num_attackers: int
    flat: Flat | None
    clients: Sequence[ClientId] = ()
    matrix: Tensor | None = None
    memory: State = field(default_factory=dict)
    reasons: Mapping[ClientId, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RowSum:
    """Accumulator of :class:`RowAggregator`.

    Args:
        rows: This rank's rows.
        merged: The joint result of all ranks, after the merge.
    """

    rows: Rows
    merged: Merged | None = None


class RowAggregator(Aggregator):
    r"""Base of the robust rules, which keep the update of every client as a row :math:`u_i`.

    The rows are mixed, :math:`v_r = \sum_i M_{ri} u_i`, and the mixtures combined coordinate by coordinate. ``M`` is
    computed from the changes of the parameters and the side channels, each side channel in units of its median length;
    the same mixture applies to both. Buffers are statistics without a length that could be bounded: where ``M`` depends
    on the rows, they become the coordinate-wise median over the rows that count. A client's weight is ignored, since an
    attacker could claim any: all weigh the same.

    In a simulation each rank processes a part of the coordinates, so that memory and traffic are divided by the number
    of ranks. Silos would have to trust each other for that: there each rank receives all rows, and the silos compare
    digests of the rows they received.

    A round with too few updates for the rule leaves the model unchanged, with a warning. An update that was refused for
    NaN or Inf counts as one of the attackers.

    A rule is a frozen dataclass with the fields ``num_attackers`` and ``before``.
    """

    weighting = "uniform"
    num_attackers: int | float
    before: Sequence[PreAggregator]
    shortens: bool = False
    """Whether the coefficients of the rows may add up to another number than 1, so that updates change in length."""
    why: ClassVar[str] = "the rule gave its update no weight"
    """The reason for leaving out a client, for the history."""

    def __post_init__(self) -> None:
        count_attackers(self.num_attackers, 1)
        if isinstance(self.before, list):
            object.__setattr__(self, "before", tuple(self.before))
        if not all(isinstance(mixing, PreAggregator) for mixing in self.before):
            raise ValueError(
                f"before={self.before!r} must be a list of pre-aggregators, such as "
                "fl.aggregation.NearestNeighborMixing() or fl.aggregation.Bucketing(2)."
            )

    # ---- what a rule defines

    def min_rows(self, num_attackers: int) -> int:
        """The smallest number of rows for which the rule tolerates ``num_attackers``."""
        return 2 * num_attackers + 1

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor | None:
        """The rule's own mixing matrix ``[m, n]``, float64 on the CPU; None leaves the rows unchanged.

        If there are extra rows, it has a column for each of them too.
        """
        return None

    def measure(self, rows: Rows, ctx: RoundContext) -> Mapping[Any, Sequence[float]]:
        """The checks' measurements of each of this rank's updates."""
        return {}

    def reasons(self, gram: Gram, ctx: RoundContext) -> Mapping[ClientId, str]:
        """Why clients are left out, as far as the rule knows; :attr:`why` is the reason for all others."""
        return {}

    def beside(self, rows: Rows, clients: Sequence[ClientId], ctx: RoundContext) -> Flat:
        """Extra rows that the rule adds to those of the clients, such as its memory; the same on all ranks."""
        return {}

    def keep(self, rows: RoundRows, flat: Flat, clients: Sequence[ClientId], ctx: RoundContext) -> State:
        """What the rule keeps for the next round, where it is ``ctx.memory``.

        Args:
            rows: The rows of the round.
            flat: The combined rows.
            clients: The client of each row.
            ctx: Facts of the round.
        """
        return {}

    @abstractmethod
    def combine(self, block: Tensor, num_attackers: int) -> Tensor:
        """Combines the mixtures ``[m, w]`` in each of ``w`` coordinates, ``[w]``."""

    @property
    def needs_gram(self) -> bool:
        """Whether the mixing matrix depends on the rows."""
        return bool(self.before) or type(self).matrix is not RowAggregator.matrix

    # ---- the aggregator

    def check(self, algorithm: Algorithm) -> None:
        own, name = type(self).__name__, type(algorithm).__name__
        remedy = "Use another algorithm, such as 'fedavg', 'fedadam' or 'scaffold', or no robust rule."
        if algorithm.aux_role == "divisor":
            raise ValueError(
                f"{own} bounds what a client adds to a sum, but the step of {name} is a ratio of two sums, in which "
                f"the bound cancels out, and one client may bring the divisor close to 0. {remedy}"
            )
        if algorithm.aux_role == "factor" and self.shortens:
            raise ValueError(
                f"{own} shortens updates, and {name} multiplies its step by what clients send, so that it would be "
                "shortened twice. Use a rule that selects updates, such as fl.aggregation.MultiKrum or "
                "GeometricMedian, or another algorithm, such as 'fedavg'."
            )
        if algorithm.needs_exact_deltas:
            raise ValueError(
                f"{name} is right only if the server counts every change as its client does, and {own} leaves out or "
                f"shortens some. {remedy}"
            )

    def check_cohort(self, num_clients: int) -> None:
        attackers, rows = count_attackers(self.num_attackers, num_clients), num_clients
        for mixing in self.before:
            rows = mixing.num_rows(rows)
        if rows < self.min_rows(attackers):
            after = f", {rows} rows after {', '.join(type(m).__name__ for m in self.before)}," if self.before else ""
            raise ValueError(
                f"{type(self).__name__}(num_attackers={self.num_attackers}) must tolerate {attackers} attackers "
                f"among {num_clients} clients{after} and needs at least {self.min_rows(attackers)} rows. Let more "
                "clients take part in a round, or lower num_attackers."
            )

    def open(self, group: Group, facts: FederationFacts) -> None:
        if facts.silos and self.needs_server:
            raise ValueError(
                f"{type(self).__name__} evaluates updates on data of the server, but silos have no server. Let one "
                "silo hold the data, such as FLTrust(root=0) for the first, or use another rule."
            )
        if facts.is_training:
            self.check_cohort(facts.cohort_size)

    def init(self, template: Update, device: torch.device, session: Any = None) -> RowSum:
        return RowSum(Rows(Layout.of(update_trees(template)), device))

    def add(self, acc: RowSum, update: Update, ctx: RoundContext) -> RowSum:
        assert ctx.client is not None
        trees = update_trees(update)
        acc.rows.layout.check(trees)
        stacked = {tree: {name: tensor[None] for name, tensor in own.items()} for tree, own in trees.items()}
        return RowSum(acc.rows.add(stacked, [ctx.cohort.index(ctx.client)]))

    def add_group(self, acc: RowSum, updates: Update, weights: Sequence[float], ctx: RoundContext) -> RowSum:
        acc.rows.layout.check(update_trees(updates.part(0)))
        return RowSum(acc.rows.add(update_trees(updates), [ctx.cohort.index(client) for client in ctx.clients]))

    def merge(self, acc: RowSum, group: Group, report: Message, ctx: RoundContext) -> tuple[RowSum, list[Message]]:
        measured = self.measure(acc.rows, ctx)
        own = {
            "weight": float(len(acc.rows)),
            "num_clients": len(acc.rows),
            "rows": list(acc.rows.positions),
            "measured": [list(values) for values in measured.values()],
        }
        messages = group.all_gather(Message({**report.fields, **own}, report.tensors), f"end of round {ctx.round}")
        positions = [place for message in messages for place in message.fields["rows"]]
        refused = sum(len(message.fields.get("refused", [])) for message in messages)
        num_rows = len(positions)
        # Refused updates are no longer among the rows.
        attackers = max(0, count_attackers(self.num_attackers, num_rows + refused) - refused)
        mixed = num_rows
        for mixing in self.before:
            mixed = mixing.num_rows(mixed)
        if mixed < max(1, self.min_rows(attackers)):
            if group.rank == 0:
                warnings.warn(
                    f"Round {ctx.round} has {num_rows} updates ({refused} more were refused), too few for "
                    f"{type(self).__name__}(num_attackers={self.num_attackers}) to tolerate {attackers} attackers: "
                    "the global model is unchanged.",
                    stacklevel=2,
                )
            clients = [ctx.cohort[place] for place in positions]
            return replace(acc, merged=Merged(num_rows, attackers, None, clients, memory=ctx.memory)), messages
        counts = [len(message.fields["rows"]) for message in messages]
        rows = acc.rows
        if ctx.silos and group.size > 1:
            rows, group = rows.gather(group, counts, ctx.round), LocalGroup()
            counts = [num_rows]
        # By position in the cohort, so that neither ties nor rounding depend on the placement of clients.
        order = sorted(range(num_rows), key=positions.__getitem__)
        clients = [ctx.cohort[positions[row]] for row in order]
        found = RoundRows(rows, group, counts, order, self.beside(rows, clients, ctx))
        of_all = {
            key: torch.tensor(
                [value for message in messages for value in message.fields["measured"][place]], dtype=torch.float64
            )[order]
            for place, key in enumerate(measured)
        }
        matrix, reasons = self._mixing(found, clients, attackers, of_all, ctx)
        flat = self._combined(found, matrix, attackers)
        if matrix is not None:
            _put_medians(flat, found, matrix, attackers)
        memory = self.keep(found, flat, clients, ctx)
        return replace(acc, merged=Merged(num_rows, attackers, flat, clients, matrix, memory, reasons)), messages

    def _mixing(
        self,
        found: RoundRows,
        clients: Sequence[ClientId],
        attackers: int,
        measured: Mapping[Any, Tensor],
        ctx: RoundContext,
    ) -> tuple[Tensor | None, Mapping[ClientId, str]]:
        """The complete mixing matrix, and why clients are left out."""
        if not self.needs_gram:
            return None, {}
        num_beside = next((len(own) for own in found.beside.values()), 0)
        parts = [
            Gram.of((window.block for window in found.windows(tree)), clients, num_beside)
            for tree in found.rows.trees_held
            if tree != "buffers"
        ]
        sums = found.group.all_reduce(torch.cat([part.flat() for part in parts])).view(len(parts), -1)
        gram = Gram.joined([part.with_flat(own) for part, own in zip(parts, sums, strict=True)])
        gram = replace(gram, measured=measured)
        # A mixture can't be attributed to one client.
        reasons = {} if self.before else self.reasons(gram, ctx)
        matrix = torch.eye(len(gram), dtype=torch.float64)
        for mixing in self.before:
            own = mixing.matrix(gram.updates, attackers, ctx)
            gram, matrix = gram.mix(own), gram.with_beside(own) @ matrix
        last = self.matrix(gram, attackers, ctx)
        return (matrix if last is None else last @ matrix), reasons

    def _combined(self, found: RoundRows, matrix: Tensor | None, attackers: int) -> Flat:
        """The combined rows, on all ranks."""
        pieces: dict[torch.dtype, list[Tensor]] = {dtype: [] for dtype in found.rows.layout.dtypes}
        for dtype, bounds, _, block in found.windows():
            mixed = block if matrix is None else (matrix.to(block.device) @ block.double()).to(block.dtype)
            own = self.combine(mixed, attackers).contiguous()
            widths = [stop - start for start, stop in pairwise(bounds)]
            pieces[dtype] += found.group.all_to_all([own] * found.group.size, widths)
        return {dtype: torch.cat(parts) for dtype, parts in pieces.items()}

    def result(self, acc: RowSum, ctx: RoundContext) -> Aggregate:
        merged, layout = acc.merged, acc.rows.layout
        assert merged is not None, "merge comes before result"
        if merged.flat is None:
            trees = layout.unflatten(layout.zeros(acc.rows.device))
            return replace(aggregate_of(trees, 1.0, merged.num_rows, ctx), weight=0.0)
        # An aggregate holds sums, which `Aggregate.mean` divides by the weight again.
        trees = layout.unflatten({dtype: own * merged.num_rows for dtype, own in complete(merged.flat).items()})
        return aggregate_of(trees, float(merged.num_rows), merged.num_rows, ctx)

    def shares(self, acc: RowSum, ctx: RoundContext) -> Mapping[ClientId, float]:
        merged = acc.merged
        assert merged is not None, "merge comes before shares"
        if merged.flat is None or merged.matrix is None:
            return {}
        weights = merged.matrix.abs().sum(0)[: merged.num_rows]
        return dict(zip(merged.clients, (weights / weights.sum().clamp(min=1e-300)).tolist(), strict=True))

    def report(self, acc: RowSum, ctx: RoundContext) -> Mapping[str, Any]:
        assert acc.merged is not None, "merge comes before report"
        if acc.merged.flat is None:
            return {"left_out": dict.fromkeys(acc.merged.clients, "the round had too few updates")}
        reasons, shares = acc.merged.reasons, self.shares(acc, ctx)
        return {"left_out": {client: reasons.get(client, self.why) for client, share in shares.items() if not share}}

    def remember(self, acc: RowSum, ctx: RoundContext) -> State:
        assert acc.merged is not None, "merge comes before remember"
        return acc.merged.memory


class GramRule(RowAggregator):
    r"""A rule whose result is :math:`\sum_i c_i u_i`, with coefficients from the Gram matrix of the rows."""

    @abstractmethod
    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        """The coefficients ``[1, n]``, float64 on the CPU."""

    def combine(self, block: Tensor, num_attackers: int) -> Tensor:
        return block[0]

    def _combined(self, found: RoundRows, matrix: Tensor | None, attackers: int) -> Flat:
        # Each rank sums its own rows, which costs one all-reduce instead of redistributing the rows.
        assert matrix is not None
        rows, totals = found.rows, {}
        own, beside = matrix[0, found.own].to(rows.device), matrix[0, len(found) :].to(rows.device)
        for dtype in rows.layout.dtypes:
            parts = [(own @ block.double()).to(block.dtype) for block in rows.own_windows(dtype)]
            totals[dtype] = found.group.all_reduce(torch.cat(parts))
            if found.beside and beside.any():
                totals[dtype] += (beside @ found.beside[dtype].double()).to(totals[dtype].dtype)
        return totals


class CoordinateRule(RowAggregator):
    """A rule that processes each coordinate separately, without distinguishing clients."""

    def check(self, algorithm: Algorithm) -> None:
        if algorithm.aux_like({"x": torch.zeros(1)}):
            raise ValueError(
                f"{type(self).__name__} picks each coordinate from different clients, but {type(algorithm).__name__} "
                "sends side channels that must be combined with the same weights as a client's whole update. Use a "
                "rule that weights whole updates, such as fl.aggregation.MultiKrum or GeometricMedian, or "
                "algorithm='fedavg'."
            )
        super().check(algorithm)


def coordinate_median(block: Tensor) -> Tensor:
    """The median of each column of ``[n, w]``, ``[w]``; of an even number the mean of the two in the middle."""
    n = len(block)
    lower = block.kthvalue((n + 1) // 2, dim=0).values
    return lower if n % 2 else (lower + block.kthvalue(n // 2 + 1, dim=0).values) / 2


def _put_medians(flat: Flat, found: RoundRows, matrix: Tensor, attackers: int) -> None:
    """Replaces the buffers of what the rows became by their medians over the rows with a share in the mixtures.

    Where attackers could be half of these, as of the one that Krum picks, it is the median over all rows.
    """
    counts = matrix[:, : len(found)].abs().sum(0) > 0
    if "buffers" not in found.rows.trees_held or not counts.any():
        return
    if int(counts.sum()) <= 2 * attackers:
        counts[:] = True
    chosen = counts.nonzero()[:, 0].to(found.rows.device)
    pieces: dict[torch.dtype, list[Tensor]] = {}
    for dtype, bounds, _, block in found.windows("buffers"):
        own = coordinate_median(block[chosen]).contiguous()
        widths = [stop - start for start, stop in pairwise(bounds)]
        pieces.setdefault(dtype, []).extend(found.group.all_to_all([own] * found.group.size, widths))
    for dtype, parts in pieces.items():
        flat[dtype][slice(*found.rows.span(dtype, "buffers"))] = torch.cat(parts)


def count_attackers(num_attackers: int | float, num_clients: int) -> int:
    """The number of clients that may be attackers.

    Raises:
        ValueError: If ``num_attackers`` is neither a count nor a share below one half.
    """
    if isinstance(num_attackers, bool) or not (
        num_attackers >= 0 if isinstance(num_attackers, int) else 0 <= num_attackers < 0.5
    ):
        raise ValueError(
            f"num_attackers={num_attackers!r} must be a count (int, at least 0) or a share of the cohort (float, "
            "from 0 to below 0.5)."
        )
    # A share such as 0.2 of 5 must not fall below 1 by rounding.
    return num_attackers if isinstance(num_attackers, int) else int(num_attackers * num_clients + 1e-9)
