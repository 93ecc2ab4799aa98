"""Client-level privacy without Lightning: sensitivity by brute force, the adaptive clip, the noise, what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fl.aggregation import RoundContext, WeightedMean
from lightning_fl.clients.cohorts import Sampling as Cohorts
from lightning_fl.communication import LocalGroup, Message
from lightning_fl.privacy import (
    AdaptiveClip,
    ClientLevelDP,
    FixedSize,
    Full,
    Gaussian,
    InsecureNoiseWarning,
    Ledger,
    Poisson,
    PrivacyBudgetExceeded,
    PrivacyError,
)
from lightning_fl.privacy.client_level import mechanism
from lightning_fl.privacy.client_level.clipping import noise_on_model
from lightning_fl.privacy.state import load_ledger
from lightning_fl.tree import joint_norm, update_trees, zeros_like
from lightning_fl.types import Aggregate, State, Update

POISSON = Cohorts("poisson", 1000, 50.0, 0.05)


def update(size: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> Update:
    """An update with buffers and a side channel, of norm ``size``."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in (4, 3, 2, 5)]
    norm = float(torch.cat(parts).double().norm()) or 1.0
    a, b, mean, control = (part * (size / norm) for part in parts)
    return Update({"a": a, "b": b}, {"mean": mean}, 1.0, {"control": {"a": control}})


def run_round(
    transform: ClientLevelDP, updates: list[Update], state: State | None = None, **ctx: Any
) -> tuple[Aggregate, State]:
    """One round of the transform around the weighted mean."""
    facts = {"round": 0, "cohort": range(len(updates)), "population": 1000, "sampling": POISSON, **ctx}
    context = RoundContext(**facts)
    state = transform.start_round(state or {}, context)
    aggregator = WeightedMean()
    acc = aggregator.init(transform.like(update()), torch.device("cpu"))
    for client, own in enumerate(updates):
        sent, _ = transform.client(own, {}, replace(context, client=client, server=state))
        acc = aggregator.add(acc, sent, context)
    acc, _ = aggregator.merge(acc, LocalGroup(), Message(), context)
    empty = update(0.0)
    total = (
        aggregator.result(acc, context)
        if updates
        else Aggregate(empty.delta, empty.buffers, 0.0, transform.like(empty).aux, 0, 1000)
    )
    return transform.server(total, state, context)


def flat(aggregate: Update | Aggregate) -> Tensor:
    trees = update_trees(aggregate)
    return torch.cat([tensor.double().reshape(-1) for name in sorted(trees) for tensor in trees[name].values()])


pytestmark = pytest.mark.filterwarnings("ignore:ClientLevelDP clips buffers")
HUGE = [update(1e30, 1), update(1e-30, 2), update(0.0), update(float("nan")), update(float("inf")), update(3.0, 4)]
TINY_CLIP = ClientLevelDP(clip=0.5, noise_multiplier=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.spread(1)
def test_no_client_moves_the_sum_by_more_than_the_clip(dtype: torch.dtype) -> None:
    pool = [*HUGE, *(update(10.0**exponent, seed, dtype) for seed, exponent in enumerate(range(-3, 4)))]
    for size in (1, 2, 3):
        for others in itertools.islice(itertools.combinations(pool, size), 6):
            without = flat(run_round(TINY_CLIP, list(others))[0])
            for one in pool:
                moved = flat(run_round(TINY_CLIP, [*others, one])[0]) - without
                assert float(moved.norm()) <= 0.5 * (1 + 1e-12)
                replaced = flat(run_round(TINY_CLIP, [*others[1:], one])[0]) - without
                assert float(replaced.norm()) <= 1.0 * (1 + 1e-12)


def test_the_brute_force_finds_what_is_not_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "clip_update", lambda update, clip: update)
    monkeypatch.setattr(mechanism, "check_clipped", lambda update, clip: None)
    moved = flat(run_round(TINY_CLIP, [update(3.0), update(2.0, 1)])[0]) - flat(run_round(TINY_CLIP, [update(3.0)])[0])
    assert float(moved.norm()) == pytest.approx(2.0)


