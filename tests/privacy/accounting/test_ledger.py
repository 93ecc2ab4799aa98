"""What the ledger answers: reference values, upper bounds, and what is wrong without amplification."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from lightning_fl.privacy import FixedSize, Full, Gaussian, Ledger, LocalSteps, Poisson, Sampling, noise_multiplier_for
from lightning_fl.privacy.accounting.bounds import GRID, _mixture, _single, _without_replacement, subsample

MNIST = 256 / 60000
ROWS = [  # noise multiplier, rate, steps, delta, RDP, PLD; 1 to 4 have no sampling
    (1.0, 1, 1, 1e-5, 4.728507, 4.377178),
    (10.0, 1, 100, 1e-5, 4.728507, 4.377178),
    (5.0, 1, 100, 1e-6, 11.688627, 10.997151),
    (20.0, 1, 1000, 1e-6, 8.846874, 8.306225),
    (1.1, MNIST, 14062, 1e-5, 2.596556, 2.381686),
    (0.7, MNIST, 10547, 1e-5, 6.319748, 5.639716),
    (1.3, MNIST, 3516, 1e-5, 0.954564, 0.864589),
    (1.0, 64 / 60000, 9375, 1e-5, 0.803489, 0.493688),
    (1.0, 0.01, 1000, 1e-5, 2.101367, 1.828244),
    (4.0, 0.01, 10000, 1e-5, 1.035490, 0.946999),
    (0.5, 0.001, 2000, 1e-6, 5.772854, 4.655120),
    (1.0, 0.001, 10000, 1e-6, 0.979542, 0.555392),
    (1.0, 5000 / 763430, 5000, 1e-9, 4.183292, 3.898826),
    (1.0, 0.05, 200, 1e-5, 5.367864, 4.765920),
    (2.0, 0.1, 500, 1e-5, 6.034562, 5.555470),
    (0.8, 0.02, 300, 1e-3, 2.910251, 2.313926),
    (0.6, 0.001, 1500, 1e-6, 3.232315, 2.248561),
    (1.5, 1024 / 50000, 4400, 1e-5, 4.939661, 4.554729),
]
QUICK = (1, 2, 3, 4, 10, 16)


def ledger(noise_multiplier: float, sampling: Sampling | None = None, count: int = 1) -> Ledger:
    own = Ledger()
    own.record(Gaussian(noise_multiplier=noise_multiplier, sampling=sampling or Full()), count=count)
    return own


def gaussian_delta(epsilon: float, mu: float) -> float:
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)))


def exact_gaussian(mu: float, delta: float) -> float:
    return brentq(lambda epsilon: gaussian_delta(epsilon, mu) - delta, 0, 2000, xtol=1e-13)


@pytest.mark.parametrize("number", range(1, 19))
def test_reference_values_by_renyi_dp(number: int) -> None:
    sigma, rate, steps, delta, expected, _ = ROWS[number - 1]
    assert ledger(sigma, Poisson(rate), steps).epsilon(delta, method="rdp") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "number", [number if number in QUICK else pytest.param(number, marks=pytest.mark.slow) for number in range(1, 19)]
)
def test_reference_values_by_privacy_loss(number: int) -> None:
    sigma, rate, steps, delta, rdp, expected = ROWS[number - 1]
    epsilon = ledger(sigma, Poisson(rate) if rate < 1 else Full(), steps).epsilon(delta, method="pld")
    assert epsilon == pytest.approx(expected, abs=2e-4)
    assert expected - 1e-6 <= epsilon <= rdp + 1e-6


@pytest.mark.parametrize(("mu", "delta"), [(1.0, 1e-5), (0.01, 1e-5), (3.0, 1e-9), (20.0, 1e-6)])
def test_releases_by_everybody_are_exact_and_never_below(mu: float, delta: float) -> None:
    exact = exact_gaussian(mu, delta) if gaussian_delta(0.0, mu) > delta else 0.0
    found = ledger(2 / mu, Full(), 4).epsilon(delta)
    assert exact <= found <= exact + 1e-6


@pytest.mark.parametrize(("sigma", "rate", "delta"), [(1.0, 0.1, 1e-5), (0.6, 0.01, 1e-6), (2.0, 0.5, 1e-3)])
@pytest.mark.spread(1)
def test_one_sampled_release_is_never_below_its_closed_form(sigma: float, rate: float, delta: float) -> None:
    inner = exact_gaussian(1 / sigma, delta / rate)
    exact = math.log1p(rate * math.expm1(inner))
    assert exact - 1e-9 <= ledger(sigma, Poisson(rate)).epsilon(delta) <= exact + 2e-4


def test_by_hand_dp_accounting_disagrees_with_itself_and_the_ledger_does_not() -> None:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    event, relation = dp_accounting.GaussianDpEvent(1.0), dp_accounting.NeighboringRelation.REPLACE_ONE
    by_hand = [
        kind(neighboring_relation=relation).compose(event).get_epsilon(1e-5) for kind in (PLDAccountant, RdpAccountant)
    ]
    assert by_hand == pytest.approx([9.9973, 4.7285], abs=1e-3)  # one doubles the sensitivity, the other does not
    exact = exact_gaussian(2.0, 1e-5)
    for method in ("pld", "rdp"):
        found = ledger(1.0).epsilon(1e-5, method=method, relation="replace_one")
        assert exact <= found < exact * 1.1
        assert found.relation == "replace_one"


@pytest.mark.slow
def test_sampling_without_replacement_has_noise_relative_to_twice_the_clip() -> None:
    drawn = ledger(1.0, FixedSize(100, 10000), 1000)
    for method, expected in (("pld", 14.821), ("rdp", 20.987)):
        epsilon = drawn.epsilon(1e-5, method=method)  # type: ignore[arg-type]
        assert epsilon == pytest.approx(expected, abs=1e-3)
        assert epsilon.relation == "replace_one"
    assert ledger(1.0, Poisson(0.01), 1000).epsilon(1e-5, relation="replace_one") == pytest.approx(2.8434, abs=1e-3)


FIXED = [  # noise multiplier, cohort, population, rounds, epsilon at delta 1e-5
    (1.0, 100, 1000, 100, 34.17),
    (2.0, 100, 1000, 100, 7.81),
    (0.5, 10, 1000, 10, 22.69),
    (1.0, 50, 100, 10, 31.77),
    (5.0, 10, 20, 50, 7.31),
    (1.0, 1, 2, 1, 8.98),
]


@pytest.mark.parametrize(
    ("sigma", "cohort", "population", "rounds", "expected"),
    [pytest.param(*case, marks=[] if case in FIXED[1::4] else [pytest.mark.slow]) for case in FIXED],
)
@pytest.mark.spread(1)
def test_sampling_without_replacement_is_tight(
    sigma: float, cohort: int, population: int, rounds: int, expected: float
) -> None:
    found = ledger(sigma, FixedSize(cohort, population), rounds).epsilon(1e-5)
    assert found == pytest.approx(expected, abs=0.01)
    # One pair of neighbours: all others contribute -C, the replaced one C instead. The sum then moves by 2 C with the
    # probability of a draw.
    accountant = PLDAccountant()
    event = dp_accounting.PoissonSampledDpEvent(cohort / population, dp_accounting.GaussianDpEvent(sigma / 2))
    lower = accountant.compose(event, rounds).get_epsilon(1e-5)
    assert lower - 1e-3 <= found <= 1.15 * lower


def test_the_profile_of_a_draw_of_fixed_size_is_one_of_a_pair() -> None:
    """It is that of a pair of distributions only if it is convex in the odds, falls, and is 1 at 0."""
    for sigma, rate in ((0.3, 0.01), (1.0, 0.1), (3.0, 0.9)):
        loss = _without_replacement(sigma, rate, 1e-3)
        odds = np.exp(np.linspace(-3, 3, 301))
        values = np.array([loss.get_delta_for_epsilon(float(np.log(own))) for own in odds])
        slopes = np.diff(values) / np.diff(odds)
        assert (np.diff(slopes) >= -1e-6).all()
        assert (slopes <= 1e-9).all()
        assert (values >= np.maximum(1 - odds, 0) - 1e-9).all()
        exact = [rate * gaussian_delta(math.log1p((own - 1) / rate), 2 / sigma) for own in odds[151:]]
        assert (values[151:] >= np.array(exact) - 1e-12).all()
        np.testing.assert_allclose(values[151:], exact, atol=1e-5)


@pytest.mark.parametrize("sampling", [Full(), Poisson(0.1), FixedSize(100, 1000), LocalSteps(Poisson(0.1), Full(), 3)])
def test_hardly_any_noise_costs_no_more_time_or_memory(sampling: Sampling) -> None:
    own = ledger(1e-4, sampling, 100)
    steps = 3 if isinstance(sampling, LocalSteps) else 1
    scale = 2 if isinstance(sampling, FixedSize) else 1
    for method in ("pld", "rdp"):
        found = own.epsilon(1e-5, method=method)  # type: ignore[arg-type]
        about = (scale / 1e-4) ** 2 * 100 * steps / 2
        assert about <= found < 1.2 * about


@pytest.mark.slow
def test_draws_of_a_fixed_size_have_no_bound_for_removing_one() -> None:
    """One of x and -x is drawn: if x is removed, -x is drawn for sure, 2 away; noise as if it were 1 claims 4.377."""
    nested = LocalSteps(Full(), FixedSize(10, 100), 1)
    for sampling in (FixedSize(1, 2), nested, LocalSteps(Poisson(0.1), FixedSize(10, 100), 10)):
        own = ledger(1.0, sampling)
        with pytest.raises(ValueError, match="no bound"):
            own.epsilon(1e-5, relation="add_or_remove_one")
        with pytest.raises(ValueError, match="no bound"):
            noise_multiplier_for(2.0, 1e-5, 10, sampling, relation="add_or_remove_one")
        assert own.epsilon(1e-5).relation == "replace_one"
    assert ledger(1.0, nested).epsilon(1e-5) == pytest.approx(ledger(1.0, FixedSize(10, 100)).epsilon(1e-5), rel=1e-6)
    assert ledger(1.0, nested).epsilon(1e-5) < exact_gaussian(2.0, 1e-5)
    clients = ledger(1.0, LocalSteps(FixedSize(10, 100), Poisson(0.1), 2))  # examples do not change who is a client
    assert clients.epsilon(1e-5).relation == "add_or_remove_one"


def test_local_steps_share_the_draw_of_their_client() -> None:
    def rounds(steps: int, rate: float, participation: Any = "hidden", batches: Sampling | None = None) -> Sampling:
        return LocalSteps(Poisson(rate), batches or Full(), steps, participation)

    product = ledger(2.0, Poisson(0.1 * 1), 10 * 100).epsilon(1e-5)
    hidden = ledger(2.0, rounds(10, 0.1), 100).epsilon(1e-5)
    visible = ledger(2.0, rounds(10, 0.1, "visible"), 100).epsilon(1e-5)
    unamplified = ledger(2.0, Full(), 1000).epsilon(1e-5)
    assert product == pytest.approx(8.28, abs=0.01)
    assert hidden == pytest.approx(18.27, abs=0.01)
    assert visible == pytest.approx(45.32, abs=0.01)
    assert hidden < visible < unamplified
    assert LocalSteps(Poisson(0.1), Full(), 10).participation == "visible"


def test_rounds_of_local_steps_seen_by_chance_are_their_closed_form() -> None:
    """Participation is seen: with n rounds of K steps, delta is the mean over the binomial number of rounds."""
    rate, steps, rounds, sigma, delta = 0.2, 4, 3, 3.0, 1e-3

    def mean_delta(epsilon: float) -> float:
        terms = ((math.comb(rounds, n) * rate**n * (1 - rate) ** (rounds - n), n) for n in range(1, rounds + 1))
        return sum(weight * gaussian_delta(epsilon, (n * steps) ** 0.5 / sigma) for weight, n in terms)

    exact = brentq(lambda epsilon: mean_delta(epsilon) - delta, 0, 50)
    found = ledger(sigma, LocalSteps(Poisson(rate), Full(), steps), rounds).epsilon(delta)
    assert exact - 1e-9 <= found <= exact + 1e-3


@pytest.mark.slow
def test_sampling_of_any_mechanism_is_that_of_the_gaussian() -> None:
    inner = _single(2 / 10**0.5, 1.0, "add_or_remove_one", GRID)
    found = subsample(inner, 0.1).self_compose(100).get_epsilon_for_delta(1e-5)
    direct = _single(2 / 10**0.5, 0.1, "add_or_remove_one", GRID).self_compose(100).get_epsilon_for_delta(1e-5)
    assert direct - 1e-4 <= found <= direct + 1e-3


@pytest.mark.slow
def test_batches_amplify_inside_a_round() -> None:
    both = ledger(2.0, LocalSteps(Poisson(0.3), Poisson(0.1), 10, "hidden"), 10).epsilon(1e-4)
    product = ledger(2.0, Poisson(0.03), 100).epsilon(1e-4)
    batches, clients = ledger(2.0, Poisson(0.1), 100), ledger(2.0, LocalSteps(Poisson(0.3), Full(), 10, "hidden"), 10)
    assert product < both < min(batches.epsilon(1e-4), clients.epsilon(1e-4))


def assert_monotone(sampling: Sampling, method: Any, sigma: float, steps: int, delta: float, factor: float) -> None:
    at = ledger(sigma, sampling, steps).epsilon(delta, method)
    assert ledger(sigma * factor, sampling, steps).epsilon(delta, method) <= at + 1e-9
    assert ledger(sigma, sampling, math.ceil(steps * factor)).epsilon(delta, method) >= at - 1e-9
    assert ledger(sigma, sampling, steps).epsilon(delta / factor, method) >= at - 1e-9


SETTING = {"sigma": st.floats(0.4, 20), "steps": st.integers(1, 2000), "factor": st.floats(1.01, 3)}


@settings(max_examples=100)
@given(delta=st.floats(1e-9, 1e-2), method=st.sampled_from(["pld", "rdp"]), **SETTING)
def test_epsilon_is_monotone(method: Any, **setting: Any) -> None:
    assert_monotone(Full(), method, **setting)


@settings(max_examples=5)
@given(delta=st.floats(1e-9, 1e-2), rate=st.floats(0.001, 0.9), **SETTING)
@pytest.mark.slow
def test_epsilon_under_sampling_is_monotone(rate: float, delta: float, **setting: Any) -> None:
    assert_monotone(Poisson(rate), "rdp", delta=delta, **setting)
    sigma, steps, factor = setting["sigma"], setting["steps"], setting["factor"]
    at = ledger(sigma, Poisson(rate), steps).epsilon(delta, "rdp")
    assert ledger(sigma, Poisson(rate / factor), steps).epsilon(delta, "rdp") <= at + 1e-9


@pytest.mark.parametrize("cohort", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_epsilon_without_replacement_is_monotone(cohort: int) -> None:
    assert_monotone(FixedSize(cohort, 100), "rdp", sigma=3.0, steps=10, delta=1e-5, factor=1.5)
    larger, smaller = (ledger(3.0, FixedSize(size, 100), 10).epsilon(1e-5) for size in (cohort + 10, cohort))
    assert smaller < larger


@pytest.mark.parametrize("changed", [{"sigma": 1.2}, {"rate": 0.04}, {"steps": 15}, {"delta": 1e-3}])
@pytest.mark.spread(1)
def test_epsilon_by_privacy_loss_is_monotone(changed: dict[str, float]) -> None:
    setting: dict[str, Any] = {"sigma": 1.0, "rate": 0.05, "steps": 20, "delta": 1e-4}

    def epsilon(sigma: float, rate: float, steps: int, delta: float) -> float:
        return ledger(sigma, Poisson(rate), int(steps)).epsilon(delta)

    assert epsilon(**{**setting, **changed}) < epsilon(**setting)


def test_phases_add_up() -> None:
    own = ledger(1.0, Poisson(0.05), 30)
    alone = own.epsilon(1e-5)
    own.record(Gaussian(2.0, Poisson(0.1)), 20)
    assert own.epsilon(1e-5) > max(alone, ledger(2.0, Poisson(0.1), 20).epsilon(1e-5))
    assert own == ledger(2.0, Poisson(0.1), 20) + ledger(1.0, Poisson(0.05), 30)
    split = ledger(1.0, Poisson(0.05), 10) + ledger(1.0, Poisson(0.05), 20)
    assert split == ledger(1.0, Poisson(0.05), 30)
    assert split.epsilon(1e-5) == alone
    assert own != split
    mixed = split + ledger(1.0, FixedSize(1, 10), 1)
    assert mixed.epsilon(1e-5) > split.epsilon(1e-5, relation="replace_one")


def test_what_is_not_known_is_not_amplified() -> None:
    own = Ledger()
    assert own.epsilon(1e-5) == 0.0
    own.record(Gaussian(noise_multiplier=1.0))
    assert own.epsilon(1e-5) == pytest.approx(4.3772, abs=1e-4)
    own.record(Gaussian(noise_multiplier=0.0, sampling=Poisson(0.001)))
    assert own.epsilon(1e-5) == own.epsilon(1e-5, "rdp") == math.inf


def test_the_state_is_plain_data_that_torch_loads_safely(tmp_path: Any) -> None:
    own = ledger(1.1, Poisson(MNIST), 14062) + ledger(2.0) + ledger(1.0, FixedSize(3, 10), 7)
    own.record(Gaussian(3.0, LocalSteps(Poisson(0.1), Poisson(0.2), 4, "hidden")), 5)
    torch.save({"ledger": own.state_dict(), "epsilon": float(own.epsilon(1e-5, "rdp"))}, tmp_path / "ledger.pt")
    state = torch.load(tmp_path / "ledger.pt", weights_only=True)["ledger"]
    for loaded_state in (state, json.loads(json.dumps(own.state_dict()))):
        loaded = Ledger()
        loaded.load_state_dict(loaded_state)
        assert loaded == own
        assert loaded.epsilon(1e-5, "rdp") == own.epsilon(1e-5, "rdp")


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"events": [[{"noise_multiplier": 1.0, "sampling": {"kind": "Poisson", "rate": 2.0}}, 1]]},
        {"events": [[{"noise_multiplier": 1.0, "sampling": {"kind": "Poisson"}}, 1]]},
        {"events": [[{"noise_multiplier": 1.0, "sampling": {"kind": "Nobody"}}, 1]]},
        {"events": [[{"noise_multiplier": float("nan"), "sampling": {"kind": "Full"}}, 1]]},
        {"events": [[{"noise_multiplier": 1.0, "sampling": {"kind": "Full"}}, -1]]},
    ],
)
def test_a_state_that_is_none_is_refused_and_loses_nothing(state: Mapping[str, Any]) -> None:
    own = ledger(1.0)
    with pytest.raises(ValueError, match=r"not the state|describes no sampling|Poisson got|Gaussian got|count="):
        own.load_state_dict(state)
    assert own == ledger(1.0)


def test_an_answer_says_what_it_holds_for() -> None:
    epsilon = ledger(2.0, Full(), 4).epsilon(delta=1e-5)
    assert repr(epsilon) == "4.37718 (at most; delta=1e-05, add_or_remove_one, pld)"
    assert (epsilon.delta, epsilon.method, epsilon.relation) == (1e-5, "pld", "add_or_remove_one")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Poisson(0.0), "rate=0.0"),
        (lambda: FixedSize(11, 10), "cohort=11"),
        (lambda: Gaussian(-1.0), "noise_multiplier=-1.0"),
        (lambda: Gaussian(1.0, sampling=0.1), "sampling=0.1"),
        (lambda: LocalSteps(Full(), Full(), 0), "num_steps=0"),
        (lambda: ledger(1.0, count=0), "count=0"),
        (lambda: Ledger().record(0.1), "found 0.1"),
        (lambda: ledger(1.0).epsilon(0.0), "delta=0.0"),
        (lambda: ledger(1.0).epsilon(1e-5, "prv"), "method='prv'"),
        (lambda: ledger(1.0).epsilon(1e-5, relation="zero_out"), "relation='zero_out'"),
        (lambda: noise_multiplier_for(0.0, 1e-5, 10), "epsilon=0.0"),
        (lambda: noise_multiplier_for(1e-9, 1e-9, 10**9), "can't be reached"),
    ],
)
def test_wrong_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("rate", "count", "epsilon", "delta", "expected"),
    [
        (1, 100, 8, 1e-5, 6.0023),
        pytest.param(0.01, 1000, 2, 1e-5, 0.9592, marks=pytest.mark.slow),
        pytest.param(0.001, 1500, 2, 1e-6, 0.6161, marks=pytest.mark.slow),
        pytest.param(0.05, 200, 8, 1e-5, 0.7869, marks=pytest.mark.slow),
    ],
)
def test_calibration(rate: float, count: int, epsilon: float, delta: float, expected: float) -> None:
    sampling = Poisson(rate) if rate < 1 else Full()
    found = noise_multiplier_for(epsilon, delta, count, sampling)
    assert found == pytest.approx(expected, abs=2e-4)
    assert epsilon - 0.005 < ledger(found, sampling, count).epsilon(delta) <= epsilon
    by_rdp = noise_multiplier_for(epsilon, delta, count, sampling, method="rdp")
    assert by_rdp > found
    assert ledger(by_rdp, sampling, count).epsilon(delta, "rdp") <= epsilon


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-fl\[privacy\]'"):
        ledger(1.2345).epsilon(1e-5)


@pytest.mark.slow
def test_a_group_costs_what_a_mixture_of_its_draws_does() -> None:
    from dp_accounting.pld import privacy_loss_distribution as pld

    for rate, group in ((0.2, 2), (0.1, 3)):
        chances = [math.comb(group, k) * rate**k * (1 - rate) ** (group - k) for k in range(group + 1)]
        theirs = pld.from_mixture_gaussian_mechanism(1.0, range(group + 1), chances, value_discretization_interval=0.02)
        ours = _mixture(1.0, rate, group, 0.02)
        for count in (1, 10):
            expected = theirs.self_compose(count).get_epsilon_for_delta(1e-5)
            assert ours.self_compose(count).get_epsilon_for_delta(1e-5) == pytest.approx(expected, abs=1e-6)
    own = ledger(2.0, Poisson(0.1), 50)
    alone, pair = own.epsilon(1e-5), own.epsilon(1e-5, group=2)
    # Two contributors to one ledger pull in one direction; to two ledgers, each meets noise of its own.
    assert alone < (own + own).epsilon(1e-5) < pair == pytest.approx(3.618, abs=1e-3)
    assert "groups of 2" in repr(pair)
    assert ledger(2.0).epsilon(1e-5, group=2) == pytest.approx(exact_gaussian(1.0, 1e-5), rel=1e-6)
    # No bound for groups is known here, so sampling is not counted.
    for sampling, relation in ((FixedSize(10, 100), 2.0), (LocalSteps(Poisson(0.5), FixedSize(10, 100), 1), 2.0)):
        found = ledger(2.0, sampling).epsilon(1e-5, group=3)
        assert found == pytest.approx(exact_gaussian(3 * relation / 2, 1e-5), rel=1e-6)
    with pytest.raises(ValueError, match="group=0"):
        own.epsilon(1e-5, group=0)


def test_noise_of_the_server_hides_nothing_from_it() -> None:
    own = Ledger()
    own.record(Gaussian(2.0, Poisson(0.1), "model"), 5)
    own.record(Gaussian(3.0), 2)
    assert own.epsilon(1e-5) < math.inf
    assert own.epsilon(1e-5, adversary="server") == math.inf
    assert ledger(3.0).epsilon(1e-5, adversary="server") == ledger(3.0).epsilon(1e-5)
    again = Ledger()
    again.load_state_dict(json.loads(json.dumps(own.state_dict())))
    assert again == own
    assert again.epsilon(1e-5, adversary="server") == math.inf
    old = {"events": [[{"noise_multiplier": 2.0, "sampling": {"kind": "Full"}}, 1]]}  # a checkpoint of before
    again.load_state_dict(old)
    assert again == ledger(2.0)
    assert again.epsilon(1e-5, adversary="server") == math.inf
    with pytest.raises(ValueError, match="adversary='nobody'"):
        Gaussian(1.0, Full(), "nobody")  # type: ignore[arg-type]
