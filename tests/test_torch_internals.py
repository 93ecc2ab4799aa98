"""What torch_internals.py relies on; a failure here means that torch has changed."""

from __future__ import annotations

from collections import namedtuple
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn
from torch.func import vmap

from lightning_fl.torch_internals import (
    FORWARD_HOOKS,
    BatchNorm,
    flat_vmap,
    has_backward_hooks,
    has_gradient_hooks,
    num_references,
    outside_vmap,
    own_buffers,
    own_modules,
    own_parameters,
    pytree,
    set_timeout,
    step_hooks,
    take_counts_as_tensors,
    unwrap,
    version_counter,
    wrap,
)

STACKED = torch.arange(24.0).reshape(2, 3, 4)
Pair = namedtuple("Pair", "x y")  # pytree rebuilds it by its class, which must stand in a module


def test_the_version_is_supported() -> None:
    assert Version("2.6") <= Version(torch.__version__) < Version("3")


def test_trees_are_flattened_and_rebuilt() -> None:
    tree = {"b": [1, None], "a": (Pair(2, "x"), {})}
    leaves, spec = pytree.tree_flatten(tree)
    assert leaves == [1, None, 2, "x"]
    assert leaves == pytree.tree_leaves(tree)
    assert pytree.tree_unflatten(leaves, spec) == tree
    assert spec == pytree.tree_flatten({"b": [3, None], "a": (Pair(2, "y"), {})})[1]
    assert spec != pytree.tree_flatten({"b": (3, None), "a": (Pair(2, "y"), {})})[1]


def test_functions_are_mapped_over_trees() -> None:
    assert pytree.tree_map(lambda a, b: a + b, {"x": [1, 2]}, {"x": [10, 20]}) == {"x": [11, 22]}
    assert pytree.tree_map_only(int, lambda leaf: -leaf, [1, ("x", 2)]) == [-1, ("x", -2)]


def test_vmap_takes_dimensions_in_the_same_structure() -> None:
    tree = {"x": [torch.arange(3.0), 2.0]}
    dims = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, torch.Tensor) else None, tree)
    out = vmap(lambda own: own["x"][0] * own["x"][1], in_dims=(dims,))(tree)
    assert out.tolist() == [0, 2, 4]


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm1d])
def test_every_batch_norm_has_the_base_class(kind: Any) -> None:
    assert issubclass(kind, BatchNorm)


@pytest.mark.parametrize("kind", [nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d])
def test_other_norms_do_not_have_it(kind: Any) -> None:
    assert not issubclass(kind, BatchNorm)


def test_writes_in_place_are_counted() -> None:
    tensor = torch.zeros(2)
    before = version_counter(tensor)
    tensor.add_(1)
    tensor[0] = 3
    assert version_counter(tensor) == before + 2
    tensor.data.add_(1)
    assert version_counter(tensor) == before + 2


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_gradients_are_seen(register: str) -> None:
    param = nn.Parameter(torch.zeros(2))
    assert not has_gradient_hooks(param)
    handle = getattr(param, register)(lambda *_: None)
    assert has_gradient_hooks(param)
    handle.remove()
    assert not has_gradient_hooks(param)


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook"]
)
def test_backward_hooks_are_seen(register: str) -> None:
    module = nn.Linear(1, 1)
    assert not has_backward_hooks(module)
    handle = getattr(module, register)(lambda *_: None)
    assert has_backward_hooks(module)
    handle.remove()
    assert not has_backward_hooks(module)


def test_step_hooks_are_listed() -> None:
    def before(*_: Any) -> None: ...

    def after(*_: Any) -> None: ...

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))])
    assert step_hooks(optimizer) == []
    optimizer.register_step_post_hook(after)
    optimizer.register_step_pre_hook(before)
    assert step_hooks(optimizer) == [before, after]


def test_forward_hooks_are_in_their_attributes() -> None:
    def hook(*_: Any) -> None: ...

    module = nn.Linear(1, 1)
    module.register_forward_hook(hook)
    assert [list(vars(module)[name].values()) for name in FORWARD_HOOKS] == [[hook], []]
    module.register_forward_pre_hook(hook)
    assert [list(vars(module)[name].values()) for name in FORWARD_HOOKS] == [[hook], [hook]]


def test_a_buffer_is_replaced_through_the_dict_that_holds_it() -> None:
    module = nn.Module()
    module.register_buffer("mean", torch.zeros(2))
    module.register_buffer("unset", None)
    module.register_module("child", nn.BatchNorm1d(2))
    buffers = own_buffers(module)
    assert buffers.keys() == {"mean", "unset"}
    buffers["mean"] = mean = torch.ones(2)
    assert module.mean is mean
    module.unset = torch.ones(1)
    assert buffers["unset"] is module.unset


def test_submodules_are_in_the_dict_that_holds_them() -> None:
    module = nn.Module()
    module.child = nn.Linear(1, 1)
    assert own_modules(module) == {"child": module.child}


def test_parameters_are_in_the_dict_that_holds_them() -> None:
    module = nn.Module()
    module.child = nn.Linear(1, 1)
    module.weight = nn.Parameter(torch.zeros(1))
    module.register_parameter("bias", None)
    params = own_parameters(module)
    assert params == {"weight": module.weight, "bias": None}
    params["weight"] = stand_in = torch.ones(1)  # type: ignore[assignment]
    assert module.weight is stand_in


def test_timeouts_of_process_groups_can_be_set() -> None:
    options: Any = dist.ProcessGroupGloo._Options()  # a build without CUDA has no NCCL, whose options share the base
    set_timeout(options, timedelta(seconds=7))
    assert options._timeout == timedelta(seconds=7)
    if dist.is_nccl_available():
        options = dist.ProcessGroupNCCL.Options()
        set_timeout(options, timedelta(seconds=7))
        assert options._timeout == timedelta(seconds=7)


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


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_takes_a_number_of_steps_for_each_row(kind: Any) -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    apart = [nn.Parameter(row.clone()) for row in rows]
    alone = [kind([param], lr=0.1) for param in apart]
    together = nn.Parameter(rows.clone())
    optimizer = kind([together], lr=0.1)
    take_counts_as_tensors(optimizer, True)
    optimizer.state[together] = {key: torch.zeros(2, 2) for key in ("exp_avg", "exp_avg_sq")}
    optimizer.state[together]["step"] = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    for param, own, row in zip(apart, alone, (0, 1), strict=True):
        own.state[param] = {key: torch.zeros(2) for key in ("exp_avg", "exp_avg_sq")}
        own.state[param]["step"] = torch.tensor(2.0 * row)
        param.grad = rows[row].clone()
        own.step()
    together.grad = rows.clone()
    optimizer.step()
    torch.testing.assert_close(together, torch.stack(apart), rtol=1e-6, atol=0)
    assert together.is_leaf
