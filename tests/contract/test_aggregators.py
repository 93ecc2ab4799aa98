"""Every aggregator through every property: a new aggregator is one entry in ``ENTRIES``."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from lightning_fl import FederatedStrategy
from lightning_fl.aggregation import (
    FLAME,
    Aggregator,
    Bucketing,
    Bulyan,
    CenteredClipping,
    CompressedMean,
    DnC,
    ElectedMean,
    FedMGDA,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    MeanAroundMedian,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    Nodes,
    NormBound,
    RoundContext,
    RowAggregator,
    Screened,
    TrimmedMean,
    WeightedMean,
)
from lightning_fl.communication import Group, LocalGroup, Message
from lightning_fl.privacy import ClientLevelDP, SecureAggregation
from lightning_fl.tree import Layout, sum_dtype, to_sum_dtype
from lightning_fl.types import Aggregate, Tree, Update
from tests.contract import robust_references as references
from tests.contract.helpers import (
    aggregate,
    context,
    from_yaml,
    gather,
    init,
    open_session,
    run_threads,
    shipped,
    trees,
)
from tests.contract.robust_references import by_coefficients, by_coordinates
from tests.helpers.federation import random_updates

NUM_CLIENTS = 5


@dataclass(frozen=True)
class Entry:
    """An aggregator under contract.

    Args:
        kind: The aggregator.
        init_args: Its arguments, as YAML gives them.
        atol: By how much a coordinate of its sums may differ from the exact one. None: by the rounding of its dtype.
        sizes: The numbers of ranks among which it works.
        min_ranks_to_gather: The fewest ranks whose reports it gathers outside a round.
        expected: What becomes of updates. None: the weighted sum.
    """

    kind: type[Aggregator]
    init_args: dict[str, Any] = field(default_factory=dict)
    atol: float | None = None
    sizes: tuple[int, ...] = (1, 2, 4)
    min_ranks_to_gather: int = 1
    expected: Callable[[list[Update]], Aggregate] | None = None

    @property
    def weighs(self) -> bool:
        """Whether updates count by their weight."""
        return self.expected is None

    def exact(self, updates: list[Update]) -> Aggregate:
        return exact(updates) if self.expected is None else self.expected(updates)

    def make(self) -> Aggregator:
        needs_yaml = any(isinstance(value, dict) for value in self.init_args.values())
        return from_yaml(Aggregator, self.kind.__name__, self.init_args) if needs_yaml else self.kind(**self.init_args)

    def aggregate(self, *args: Any, **kwargs: Any) -> Aggregate:
        return aggregate(self.make(), *args, **kwargs)[0]

    def assert_close(self, found: Aggregate, expected: Aggregate) -> None:
        """Weights and counts are exact, sums to within ``atol``."""
        facts = ("weight", "num_clients", "population")
        assert [getattr(found, name) for name in facts] == [getattr(expected, name) for name in facts]
        torch.testing.assert_close(trees(found), trees(expected), **self.tolerance)

    @property
    def tolerance(self) -> dict[str, float]:
        if not self.weighs:
            return {"rtol": 1e-5, "atol": 1e-5}  # coefficients multiply what is at most float32
        return {} if self.atol is None else {"rtol": 1e-6, "atol": self.atol}


BONAWITZ = {"protocol": "bonawitz", "aux_clip": 16.0}
ENTRIES = {
    "mean": Entry(WeightedMean),
    "pairwise": Entry(SecureAggregation, {"aux_clip": 16.0}, atol=1e-5, min_ranks_to_gather=3),
    "pairwise-64": Entry(SecureAggregation, {"modulus_bits": 64}, atol=1e-6, min_ranks_to_gather=3),
    "bonawitz": Entry(SecureAggregation, BONAWITZ, atol=1e-5, sizes=(1,), min_ranks_to_gather=3),
    "compressed": Entry(CompressedMean, {"compressor": {"class_path": "TopK", "init_args": {"share": 1.0}}}, atol=1e-5),
    "elected": Entry(ElectedMean, {"swarm": {"class_path": "Swarm"}}),
    "nodes": Entry(Nodes),
    "fedmgda": Entry(FedMGDA, expected=by_coefficients(references.fedmgda)),
    "median": Entry(Median, expected=by_coordinates(references.median)),
    "trimmed mean": Entry(TrimmedMean, expected=by_coordinates(references.trimmed_mean)),
    "mean around median": Entry(MeanAroundMedian, expected=by_coordinates(references.mean_around_median)),
    "bulyan": Entry(Bulyan, {"num_attackers": 0}, expected=references.of_bulyan),
    "krum": Entry(Krum, expected=by_coefficients(references.krum)),
    "multi-krum": Entry(MultiKrum, expected=by_coefficients(references.multi_krum)),
    "geometric median": Entry(GeometricMedian, expected=by_coefficients(references.geometric_median)),
    "centered clipping": Entry(CenteredClipping, expected=by_coefficients(references.clipping)),
    "norm bound": Entry(NormBound, expected=by_coefficients(references.norm_bound)),
    "fltrust": Entry(FLTrust, {"root": "client 0"}, expected=by_coefficients(references.fltrust)),
    "dnc": Entry(DnC, expected=by_coefficients(references.dnc)),
    "flame": Entry(FLAME, expected=by_coefficients(references.flame)),
    "screened": Entry(Screened, expected=by_coefficients(references.screened)),
    "foolsgold": Entry(FoolsGold, expected=by_coefficients(references.foolsgold)),
}
every_aggregator = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
every_weighted_aggregator = pytest.mark.parametrize(
    "entry", [pytest.param(entry, id=name) for name, entry in ENTRIES.items() if entry.weighs]
)
every_rule = pytest.mark.parametrize(
    "entry", [pytest.param(entry, id=name) for name, entry in ENTRIES.items() if not entry.weighs]
)
every_aggregator_and_size = pytest.mark.parametrize(
    ("entry", "size"), [pytest.param(e, size, id=f"{name}-{size}") for name, e in ENTRIES.items() for size in e.sizes]
)


def exact(updates: list[Update]) -> Aggregate:
    """The closed form: weights multiply parameters and buffers, and not the side channels."""
    weights = [update.weight for update in updates]

    def total(own: list[Tree], weights: list[float]) -> Tree:
        exact = [to_sum_dtype(tree) for tree in own]
        return {name: sum(w * tree[name] for w, tree in zip(weights, exact, strict=True)) for name in own[0]}

    return Aggregate(
        delta=total([update.delta for update in updates], weights),
        buffers=total([update.buffers for update in updates], weights),
        weight=sum(weights),
        aux={name: total([update.aux[name] for update in updates], [1.0] * len(updates)) for name in updates[0].aux},
        num_clients=len(updates),
        population=len(updates),
    )


def stack(updates: list[Update]) -> Update:
    """The updates of a client group: each tensor stacked over the clients."""

    def of(*own: Tree) -> Tree:
        return {name: torch.stack([tree[name] for tree in own]) for name in own[0]}

    aux = {name: of(*(update.aux[name] for update in updates)) for name in updates[0].aux}
    return Update(of(*(u.delta for u in updates)), of(*(u.buffers for u in updates)), aux=aux)


def test_every_shipped_aggregator_is_under_contract() -> None:
    found = shipped(Aggregator, "lightning_fl.aggregation", "lightning_fl.privacy")
    assert {entry.kind for entry in ENTRIES.values()} == found


@every_aggregator
def test_the_sums_have_their_closed_form(entry: Entry) -> None:
    updates = random_updates(NUM_CLIENTS)
    entry.assert_close(entry.aggregate(updates), entry.exact(updates))


@every_weighted_aggregator
def test_the_mean_of_three_numbers(entry: Entry) -> None:
    values = ((1.0, 2.0), (3.0, 4.0), (10.0, -1.0))
    updates = [
        Update({"w": torch.tensor(value, dtype=torch.float64)}, weight=weight)
        for value, weight in zip(values, (1.0, 3.0, 6.0), strict=True)
    ]
    mean = entry.aggregate(updates).mean()["w"]
    torch.testing.assert_close(mean, torch.tensor([7.0, 0.8], dtype=torch.float64), **entry.tolerance)


@every_aggregator
def test_the_order_of_clients_does_not_matter(entry: Entry) -> None:
    updates = random_updates(NUM_CLIENTS)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        entry.assert_close(entry.aggregate(updates, order), entry.exact(updates))


@every_aggregator
@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0, 4.0, 5.0], [2.0] * 5], ids=["unequal", "equal"])
def test_clients_added_as_a_group_are_those_added_one_by_one(entry: Entry, weights: list[float]) -> None:
    updates = [replace(u, weight=weight) for u, weight in zip(random_updates(NUM_CLIENTS), weights, strict=True)]
    aggregator, ctx = entry.make(), context(NUM_CLIENTS)
    acc = init(aggregator, updates[0], open_session(aggregator, LocalGroup(), NUM_CLIENTS, 5.0))
    if not aggregator.adds_groups:
        with pytest.raises(NotImplementedError):
            aggregator.add_group(acc, stack(updates), weights, ctx)
        return
    for part in (slice(3), slice(3, None)):
        acc = aggregator.add_group(acc, stack(updates[part]), weights[part], replace(ctx, clients=ctx.cohort[part]))
    acc, _ = aggregator.merge(acc, LocalGroup(), Message(), ctx)
    entry.assert_close(aggregator.result(acc, ctx), entry.exact(updates))


@every_aggregator_and_size
@pytest.mark.parametrize("num_clients", [7, 3])
@pytest.mark.spread(30)
def test_ranks_add_up_what_one_rank_does(entry: Entry, size: int, num_clients: int) -> None:
    """Clients are dealt to the ranks in turn; with more ranks than clients some have none."""
    updates = random_updates(num_clients)
    ranks = run_threads(size, lambda group: entry.aggregate(updates, range(group.rank, num_clients, size), group))
    for found in ranks:
        entry.assert_close(found, entry.exact(updates))
        torch.testing.assert_close(trees(found), trees(ranks[0]), rtol=0, atol=0)


@every_aggregator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_names_shapes_and_dtypes_are_kept(entry: Entry, dtype: torch.dtype) -> None:
    """Half-precision tensors are summed in float32; integer buffers in float64, without rounding."""
    updates = random_updates(NUM_CLIENTS, dtype)
    found = entry.aggregate(updates)
    assert Layout.of(trees(found)) == Layout.of(trees(updates[0]))
    assert found.delta["a"].dtype == found.buffers["mean"].dtype == sum_dtype(dtype)
    assert found.delta["b"].dtype == torch.float32
    assert found.buffers["count"].dtype == torch.float64
    expected = entry.exact(updates).buffers["count"]
    torch.testing.assert_close(found.buffers["count"], expected, rtol=0, atol=0 if entry.weighs else 1e-9)


@every_aggregator
def test_updates_stay_as_they_are(entry: Entry) -> None:
    updates, copies = random_updates(NUM_CLIENTS), random_updates(NUM_CLIENTS)
    entry.aggregate(updates)
    for own, before in zip(updates, copies, strict=True):
        assert own.weight == before.weight
        torch.testing.assert_close(trees(own), trees(before), rtol=0, atol=0)


@every_aggregator
def test_side_channels_are_not_weighted(entry: Entry) -> None:
    light, heavy = random_updates(3), [replace(update, weight=5.0) for update in random_updates(3)]
    for updates in (light, heavy):
        torch.testing.assert_close(
            entry.aggregate(updates).aux["control"], entry.exact(light).aux["control"], **entry.tolerance
        )


@every_weighted_aggregator
def test_a_client_that_weighs_nothing_changes_nothing(entry: Entry) -> None:
    updates = random_updates(4)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in updates[0].aux["control"].items()}
    found = entry.aggregate([*updates, replace(updates[0], weight=0.0, aux={"control": zeros})])
    entry.assert_close(found, replace(entry.exact(updates), num_clients=5, population=5))


@every_rule
def test_what_a_client_claims_to_weigh_changes_nothing(entry: Entry) -> None:
    updates = random_updates(NUM_CLIENTS)
    for claim in (0.0, 1e6, float("nan")):
        entry.assert_close(entry.aggregate([*updates[:4], replace(updates[4], weight=claim)]), entry.exact(updates))


def test_yaml_gives_pre_aggregators_too() -> None:
    before = [{"class_path": "NearestNeighborMixing"}, {"class_path": "Bucketing", "init_args": {"size": 3}}]
    found = from_yaml(Aggregator, "TrimmedMean", {"num_attackers": 1, "before": before})
    assert found == TrimmedMean(1, [NearestNeighborMixing(), Bucketing(3)])


@every_rule
@pytest.mark.parametrize("part", ["delta", "buffers", "aux"])
def test_it_moves_by_less_than_the_attacker_wishes(entry: Entry, part: str) -> None:
    """The last client sends a part of its update a million times as large, to a bounded effect."""
    updates = random_updates(7)
    assert isinstance(entry.make(), RowAggregator)
    huge = updates[6].map(lambda tensor: 1_000_000 * tensor)
    found = trees(entry.aggregate([*updates[:6], replace(updates[6], **{part: getattr(huge, part)})]))
    # Bulyan is asked to withstand nobody here, and FoolsGold bounds no length; buffers are medians all the same.
    if part == "buffers" or entry.kind not in (Bulyan, FoolsGold):
        largest = max(tensor.abs().max().item() for tree in found.values() for tensor in tree.values())
        assert 0 < largest / 7 < 30


@every_weighted_aggregator
def test_weights_that_add_up_to_nothing_are_refused(entry: Entry) -> None:
    updates = [replace(update, weight=0.0) for update in random_updates(3)]
    with pytest.raises(ValueError, match=r"weights of round 3 add up to 0.* over 3 updates; .*weighting='uniform'"):
        entry.aggregate(updates)


@every_weighted_aggregator
def test_a_weight_that_is_no_number_is_refused(entry: Entry) -> None:
    updates = random_updates(3)
    with pytest.raises(ValueError, match=r"nan.*weighting='uniform'"):
        entry.aggregate([*updates[:2], replace(updates[2], weight=float("nan"))])


@every_aggregator
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Update({"w": torch.zeros(3)}), r"delta 'w' has shape \(3,\), expected \(1,\)"),
        (Update({"v": torch.zeros(1)}), r"delta 'w' has shape none \(missing\)"),
        (Update({"w": torch.zeros(1)}, {"mean": torch.zeros(1)}), r"buffers 'mean' .* expected no such tensor"),
        (Update({"w": torch.zeros(1)}, aux={"c": {"w": torch.zeros(1)}}), r"aux/c 'w' .*Algorithm\.aux_like"),
    ],
    ids=["shape", "name", "buffer", "side channel"],
)
def test_an_update_of_another_form_is_refused(entry: Entry, wrong: Update, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entry.aggregate([Update({"w": torch.zeros(1)}), wrong, wrong])


@every_aggregator_and_size
@pytest.mark.spread(20)
def test_reports_of_all_ranks_come_back(entry: Entry, size: int) -> None:
    """In the order of ranks, with fields and tensors; of ``sums`` the whole only, where reports are hidden."""
    updates = random_updates(NUM_CLIENTS)

    def exchange(group: Group) -> tuple[list[Message], list[Message]]:
        aggregator, fields = entry.make(), {"who": f"rank {group.rank}", "sums": {"loss": 0.5 + group.rank}}
        own = Message(fields, {"bins": torch.arange(3.0) + group.rank})
        before = copy.deepcopy(own)
        _, in_round = aggregate(aggregator, updates, range(group.rank, NUM_CLIENTS, size), group, own)
        assert own.fields == before.fields
        session = open_session(aggregator, group, NUM_CLIENTS, 5.0)
        if size >= entry.min_ranks_to_gather:
            return in_round, gather(aggregator, session, group, own)
        with pytest.raises(RuntimeError, match=f"needs {entry.min_ranks_to_gather}"):
            gather(aggregator, session, group, own)
        return in_round, in_round

    for in_round, outside in run_threads(size, exchange):
        for reports in (in_round, outside):
            assert [report.fields["who"] for report in reports] == [f"rank {rank}" for rank in range(size)]
            assert [report.tensors["bins"][0] for report in reports] == list(range(size))
            losses = [report.fields["sums"]["loss"] for report in reports if "sums" in report.fields]
            expected = [0.5 + rank for rank in range(size)]
            assert losses == ([sum(expected)] if entry.kind.hides_reports else expected)
        assert sum(report.fields["num_clients"] for report in in_round) == NUM_CLIENTS
        assert sum(report.fields["weight"] for report in in_round) == (15.0 if entry.weighs else NUM_CLIENTS)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.sizes != (1,)])
def test_a_merge_that_is_tried_again_gives_the_same(name: str) -> None:
    """A failed all-reduce is tried again: the ranks' own sums must survive whatever is done with the first result."""
    entry, updates = ENTRIES[name], random_updates(4)

    def merge_twice(group: Group) -> list[Aggregate]:
        aggregator, ctx = entry.make(), context(4)
        acc = init(aggregator, updates[0], open_session(aggregator, group, 4, 4.0))
        for client in (2 * group.rank, 2 * group.rank + 1):
            acc = aggregator.add(acc, updates[client], replace(ctx, client=ctx.cohort[client]))
        found = []
        for _ in range(2):
            merged, _ = aggregator.merge(acc, group, Message(), ctx)
            found.append(copy.deepcopy(aggregator.result(merged, ctx)))
            aggregator.result(merged, ctx).delta["a"].zero_()
        return found

    for first, again in run_threads(2, merge_twice):
        entry.assert_close(first, entry.exact(updates))
        torch.testing.assert_close(trees(again), trees(first), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.kind.is_sum])
