"""Clipping one by one, per-sample gradients, and their check, against loops over the examples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lightning_fl.privacy import PrivacyError, SecureNoise
from lightning_fl.privacy.sample_level import dp_sgd as sgd
from lightning_fl.privacy.sample_level.dp_sgd import NoiseWatch, NoisySum
from lightning_fl.privacy.sample_level.per_sample import (
    PerSampleGradients,
    check_clipped_sum,
    check_per_sample,
    clipped_sum,
    why_not_per_sample,
)
from lightning_fl.privacy.sample_level.rows import num_rows, take_rows
from lightning_fl.types import Tree


def norm(tree: Tree, row: int | None = None) -> float:
    parts = [tensor if row is None else tensor[row] for tensor in tree.values()]
    return float(torch.cat([part.double().flatten() for part in parts]).norm())


@given(st.lists(st.floats(-1e3, 1e3), min_size=12, max_size=12), st.floats(0.01, 100.0))
def test_the_clipped_sum_is_that_of_a_loop(values: list[float], clip: float) -> None:
    flat = torch.tensor(values, dtype=torch.float64).view(3, 4)
    samples = {"a": flat[:, :3].reshape(3, 3, 1), "b": flat[:, 3]}
    total = clipped_sum(samples, clip)
    expected = sum(row * min(1.0, clip / float(row.norm())) if row.any() else row for row in flat)
    found = torch.cat([total["a"].flatten(), total["b"].flatten()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * clip)
    check_clipped_sum(total, 3, clip)


ADVERSARIAL = [0.0, 1e-30, 1.0, -1.0, 1e30, 3e38, math.nan, math.inf, -math.inf]


def test_one_example_more_moves_the_sum_by_no_more_than_the_clip() -> None:
    rows = torch.tensor(list(itertools.product(ADVERSARIAL, repeat=2)))
    everything = clipped_sum({"x": rows}, 0.5)["x"].double()
    assert everything.isfinite().all()
    for left_out in range(len(rows)):
        rest = torch.cat([rows[:left_out], rows[left_out + 1 :]])
        alone = clipped_sum({"x": rows[left_out : left_out + 1]}, 0.5)["x"].double()
        assert alone.norm() <= 0.5
        moved = everything - clipped_sum({"x": rest}, 0.5)["x"].double()
        assert moved.norm() <= 0.5 * (1 + 1e-4)  # float32 sums
    for broken in ([1.0, math.nan], [math.inf, 0.0]):
        assert clipped_sum({"x": torch.tensor([broken])}, 0.5)["x"].tolist() == [0.0, 0.0]


def test_a_tensor_of_many_entries_is_clipped_to_the_norm() -> None:
    rows = torch.full((1, 50_000_000), 0.1)  # whose norm in float32 is 3.5% too short
    total = clipped_sum({"x": rows}, 1.0)
    assert float(torch.linalg.vector_norm(total["x"], dtype=torch.float64)) == pytest.approx(1.0, rel=1e-5)
    with pytest.raises(PrivacyError, match=r"has norm 1.00"):
        check_clipped_sum({"x": total["x"] * 1.001}, 1, 1.0)


def test_a_sum_that_is_too_long_is_found() -> None:
    with pytest.raises(PrivacyError, match="norm 3"):
        check_clipped_sum({"x": torch.tensor([3.0])}, 2, 1.0)
    with pytest.raises(PrivacyError, match="nan"):
        check_clipped_sum({"x": torch.tensor([math.nan])}, 2, 1.0)


# ---- gradients of each example


class OwnLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.exp()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)), lambda n: torch.randn(n, 8)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)),
        lambda n: torch.randn(n, 2, 4, 4),
    ),
    "words": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 4)),
        lambda n: torch.randint(9, (n, 3)),
    ),
    "own layer": (lambda: nn.Sequential(OwnLayer(), nn.Linear(8, 4)), lambda n: torch.randn(n, 8)),
    "a layer used twice": (lambda: nn.Sequential(Twice(), nn.Linear(8, 4)), lambda n: torch.randn(n, 8)),
    "dropout": (lambda: nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.Linear(6, 4)), lambda n: torch.randn(n, 8)),
}
Loss = Callable[[Any], Tensor]


def cross_entropy(network: nn.Module, **options: Any) -> Loss:
    return lambda batch: functional.cross_entropy(network(batch[0]), batch[1], **options)


def problem(network: nn.Module, inputs: Callable[[int], Tensor], loss_of: Loss, size: int = 5) -> str | None:
    gradients = PerSampleGradients(network, dict(network.named_parameters()))
    batch = [inputs(size), torch.tensor([0, 1, 2, 3, 0])[:size]]
    try:
        check_per_sample(gradients, loss_of, batch, 1e-3)
    except PrivacyError as error:
        return str(error)
    finally:
        gradients.detach()
    return None


KINDS = [(kind, mode) for kind in NETWORKS if kind != "dropout" for mode in ("hooks", "functorch")]
KINDS.remove(("words", "functorch"))  # Opacus 1.6 takes the words' integers for mixed precision


@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_gradients_are_those_of_each_example_alone(kind: str, mode: Any) -> None:
    torch.manual_seed(0)
    make, inputs = NETWORKS[kind]
    network, size = make().double(), 5
    x = inputs(size)
    batch = [x.double() if x.is_floating_point() else x, torch.arange(size) % 4]
    loss_of, params = cross_entropy(network), dict(network.named_parameters())
    alone = [torch.autograd.grad(loss_of(take_rows(batch, [row])), list(params.values())) for row in range(size)]
    before = {name: dict(vars(layer)) for name, layer in network.named_modules()}
    gradients = PerSampleGradients(network, params, mode)
    gradients.start()
    loss_of(batch).backward()
    samples = gradients.take(size)
    for index, name in enumerate(params):
        expected = torch.stack([own[index] for own in alone])
        torch.testing.assert_close(samples[name], expected, rtol=1e-6, atol=1e-9)
    clipped = clipped_sum(samples, 0.1)
    for index, name in enumerate(params):
        factors = [min(1.0, 0.1 / math.sqrt(sum(float(g.norm()) ** 2 for g in own))) for own in alone]
        expected = sum(own[index] * factor for own, factor in zip(alone, factors, strict=True))
        torch.testing.assert_close(clipped[name], expected, rtol=1e-5, atol=1e-6)
    gradients.detach()
    assert {name: dict(vars(layer)) for name, layer in network.named_modules()}.keys() == before.keys()
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in network.modules())
    assert not any(hasattr(param, "grad_sample") for param in params.values())


def test_what_a_failed_pass_left_on_the_parameters_is_cleared() -> None:
    network = nn.Linear(8, 4)
    batch, loss_of = [torch.randn(5, 8), torch.arange(5) % 4], cross_entropy(network)
    gradients = PerSampleGradients(network, dict(network.named_parameters()))
    gradients.start()
    loss_of(batch).backward()
    expected = gradients.take(5)
    gradients.start()
    failed = loss_of(batch)
    loss_of(batch)  # never gets its backward pass
    failed.backward()
    left = [(param._forward_counter, hasattr(param, "_current_grad_sample")) for param in network.parameters()]  # type: ignore
    assert left == [(1, True), (1, True)]
    gradients.start()
    loss_of(batch).backward()
    samples = gradients.take(5)
    gradients.detach()
    for name, sample in expected.items():
        torch.testing.assert_close(samples[name], sample)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("size", [1, 5])
def test_the_check_accepts_means_over_examples(kind: str, size: int) -> None:
    torch.manual_seed(0)
    make, inputs = NETWORKS[kind]
    network = make()
    assert why_not_per_sample(network) is None
    assert problem(network, inputs, cross_entropy(network), size) is None


def test_the_check_takes_examples_without_a_gradient_for_zero() -> None:
    make, inputs = NETWORKS["linear"]
    network = make()

    def loss_of(batch: Any) -> Tensor:
        each = functional.cross_entropy(network(batch[0]), batch[1], reduction="none")
        return (each * batch[0][:, 0]).mean()

    for value in (math.nan, math.inf, 0.0):
        x = inputs(5)
        x[0, 0] = value
        assert problem(network, lambda n, x=x: x, loss_of) is None


def contrast(network: nn.Module) -> Loss:
    def loss(batch: Any) -> Tensor:
        scores = network(batch[0])
        return functional.cross_entropy(scores @ scores.T, torch.arange(len(scores)))

    return loss


WRONG: dict[str, Callable[[nn.Module], Loss]] = {
    "a sum": lambda network: cross_entropy(network, reduction="sum"),
    "class weights": lambda network: cross_entropy(network, weight=torch.tensor([1.0, 5.0, 1.0, 1.0])),
    "ignored labels": lambda network: cross_entropy(network, ignore_index=1),
    "a contrast": contrast,
    "a penalty": lambda network: (
        lambda batch: cross_entropy(network)(batch) + sum(param.square().sum() for param in network.parameters())
    ),
    "normalisation": lambda network: (
        lambda batch: functional.cross_entropy(network(batch[0] - batch[0].mean(0)), batch[1])
    ),
    "random numbers": lambda network: (
        lambda batch: functional.cross_entropy(network(batch[0] + torch.randn_like(batch[0])), batch[1])
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_the_check_finds_losses_that_tie_examples_together(kind: str) -> None:
    torch.manual_seed(0)
    make, inputs = NETWORKS["linear"]
    network = make()
    found = problem(network, inputs, WRONG[kind](network))
    assert found is not None
    assert "depends on the others" in found


def test_the_check_finds_gradients_that_are_not_per_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    make, inputs = NETWORKS["linear"]
    take = PerSampleGradients.take

    def averaged(self: PerSampleGradients, size: int) -> Tree:
        return {name: sample.mean(0, keepdim=True).expand_as(sample) for name, sample in take(self, size).items()}

    monkeypatch.setattr(PerSampleGradients, "take", averaged)
    network = make()
    assert "depends on the others" in str(problem(network, inputs, cross_entropy(network)))


def test_the_check_finds_sums_that_are_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    make, inputs = NETWORKS["linear"]
    network = make()
    unclipped = lambda samples, clip: {name: sample.sum(0) for name, sample in samples.items()}  # noqa: E731
    monkeypatch.setattr("lightning_fl.privacy.sample_level.per_sample.clipped_sum", unclipped)
    assert "not clipped one by one" in str(problem(network, inputs, cross_entropy(network)))


def test_a_parameter_used_past_its_layer_is_found() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    gradients = PerSampleGradients(network, dict(network.named_parameters()))
    x = torch.randn(3, 8)
    gradients.start()
    functional.linear(functional.linear(x, network[0].weight), network[1].weight).sum().backward()
    with pytest.raises(PrivacyError, match="has a gradient, but none per sample"):
        gradients.take(3)
    gradients.start()
    network(x.repeat(2, 1)).sum().backward()
    with pytest.raises(PrivacyError, match="have the shape"):
        gradients.take(3)
    gradients.detach()


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.own = nn.Linear(2, 2), nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "GroupNorm"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).requires_grad_(False)), "GroupNorm"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)), "inplace=False"),
        (nn.Sequential(nn.LSTM(2, 2)), "LSTM"),
        (nn.Sequential(nn.InstanceNorm1d(2, affine=True, track_running_stats=True)), "running stats"),
        (Direct(), "Move it into a layer"),
    ],
)
def test_layers_that_tie_examples_together_are_named(network: nn.Module, reason: str) -> None:
    assert reason in str(why_not_per_sample(network))


# ---- a step


PARAMS = {"a": torch.zeros(300, 40), "b": torch.zeros(100)}


def samples(size: int, scale: float = 1.0) -> Tree:
    return {name: scale * torch.randn(size, *value.shape) for name, value in PARAMS.items()}


def test_a_step_is_the_clipped_mean_with_noise_of_the_recorded_deviation() -> None:
    own = samples(4)
    quiet = NoisySum(0.0, 0.5, 8.0, NoiseWatch(), None)
    quiet.add(own, 4)
    expected = clipped_sum(own, 0.5)
    for name, grad in quiet.release(PARAMS).items():
        torch.testing.assert_close(grad, expected[name] / 8.0)
    noisy = NoisySum(2.0, 0.5, 8.0, NoiseWatch(), None)
    steps = []
    for size in (4, 0, 1):
        for part in [own] if size == 4 else [samples(1)] * size:
            noisy.add(part, size)
        clipped = clipped_sum(own if size == 4 else samples(0), 0.5)
        noise = {name: 8.0 * grad - (clipped[name] if size else 0) for name, grad in noisy.release(PARAMS).items()}
        steps.append(torch.cat([value.flatten() for value in noise.values()]))
    for flat in steps[:2]:
        assert float(flat.std()) == pytest.approx(2.0 * 0.5, rel=5 / (2 * len(flat)) ** 0.5)
        assert abs(float(flat.mean())) < 5 / len(flat) ** 0.5
    assert abs(float(torch.corrcoef(torch.stack(steps[:2]))[0, 1])) < 5 / len(steps[0]) ** 0.5


def test_parts_of_a_batch_add_up() -> None:
    own, whole, parts = samples(5), *(NoisySum(0.0, 0.5, 5.0, NoiseWatch(), None) for _ in "ab")
    whole.add(own, 5)
    for rows in (slice(2), slice(2, 5)):
        part = {name: value[rows] for name, value in own.items()}
        parts.add(part, len(part["a"]))
    found, expected = parts.release(PARAMS), whole.release(PARAMS)
    for name in PARAMS:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize(
    "broken",
    [
        lambda flat, std, source: flat,
        lambda flat, std, source: {d: v + source.normal(len(v), std / 2).to(d) for d, v in flat.items()},
        lambda flat, std, source: {d: v + SecureNoise(0).normal(len(v), std).to(d) for d, v in flat.items()},
    ],
)
def test_wrong_noise_is_found(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    monkeypatch.setattr(sgd, "add_noise", broken)
    watch = NoiseWatch()

    def two_steps() -> None:
        for _ in range(2):
            NoisySum(1.0, 1.0, 1.0, watch, None).release(PARAMS)

    with pytest.raises(PrivacyError, match=r"is recorded|repeats"):
        two_steps()


# ---- the examples of a batch


def test_rows_of_nested_batches() -> None:
    batch = {"x": (torch.arange(3), [torch.zeros(3, 2)]), "name": ["a", "b", "c"], "scale": 2.0}
    assert num_rows(batch) == 3
    part = take_rows(batch, [2, 0])
    assert part["x"][0].tolist() == [2, 0]
    assert (part["x"][1][0].shape, part["name"], part["scale"]) == ((2, 2), ["c", "a"], 2.0)
    assert num_rows(take_rows(batch, slice(0))) == 0


@pytest.mark.parametrize(
    "batch", [[torch.zeros(2), torch.zeros(3)], ["a"], torch.tensor(1.0), {"x": torch.zeros(2), "y": object()}]
)
def test_batches_without_rows_are_refused(batch: Any) -> None:
    with pytest.raises(ValueError, match="Change the collation accordingly"):
        take_rows(batch, slice(1))
