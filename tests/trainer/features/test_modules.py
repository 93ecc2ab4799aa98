"""What a LightningModule may do: each compared with a plain Trainer, or with one rank."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau

from lightning_fl import FederatedStrategy
from lightning_fl.tree import subtract
from tests.helpers.training import Ordinary, Plain, image_clients, trainer, weights
from tests.trainer.features.test_callbacks_and_settings import assert_equals_plain

SKIPPED = "`training_step` returned `None`"


class Manual(Plain):
    """Accumulates over two batches and steps its schedule itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.5)
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [ExponentialLR(optimizer, 0.9)]


class Gan(Plain):
    """A generator and a discriminator, each with its optimizer and schedule."""

    def __init__(self, make: Callable[[Any], Any] = lambda params: Adam(params, lr=0.01)) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.make = make
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.critic = nn.Linear(4, 1).double()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        generator, critic = self.optimizers()
        fake = self.net(x.double())
        generator.zero_grad()
        self.manual_backward(-self.critic(fake).mean())
        generator.step()
        real = (y > 0).double()
        critic.zero_grad()
        self.manual_backward(binary_cross_entropy_with_logits(self.critic(fake.detach()).squeeze(1), real))
        critic.step()

    def on_train_epoch_end(self) -> None:
        for schedule in self.lr_schedulers():
            schedule.step()

    def configure_optimizers(self) -> Any:
        optimizers = [self.make(self.net.parameters()), self.make(self.critic.parameters())]
        return optimizers, [
            ExponentialLR(optimizer, gamma) for optimizer, gamma in zip(optimizers, (0.9, 0.5), strict=True)
        ]


class Skips(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


class WarmsUp(Plain):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 10)


class ForeignSchedule:
    """Steps with an epoch, as those of timm do, and is no torch scheduler."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.epoch = 0

    def step(self, epoch: int) -> None:
        self.epoch = epoch
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / (2 + epoch)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


class Foreign(Plain):
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": ForeignSchedule(optimizer), "interval": "epoch"}]


class OneCycle(Plain):
    """Reads the number of steps where it is told."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.num_steps = 0

    def setup(self, stage: str) -> None:
        if self.where == "setup":
            self.num_steps = int(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> Any:
        num_steps = self.num_steps or int(self.trainer.estimated_stepping_batches)
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = OneCycleLR(optimizer, max_lr=0.5, total_steps=num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Plateau(Ordinary):
    def __init__(self) -> None:
        super().__init__(torch.float64)

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        schedule = ReduceLROnPlateau(optimizer, mode="max", patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class Frozen(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net[1].requires_grad_(False)


class Tied(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(2, nn.Linear(8, 8).double())
        self.net.insert(3, nn.Linear(8, 8).double())
        nn.init.eye_(self.net[2].weight)
        for layer in (self.net[2], self.net[3]):
            nn.init.zeros_(layer.bias)
        self.net[3].weight = self.net[2].weight


class Compiled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0].double()), batch[1])


class Clamps(Plain):
    """Changes its weights after each step."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.net[1].weight.clamp_(-0.1, 0.1)


MODULES: dict[str, Callable[[], L.LightningModule]] = {
    "manual optimization": Manual,
    "two optimizers": Gan,
    "skipped batches": Skips,
    "warm-up in optimizer_step": WarmsUp,
    "a schedule that is none of torch's": Foreign,
    "one cycle": lambda: OneCycle("configure_optimizers"),
    "one cycle from setup": lambda: OneCycle("setup"),
    "plateau": Plateau,
    "frozen": Frozen,
    "tied": Tied,
    "compiled": Compiled,
    "clamped": Clamps,
}


@pytest.mark.filterwarnings(f"ignore:{SKIPPED}")
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.spread(4)
def test_one_client_is_a_plain_trainer(name: str) -> None:
    assert_equals_plain(MODULES[name])


def train(name: str) -> tuple[Tensor, int]:
    module = MODULES[name]()
    run = trainer(FederatedStrategy(clients_per_round=2), 2)
    run.fit(module, image_clients((5, 7, 11), validate=name == "plateau"))
    return weights(module), run.global_step


def train_all() -> dict[str, tuple[Tensor, int]]:
    warnings.filterwarnings("ignore", message=SKIPPED)
    return {name: train(name) for name in MODULES if name != "compiled"}


@pytest.mark.slow
def test_two_ranks_are_one(run_ranks: Any) -> None:
    alone = train_all()
    for found in run_ranks(2, train_all):
        for name, (expected, steps) in alone.items():
            torch.testing.assert_close(found[name][0], expected, rtol=1e-9, atol=1e-11, msg=name)
            assert found[name][1] == steps, name


def test_frozen_and_tied_parameters_stay_so() -> None:
    frozen, tied = Frozen(), Tied()
    before = copy.deepcopy(frozen.net[1].weight)
    for module in (frozen, tied):
        trainer("fedavg", 2).fit(module, image_clients((5, 7)))
    assert torch.equal(frozen.net[1].weight, before)
    assert tied.net[3].weight is tied.net[2].weight
    assert not torch.equal(tied.net[2].weight, torch.eye(8).double())


class TwoOptimizers(Gan):
    """Notes how SCAFFOLD changes the gradients of each network."""

    def __init__(self) -> None:
        super().__init__(lambda params: SGD(params, lr=0.1))
        self.corrections: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, critic = self.optimizers()
        generator.zero_grad()
        critic.zero_grad()
        output = self.critic(self.net(batch[0].double()))
        self.manual_backward(binary_cross_entropy_with_logits(output.squeeze(1), (batch[1] > 0).double()))
        before = [self.net[3].weight.grad.clone(), self.critic.weight.grad.clone()]
        generator.step()
        untouched = torch.equal(self.critic.weight.grad, before[1])
        critic.step()
        assert untouched
        self.corrections.append((self.net[3].weight.grad - before[0], self.critic.weight.grad - before[1]))


def test_scaffold_corrects_the_gradients_of_each_optimizer_once() -> None:
    module, clients = TwoOptimizers(), image_clients((4, 4))
    run = trainer("scaffold", 1)
    run.fit(module, clients)
    rounds = run.strategy.active_driver
    expected = subtract(rounds.state.server["control"], rounds.store.get(1)["algorithm"]["control"])
    run.fit_loop.max_epochs = 2
    run.fit(module, clients)
    for correction, name in zip(module.corrections[-1], ("net.3.weight", "critic.weight"), strict=True):
        assert correction.norm() > 1e-4
        torch.testing.assert_close(correction, expected[name], rtol=1e-9, atol=1e-14)
