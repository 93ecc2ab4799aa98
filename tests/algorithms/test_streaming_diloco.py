"""Streaming DiLoCo: which fragment is joined when, and that one fragment is DiLoCo."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_fl as fl
from lightning_fl.algorithms import StreamingDiLoCo
from lightning_fl.compression import Cast, Quantize
from tests.helpers.training import loader, trainer


class Blocks(L.LightningModule):
    """Four numbered blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(4)]).double()
            self.head = nn.Linear(16, 4).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].double().flatten(1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.cross_entropy(self.head(x), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Ends(fl.callbacks.FederatedCallback):
    """Keeps by round the global model, and where each client has started and ended."""

    def __init__(self) -> None:
        self.models: list[dict[str, Tensor]] = []
        self.starts: list[dict[int, dict[str, Tensor]]] = []
        self.ends: list[dict[int, dict[str, Tensor]]] = []

    def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any) -> None:
        self.starts.append({})
        self.ends.append({})

    def on_client_start(self, trainer: Any, module: Any, client: Any) -> None:
        self.starts[-1][client] = values(module)

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        self.ends[-1][client] = values(module)

    def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Any) -> None:
        self.models.append(values(module))


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: own.detach().clone() for name, own in module.named_parameters()}


def fit(algorithm: Any, rounds: int = 6, **settings: Any) -> tuple[Ends, list[dict[str, Any]], fl.FederatedStrategy]:
    module, ends = Blocks(), Ends()
    settings = {"num_clients": 2, "local_steps": 2, "client_optimizer": "keep", "engine": "sequential", **settings}
    strategy = fl.FederatedStrategy(algorithm, **settings)
    trainer(strategy, rounds, callbacks=[ends]).fit(module, loader(24))
    return ends, list(strategy.history), strategy


def test_one_fragment_is_diloco_bit_for_bit() -> None:
    streaming, _, _ = fit(StreamingDiLoCo(fragments=1), 3)
    plain, _, _ = fit("diloco", 3)
    for found, expected in zip(streaming.models, plain.models, strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


OF_FRAGMENT = {
    0: ("layers.0.weight", "layers.2.weight", "head.weight", "head.bias"),
    1: ("layers.1.weight", "layers.3.weight"),
}


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_a_fragment_is_joined_at_its_turn(mix: float) -> None:
    """Fragment p after (p + 1) H local steps and then every P H; in between it is each replica's own."""
    found, _, _ = fit(StreamingDiLoCo(fragments=2, mix=mix))
    before = values(Blocks())
    for turn, model in enumerate(found.models):
        for fragment, names in OF_FRAGMENT.items():
            for name in names:
                assert torch.equal(model[name], before[name]) == (fragment != turn % 2)
        before = model
    for turn in range(1, 6):
        for client in (0, 1):
            start, end, model = found.starts[turn][client], found.ends[turn - 1][client], found.models[turn - 1]
            for fragment, names in OF_FRAGMENT.items():
                for name in names:
                    joined = fragment == (turn - 1) % 2
                    torch.testing.assert_close(
                        start[name], mix * end[name] + (1 - mix) * model[name] if joined else end[name]
                    )


def test_the_outer_step_is_nesterov_on_the_fragment() -> None:
    """By hand, for the fragment that is joined first, over two of its turns."""
    found, _, _ = fit(StreamingDiLoCo(fragments=2), 3)
    name, x = "layers.0.weight", values(Blocks())["layers.0.weight"]
    velocity = torch.zeros_like(x)
    for turn in (0, 2):
        change = torch.stack([found.ends[turn][client][name] - x for client in (0, 1)]).mean(0)
        velocity = 0.9 * velocity + change
        x = x + 0.7 * (change + 0.9 * velocity)
        torch.testing.assert_close(found.models[turn][name], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("compressor", "algorithm"), [(Cast(), "diloco"), (Quantize(), StreamingDiLoCo(fragments=2))])
def test_outer_gradients_in_two_bytes_or_one(compressor: Any, algorithm: Any) -> None:
    """The outer step is that of what the bytes decode to: bfloat16, or whole multiples of 1/127 of the largest."""
    compress = fl.compression.Compress(compressor, error_feedback=False)
    found, _, _ = fit(algorithm, 1, transforms=[compress])
    before = values(Blocks())
    names = before if algorithm == "diloco" else OF_FRAGMENT[0]
    deltas = [{name: found.ends[0][client][name] - before[name] for name in names} for client in (0, 1)]
    steps = [max(float(own.abs().max()) for own in delta.values()) / 127 for delta in deltas]
    for name in names:
        moved = (found.models[0][name] - before[name]) / (0.7 * 1.9)
        if isinstance(compressor, Cast):
            sent = torch.stack([delta[name].bfloat16().double() for delta in deltas]).mean(0)
            torch.testing.assert_close(moved, sent, rtol=1e-6, atol=1e-9)
        exact = torch.stack([delta[name] for delta in deltas]).mean(0)
        assert 0 < (moved - exact).abs().max() <= sum(steps) / 2


class WarmsUp(Blocks):
    """Four steps of linear warm-up, then a half cosine to 0 at the end of the last round."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def rate(self, step: int) -> float:
        return step / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / (self.total - 4)))

    def configure_optimizers(self) -> Any:
        self.total = int(self.trainer.estimated_stepping_batches)
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("algorithm", ["diloco", StreamingDiLoCo(fragments=2)])
def test_warm_up_and_cosine_go_through_the_rounds(algorithm: Any) -> None:
    """Each replica goes on where the round before has ended, and all rounds together are one schedule."""
    module = WarmsUp()
    strategy = fl.FederatedStrategy(
        algorithm, num_clients=2, local_steps=5, client_optimizer="keep", engine="sequential"
    )
    trainer(strategy, 3).fit(module, loader(24))
    expected = [0.01 * module.rate(5 * turn + step) for turn in range(3) for _ in range(2) for step in range(5)]
    assert module.rates == pytest.approx(expected, abs=1e-12)
    assert expected[-1] < 0.05 * max(expected)


def bytes_by_round(algorithm: Any) -> list[int]:
    return [entry["num_bytes"] for entry in fit(algorithm, 4)[1]]


@pytest.mark.slow
def test_a_fragment_travels_at_a_time(run_ranks: Any) -> None:
    alone = fit(StreamingDiLoCo(fragments=2), 4)[0].models[-1]
    streaming, whole = (
        run_ranks(2, bytes_by_round, StreamingDiLoCo(fragments=2)),
        run_ranks(2, bytes_by_round, "diloco"),
    )
    numbers = {0: 2 * 256 + 68, 1: 2 * 256}
    for found, plain in zip(streaming, whole, strict=True):
        for turn in (2, 3):  # what does not depend on the size is the same in both
            assert plain[turn] - found[turn] == pytest.approx(8 * numbers[1 - turn % 2], abs=64)
    assert alone.keys() == values(Blocks()).keys()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a positive whole number"):
        StreamingDiLoCo(fragments=0)
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\)"):
        StreamingDiLoCo(mix=1.0)
    with pytest.raises(ValueError, match="fragments=9, but the model has 5 blocks"):
        fit(StreamingDiLoCo(fragments=9))
