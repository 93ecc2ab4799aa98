"""Every transform through every property: a new transform is one entry in ``ENTRIES``."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fl import FederatedStrategy
from lightning_fl.aggregation import Compress, LowRank, PowerSGD, RandomK, RoundContext, TopK, Transform, WeightedMean
from lightning_fl.clients import Sampling
from lightning_fl.communication import Group, LocalGroup, Message
from lightning_fl.privacy import AdaptiveClip, BandMF, ClientLevelDP, SecureAggregation
from lightning_fl.privacy.client_level.clipping import joint_norm
from lightning_fl.tree import Layout, add, is_finite, leaves, scale, subtract, to_sum_dtype, tree_map, zeros_like
from lightning_fl.types import Aggregate, State, Tree, Update
from tests.contract.helpers import from_yaml, init, open_session, run_threads, shipped, trees
from tests.helpers.federation import random_updates
from tests.helpers.training import minimise

NUM_CLIENTS = 4
pytestmark = [
    pytest.mark.filterwarnings("ignore:insecure_test_seed makes the noise predictable"),
    pytest.mark.filterwarnings("ignore:Under ClientLevelDP buffers"),
]


class Lengthens(Transform):
    """A neighbour that makes updates longer."""

    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        return replace(update, delta=scale(update.delta, 2.0)), state


class KeepsNorm(Transform):
    """A neighbour that promises not to."""

    keeps_norm_bound = True


class NoSum(WeightedMean):
    """An aggregator that is not a sum."""

    is_sum = False


class Rounds(Transform):
    """Error feedback, an example with client state: sends whole numbers and keeps the rest for the next round."""

    keeps_client_state = True
    is_lossy = True

    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        exact = add(update.delta, state["rest"]) if state else update.delta
        sent = tree_map(torch.round, exact)
        return replace(update, delta=sent), {"rest": subtract(exact, sent)}


@dataclass(frozen=True)
class Entry:
    """A transform under contract.

    Args:
        kind: The transform.
        init_args: Its arguments, as YAML gives them; what is random has a seed, so that runs repeat.
        neutral: Arguments under which it changes nothing; None if there are none.
        beside: What a strategy may hold beside it; ``transforms`` come after it, and any may come before.
        refuses: What a strategy may not hold beside it, each with the pattern of the message.
    """

    kind: type[Transform]
    init_args: dict[str, Any] = field(default_factory=dict)
    neutral: dict[str, Any] | None = None
    beside: dict[str, Any] = field(default_factory=dict)
    refuses: Sequence[tuple[dict[str, Any], str]] = ()

    def make(self) -> Transform:
        return self.kind(**self.init_args)

    def strategy(
        self, transforms: Sequence[Transform] = (), before: Sequence[Transform] = (), **options: Any
    ) -> FederatedStrategy:
        return FederatedStrategy(**{"algorithm": "fedavg", **options}, transforms=[*before, self.make(), *transforms])

    def updates(self, dtype: torch.dtype = torch.float64) -> list[Update]:
        """Updates of the weights that it asks for, in the dtypes in which clients send them: integers as float64."""
        weigh_alike = self.kind.weighting == "uniform"
        return [
            Update(
                to_sum_dtype(update.delta),
                to_sum_dtype(update.buffers),
                1.0 if weigh_alike else update.weight,
                {name: to_sum_dtype(tree) for name, tree in update.aux.items()},
            )
            for update in random_updates(NUM_CLIENTS, dtype)
        ]


PRIVATE = {"clip": 1.0, "noise_multiplier": 1.0, "insecure_test_seed": 7}
ADAPTIVE = AdaptiveClip(initial=2.0, bit_noise=1.0)
TOP = TopK(0.25)
SAME = RandomK(0.25)
TURNS = BandMF(1)
IN_YAML: dict[Any, Any] = {
    ADAPTIVE: {"class_path": "AdaptiveClip", "init_args": {"initial": 2.0, "bit_noise": 1.0}},
    TURNS: {"class_path": "BandMF", "init_args": {"bands": 1}},
    TOP: {"class_path": "TopK", "init_args": {"share": 0.25}},
    SAME: {"class_path": "RandomK", "init_args": {"share": 0.25}},
}
NEUTRAL = {"clip": 1e6, "noise_multiplier": 0.0}
OF_PRIVACY: dict[str, Any] = {
    "beside": {"transforms": [KeepsNorm()]},
    "refuses": [
        ({"weighting": "examples"}, "weighting='examples' lets one client weigh more.*Leave weighting out"),
        ({"transforms": [Lengthens()]}, r"Lengthens comes after ClientLevelDP and may .*Put ClientLevelDP last"),
        ({"transforms": [ClientLevelDP(1.0, 1.0)]}, "ClientLevelDP comes after ClientLevelDP"),
        *(({"algorithm": name}, "uses them as a divisor") for name in ("qfedavg", "term", "afl", "ifca")),
        ({"algorithm": "fednova"}, "uses them as a factor"),
        ({"aggregator": NoSum()}, r"NoSum is not a sum\. Use fl\.aggregation\.WeightedMean\(\)"),
    ],
}
SECURE = [({"aggregator": SecureAggregation()}, "TopK sends a selection or scale that differs.* Use RandomK")]
ENTRIES = {
    "identity": Entry(Transform, neutral={}, beside={"transforms": [Lengthens()], "aggregator": NoSum()}),
    "error feedback": Entry(Rounds),
    "compression": Entry(Compress, {"compressor": TOP}, beside={"aggregator": NoSum()}, refuses=SECURE),
    "compression without feedback": Entry(Compress, {"compressor": TOP, "error_feedback": False}, refuses=SECURE),
    "random coordinates": Entry(Compress, {"compressor": SAME}, beside={"aggregator": NoSum()}),
    "powersgd": Entry(PowerSGD, {"rank": 1}, beside={"aggregator": NoSum()}),
    "low rank": Entry(LowRank, {"rank": 1}, beside={"aggregator": NoSum()}),
    "dp": Entry(ClientLevelDP, PRIVATE, NEUTRAL, **OF_PRIVACY),
    "dp-adaptive": Entry(ClientLevelDP, {**PRIVATE, "clip": ADAPTIVE}, **OF_PRIVACY),
    "dp-turns": Entry(ClientLevelDP, {**PRIVATE, "mechanism": TURNS}, {**NEUTRAL, "mechanism": TURNS}, **OF_PRIVACY),
    "dp-local": Entry(ClientLevelDP, {**PRIVATE, "mode": "local"}, {**NEUTRAL, "mode": "local"}, **OF_PRIVACY),
}
every_transform = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


@dataclass
class Federation:
    """Rounds of one transform around the weighted mean; a rank trains every ``size``-th client.

    Args:
        transform: The transform.
        updates: What the clients send in each round.
        group: The ranks.
        server: The state of its server half.
        clients: The state of its client half for each client of this rank.
        next_round: Number of the next round.
    """

    transform: Transform
    updates: list[Update]
    group: Group = field(default_factory=LocalGroup)
    server: State = field(default_factory=dict)
    clients: dict[int, State] = field(default_factory=dict)
    next_round: int = 0

    def context(self, **changes: Any) -> RoundContext:
        size = len(self.updates)
        sampling = Sampling("full", size, size, 1.0)
        template = self.updates[0]
        return RoundContext(
            self.next_round, range(size), size, sampling, group=self.group, template=template, **changes
        )

    def send(self, client: int) -> Update:
        """What the client half makes of a client's update."""
        generator = torch.Generator().manual_seed(100 * self.next_round + client)
        ctx = self.context(client=client, generator=generator, server=self.server)
        sent, self.clients[client] = self.transform.client(self.updates[client], self.clients.get(client, {}), ctx)
        return sent

    def round(self) -> Aggregate:
        """What the server half gives."""
        ctx, aggregator = self.context(), WeightedMean()
        self.server = self.transform.start_round(self.server, ctx)
        like = self.transform.like(self.updates[0])
        acc = init(aggregator, like, open_session(aggregator, self.group, len(self.updates), NUM_CLIENTS))
        for client in range(self.group.rank, len(self.updates), self.group.size):
            acc = aggregator.add(acc, self.send(client), ctx)
        acc, _ = aggregator.merge(acc, self.group, Message(), ctx)
        aggregate, self.server = self.transform.server(aggregator.result(acc, ctx), self.server, ctx)
        self.next_round += 1
        return aggregate


