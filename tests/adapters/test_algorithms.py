"""FFA-LoRA, Fed-SB, ranks by client and merged adapters, on layers of which everything is known."""

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lightning_fl as fl
from lightning_fl.algorithms.lora import square_adapters
from tests.helpers.training import trainer

WEIGHTS = (1, 2, 3)


class Layer(nn.Module):
    """``W x + s B A x`` with the names of peft."""

    def __init__(self, inner: int, out: int, rank: int, scale: float = 2.0) -> None:
        super().__init__()
        self.base_layer = nn.Linear(inner, out, bias=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inner, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, out, bias=False)})
        self.base_layer.requires_grad_(False)
        nn.init.zeros_(self.lora_B["default"].weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scale * self.lora_B["default"](self.lora_A["default"](x))


class Adapted(L.LightningModule):
    """Two adapted layers that are to give the mean of their inputs."""

    def __init__(self, make_optimizer: Any = None, rank: int = 3, lr: float = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(Layer(5, 6, rank), nn.Tanh(), Layer(6, 4, rank)).double()
        self.make_optimizer = make_optimizer or (lambda params: torch.optim.SGD(params, lr=lr))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([param for param in self.parameters() if param.requires_grad])


def examples(number: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randn(number, 4, generator=generator, dtype=torch.float64))


def federate(module: Adapted, rounds: int = 1, sizes: Any = (4, 8, 12), **settings: Any) -> fl.FederatedStrategy:
    strategy = fl.FederatedStrategy(**{"algorithm": "fedavg", "engine": "sequential", **settings})
    data = [examples(size, seed) for seed, size in enumerate(sizes)]
    trainer(strategy, rounds).fit(module, fl.datamodules.ClientDatasets(data, batch_size=None))
    return strategy


def named(module: nn.Module, word: str) -> dict[str, Tensor]:
    return {name: own.detach().clone() for name, own in module.named_parameters() if word in name}


def test_one_step_with_a_common_factor_is_the_centralised_step() -> None:
    module, central = Adapted(), Adapted()
    before = named(module, "lora_A")
    federate(module, algorithm=fl.algorithms.FFALoRA())
    x, y = (
        torch.cat(parts)
        for parts in zip(*(examples(n, seed).tensors for seed, n in enumerate((4, 8, 12))), strict=True)
    )
    optimizer = torch.optim.SGD([own for name, own in central.named_parameters() if "lora_B" in name], lr=0.1)
    central.training_step((x, y), 0).backward()
    optimizer.step()
    for name, own in named(central, "lora_B").items():
        assert own.abs().max() > 1e-3
        torch.testing.assert_close(module.get_parameter(name), own, rtol=1e-12, atol=1e-12)
    for name, own in named(module, "lora_A").items():
        assert torch.equal(own, before[name])
        assert not module.get_parameter(name).requires_grad


def test_a_factor_may_stay_with_its_client() -> None:
    """FedSA-LoRA by hand: the A factors are averaged, each client goes on with its own B."""
    module, watches = Adapted(), Watches()
    nn.init.normal_(module.net[0].lora_B["default"].weight)
    common = named(module, "lora_B")
    data = fl.datamodules.ClientDatasets([examples(4 * weight, weight) for weight in WEIGHTS], batch_size=4)
    strategy = fl.FederatedStrategy("fedavg", personal=("*lora_B*",), engine="sequential")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*personal")
        trainer(strategy, 2, callbacks=[watches]).fit(module, data)
    for name, own in named(module, "lora_A").items():
        mean = sum(weight / 6 * watches.ends[client][name] for client, weight in enumerate(WEIGHTS))
        torch.testing.assert_close(own, mean, rtol=1e-12, atol=1e-12)
    for name, own in common.items():
        assert torch.equal(module.get_parameter(name), own)
        for client in range(3):
            begun, ended = watches.starts[client][name], watches.before[client][name]
            assert torch.equal(begun, ended)  # the second round begins where the client's first one has ended
            assert not torch.equal(begun, own)


def test_a_square_between_fixed_factors_is_averaged_exactly() -> None:
    module, plain = Adapted(), Adapted()
    square_adapters(module)
    x = examples(3, 9).tensors[0]
    base = [layer.base_layer for layer in plain.net[::2]]
    torch.testing.assert_close(module.net(x), base[1](torch.tanh(base[0](x))))  # R = 0: the base itself
    trained = {name: own.numel() for name, own in module.named_parameters() if own.requires_grad}
    assert list(trained.values()) == [9, 9]
    assert all(name.endswith(".R") for name in trained)
    federate(module, algorithm=fl.algorithms.FedSBLoRA())
    # B R A is linear in R, so that the mean of the products is the product of the mean.
    layer = module.net[0]
    fixed = layer.lora_B["default"].parametrizations.weight.original
    square = layer.lora_B["default"].parametrizations.weight[0].R
    assert square.abs().max() > 1e-4
    torch.testing.assert_close(layer.lora_B["default"].weight, fixed @ square)
    torch.testing.assert_close(fixed.T @ fixed, torch.eye(3, dtype=torch.float64))


def adamw(params: Any) -> Any:
    return torch.optim.AdamW(params, lr=0.05, weight_decay=0.3)


class Watches(fl.callbacks.FederatedCallback):
    """Keeps the factors with which each client starts and ends its last round, and ended the one before."""

    def __init__(self) -> None:
        self.starts: dict[int, dict[str, Tensor]] = {}
        self.ends: dict[int, dict[str, Tensor]] = {}
        self.before: dict[int, dict[str, Tensor]] = {}

    def on_client_start(self, trainer: Any, module: Any, client: Any) -> None:
        self.starts[client], self.before[client] = named(module, "lora_"), self.ends.get(client, {})

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        self.ends[client] = named(module, "lora_")


def test_what_lies_beyond_a_clients_rank_stays_zero() -> None:
    module, watches = Adapted(adamw), Watches()
    nn.init.normal_(module.net[0].lora_B["default"].weight)
    data = fl.datamodules.ClientDatasets([examples(8, seed) for seed in range(3)], batch_size=4)
    strategy = fl.FederatedStrategy(
        fl.algorithms.HetLoRA(ranks=(1, 2, 3)), aggregator=fl.adapters.LoRAProduct(), engine="sequential"
    )
    trainer(strategy, 2, callbacks=[watches]).fit(module, data)
    for client, rank in enumerate((1, 2, 3)):
        for name, own in watches.ends[client].items():
            kept, beyond = (own[:rank], own[rank:]) if "lora_A" in name else (own[:, :rank], own[:, rank:])
            assert kept.abs().min() > 0
            assert torch.count_nonzero(beyond) == 0
    products = [
        watches.ends[client]["net.0.lora_B.default.weight"] @ watches.ends[client]["net.0.lora_A.default.weight"]
        for client in range(3)
    ]
    layer, mean = module.net[0], torch.stack(products).mean(0)
    error = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight - mean).square().sum()
    best = torch.linalg.svdvals(mean)[3:].square().sum()
    torch.testing.assert_close(error.detach(), best, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4 / 3), (True, 4 / 3**0.5)])
