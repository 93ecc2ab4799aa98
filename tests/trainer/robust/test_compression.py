"""Compression: exact bytes, exact answers, error feedback through the real Trainer, and what it saves between silos."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_fl as fl
from lightning_fl.aggregation.compression.eden import lloyd_max
from lightning_fl.aggregation.compression.powersgd import power_step
from lightning_fl.compression import (
    EDEN,
    QSGD,
    Cast,
    Compress,
    CompressedMean,
    Compressor,
    PowerSGD,
    Quantize,
    RandomK,
    ScaledSign,
    TopK,
)
from lightning_fl.privacy import ClientLevelDP, SecureAggregation
from lightning_fl.types import Update
from tests.helpers.training import Plain, image_clients, loader, trainer, weights
from tests.trainer.robust.test_known_answers import Sends, loaders

V = torch.tensor([3.0, -4.0, 0.0, 1.0, -0.5, 2.0])
EVERY = [Cast(), Cast("float16"), Quantize(), Quantize(4), TopK(0.1), RandomK(0.1), ScaledSign(), QSGD(), QSGD(100)]
EVERY += [EDEN(1), EDEN(2), EDEN(4)]
every_compressor = pytest.mark.parametrize("compressor", EVERY, ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def through(compressor: Compressor, vector: Tensor, seed: int = 0) -> Tensor:
    return compressor.decode(compressor.encode(vector, generator(seed)), len(vector))


@every_compressor
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_bytes_are_as_many_as_it_says(compressor: Compressor, size: int) -> None:
    payload = compressor.encode(torch.randn(size, generator=generator()), generator())
    assert (payload.dtype, payload.shape) == (torch.uint8, (compressor.num_bytes(size),))
    with pytest.raises(ValueError, match=rf"{type(compressor).__name__} got \d+ bytes .* expected"):
        compressor.decode(payload[:-1], size)


def test_bytes_a_number() -> None:
    expected = {
        Cast(): 2.0,
        Quantize(): 1.0,
        Quantize(4): 0.5,
        ScaledSign(): 0.125,
        TopK(0.01): 0.08,
        RandomK(0.01): 0.04,
        QSGD(7): 0.5,
        EDEN(2): 0.25,
    }
    for compressor, bytes_a_number in expected.items():
        assert compressor.num_bytes(1 << 20) / (1 << 20) == pytest.approx(bytes_a_number, abs=1e-4)


@every_compressor
def test_zeros_stay_zeros(compressor: Compressor) -> None:
    assert through(compressor, torch.zeros(9)).tolist() == [0.0] * 9


@pytest.mark.parametrize("compressor", [c for c in EVERY if c.is_idempotent], ids=str)
def test_what_was_decoded_is_decoded_again_without_loss(compressor: Compressor) -> None:
    once = through(compressor, torch.randn(1000, generator=generator()))
    torch.testing.assert_close(through(compressor, once, seed=5), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("compressor", [Quantize(4), RandomK(0.5, scale=True), QSGD(4), EDEN(1), EDEN(2)], ids=str)
@pytest.mark.spread(2)
def test_the_mean_of_many_is_the_vector(compressor: Compressor) -> None:
    """Within 5 standard errors; EDEN's rotation by signs alone is good enough in many dimensions only."""
    vector = torch.randn(512, generator=generator(9)) if isinstance(compressor, EDEN) else V
    drawn = torch.stack([through(compressor, vector, seed) for seed in range(500)]).double()
    assert ((drawn.mean(0) - vector).abs() <= 5 * drawn.std(0) / math.sqrt(500) + 1e-9).all()


def test_known_answers_of_single_vectors() -> None:
    sign = through(ScaledSign(), V)
    assert sign.tolist() == [1.75, -1.75, 1.75, 1.75, -1.75, 1.75]
    # How much of the vector is kept: 1 - |v - C(v)|^2 / |v|^2.
    assert 1 - float((V - sign).square().sum() / V.square().sum()) == pytest.approx(0.60743802, abs=1e-7)
    drawn = torch.stack([through(QSGD(4), V, seed) for seed in range(4000)]).double()
    levels = drawn.abs() / V.norm() * 4
    up = (levels - torch.tensor([2, 2, 0, 0, 0, 1])).mean(0)
    expected = torch.tensor([0.18181818, 0.90909091, 0, 0.72727273, 0.36363636, 0.45454545], dtype=torch.float64)
    assert (up - expected).abs().max() < 0.04
    assert float(drawn.var(0).sum()) == pytest.approx(1.71875, rel=0.05)
    assert through(TopK(0.3), V).tolist() == [3.0, -4.0, 0.0, 0.0, 0.0, 0.0]
    assert through(Cast("float16"), torch.tensor([1e9, -1e9])).tolist() == [65504.0, -65504.0]


