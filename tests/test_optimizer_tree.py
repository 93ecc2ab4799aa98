"""The state of an optimizer survives being packed into a tree, and what cannot be packed is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from lightning_fl.optimizer_tree import pack_param_state, unpack_param_state


def test_packing_keeps_values_and_types() -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer = SGD([param], lr=0.1)
    state: dict[str, Any] = {"t": torch.ones(2), "flag": True, "count": 2**40, "rate": 0.1, "unset": None}
    optimizer.state[param] = dict(state)
    packed = pack_param_state(optimizer, param, "")
    assert packed.keys() == {"t", "flag:number", "count:number", "rate:number"}
    unpacked = unpack_param_state(packed)
    assert unpacked.pop("t").tolist() == [1.0, 1.0]
    assert unpacked == {"flag": True, "count": 2**40, "rate": 0.1}
    assert [type(value) for value in unpacked.values()] == [bool, int, float]


def test_unpacked_tensors_are_copies() -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer = Adam([param], lr=0.1)
    param.grad = torch.ones(2)
    optimizer.step()
    packed = pack_param_state(optimizer, param, "")
    unpack_param_state(packed)["exp_avg"].zero_()
    assert packed["exp_avg"].count_nonzero() == 2


def test_a_parameter_without_state_gives_an_empty_tree() -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer = SGD([param], lr=0.1)
    assert pack_param_state(optimizer, param, "") == {}
    assert not optimizer.state


def test_other_values_are_refused_with_the_remedy() -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer = SGD([param], lr=0.1)
    optimizer.state[param] = {"history": [1]}
    with pytest.raises(ValueError, match=r"SGD holds a list as 'history'\. Use Adam\."):
        pack_param_state(optimizer, param, "Use Adam.")
