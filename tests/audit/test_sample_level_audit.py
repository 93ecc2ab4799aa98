"""An attack on the shipped callback through ``Trainer.fit``: what it proves stays below the claimed epsilon.

One client holds many canaries, examples that each push a weight of their own as far as the clip lets them, up in the
first round and down in the second. A coin decides which of them are there. The attacker guesses all coins from what
the client sends. The errors of its guesses, with their 99.9% confidence limits, bound epsilon from below: where all
examples are in each batch, by the Gaussian that has such errors, else by the odds of a right guess.

Reference:
    Nasr et al., "Tight Auditing of Differentially Private Machine Learning", USENIX Security 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from scipy.stats import beta, norm
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.callbacks import SampleLevelDP
from lightning_fl.callbacks.sample_level_dp import callback
from lightning_fl.privacy import Gaussian, Ledger, SecureNoise
from lightning_fl.privacy.noise import add_noise
from lightning_fl.privacy.sample_level import dp_sgd as sgd
from lightning_fl.privacy.sample_level.poisson_loader import PoissonBatches
from lightning_fl.privacy.sample_level.self_check import SelfCheck
from tests.helpers.training import trainer

pytestmark = pytest.mark.slow
NUM_CANARIES, CLIP, DELTA = 2000, 0.5, 1e-5
COINS = torch.randint(2, (NUM_CANARIES,), generator=torch.Generator().manual_seed(0)).double()


class Canaries(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(NUM_CANARIES, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.net.weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        directions, push = batch
        return (-10 * CLIP * push * (-1) ** self.current_epoch * self.net(directions)[:, 0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Eavesdrop(fl.callbacks.FederatedCallback):
    """What the client sends of each canary's weight, round by round."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        self.seen.append(update.delta["net.weight"][0])


def attack(batch_size: int, noise_multiplier: float) -> tuple[list[float], float]:
    """The attacker's errors, at most, for canaries that are away and that are there; and the claimed epsilon."""
    data = TensorDataset(torch.eye(NUM_CANARIES, dtype=torch.float64), COINS)
    watch, private = Eavesdrop(), SampleLevelDP(noise_multiplier=noise_multiplier, max_grad_norm=CLIP, delta=DELTA)
    run = trainer(FederatedStrategy("fedavg"), 2, callbacks=[private, watch])
    run.fit(Canaries(), fl.datamodules.ClientLoaders([DataLoader(data, batch_size)]))
    first, second = watch.seen
    score = (first - second) / 2 * batch_size / CLIP  # 1 is to be expected of a canary that is there
    guesses = score > 0.5
    wrong = [int((guesses != coin)[coin == COINS].sum()) for coin in (0, 1)]
    return [upper_limit(wrong[coin], int((coin == COINS).sum())) for coin in (0, 1)], private.epsilons(run)[0]


def upper_limit(errors: int, trials: int) -> float:
    return float(beta.ppf(1 - 0.0005, errors + 1, trials - errors)) if errors < trials else 1.0


def proven_by_gaussian(errors: list[float]) -> float:
    separation = float(sum(norm.isf(error) for error in errors))
    if separation <= 0:
        return 0.0
    ledger = Ledger()
    ledger.record(Gaussian(1 / separation))
    return ledger.epsilon(DELTA)


def proven_by_odds(errors: list[float]) -> float:
    away, there = errors
    odds = max((1 - DELTA - there) / away, (1 - DELTA - away) / there)
    return math.log(odds) if odds > 1 else 0.0


@pytest.mark.parametrize("noise_multiplier", [1.0, 2.0])
def test_the_attack_stays_below_the_claim(noise_multiplier: float) -> None:
    errors, claimed = attack(NUM_CANARIES, noise_multiplier)
    proven = proven_by_gaussian(errors)
    print(f"all in each batch, noise multiplier {noise_multiplier}: proven {proven:.2f}, claimed {claimed:.2f}")
    assert 0.1 * claimed < proven <= claimed


def test_the_attack_on_samples_stays_below_the_claim() -> None:
    errors, claimed = attack(NUM_CANARIES // 2, 0.5)
    proven = proven_by_odds(errors)
    print(f"batches of a half, noise multiplier 0.5: proven {proven:.2f}, claimed {claimed:.2f}")
    assert 0 < proven <= claimed


def halved(flat: Any, std: float, source: SecureNoise) -> Any:
    return add_noise(flat, std / 2, source)


def repeated(flat: Any, std: float, source: SecureNoise) -> Any:
    return add_noise(flat, std, SecureNoise(0, len(flat)))


BROKEN: dict[str, tuple[str, Callable[..., Any]]] = {
    "noise off": ("add_noise", lambda flat, std, source: flat),
    "noise halved": ("add_noise", halved),
    "noise repeats": ("add_noise", repeated),
    "clipping off": ("clipped_sum", lambda samples, clip: {name: value.sum(0) for name, value in samples.items()}),
}


def without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, check in (
        (sgd, "check_added"),
        (sgd, "check_clipped_sum"),
        (sgd.NoiseWatch, "check"),
        (SelfCheck, "run"),
        (callback, "check_sampler"),
    ):
        monkeypatch.setattr(owner, check, lambda *args: None)
    monkeypatch.setattr(callback.DrawCheck, "problem", None)


@pytest.mark.parametrize("fault", BROKEN)
def test_the_attack_finds_what_is_broken(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    without_checks(monkeypatch)
    monkeypatch.setattr(sgd, *BROKEN[fault])
    errors, claimed = attack(NUM_CANARIES, 1.0)
    proven = proven_by_gaussian(errors)
    print(f"{fault}: proven {proven:.2f}, claimed {claimed:.2f}")
    assert proven > claimed


def test_the_attack_finds_batches_that_are_not_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    without_checks(monkeypatch)
    everything = lambda self: iter([list(range(self.num_examples))] * self.num_batches)  # noqa: E731
    monkeypatch.setattr(PoissonBatches, "__iter__", everything)
    errors, claimed = attack(NUM_CANARIES // 40, 4.0)
    proven = proven_by_gaussian([errors[0], errors[1]])
    print(f"all examples instead of a fortieth: proven {proven:.2f}, claimed {claimed:.2f}")
    assert proven > claimed
