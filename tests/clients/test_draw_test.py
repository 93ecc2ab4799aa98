"""A cohort of the user's own is believed only if it draws what it declares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lightning_fl as fl
from lightning_fl.clients import Cohort
from lightning_fl.clients.draw_test import check_draws


class Honest(fl.clients.Uniform):
    def sampling(self, num_clients: int, clients_per_round: Any) -> Any:
        return super().sampling(num_clients, clients_per_round)

    def draw(self, sampling: Any, round: int, rng: Any, prepared: Any) -> np.ndarray:
        return rng.permutation(sampling.num_clients)[: int(sampling.size)]


class HonestCoins(fl.clients.Poisson):
    def sampling(self, num_clients: int, clients_per_round: Any) -> Any:
        return super().sampling(num_clients, clients_per_round)

    def draw(self, sampling: Any, round: int, rng: Any, prepared: Any) -> np.ndarray:
        return np.flatnonzero(rng.random(sampling.num_clients) < self.rate)


class First(Honest):
    def draw(self, sampling: Any, round: int, rng: Any, prepared: Any) -> np.ndarray:
        return np.arange(int(sampling.size))


class InTurn(Honest):
    def draw(self, sampling: Any, round: int, rng: Any, prepared: Any) -> np.ndarray:
        size = int(sampling.size)
        return (round * size + np.arange(size) + rng.permutation(2)[0] * 0) % sampling.num_clients


class Pairs(Honest):
    """A random half of the clients in one round, the others in the next."""

    last: Any = None

    def draw(self, sampling: Any, round: int, rng: Any, prepared: Any) -> np.ndarray:
        size = int(sampling.size)
        if round % 2 == 0:
            Pairs.last = rng.permutation(sampling.num_clients)
            return Pairs.last[:size]
        return Pairs.last[size : 2 * size]


class OwnSeed(Honest):
    def draw(self, sampling: Any, round: int, rng: Any, prepared: Any) -> np.ndarray:
        return np.random.default_rng(round).permutation(sampling.num_clients)[: int(sampling.size)]


class Favours(Honest):
    def draw(self, sampling: Any, round: int, rng: Any, prepared: Any) -> np.ndarray:
        size = int(sampling.size)
        return np.append(0, 1 + rng.permutation(sampling.num_clients - 1)[: size - 1])


class MoreOften(HonestCoins):
    def draw(self, sampling: Any, round: int, rng: Any, prepared: Any) -> np.ndarray:
        return np.flatnonzero(rng.random(sampling.num_clients) < 1.2 * self.rate)


class SameSize(HonestCoins):
    def draw(self, sampling: Any, round: int, rng: Any, prepared: Any) -> np.ndarray:
        return rng.permutation(sampling.num_clients)[: round_(sampling.size)]


def round_(size: float) -> int:
    return int(size + 0.5)


def verdict(cohort: Cohort, num_clients: int, per_round: Any = None) -> str | None:
    sampling = cohort.sampling(num_clients, per_round)
    try:
        check_draws(cohort, sampling, None)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("num_clients", [8, 100, 5000])
@pytest.mark.spread(1)
def test_honest_cohorts_are_believed(num_clients: int) -> None:
    for _ in range(3):
        assert verdict(Honest(), num_clients, 0.3) is None
        assert verdict(HonestCoins(0.2), num_clients) is None


def test_draws_that_can_only_be_equal_are_believed() -> None:
    assert verdict(Honest(), 20, 20) is None
    assert verdict(Honest(), 1, 1) is None
    assert verdict(HonestCoins(1.0), 20) is None
    assert verdict(HonestCoins(1e-6), 8) is None


@pytest.mark.parametrize("num_clients", [8, 100])
@pytest.mark.parametrize(
    ("kind", "per_round", "names"),
    [
        (First, 0.375, "the same clients every time"),
        (InTurn, 0.5, "the same clients every time"),
        (OwnSeed, 0.3, "the same clients every time"),
        (Pairs, 0.5, "share 0 clients"),
        (Favours, 0.3, "client 0 was drawn"),
    ],
)
def test_others_are_not(kind: type[Honest], per_round: float, names: str, num_clients: int) -> None:
    assert names in str(verdict(kind(), num_clients, per_round))


def test_coins_that_are_none_are_not() -> None:
    assert "clients per round" in str(verdict(MoreOften(0.3), 100))
    assert "variance" in str(verdict(SameSize(0.3), 100))


def test_it_is_refused_where_privacy_rests_on_it() -> None:
    from tests.helpers.training import Plain, image_clients, trainer

    transform = fl.privacy.ClientLevelDP(clip=0.5, noise_multiplier=1.0, method="rdp")

    class Declared(First):
        def sampling(self, num_clients: int, clients_per_round: Any) -> Any:
            return super().sampling(num_clients, clients_per_round)

    for cohort, is_believed in ((Honest(), True), (Declared(), False)):
        strategy = fl.FederatedStrategy(cohort=cohort, clients_per_round=3, transforms=[transform])
        run = trainer(strategy, 1)
        if is_believed:
            run.fit(Plain(), image_clients((4,) * 8, 4))
            continue
        with pytest.raises(Exception, match="Draw from `rng` as declared"):
            run.fit(Plain(), image_clients((4,) * 8, 4))
    # Without a mechanism that counts on it, a cohort may draw as it likes.
    trainer(fl.FederatedStrategy(cohort=Declared(), clients_per_round=3), 1).fit(Plain(), image_clients((4,) * 8, 4))