def test_one_client_moves_a_sum_by_its_weight_times_its_update(name: str) -> None:
    check_one_client_moves_it_by_its_weight_times_its_update(ENTRIES[name])


def check_one_client_moves_it_by_its_weight_times_its_update(entry: Entry) -> None:
    updates = random_updates(4)
    with_last, without = entry.aggregate(updates), entry.aggregate(updates[:3])
    for name, delta in updates[3].delta.items():
        moved = with_last.delta[name] - without.delta[name]
        torch.testing.assert_close(moved, updates[3].weight * delta, rtol=1e-5, atol=1e-6)


@every_aggregator
def test_privacy_that_needs_a_sum_stands_beside_a_sum_only(entry: Entry) -> None:
    private = ClientLevelDP(clip=1.0, noise_multiplier=1.0)
    if entry.kind.is_sum:
        assert FederatedStrategy("fedavg", aggregator=entry.make(), transforms=[private]).weighting == "uniform"
        return
    with pytest.raises(ValueError, match=f"{entry.kind.__name__} is not a sum"):
        FederatedStrategy("fedavg", aggregator=entry.make(), transforms=[private])


@every_aggregator
def test_it_pickles_before_and_after_a_round(entry: Entry) -> None:
    updates, aggregator = random_updates(NUM_CLIENTS), entry.make()
    for copied in (pickle.loads(pickle.dumps(aggregator)), pickle.loads(pickle.dumps(used(aggregator, updates)))):
        entry.assert_close(aggregate(copied, updates)[0], entry.exact(updates))


