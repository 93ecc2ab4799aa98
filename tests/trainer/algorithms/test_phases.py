"""Local training in several phases, and what algorithms that personalise make of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.algorithms import Ditto, FedAvg, FedRep, FedSGD
from lightning_fl.types import Phase
from tests.helpers.training import (
    Ordinary,
    Plain,
    Quadratic,
    image_clients,
    images,
    loader,
    minimise,
    quadratic_clients,
    trainer,
    weights,
)

CENTERS, STEEPNESS, LR = (0.0, 1.0, 4.0), (1.0, 2.0, 0.5), 0.1


def own_of(strategy: FederatedStrategy, client: int) -> dict[str, Tensor]:
    return strategy.active_driver.store.get(client)["personal"]


def own_values(strategy: FederatedStrategy, name: str = "x") -> list[float]:
    return [own_of(strategy, client)[name].item() for client in range(3)]


# ---- Ditto


class Dropout(Ordinary):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, nn.Dropout(0.3))


def test_the_global_model_of_ditto_and_its_metrics_are_those_of_fedavg() -> None:
    found = []
    for algorithm in (Ditto(), FedAvg()):
        module, losses = Dropout(), Losses()
        run = trainer(FederatedStrategy(algorithm, client_optimizer="keep"), 3, callbacks=[losses])
        run.fit(module, image_clients((5, 7, 23), validate=True))
        figures = {name: value.item() for name, value in run.callback_metrics.items() if "step" not in name}
        found.append((weights(module), figures, losses.seen))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


class Losses(fl.callbacks.FederatedCallback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        own = {name: value.clone() for name, value in module.state_dict().items()}
        self.seen.append(
            (client, run.loss, run.num_steps, run.lr_sum, run.num_examples, own["net.0.weight"].sum().item())
        )


@pytest.mark.parametrize("lam", [0.0, 0.5, 2.0])
def test_the_own_models_of_ditto_are_pulled_to_the_global_one(lam: float) -> None:
    strategy = FederatedStrategy(Ditto(lam=lam), local_steps=5)
    x = minimise(strategy, 3)
    expected_x, own = 10.0, [10.0] * 3
    for _ in range(3):
        ends = []
        for client, (e, h) in enumerate(zip(CENTERS, STEEPNESS, strict=True)):
            y, v = expected_x, own[client]
            for _ in range(5):
                y -= LR * h * (y - e)
                v -= LR * (h * (v - e) + lam * (v - expected_x))
            ends.append(y)
            own[client] = v
        expected_x = sum(p * y for p, y in zip((0.25, 0.5, 0.25), ends, strict=True))
    assert x == pytest.approx(expected_x, rel=1e-12)
    assert own_values(strategy) == pytest.approx(own, rel=1e-12)


def test_ditto_without_a_pull_is_local_training() -> None:
    strategy = FederatedStrategy(Ditto(lam=0.0), client_optimizer="keep")
    make = partial(Adam, lr=0.01)
    datasets = [images(n, seed) for seed, n in enumerate((5, 7, 23))]
    clients = fl.datamodules.ClientDatasets(datasets, batch_size=4, shuffle=False)
    trainer(strategy, 3).fit(Plain(make_optimizer=make), clients)
    for client, data in enumerate(datasets):
        alone = Plain(make_optimizer=make)
        trainer("auto", 3).fit(alone, torch.utils.data.DataLoader(data, batch_size=4))
        own = torch.cat([value.reshape(-1) for value in own_of(strategy, client).values()])
        torch.testing.assert_close(own, weights(alone), rtol=1e-10, atol=1e-12)


def test_a_late_client_begins_with_the_global_model_of_its_first_round() -> None:
    strategy = FederatedStrategy(Ditto(lam=0.0), local_steps=1, cohort=fl.clients.RoundRobin(), clients_per_round=1)
    minimise(strategy, 2)
    x = 10.0 - LR * STEEPNESS[0] * (10.0 - CENTERS[0])
    assert own_of(strategy, 1)["x"].item() == pytest.approx(x - LR * STEEPNESS[1] * (x - CENTERS[1]), rel=1e-12)


def test_load_client_gives_the_own_model() -> None:
    strategy, module = FederatedStrategy(Ditto()), Ordinary()
    callback = ModelCheckpoint("ckpt", save_last=True)
    run = trainer(strategy, 2, callbacks=[callback], enable_checkpointing=True, limit_val_batches=0)
    run.fit(module, image_clients(validate=True))
    for client in (0, 2):
        loaded = fl.load_client("ckpt/last.ckpt", client)
        own = own_of(strategy, client)
        assert loaded.keys() == module.state_dict().keys()
        assert own.keys() == {name for name in loaded if not name.endswith("_acc")}
        assert all(torch.equal(loaded[name], own[name]) for name in own)
        assert not torch.equal(loaded["net.0.weight"], module.net[0].weight)


class Explodes(Plain):
    """Its loss is NaN for a model that has moved far."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        far = (self.net[1].weight.detach() - self.start).norm() > 0.05 if hasattr(self, "start") else False
        return loss * float("nan") if far and batch[1].numel() == 1 else loss


