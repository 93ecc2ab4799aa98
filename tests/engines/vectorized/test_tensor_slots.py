"""Tensors that stand in for a module's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_fl.engines.vectorized.tensor_slots import TensorSlots


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.second(self.first(x))


def test_tied_tensors_and_a_replaced_buffer() -> None:
    module = Counting()
    own, count = module.first.weight, module.count
    slots = TensorSlots(module, {"first.weight": own, "count": count})
    stand_ins = {"first.weight": 2 * torch.eye(2), "count": torch.tensor(5.0)}
    with slots.hold(stand_ins) as replaced:
        torch.testing.assert_close(module(torch.ones(2)), torch.full((2,), 4.0))
    assert replaced == {"count": 6.0}
    assert module.first.weight is own is module.second.weight
    assert module.count is count


def test_the_own_tensors_are_back_after_an_error() -> None:
    module = nn.Linear(2, 2)
    own = module.weight
    with (
        pytest.raises(RuntimeError, match="shapes"),
        TensorSlots(module, {"weight": own}).hold({"weight": torch.ones(2, 3)}),
    ):
        module(torch.ones(1, 2))
    assert module.weight is own
