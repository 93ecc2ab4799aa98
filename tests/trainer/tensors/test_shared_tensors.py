"""What is averaged, what stays, and what an evaluation may touch."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from tests.helpers.training import Ordinary, Plain, image_clients, images, trainer, weights


class Recorder(fl.callbacks.FederatedCallback):
    """Keeps each client's state_dict at the end of its local training."""

    def __init__(self) -> None:
        self.states: dict[Any, dict[str, Tensor]] = {}
        self.starts: dict[Any, dict[str, Tensor]] = {}
        self.weights: dict[Any, float] = {}

    def on_client_start(self, trainer: Any, module: Any, client: Any) -> None:
        self.starts[client] = {name: t.clone() for name, t in module.state_dict().items()}

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        self.states[client] = {name: t.clone() for name, t in module.state_dict().items()}
        self.weights[client] = run.weight

    def mean(self, name: str) -> Tensor:
        total = sum(self.weights.values())
        return sum((self.states[c][name].double() * w for c, w in self.weights.items()), torch.tensor(0.0)) / total


class Mixed(Plain):
    """BatchNorm, a frozen layer, tied weights, integer, boolean and non-persistent buffers."""

    def __init__(self) -> None:
        super().__init__(torch.float32)
        layers = [nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 4)]
        self.net = nn.Sequential(*layers)
        self.net[3].weight = self.net[1].weight
        self.net[4].requires_grad_(False)
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("odd", torch.tensor(False))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += len(batch[1])
        self.odd = ~self.odd
        self.scratch += 1
        return super().training_step(batch, batch_idx)


def fit_mixed() -> tuple[Mixed, Recorder, dict[str, Tensor]]:
    module, recorder = Mixed(), Recorder()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    clients = image_clients((2, 7, 23), batch_size=4)
    trainer("fedavg", callbacks=[recorder]).fit(module, clients)
    return module, recorder, before


def test_buffers_are_weighted_averaged_and_keep_their_kind() -> None:
    module, recorder, _ = fit_mixed()
    after = module.state_dict()
    for name in ("net.2.running_mean", "net.2.running_var"):
        torch.testing.assert_close(after[name].double(), recorder.mean(name), rtol=1e-5, atol=1e-6)
    assert after["net.2.num_batches_tracked"].dtype == torch.int64
    assert after["net.2.num_batches_tracked"].item() == round((2 * 1 + 7 * 2 + 23 * 6) / 32)
    assert after["seen"].dtype == torch.int64
    assert after["seen"].item() == round((2 * 2 + 7 * 7 + 23 * 23) / 32)
    assert after["odd"].dtype == torch.bool
    assert after["odd"].item() is False


def test_frozen_parameters_stay_and_tied_ones_stay_tied() -> None:
    module, recorder, before = fit_mixed()
    assert torch.equal(module.net[4].weight, before["net.4.weight"])
    assert module.net[3].weight is module.net[1].weight
    torch.testing.assert_close(module.net[1].weight.double(), recorder.mean("net.1.weight"), rtol=1e-5, atol=1e-6)
    assert not torch.equal(module.net[1].weight, before["net.1.weight"])


def test_each_client_starts_from_the_global_model() -> None:
    _, recorder, before = fit_mixed()
    for start in recorder.starts.values():
        for name, value in before.items():
            assert torch.equal(start[name], value), name


def test_personal_tensors_never_leave_their_client() -> None:
    module, recorder = Plain(), Recorder()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    strategy = FederatedStrategy("fedavg", personal=["net.3.*"])
    trainer(strategy, 2, callbacks=[recorder]).fit(module, image_clients((8, 8)))
    first_round_end = {c: strategy.active_driver.store.get(c)["personal"]["net.3.weight"] for c in (0, 1)}
    assert torch.equal(module.net[3].weight, before["net.3.weight"])
    assert not torch.equal(module.net[1].weight, before["net.1.weight"])
    assert not torch.equal(first_round_end[0], first_round_end[1])
    for client in (0, 1):
        assert torch.equal(recorder.states[client]["net.3.weight"], first_round_end[client])
        assert not torch.equal(recorder.starts[client]["net.3.weight"], before["net.3.weight"])


class FreezesIn(L.Callback):
    """Freezes some layers in some rounds."""

    def __init__(self, rounds: Sequence[int], *layers: int) -> None:
        self.rounds, self.layers = rounds, layers

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        for layer in self.layers:
            module.net[layer].requires_grad_(trainer.current_epoch not in self.rounds)


