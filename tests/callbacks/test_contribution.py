"""What clients contribute: known games, and a round of quadratics through the Trainer."""

from __future__ import annotations

import json
import re
from html import unescape
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.callbacks.contribution import fedce, gtg_shapley, leave_one_out, shapley
from lightning_fl.tracking import Run
from lightning_fl.tracking.report import render
from tests.helpers.training import Quadratic, trainer

SHAPLEY = [10.3020830515, 19.6419089387, -1.1548812764]
LEFT_OUT = [-0.0631149346, 10.9361692220, -5.8007438142]


def gloves(members: frozenset[int]) -> float:
    """One has a left glove, two have a right one; a pair is worth 1."""
    return float(0 in members and len(members) > 1)


def test_the_glove_game() -> None:
    assert shapley(3, gloves) == pytest.approx([2 / 3, 1 / 6, 1 / 6])
    assert leave_one_out(3, gloves) == [1.0, 0.0, 0.0]
    found = gtg_shapley(3, gloves, np.random.default_rng(0), tolerance=0.0, orders=3000)
    assert found == pytest.approx([2 / 3, 1 / 6, 1 / 6], abs=0.03)


def test_gtg_tries_nothing_in_a_round_without_gain() -> None:
    asked = []

    def value(members: frozenset[int]) -> float:
        asked.append(members)
        return 1.0

    assert gtg_shapley(4, value, np.random.default_rng(0)) == [0.0] * 4
    assert len(asked) == 2


def test_fedce_by_hand() -> None:
    updates = [(1.0, {"x": torch.tensor([1.0, 0.0])}), (2.0, {"x": torch.tensor([0.0, 1.0])})]
    updates.append((1.0, {"x": torch.tensor([0.0, -1.0])}))
    # The others' sums are (0, 1), (1, -1) and (1, 2).
    angles = [1.0, 1 + 1 / 2**0.5, 1 + 2 / 5**0.5]
    found = fedce(updates, [3.0, 1.0, -2.0])
    errors = [0.75, 0.25, 0.0]
    expected = [(angle / sum(angles) + error) / 2 for angle, error in zip(angles, errors, strict=True)]
    assert found == pytest.approx(expected, rel=1e-9)
    assert sum(found) == pytest.approx(1.0)
    same = [(1.0, {"x": torch.ones(2)})] * 4
    assert fedce(same, [0.0] * 4) == pytest.approx([0.25] * 4)


class Rooted(Quadratic):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        (e,) = batch
        self.log("val_loss", (0.5 * (self.x - e) ** 2).mean(), on_epoch=True)


def clients_of(e: Any, h: Any, sizes: Any) -> fl.datamodules.ClientDatasets:
    def full(value: float, size: int) -> Tensor:
        return torch.full((size,), value, dtype=torch.float64)

    sets = [TensorDataset(full(a, size), full(b, size)) for a, b, size in zip(e, h, sizes, strict=True)]
    return fl.datamodules.ClientDatasets(sets, val=TensorDataset(full(1.0, 4)), batch_size=None)


E, H = (0.0, 1.0, 4.0), (1.0, 2.0, 0.5)


def measure(method: str, rounds: int = 1, **kwargs: Any) -> tuple[fl.callbacks.Contribution, L.Trainer, float]:
    callback, module = fl.callbacks.Contribution(method=method, **kwargs), Rooted()
    fit = trainer(FederatedStrategy("fedavg", local_steps=5), rounds, callbacks=[callback])
    fit.fit(module, clients_of(E, H, (10, 30, 20)))
    return callback, fit, module.x.item()


@pytest.mark.parametrize(("method", "expected"), [("shapley", SHAPLEY), ("leave_one_out", LEFT_OUT)])
def test_a_round_has_the_known_contributions(method: str, expected: list[float]) -> None:
    callback, fit, x = measure(method)
    assert list(callback.totals.values()) == pytest.approx(expected, rel=1e-8)
    history = fit.strategy.history[-1]
    assert [history[f"contribution/{client}"] for client in range(3)] == pytest.approx(expected, rel=1e-8)
    assert fit.callback_metrics["contribution/1"].item() == pytest.approx(expected[1], rel=1e-8)
    plain = Rooted()
    trainer(FederatedStrategy("fedavg", local_steps=5), 1).fit(plain, clients_of(E, H, (10, 30, 20)))
    assert x == pytest.approx(plain.x.item(), rel=1e-12)  # measuring has not changed the model
    if method == "shapley":
        assert sum(callback.totals.values()) == pytest.approx(28.7891107137, rel=1e-9)


def test_a_second_run_begins_anew() -> None:
    callback = fl.callbacks.Contribution(method="leave_one_out")
    for _ in range(2):
        fit = trainer(FederatedStrategy("fedavg", local_steps=5), 1, callbacks=[callback])
        fit.fit(Rooted(), clients_of(E, H, (10, 30, 20)))
    assert list(callback.totals.values()) == pytest.approx(LEFT_OUT, rel=1e-8)