def test_power_sgd_has_its_known_answer() -> None:
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]], dtype=torch.float64)
    p, q = power_step(matrix, torch.ones(2, 1, dtype=torch.float64))
    expected = torch.tensor([0.21107926, 0.49251828, 0.84431705], dtype=torch.float64)
    torch.testing.assert_close(p[:, 0].abs(), expected, rtol=0, atol=1e-8)
    error = torch.linalg.norm(matrix - p @ q.t()) / torch.linalg.norm(matrix)
    assert float(error) == pytest.approx(0.03650788, abs=1e-8)


def test_eden_has_the_values_of_lloyd_and_max() -> None:
    assert lloyd_max(1).tolist() == pytest.approx([-0.79788456, 0.79788456], abs=1e-8)
    assert lloyd_max(2).tolist()[2:] == pytest.approx([0.45278003, 1.51041761], abs=1e-8)
    vector = torch.randn(4096, generator=generator(3))
    for bits, error in {1: 0.5708, 2: 0.1331, 4: 0.0096}.items():
        drawn = [through(EDEN(bits), vector, seed) - vector for seed in range(20)]
        found = sum(float(one.square().sum()) for one in drawn) / 20 / float(vector.square().sum())
        assert found == pytest.approx(error, rel=0.05)


# ---- through the Trainer


def run(transform: Any, rows: Any, rounds: int, **strategy: Any) -> tuple[list[float], list[dict[str, Any]], Any]:
    """The global model after each round in which the clients' updates are ``rows``."""
    module, found = Sends(len(rows[0]), torch.float64), []

    class Notes(fl.callbacks.FederatedCallback):
        def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Any) -> None:
            found.append(module.w.tolist())

    fit = trainer(fl.FederatedStrategy("fedavg", transforms=[transform], **strategy), rounds, callbacks=[Notes()])
    fit.fit(module, loaders(rows, torch.float64))
    return found, fit.strategy.history, fit


def test_error_feedback_sends_what_was_left() -> None:
    """The largest of (1, .6, .25, .1), four times: 1@0, 1.2@1, 2@0, 1.2@1."""
    models, history, _ = run(Compress(TopK(0.25)), [(1.0, 0.6, 0.25, 0.1)], 4)
    expected = [[1, 0, 0, 0], [1, 1.2, 0, 0], [3, 1.2, 0, 0], [3, 2.4, 0, 0]]
    torch.testing.assert_close(torch.tensor(models), torch.tensor(expected), rtol=0, atol=1e-6)
    assert [entry["bytes_per_client"] for entry in history] == [8.0] * 4
    without, _, _ = run(Compress(TopK(0.25), error_feedback=False), [(1.0, 0.6, 0.25, 0.1)], 4)
    assert without[-1] == [4.0, 0.0, 0.0, 0.0]


def test_the_residual_of_the_scaled_sign() -> None:
    state: Any = {}
    sent = torch.zeros(4, dtype=torch.float64)
    ctx = fl.aggregation.RoundContext(0, [0], 1, client=0)
    for given, scale in (
        ((1.0, -0.6, 0.25, -0.1), 0.4875),
        ((0.5, 0.5, -0.5, 0.5), 0.75625),
        ((-1.0, 0.2, 0.9, 0.0), 0.490625),
    ):
        update = Update({"w": torch.tensor(given, dtype=torch.float64)})
        out, state = Compress(ScaledSign()).client(update, state, ctx)
        assert out.delta["w"].abs().tolist() == pytest.approx([scale] * 4, abs=1e-7)
        sent += out.delta["w"]
    residual = state["residual"]["torch.float64"]
    assert residual.tolist() == pytest.approx([-0.253125, 0.321875, 0.428125, -0.359375], abs=1e-7)
    assert (sent + residual).tolist() == pytest.approx([0.5, 0.1, 0.65, 0.4], abs=1e-12)


@pytest.mark.parametrize("transform", [Compress(TopK(0.1)), Compress(ScaledSign()), PowerSGD(1)], ids=str)
def test_resuming_and_both_engines_are_exact(transform: Any, tmp_path: Any) -> None:
    def fit(rounds: int, path: Any = None, engine: str = "sequential") -> Tensor:
        module = Plain()
        one = trainer(fl.FederatedStrategy("fedavg", transforms=[transform], engine=engine), rounds)
        one.fit(module, image_clients((4, 7, 5)), ckpt_path=path)
        one.save_checkpoint(tmp_path / f"{rounds}.ckpt")
        return weights(module)

    whole = fit(3)
    fit(1)
    assert torch.equal(fit(3, tmp_path / "1.ckpt"), whole)
    torch.testing.assert_close(fit(3, engine="vectorized"), whole, rtol=1e-5, atol=1e-6)


