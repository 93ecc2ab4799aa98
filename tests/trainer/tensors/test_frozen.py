"""Frozen parameters stay as they are, unless training moves them: then they are averaged like buffers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.datamodules import ClientLoaders
from lightning_fl.engines.tensors import is_same
from tests.helpers.training import Plain, image_clients, loader, trainer, weights
from tests.trainer.features.test_callbacks_and_settings import assert_equals_plain


class Target(Plain):
    """Pulls its network towards a slowly following copy."""

    def follow(self) -> list[tuple[Tensor, Tensor]]:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        distance = sum((((param - target) ** 2).sum() for target, param in self.follow()), torch.tensor(0.0))
        return super().training_step(batch, batch_idx) + distance


class FrozenTarget(Target):
    def __init__(self, through_data: bool) -> None:
        super().__init__()
        self.through_data = through_data
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def follow(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.target.parameters(), self.net.parameters(), strict=True))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for target, param in self.follow():
            if self.through_data:
                target.data.lerp_(param.data, 0.1)
            else:
                with torch.no_grad():
                    target.lerp_(param, 0.1)


class BufferTarget(Target):
    def __init__(self) -> None:
        super().__init__()
        for index, param in enumerate(self.net.parameters()):
            self.register_buffer(f"target_{index}", param.detach().clone())

    def follow(self) -> list[tuple[Tensor, Tensor]]:
        return [(getattr(self, f"target_{index}"), param) for index, param in enumerate(self.net.parameters())]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for target, param in self.follow():
            target.lerp_(param.detach(), 0.1)


class Momentum(Plain):
    """A student that a frozen teacher follows within each step, as in BYOL, MoCo and DINO."""

    def __init__(self, update: str = "in place", first_round: int = 0) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.update, self.first_round = update, first_round

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        if self.current_epoch >= self.first_round:
            self.follow()
        distance = (self.net(x.double()) - self.teacher(x.double())).square().mean()
        return super().training_step(batch, batch_idx) + distance

    def follow(self) -> None:
        for target, param in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            if self.update == "assigned data":
                target.data = target.data * 0.9 + param.data * 0.1
            elif self.update == "data in place":
                target.data.lerp_(param.data, 0.1)
            else:
                with torch.no_grad():
                    target.lerp_(param, 0.1)


UPDATES = ["in place", "data in place", "assigned data"]
SIZES = (3, 9, 5)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("first_round", [0, 1])
@pytest.mark.parametrize("engine", ["sequential", "auto"])
@pytest.mark.spread(4)
def test_one_client_with_a_teacher_is_a_plain_training(update: str, first_round: int, engine: str) -> None:
    federated, plain = Momentum(update, first_round), Momentum(update, first_round)
    strategy = FederatedStrategy(client_optimizer="keep", engine=engine)
    trainer(strategy, 3).fit(federated, ClientLoaders([loader()]))
    trainer("auto", 3).fit(plain, loader())
    torch.testing.assert_close(weights(federated), weights(plain), rtol=1e-10, atol=1e-12)
    assert not torch.equal(plain.teacher[1].weight, Momentum().teacher[1].weight)


def averaged_by_hand(rounds: int) -> Tensor:
    """Students and teachers of the clients, averaged by the number of their examples."""
    module = Momentum()
    for _ in range(rounds):
        start, trained = copy.deepcopy(module.state_dict()), []
        for client, size in enumerate(SIZES):
            module.load_state_dict(start)
            for batch in loader(size, seed=client):
                module.follow()
                x, y = batch
                module.zero_grad()
                distance = (module.net(x.double()) - module.teacher(x.double())).square().mean()
                (torch.nn.functional.cross_entropy(module.net(x.double()), y) + distance).backward()
                with torch.no_grad():
                    for param in module.net.parameters():
                        param -= 0.1 * param.grad
            trained.append(copy.deepcopy(module.state_dict()))
        mean = {n: sum(s * own[n] for s, own in zip(SIZES, trained, strict=True)) / sum(SIZES) for n in start}
        module.load_state_dict(mean)
    return weights(module)


def momentum(
    update: str = "in place", engine: str = "auto", order: Sequence[int] = (0, 1, 2), rounds: int = 3, **options: Any
) -> Tensor:
    module = Momentum(update)
    clients = ClientLoaders({f"{place}": loader(SIZES[client], seed=client) for place, client in enumerate(order)})
    trainer(FederatedStrategy(engine=engine, **options), rounds).fit(module, clients)
    return weights(module)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("engine", ["sequential", "auto"])
def test_teachers_are_averaged_like_their_students(update: str, order: Sequence[int], engine: str) -> None:
    torch.testing.assert_close(momentum(update, engine, order), averaged_by_hand(3), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("clients_per_round", [1, 3])
@pytest.mark.slow
def test_teachers_are_the_same_on_any_number_of_ranks(run_ranks: Any, clients_per_round: int) -> None:
    alone = momentum(clients_per_round=clients_per_round)
    for size in (2, 4):
        for found in run_ranks(size, momentum, clients_per_round=clients_per_round):
            torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)


def test_resuming_with_a_teacher_is_exact() -> None:
    def fit(rounds: int, path: str | None = None) -> tuple[L.Trainer, Tensor]:
        module = Momentum()
        own = trainer(FederatedStrategy(), rounds)
        own.fit(module, ClientLoaders([loader(size, seed=client) for client, size in enumerate(SIZES)]), ckpt_path=path)
        return own, weights(module)

    _, whole = fit(3)
    stopped, _ = fit(1)
    stopped.save_checkpoint("first.ckpt")
    _, resumed = fit(3, "first.ckpt")
    assert torch.equal(whole, resumed)


class Recorder(fl.callbacks.FederatedCallback):
    def __init__(self) -> None:
        self.sent: list[set[str]] = []

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        self.sent.append(set(update.buffers))


@pytest.mark.parametrize("first_round", [0, 9])
def test_frozen_parameters_travel_only_if_training_moves_them(first_round: int) -> None:
    recorder = Recorder()
    clients = ClientLoaders([loader(8), loader(8, seed=1)])
    trainer("fedavg", 3, callbacks=[recorder]).fit(Momentum(first_round=first_round), clients)
    teacher = {f"teacher.{name}" for name in ("1.weight", "1.bias", "3.weight", "3.bias")}
    assert recorder.sent[2:] == [teacher if first_round == 0 else set()] * 4


def test_a_frozen_parameter_that_begins_to_move_is_named_and_averaged_from_then_on() -> None:
    module, clients = Momentum(first_round=1), ClientLoaders([loader(8), loader(8, seed=1)])
    before = module.teacher[1].weight.clone()
    with pytest.warns(UserWarning, match=r"Round 1: training has changed frozen parameters.*'teacher.1.bias'"):
        trainer(FederatedStrategy(engine="sequential"), 2).fit(module, clients)
    assert torch.equal(module.teacher[1].weight, before)
    with pytest.warns(UserWarning, match=r"Round 1: training has changed frozen parameters"):
        trainer(FederatedStrategy(engine="sequential"), 3).fit(module, clients)
    assert not torch.equal(module.teacher[1].weight, before)


class LargeBase(Plain):
    """Writes to a frozen tensor that is much larger than what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.zeros(4, 1000), requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.base.data.add_(1)
        return super().training_step(batch, batch_idx)


