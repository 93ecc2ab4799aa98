"""Correlated noise without Lightning: its covariance, what it costs, what breaks its sequence, who may take part."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from lightning_fl.aggregation import RoundContext
from lightning_fl.clients import RoundRobin, Sampling, Uniform
from lightning_fl.clients.cohorts import describe_sampling
from lightning_fl.privacy import (
    AdaptiveClip,
    BandMF,
    ClientLevelDP,
    FixedSize,
    Full,
    Gaussian,
    Ledger,
    Poisson,
    PrivacyBudgetExceeded,
    PrivacyError,
    noise_multiplier_for,
)
from lightning_fl.privacy.state import load_ledger
from lightning_fl.types import Aggregate, State, Update

pytestmark = pytest.mark.filterwarnings("ignore:insecure_test_seed")
NUM_CLIENTS, PER_ROUND = 12, 3
TURNS = describe_sampling(RoundRobin(), NUM_CLIENTS, PER_ROUND)


def private(**options: Any) -> ClientLevelDP:
    return ClientLevelDP(
        **{"clip": 0.5, "noise_multiplier": 2.0, "mechanism": BandMF(4), "insecure_test_seed": 3, **options}
    )


def context(round: int, sampling: Sampling | None = TURNS, **changes: Any) -> RoundContext:
    cohort = RoundRobin().draw(TURNS, round, np.random.default_rng(0), None).tolist()
    facts: dict[str, Any] = {"cohort": cohort, "population": NUM_CLIENTS, "sampling": sampling, **changes}
    return RoundContext(round, **facts)


def run(
    transform: ClientLevelDP, rounds: range, state: State | None = None, size: int = 4000, **changes: Any
) -> tuple[Tensor, State]:
    """Rounds without updates; gives what each released, [rounds, size], and the last state."""
    released, state = [], state or {}
    for number in rounds:
        ctx = context(number, **changes)
        state = transform.start_round(state, ctx)
        zeros = Aggregate({"w": torch.zeros(size)}, {}, 0.0, {}, 3, NUM_CLIENTS)
        aggregate, state = transform.server(zeros, state, ctx)
        released.append(aggregate.delta["w"].double())
    return torch.stack(released), state


def toeplitz(bands: int, rounds: int) -> np.ndarray:
    matrix = np.zeros((rounds, rounds))
    for j, c in enumerate(BandMF(bands).coefficients[:rounds]):
        matrix += c * np.eye(rounds, k=-j)
    return matrix


def recorded(count: int, noise_multiplier: float = 2.0, **options: Any) -> Ledger:
    wanted = Ledger()
    wanted.record(Gaussian(noise_multiplier, **options), count)
    return wanted


def deviations(noise: Tensor, bands: int, std: float) -> float:
    """The largest distance of a covariance from that of the mechanism, in standard errors."""
    inverse = np.linalg.inv(toeplitz(bands, len(noise)))
    expected = (std * BandMF(bands).norm) ** 2 * inverse @ inverse.T
    found = (noise @ noise.T / noise.shape[1]).numpy()
    variances = np.diag(expected)
    return float((np.abs(found - expected) / np.sqrt((np.outer(variances, variances) + expected**2) / 4000)).max())


@pytest.mark.parametrize("bands", [1, 2, 4])
def test_the_covariance_of_the_noise_is_that_of_the_inverse(bands: int) -> None:
    noise, _ = run(private(mechanism=BandMF(bands)), range(9))
    assert deviations(noise, bands, 1.0) < 4
    for other in {1, 2, 4} - {bands}:
        assert deviations(noise, other, 1.0) > 20  # the control
    # The noise of each round is not repeated by a linear map of those before: what is new in it has the full deviation.
    fresh = torch.from_numpy(toeplitz(bands, 9)) @ noise
    assert float((fresh.std(1) / BandMF(bands).norm - 1).abs().max()) < 4 / (2 * 4000) ** 0.5


def test_one_band_is_independent_noise_to_the_last_bit() -> None:
    everyone = Sampling("full", NUM_CLIENTS, NUM_CLIENTS, 1.0)
    for sampling, event in (
        (everyone, Full()),
        (Sampling("fixed", 12, 3, 0.25), FixedSize(3, 12)),
        (Sampling("poisson", 12, 3.0, 0.25), Poisson(0.25)),
    ):
        plain, other = run(private(mechanism=None), range(4), sampling=sampling)
        found, state = run(private(mechanism=BandMF(1)), range(4), sampling=sampling)
        assert torch.equal(found, plain)
        assert load_ledger(state) == load_ledger(other) == recorded(4, sampling=event, adversary="model")
    assert BandMF(1).error(7) == pytest.approx(2.0)  # the root of (n + 1) / 2


def test_known_coefficients_and_errors() -> None:
    assert BandMF(4).coefficients == pytest.approx((1, 1 / 2, 3 / 8, 5 / 16))
    prefix = np.tril(np.ones((60, 60)))
    assert np.allclose(toeplitz(60, 60) @ toeplitz(60, 60), prefix)  # without a cut it is the square root
    for bands in (1, 2, 7, 60):
        product = prefix @ np.linalg.inv(toeplitz(bands, 60))
        expected = BandMF(bands).norm * np.linalg.norm(product) / 60**0.5
        assert BandMF(bands).error(60) == pytest.approx(expected, rel=1e-12)


def test_the_noise_of_the_model_is_less_at_equal_epsilon() -> None:
    """100 rounds in which each client takes part 10 times: the figures of docs/privacy.md."""
    errors = {bands: BandMF(bands).error(100) for bands in (1, 2, 5, 10)}
    assert errors == pytest.approx({1: 7.106, 2: 5.349, 5: 3.788, 10: 3.039}, abs=1e-3)
    turns: dict[str, Any] = {"sampling": replace(TURNS, separation=10), "cohort": []}
    released, state = run(private(mechanism=BandMF(10), noise_multiplier=1.0), range(100), size=2000, **turns)
    plain, _ = run(private(mechanism=None, noise_multiplier=1.0), range(100), size=2000, **turns)
    for noise, bands in ((released, 10), (plain, 1)):
        assert float(noise.cumsum(0).square().mean().sqrt()) == pytest.approx(0.5 * errors[bands], rel=0.05)
    assert load_ledger(state) == recorded(10, 1.0)
    assert noise_multiplier_for(8.0, 1e-5, 10) == pytest.approx(1.8981, abs=1e-3)


def test_no_pattern_of_rounds_costs_more_than_is_booked() -> None:
    """Brute force over who takes part when, with the worst signs of the contributions."""
    rounds = 8
    for bands, separation in ((1, 1), (2, 2), (2, 3), (3, 3), (4, 4)):
        moves = toeplitz(bands, rounds) / BandMF(bands).norm

        def cost(taken: tuple[int, ...], moves: np.ndarray = moves) -> float:
            signs = itertools.product((-1.0, 1.0), repeat=len(taken))
            return max(float(((moves[:, taken] @ np.array(sign)) ** 2).sum()) for sign in signs)

        patterns = [p for k in range(rounds + 1) for p in itertools.combinations(range(rounds), k)]
        allowed = [p for p in patterns if all(b - a >= separation for a, b in itertools.pairwise(p))]
        booked = -(-rounds // separation)
        assert max(map(cost, allowed)) <= booked + 1e-12
        if bands > 1:  # the control: one that returns a round too early
            early = (0, bands - 1)
            assert cost(early) > 2.1


def proven(between: int, transform: ClientLevelDP, num_canaries: int = 40_000) -> float:
    """The separation that the best attack shows if each client pushes a coordinate of its own in two rounds, or not."""
    coins = torch.randint(2, (num_canaries,), generator=torch.Generator().manual_seed(0)).double()
    pushes, released, state = torch.zeros(between + 4, dtype=torch.float64), [], {}
    pushes[[0, between]] = 0.5
    for number, push in enumerate(pushes):
        ctx = context(number, cohort=[])
        state = transform.start_round(state, ctx)
        total, state = transform.server(Aggregate({"w": push * coins}, {}, 0.0, {}, 3, NUM_CLIENTS), state, ctx)
        released.append(total.delta["w"])
    matrix = torch.from_numpy(toeplitz(4, len(pushes)))
    direction = matrix @ pushes
    guesses = (direction @ (matrix @ torch.stack(released)) / direction.square().sum() > 0.5).double()
    errors = [float((guesses != coin)[coins == coin].double().mean()) for coin in (0.0, 1.0)]
    return float(sum(norm.isf(error) for error in errors))


def test_the_best_attack_proves_what_is_claimed_and_no_more() -> None:
    """White box: the attacker undoes the correlation and looks along the canary's own columns."""
    transform = private(noise_multiplier=1.5)
    claimed = 2**0.5 / 1.5
    standard_error = 0.03
    assert claimed - 3 * standard_error < proven(4, transform) < claimed + 3 * standard_error
    # The control: one that returns too early shows more.
    assert proven(1, transform) > claimed + 6 * standard_error


