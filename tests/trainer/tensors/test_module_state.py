"""What one client's training leaves in the module outside its ``state_dict`` reaches no other client."""

from __future__ import annotations

import os
import random
import threading
import warnings
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.datamodules import ClientLoaders
from tests.helpers.training import Ordinary, Plain, loader, trainer

SIZES = (8, 16, 12)


class Stateful(Plain):
    """Its loss grows with what it has seen so far, which it keeps in some place outside its parameters."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        influence = torch.as_tensor(float(self.remember(x.double().mean().item())), dtype=torch.float64)
        return super().training_step(batch, batch_idx) * (1 + influence.tanh() ** 2)

    def remember(self, value: float) -> Any:
        raise NotImplementedError


class BufferOutsideState(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64), persistent=False)

    def remember(self, value: float) -> Any:
        self.seen += abs(value) + 1
        return self.seen


class ReplacedBuffer(BufferOutsideState):
    def remember(self, value: float) -> Any:
        self.seen = self.seen + abs(value) + 1
        return self.seen


class WrittenThroughData(BufferOutsideState):
    def remember(self, value: float) -> Any:
        self.seen.data = self.seen.data + abs(value) + 1
        return self.seen


class BufferOfNone(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", None)

    def remember(self, value: float) -> Any:
        before = 0.0 if self.hidden is None else self.hidden
        self.hidden = torch.tensor(float(before) + abs(value) + 1)
        return self.hidden


class DroppedFromState(Stateful):
    """Frozen backbones are left out of checkpoints so, as Lightning's documentation advises."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "seen" not in name}

    remember = BufferOutsideState.remember