def test_what_is_short_enough_stays_bit_for_bit() -> None:
    own = update(0.4999, dtype=torch.float32)
    sent, _ = TINY_CLIP.client(own, {}, RoundContext(0, [0], 10, server={"clip": torch.tensor(0.5)}))
    assert torch.equal(flat(sent), flat(own))


def test_everything_is_clipped_together_and_keeps_its_direction() -> None:
    own = update(8.0)
    total = flat(run_round(TINY_CLIP, [own])[0])
    torch.testing.assert_close(total, flat(own) / 16, rtol=2e-6, atol=0)


def test_a_weight_is_refused() -> None:
    with pytest.raises(PrivacyError, match="weighs 9"):
        run_round(TINY_CLIP, [replace(update(), weight=9.0)])


def test_the_sum_is_divided_by_the_expected_cohort() -> None:
    for updates in ([], [update(0.1)], [update(0.1)] * 7):
        total, _ = run_round(TINY_CLIP, updates)
        assert total.weight == 50.0
        assert total.num_clients == 50
        torch.testing.assert_close(flat(total), len(updates) * flat(update(0.1)))


@pytest.mark.parametrize("mode", ["central", "local"])
@pytest.mark.parametrize("num_clients", [0, 1, 9])
def test_the_noise_has_its_deviation_on_every_part(mode: Any, num_clients: int) -> None:
    transform = ClientLevelDP(clip=0.5, noise_multiplier=3.0, mode=mode)
    own = Update({"w": torch.zeros(20000)}, {"mean": torch.zeros(9000)}, 1.0, {"control": {"w": torch.zeros(20000)}})
    context = RoundContext(0, range(num_clients), 100, Cohorts("full", 100, 100, 1.0))
    state = transform.start_round({}, context)
    sent = [transform.client(own, {}, replace(context, client=c, server=state))[0] for c in range(num_clients)]
    zeros = {name: zeros_like(tree) for name, tree in update_trees(own).items()}
    total = Aggregate(zeros["delta"], zeros["buffers"], 0.0, {"control": zeros["aux/control"]}, num_clients, 100)
    for one in sent:
        total.delta["w"].add_(one.delta["w"])
        total.buffers["mean"].add_(one.buffers["mean"])
        total.aux["control"]["w"].add_(one.aux["control"]["w"])
    total, _ = transform.server(total, state, context)
    expected = 1.5 * (1.0 if mode == "central" else num_clients**0.5)
    for tree in update_trees(total).values():
        for values in tree.values():
            assert float(values.std()) == pytest.approx(expected, rel=0.05)
    again, _ = transform.server(total, state, context)
    if mode == "central":
        # Two draws that are rounded to float32 are now and then equal by chance.
        assert float((flat(again) == flat(total)).double().mean()) < 1e-3


@pytest.mark.parametrize(("z", "bit_noise", "expected"), [(1.0, 5.0, 1.00504), (1.0, 0.6, 1.80907), (0.0, 0.0, 0.0)])
def test_noise_on_the_model_makes_room_for_that_on_the_bits(z: float, bit_noise: float, expected: float) -> None:
    assert noise_on_model(z, bit_noise) == pytest.approx(expected, abs=1e-5)
    if z:
        both = Ledger()
        both.record(Gaussian(expected))
        both.record(Gaussian(2 * bit_noise))
        alone = Ledger()
        alone.record(Gaussian(z))
        assert both.epsilon(1e-5) == pytest.approx(alone.epsilon(1e-5), rel=1e-4)