def test_merged_products_are_exact(rslora: bool, scale: float) -> None:
    """A round with several steps: the new base holds the mean of the products, and the adapters start afresh."""
    module, watches = Adapted(), Watches()
    base = module.net[0].base_layer.weight.detach().clone()
    data = fl.datamodules.ClientDatasets([examples(4 * weight, weight) for weight in WEIGHTS], batch_size=4)
    product = fl.adapters.LoRAProduct("stack", alpha=4.0, rslora=rslora)
    strategy = fl.FederatedStrategy("fedavg", local_epochs=2, aggregator=product, engine="sequential")
    trainer(strategy, callbacks=[watches]).fit(module, data)
    exact = sum(
        weight / 6 * (own["net.0.lora_B.default.weight"] @ own["net.0.lora_A.default.weight"])
        for weight, own in zip(WEIGHTS, watches.ends.values(), strict=True)
    )
    assert torch.linalg.matrix_rank(exact) > 3  # more than the adapters could hold
    layer = module.net[0]
    torch.testing.assert_close(layer.base_layer.weight.detach(), base + scale * exact, rtol=1e-10, atol=1e-10)
    assert torch.count_nonzero(layer.lora_B["default"].weight) == 0
    drawn = layer.lora_A["default"].weight
    assert 0.2 < drawn.abs().max() * 5**0.5 <= 1
    assert not layer.base_layer.weight.requires_grad


def test_a_smaller_rank_is_cut_off() -> None:
    module = Adapted()
    federate(module, local_epochs=3, aggregator=fl.adapters.LoRAProduct(rank=1))
    up = module.net[0].lora_B["default"].weight
    assert up[:, 0].abs().max() > 0
    assert torch.count_nonzero(up[:, 1:]) == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fl.adapters.LoRAProduct("stack"), "needs alpha"),
        (lambda: fl.adapters.LoRAProduct(alpha=4.0), "'svd' does not"),
        (lambda: fl.adapters.LoRAProduct("mean"), "expected 'svd' or 'stack'"),
        (lambda: fl.adapters.LoRAProduct(rank=0), "is for method='svd' only"),
        (lambda: fl.algorithms.HetLoRA(), "expected a positive whole number for each client"),
        (lambda: federate(Adapted(), algorithm=fl.algorithms.HetLoRA(ranks=(1, 2))), "ranks for 2 clients, but .* 3"),
        (
            lambda: federate(Adapted(), aggregator=fl.adapters.LoRAProduct(), personal=("*lora_B*",)),
            "only one half of the pair",
        ),
        (lambda: federate(NoAdapter(), algorithm=fl.algorithms.FFALoRA()), "contain no pair"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


class NoAdapter(Adapted):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4)).double()
