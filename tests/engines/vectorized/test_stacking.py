"""Values of clients side by side."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from lightning_fl.engines.vectorized.stacking import NotStackable, are_finite, part, select, signature, stack

Pair = namedtuple("Pair", "x y")


def test_stacking_and_taking_apart_are_inverse() -> None:
    shared = torch.ones(2)
    values = [{"a": [torch.full((3,), float(i))], "b": (shared, Pair(torch.tensor(i), "text"))} for i in range(4)]
    stacked, dims = stack(values)
    assert dims == {"a": [0], "b": (None, Pair(0, None))}
    assert stacked["b"][0] is shared
    for index, value in enumerate(values):
        torch.testing.assert_close(part(stacked["a"], index), value["a"])
        assert part(stacked["b"][1], index) == value["b"][1]


def test_a_tensor_in_common_is_stacked_if_it_may_not_be_shared() -> None:
    shared = torch.ones(2)
    stacked, dims = stack([[shared], [shared]], share=False)
    assert stacked[0].shape == (2, 2)
    assert dims == [0]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([torch.ones(2), torch.ones(3)], r"shape: \(2,\) of torch.float32 and \(3,\)"),
        ([torch.ones(2), torch.ones(2, dtype=torch.float64)], "float64"),
        ([[torch.ones(2)], (torch.ones(2),)], "structure"),
        ([{"a": torch.ones(2)}, {"b": torch.ones(2)}], "structure"),
        ([[torch.ones(2)], [torch.ones(2)] * 2], "structure"),
        ([Pair(torch.ones(1), 1), Pair(torch.ones(1), 2)], "differ in a int"),
        ([torch.ones(2), None], "NoneType"),
    ],
)
def test_what_differs_is_not_stacked(values: list[object], reason: str) -> None:
    with pytest.raises(NotStackable, match=reason):
        stack(values)


def test_signatures_tell_shapes_and_dtypes_apart() -> None:
    batch = [torch.ones(2, 3), torch.ones(2, dtype=torch.int64)]
    assert signature(batch) == signature([tensor * 5 for tensor in batch])
    assert signature(batch) != signature(batch[::-1])
    assert signature(batch) != signature(tuple(batch))
    assert signature({"x": batch[0]}) != signature({"y": batch[0]})


def test_finite_clients() -> None:
    tree = {"a": torch.zeros(3, 2), "b": {"c": torch.zeros(3)}}
    assert are_finite(tree, 3).tolist() == [True] * 3
    tree["a"][0, 1] = float("inf")
    tree["b"]["c"][2] = float("nan")  # type: ignore[index]
    assert are_finite(tree, 3).tolist() == [False, True, False]
    huge = {"a": torch.full((2, 2), 3e38)}  # the sum overflows, no element does
    assert are_finite(huge, 2).tolist() == [True, True]
    torch.testing.assert_close(select(tree, torch.tensor([1]))["b"]["c"], torch.zeros(1))