class RenamedByHook(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_state_dict_post_hook(self.rename)

    @staticmethod
    def rename(module: Any, state: Any, prefix: str, metadata: Any) -> None:
        state["seen_so_far"] = state.pop("seen")

    remember = BufferOutsideState.remember


class Number(Stateful):
    count = 0.0

    def remember(self, value: float) -> Any:
        self.count += abs(value) + 1
        return self.count


class LazyAttribute(Stateful):
    def remember(self, value: float) -> Any:
        self.total = getattr(self, "total", 0.0) + abs(value) + 1
        return self.total


class DeletedAttribute(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.first = True

    def remember(self, value: float) -> Any:
        if hasattr(self, "first"):
            del self.first
            return 0.0
        return value


class Queue(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.queue: deque[float] = deque(maxlen=3)

    def remember(self, value: float) -> Any:
        self.queue.append(value)
        return sum(self.queue)


class GrowingList(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def remember(self, value: float) -> Any:
        self.values.append(value)
        return sum(self.values)


class Nested(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.stats: Any = {"a": [(0, defaultdict(float))]}

    def remember(self, value: float) -> Any:
        self.stats["a"][0][1]["total"] += abs(value) + 1
        return self.stats["a"][0][1]["total"]


class Array(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.running = np.zeros(2)

    def remember(self, value: float) -> Any:
        self.running[0] = 0.9 * self.running[0] + value
        return self.running[0]


class Average:
    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0.0


class Slotted(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.average = Average()

    def remember(self, value: float) -> Any:
        self.average.total += abs(value) + 1
        return self.average.total


class ModuleInList(Stateful):
    """A teacher that is hidden from the ``state_dict`` in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(1, 1).double()]
        nn.init.zeros_(self.hidden[0].bias)

    def remember(self, value: float) -> Any:
        with torch.no_grad():
            self.hidden[0].bias += abs(value) + 1
        return self.hidden[0].bias.item()


class OwnOptimizer(Stateful):
    """Trains a network of its own by hand, which is no part of the module's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.own = [nn.Parameter(torch.zeros((), dtype=torch.float64))]
        self.private = torch.optim.Adam(self.own, lr=0.1)

    def remember(self, value: float) -> Any:
        self.private.zero_grad()
        with torch.enable_grad():
            ((self.own[0] - value) ** 2).backward()
        self.private.step()
        return self.own[0].detach()


class Coin(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.coin, self.other, self.third = random.Random(0), np.random.default_rng(0), torch.Generator()

    def remember(self, value: float) -> Any:
        return self.coin.random() + self.other.random() + torch.rand((), generator=self.third).item()


class Iterator(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.draws = iter(np.random.default_rng(0).random(100).tolist())

    def remember(self, value: float) -> Any:
        return next(self.draws)


class Unfrozen(Stateful):
    """Unfreezes a layer after some steps of the client."""

    def remember(self, value: float) -> Any:
        self.net[1].train(not self.net[1].training)
        return float(self.net[1].training)


class Bank(Plain):
    """Nearest neighbours from a memory bank, as in NNCLR."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.Module()
        self.bank.register_buffer("items", torch.zeros(0, 4, dtype=torch.float64), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        out = self.net(x.double())
        loss = super().training_step(batch, batch_idx)
        if len(self.bank.items):
            nearest = self.bank.items[(out.detach() @ self.bank.items.T).argmax(1)]
            loss = loss + (out - nearest).square().mean()
        self.bank.items = torch.cat([self.bank.items, out.detach()])[-32:]
        return loss


KINDS = [
    *(BufferOutsideState, ReplacedBuffer, WrittenThroughData, BufferOfNone, DroppedFromState, RenamedByHook, Number),
    *(LazyAttribute, DeletedAttribute, Queue, GrowingList, Nested, Array, Slotted, ModuleInList, OwnOptimizer, Coin),
    *(Iterator, Unfrozen, Bank),
]


def params(module: nn.Module) -> Tensor:
    return torch.cat([param.detach().reshape(-1) for param in module.parameters()])


def fit(
    kind: type[Plain], order: Sequence[int] = (0, 1, 2), engine: str = "sequential", rounds: int = 2, **options: Any
) -> Tensor:
    module = kind()
    # The names go with the data: a client's random numbers are of its name.
    clients = ClientLoaders({f"client {client}": loader(SIZES[client], seed=client) for client in order})
    trainer(FederatedStrategy(engine=engine, **options), rounds).fit(module, clients)
    return params(module)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.spread(5)
def test_the_order_of_clients_does_not_matter(kind: type[Plain]) -> None:
    expected = fit(kind)
    for order in [(2, 1, 0), (1, 0, 2)]:
        torch.testing.assert_close(fit(kind, order), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [BufferOutsideState, Number, Coin, Bank])
@pytest.mark.slow
def test_the_number_of_ranks_does_not_matter(kind: type[Plain], run_ranks: Any) -> None:
    expected = fit(kind)
    for size in (2, 4):
        for found in run_ranks(size, fit, kind):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.spread(5)
def test_one_client_keeps_its_state_as_in_a_plain_training(kind: type[Plain]) -> None:
    federated, plain = kind(), kind()
    trainer(FederatedStrategy(client_optimizer="keep"), 3).fit(federated, ClientLoaders([loader(12)]))
    trainer("auto", 3).fit(plain, loader(12))
    torch.testing.assert_close(params(federated), params(plain), rtol=1e-10, atol=1e-12)


def silo(kind: type[Plain]) -> Tensor:
    module = kind()
    rank = int(os.environ["RANK"])
    trainer(FederatedStrategy(client_optimizer="keep"), 1).fit(module, loader(12, seed=rank))
    return torch.tensor(module.count, dtype=torch.float64)


def test_a_silo_keeps_its_state(run_ranks: Any) -> None:
    for rank, found in enumerate(run_ranks(2, silo, Number)):
        plain = Number()
        trainer("auto", 1).fit(plain, loader(12, seed=rank))
        assert found.item() == plain.count


@pytest.mark.parametrize("kind", [BufferOutsideState, Number, GrowingList, Bank, Coin])
def test_under_client_level_dp_the_data_of_one_client_do_not_move_another(kind: type[Plain]) -> None:
    def second_update(first: int) -> Tensor:
        updates = {}

        class Recorder(fl.callbacks.FederatedCallback):
            def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
                updates[client] = torch.cat([part.flatten() for part in update.delta.values()])

        module = kind()
        dp = fl.privacy.ClientLevelDP(noise_multiplier=1.0, clip=0.1)
        strategy = FederatedStrategy(transforms=[dp], engine="sequential")
        clients = ClientLoaders([loader(16, seed=first), loader(16, seed=1)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(strategy, 1, callbacks=[Recorder()]).fit(module, clients)
        return updates[1]

    assert torch.equal(second_update(0), second_update(7))


class Collecting(Plain):
    """Collects outputs in lists, as many modules do for ``on_train_epoch_end``."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.losses: list[float] = []
        self.by_round: list[int] = []
        self.seen_in_step: list[tuple[int, int]] = []

    def on_train_epoch_start(self) -> None:
        self.fresh: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen_in_step.append((len(self.outputs), len(self.losses)))
        self.outputs.append(loss.detach())
        self.losses.append(loss.item())
        self.fresh.append(loss.detach())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.by_round.append(self.current_epoch)

    def on_train_epoch_end(self) -> None:
        self.mean = torch.stack(self.outputs).mean()
        assert len(self.outputs) == len(self.fresh)
        self.outputs.clear()


def test_lists_hold_the_outputs_of_all_clients_when_the_round_has_ended() -> None:
    module, clients = Collecting(), ClientLoaders([loader(size, seed=seed) for seed, size in enumerate(SIZES)])
    num_batches = sum(SIZES) // 4
    trainer(FederatedStrategy(), 3).fit(module, clients)
    assert len(module.losses) == 3 * num_batches
    assert module.by_round == [0] * num_batches + [1] * num_batches + [2] * num_batches
    torch.testing.assert_close(module.mean, torch.tensor(module.losses[-num_batches:]).double().mean())
    # Within a client, only its own are there.
    assert module.seen_in_step == [(step, step) for size in SIZES for step in range(size // 4)] * 3


def test_what_is_put_back_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    class Several(Number, BufferOutsideState):
        def remember(self, value: float) -> Any:
            return Number.remember(self, value) + BufferOutsideState.remember(self, value)

    clients = ClientLoaders([loader(8), loader(8, seed=1)])
    module = Several()
    with caplog.at_level("INFO"):
        trainer("fedavg", 3).fit(module, clients)
    (message,) = [line for line in caplog.messages if "Each client starts" in line]
    assert "starts with self.count, self.seen as they were when the round started" in message
    assert module.count == 0
    assert module.seen == 0


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("kind", [Plain, Ordinary, Collecting])
def test_nothing_is_said_of_modules_that_change_nothing_else(
    kind: type[L.LightningModule], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        trainer(FederatedStrategy(engine="sequential"), 2).fit(kind(), ClientLoaders([loader(8), loader(8, seed=1)]))
    assert not [line for line in caplog.messages if "Each client starts" in line]


class ChangedByHooks(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.seen = 1.0, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.temperature

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen += len(batch[0])

    def on_train_epoch_end(self) -> None:
        self.temperature /= 2


class Cooling(fl.callbacks.FederatedCallback):
    def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any) -> None:
        module.temperature *= 0.9

    def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Any) -> None:
        module.temperature *= 0.8


def test_hooks_between_clients_and_rounds_may_change_the_module() -> None:
    module, clients = ChangedByHooks(), ClientLoaders([loader(8), loader(8, seed=1)])
    trainer("fedavg", 2, callbacks=[Cooling()]).fit(module, clients)
    assert module.temperature == pytest.approx((0.5 * 0.9 * 0.8) ** 2)
    assert module.seen == 0  # also after the round's last batch


class Generating(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.draws = (value for value in range(100))


def test_an_iterator_that_cannot_be_put_back_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"The module holds a generator in 'draws'.*Keep a list and an index"):
        trainer("fedavg").fit(Generating(), ClientLoaders([loader(8), loader(8, seed=1)]))
    trainer("fedavg").fit(Generating(), ClientLoaders([loader(8)]))


def test_own_generators_draw_other_numbers_for_each_client_and_round() -> None:
    drawn: list[float] = []

    class Draws(Coin):
        def remember(self, value: float) -> Any:
            drawn.append(super().remember(value))
            return drawn[-1]

    clients = ClientLoaders([loader(4), loader(4, seed=1)])
    trainer(FederatedStrategy(engine="sequential"), 2).fit(Draws(), clients)
    assert len(set(drawn)) == 4


class Outside(Plain):
    """Holds things that are no state of training, some of which can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.lines, self.metric = threading.Lock(), Lines(), MeanMetric()
        self.reference = weakref.ref(self)
        self.own_loader = loader(8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.lines.write("a line")
        self.metric.update(1.0)
        return super().training_step(batch, batch_idx)


class Lines:
    """Stands for a logger of another library, whose counter must go on."""

    def __init__(self) -> None:
        self.lock, self.number = threading.RLock(), 0

    def write(self, line: str) -> None:
        with self.lock:
            self.number += 1


def test_handles_metrics_and_data_are_left_alone() -> None:
    module = Outside()
    trainer(FederatedStrategy(engine="sequential"), 2).fit(module, ClientLoaders([loader(8), loader(8, seed=1)]))
    assert module.lines.number == 8
    assert module.metric.update_count == 8
