"""A function that is captured once and replayed; on a CPU the replay is of its operations, not of a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_fl.engines.capture import agree, capture, separate

X, Y = torch.arange(4.0), torch.ones(4)


def test_a_replay_does_with_other_values_what_the_function_does() -> None:
    x, total = X.clone(), Y.clone()
    x.requires_grad_()
    outside = torch.tensor([2.0])

    def function() -> list[Tensor]:
        (grad,) = torch.autograd.grad((outside * x**2).sum(), [x])
        with torch.no_grad():
            total.add_(grad)
        return [grad]

    captured = capture(function, [x, total])
    assert (x.tolist(), total.tolist()) == (X.tolist(), Y.tolist())  # capturing leaves no trace
    (grad,) = captured([X + 1, 10 * Y])
    assert grad.tolist() == [4.0, 8.0, 12.0, 16.0]
    assert captured.inputs[1].tolist() == [14.0, 18.0, 22.0, 26.0]
    assert (x.tolist(), total.tolist()) == (X.tolist(), Y.tolist())
    outside.fill_(3.0)  # read from where it is
    assert captured([X + 1, Y])[0].tolist() == [6.0, 12.0, 18.0, 24.0]
    with pytest.raises(ValueError, match="got 1 tensors; expected 2"):
        captured([X])


def test_random_numbers_are_drawn_anew_from_the_same_stream() -> None:
    x = X.clone()

    def function() -> list[Tensor]:
        return [x + torch.rand(4)]

    torch.manual_seed(0)
    captured = capture(function, [x])
    replayed = [captured([x])[0] for _ in range(2)]
    torch.manual_seed(0)
    for found in replayed:
        assert torch.equal(found, function()[0])
    assert not torch.equal(*replayed)


def test_what_decides_by_a_value_can_not_be_captured() -> None:
    x = X.clone()
    with pytest.raises(RuntimeError):
        capture(lambda: [x * x.sum().item()], [x])
    assert torch.equal(x, X)


def test_what_is_done_to_separate_tensors_is_undone() -> None:
    x = X.clone()
    with separate([x]) as (copy,):
        x.mul_(2)
    assert torch.equal(x, X)
    assert torch.equal(copy, 2 * X)
    with separate([x, x]):
        x.add_(1)
    assert torch.equal(x, X)


def test_agreement_is_judged_by_the_largest_term_and_by_what_has_changed() -> None:
    large = torch.tensor([1.0, 1e-6])
    assert agree(large + torch.tensor([0.0, 1e-6]), large)
    assert not agree(large + torch.tensor([0.0, 1e-3]), large)
    assert agree(torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]))
    assert not agree(torch.tensor([float("nan")]), torch.tensor([1.0]))
    assert not agree(large, large.double())
    assert not agree(torch.tensor([1]), torch.tensor([2]))
    # Twice as large a step, which is lost in the tensor itself.
    before, step = torch.full((2,), 100.0), 5e-3
    assert agree(before + 2 * step, before + step)
    assert not agree(before + 2 * step, before + step, before)
    assert agree(before + step, before + step * (1 + 1e-5), before)
