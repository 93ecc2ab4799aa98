"""An attack on the shipped transform through ``Trainer.fit``: what it proves stays below the claimed epsilon.

Each client holds a canary, a coordinate of its own that it pushes as far as the clip lets it, up in the first round and
down in the second. Whether it takes part (or, in local mode, in which direction it pushes) is decided by a coin. The
attacker guesses all coins from what is released. The errors of its guesses, with their 99.9% confidence limits, bound
from below how far apart the two cases are, and so epsilon: the shipped code must stay below its claim, and broken
noise or clipping must be caught above it.

Reference:
    Nasr et al., "Tight Auditing of Differentially Private Machine Learning", USENIX Security 2023.
"""

from __future__ import annotations

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
from lightning_fl.privacy import ClientLevelDP, Gaussian, Ledger, SecureNoise
from lightning_fl.privacy.client_level import mechanism
from lightning_fl.privacy.noise import add_noise
from tests.helpers.training import trainer

pytestmark = pytest.mark.slow
NUM_CANARIES, CLIP, DELTA = 400, 0.5, 1e-5
COINS = torch.randint(2, (NUM_CANARIES,), generator=torch.Generator().manual_seed(0)).double()


class Canaries(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(NUM_CANARIES, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index, push = (column[0] for column in batch)
        return -10 * CLIP * push * (-1) ** self.current_epoch * self.x[index]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Eavesdrop(fl.callbacks.FederatedCallback):
    """What the adversary of each mode sees of each canary's coordinate, round by round, in units of the clip norm."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.seen = torch.zeros(2, NUM_CANARIES, dtype=torch.float64)

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        if self.mode == "local":
            self.seen[trainer.current_epoch, client] = update.delta["x"][client] / CLIP

    def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Any) -> None:
        if self.mode == "central":
            self.seen[trainer.current_epoch] = aggregate.delta["x"] / CLIP


def scores(transform: ClientLevelDP) -> Tensor:
    """How much each canary's coordinate has moved, up less down, in units of the clip norm."""
    push = COINS if transform.mode == "central" else 2 * COINS - 1
    data = [TensorDataset(torch.tensor([index]), value[None]) for index, value in enumerate(push)]
    clients = fl.datamodules.ClientLoaders([DataLoader(own) for own in data])
    watch = Eavesdrop(transform.mode)
    trainer(FederatedStrategy("fedavg", transforms=[transform]), 2, callbacks=[watch]).fit(Canaries(), clients)
    return (watch.seen[0] - watch.seen[1]) / 2


def upper_limit(errors: int, trials: int) -> float:
    return float(beta.ppf(1 - 0.0005, errors + 1, trials - errors)) if errors < trials else 1.0


def proven_epsilon(transform: ClientLevelDP) -> float:
    """An epsilon that the attack proves to be exceeded, at 99.9% confidence."""
    found = scores(transform)
    guesses = found > (0.5 if transform.mode == "central" else 0.0)
    wrong = {coin: int((guesses != coin)[coin == COINS].sum()) for coin in (0, 1)}
    limits = [upper_limit(wrong[coin], int((coin == COINS).sum())) for coin in (0, 1)]
    separation = float(sum(norm.isf(limit) for limit in limits))
    if separation <= 0:
        return 0.0
    ledger = Ledger()
    ledger.record(Gaussian(1 / separation))
    return ledger.epsilon(DELTA)


def claimed_epsilon(transform: ClientLevelDP) -> float:
    ledger = Ledger()
    ledger.record(Gaussian(transform.noise_multiplier), 2)
    return ledger.epsilon(DELTA, relation="replace_one" if transform.mode == "local" else None)


@pytest.mark.parametrize(
    ("mode", "noise_multiplier", "least_share"), [("central", 1.0, 0.2), ("central", 2.0, -1.0), ("local", 2.0, 0.2)]
)
def test_the_attack_stays_below_the_claim(mode: Any, noise_multiplier: float, least_share: float) -> None:
    transform = ClientLevelDP(clip=CLIP, noise_multiplier=noise_multiplier, mode=mode)
    proven, claimed = proven_epsilon(transform), claimed_epsilon(transform)
    print(f"{mode}, noise multiplier {noise_multiplier}: proven {proven:.2f}, claimed {claimed:.2f}")
    assert least_share * claimed < proven <= claimed


def halved(flat: Any, std: float, source: SecureNoise) -> Any:
    return add_noise(flat, std / 2, source)


def repeated(flat: Any, std: float, source: SecureNoise) -> Any:
    return add_noise(flat, std, SecureNoise(0, len(flat)))


BROKEN: dict[str, tuple[str, Callable[..., Any]]] = {
    "noise off": ("add_noise", lambda flat, std, source: flat),
    "noise halved": ("add_noise", halved),
    "noise repeats": ("add_noise", repeated),
    "clipping off": ("clip_update", lambda update, clip: update),
}


@pytest.mark.parametrize("mode", ["central", "local"])
@pytest.mark.parametrize("fault", BROKEN)
def test_the_attack_finds_what_is_broken(monkeypatch: pytest.MonkeyPatch, fault: str, mode: Any) -> None:
    name, broken = BROKEN[fault]
    monkeypatch.setattr(mechanism, name, broken)
    for check in ("check_added", "check_clipped"):
        monkeypatch.setattr(mechanism, check, lambda *args: None)
    transform = ClientLevelDP(clip=CLIP, noise_multiplier=1.0 if mode == "central" else 2.0, mode=mode)
    proven, claimed = proven_epsilon(transform), claimed_epsilon(transform)
    print(f"{mode}, {fault}: proven {proven:.2f}, claimed {claimed:.2f}")
    assert proven > claimed
