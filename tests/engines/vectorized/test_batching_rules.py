"""With batching rules, functions of many clients are those of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional

from lightning_fl.engines.vectorized.batching_rules import BatchingRules
from lightning_fl.engines.vectorized.buffer_pool import BufferPool

CLIENTS, ROWS, IN, OUT = 3, 5, 4, 2


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def gradients(function: Any, values: list[Tensor], in_dims: tuple[int | None, ...]) -> list[Tensor]:
    out = vmap(function, in_dims=in_dims)(*values)
    return [out, *torch.autograd.grad(out.sin().sum(), values)]


@pytest.mark.parametrize("rows", [(), (ROWS,), (ROWS, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "dims", [(0, 0, 0), (1, 0, 0), (None, 0, 0), (0, None, None), (0, 0, None), (0, None, 0)], ids=str
)
def test_values_and_gradients(rows: tuple[int, ...], bias: bool, dims: tuple[int | None, ...]) -> None:
    shapes = [(*rows, IN), (OUT, IN), (OUT,)]
    stacked = []
    for shape, dim in zip(shapes, dims, strict=True):
        stacked.append(shape if dim is None else (*shape[:dim], CLIENTS, *shape[dim:]))
    values = tensors(*(stacked if bias else stacked[:2]))
    dims = dims if bias else dims[:2]
    expected = gradients(functional.linear, values, dims)
    with BatchingRules():
        found = gradients(functional.linear, values, dims)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_weight_lie_as_the_weight_does() -> None:
    x, weight, bias = tensors((CLIENTS, ROWS, IN), (CLIENTS, OUT, IN), (CLIENTS, OUT))
    with BatchingRules():
        vmap(functional.linear)(x, weight, bias).sum().backward()
    assert weight.grad is not None
    assert weight.grad.is_contiguous()


def test_outside_vmap_and_under_autocast_nothing_changes() -> None:
    x, weight, bias = tensors((ROWS, IN), (OUT, IN), (OUT,))
    with BatchingRules():
        torch.testing.assert_close(functional.linear(x, weight, bias), x @ weight.T + bias)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert functional.linear(x.float(), weight.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (0, None)], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 1}, {"reduction": "sum"}], ids=str)
@pytest.mark.parametrize("places", [(), (2,)], ids=str)
def test_cross_entropy(dims: tuple[int | None, ...], options: dict[str, Any], places: tuple[int, ...]) -> None:
    shapes = [(ROWS, IN, *places), (ROWS, *places)]
    stacked = [s if d is None else (*s[:d], CLIENTS, *s[d:]) for s, d in zip(shapes, dims, strict=True)]
    (scores,) = tensors(stacked[0])
    labels = torch.randint(IN, stacked[1], generator=torch.Generator().manual_seed(1))

    def loss(scores: Tensor) -> Tensor:
        return vmap(lambda x, y: functional.cross_entropy(x, y, **options), in_dims=dims)(scores, labels)

    expected = torch.autograd.grad(loss(scores).sin().sum(), scores)
    with BatchingRules():
        found = torch.autograd.grad(loss(scores).sin().sum(), scores)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_inside_another_transform_nothing_changes() -> None:
    x, weight = tensors((CLIENTS, ROWS, IN), (CLIENTS, OUT, IN))
    per_client = vmap(lambda w, x: vmap(lambda row: functional.linear(row, w).sin())(x))
    expected = per_client(weight, x)
    with BatchingRules():
        torch.testing.assert_close(per_client(weight, x), expected)


def test_a_weight_that_is_used_twice_gets_both_gradients_from_pooled_memory() -> None:
    size = 200
    x, weight = tensors((CLIENTS, ROWS, size), (CLIENTS, size, size))

    def twice(x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, weight).sin(), weight)

    expected = gradients(twice, [x, weight], (0, 0))
    with BatchingRules(BufferPool()):
        found = gradients(twice, [x, weight], (0, 0))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
