from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fl.engines import LocalResult, OptimizerStates, SequentialEngine
from lightning_fl.engines.buffers import moved
from lightning_fl.engines.vectorized.stacking import part
from lightning_fl.tree import add, scale, subtract
from lightning_fl.types import Tree, Update
from tests.helpers.federation import aggregate

INF = float("inf")
MASK = torch.tensor([0.0, -INF])
HUGE = 2**60 + 1  # float64 can't hold it
SGD = partial(torch.optim.SGD, lr=0.1)


class Net(nn.Module):
    """BatchNorm, a head, a frozen and a tied layer, and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2, momentum=0.5)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.body.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.head = nn.Linear(2, 1)
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("small", torch.tensor(0, dtype=torch.uint8))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("mask", MASK.clone())
        self.register_buffer("huge", torch.tensor(HUGE))
        self.register_buffer("scratch", torch.tensor(0.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.small += 1
        self.flag = torch.tensor(True)
        self.scratch += 1
        return self.head(self.frozen(self.tied(self.norm(self.body(x)))))


Train = Callable[[nn.Module, torch.optim.Optimizer, int], None]


class Federation:
    """Rounds on one rank: an engine, its clients' batches and a weighted mean.

    Args:
        module: The module.
        train: The local training of a client.
        weights: Each client's weight.
        make_optimizer: Makes the optimizer.
        engine_options: ``personal`` and ``client_optimizer``.
    """

    def __init__(
        self,
        module: nn.Module,
        train: Train,
        weights: Sequence[float],
        make_optimizer: Any = SGD,
        **engine_options: Any,
    ) -> None:
        self.module, self.train, self.weights = module, train, weights
        trainable = [param for param in module.parameters() if param.requires_grad]
        self.optimizer = make_optimizer(trainable)
        self.engine = SequentialEngine(module, OptimizerStates([self.optimizer]), **engine_options)
        self.kept: dict[int, Any] = {}
        self.server: Tree | None = None
        self.starts: list[Tree] = []
        self.ends: list[Tree] = []
        self.results: list[LocalResult] = []

    def round(self) -> None:
        params = self.engine.begin_round(self.server)
        self.starts, self.ends, self.results, updates = [], [], [], []
        for client, weight in enumerate(self.weights):
            self.engine.start([params], [self.kept.get(client, {})])
            self.starts.append(clone_state(self.module))
            self.train(self.module, self.optimizer, client)
            self.ends.append(clone_state(self.module))
            result = self.engine.finish()
            self.results.append(result)
            self.kept[client] = part(result.client_state, 0)
            updates.append(Update(subtract(part(result.params, 0), params), part(result.buffers, 0), weight))
        mean = aggregate(updates)
        self.server = add(params, mean.mean())
        buffers = moved(self.engine.round_start.buffers, scale(mean.buffers, 1 / mean.weight))
        self.engine.end_round(self.server, buffers, self.results[-1].facts[0].schedule_end)

    def mean_of_ends(self, name: str) -> Tensor:
        shares = torch.tensor(self.weights, dtype=torch.float64) / sum(self.weights)
        return sum((share * end[name].double() for share, end in zip(shares, self.ends, strict=True)), torch.zeros(()))


def clone_state(module: nn.Module) -> Tree:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def batches_of(client: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(client)
    return [torch.randn(3, 2, generator=generator) * (client + 1) for _ in range(2 * client + 1)]


def fit(module: nn.Module, optimizer: torch.optim.Optimizer, client: int) -> None:
    for batch in batches_of(client):
        optimizer.zero_grad()
        (module(batch) - client).square().mean().backward()
        optimizer.step()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def federation(net: Net) -> Federation:
    return Federation(net, fit, [3.0, 9.0, 15.0])


def test_parameters_and_buffers_become_their_weighted_means(federation: Federation) -> None:
    federation.round()
    after = federation.module.state_dict()
    for name in ("body.weight", "head.bias", "norm.weight", "norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(after[name].double(), federation.mean_of_ends(name), rtol=1e-5, atol=1e-6)


def test_integers_are_rounded_to_nearest_and_keep_their_type(federation: Federation) -> None:
    before = clone_state(federation.module)
    federation.round()
    after = federation.module.state_dict()
    assert after["norm.num_batches_tracked"].item() == round((3 * 1 + 9 * 3 + 15 * 5) / 27)
    assert after["seen"].item() == round((3 * 3 + 9 * 9 + 15 * 15) / 27)
    assert after["small"].item() == round((3 * 1 + 9 * 3 + 15 * 5) / 27)
    assert after["flag"].item() is True
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}


def test_what_nobody_changes_stays_bit_for_bit(federation: Federation) -> None:
    before = clone_state(federation.module)
    for _ in range(3):
        federation.round()
    after = federation.module.state_dict()
    for name in ("frozen.weight", "frozen.bias", "mask", "huge"):
        assert torch.equal(after[name], before[name]), name
    assert all(bool(result.buffers["mask"].eq(0).all()) for result in federation.results)


def test_tied_weights_stay_tied_and_are_counted_once(federation: Federation, net: Net) -> None:
    federation.round()
    assert net.tied.weight is net.body.weight
    assert "tied.weight" not in federation.results[0].params
    torch.testing.assert_close(net.tied.weight.double(), federation.mean_of_ends("tied.weight"), rtol=1e-5, atol=1e-6)


def test_a_non_persistent_buffer_never_travels(federation: Federation, net: Net) -> None:
    federation.round()
    assert "scratch" not in federation.results[0].buffers
    assert net.scratch.item() == 0  # nor does it go from one client to the next, or to the next round


def test_a_nan_or_infinity_that_training_brings_shows_in_the_change(net: Net) -> None:
    def spoil(module: nn.Module, optimizer: torch.optim.Optimizer, client: int) -> None:
        module.get_buffer("mask")[0] = INF
        module.get_buffer("norm.running_mean")[0] = float("nan")

    federation = Federation(net, spoil, [1.0])
    federation.round()
    (result,) = federation.results
    assert not result.buffers["mask"].isfinite().all()
    assert not result.buffers["norm.running_mean"].isfinite().all()


def test_every_client_starts_at_the_global_model(federation: Federation) -> None:
    for _ in range(2):
        before = clone_state(federation.module)
        federation.round()
        for start in federation.starts:
            torch.testing.assert_close(start, before, rtol=0, atol=0)
        assert not any(torch.equal(end["body.weight"], before["body.weight"]) for end in federation.ends)


def test_ending_a_round_without_a_change_puts_everything_back(federation: Federation, net: Net) -> None:
    before = clone_state(net)
    params = federation.engine.begin_round(None)
    federation.engine.start([params], [{}])
    fit(net, federation.optimizer, 1)
    federation.engine.finish()
    federation.engine.end_round(params, federation.engine.round_start.buffers, None)
    torch.testing.assert_close(clone_state(net), before, rtol=0, atol=0)


def test_personal_tensors_go_on_with_their_client_and_never_leave_it(net: Net) -> None:
    federation = Federation(net, fit, [1.0, 2.0], personal=("head.*", "norm.running_mean"))
    before = clone_state(net)
    last: list[Tree] = [before, before]
    for _ in range(3):
        federation.round()
        for client in (0, 1):
            for name in ("head.weight", "head.bias", "norm.running_mean"):
                assert torch.equal(federation.starts[client][name], last[client][name])
                assert name not in {**federation.results[client].params, **federation.results[client].buffers}
        last = federation.ends
    for name in ("head.weight", "head.bias", "norm.running_mean"):
        assert torch.equal(net.state_dict()[name], before[name])
        assert not torch.equal(last[0][name], last[1][name])


def test_what_is_not_personal_is_not_kept(federation: Federation) -> None:
    federation.round()
    assert all(kept == {} for kept in federation.kept.values())


@pytest.mark.parametrize(("client_optimizer", "steps"), [("reset", [1.0, 3.0]), ("keep", [2.0, 6.0])])
def test_a_clients_optimizer_is_reset_or_kept(net: Net, client_optimizer: Any, steps: list[float]) -> None:
    make = partial(torch.optim.Adam, lr=0.01)
    found: list[float] = []

    def train(module: nn.Module, optimizer: torch.optim.Optimizer, client: int) -> None:
        fit(module, optimizer, client)
        found.append(optimizer.state[net.body.weight]["step"].item())

    federation = Federation(net, train, [1.0, 1.0], make, client_optimizer=client_optimizer)
    federation.round()
    federation.round()
    assert found == [1.0, 3.0, *steps]
    assert all(bool(kept) == (client_optimizer == "keep") for kept in federation.kept.values())


def test_steps_and_learning_rates_are_those_of_the_client(federation: Federation) -> None:
    federation.round()
    assert [result.facts[0].num_steps for result in federation.results] == [1, 3, 5]
    for result, num_steps in zip(federation.results, (1, 3, 5), strict=True):
        assert result.facts[0].lr_sum.keys() == result.params.keys()
        assert result.facts[0].lr_sum["head.bias"] == pytest.approx(0.1 * num_steps)


def test_gradients_are_transformed_where_there_are_any(federation: Federation, net: Net) -> None:
    engine = federation.engine
    params = engine.begin_round(None)
    net.head.bias.grad, net.head.weight.grad = torch.tensor([2.0]), None
    seen: dict[str, Tree] = {}

    def transform(grads: Tree, params: Tree) -> Tree:
        seen.update(grads=grads, params=params)
        return {name: grad.double() + params[name] for name, grad in grads.items()}

    gradients = net.head.bias.grad, net.head.weight.grad
    engine.start([params], [{}], grad_transform=transform)
    net.head.bias.grad, net.head.weight.grad = gradients
    engine.prepare_gradients(federation.optimizer)
    assert seen["grads"].keys() == {"head.bias"}
    assert "head.weight" in seen["params"]
    assert net.head.weight.grad is None
    assert net.head.bias.grad.dtype == torch.float32
    torch.testing.assert_close(net.head.bias.grad, 2 + net.head.bias.detach())


def test_only_gradients_of_the_stepping_optimizer_are_transformed() -> None:
    module = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in ("first", "second")})
    optimizers = [SGD([param]) for param in module.values()]
    engine = SequentialEngine(module, OptimizerStates(optimizers))
    engine.start([engine.begin_round(None)], [{}], grad_transform=lambda grads, params: scale(grads, 5))
    for _ in range(2):
        for param in module.values():
            param.grad = torch.ones(1)
        engine.prepare_gradients(optimizers[1])
        assert [param.grad.item() for param in module.values()] == [1.0, 5.0]


def test_a_frozen_parameter_that_training_changes_is_put_back_and_averaged_from_then_on(net: Net) -> None:
    def thaw(module: nn.Module, optimizer: torch.optim.Optimizer, client: int) -> None:
        with torch.no_grad():
            module.get_parameter("frozen.weight").add_(1)

    federation, before = Federation(net, thaw, [1.0]), net.get_parameter("frozen.weight").clone()
    federation.round()
    assert federation.engine.moved == {"frozen.weight"}
    assert torch.equal(net.get_parameter("frozen.weight"), before)


class Weights(nn.Module):
    def __init__(self, value: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((3,), value, dtype=dtype))


def stay(module: nn.Module, optimizer: torch.optim.Optimizer, client: int) -> None:
    pass


@pytest.mark.parametrize(
    ("dtype", "summed"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_parameters_are_summed_in_at_least_float32(dtype: torch.dtype, summed: torch.dtype) -> None:
    federation = Federation(Weights(1.0, dtype), stay, [1.0])
    federation.round()
    assert federation.results[0].params["w"].dtype == summed
    assert federation.module.w.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_thousand_equal_half_precision_clients_do_not_drift(dtype: torch.dtype) -> None:
    module = Weights(1.0001, dtype)
    federation = Federation(module, stay, [1.0] * 1000)
    before = module.w.detach().clone()
    federation.round()
    assert torch.equal(module.w, before)


def one_small_step(module: nn.Module, optimizer: torch.optim.Optimizer, client: int) -> None:
    """One of two clients moves by the smallest step that bfloat16 has at 1, so that the mean moves by half of it."""
    with torch.no_grad():
        module.w += 2**-7 * client


@pytest.mark.parametrize(("keeps_server", "moved"), [(True, 8 * 2**-8), (False, 0.0)])
def test_small_changes_add_up_in_the_servers_float32(keeps_server: bool, moved: float) -> None:
    federation = Federation(Weights(1.0, torch.bfloat16), one_small_step, [1.0, 1.0])
    for _ in range(8):
        federation.round()
        federation.server = federation.server if keeps_server else None
    assert federation.module.w.tolist() == [1.0 + moved] * 3


def test_what_a_user_changes_between_rounds_counts() -> None:
    federation = Federation(Weights(1.0, torch.bfloat16), one_small_step, [1.0, 1.0])
    federation.round()
    assert federation.server is not None
    federation.module.w.data[0] = 5.0
    taken = federation.engine.begin_round(federation.server)
    assert taken["w"].tolist() == [5.0, 1.0 + 2**-8, 1.0 + 2**-8]


def test_results_do_not_change_when_the_next_client_trains(federation: Federation) -> None:
    params = federation.engine.begin_round(None)
    federation.engine.start([params], [{}])
    fit(federation.module, federation.optimizer, 1)
    result = federation.engine.finish()
    copy = replace(result, params={name: tensor.clone() for name, tensor in result.params.items()})
    federation.engine.start([params], [{}])
    fit(federation.module, federation.optimizer, 2)
    torch.testing.assert_close(result.params, copy.params, rtol=0, atol=0)
