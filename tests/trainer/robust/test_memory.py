"""What robust rules remember of the rounds before: against NumPy, on ranks, in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_fl as fl
from lightning_fl.aggregation import Aggregator, CenteredClipping, FoolsGold, Median, NormCheck, Screened
from lightning_fl.aggregation.robust.foolsgold import foolsgold
from tests.helpers.training import trainer
from tests.trainer.robust.test_known_answers import A11, Sends, loaders

ROUNDS = 3
TABLE = np.stack(
    [np.array(A11) @ np.array([[1, 0.2 * t, 0], [0, 1, -0.3 * t], [0.5 * t, 0, 1]]) for t in range(ROUNDS)]
)
"""What each client sends in each round, ``[rounds, clients, 3]``."""


class Varying(Sends):
    """Sends another row in each round: an example holds those of all rounds."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return -(self.w * batch[0].view(ROUNDS, -1)[self.current_epoch]).sum()


def fit(rule: Aggregator, stops: Sequence[int] = (ROUNDS,), folder: str = "", **strategy: Any) -> list[float]:
    """The global model after the last of ``stops``, with a new Trainer and module after each of the others."""
    data, path = loaders(TABLE.transpose(1, 0, 2).reshape(11, -1).tolist(), torch.float64), None
    for stop in stops:
        module = Varying(3, torch.float64)
        settings = {"engine": "sequential", "seed": 0, **strategy}
        run = trainer(fl.FederatedStrategy("fedavg", aggregator=rule, **settings), stop)
        run.fit(module, data, ckpt_path=path)
        if folder:
            path = f"{folder}/{stop}.ckpt"
            run.save_checkpoint(path)
    return module.w.tolist()


def clipped(memory: bool) -> np.ndarray:
    w = v = np.zeros(3)
    for rows in TABLE:
        v = v if memory else np.zeros(3)
        for _ in range(2):
            apart = rows - v
            v = v + (apart * np.minimum(1, 0.3 / np.linalg.norm(apart, axis=1))[:, None]).mean(0)
        w = w + v
    return w


def fooled(memory: bool) -> np.ndarray:
    w, sums = np.zeros(3), np.zeros((11, 3))
    for rows in TABLE:
        sums = sums + rows if memory else rows
        unit = sums / np.linalg.norm(sums, axis=1)[:, None]
        weights = foolsgold(torch.from_numpy(unit @ unit.T)).numpy()
        w = w + weights @ rows / weights.sum()
    return w


RULES: dict[str, Any] = {
    "clipping": (lambda memory: CenteredClipping(0.3, 2, 1, memory=memory), clipped),
    "foolsgold": (lambda memory: FoolsGold(1, memory=memory), fooled),
}


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("name", RULES)
def test_the_rounds_before_count(name: str, engine: str) -> None:
    make, reference = RULES[name]
    for memory in (True, False):
        np.testing.assert_allclose(fit(make(memory), engine=engine), reference(memory), rtol=1e-9)
    assert np.abs(reference(True) - reference(False)).max() > 1e-3


def fit_on_ranks(name: str) -> list[float]:
    return fit(RULES[name][0](True))


@pytest.mark.parametrize("name", RULES)
def test_ranks_remember_the_same(run_ranks: Any, name: str) -> None:
    found = run_ranks(2, fit_on_ranks, name)
    assert found[0] == found[1]
    np.testing.assert_allclose(found[0], RULES[name][1](True), rtol=1e-9)


@pytest.mark.parametrize("clients_per_round", [None, 7])
@pytest.mark.parametrize("name", RULES)
def test_resuming_is_exact(name: str, clients_per_round: int | None, tmp_path: Path) -> None:
    rule = RULES[name][0](True)
    found = fit(rule, [1, 2, 3], str(tmp_path), clients_per_round=clients_per_round)
    assert found == fit(rule, clients_per_round=clients_per_round)
    # What is resumed is the memory: without it the end would be another.
    checkpoint = torch.load(tmp_path / "2.ckpt", weights_only=True)
    assert checkpoint["lightning_fl"]["memory"]
    checkpoint["lightning_fl"]["memory"] = {}
    torch.save(checkpoint, tmp_path / "2.ckpt")
    data, module = loaders(TABLE.transpose(1, 0, 2).reshape(11, -1).tolist(), torch.float64), Varying(3, torch.float64)
    strategy = fl.FederatedStrategy("fedavg", aggregator=rule, seed=0, clients_per_round=clients_per_round)
    trainer(strategy, 3).fit(module, data, ckpt_path=str(tmp_path / "2.ckpt"))
    assert np.abs(np.array(module.w.tolist()) - found).max() > 1e-6


def test_an_adversary_and_checks_leave_the_memory_of_the_rule_alone(tmp_path: Path) -> None:
    rule = Screened(CenteredClipping(0.3, 2, 1), [NormCheck(100.0)])
    np.testing.assert_allclose(fit(rule), clipped(True), rtol=1e-9)
    nobody = fl.attacks.Adversary(fl.attacks.SignFlip(), clients=0)
    np.testing.assert_allclose(fit(rule, [1, 3], str(tmp_path), adversary=nobody), clipped(True), rtol=1e-9)


def test_a_tensor_that_was_frozen_before_starts_from_zero() -> None:
    """Of a memory the entries that still fit are taken."""

    class Two(Sends):
        def __init__(self) -> None:
            super().__init__(3, torch.float64)
            self.other = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)

        def on_train_epoch_start(self) -> None:
            self.other.requires_grad_(self.current_epoch > 0)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) - 0 * self.other.sum()

    for rule, expected in ((CenteredClipping(1e6, 1, 1), 2), (FoolsGold(0), None)):
        module = Two()
        trainer(fl.FederatedStrategy("fedavg", aggregator=rule, engine="sequential"), 2).fit(
            module, loaders(A11, torch.float64)
        )
        assert module.other.item() == 0.0
        if expected:
            np.testing.assert_allclose(module.w.tolist(), expected * np.mean(A11, axis=0))


def test_what_can_not_be_remembered_is_refused() -> None:
    with pytest.raises(ValueError, match="FoolsGold keeps the sum of each client's updates"):
        FoolsGold(before=[fl.aggregation.NearestNeighborMixing()])
    FoolsGold(before=[fl.aggregation.NearestNeighborMixing()], memory=False)
    with pytest.raises(ValueError, match="clients that the checks left out"):
        Screened(FoolsGold())


def test_a_rule_without_memory_leaves_none(tmp_path: Path) -> None:
    fit(Median(1), [1], str(tmp_path))
    assert torch.load(tmp_path / "1.ckpt", weights_only=True)["lightning_fl"]["memory"] == {}
