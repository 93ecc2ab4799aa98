"""A frozen parameter is one for all clients: who changes it in local training is told to make it a buffer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fl import FederatedStrategy
from tests.helpers.training import Plain, image_clients, trainer, weights
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


@pytest.mark.parametrize("through_data", [False, True])
def test_changing_a_frozen_parameter_in_local_training_is_refused(through_data: bool) -> None:
    module = FrozenTarget(through_data)
    with pytest.raises(
        ValueError, match=r"'target.1.weight' was changed during local training.*Register it as a buffer"
    ):
        trainer("fedavg").fit(module, image_clients((9, 9)))


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
