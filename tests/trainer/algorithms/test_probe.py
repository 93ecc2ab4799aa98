"""A pass over each client's data before its training: right, and without a trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.algorithms import FedAvg, ProbeKind
from lightning_fl.federation import Round
from lightning_fl.strategies import internals as internals
from lightning_fl.strategies.validation import check_algorithm
from lightning_fl.types import Context, LocalRun, State, Tree, Update
from tests.helpers.training import Ordinary, Plain, Quadratic, image_clients, images, loader, trainer, weights


@dataclass(frozen=True)
class Measures(FedAvg):
    """Federated averaging whose clients keep what was measured."""

    kind: ProbeKind = "grad"
    keeps_client_state = True

    @property
    def probe(self) -> ProbeKind:  # type: ignore[override]
        return self.kind

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        return {"params": server["params"], "probe": probe}

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        return super().client_finish(params, ctx, client, run)[0], {"probe": ctx["probe"]}


def measured(kind: ProbeKind, module: Any, data: Any, max_epochs: int = 1, personal: Any = (), **options: Any) -> list:
    strategy = FederatedStrategy(Measures(kind=kind), personal=personal)
    trainer(strategy, max_epochs, **options).fit(module, data)
    store = strategy.active_driver.store
    return [store.get(client)["algorithm"]["probe"] for client in sorted(store.clients())]


class Random(Ordinary):
    """Draws from every generator, counts in buffers that travel and that don't, and logs by step and by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, nn.Dropout(0.3))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.scratch += 1
        self.seen = self.seen + 1
        loss = super().training_step(batch, batch_idx) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
        self.log("scratch", self.scratch, on_step=True, on_epoch=True)
        return loss