def test_what_can_not_be_right_is_refused() -> None:
    private, top = ClientLevelDP(clip=1.0, noise_multiplier=1.0), TopK(0.1)
    strategy = fl.FederatedStrategy
    with pytest.raises(ValueError, match="Compress comes after ClientLevelDP and may lengthen"):
        strategy("fedavg", transforms=[private, Compress(top)])
    with pytest.raises(ValueError, match="Compress comes after ClientLevelDP and may lengthen"):
        strategy("fedavg", transforms=[private, Compress(QSGD(), error_feedback=False)])
    strategy("fedavg", transforms=[private, Compress(top, error_feedback=False)])
    with pytest.raises(ValueError, match="can't be added up under the masks of SecureAggregation"):
        strategy("fedavg", transforms=[Compress(top)], aggregator=SecureAggregation())
    strategy("fedavg", transforms=[Compress(RandomK(0.1))], aggregator=SecureAggregation())
    for compressor, aggregator in ((top, CompressedMean(TopK(0.2))), (QSGD(), CompressedMean(QSGD()))):
        with pytest.raises(ValueError, match="would compress again"):
            strategy("fedavg", transforms=[Compress(compressor)], aggregator=aggregator)
    strategy("fedavg", transforms=[Compress(top)], aggregator=CompressedMean(TopK(0.1)))
    with pytest.raises(ValueError, match="is no sum"):
        strategy("fedavg", transforms=[private], aggregator=CompressedMean(top))
    for make in (
        lambda: TopK(0.0),
        lambda: RandomK(2.0),
        lambda: Quantize(3),
        lambda: QSGD(0),
        lambda: EDEN(3),
        lambda: Cast("int8"),  # type: ignore[arg-type]
        lambda: PowerSGD(0),
        lambda: Compress(RandomK(scale=True)),
        lambda: Compress("topk"),  # type: ignore[arg-type]
        lambda: CompressedMean("topk"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"must be|is not known|lengthens"):
            make()


def test_a_robust_rule_sees_what_the_bytes_decode_to() -> None:
    models, history, _ = run(
        Compress(TopK(0.5)), [(1.0, 0.1), (1.0, 0.2), (1.0, 0.3), (0.1, 90.0)], 1, aggregator=fl.aggregation.Median(1)
    )
    assert models[0] == [1.0, 0.0]
    assert history[0]["bytes_per_client"] == 8.0


# ---- between silos


def silo(compressor: Any) -> tuple[list[float], int, int]:
    rank = int(os.environ["RANK"])
    module = Plain(torch.float32)
    transforms = [Compress(compressor)] if compressor is not None and compressor.is_idempotent else []
    aggregator = None if compressor is None else CompressedMean(compressor)
    strategy = fl.FederatedStrategy("fedavg", aggregator=aggregator, transforms=transforms)
    fit = trainer(strategy, 2)
    sent: list[int] = []

    class Spy(fl.callbacks.FederatedCallback):
        """Counts what the collectives of tensors are given, outside of the program's own figures."""

        def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any, view: Any) -> None:
            group = view.group
            if round == 0:
                for name in ("all_reduce", "all_to_all"):
                    setattr(group, name, counted(getattr(group, name), sent, group.rank))

    fit.callbacks.append(Spy())
    fit.fit(module, loader(24, 4, seed=rank))
    return weights(module).tolist(), sum(sent) // 2, len(weights(module))


def counted(collective: Any, sent: list[int], rank: int) -> Any:
    def call(tensors: Any, *args: Any) -> Any:
        if isinstance(tensors, Tensor):
            sent.append(tensors.numel() * tensors.element_size())
        else:
            sent.append(sum(t.numel() * t.element_size() for other, t in enumerate(tensors) if other != rank))
        return collective(tensors, *args)

    return call


@pytest.mark.parametrize(
    ("compressor", "most"),
    [(None, 4.0), (Cast(), 2.1), (ScaledSign(), 0.15), (TopK(0.01), 0.1), (QSGD(), 0.55)],
    ids=str,
)
def test_silos_send_the_bytes_they_say(run_ranks: Any, compressor: Any, most: float) -> None:
    ranks = run_ranks(2, silo, compressor)
    assert ranks[0] == ranks[1]
    _, sent, size = ranks[0]
    # The header of each vector, up to 8 bytes, weighs in a model as small as this.
    assert sent <= most * size + 12
    assert compressor is not None or sent == 4 * size


def test_silos_are_warned_where_compression_does_not_pay(run_ranks: Any) -> None:
    with pytest.raises(Exception, match="sends more than an all-reduce of float32 would: it pays below 1 silos"):
        run_ranks(2, silo, TopK(1.0))