def used(aggregator: Aggregator, updates: list[Update]) -> Aggregator:
    aggregate(aggregator, updates)
    return aggregator


@every_aggregator
def test_yaml_gives_it_by_its_short_class_name(entry: Entry) -> None:
    updates, found = random_updates(NUM_CLIENTS), from_yaml(Aggregator, entry.kind.__name__, entry.init_args)
    assert type(found) is entry.kind
    if type(found).__repr__ is not object.__repr__:
        assert repr(found) == repr(entry.make())
    entry.assert_close(aggregate(found, updates)[0], entry.exact(updates))


# ---- aggregators that break their contract, so that each property is known to find something


class WeightsSideChannels(WeightedMean):
    def add(self, acc: Any, update: Update, ctx: RoundContext) -> Any:
        control = {name: update.weight * tensor for name, tensor in update.aux["control"].items()}
        return super().add(acc, replace(update, aux={"control": control}), ctx)


class ForgetsWeights(WeightedMean):
    def add(self, acc: Any, update: Update, ctx: RoundContext) -> Any:
        return super().add(acc, replace(update, weight=1.0), ctx)


class FirstCountsTwice(WeightedMean):
    def add(self, acc: Any, update: Update, ctx: RoundContext) -> Any:
        doubled = {name: tensor * (2 - bool(acc.num_clients)) for name, tensor in update.delta.items()}
        return super().add(acc, replace(update, delta=doubled), ctx)