@pytest.mark.parametrize("rounds", [1, 3, 4, 5, 8, 9])
def test_a_client_pays_for_the_rounds_in_which_it_may_take_part(rounds: int) -> None:
    assert TURNS.separation == 4
    _, state = run(private(), range(rounds))
    assert load_ledger(state) == recorded(-(-rounds // 4))


def test_what_breaks_the_sequence_starts_anew() -> None:
    of_w, of_v = (Update({name: torch.zeros(4000)}) for name in "wv")
    _, state = run(private(), range(3), template=of_w)
    assert state["noise"]["torch.float32"].shape == (3, 4000)
    begun = private().start_round(state, context(3, template=of_w))
    assert "noise" in begun
    assert load_ledger(begun) == recorded(1)
    # The same round again, whose noise may have been seen: once more, and the noise of before stays.
    again = private().start_round(begun, context(3, template=of_w))
    assert load_ledger(again) == recorded(2)
    assert torch.equal(again["noise"]["torch.float32"], state["noise"]["torch.float32"])
    for transform, ctx in (
        (private(mechanism=BandMF(3)), context(3, template=of_w)),
        (private(noise_multiplier=3.0), context(3, template=of_w)),
        (private(), context(4, template=of_w)),  # a round is missing
        (private(), context(3, replace(TURNS, separation=6), template=of_w)),
        (private(), context(3, population=13, template=of_w)),
        (private(), context(3, template=of_v)),  # as many elements, of another tensor
        (private(clip=AdaptiveClip(initial=0.5, bit_noise=2.0)), context(3, template=of_w)),
    ):
        other = transform.start_round(state, ctx)
        assert "noise" not in other
        assert sum(count for _, count in load_ledger(other)) == (3 if ctx.round == 4 else 2)
    # Rounds without it leave nothing of its state.
    plain = private(mechanism=None).start_round(state, context(3))
    assert not {"noise", "turns", "seen"} & plain.keys()
    assert "noise" not in private().start_round(plain, context(4))


def test_it_goes_on_from_a_checkpoint_bit_for_bit() -> None:
    whole, _ = run(private(), range(9))
    _, state = run(private(), range(5))
    file = io.BytesIO()
    torch.save(dict(state), file)
    file.seek(0)
    rest, _ = run(private(), range(5, 9), torch.load(file, weights_only=True))
    assert torch.equal(rest, whole[5:])
    # The control: without the noise of before.
    lost, _ = run(private(), range(5, 9), {key: value for key, value in state.items() if key != "noise"})
    assert not (lost[0] == whole[5]).any()


@pytest.mark.parametrize("clip", [AdaptiveClip(initial=0.5, bit_noise=3.0), 0.5])
def test_the_noise_follows_the_clip_norm(clip: Any) -> None:
    """What later rounds take back is measured in clip norms, which may change."""
    transform, state, found = private(clip=clip), {}, []
    on_model = transform._noises(PER_ROUND)[0]
    for number, scale in enumerate((1.0, 10.0, 0.1)):
        ctx = context(number)
        state = transform.start_round(state, ctx)
        state = {**state, "clip": torch.tensor(scale, dtype=torch.float64)}
        aux = {} if clip == 0.5 else {"privacy": {"unclipped": torch.zeros((), dtype=torch.float64)}}
        zeros = Aggregate({"w": torch.zeros(4000)}, {}, 0.0, aux, 3, NUM_CLIENTS)
        aggregate, state = transform.server(zeros, state, ctx)
        found.append(aggregate.delta["w"].double() / scale)
    assert deviations(torch.stack(found), 4, on_model / BandMF(4).norm) < 4


def test_the_budget_counts_turns() -> None:
    budget = float(recorded(2).epsilon(1e-5))
    transform, state = private(insecure_test_seed=None, max_epsilon=budget + 1e-3), {}
    for number in range(8):
        _, state = run(transform, range(number, number + 1), state, size=100)
        assert (transform.stop_reason(state, context(number)) is None) == (number < 7)
    with pytest.raises(PrivacyBudgetExceeded, match="Round 8"):
        transform.start_round(state, context(8))
    assert transform.report(state, context(7))["dp_mechanism"] == "BandMF(bands=4)"


@pytest.mark.parametrize(
    "sampling",
    [
        None,
        Sampling("full", 12, 12, 1.0),
        Sampling("poisson", 12, 3.0, 0.25),
        describe_sampling(Uniform(), 12, 3),
        describe_sampling(RoundRobin(), 12, 4),
    ],
)
def test_cohorts_that_return_too_soon_are_refused(sampling: Any) -> None:
    with pytest.raises(ValueError, match=r"no client may take part twice in 4 rounds.*RoundRobin"):
        private().start_round({}, context(0, sampling))


def test_a_client_that_returns_too_soon_stops_the_run() -> None:
    for cohort, is_early in ((["ä", 2], True), ([6, 7], False)):
        _, state = run(private(), range(1), cohort=["ä", 2, 5])
        _, state = run(private(), range(1, 2), state, cohort=[3, "2"])
        if not is_early:
            run(private(), range(2, 3), state, cohort=cohort)
            continue
        with pytest.raises(PrivacyError, match="client 'ä' takes part in round 2 and in one of the 3 rounds before"):
            private().start_round(state, context(2, cohort=cohort))
    # After as many rounds as declared it may.
    _, state = run(private(), range(1), cohort=[1])
    for number in range(1, 4):
        _, state = run(private(), range(number, number + 1), state, cohort=[number + 1])
    run(private(), range(4, 5), state, cohort=[1])


@pytest.mark.parametrize("bands", [0, -1, 2.0, True, "4"])
def test_bands_that_are_none_are_refused(bands: Any) -> None:
    with pytest.raises(ValueError, match="BandMF got bands="):
        BandMF(bands)


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_it_is_for_central_noise(mode: Any) -> None:
    with pytest.raises(ValueError, match=r"BandMF\(bands=4\) correlates the noise that a server adds"):
        private(mode=mode)


class TooEarly(RoundRobin):
    """A user's own cohort that claims more than it does."""

    def sampling(self, num_clients: int, clients_per_round: Any) -> Sampling:
        return super().sampling(num_clients, clients_per_round)

    def draw(self, sampling: Sampling, round: int, rng: Any, prepared: Any) -> np.ndarray:
        return super().draw(sampling, round - round // 20, rng, prepared)


class Inherits(RoundRobin):
    def draw(self, sampling: Sampling, round: int, rng: Any, prepared: Any) -> np.ndarray:
        return np.arange(int(sampling.size))


def test_what_a_cohort_of_the_users_own_declares_is_tested() -> None:
    from lightning_fl.clients.draw_test import check_draws

    with pytest.raises(ValueError, match=r"separation=4.*drew client \d+ in rounds 19 and 20"):
        check_draws(TooEarly(), describe_sampling(TooEarly(), 12, 3), None)
    assert describe_sampling(Inherits(), 12, 3).separation == 1

    class Honest(TooEarly):
        def draw(self, sampling: Sampling, round: int, rng: Any, prepared: Any) -> np.ndarray:
            return RoundRobin().draw(sampling, round, rng, prepared)[::-1]

    check_draws(Honest(), describe_sampling(Honest(), 12, 3), None)


@pytest.mark.parametrize(("clients", "size"), [(12, 3), (10, 3), (7, 2), (5, 5), (100, 7)])
def test_turns_are_as_far_apart_as_declared(clients: int, size: int) -> None:
    sampling = describe_sampling(RoundRobin(), clients, size)
    last: dict[int, int] = {}
    apart = []
    for number in range(5 * clients):
        for client in RoundRobin().draw(sampling, number, np.random.default_rng(0), None).tolist():
            apart += [number - last[client]] if client in last else []
            last[client] = number
    assert min(apart) == sampling.separation
