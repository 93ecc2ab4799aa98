from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_fl.tree import (
    Layout,
    add,
    as_real,
    cast_like,
    is_finite,
    joint_norm,
    norm,
    num_bytes,
    scalar_like,
    scale,
    squared_norm,
    squared_norms,
    subtract,
    sum_dtype,
    to_sum_dtype,
    tree_map,
    zeros_like,
)
from lightning_fl.types import Tree

LEFT = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
RIGHT = {"b": torch.tensor(4.0), "a": torch.tensor([10.0, 20.0])}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


def plain(tree: Tree) -> dict[str, object]:
    return {name: tensor.tolist() for name, tensor in tree.items()}


def test_arithmetic_goes_by_name_and_keeps_the_first_order() -> None:
    assert plain(subtract(LEFT, RIGHT)) == {"a": [-9.0, -18.0], "b": -1.0}
    assert plain(add(LEFT, RIGHT, alpha=0.5)) == {"a": [6.0, 12.0], "b": 5.0}
    assert plain(scale(LEFT, 2)) == {"a": [2.0, 4.0], "b": 6.0}
    assert plain(zeros_like(LEFT)) == {"a": [0.0, 0.0], "b": 0.0}
    assert list(add(LEFT, RIGHT)) == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scalar_is_like_the_tree(dtype: torch.dtype) -> None:
    tree = {"a": torch.tensor([[3.0, 4.0]], dtype=dtype), "b": torch.tensor(-12.0, dtype=dtype)}
    for found, expected in ((squared_norm(tree), 169.0), (scalar_like(tree, 2.5), 2.5), (scalar_like(tree), 0.0)):
        assert (found.item(), found.dtype, found.shape) == (expected, dtype, torch.Size())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_norms_agree(dtype: torch.dtype) -> None:
    tree = {"a": torch.tensor([[3.0, 4.0]], dtype=dtype), "b": torch.tensor([[-12.0]], dtype=dtype)}
    assert norm(tree) == joint_norm([tree]) == joint_norm([{"a": tree["a"]}, {"b": tree["b"]}]) == 13.0
    assert squared_norms(tree, 1) == [pytest.approx(169.0)]
    assert joint_norm([]) == 0.0


def test_the_norm_of_a_complex_tensor_counts_both_its_parts() -> None:
    tree = {"a": torch.tensor([3.0 + 4.0j])}
    assert as_real(tree["a"]).tolist() == [[3.0, 4.0]]
    assert norm(tree) == joint_norm([tree]) == 5.0
    assert squared_norms(tree, 1) == [25.0]


def test_bytes_are_those_of_the_elements() -> None:
    assert num_bytes([torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.zeros(0)]) == 3 * 4 + 2 * 8


def test_the_first_tree_tells_the_names() -> None:
    assert plain(tree_map(torch.mul, {"b": LEFT["b"]}, RIGHT)) == {"b": 12.0}
    with pytest.raises(KeyError):
        tree_map(torch.mul, LEFT, {"a": RIGHT["a"]})


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
        (torch.int64, torch.float64),
        (torch.uint8, torch.float64),
        (torch.bool, torch.float64),
    ],
)
def test_sums_run_in_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert sum_dtype(dtype) == expected
    assert to_sum_dtype({"a": torch.zeros(2, dtype=dtype)})["a"].dtype == expected


def test_the_sum_dtype_is_a_copy() -> None:
    tree = {"a": torch.zeros(2, requires_grad=True)}
    copied = to_sum_dtype(tree)
    copied["a"].add_(1)
    assert tree["a"].tolist() == [0.0, 0.0]
    assert not copied["a"].requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_casting_to_the_sum_dtype_and_back_changes_nothing(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 1, 0]).to(dtype)
    back = cast_like(to_sum_dtype({"a": tensor})["a"], tensor)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


@pytest.mark.parametrize(("value", "nearest"), [(2.4, 2), (2.6, 3), (-2.6, -3), (2.999999, 3)])
def test_integers_are_rounded_to_nearest(value: float, nearest: int) -> None:
    assert cast_like(torch.tensor(value), torch.tensor(0)).item() == nearest
    assert cast_like(torch.tensor(value), torch.tensor(0.0)).item() == pytest.approx(value)


def test_a_finite_tree_has_neither_nan_nor_infinity() -> None:
    assert is_finite(LEFT.values())
    assert is_finite([])
    for bad in ("nan", "inf", "-inf"):
        assert not is_finite([*LEFT.values(), torch.tensor([0.0, float(bad)])])


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
tensors = st.builds(
    lambda shape, dtype: torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype),
    shapes,
    st.sampled_from(DTYPES),
)
trees = st.dictionaries(st.sampled_from("abcd"), tensors)
groups = st.dictionaries(st.sampled_from(["delta", "buffers", "aux/control"]), trees)


@given(groups)
def test_flat_buffers_hold_the_trees(group: dict[str, Tree]) -> None:
    layout = Layout.of(group)
    flat = layout.flatten(group)
    back = layout.unflatten(flat)
    assert {dtype: buffer.numel() for dtype, buffer in flat.items()} == {d: layout.size(d) for d in layout.dtypes}
    for name, tree in group.items():
        assert back.get(name, {}).keys() == tree.keys()
        for key, tensor in tree.items():
            assert torch.equal(back[name][key], tensor.to(sum_dtype(tensor.dtype)))


@given(groups)
def test_zeros_have_the_form_of_the_flat_trees(group: dict[str, Tree]) -> None:
    layout = Layout.of(group)
    zeros, flat = layout.zeros(torch.device("cpu")), layout.flatten(group)
    assert {d: z.shape for d, z in zeros.items()} == {d: f.shape for d, f in flat.items()}
    assert all(not zero.any() for zero in zeros.values())


def test_unflattened_trees_are_views_and_flat_buffers_are_copies() -> None:
    layout = Layout.of({"delta": LEFT})
    flat = layout.flatten({"delta": LEFT})
    layout.unflatten(flat)["delta"]["b"].zero_()
    assert flat[torch.float32].tolist() == [1.0, 2.0, 0.0]
    assert LEFT["b"].item() == 3.0


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": LEFT["a"]}, r"delta 'b' has shape none \(missing\), expected \(\)"),
        ({**LEFT, "c": LEFT["b"]}, r"delta 'c' has shape \(\), expected no such tensor"),
        ({**LEFT, "b": LEFT["a"]}, r"delta 'b' has shape \(2,\), expected \(\)"),
        ({"a": LEFT["a"], "c": LEFT["b"]}, r"delta 'b' has shape none \(missing\)"),
    ],
)
def test_a_tree_of_another_form_is_refused(tree: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.of({"delta": LEFT}).flatten({"delta": tree})