class GroupsWeighAlike(WeightedMean):
    def add_group(self, acc: Any, updates: Update, weights: Any, ctx: RoundContext) -> Any:
        return super().add_group(acc, updates, [sum(weights) / len(weights)] * len(weights), ctx)


class KeepsToItself(WeightedMean):
    def merge(self, acc: Any, group: Group, report: Message, ctx: RoundContext) -> Any:
        merged, reports = super().merge(acc, group, report, ctx)
        return replace(merged, sums=acc.sums, views=acc.views), reports


class HalfPrecision(WeightedMean):
    def result(self, acc: Any, ctx: RoundContext) -> Aggregate:
        total = super().result(acc, ctx)
        return replace(total, delta={name: tensor.bfloat16() for name, tensor in total.delta.items()})


class ScalesInPlace(WeightedMean):
    def add(self, acc: Any, update: Update, ctx: RoundContext) -> Any:
        update.delta["a"].mul_(update.weight)
        return super().add(acc, update, ctx)


class DividesByWhatItGets(WeightedMean):
    def result(self, acc: Any, ctx: RoundContext) -> Aggregate:
        return super().result(replace(acc, weight=acc.weight or 1.0), ctx)


class OwnReportOnly(WeightedMean):
    def merge(self, acc: Any, group: Group, report: Message, ctx: RoundContext) -> Any:
        merged, reports = super().merge(acc, group, report, ctx)
        return merged, [reports[group.rank]] * group.size