def test_a_large_frozen_parameter_that_moves_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fl.engines.tensors.SMALL", 0)
    with pytest.raises(ValueError, match=r"The frozen parameter 'base' was changed during local training"):
        trainer(FederatedStrategy(engine="sequential")).fit(LargeBase(), image_clients((9, 9)))
    alone = LargeBase()
    trainer("fedavg").fit(alone, ClientLoaders([loader(8)]))
    assert (alone.base == 2).all()


class Base(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.zeros(200_000), requires_grad=False)


class SlyWrite(fl.callbacks.FederatedCallback):
    """Writes to one element of a frozen tensor for one client; neither version counter nor sample shows it."""

    def __init__(self, writer: int) -> None:
        self.writer = writer
        self.seen: list[float] = []

    def on_client_start(self, trainer: Any, module: Any, client: Any) -> None:
        self.seen.append(float(module.base[1]))
        if client == self.writer:
            module.base.data[1] = 1.0


@pytest.mark.parametrize(("writer", "seen"), [(0, [0.0, 0.0, 0.0]), (1, [0.0, 0.0, 1.0]), (2, [0.0, 0.0, 0.0])])
def test_no_write_to_a_frozen_parameter_is_missed(writer: int, seen: list[float]) -> None:
    """The round's first client is looked at in full, the others at the round's end; then it is told and undone."""
    module, callback = Base(), SlyWrite(writer)
    with pytest.warns(UserWarning, match=r"Round 0: training has changed frozen parameters.*'base'"):
        trainer(FederatedStrategy(engine="sequential"), callbacks=[callback]).fit(module, image_clients((4, 4, 4)))
    assert callback.seen == seen
    assert not module.base.any()


