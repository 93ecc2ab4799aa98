"""Gradient inversion: a plain update gives the client's image away, a masked one does not, and the sum keeps some."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.helpers.secagg import pairwise_views

PIXELS = 64
STEP = 2.0**-20


def digit(client: int) -> tuple[Tensor, Tensor]:
    """An image with pixels from 0 to 1, and its label."""
    generator = torch.Generator().manual_seed(client)
    return torch.rand(1, PIXELS, generator=generator), torch.tensor([client % 10])


def update(client: int) -> dict[str, Tensor]:
    """The gradient of a small network on one image."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(PIXELS, 32), nn.Sigmoid(), nn.Linear(32, 10))
    x, y = digit(client)
    nn.functional.cross_entropy(net(x), y).backward()
    return {name: param.grad for name, param in net.named_parameters() if param.grad is not None}


def invert(weight: Tensor, bias: Tensor) -> Tensor:
    """The input of a linear layer from its gradients: dL/dW = dL/db x^T (Phong et al. 2017), by least squares."""
    return (bias @ weight) / (bias @ bias)


def psnr(found: Tensor, image: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; a guess of 0.5 everywhere has about 11."""
    return -10 * math.log10(float((found.clamp(0, 1) - image).square().mean()) + 1e-20)


def words_of(client: int) -> Tensor:
    gradients = update(client)
    return torch.cat([gradients["0.weight"].reshape(-1), gradients["0.bias"]]).div(STEP).round().int()


def invert_words(vector: Tensor) -> Tensor:
    values = vector.double() * STEP
    return invert(values[: 32 * PIXELS].reshape(32, PIXELS), values[32 * PIXELS :])


def test_a_plain_update_gives_the_image_back() -> None:
    image = digit(0)[0][0]
    gradients = update(0)
    assert psnr(invert(gradients["0.weight"], gradients["0.bias"]), image) > 60
    assert psnr(invert_words(words_of(0)), image) > 30, "rounding alone hides nothing"


def test_a_masked_update_gives_noise() -> None:
    for num_clients in (3, 5):
        views = pairwise_views({number: words_of(number - 1) for number in range(1, num_clients + 1)})
        for number, view in views.items():
            assert psnr(invert_words(view), digit(number - 1)[0][0]) < 12


def test_what_the_sum_itself_keeps_falls_with_the_number_of_clients() -> None:
    """Secure aggregation is not differential privacy: the sum is told, and with few clients it holds much."""
    found = {}
    for num_clients in (1, 2, 5, 10):
        total = torch.stack([words_of(client) for client in range(num_clients)]).sum(0, dtype=torch.int32)
        found[num_clients] = psnr(invert_words(total), digit(0)[0][0])
    assert found[1] > 100
    guess = psnr(torch.full((PIXELS,), 0.5), digit(0)[0][0])
    assert guess < found[5] < found[2] < 20, "mixed with others the image is blurred, but not gone"
    assert found[10] < guess