class SquaresUpdates(WeightedMean):
    def add(self, acc: Any, update: Update, ctx: RoundContext) -> Any:
        squared = {name: tensor * tensor.abs() for name, tensor in update.delta.items()}
        return super().add(acc, replace(update, delta=squared), ctx)


Property = Callable[..., None]


@pytest.mark.parametrize(
    ("broken", "check", "arguments"),
    [
        (WeightsSideChannels, test_side_channels_are_not_weighted, ()),
        (ForgetsWeights, test_the_mean_of_three_numbers, ()),
        (ForgetsWeights, test_the_sums_have_their_closed_form, ()),
        (FirstCountsTwice, test_the_order_of_clients_does_not_matter, ()),
        (GroupsWeighAlike, test_clients_added_as_a_group_are_those_added_one_by_one, ([1.0, 2.0, 3.0, 4.0, 5.0],)),
        (KeepsToItself, test_ranks_add_up_what_one_rank_does, (2, 7)),
        (HalfPrecision, test_names_shapes_and_dtypes_are_kept, (torch.float32,)),
        (ScalesInPlace, test_updates_stay_as_they_are, ()),
        (OwnReportOnly, test_reports_of_all_ranks_come_back, (2,)),
        (SquaresUpdates, check_one_client_moves_it_by_its_weight_times_its_update, ()),
    ],
)
def test_a_breach_is_found(broken: type[Aggregator], check: Property, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(AssertionError):
        check(Entry(broken), *arguments)


def test_a_mean_of_nothing_is_found() -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_weights_that_add_up_to_nothing_are_refused(Entry(DividesByWhatItGets))
