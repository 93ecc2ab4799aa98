"""What a step changes in parameters beside their values, and in the gradient scaler, does not reach the next client."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.datamodules import ClientLoaders
from lightning_fl.types import LocalRun, Update
from tests.helpers.training import Plain, loader, trainer, weights

CLIENTS = "ab"


class Updates(fl.callbacks.FederatedCallback):
    def __init__(self) -> None:
        self.of: dict[Any, Tensor] = {}

    def on_client_end(
        self, trainer: L.Trainer, module: L.LightningModule, client: int | str, run: LocalRun, update: Update | None
    ) -> None:
        assert update is not None
        self.of[str(client)[1:]] = torch.cat([delta.flatten() for delta in update.delta.values()])


class Freezing(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            self.net[1].weight.requires_grad_(False)
        return super().training_step(batch, batch_idx)


class Hooking(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            self.net[1].weight.register_hook(lambda grad: grad / 2)
        return super().training_step(batch, batch_idx)


class Unstepped(Plain):
    """Looks at the gradients of a layer that no optimizer steps."""

    def __init__(self) -> None:
        super().__init__(make_optimizer=lambda params: torch.optim.SGD(self.net[3].parameters(), lr=0.1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found = self.net[1].weight.grad
        scale = 1.0 if found is None else 1.0 + float(found.norm())
        return super().training_step(batch, batch_idx) * scale


def trained(kind: type[Plain], order: str, **kwargs: Any) -> tuple[dict[Any, Tensor], Plain]:
    updates, module = Updates(), kind()
    # Of equal clients the one whose name comes first trains first.
    clients = ClientLoaders({f"{place}{name}": loader(16, seed=ord(name)) for place, name in enumerate(order)})
    strategy = FederatedStrategy(engine="sequential", seed=0)
    trainer(strategy, 1, callbacks=[updates], **kwargs).fit(module, clients)
    return updates.of, module


@pytest.mark.parametrize("kind", [Freezing, Hooking, Unstepped])
def test_a_client_trains_the_same_whoever_has_trained_before(kind: type[Plain]) -> None:
    (first, module), (second, _) = trained(kind, "ab"), trained(kind, "ba")
    assert all(torch.equal(first[client], second[client]) for client in CLIENTS)
    assert all(param.requires_grad and param.grad is None for param in module.parameters())


def test_what_was_there_before_the_round_stays() -> None:
    class Hooked(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net[1].weight.register_hook(torch.zeros_like)
            self.net[3].bias.requires_grad_(False)

    found, module = trained(Hooked, "ab")
    assert all(bool((own[: module.net[1].weight.numel()] == 0).all()) for own in found.values())
    assert not module.net[3].bias.requires_grad


def test_one_client_alone_keeps_them_as_with_a_plain_trainer() -> None:
    alone, plain = Freezing(), Freezing()
    trainer(FederatedStrategy(client_optimizer="keep"), 2).fit(alone, ClientLoaders([loader(16)]))
    trainer("auto", 2).fit(plain, loader(16))
    torch.testing.assert_close(weights(alone), weights(plain))


class Half(Plain):
    def __init__(self) -> None:
        super().__init__(torch.float32)


def with_scaler(order: str, scale: float = 2.0**19) -> tuple[dict[Any, Tensor], float]:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
    found, _ = trained(Half, order, plugins=[plugin])
    return found, plugin.scaler.get_scale()


def test_the_scale_of_gradients_is_not_that_of_the_client_before() -> None:
    (first, scale), (second, other) = with_scaler("ab"), with_scaler("ba")
    assert all(torch.equal(first[client], second[client]) for client in CLIENTS)
    assert all(bool(found.any()) for found in first.values())  # not all of their steps have overflowed
    assert scale == other < 2.0**19  # the next round goes on from that of the client with the most steps