def assert_equal(found: Any, expected: Any) -> None:
    """The same bit for bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def tensors_only(state: State) -> bool:
    return all(isinstance(leaf, Tensor) and not leaf.requires_grad for leaf in leaves(state))


def test_every_shipped_transform_is_under_contract() -> None:
    found = shipped(Transform, "lightning_fl.aggregation", "lightning_fl.privacy")
    assert {entry.kind for entry in ENTRIES.values()} == {Transform, Rounds, *found}


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.neutral is not None])
def test_the_neutral_setting_changes_nothing(name: str) -> None:
    check_it_changes_nothing(replace(ENTRIES[name], init_args=ENTRIES[name].neutral))


def check_it_changes_nothing(entry: Entry) -> None:
    """Bit for bit, in both halves and over several rounds."""
    federation, plain = Federation(entry.make(), entry.updates()), Federation(Transform(), entry.updates())
    for _ in range(2):
        found, expected = federation.round(), plain.round()
        assert_equal(trees(found), trees(expected))
        assert (found.weight, found.num_clients, found.population) == (
            expected.weight,
            expected.num_clients,
            expected.population,
        )
        assert_equal(trees(federation.send(0)), trees(entry.updates()[0]))


@every_transform
def test_what_goes_in_stays_as_it_is(entry: Entry) -> None:
    """Updates, aggregates and states: a state is an argument and a result, never an attribute."""
    federation = Federation(entry.make(), entry.updates())
    federation.round()
    transform, ctx = federation.transform, federation.context()
    before, own = repr(transform), copy.deepcopy(vars(transform))
    given = copy.deepcopy(federation.server)
    state = transform.start_round(federation.server, ctx)
    assert_equal(federation.server, given)

    given = copy.deepcopy((federation.updates[1], federation.clients[1], state))
    ctx = replace(ctx, client=1, generator=torch.Generator(), server=state)
    sent, _ = transform.client(federation.updates[1], federation.clients[1], ctx)
    assert_equal(trees(federation.updates[1]), trees(given[0]))
    assert_equal([federation.clients[1], state], list(given[1:]))

    total = Aggregate(sent.delta, sent.buffers, 4.0, sent.aux, NUM_CLIENTS, NUM_CLIENTS)
    given = copy.deepcopy((total, state))
    transform.server(total, state, federation.context())
    assert_equal([trees(total), state], [trees(given[0]), given[1]])
    assert (repr(transform), vars(transform)) == (before, own)


@every_transform
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_keeps_names_shapes_and_dtypes(entry: Entry, dtype: torch.dtype) -> None:
    """``like`` has the form of what the client half returns; the server half returns the form of a plain aggregate."""
    federation, plain = Federation(entry.make(), entry.updates(dtype)), Federation(Transform(), entry.updates(dtype))
    found, expected = federation.round(), plain.round()
    sent = federation.send(0)
    assert Layout.of(trees(federation.transform.like(federation.updates[0]))) == Layout.of(trees(sent))
    assert sent.weight == federation.updates[0].weight
    for tree, tensors in trees(expected).items():
        assert {name: (t.shape, t.dtype) for name, t in trees(found)[tree].items()} == {
            name: (t.shape, t.dtype) for name, t in tensors.items()
        }
    assert trees(found).keys() == trees(expected).keys()


@every_transform
def test_states_are_trees_of_tensors(entry: Entry) -> None:
    federation = Federation(entry.make(), entry.updates())
    for _ in range(2):
        federation.round()
        assert tensors_only(federation.server)
        assert all(map(tensors_only, federation.clients.values()))
        assert any(federation.clients.values()) == entry.make().keeps_client_state


def through_a_file(states: Mapping[Any, Any]) -> Any:
    """States as a checkpoint holds them."""
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_transform
def test_it_goes_on_from_its_states_exactly(entry: Entry) -> None:
    whole = Federation(entry.make(), entry.updates())
    expected = [whole.round() for _ in range(4)]
    first = Federation(entry.make(), entry.updates())
    found = [first.round() for _ in range(2)]
    server, clients = through_a_file({"server": dict(first.server), "clients": first.clients}).values()
    second = Federation(entry.make(), entry.updates(), server=server, clients=clients, next_round=2)
    found += [second.round() for _ in range(2)]
    for own, other in zip(found, expected, strict=True):
        assert_equal(trees(own), trees(other))
        assert own.weight == other.weight
    assert_equal(dict(second.server), dict(whole.server))
    assert_equal(second.clients, whole.clients)


@every_transform
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.spread(8)
def test_ranks_do_what_one_rank_does(entry: Entry, size: int) -> None:
    alone = Federation(entry.make(), entry.updates())
    expected = [alone.round() for _ in range(3)]
    transforms = [entry.make() for _ in range(size)]

    def rounds(group: Group) -> tuple[list[Aggregate], Federation]:
        federation = Federation(transforms[group.rank], entry.updates(), group)
        return [federation.round() for _ in range(3)], federation

    ranks = run_threads(size, rounds)
    for found, federation in ranks:
        for own, other, of_first in zip(found, expected, ranks[0][0], strict=True):
            torch.testing.assert_close(trees(own), trees(other))
            assert_equal(trees(own), trees(of_first))
            assert (own.weight, own.num_clients) == (other.weight, other.num_clients)
        torch.testing.assert_close(dict(federation.server), dict(alone.server))
        assert_equal(dict(federation.server), dict(ranks[0][1].server))
        for client, state in federation.clients.items():
            torch.testing.assert_close(state, alone.clients[client])


@every_transform
def test_a_round_without_clients_gives_finite_numbers(entry: Entry) -> None:
    federation = Federation(entry.make(), entry.updates())
    ctx = replace(federation.context(), cohort=[], sampling=Sampling("poisson", NUM_CLIENTS, 1.0, 0.25))
    state = federation.transform.start_round({}, ctx)
    like = federation.transform.like(federation.updates[0])
    aux = {name: zeros_like(tree) for name, tree in like.aux.items()}
    nothing = Aggregate(zeros_like(like.delta), zeros_like(like.buffers), 0.0, aux, 0, NUM_CLIENTS)
    aggregate, state = federation.transform.server(nothing, state, ctx)
    assert is_finite(tensor for tree in trees(aggregate).values() for tensor in tree.values())
    assert aggregate.weight >= 0
    assert tensors_only(state)


@every_transform
def test_it_reports_numbers_and_words(entry: Entry) -> None:
    federation = Federation(entry.make(), entry.updates())
    federation.round()
    report = federation.transform.report(federation.server, federation.context())
    assert all(isinstance(key, str) and isinstance(value, float | str) for key, value in report.items())
    assert isinstance(federation.transform.stop_reason(federation.server, federation.context()), str | None)


@pytest.mark.parametrize(
    "entry",
    [
        Entry(KeepsNorm),
        ENTRIES["compression without feedback"],
        *(entry for entry in ENTRIES.values() if entry.kind.keeps_norm_bound is True),
    ],
)
def test_a_promise_to_keep_the_norm_is_kept(entry: Entry) -> None:
    """The client half lengthens no update, and the server half leaves the sum as it is."""
    federation = Federation(entry.make(), entry.updates())
    total = federation.round()
    for client, update in enumerate(federation.updates):
        sent = federation.send(client)
        assert joint_norm(trees(sent).values()) <= joint_norm(trees(update).values()) * (1 + 1e-9)
    again, _ = federation.transform.server(total, federation.server, federation.context())
    assert_equal(trees(again), trees(total))


# ---- beside others in a strategy


@every_transform
def test_its_demands_reach_the_strategy(entry: Entry) -> None:
    strategy = entry.strategy(before=[Lengthens()], **entry.beside)
    assert strategy.weighting == (entry.kind.weighting or "examples")
    assert strategy.participation.secure == entry.make().needs_secure_sampling


@pytest.mark.parametrize(
    ("entry", "options", "message"),
    [
        pytest.param(entry, options, message, id=f"{name}-{'-'.join(options)}-{number}")
        for name, entry in ENTRIES.items()
        for number, (options, message) in enumerate(entry.refuses)
    ],
)
def test_wrong_neighbours_are_refused_when_the_strategy_is_built(
    entry: Entry, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        entry.strategy(**options)


@every_transform
@pytest.mark.parametrize("algorithm", ["feddyn", "fedexp"])
def test_what_loses_or_scales_is_refused_where_the_change_must_arrive_as_it_was_sent(
    entry: Entry, algorithm: str
) -> None:
    check_lossy(entry)
    if not entry.kind.is_lossy:
        entry.strategy(algorithm=algorithm)
        return
    with pytest.raises(ValueError, match=f"right only if .* the very changes .* {entry.kind.__name__}"):
        entry.strategy(algorithm=algorithm)


def check_lossy(entry: Entry) -> None:
    """A transform that does not say so gives the server the sum of what clients have computed."""
    if not entry.kind.is_lossy:
        found, expected = (Federation(own, entry.updates()).round() for own in (entry.make(), Transform()))
        torch.testing.assert_close(found.delta, expected.delta)


class Affine(Transform):
    """``factor * delta + shift`` in both halves, which tells the order of several."""

    def __init__(self, factor: float, shift: float) -> None:
        self.factor, self.shift = factor, shift

    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        return replace(update, delta=self._map(update.delta)), state

    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        return replace(aggregate, delta=self._map(aggregate.delta)), state

    def _map(self, tree: Tree) -> Tree:
        return tree_map(lambda tensor: self.factor * tensor + self.shift, tree)


def test_client_halves_run_in_order_and_server_halves_in_reverse() -> None:
    """One step of the quadratics from 10: client i moves by -0.1 h_i (10 - e_i), so by -1, -1.8 and -0.3."""
    strategy = FederatedStrategy("fedavg", local_steps=1, transforms=[Affine(2.0, 0.0), Affine(1.0, 3.0)])
    sent = [weight * (2 * delta + 3) for delta, weight in ((-1.0, 1.0), (-1.8, 2.0), (-0.3, 1.0))]
    expected = 10 + 2 * (sum(sent) + 3) / 4
    assert minimise(strategy, 1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.neutral is not None])
def test_a_run_with_the_neutral_setting_is_one_without(name: str) -> None:
    neutral = replace(ENTRIES[name], init_args=ENTRIES[name].neutral)
    found = minimise(neutral.strategy(local_steps=3), 3)
    expected = minimise(FederatedStrategy("fedavg", local_steps=3, weighting=neutral.strategy().weighting), 3)
    assert found == pytest.approx(expected, rel=1e-12)


# ---- how it travels


@every_transform
def test_it_pickles(entry: Entry) -> None:
    transform = entry.make()
    copied = pickle.loads(pickle.dumps(transform))
    assert_equal(
        trees(Federation(copied, entry.updates()).round()), trees(Federation(transform, entry.updates()).round())
    )


@every_transform
def test_yaml_gives_it_by_its_short_class_name(entry: Entry) -> None:
    init_args = {name: IN_YAML.get(value, value) for name, value in entry.init_args.items()}
    found = from_yaml(Transform, entry.kind.__name__, init_args)
    assert type(found) is entry.kind
    assert vars(found) == vars(entry.make())


# ---- transforms that break their contract, so that each property is known to find something


class Shrinks(Transform):
    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        return replace(aggregate, delta=scale(aggregate.delta, 1 - 1e-12)), state


class ScalesInPlace(Transform):
    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        update.delta["a"].mul_(2.0)
        return update, state


class CountsOnItself(Transform):
    """Keeps its state where no checkpoint finds it."""

    num_rounds = 0

    def start_round(self, state: State, ctx: RoundContext) -> State:
        self.num_rounds += 1
        return state

    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        return replace(aggregate, delta=scale(aggregate.delta, 1.0 / self.num_rounds)), state


class CountsInPlace(Transform):
    def start_round(self, state: State, ctx: RoundContext) -> State:
        rounds = state.get("rounds", torch.tensor(0))
        return {"rounds": rounds.add_(1)}


class HalvesPrecision(Transform):
    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        return replace(update, delta=tree_map(torch.Tensor.bfloat16, update.delta)), state


class LeavesItsChannel(Transform):
    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        return replace(aggregate, aux={**aggregate.aux, "own": aggregate.delta}), state


class KeepsNumbers(Transform):
    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        return aggregate, {"round": ctx.round}


class KeepsClientsQuietly(Transform):
    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        return update, {"residual": update.delta}


class DrawsOnEachRank(Transform):
    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        return replace(aggregate, delta=scale(aggregate.delta, 1.0 + ctx.group.rank)), state


class Divides(Transform):
    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        return replace(aggregate, delta=tree_map(lambda t: t / aggregate.weight, aggregate.delta), weight=1.0), state


class BreaksItsPromise(Lengthens):
    keeps_norm_bound = True


class NotesTensors(Transform):
    def report(self, state: State, ctx: RoundContext) -> Any:
        return {"norm": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("broken", "check", "arguments"),
    [
        (Shrinks, check_it_changes_nothing, ()),
        (ScalesInPlace, test_what_goes_in_stays_as_it_is, ()),
        (CountsOnItself, test_what_goes_in_stays_as_it_is, ()),
        (CountsOnItself, test_it_goes_on_from_its_states_exactly, ()),
        (CountsInPlace, test_what_goes_in_stays_as_it_is, ()),
        (HalvesPrecision, test_it_keeps_names_shapes_and_dtypes, (torch.float64,)),
        (LeavesItsChannel, test_it_keeps_names_shapes_and_dtypes, (torch.float64,)),
        (KeepsNumbers, test_states_are_trees_of_tensors, ()),
        (KeepsClientsQuietly, test_states_are_trees_of_tensors, ()),
        (DrawsOnEachRank, test_ranks_do_what_one_rank_does, (2,)),
        (Divides, test_a_round_without_clients_gives_finite_numbers, ()),
        (BreaksItsPromise, test_a_promise_to_keep_the_norm_is_kept, ()),
        (NotesTensors, test_it_reports_numbers_and_words, ()),
        (Lengthens, check_lossy, ()),
    ],
)
def test_a_breach_is_found(broken: type[Transform], check: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with pytest.raises((AssertionError, ZeroDivisionError)):
        check(Entry(broken), *arguments)
