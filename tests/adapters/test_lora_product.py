"""Low-rank adapters whose products are averaged, through the Trainer."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_fl.adapters import LoRAProduct
from lightning_fl.adapters.lora_product import factorize
from lightning_fl.aggregation import Aggregator, WeightedMean
from lightning_fl.datamodules import ClientDatasets
from lightning_fl.strategies import FederatedStrategy
from lightning_fl.types import Update
from tests.contract.helpers import from_yaml

WEIGHTS = (1, 2, 3)


class Adapter(L.LightningModule):
    """A low-rank pair and a bias that move by what the batch says, in one step with learning rate 1."""

    def __init__(self, out: int = 6, inner: int = 5, rank: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        draw = {"generator": generator, "dtype": torch.float64}
        self.lora_A = nn.Parameter(torch.randn(rank, inner, **draw))
        self.lora_B = nn.Parameter(torch.randn(out, rank, **draw))
        self.bias = nn.Parameter(torch.randn(out, **draw))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (moves,) = batch
        own = torch.cat([one.flatten() for one in (self.lora_A, self.lora_B, self.bias)])
        return -(moves.mean(0) * own).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def moves(module: Adapter, num_clients: int = 3) -> Tensor:
    size = sum(one.numel() for one in module.parameters())
    return torch.randn(num_clients, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def federate(module: Adapter, own: Tensor, rounds: int = 1, engine: str = "sequential", **settings: Any) -> Adapter:
    """One round; client i has WEIGHTS[i] equal examples."""
    data = {client: TensorDataset(own[client].repeat(WEIGHTS[client % 3], 1)) for client in range(len(own))}
    trainer = L.Trainer(
        strategy=FederatedStrategy("fedavg", **{"aggregator": LoRAProduct(), **settings}, engine=engine),
        max_epochs=rounds,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=ClientDatasets(data, batch_size=8))
    return module


def expected(module: Adapter, own: Tensor) -> Tensor:
    """The mean of the clients' products."""
    a, b = module.lora_A.numel(), module.lora_B.numel()
    total = torch.zeros(module.lora_B.shape[0], module.lora_A.shape[1], dtype=torch.float64)
    for weight, row in zip(WEIGHTS, own, strict=True):
        down = module.lora_A + row[:a].view_as(module.lora_A)
        up = module.lora_B + row[a : a + b].view_as(module.lora_B)
        total += weight * (up @ down).detach()
    return total / sum(WEIGHTS)


def product_of(module: Adapter) -> Tensor:
    return (module.lora_B @ module.lora_A).detach()


def _on_ranks() -> list[Tensor]:
    module = Adapter()
    return [one.detach() for one in federate(module, moves(module)).parameters()]


@pytest.mark.parametrize("engine", ["sequential", "auto"])
def test_the_product_is_the_best_of_the_adapters_rank(engine: str) -> None:
    module = Adapter()
    own, before = moves(module), module.bias.detach().clone()
    exact = expected(module, own)
    federate(module, own, engine=engine)
    error = float((product_of(module) - exact).square().sum())
    best = float(torch.linalg.svdvals(exact)[2:].square().sum())
    assert best > 1e-3
    assert error == pytest.approx(best, rel=1e-10)
    mean = (torch.tensor(WEIGHTS, dtype=torch.float64)[:, None] * own[:, -6:]).sum(0) / sum(WEIGHTS)
    torch.testing.assert_close(module.bias.detach(), before + mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("aggregator", "error"), [(LoRAProduct(), 1.0760060034), (WeightedMean(), 7.0994215642)])
def test_the_mean_of_the_factors_is_worse(aggregator: Aggregator, error: float) -> None:
    """Known answers, which an independent program has computed."""
    module = Adapter()
    nn.init.zeros_(module.lora_A)
    nn.init.zeros_(module.lora_B)
    torch.manual_seed(0)
    down, up = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(3, 6, 2, dtype=torch.float64)
    own = torch.cat([down.flatten(1), up.flatten(1), torch.zeros(3, 6, dtype=torch.float64)], dim=1)
    exact = expected(module, own)
    federate(module, own, aggregator=aggregator)
    assert float((product_of(module) - exact).square().sum()) == pytest.approx(error, abs=1e-10)


def test_opposite_factors_do_not_cancel() -> None:
    """B = (1, -1), A = (1, -1): the mean of the products is 1, the product of the means 0."""
    module = Adapter(out=1, inner=1, rank=1)
    nn.init.zeros_(module.lora_A)
    nn.init.zeros_(module.lora_B)
    own = torch.tensor([[1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]], dtype=torch.float64)
    federate(module, own, weighting="uniform")
    assert float(product_of(module)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("num_ranks", [2])
def test_ranks_compute_what_one_does(run_ranks: Any, num_ranks: int) -> None:
    alone = _on_ranks()
    for found in run_ranks(num_ranks, _on_ranks):
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_product_of_smaller_rank_leaves_zeros() -> None:
    up, down = factorize(torch.outer(torch.tensor([3.0, -4.0]), torch.tensor([1.0, 2.0, 2.0])), rank=3)
    assert up.shape == (2, 3)
    assert down.shape == (3, 3)
    torch.testing.assert_close(up @ down, torch.tensor([[3.0, 6.0, 6.0], [-4.0, -8.0, -8.0]]))
    assert not up[:, 2].any()
    assert up[1, 0] > 0  # the largest entry of the column


class OneFactor(Adapter):
    """Trains only one half of the pair."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A.requires_grad_(False)


@pytest.mark.parametrize(
    ("algorithm", "sentence"),
    [("fedadam", "changes the basis"), ("scaffold", "changes the basis"), ("fedavgm", "changes the basis")],
)
def test_an_algorithm_that_remembers_tensors_is_refused(algorithm: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        FederatedStrategy(algorithm, aggregator=LoRAProduct())


def test_half_a_pair_is_refused() -> None:
    module = OneFactor()
    with pytest.raises(ValueError, match="only one half of the pair of lora_B is trained"):
        federate(module, moves(Adapter()))


def test_a_module_without_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="contain no pair"):
        LoRAProduct().init(Update({"weight": torch.zeros(2)}), torch.device("cpu"))


def test_yaml_names_it() -> None:
    made = from_yaml(Aggregator, "lightning_fl.adapters.LoRAProduct", {})
    assert isinstance(made, LoRAProduct)