def test_a_client_whose_own_model_is_not_finite_is_refused() -> None:
    module = Explodes()
    module.start = module.net[1].weight.detach().clone()
    strategy = FederatedStrategy(Ditto(lam=0.0, own_epochs=20))
    data = fl.datamodules.ClientDatasets([images(1), images(8, 1)], batch_size=None)
    with pytest.warns(UserWarning, match="the updates of 0 hold NaN or Inf"):
        trainer(strategy).fit(module, data)
    assert strategy.active_driver.store.clients() == [1]


def test_ditto_with_personal_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="Ditto keeps a whole model for each client"):
        trainer(FederatedStrategy("ditto", personal=["net.3.*"])).fit(Plain(), image_clients((8, 8)))


# ---- FedRep, FedPer, LG-FedAvg, FedBN


class Coupled(Quadratic):
    """F_i(x, head) = h_i / 2 (x + head - e_i)^2."""

    def __init__(self, start: float = 10.0, lr: float = 0.1) -> None:
        super().__init__(start, lr)
        self.head = nn.Parameter(torch.tensor([-3.0], dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        e, h = batch
        return (0.5 * h * (self.x + self.head - e) ** 2).mean()


@pytest.mark.parametrize("algorithm", [FedRep(head_epochs=3), "fedper", "lgfedavg"], ids=str)
def test_heads_and_body_take_the_papers_steps(algorithm: Any) -> None:
    strategy, rounds = FederatedStrategy(algorithm, local_steps=2, personal=["head"]), 4
    x = minimise(strategy, rounds, kind=Coupled)
    expected_x, heads = 10.0, [-3.0] * 3
    for _ in range(rounds):
        ends = []
        for client, (e, h) in enumerate(zip(CENTERS, STEEPNESS, strict=True)):
            y, b = expected_x, heads[client]
            for _ in range(3 if isinstance(algorithm, FedRep) else 0):
                b -= LR * h * (y + b - e)
            for _ in range(2):
                slope = h * (y + b - e)
                y, b = y - LR * slope, b if isinstance(algorithm, FedRep) else b - LR * slope
            ends.append(y)
            heads[client] = b
        expected_x = sum(p * y for p, y in zip((0.25, 0.5, 0.25), ends, strict=True))
    assert x == pytest.approx(expected_x, rel=1e-12)
    assert own_values(strategy, "head") == pytest.approx(heads, rel=1e-12)


@pytest.mark.parametrize("client_optimizer", ["reset", "keep"])
def test_what_a_phase_does_not_train_holds_still_whatever_the_optimizer_remembers(client_optimizer: Any) -> None:
    heads = []
    for rounds in (1, 2):
        strategy = FederatedStrategy(FedRep(head_epochs=2), personal=["net.3.*"], client_optimizer=client_optimizer)
        module, steps = Plain(make_optimizer=partial(Adam, lr=0.01, weight_decay=0.1)), StepWatch()
        trainer(strategy, rounds, callbacks=[steps]).fit(module, image_clients((8, 8)))
        assert steps.moved == [*[("net.3",)] * 4, *[("net.1",)] * 2] * 2 * rounds
        heads.append(own_of(strategy, 0)["net.3.weight"])
    assert not torch.equal(*heads)


class StepWatch(fl.callbacks.FederatedCallback):
    """Notes which layers each optimizer step has moved."""

    def __init__(self) -> None:
        self.moved: list[tuple[str, ...]] = []

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        layers = {"net.1": module.net[1].weight, "net.3": module.net[3].weight}

        def before(optimizer: Any, *_: Any) -> None:
            self.before = {name: value.detach().clone() for name, value in layers.items()}

        def after(optimizer: Any, *_: Any) -> None:
            self.moved.append(tuple(name for name in layers if not torch.equal(layers[name], self.before[name])))

        optimizer = trainer.optimizers[0]
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


@pytest.mark.parametrize("name", ["fedper", "lgfedavg", "fedrep"])
def test_without_personal_tensors_they_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"keeps a part of the model with each client, .* Name the .*personal=\['"):
        trainer(name).fit(Plain(), image_clients((8, 8)))


def test_fedbn_keeps_batchnorm_with_the_clients() -> None:
    strategy, module = FederatedStrategy("fedbn"), Ordinary()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(strategy, 2, limit_val_batches=0).fit(module, image_clients((8, 7, 23), validate=True))
    norm = {name for name in before if name.startswith("net.1.")}
    assert set(own_of(strategy, 0)) == norm
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) == (name in norm), name
    for name in ("net.1.weight", "net.1.running_mean"):
        assert not torch.equal(own_of(strategy, 0)[name], own_of(strategy, 1)[name])