@pytest.mark.parametrize(
    ("start", "mode"),
    [
        (0.01, "central"),
        (100.0, "local"),
        pytest.param(100.0, "central", marks=pytest.mark.slow),
        pytest.param(0.01, "local", marks=pytest.mark.slow),
    ],
)
@pytest.mark.spread(1)
def test_the_adaptive_clip_finds_the_median(start: float, mode: Any) -> None:
    norms = torch.logspace(-1, 1, 51).tolist()  # median 1
    clip = AdaptiveClip(initial=start, learning_rate=0.6, bit_noise=2.0 if mode == "central" else 0.6)
    transform = ClientLevelDP(clip=clip, noise_multiplier=1.0, mode=mode)
    state: State = {}
    updates = [update(size, seed) for seed, size in enumerate(norms)]
    sampling = Cohorts("full", len(norms), len(norms), 1.0)
    found = []
    for number in range(60):
        _, state = run_round(transform, updates, state, round=number, population=len(norms), sampling=sampling)
        found.append(float(state["clip"]))
    assert torch.tensor(found[40:]).log().mean().exp().item() == pytest.approx(1.0, rel=0.25)


def test_a_quantile_of_the_expected_cohort() -> None:
    """Without noise, the rule in closed form; who is away counts as one half on both sides."""
    transform = ClientLevelDP(clip=AdaptiveClip(initial=1.0, quantile=0.8, learning_rate=0.2), noise_multiplier=0.0)
    updates = [update(0.5), update(0.1), update(1.0), update(5.0), update(float("nan"))]
    _, state = run_round(transform, updates)
    bits = 0.5 + 0.5 + 0.5 - 0.5
    expected = torch.tensor(-0.2 * (0.5 + bits / 50 - 0.8), dtype=torch.float64).exp()
    assert float(state["clip"]) == pytest.approx(float(expected), rel=1e-9)


def test_only_clipping_is_not_private() -> None:
    _, state = run_round(TINY_CLIP, [update()])
    report = TINY_CLIP.report(state, RoundContext(0, [0], 1000, POISSON))
    assert report["dp_epsilon"] == float("inf")
    assert (report["dp_is_private"], report["dp_guarantee"]) == (0.0, "NOT PRIVATE")


def test_a_test_seed_repeats_warns_and_is_not_private() -> None:
    with pytest.warns(InsecureNoiseWarning, match="NOT PRIVATE"):
        transform = ClientLevelDP(clip=1.0, noise_multiplier=1.0, insecure_test_seed=3)
    first, state = run_round(transform, [update()])
    assert torch.equal(flat(first), flat(run_round(transform, [update()])[0]))
    assert not (flat(first) == flat(run_round(transform, [update()], round=1, state=state)[0])).any()
    report = transform.report(state, RoundContext(0, [0], 1000, POISSON))
    assert (report["dp_is_private"], report["dp_guarantee"]) == (0.0, "NOT PRIVATE (insecure_test_seed)")
    for number, secure in enumerate([replace(transform, insecure_test_seed=None)] * 2, start=1):
        context = RoundContext(number, [0], 1000, POISSON)
        state = secure.start_round(state, context)
        report = secure.report(state, context)
        assert (report["dp_is_private"], report["dp_epsilon"]) == (0.0, float("inf"))
        assert (0.0, Full(), 1) in load_ledger(state).entries
    with pytest.raises(PrivacyBudgetExceeded):
        replace(secure, max_epsilon=1e6).start_round(state, RoundContext(3, [0], 1000, POISSON))


@pytest.mark.parametrize(
    ("cohorts", "mode", "expected"),
    [
        (POISSON, "central", Poisson(0.05)),
        (Cohorts("fixed", 1000, 50, 0.05), "central", FixedSize(50, 1000)),
        (Cohorts("full", 1000, 1000, 1.0), "central", Full()),
        (Cohorts("other", 1000, 50, 0.05), "central", Full()),
        (None, "central", Full()),
        (POISSON, "local", Full()),
    ],
)
def test_a_cohort_is_recorded_as_what_it_is(cohorts: Cohorts | None, mode: Any, expected: Any) -> None:
    transform = ClientLevelDP(clip=1.0, noise_multiplier=1.0, mode=mode)
    _, state = run_round(transform, [update()], sampling=cohorts)
    wanted = Ledger()
    wanted.record(Gaussian(1.0, expected))
    assert load_ledger(state) == wanted
    report = transform.report(state, RoundContext(0, [0], 1000, cohorts))
    relation = "replace_one" if mode == "local" or isinstance(expected, FixedSize) else "add_or_remove_one"
    epsilon = wanted.epsilon(1e-5, relation=relation)
    assert epsilon <= report["dp_epsilon"] <= epsilon + 1e-3
    assert {key: report[key] for key in ("dp_delta", "dp_noise_multiplier", "dp_clip", "dp_mode", "dp_unit")} == {
        "dp_delta": 1e-5,
        "dp_noise_multiplier": 1.0,
        "dp_clip": 1.0,
        "dp_mode": mode,
        "dp_unit": "client",
    }
    assert relation in report["dp_guarantee"]


