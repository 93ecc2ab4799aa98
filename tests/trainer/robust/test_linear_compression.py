"""Compression that adds up: only the same coordinates, or products with one basis, enter the all-reduce."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_fl as fl
from lightning_fl.aggregation import FLTrust, Median, MultiKrum
from lightning_fl.communication.group import TorchGroup
from lightning_fl.compression import Compress, CompressedMean, LowRank, RandomK, TopK
from lightning_fl.privacy import SecureAggregation
from tests.helpers.training import Plain, image_clients, images, trainer, weights
from tests.trainer.robust.test_known_answers import SendsMatrix, loaders

M = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]], dtype=torch.float64)


ROWS = [[*(share * M).flatten().tolist(), share] for share in (0.5, 1.0, 1.5)]
"""Three clients, whose mean is M and 1."""


def sent(transform: Any, rounds: int, engine: str = "sequential", **strategy: Any) -> list[Tensor]:
    """The change of the matrix in each round."""
    found, module = [torch.zeros(3, 2, dtype=torch.float64)], SendsMatrix()

    class Look(fl.callbacks.FederatedCallback):
        def on_aggregate_end(self, trainer: Any, pl_module: Any, aggregate: Any) -> None:
            found.append(pl_module.m.detach().clone())

    settings = {"weighting": "uniform", "seed": 0, **strategy}
    strategy_ = fl.FederatedStrategy("fedavg", transforms=[transform], engine=engine, **settings)
    trainer(strategy_, rounds, callbacks=[Look()]).fit(module, loaders(ROWS, torch.float64))
    assert module.w.item() == pytest.approx(rounds, rel=1e-6)  # vectors are whole
    return [after - before for before, after in pairwise(found)]


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_two_rounds_are_a_step_of_the_power_iteration(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Q = (1, 1) the known P and error of PowerSGD."""
    ones = torch.full((2, 1), 0.5**0.5, dtype=torch.float64)
    start = LowRank.start_round

    def from_ones(self: LowRank, state: Any, ctx: Any) -> Any:
        return start(self, state, ctx) if state else {"right": {"m": ones}}

    monkeypatch.setattr(LowRank, "start_round", from_ones)
    first, second = sent(LowRank(1, error_feedback=False), 2, engine)
    torch.testing.assert_close(first, M @ ones @ ones.t())
    p = torch.tensor([[0.21107926], [0.49251828], [0.84431705]], dtype=torch.float64)
    torch.testing.assert_close(second, p @ p.t() @ M, rtol=1e-6, atol=1e-6)
    assert ((second - M).norm() / M.norm()).item() == pytest.approx(0.03650788, abs=1e-7)