def test_root_data_of_its_own() -> None:
    root = DataLoader(TensorDataset(torch.full((4,), 3.0, dtype=torch.float64)), batch_size=2)
    assert measure("shapley")[0].totals != measure("shapley", root=root)[0].totals


def test_gtg_is_near_the_exact_shares() -> None:
    callback, _, _ = measure("gtg", orders=60)
    assert list(callback.totals.values()) == pytest.approx(SHAPLEY, abs=3.0)


def test_only_every_other_round_is_measured() -> None:
    _, fit, _ = measure("leave_one_out", rounds=3, every_n_rounds=2)
    assert ["contribution/0" in entry for entry in fit.strategy.history] == [False, True, False]


def test_fedce_favours_who_points_elsewhere_and_is_missed() -> None:
    callback, fit, _ = measure("fedce", rounds=2)
    history = fit.strategy.history
    assert [sum(entry[f"contribution/{client}"] for client in range(3)) for entry in history] == [
        pytest.approx(1.0),
        pytest.approx(1.0),
    ]
    assert sum(callback.totals.values()) == pytest.approx(2.0)
    # Without client 1, whose optimum is that of the root data, the model is furthest from it.
    assert max(callback.totals, key=lambda client: callback.totals[client]) == 1


@pytest.mark.slow
class Named(Rooted):
    """Logs the loss and its negative under names that do not tell which is better."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        (e,) = batch
        loss = (0.5 * (self.x - e) ** 2).mean()
        self.log_dict({"val_less": loss, "val_more": -loss, "val_score_loss": loss}, on_epoch=True)


def test_its_sign_is_declared_or_known() -> None:
    def measured(metric: str, *more: L.Callback, **kwargs: Any) -> list[float]:
        callback = fl.callbacks.Contribution(metric=metric, method="leave_one_out", **kwargs)
        fit = trainer(
            FederatedStrategy("fedavg", local_steps=5), 1, callbacks=[callback, *more], enable_checkpointing=bool(more)
        )
        fit.fit(Named(), clients_of(E, H, (10, 30, 20)))
        return list(callback.totals.values())

    expected = pytest.approx(LEFT_OUT, rel=1e-8)
    assert measured("val_less", mode="min") == expected
    assert measured("val_more", mode="max") == expected
    assert measured("val_more", ModelCheckpoint("saved", monitor="val_more", mode="max")) == expected
    assert measured("val_score_loss") == expected
    with pytest.raises(MisconfigurationException, match=r"more of 'val_less' is better.* Give it mode='max' or"):
        measured("val_less")
    with pytest.raises(ValueError, match="expected 'min', 'max' or None"):
        fl.callbacks.Contribution(mode="more")  # type: ignore[arg-type]


def test_the_report_shows_who_contributes_what() -> None:
    record, callback = fl.callbacks.RunRecord("run"), fl.callbacks.Contribution()
    strategy = FederatedStrategy("fedavg", local_steps=5)
    trainer(strategy, 3, callbacks=[callback, record]).fit(Rooted(), clients_of(E, H, (10, 30, 20)))
    page = render(Run.read("run"))
    assert "Contributions of clients" in page
    for client, share in callback.totals.items():
        row = f'<tr><td>{client}</td><td class="number">{share:.4g}</td><td class="number">3</td></tr>'
        assert row in page
    (content,) = re.findall(
        'data-part="curves" data-x="round" data-y="sum of contributions" data-content="([^"]+)"', page
    )
    for line in json.loads(unescape(content)):
        shares = [entry[f"contribution/{line['name']}"] for entry in strategy.history]
        assert line["y"] == pytest.approx(np.cumsum(shares).tolist())
    plain = fl.callbacks.RunRecord("plain")
    trainer("fedavg", 1, callbacks=[plain]).fit(Rooted(), clients_of(E, H, (10, 30, 20)))
    assert "Contributions of clients" not in render(Run.read("plain"))


def totals() -> Tensor:
    return torch.tensor(list(measure("shapley", rounds=2)[0].totals.values()))


def test_ranks_measure_what_one_does(run_ranks: Any) -> None:
    expected = totals()
    for found in run_ranks(2, totals):
        torch.testing.assert_close(found, expected)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="shapley"):
        fl.callbacks.Contribution(method="banzhaf")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="val_loss"):
        measure("shapley", metric="val_acc")
    many = clients_of((1.0,) * 11, (1.0,) * 11, (1,) * 11)
    with pytest.raises(MisconfigurationException, match="this round has 11"):
        trainer("fedavg", callbacks=[fl.callbacks.Contribution()]).fit(Rooted(), many)
    for strategy, match in [
        (FederatedStrategy("fedavg", transforms=[fl.privacy.ClientLevelDP(1.0, 1.0)]), "Contribution"),
        (FederatedStrategy("dsgd"), "DSGD has one model per client"),
    ]:
        with pytest.raises(MisconfigurationException, match=match):
            trainer(strategy, callbacks=[fl.callbacks.Contribution()]).fit(Rooted(), clients_of(E, H, (1, 1, 1)))