def test_fedbn_without_batchnorm_is_refused() -> None:
    with pytest.raises(ValueError, match="the module has none"):
        trainer("fedbn").fit(Plain(), image_clients((8, 8)))


# ---- FedSGD


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_fedsgd_is_one_step_on_all_the_data_whatever_the_batches(options: dict[str, Any]) -> None:
    federated, central = Plain(), Plain()
    datasets = [images(n, seed) for seed, n in enumerate((5, 7, 23))]
    run = trainer("fedsgd", 3, **options)
    run.fit(federated, fl.datamodules.ClientDatasets(datasets, batch_size=3))
    everything = torch.utils.data.ConcatDataset(datasets)
    trainer("auto", 3).fit(central, torch.utils.data.DataLoader(everything, batch_size=35))
    torch.testing.assert_close(weights(federated), weights(central), rtol=1e-10, atol=1e-12)
    assert run.global_step == 9


@pytest.mark.parametrize("options", [{"local_epochs": 2}, {"local_steps": 3}], ids=str)
def test_local_work_that_would_be_ignored_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"FedSGD sets itself how much a client trains, so local_.* would be ignored"):
        FederatedStrategy("fedsgd", **options)


def test_fedsgd_with_personal_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="FedSGD steps with the gradient of the shared tensors"):
        trainer(FederatedStrategy(FedSGD(), personal=["net.3.*"])).fit(Plain(), image_clients((8, 8)))


# ---- phases of one's own


@dataclass(frozen=True)
class InPhases(FedAvg):
    phase_list: tuple[Phase, ...] = ()

    def phases(self) -> tuple[Phase, ...]:
        return self.phase_list


def test_phases_one_after_the_other_are_one_training_if_they_train_the_same() -> None:
    whole, halves = Plain(), Plain()
    trainer(FederatedStrategy("fedavg", local_epochs=3), 2).fit(whole, image_clients())
    algorithm = InPhases(phase_list=(Phase(epochs=1), Phase(("net.*",)), Phase("shared", epochs=1)))
    strategy = FederatedStrategy(algorithm)
    trainer(strategy, 2).fit(halves, image_clients())
    assert torch.equal(weights(halves), weights(whole))
    assert strategy.history[0]["num_steps"] == 3 * (1 + 2 + 6)


class Facts(fl.callbacks.FederatedCallback):
    def __init__(self) -> None:
        self.runs: list[Any] = []

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        self.runs.append(run)


def test_the_facts_of_a_run_are_those_of_what_is_sent() -> None:
    facts = Facts()
    algorithm = InPhases(phase_list=(Phase("net.1.*", steps=2), Phase(steps=3), Phase(steps=5, model="own")))
    run = trainer(FederatedStrategy(algorithm), callbacks=[facts])
    run.fit(Plain(lr=0.5), image_clients((8,)))
    (found,) = facts.runs
    assert found.lr_sum == {"net.1.weight": 2.5, "net.1.bias": 2.5, "net.3.weight": 1.5, "net.3.bias": 1.5}
    assert (found.num_steps, found.num_examples, found.normalizer) == (5, 8, None)
    assert run.global_step == 10