class Witness(fl.callbacks.FederatedCallback):
    """Writes down what callbacks and loggers see."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(("start", batch_idx, trainer.global_step, batch[0].sum().item()))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        figures = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.seen.append(("end", batch_idx, trainer.global_step, outputs["loss"].item(), figures))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: LocalRun, update: Any) -> None:
        self.seen.append((client, run.num_steps, run.num_examples, run.loss, module.scratch.item()))


class Records(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.records.append(
            (step, {name: value for name, value in metrics.items() if not name.startswith("fl/seconds")})
        )


@pytest.mark.parametrize("kind", ["loss", "grad"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"limit_train_batches": 2}], ids=str)
@pytest.mark.spread(2)
def test_training_is_what_it_is_without_a_probe(kind: ProbeKind, options: dict[str, Any]) -> None:
    probed, plain = train(Measures(kind=kind), **options), train(FedAvg(), **options)
    assert torch.equal(probed[0], plain[0])
    assert probed[1] == plain[1]
    assert probed[2] == plain[2]
    assert torch.equal(probed[3], plain[3])


def test_a_probe_that_leaves_a_trace_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def inside_training(trainer: L.Trainer, training: bool) -> Iterator[Any]:
        trainer.lightning_module._current_fx_name = "training_step"
        yield internals.train_results(trainer)

    plain = train(FedAvg())
    monkeypatch.setattr("lightning_fl.strategies.probe.out_of_loop", inside_training)
    probed = train(Measures())
    assert torch.equal(probed[0], plain[0])  # the weights start anew
    assert probed[1] != plain[1]
    assert probed[2] != plain[2]


def test_a_probe_that_draws_from_the_trainings_randomness_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(FedAvg())
    seed = Round._seed

    def careless(self: Round, index: int, client: Any, loader: Any, number: int, purpose: str = "client") -> None:
        if purpose == "client" and not self._randomness._saved:  # not again after the probe
            seed(self, index, client, loader, number, purpose)

    monkeypatch.setattr(Round, "_seed", careless)
    assert not torch.equal(train(Measures())[0], plain[0])


def train(algorithm: FedAvg, **options: Any) -> tuple[Tensor, list[Any], list[Any], Any]:
    torch.manual_seed(1)
    module, witness, logger = Random(), Witness(), Records()
    run = trainer(FederatedStrategy(algorithm), 2, callbacks=[witness], log_every_n_steps=1, **options, logger=logger)
    run.fit(module, image_clients((5, 7, 23), validate=True))
    return weights(module), witness.seen, logger.records, torch.get_rng_state()


CENTERS, STEEPNESS = torch.arange(7.0).double(), torch.linspace(0.5, 2.0, 7).double()


def one_by_one(num_examples: int) -> fl.datamodules.ClientDatasets:
    """One client whose last batch is smaller than the others."""
    data = torch.utils.data.TensorDataset(CENTERS[:num_examples], STEEPNESS[:num_examples])
    return fl.datamodules.ClientDatasets([data], batch_size=3, shuffle=False)


@pytest.mark.parametrize(("options", "num_examples"), [({}, 7), ({"limit_train_batches": 2}, 6)], ids=str)
def test_the_mean_is_by_example_over_one_pass(options: dict[str, Any], num_examples: int) -> None:
    e, h = CENTERS[:num_examples], STEEPNESS[:num_examples]
    (loss,) = measured("loss", Quadratic(), one_by_one(7), **options)
    assert loss.item() == pytest.approx((0.5 * h * (10.0 - e) ** 2).mean().item(), rel=1e-12)
    (gradient,) = measured("grad", Quadratic(), one_by_one(7), **options)
    assert gradient["x"].item() == pytest.approx((h * (10.0 - e)).mean().item(), rel=1e-12)


def test_it_is_measured_at_the_global_model_of_each_round() -> None:
    x = Quadratic()
    trainer("fedavg", 1).fit(x, one_by_one(7))
    (gradient,) = measured("grad", Quadratic(), one_by_one(7), max_epochs=2)
    assert gradient["x"].item() == pytest.approx((STEEPNESS * (x.x.item() - CENTERS)).mean().item(), rel=1e-12)


def test_the_gradient_is_that_of_the_shared_parameters_with_the_clients_own_head() -> None:
    data, heads = image_clients((8, 8), batch_size=None), {}

    class Keep(fl.callbacks.FederatedCallback):
        def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
            heads.setdefault(client, {name: t.clone() for name, t in module.state_dict().items()})

        def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any) -> None:
            heads[f"global {round}"] = {name: t.clone() for name, t in module.state_dict().items()}

    module = Plain()
    module.net[1].bias.requires_grad_(False)
    found = measured("grad", module, data, 2, personal=["net.3.*"], callbacks=[Keep()])
    for client in (0, 1):
        expected = Plain()
        own = {name: value for name, value in heads[client].items() if name.startswith("net.3")}
        expected.load_state_dict({**heads["global 1"], **own})
        x, y = images(8, client).tensors
        expected.training_step((x, y), 0).backward()
        assert found[client].keys() == {"net.1.weight"}
        torch.testing.assert_close(found[client]["net.1.weight"], expected.net[1].weight.grad, rtol=1e-10, atol=1e-12)


def test_manual_optimization_is_refused() -> None:
    module = Plain()
    module.automatic_optimization = False
    with pytest.raises(
        MisconfigurationException, match=r"Measures measures the mean loss .*Use automatic optimization"
    ):
        measured("loss", module, image_clients((8, 8)))


def test_gradients_that_may_underflow_are_refused() -> None:
    half: Any = SimpleNamespace(precision="16-mixed", lightning_module=SimpleNamespace(automatic_optimization=True))
    check_algorithm(Measures(kind="loss"), half)
    with pytest.raises(MisconfigurationException, match=r"may underflow\. Use precision='bf16-mixed'"):
        check_algorithm(Measures(), half)


class Silent(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


def test_a_module_without_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="`training_step` returned none for any batch"):
        measured("loss", Silent(), image_clients((8, 8)))


class Breaks:
    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Any]:
        yield from loader(4)
        raise OSError("disk failed")


def test_a_loader_that_raises_is_that_clients_fault() -> None:
    def clients(*broken: Any) -> fl.datamodules.ClientLoaders:
        return fl.datamodules.ClientLoaders({"a": loader(8), **dict.fromkeys(broken, Breaks()), "z": loader(8, seed=2)})

    with pytest.raises(ValueError, match="loader of client 'b' raised OSError: disk failed"):
        measured("grad", Plain(), clients("b"))
    without, module = Plain(), Plain()
    strategy = FederatedStrategy(Measures(), on_client_error="skip")
    with pytest.warns(UserWarning, match="client 'b' raised OSError"):
        trainer(strategy, 2).fit(module, clients("b"))
    trainer(FederatedStrategy("fedavg", engine="sequential"), 2).fit(without, clients())
    assert torch.equal(weights(module), weights(without))


class Endless:
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from loader(8)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (lambda: iter([next(iter(loader(4)))]), {}, "it is an iterator, which can be read once only"),
        (Endless, {"local_steps": 2}, "may never end; give limit_train_batches=n"),
    ],
    ids=["iterator", "endless"],
)
def test_a_loader_without_a_pass_to_spare_is_refused(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(FederatedStrategy(Measures(), **options)).fit(Plain(), fl.datamodules.ClientLoaders({0: source()}))


def test_an_endless_loader_is_read_up_to_the_limit() -> None:
    strategy = FederatedStrategy(Measures(), local_steps=2)
    run: L.Trainer = trainer(strategy, limit_train_batches=3)
    run.fit(Plain(), fl.datamodules.ClientLoaders({0: Endless()}))
    assert strategy.history[0]["num_steps"] == 2


def test_an_error_in_the_module_is_not_the_loaders() -> None:
    class Broken(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("boom")

    before, module = torch.get_rng_state(), Broken()
    with pytest.raises(RuntimeError, match="boom"):
        trainer(FederatedStrategy(Measures(), on_client_error="skip")).fit(module, DataLoader(images(20)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights(module), weights(Plain()))
