"""The largest epsilon of many clients, and the noise that keeps all of them within a budget."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lightning_fl.callbacks.sample_level_dp.accounting import gather
from lightning_fl.communication import Message
from lightning_fl.privacy import Full, Gaussian, Ledger, Poisson, Sampling
from lightning_fl.privacy.accounting.per_client import largest_epsilon, noise_multiplier_for_all, rough_epsilon

DELTA = 1e-5
SETTINGS = [(2.0, 0.1, 40), (1.0, 0.02, 100), (1.5, 0.5, 3), (3.0, 1.0, 5)]


def sampling(rate: float) -> Sampling:
    return Poisson(rate) if rate < 1 else Full()


def ledger(*settings: tuple[float, float, int]) -> Ledger:
    own = Ledger()
    for sigma, rate, count in settings:
        own.record(Gaussian(sigma, sampling(rate)), count)
    return own


@pytest.mark.parametrize("settings", [SETTINGS[:1], SETTINGS[1:2], SETTINGS[2:3], SETTINGS[3:], SETTINGS])
def test_the_quick_bound_is_one(settings: list[tuple[float, float, int]]) -> None:
    own = ledger(*settings)
    assert own.epsilon(DELTA, "rdp") - 1e-9 <= rough_epsilon(own.entries, DELTA) <= 1.25 * own.epsilon(DELTA, "rdp")


@pytest.mark.slow
def test_the_largest_of_all_is_found() -> None:
    ledgers = [ledger(setting) for setting in SETTINGS] + [ledger(*SETTINGS[:2]), Ledger()]
    every = [float(own.epsilon(DELTA)) for own in ledgers]
    found, of = largest_epsilon(ledgers, DELTA)
    assert found == pytest.approx(max(every), abs=1e-9)
    assert of == ledgers[every.index(max(every))]
    assert largest_epsilon([], DELTA)[0] == 0.0
    assert largest_epsilon([*ledgers, ledger((0.0, 0.1, 1))], DELTA)[0] == float("inf")


@pytest.mark.slow
def test_the_least_noise_for_all() -> None:
    counts = {Poisson(0.4): 9, Poisson(0.1): 120, Full(): 2}
    sigma = noise_multiplier_for_all(4.0, DELTA, counts, "rdp")
    spent = [ledger((sigma, getattr(own, "rate", 1.0), count)) for own, count in counts.items()]
    less = [ledger((sigma - 4e-3, getattr(own, "rate", 1.0), count)) for own, count in counts.items()]
    assert max(own.epsilon(DELTA, "rdp") for own in spent) <= 4.0 < max(own.epsilon(DELTA, "rdp") for own in less)
    with pytest.raises(ValueError, match="can't be reached"):
        noise_multiplier_for_all(1e-9, 1e-12, {Full(): 1000})


def test_silos_that_hide_their_sizes_do_not_tell_their_epsilon() -> None:
    def all_gather(message: Message, topic: str) -> list[Message]:
        return [message, Message({"epsilon": 2.0})]

    for hides, silos, count in ((True, 3, 1), (True, None, 2), (False, 3, 2)):
        rounds = SimpleNamespace(
            settings=SimpleNamespace(aggregator=SimpleNamespace(hides_reports=hides)),
            population=SimpleNamespace(silos=silos),
            group=SimpleNamespace(all_gather=all_gather),
        )
        assert len(gather(rounds, {"epsilon": 1.0})) == count  # type: ignore[arg-type]