def freeze_in(rounds: Sequence[int], layers: Sequence[int], num_rounds: int, **strategy: Any) -> list[dict[int, Any]]:
    """The clients' own values after each round in which ``layers`` are frozen in ``rounds``."""
    found: list[dict[int, Any]] = []
    start = weights(Plain())

    class Notes(fl.callbacks.FederatedCallback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            store = trainer.strategy.active_driver.store
            found.append({client: store.get(client)["personal"] for client in (0, 1)})
            # `net.3.bias`: the module holds the common value of what is personal.
            assert torch.equal(weights(module)[-4:], start[-4:]) or "personal" not in strategy

    callbacks = [FreezesIn(rounds, *layers), Notes()]
    trainer(FederatedStrategy(**strategy), num_rounds, callbacks=callbacks).fit(Plain(), image_clients((8, 8)))
    return found


@pytest.mark.parametrize("engine", ["sequential", "auto"])
def test_a_personal_tensor_that_is_frozen_stays_personal(engine: Any) -> None:
    first, second, third = freeze_in([1], [3], 3, personal=["net.3.*"], engine=engine)
    for client in (0, 1):
        assert first[client].keys() == second[client].keys() == third[client].keys() == {"net.3.weight", "net.3.bias"}
        assert torch.equal(first[client]["net.3.weight"], second[client]["net.3.weight"])
        assert not torch.equal(second[client]["net.3.weight"], third[client]["net.3.weight"])
    assert not torch.equal(second[0]["net.3.weight"], second[1]["net.3.weight"])


@pytest.mark.parametrize("engine", ["sequential", "auto"])
def test_a_personal_tensor_may_be_unfrozen_later(engine: Any) -> None:
    found = freeze_in([0, 1], [3], 4, personal=["net.*.bias"], engine=engine)
    assert [sorted(own[0]) for own in found] == [["net.1.bias"]] * 2 + [["net.1.bias", "net.3.bias"]] * 2
    # As if it had been trained from its start value in this round for the first time.
    assert not torch.equal(found[2][0]["net.3.bias"], found[2][1]["net.3.bias"])


def test_a_layer_of_dittos_own_model_that_is_frozen_stays_its_clients() -> None:
    first, second, third = freeze_in([1], [3], 3, algorithm="ditto")
    for client in (0, 1):
        assert torch.equal(first[client]["net.3.weight"], second[client]["net.3.weight"])
        assert not torch.equal(first[client]["net.1.weight"], second[client]["net.1.weight"])
        assert not torch.equal(second[client]["net.3.weight"], third[client]["net.3.weight"])


def test_a_phase_whose_personal_tensors_are_all_frozen_says_so() -> None:
    with pytest.raises(
        ValueError, match=r"'personal' is not a trainable parameter. All personal ones are frozen \(net.3"
    ):
        freeze_in([0], [3], 1, algorithm="fedrep", personal=["net.3.*"])


def test_a_personal_glob_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"personal='heda\.\*' matches none"):
        trainer(FederatedStrategy("fedavg", personal=["heda.*"])).fit(Plain(), image_clients((8, 8)))


def test_frozen_and_personal_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="No trainable parameter is left to share"):
        trainer(FederatedStrategy("fedavg", personal=["*"])).fit(Plain(), image_clients((8, 8)))


class Nosy(L.Callback):
    """Draws random numbers and looks at everything."""

    def _draw(self, *_: Any) -> None:
        torch.rand(3)

    on_validation_batch_end = on_train_epoch_end = on_validation_start = on_train_epoch_start = _draw


class Dropout(Ordinary):
    """Draws random numbers in training."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, nn.Dropout(0.3))


@pytest.mark.parametrize(
    "options",
    [
        {"limit_val_batches": 0},
        {"num_sanity_val_steps": 0},
        {"check_val_every_n_epoch": 2},
        {"callbacks": [Nosy()]},
        {"enable_checkpointing": True},
        {"enable_progress_bar": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_evaluation_and_logging_change_no_training(options: dict[str, Any]) -> None:
    def train(**options: Any) -> Tensor:
        module = Dropout()
        trainer("fedavg", 2, **options).fit(module, image_clients(validate=True))
        return weights(module)

    assert torch.equal(train(), train(**options))


def test_validation_sees_the_aggregated_model() -> None:
    class Watch(L.Callback):
        def on_validation_end(self, trainer: Any, module: Any) -> None:
            self.validated = weights(module)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.after_last_batch = weights(module)

    module, watch, recorder = Ordinary(), Watch(), Recorder()
    trainer("fedavg", callbacks=[watch, recorder]).fit(module, image_clients(validate=True))
    assert torch.equal(watch.validated, weights(module))
    assert torch.equal(watch.after_last_batch, weights(module))
    torch.testing.assert_close(module.net[4].weight.double(), recorder.mean("net.4.weight"), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_clients() -> None:
    class Peak(fl.callbacks.FederatedCallback):
        def __init__(self) -> None:
            self.sizes: list[int] = []

        def on_client_end(self, *_: Any) -> None:
            tensors = [held for held in gc.get_objects() if type(held) in (Tensor, nn.Parameter)]
            self.sizes.append(sum(tensor.numel() for tensor in tensors))

    peak = Peak()
    trainer("fedavg", callbacks=[peak]).fit(Plain(), image_clients([4] * 30))
    assert max(peak.sizes[5:]) <= max(peak.sizes[:5]) + 16 * 8


def test_memory_grows_with_clients_that_keep_state() -> None:
    strategy = FederatedStrategy("scaffold")
    trainer(strategy).fit(Plain(), image_clients([4] * 5))
    assert len(strategy.active_driver.store) == 5


def test_bfloat16_weights_do_not_drift() -> None:
    module = Plain(torch.bfloat16, lr=0.0)
    before = weights(module)
    trainer("fedavg", 3).fit(module, fl.datamodules.ClientDatasets([images(2)] * 200, batch_size=None))
    assert torch.equal(weights(module), before)
