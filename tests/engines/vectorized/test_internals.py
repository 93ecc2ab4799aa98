"""Private functions of torch do what the vectorized engine takes them for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from lightning_fl.engines.vectorized.internals import flat_vmap, num_references, outside_vmap, unwrap, wrap

STACKED = torch.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_batching_rule_sees_the_stacked_tensor(dim: int) -> None:
    def double_by_rule(x: Tensor) -> Tensor:
        stacked = unwrap(x)
        assert stacked is not None
        with outside_vmap():
            assert stacked[0].shape == STACKED.shape
            return wrap(stacked[0] * 2)

    torch.testing.assert_close(vmap(double_by_rule, in_dims=dim)(STACKED.movedim(0, dim)), STACKED * 2)


def test_what_is_not_batched_by_one_vmap_has_no_rule() -> None:
    assert unwrap(STACKED) is None
    shared = torch.ones(3)
    found: list[object] = []
    vmap(lambda x: (found.append(unwrap(x, shared)), x)[1])(STACKED)
    vmap(vmap(lambda x: (found.append(unwrap(x)), x)[1]))(STACKED)
    assert found == [None, None]


@pytest.mark.parametrize("randomness", ["error", "different"])
def test_flat_vmap_is_vmap(randomness: str) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        noise = torch.randn(3) if randomness == "different" else torch.zeros(3)
        return (x @ y).relu() + noise

    weight = torch.arange(8.0).reshape(2, 4)
    torch.manual_seed(0)
    expected = vmap(function, randomness=randomness)(STACKED, weight)
    torch.manual_seed(0)
    found, of_all = flat_vmap(lambda x, y: (function(x, y), torch.ones(())), [STACKED, weight], randomness)
    torch.testing.assert_close(found, expected)
    assert of_all.shape == (2,)


def test_references_of_autograd_count() -> None:
    memory = torch.ones(3)
    storage = memory.untyped_storage()
    before = num_references(storage)
    product = memory[:2] * torch.ones(2, requires_grad=True)
    assert num_references(storage) > before
    del product
    assert num_references(storage) == before