def test_a_round_is_recorded_before_it_is_released_again_when_retried_and_when_changed() -> None:
    transform = ClientLevelDP(clip=1.0, noise_multiplier=1.0)
    context = RoundContext(0, [0], 1000, POISSON)
    state = transform.start_round({}, context)
    assert load_ledger(state).entries == ((1.0, Poisson(0.05), 1),)
    retried = transform.start_round(state, context)
    assert load_ledger(retried).entries == ((1.0, Poisson(0.05), 2),)
    changed = replace(transform, noise_multiplier=2.0).start_round(retried, replace(context, round=1))
    assert load_ledger(changed).entries == ((1.0, Poisson(0.05), 2), (2.0, Poisson(0.05), 1))
    slower = replace(context, round=2, sampling=Cohorts("poisson", 1000, 10.0, 0.01))
    assert len(load_ledger(transform.start_round(changed, slower)).entries) == 3


@pytest.mark.parametrize("state_rounds", [0, 2])
def test_rounds_that_were_not_private_count_as_such(state_rounds: int) -> None:
    transform, state = ClientLevelDP(clip=1.0, noise_multiplier=1.0), {}
    for number in range(state_rounds):
        state = transform.start_round(state, RoundContext(number, [0], 1000, POISSON))
    context = RoundContext(5, [0], 1000, POISSON)
    state = transform.start_round(state, context)
    assert (0.0, Full(), 5 - state_rounds) in load_ledger(state).entries
    assert transform.report(state, context)["dp_is_private"] == 0.0


def test_the_budget_is_never_exceeded() -> None:
    ledger = Ledger()
    ledger.record(Gaussian(5.0), 3)
    budget = ledger.epsilon(1e-5)
    transform, state = ClientLevelDP(clip=1.0, noise_multiplier=5.0, max_epsilon=float(budget)), {}
    for number in range(3):
        context = RoundContext(number, [0], 10)
        state = transform.start_round(state, context)
        assert (transform.stop_reason(state, context) is None) == (number < 2)
    with pytest.raises(PrivacyBudgetExceeded, match="Round 3 would raise epsilon"):
        transform.start_round(state, RoundContext(3, [0], 10))


@pytest.mark.parametrize(
    ("cohorts", "drawn", "problem"),
    [
        (POISSON, list(range(200)), "Poisson sampling at rate 0.05"),
        (Cohorts("fixed", 1000, 50, 0.05), list(range(51)), "expected 50 of 1000"),
        (POISSON, [1, 1], "drawn twice"),
    ],
)
def test_cohorts_that_are_not_what_the_ledger_records_stop_the_run(
    cohorts: Cohorts, drawn: list[int], problem: str
) -> None:
    with pytest.raises(PrivacyError, match=problem):
        ClientLevelDP(clip=1.0, noise_multiplier=1.0).start_round({}, RoundContext(0, drawn, 1000, cohorts))


