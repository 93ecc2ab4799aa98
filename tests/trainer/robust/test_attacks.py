"""What attackers send, through one round of the real Trainer; who they are; what stays as it is without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl.aggregation import Aggregator, GeometricMedian, Krum, Median, MultiKrum, WeightedMean
from lightning_fl.attacks import (
    ALIE,
    IPM,
    Adversary,
    Attack,
    Backdoor,
    BackdoorSuccess,
    GaussianNoise,
    LabelFlip,
    Lazy,
    Mimic,
    MinMax,
    MinSum,
    Scaling,
    SemanticBackdoor,
    SignFlip,
    Trigger,
)
from lightning_fl.attacks.collusion import alie_z
from lightning_fl.privacy import SecureAggregation
from tests.helpers.training import Ordinary, Plain, image_clients, trainer, weights
from tests.trainer.robust.test_known_answers import A11, HONEST, U7, Sends, aggregate, loaders

ATTACKERS = (9, 10)
MU, SIGMA = HONEST.mean(0), HONEST.std(0)


def sent(attack: Attack, dtype: torch.dtype = torch.float64, offset: float = 0.0, **strategy: Any) -> np.ndarray:
    """What each of the two attackers sends while the nine others send the first rows of A11, both less the offset."""
    adversary = Adversary(attack, clients=ATTACKERS)
    mean, _ = aggregate(WeightedMean(), A11, dtype, offset, adversary=adversary, **strategy)
    return (11 * np.array(mean) - HONEST.sum(0)) / 2


def direction(name: str) -> np.ndarray:
    return {"unit": -MU / np.linalg.norm(MU), "sign": -np.sign(MU), "std": -SIGMA}[name]


GAMMAS = {
    (MinMax, "unit"): 1.7492401282,
    (MinMax, "sign"): 1.0333111092,
    (MinMax, "std"): 1.0727894211,
    (MinSum, "unit"): 1.7058702126,
    (MinSum, "sign"): 0.9848846264,
    (MinSum, "std"): 1.3452785085,
}
CRAFTED: dict[str, tuple[Attack, np.ndarray]] = {
    "alie": (ALIE(), MU - 0.1397102988 * SIGMA),
    "alie z": (ALIE(1.5), MU - 1.5 * SIGMA),
    "ipm": (IPM(10.0), -10 * MU),
    "sign": (SignFlip(5.0), -5 * (MU + 3)),
    "replacement": (Scaling(), 5.5 * (MU + 3)),
    "scaling": (Scaling(3.0), 3 * (MU + 3)),
    "lazy": (Lazy(), 0 * MU),
    **{
        f"{kind.__name__} {name}": (kind(name), MU + gamma * direction(name))  # type: ignore[arg-type]
        for (kind, name), gamma in GAMMAS.items()
    },
}


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("name", CRAFTED)
@pytest.mark.spread(9)
def test_attackers_send_what_the_paper_says(name: str, engine: str) -> None:
    attack, expected = CRAFTED[name]
    np.testing.assert_allclose(sent(attack, engine=engine), expected, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(sent(attack, torch.float32, engine=engine), expected, rtol=1e-4, atol=1e-4)


MOVING = ("alie", "alie z", "MinMax std", "MinSum std")
"""Attacks that move with the updates, so that a common offset of all must not matter."""


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.spread(3)
def test_neither_float32_nor_an_offset_changes_what_they_send(name: str, engine: str) -> None:
    attack, expected = CRAFTED[name]
    np.testing.assert_allclose(sent(attack, offset=100.0, engine=engine), expected, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(sent(attack, torch.float32, 100.0, engine=engine), expected, rtol=0, atol=1e-3)


def sent_on_ranks(engine: str = "sequential") -> dict[str, list[list[float]]]:
    return {
        name: [sent(attack, dtype, engine=engine).tolist() for dtype in (torch.float64, torch.float32)]
        for name, (attack, _) in CRAFTED.items()
    }


@pytest.mark.parametrize("engine", ["sequential", pytest.param("vectorized", marks=pytest.mark.slow)])
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_ranks_craft_the_same(run_ranks: Any, world_size: int, engine: str) -> None:
    for found in run_ranks(world_size, sent_on_ranks, engine):
        for name, (_, expected) in CRAFTED.items():
            exact, rounded = found[name]
            np.testing.assert_allclose(exact, expected, rtol=1e-8, atol=1e-9)
            np.testing.assert_allclose(rounded, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*CRAFTED, "noise", "mimic"])
@pytest.mark.spread(3)
def test_a_resumed_attack_is_the_same(name: str, tmp_path: Path) -> None:
    attack = CRAFTED[name][0] if name in CRAFTED else {"noise": GaussianNoise(), "mimic": Mimic()}[name]
    found = []
    for stops in ((3,), (1, 3)):
        path = None
        for stop in stops:
            module = Sends(3, torch.float64)
            strategy = fl.FederatedStrategy("fedavg", adversary=Adversary(attack, clients=ATTACKERS), seed=0)
            fit = trainer(strategy, stop)
            fit.fit(module, loaders(A11, torch.float64), ckpt_path=path)
            path = str(tmp_path / f"{stop}.ckpt")
            fit.save_checkpoint(path)
        found.append(module.w.tolist())
    assert found[0] == found[1]
    if name in CRAFTED:
        np.testing.assert_allclose(
            (11 * np.array(found[0]) / 3 - HONEST.sum(0)) / 2, CRAFTED[name][1], rtol=1e-8, atol=1e-8
        )


def test_the_numbers_behind_alie() -> None:
    for (n, f), z in {
        (11, 2): 0.1397102988,
        (20, 4): 0.1573106847,
        (50, 24): 1.4261,
        (51, 24): 1.4461,
        (50, 12): 0.3360,
        (25, 5): 0.2533,
    }.items():
        assert alie_z(n, f) == pytest.approx(z, abs=5e-5 if n > 20 else 1e-9)
    with pytest.raises(ValueError, match="at most half"):
        alie_z(10, 6)


def test_min_max_stays_within_the_spread_of_the_others() -> None:
    """Exactly: a step further would leave it."""
    apart = np.linalg.norm(HONEST[:, None] - HONEST, axis=2)
    for name in ("unit", "sign", "std"):
        reach = np.linalg.norm(sent(MinMax(name)) - HONEST, axis=1).max()  # type: ignore[arg-type]
        assert reach == pytest.approx(apart.max(), rel=1e-9)
        total = (np.linalg.norm(sent(MinSum(name)) - HONEST, axis=1) ** 2).sum()  # type: ignore[arg-type]
        assert total == pytest.approx((apart**2).sum(1).max(), rel=1e-9)


def test_the_mean_turns_round_beyond_its_threshold() -> None:
    """At epsilon (n - f) / f = 4.5 the mean vanishes."""
    for epsilon, sign in ((4.0, 1), (5.0, -1)):
        adversary = Adversary(IPM(epsilon), clients=ATTACKERS)
        mean, _ = aggregate(WeightedMean(), A11, adversary=adversary)
        assert np.sign(np.array(mean) @ MU) == sign


def test_mimic_sends_the_update_of_an_honest_client() -> None:
    copied = sent(Mimic())
    assert np.abs(HONEST - copied).sum(1).min() < 1e-9


def test_noise_is_drawn_anew_for_each_client_and_repeats_with_the_seed() -> None:
    adversary = Adversary(GaussianNoise(100.0), clients=ATTACKERS)
    first, again = (aggregate(Median(2), A11, adversary=adversary)[0] for _ in range(2))
    assert first == again
    assert np.abs(sent(GaussianNoise(100.0))).max() > 10


def test_an_attack_that_overflows_is_refused_as_an_update_with_inf() -> None:
    adversary = Adversary(Scaling(1e300), clients=[6])
    rows = [*U7[:6], (1e10, -1e10)]
    with pytest.warns(UserWarning, match="the updates of 6 hold NaN or Inf"):
        found, history = aggregate(WeightedMean(), rows, torch.float32, adversary=adversary)
    np.testing.assert_allclose(found, np.mean(U7[:6], axis=0), rtol=1e-6)
    assert history["refused"] == [6]


def test_attackers_are_drawn_by_the_seed_and_counted() -> None:
    adversary = Adversary(SignFlip(), clients=0.2)
    ids = [f"hospital {i}" for i in range(20)]
    drawn = {seed: adversary.attackers(ids, seed) for seed in range(5)}
    assert all(len(own) == 4 for own in drawn.values())
    assert len(set(drawn.values())) > 1
    assert adversary.attackers(list(reversed(ids)), 3) == drawn[3]
    assert Adversary(SignFlip(), clients=3).attackers(ids, 0).__len__() == 3
    assert Adversary(SignFlip(), clients=["hospital 3"]).attackers(ids, 0) == {"hospital 3"}
    for wrong, message in ((["nobody"], "is not a client"), (21, "21 attackers")):
        with pytest.raises(ValueError, match=message):
            Adversary(SignFlip(), clients=wrong).attackers(ids, 0)


def test_history_tells_how_much_fell_to_attackers() -> None:
    for aggregator, share in ((WeightedMean(), 2 / 11), (Krum(2), 0.0), (MultiKrum(0), 2 / 11), (Median(2), None)):
        _, history = aggregate(aggregator, A11, adversary=Adversary(SignFlip(5.0), clients=ATTACKERS))
        assert history["attackers"] == 2
        assert history.get("attack_share") == (share if share is None else pytest.approx(share))


def run(rounds: int = 3, aggregator: Aggregator | None = None, **strategy: Any) -> torch.Tensor:
    module = Ordinary()
    settings = {"engine": "sequential", "seed": 0, **strategy}
    fit = trainer(fl.FederatedStrategy("fedavg", aggregator=aggregator, **settings), rounds)
    fit.fit(module, image_clients((4, 7, 23, 8, 5), validate=True))
    return weights(module)


@pytest.mark.parametrize("aggregator", [None, GeometricMedian(1)])
@pytest.mark.spread(1)
def test_before_they_start_and_where_there_are_none_nothing_changes(aggregator: Aggregator | None) -> None:
    plain = run(aggregator=aggregator)
    for adversary in (Adversary(SignFlip(), clients=0), Adversary(SignFlip(), clients=2, start=3)):
        assert torch.equal(run(aggregator=aggregator, adversary=adversary), plain)
    attacked = run(aggregator=aggregator, adversary=Adversary(SignFlip(), clients=2, start=2))
    assert not torch.equal(attacked, plain)


def test_attackers_skip_clipping() -> None:
    class Clip(fl.aggregation.Transform):
        def client(self, update: Any, state: Any, ctx: Any) -> Any:
            norm = sum(tensor.square().sum() for tensor in update.delta.values()).sqrt()
            return update.map(lambda tensor: tensor * (1.0 / max(1.0, float(norm)))), state

    adversary = Adversary(SignFlip(100.0), clients=[6])
    found, _ = aggregate(WeightedMean(), U7, adversary=adversary, transforms=[Clip()])
    assert np.linalg.norm(found) > 10


def test_silos_secure_sums_and_wrong_arguments_are_refused(run_ranks: Any) -> None:
    adversary = Adversary(SignFlip())
    with pytest.raises(ValueError, match="SecureAggregation hides"):
        fl.FederatedStrategy("fedavg", aggregator=SecureAggregation(), adversary=adversary)
    with pytest.raises(ValueError, match=r"adversary='krum'.* expected fl\.attacks\.Adversary"):
        fl.FederatedStrategy("fedavg", adversary="krum")  # type: ignore[arg-type]
    for wrong, message in (
        ({"clients": 1.5}, "share from 0 to 1"),
        ({"start": -1}, "start=-1"),
        ({"attack": LabelFlip(), "start": 2}, "0 for an attack on data"),
        ({"attack": "sign"}, "must be an attack"),
    ):
        with pytest.raises(ValueError, match=message):
            Adversary(**{"attack": SignFlip(), **wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share=0"):
        Backdoor(share=0.0)
    with pytest.raises(Exception, match="An adversary is for simulations"):
        run_ranks(2, attack_among_silos)


def attack_among_silos() -> None:
    strategy = fl.FederatedStrategy("fedavg", adversary=Adversary(SignFlip()))
    data = TensorDataset(torch.ones(2, 1, 4, 4), torch.ones(2, dtype=torch.long))
    trainer(strategy).fit(Plain(), DataLoader(data))


# ---- data


def test_data_attacks_change_what_they_say() -> None:
    x, y, generator = torch.zeros(1, 4, 4), torch.tensor(3), torch.Generator()
    assert int(LabelFlip(10).poison(x, y, generator)[1]) == 6
    assert int(LabelFlip(source=3, target=5).poison(x, y, generator)[1]) == 5
    assert int(LabelFlip(source=4, target=5).poison(x, y, generator)[1]) == 3
    assert int(SemanticBackdoor(3, 1).poison(x, y, generator)[1]) == 1
    marked, label = Backdoor(share=1.0).poison(x, y, generator)
    assert (int(label), marked.sum().item(), marked[0, 2:, 2:].sum().item(), x.sum().item()) == (0, 4.0, 4.0, 0.0)
    assert Trigger(1, 9.0)(torch.zeros(5, 1, 3, 3))[:, 0, 2, 2].tolist() == [9.0] * 5


def test_an_attacker_reads_poisoned_examples_and_the_others_their_own() -> None:
    data = [DataLoader(TensorDataset(torch.zeros(100, 1, 4, 4), torch.full((100,), 3)), batch_size=10)] * 3
    adversary = Adversary(Backdoor(share=0.5), clients=[1])
    loaders = adversary.wrap_loaders(fl.datamodules.ClientLoaders(data), seed=0)
    labels = {client: torch.cat([y for _, y in loader]) for client, loader in loaders.items()}
    assert (labels[0] == 3).all()
    assert (labels[2] == 3).all()
    assert 30 < int((labels[1] == 0).sum()) < 70
    again = torch.cat([y for _, y in loaders[1]])
    assert int((again == 0).sum()) == int((labels[1] == 0).sum())


def test_a_stream_can_not_be_poisoned() -> None:
    loaders = fl.datamodules.ClientLoaders([[(torch.zeros(1), torch.zeros(1))]])
    with pytest.raises(ValueError, match="can't be indexed"):
        Adversary(LabelFlip(), clients=1).wrap_loaders(loaders, 0)[0]


def test_the_success_of_a_backdoor_is_counted_without_the_target_class() -> None:
    class Obeys(Ordinary):
        """Calls an image with a white corner 0, and all others 1."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            marked = (x[:, 0, -1, -1] == 1).float()
            return torch.stack([marked, 1 - marked, *[torch.zeros_like(marked)] * 2], dim=1)

    for trigger, expected in ((Trigger(), 1.0), (None, 0.0)):
        fit = trainer("fedavg", callbacks=[BackdoorSuccess(trigger, target=0)])
        fit.fit(Obeys(), image_clients((4, 7), validate=True))
        assert fit.callback_metrics["backdoor_success"].item() == expected


def test_yaml_gives_an_adversary(tmp_path: Any) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(fl.FederatedStrategy, "strategy", skip={"algorithm"})
    adversary = {"class_path": "lightning_fl.attacks.Adversary", "init_args": {"attack": {"class_path": "ALIE"}}}
    config = parser.parse_object({"strategy": {"adversary": adversary}})
    found = parser.instantiate_classes(config).strategy
    assert repr(found.adversary) == "Adversary(ALIE(z=None), clients=0.2, start=0)"