def test_frozen_parameters_are_compared_and_copied_a_few_times_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    module, compared, copies = Base(), [], set()

    def note(now: Tensor, before: Tensor) -> bool:
        if now.shape == module.base.shape:
            compared.append(before.data_ptr())
            copies.add(before.data_ptr())
        return is_same(now, before)

    monkeypatch.setattr("lightning_fl.engines.tensors.is_same", note)
    trainer(FederatedStrategy(engine="sequential"), 2).fit(module, image_clients((8,) * 10))
    assert len(copies) == 1
    assert len(compared) <= 2 * 4


def test_changing_a_frozen_parameter_between_rounds_is_allowed() -> None:
    module = FrozenTarget(False)
    module.on_train_batch_end = lambda *_: None  # type: ignore[method-assign]
    module.on_train_epoch_end = lambda: FrozenTarget.on_train_batch_end(module, None, None, 0)  # type: ignore
    before = module.target[1].weight.clone()
    trainer("fedavg", 2).fit(module, image_clients((9, 9)))
    assert not torch.equal(module.target[1].weight, before)


def test_the_same_as_buffers_is_a_plain_training_for_one_client() -> None:
    assert_equals_plain(BufferTarget)


def train(clients_per_round: int) -> Tensor:
    module = BufferTarget()
    trainer(FederatedStrategy(clients_per_round=clients_per_round), 3).fit(module, image_clients((3, 9, 5)))
    return weights(module)


@pytest.mark.parametrize("clients_per_round", [1, 3])
def test_the_same_as_buffers_is_averaged_on_any_number_of_ranks(run_ranks: Any, clients_per_round: int) -> None:
    alone = train(clients_per_round)
    for found in run_ranks(2, train, clients_per_round):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)


class Head(Plain):
    """Its frozen part holds NaN, as a parameter that is not yet filled may."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.full((3, 2), float("nan")).t(), requires_grad=False)


def test_a_frozen_parameter_that_nobody_touches_may_hold_anything() -> None:
    module = Head()
    trainer("fedavg").fit(module, image_clients((9, 9)))
    assert module.unused.isnan().all()


class Leaks(Plain):
    """Writes what it has seen to a frozen parameter."""

    def __init__(self, is_hook: bool) -> None:
        super().__init__()
        self.note = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=False)
        self.is_hook = is_hook

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.is_hook:
            self.note.data.fill_(float(batch[0].double().mean()))
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.is_hook:
            self.note.data.fill_(float(batch[0].double().mean()))


@pytest.mark.parametrize("num_clients", [1, 3])
@pytest.mark.parametrize("is_hook", [True, False])
@pytest.mark.parametrize("unit", ["client", "example"])
def test_under_differential_privacy_none_may_move(num_clients: int, is_hook: bool, unit: str) -> None:
    transforms = [fl.privacy.ClientLevelDP(clip=0.5, noise_multiplier=1.0, method="rdp")] if unit == "client" else []
    callbacks = [fl.callbacks.SampleLevelDP(noise_multiplier=1.0, max_grad_norm=1.0)] if unit == "example" else []
    module, clients = Leaks(is_hook), ClientLoaders([loader(8, seed=seed) for seed in range(num_clients)])
    run = trainer(FederatedStrategy(transforms=transforms), 2, callbacks=callbacks)
    with pytest.raises(ValueError, match=r"written to the frozen parameter 'note'.* neither clipped nor noised"):
        run.fit(module, clients)
    assert not module.note.any()


def test_a_teacher_of_buffers_is_noised() -> None:
    transform = fl.privacy.ClientLevelDP(clip=1e-6, noise_multiplier=1e6, method="rdp")
    module = BufferTarget()
    before = module.target_0.clone()
    run = trainer(FederatedStrategy(transforms=[transform]), 1)
    with (
        pytest.warns(UserWarning, match="clips buffers .* and adds noise to them"),
        pytest.warns(UserWarning, match=r"changed 'target_0'.* It was put back"),
    ):
        run.fit(module, image_clients((9, 9)))
    assert float((module.target_0 - before).std()) == pytest.approx(0.5, rel=0.5)