def test_a_sampler_that_always_draws_too_many_is_found_over_the_rounds() -> None:
    transform, state = ClientLevelDP(clip=1.0, noise_multiplier=1.0, method="rdp"), {}
    cohorts = Cohorts("poisson", 10, 2.0, 0.2)
    state = transform.start_round(state, RoundContext(0, range(10), 10, cohorts))
    with pytest.raises(PrivacyError, match="20 of 20 were drawn"):
        transform.start_round(state, RoundContext(1, range(10), 10, cohorts))


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("clip_update", lambda update, clip: update, "after clipping"),
        ("add_noise", lambda flat, std, source: flat, "standard deviation"),
        ("check_source", lambda: (_ for _ in ()).throw(PrivacyError("The noise repeats")), "repeats"),
    ],
)
def test_a_broken_part_stops_the_run(monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, message: str) -> None:
    monkeypatch.setattr(mechanism, name, broken)
    with pytest.raises(PrivacyError, match=message):
        run_round(ClientLevelDP(clip=0.5, noise_multiplier=1.0), [update(3.0)])


@pytest.mark.parametrize("factor", [1e-6, 0.5])
def test_noise_that_is_off_or_halved_stops_the_run(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    from lightning_fl.privacy import SecureNoise

    normal = SecureNoise.normal
    monkeypatch.setattr(SecureNoise, "normal", lambda self, size, std=1.0: normal(self, size, std) * factor)
    transform = ClientLevelDP(clip=0.5, noise_multiplier=1.0)
    wide = Update({"w": torch.zeros(1000)})
    state = transform.start_round({}, RoundContext(0, [], 1000, POISSON))
    with pytest.raises(PrivacyError, match="standard deviation"):
        transform.server(Aggregate(wide.delta, {}, 0.0, {}, 0, 1000), state, RoundContext(0, [], 1000, POISSON))


def test_central_noise_among_silos_is_refused_and_says_why() -> None:
    context = RoundContext(0, [0, 1], 2, Cohorts("full", 2, 2, 1.0), silos=True)
    with pytest.raises(ValueError, match=r"silos has none: each silo would know the noise.*mode='local'"):
        ClientLevelDP(clip=1.0, noise_multiplier=1.0).start_round({}, context)
    ClientLevelDP(clip=1.0, noise_multiplier=1.0, mode="local").start_round({}, context)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip": 0.0},
        {"clip": float("inf")},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"mode": "everywhere"},
        {"delta": 1.0},
        {"max_epsilon": 0.0},
        {"method": "prv"},
        {"clip": AdaptiveClip(bit_noise=0.4)},
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ClientLevelDP got|Gaussian got|is too small"):
        ClientLevelDP(**{"clip": 1.0, "noise_multiplier": 1.0, **wrong})


@pytest.mark.parametrize("wrong", [{"initial": 0.0}, {"quantile": 1.0}, {"learning_rate": 0.0}, {"bit_noise": -1.0}])
def test_wrong_arguments_of_the_adaptive_clip_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="AdaptiveClip got"):
        AdaptiveClip(**wrong)


def test_the_norm_is_that_of_all_trees_and_of_complex_numbers() -> None:
    trees = [{"a": torch.tensor([3.0 + 4.0j])}, {"b": torch.full((144,), 1.0, dtype=torch.float16)}]
    assert joint_norm(trees) == pytest.approx(13.0)
    assert joint_norm([]) == 0.0


def test_the_server_has_seen_what_it_noised_itself() -> None:
    central = ClientLevelDP(clip=1.0, noise_multiplier=5.0)
    local = replace(central, mode="local")
    _, state = run_round(central, [update()], sampling=POISSON)
    private = central.report(state, RoundContext(0, [0], 1000, POISSON))["dp_epsilon"]
    assert private < 1
    state = local.start_round(state, RoundContext(1, [0], 1000, POISSON))
    report = local.report(state, RoundContext(1, [0], 1000, POISSON))
    assert (report["dp_epsilon"], report["dp_guarantee"]) == (float("inf"), "NOT PRIVATE")
    # Whoever sees the models only has seen no more than the noised sums.
    assert load_ledger(state).epsilon(1e-5) < 5
    state = local.start_round({}, RoundContext(0, [0], 1000, POISSON))
    assert local.report(state, RoundContext(0, [0], 1000, POISSON))["dp_epsilon"] < 5