class Rates(fl.callbacks.FederatedCallback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_each_phase_starts_at_the_rounds_rate_and_the_longest_decides_where_the_next_round_starts() -> None:
    def make(params: Any) -> Any:
        optimizer = SGD(params, lr=1.0)
        schedule = StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    rates = Rates()
    strategy = FederatedStrategy(FedRep(head_epochs=2), personal=["net.3.*"])
    trainer(strategy, 2, callbacks=[rates]).fit(Plain(make_optimizer=make), image_clients((8,)))
    first = [1.0, 0.5, 0.25, 0.125, 1.0, 0.5]
    assert rates.rates == [*first, *(rate / 16 for rate in first)]


def test_estimated_steps_are_those_of_the_longest_phase() -> None:
    class Cycle(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=0.1)
            self.steps = self.trainer.estimated_stepping_batches
            schedule = OneCycleLR(optimizer, max_lr=0.2, total_steps=self.steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Cycle()
    trainer(FederatedStrategy(FedRep(head_epochs=2), personal=["net.3.*"]), 2).fit(module, image_clients((7, 23)))
    assert module.steps == 2 * 2 * 6


class WithoutLength:
    def __iter__(self) -> Iterator[Any]:
        return iter(loader(7))


def test_loaders_without_a_length_train_in_phases_too() -> None:
    sized, unsized = Plain(), Plain()
    for module, source in ((sized, loader(7)), (unsized, WithoutLength())):
        strategy = FederatedStrategy(FedRep(head_epochs=2), personal=["net.3.*"])
        clients = fl.datamodules.ClientLoaders({0: source, 1: loader(8, seed=1)})
        trainer(strategy, 2, accumulate_grad_batches=2).fit(module, clients)
        assert strategy.history[0]["num_steps"] == 2 * (2 * 1 + 1)
    assert torch.equal(weights(sized), weights(unsized))


class BreaksLater:
    """A loader that can be read twice."""

    def __init__(self) -> None:
        self.num_passes = 0

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Any]:
        self.num_passes += 1
        for index, batch in enumerate(loader(8)):
            if self.num_passes % 3 == 0 and index == 1:
                raise OSError("disk failed")
            yield batch


def test_a_client_whose_loader_raises_in_a_later_phase_is_left_out() -> None:
    module, without = Plain(), Plain()
    whole = {"a": loader(8, seed=1), "z": loader(8, seed=2)}
    for kept, broken in ((module, {"b": BreaksLater()}), (without, {})):
        strategy = FederatedStrategy(FedRep(head_epochs=2), personal=["net.3.*"], on_client_error="skip")
        run = trainer(strategy, 2)
        if broken:
            with pytest.warns(UserWarning, match="client 'b' raised OSError"):
                run.fit(kept, fl.datamodules.ClientLoaders({**whole, **broken}))
            assert [entry["failed"] for entry in strategy.history] == [["b"]] * 2
            assert strategy.active_driver.store.get("b") is None
        else:
            run.fit(kept, fl.datamodules.ClientLoaders(whole))
    torch.testing.assert_close(weights(module), weights(without), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((Phase("personal"), Phase()), "nothing to train: 'personal' is not a trainable parameter. Name some in"),
        ((Phase(("head.*",)),), r"\('head.\*',\) is not a trainable parameter"),
    ],
    ids=["personal", "glob"],
)
def test_a_phase_that_trains_nothing_is_refused(phases: tuple[Phase, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(FederatedStrategy(InPhases(phase_list=phases))).fit(Plain(), image_clients((8, 8)))


def test_phases_none_of_which_is_sent_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="InPhases has no phase that trains what is sent"):
        trainer(FederatedStrategy(InPhases(phase_list=(Phase(model="own"),)))).fit(Plain(), image_clients((8, 8)))


def test_the_clients_stop_at_the_end_of_the_round_not_of_a_phase() -> None:
    strategy = FederatedStrategy(Ditto(), local_steps=2)
    trainer(strategy, 5, max_steps=3).fit(Quadratic(), quadratic_clients())
    assert [entry["num_steps"] for entry in strategy.history] == [12]