def test_the_rounds_converge_to_the_best_rank() -> None:
    u, s, v = torch.linalg.svd(M, full_matrices=False)
    best = s[0] * u[:, :1] @ v[:1]
    torch.testing.assert_close(sent(LowRank(1, error_feedback=False), 8)[-1], best, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_what_was_not_sent_is_sent_later() -> None:
    """What has been sent after t rounds is t M less what the clients still keep, which stays bounded."""
    open_ = [(t * M - sum(changes[:t])).norm() / M.norm() for changes in [sent(LowRank(1), 60)] for t in (20, 40, 60)]
    lost = [
        (t * M - sum(changes[:t])).norm() / M.norm()
        for changes in [sent(LowRank(1, error_feedback=False), 60)]
        for t in (20, 40, 60)
    ]
    assert max(open_) < 1.2
    assert lost[2] - lost[1] > 0.5


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_all_clients_send_the_same_coordinates(engine: str) -> None:
    module, dense = SendsMatrix(), torch.cat([torch.ones(1, dtype=torch.float64), M.flatten()])
    strategy = fl.FederatedStrategy(
        "fedavg", transforms=[Compress(RandomK(0.3), error_feedback=False)], engine=engine, weighting="uniform"
    )
    trainer(strategy).fit(module, loaders(ROWS, torch.float64))
    found = torch.cat([module.w, module.m.flatten()]).detach()
    assert int((found != 0).sum()) == 3
    torch.testing.assert_close(found[found != 0], dense[found != 0], rtol=1e-6, atol=0)


def fit(transforms: Any, aggregator: Any = None, rounds: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    module = Plain(dtype)
    strategy = fl.FederatedStrategy("fedavg", transforms=transforms, aggregator=aggregator, seed=0)
    trainer(strategy, rounds).fit(module, image_clients((4, 7, 23)))
    return module, strategy


TRANSFORMS: dict[str, Any] = {
    "dense": [],
    "random": [Compress(RandomK(0.05))],
    "low rank": [LowRank(1)],
}
BYTES = {"dense": 4 * 172, "random": 4 * 9, "low rank": 4 * (16 + 8 + 8 + 4)}
"""Of 172 parameters: a twentieth; or two matrices of 8 x 16 and 4 x 8, and biases of 8 and 4."""


def spied() -> dict[str, tuple[int, float, list[float]]]:
    """For each transform the bytes that enter all-reduces in a round, what a client is said to send, and the model."""
    original, counted, found = TorchGroup.all_reduce, [0], {}

    def all_reduce(self: Any, tensor: Tensor, op: str = "sum") -> Tensor:
        counted[0] += tensor.numel() * tensor.element_size()
        return original(self, tensor, op)

    TorchGroup.all_reduce = all_reduce  # type: ignore[method-assign]  # in a process of this test's own
    for name, transforms in TRANSFORMS.items():
        counted[0] = 0
        module, strategy = fit(transforms)
        told = strategy.history[-1].get("bytes_per_client", 0.0)
        found[name] = counted[0] // 3, told, weights(module).tolist()
    return found


def test_only_what_is_sent_enters_the_all_reduce(run_ranks: Any) -> None:
    ranks = run_ranks(2, spied)
    for name, transforms in TRANSFORMS.items():
        num_bytes, told, model = ranks[0][name]
        assert model == ranks[1][name][2]
        assert num_bytes == BYTES[name]
        assert told in (0.0, BYTES[name], BYTES[name] + 8)  # with the seed of the coordinates
        torch.testing.assert_close(torch.tensor(model), weights(fit(transforms)[0]).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["random", "low rank"])
def test_it_adds_up_under_masks_and_beside_robust_rules(name: str) -> None:
    plain = weights(fit(TRANSFORMS[name], dtype=torch.float64)[0])
    masked = weights(fit(TRANSFORMS[name], SecureAggregation(), dtype=torch.float64)[0])
    torch.testing.assert_close(masked, plain, rtol=1e-3, atol=1e-3)
    assert (masked - weights(Plain(torch.float64))).abs().max() > 0.01
    for rule in (MultiKrum(0), Median(0)):
        assert weights(fit(TRANSFORMS[name], rule)[0]).isfinite().all()


@pytest.mark.parametrize("name", ["random", "low rank"])
@pytest.mark.spread(1)
def test_resuming_is_exact(name: str, tmp_path: Any) -> None:
    found = []
    for stops in ([4], [1, 3, 4]):
        path = None
        for stop in stops:
            module = Plain()
            run = trainer(fl.FederatedStrategy("fedavg", transforms=TRANSFORMS[name], seed=0), stop)
            run.fit(module, image_clients((4, 7, 23)), ckpt_path=path)
            path = str(tmp_path / f"{stop}.ckpt")
            run.save_checkpoint(path)
        found.append(weights(module))
    assert torch.equal(*found)


def test_what_can_not_be_right_is_refused() -> None:
    for transform, aggregator, message in (
        (LowRank(), CompressedMean(TopK()), "compress LowRank's products again"),
        (LowRank(), FLTrust(images(4)), "needs whole models"),
        (Compress(RandomK()), FLTrust(images(4)), "needs whole models"),
    ):
        with pytest.raises(ValueError, match=message):
            fl.FederatedStrategy("fedavg", transforms=[transform], aggregator=aggregator)
    with pytest.raises(ValueError, match="rank=0"):
        LowRank(0)
    fl.FederatedStrategy("fedavg", transforms=[Compress(TopK())], aggregator=FLTrust(images(4)))
