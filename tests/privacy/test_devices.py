"""Every privacy class with tensors on another device: no operation mixes it with the CPU, and the answer is the same.

:mod:`tests.helpers.second_device` plays such a device; where there is a GPU, the same runs on it too. What can't be
played is ``strict=True``: ``torch.func`` takes no tensors of a kind of their own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_fl.aggregation import Aggregator, FederationFacts, RoundContext, Transform, WeightedMean
from lightning_fl.clients.cohorts import CohortSampling
from lightning_fl.communication import LocalGroup, Message
from lightning_fl.engines.module_state import capture
from lightning_fl.privacy import AdaptiveClip, BandMF, ClientLevelDP, PrivacyError, SecureAggregation, SecureNoise
from lightning_fl.privacy.noise import add_noise, check_added
from lightning_fl.privacy.sample_level.dp_sgd import NoiseWatch, NoisySum
from lightning_fl.privacy.sample_level.per_sample import PerSampleGradients, clipped_sum
from lightning_fl.privacy.sample_level.self_check import SelfCheck
from lightning_fl.privacy.sample_level.tensor_watch import TensorWatch
from lightning_fl.privacy.secagg.masks import apply_masks
from lightning_fl.privacy.secagg.quantize import Quantizer, from_limbs, to_limbs
from lightning_fl.tree import move
from lightning_fl.types import Aggregate, Tree, Update
from tests.helpers.second_device import DEVICE, SecondDevice

pytestmark = pytest.mark.filterwarnings("ignore:insecure_test_seed", "ignore:ClientLevelDP clips buffers")
NUM_CLIENTS = 4
CPU = torch.device("cpu")
every_device = pytest.mark.parametrize(
    "device", [DEVICE, *([torch.device("cuda:0")] if torch.cuda.is_available() else [])], ids=str
)


def there(device: torch.device) -> AbstractContextManager[Any]:
    """The block in which a device can be used."""
    return SecondDevice() if device == DEVICE else nullcontext()


def update(number: int, device: torch.device) -> Update:
    generator = torch.Generator().manual_seed(number)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return Update({"a": draw(5, 3), "b": draw(4), "c": draw()}, {"mean": draw(3)}, 1.0, {"control": {"a": draw(5, 3)}})


def run_round(aggregator: Aggregator, transforms: list[Transform], device: torch.device) -> Aggregate:
    """What a round does with updates on a device."""
    cohort = list(range(NUM_CLIENTS))
    ctx = RoundContext(
        0,
        cohort,
        NUM_CLIENTS,
        CohortSampling("full", NUM_CLIENTS, NUM_CLIENTS, 1.0),
        frozen={"frozen": torch.zeros(2).to(device)},
        min_clients=aggregator.min_clients_of(NUM_CLIENTS),
        integer_bits=aggregator.integer_bits,
    )
    template = update(-1, device)
    session = aggregator.open(LocalGroup(), FederationFacts(False, NUM_CLIENTS, True, max_weight=lambda: 1.0))
    contexts, states = [], []
    for transform in transforms:
        contexts.append(replace(ctx, template=template))
        template = transform.like(template)
        states.append(transform.start_round({}, contexts[-1]))
    acc = aggregator.init(template, device, session)
    for client in cohort:
        own = update(client, device)
        for transform, state, context in zip(transforms, states, contexts, strict=True):
            own, _ = transform.client(own, {}, replace(context, client=client, server=state))
        acc = aggregator.add(acc, own, replace(ctx, client=client))
    acc, _ = aggregator.merge(acc, LocalGroup(), Message(), ctx)
    aggregate = aggregator.result(acc, ctx)
    for transform, state, context in zip(transforms, states, contexts, strict=True):
        aggregate, _ = transform.server(aggregate, state, context)
    return aggregate


def trees(aggregate: Aggregate) -> dict[str, Tensor]:
    named: dict[str, Tree] = {"delta": aggregate.delta, "buffers": aggregate.buffers, **aggregate.aux}
    return {f"{tree} {name}": tensor for tree, tensors in named.items() for name, tensor in tensors.items()}


SCENARIOS: dict[str, tuple[Any, Any]] = {
    "pairwise": (lambda: SecureAggregation(), list),
    "bonawitz": (lambda: SecureAggregation("bonawitz"), list),
    "64 bits": (lambda: SecureAggregation("bonawitz", modulus_bits=64), list),
    **{
        f"{mode} noise": (
            (lambda: SecureAggregation("bonawitz", min_clients=4)) if mode == "distributed" else WeightedMean,
            lambda mode=mode: [ClientLevelDP(0.5, 1.0, mode, insecure_test_seed=1)],
        )
        for mode in ("central", "local", "distributed")
    },
    "skellam": (
        lambda: SecureAggregation(min_clients=4),
        lambda: [ClientLevelDP(0.5, 1.0, "distributed", noise="skellam", insecure_test_seed=1)],
    ),
    "adaptive clip": (
        WeightedMean,
        lambda: [ClientLevelDP(AdaptiveClip(initial=1.0, bit_noise=1.0), 1.0, insecure_test_seed=1)],
    ),
}


@every_device
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_round_on_another_device(scenario: str, device: torch.device) -> None:
    make_aggregator, make_transforms = SCENARIOS[scenario]
    expected = trees(run_round(make_aggregator(), make_transforms(), CPU))
    with there(device):
        found = trees(run_round(make_aggregator(), make_transforms(), device))
        assert {tensor.device for tensor in found.values()} == {device}
        on_cpu = {name: tensor.cpu() for name, tensor in found.items()}
    assert on_cpu.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(on_cpu[name], tensor, rtol=1e-3, atol=2e-3)
        assert on_cpu[name].dtype == tensor.dtype


def rounds_of_turns(device: torch.device, moves: bool) -> Tree:
    """Three rounds of noise that is correlated between them; ``moves``: the state is loaded from a file in between."""
    transform = ClientLevelDP(0.5, 1.0, mechanism=BandMF(3), insecure_test_seed=1)
    sampling, state = CohortSampling("other", NUM_CLIENTS, 1, 0.25, separation=4), {}
    for number in range(3):
        ctx = RoundContext(number, [number], NUM_CLIENTS, sampling)
        state = transform.start_round(move(move(state, CPU), device) if moves else state, ctx)
        own, _ = transform.client(update(number, device), {}, replace(ctx, client=number, server=state))
        total = Aggregate(own.delta, own.buffers, 1.0, own.aux, 1, NUM_CLIENTS)
        released, state = transform.server(total, state, ctx)
    return trees(released)


@every_device
@pytest.mark.parametrize("moves", [False, True])
def test_noise_over_turns_on_another_device(device: torch.device, moves: bool) -> None:
    expected = rounds_of_turns(CPU, moves)
    with there(device):
        found = rounds_of_turns(device, moves)
        assert {tensor.device for tensor in found.values()} == {device}
        on_cpu = {name: tensor.cpu() for name, tensor in found.items()}
    torch.testing.assert_close(on_cpu, expected, rtol=1e-5, atol=1e-5)


@every_device
def test_the_check_of_examples_on_another_device(device: torch.device) -> None:
    features, labels = torch.randn(8, 3), torch.randint(0, 2, (8,))
    with there(device):
        module = nn.Linear(3, 2)
        for name, param in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(param.detach().to(device)))
        gradients = PerSampleGradients(module, dict(module.named_parameters()))
        watch = TensorWatch(lambda: dict(module.named_parameters()), "")
        watch.note()

        def read(rows: Any) -> list[Tensor]:
            return [features[list(rows)].to(device), labels[list(rows)].to(device)]

        def loss_of(batch: list[Tensor]) -> Tensor:
            return functional.cross_entropy(module(batch[0]), batch[1])

        def of_centred(batch: list[Tensor]) -> Tensor:
            return functional.cross_entropy(module(batch[0] - batch[0].mean(0)), batch[1])

        def check(loss: Any) -> None:
            state = capture(module, (), (gradients.hooks,), reads_code=False)
            every = SelfCheck(gradients, loss, loss, lambda: None, state, watch, 1.0, 2e-3)
            every.run(read(range(8)), read, [0, 1, 2, 3])

        check(loss_of)
        with pytest.raises(PrivacyError, match="depends on the others in its batch"):
            check(of_centred)
        gradients.detach()


@every_device
def test_the_parts_of_sample_level_privacy_on_another_device(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = {"a": torch.randn(6, 40, 3, generator=generator), "b": torch.randn(6, generator=generator)}
    params = {"a": torch.zeros(40, 3), "b": torch.zeros(()), "unused": torch.zeros(50)}

    def step(samples: Tree, params: Tree) -> Tree:
        noise = NoisySum(1.0, 0.5, 6.0, NoiseWatch(), 1, "test")
        noise.add(samples, 6)
        return noise.release(params)

    expected = step(samples, params)
    with there(device):
        moved = {name: tensor.to(device) for name, tensor in samples.items()}
        released = step(moved, {name: tensor.to(device) for name, tensor in params.items()})
        assert {tensor.device for tensor in released.values()} == {device}
        assert clipped_sum(moved, 0.5)["a"].device == device
        on_cpu = {name: tensor.cpu() for name, tensor in released.items()}
    for name, tensor in expected.items():
        torch.testing.assert_close(on_cpu[name], tensor, rtol=1e-5, atol=1e-6)


@every_device
def test_masks_quantizer_and_noise_on_another_device(device: torch.device) -> None:
    keys = [(b"k" * 32, 1), (b"l" * 32, -1)]
    vector = torch.arange(1000, dtype=torch.int32)
    expected = vector.clone()
    apply_masks(expected, keys)
    numbers = torch.tensor([1.5, -3.25, 1e6], dtype=torch.float64)
    with there(device):
        masked = vector.clone().to(device)
        apply_masks(masked, keys)
        assert torch.equal(masked.cpu(), expected)
        assert torch.equal(from_limbs(to_limbs(numbers.to(device), torch.int64)).cpu(), numbers)
        assert Quantizer(3, 1.0).decode(masked).device == device
        flat = {torch.float32: torch.zeros(5000).to(device), torch.complex64: torch.zeros(10, dtype=torch.complex64)}
        noisy = add_noise({torch.float32: flat[torch.float32]}, 2.0, SecureNoise())
        assert noisy[torch.float32].device == device
        check_added({torch.float32: flat[torch.float32]}, noisy, 2.0)


class ForgetsTheDevice(WeightedMean):
    """The control: its sums come back on the CPU, as those of a secure sum did."""

    def result(self, acc: Any, ctx: RoundContext) -> Aggregate:
        found = super().result(acc, ctx)
        return replace(found, delta={name: tensor.cpu() for name, tensor in found.delta.items()})


def test_a_tensor_left_on_the_cpu_is_found() -> None:
    with SecondDevice():
        params = update(9, DEVICE).delta
        total = run_round(ForgetsTheDevice(), [], DEVICE).delta
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            _ = params["a"] + total["a"]
        with pytest.raises(RuntimeError, match="not supported"):
            params["a"].numpy()
