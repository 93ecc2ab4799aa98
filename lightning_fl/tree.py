"""Arithmetic on trees (tensors keyed by name), and their flat form: one buffer per dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fl.types import Aggregate, Tree, Update

Flat = dict[torch.dtype, Tensor]
SEPARATOR = "\x1f"
"""Joins the names of nested mappings. Names of tensors hold dots, but not this control character."""
MAX_DEPTH = 32


def tree_map(function: Callable[..., Tensor], tree: Tree, *others: Tree) -> Tree:
    """Applies ``function`` name by name; the other trees need at least the names of the first."""
    return {name: function(tensor, *(other[name] for other in others)) for name, tensor in tree.items()}


def updated(kept: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``kept`` with the values of ``new`` by name, also in nested mappings; so what a round has not sent is kept."""
    found = {key: updated(kept.get(key, {}), own) if isinstance(own, Mapping) else own for key, own in new.items()}
    return {**kept, **found}


def subtract(left: Tree, right: Tree) -> Tree:
    """``left - right``, name by name."""
    return tree_map(torch.sub, left, right)


def add(left: Tree, right: Tree, alpha: float = 1.0) -> Tree:
    """``left + alpha * right``, name by name."""
    return tree_map(lambda a, b: torch.add(a, b, alpha=alpha), left, right)


def scale(tree: Tree, factor: float) -> Tree:
    """``factor * tree``."""
    return tree_map(lambda tensor: tensor * factor, tree)


def zeros_like(tree: Tree) -> Tree:
    """A tree of zeros of the same names, shapes and dtypes."""
    return tree_map(torch.zeros_like, tree)


def scalar_like(tree: Tree, value: float = 0.0) -> Tensor:
    """``value`` as a real tensor without dimensions, of the precision and on the device of the tree's first tensor."""
    first = next(iter(tree.values()))
    return torch.tensor(value, dtype=first.dtype.to_real(), device=first.device)


def squared_norm(tree: Tree) -> Tensor:
    """Sum of the squares of all elements, as a tensor of the tree's own dtype: algorithms send it with an update."""
    return sum((as_real(tensor).square().sum() for tensor in tree.values()), start=scalar_like(tree))


def squared_norms(stacked: Tree, num_clients: int) -> list[float]:
    """Squared Euclidean norm of each client's elements.

    Args:
        stacked: Trees of several clients, each tensor ``[num_clients, ...]``.
        num_clients: How many.
    """
    totals = [0.0] * num_clients
    for tensor in stacked.values():
        norms = torch.linalg.vector_norm(as_real(tensor).float().reshape(num_clients, -1), dim=1)
        for index, value in enumerate(norms.tolist()):
            totals[index] += value * value
    return totals


def norm(tree: Tree) -> float:
    """Euclidean norm of all elements together."""
    return float(
        sum(torch.linalg.vector_norm(as_real(tensor).float()).double() ** 2 for tensor in tree.values()) ** 0.5
    )


def joint_norm(trees: Iterable[Tree]) -> float:
    """Euclidean norm of all elements of all trees together, accumulated in float64; 0 if there are none."""
    # Privacy bounds rest on this norm, so float32 rounding must not make it too small.
    norms = [
        torch.linalg.vector_norm(as_real(tensor), dtype=torch.float64) for tree in trees for tensor in tree.values()
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def as_real(tensor: Tensor) -> Tensor:
    """A view of a complex tensor as pairs of real numbers; other tensors as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def real_map(function: Callable[..., Tensor], tree: Tree, *others: Tree) -> Tree:
    """:func:`tree_map` of a function that is not linear: complex tensors are pairs of real ones, as in torch's Adam."""
    real = [{name: as_real(tensor) for name, tensor in own.items()} for own in (tree, *others)]
    found = tree_map(function, *real)
    return {name: torch.view_as_complex(value) if tree[name].is_complex() else value for name, value in found.items()}


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are summed: their own, but at least float32; float64 for integers."""
    if dtype.is_floating_point and dtype.itemsize == 1:  # torch promotes no float8
        return torch.float32
    if dtype.is_floating_point or dtype.is_complex:
        return torch.promote_types(dtype, torch.float32)
    return torch.float64


def to_sum_dtype(tree: Mapping[str, Tensor]) -> Tree:
    """A copy of the tree in the dtypes of :func:`sum_dtype`."""
    return {name: tensor.detach().to(sum_dtype(tensor.dtype), copy=True) for name, tensor in tree.items()}


def cast_like(value: Tensor, template: Tensor) -> Tensor:
    """``value`` in the dtype of ``template``; integers are rounded to nearest, where ``to`` would truncate."""
    if value.dtype == template.dtype or template.dtype.is_floating_point or template.dtype.is_complex:
        return value.to(template.dtype)
    return value.round().to(template.dtype)


def update_trees(update: Update | Aggregate) -> dict[str, Tree]:
    """The trees of an update by name, in the order in which they are laid out flat."""
    return {
        "delta": update.delta,
        "buffers": update.buffers,
        **{f"aux/{name}": tree for name, tree in update.aux.items()},
    }


def move(state: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The state with its tensors on ``device``."""
    return {
        name: move(value, device) if isinstance(value, Mapping) else value.to(device) for name, value in state.items()
    }


def clone(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with copies of its tensors."""
    return {name: clone(value) if isinstance(value, Mapping) else value.clone() for name, value in state.items()}


def flatten(state: Mapping[str, Any], prefix: str = "") -> Tree:
    """The tensors of nested mappings by their joined names.

    Raises:
        TypeError: If the mappings hold anything but tensors.
    """
    flat: Tree = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}{SEPARATOR}"))
        elif isinstance(value, Tensor):
            flat[prefix + name] = value
        else:
            raise TypeError(f"A state holds a {type(value).__name__} as {name!r}; it may hold tensors only.")
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested mappings that :func:`flatten` made flat.

    Raises:
        ValueError: If a name lies below that of a tensor, or is nested too deeply; it may come from another party.
    """
    state: dict[str, Any] = {}
    for path, tensor in flat.items():
        if path.count(SEPARATOR) > MAX_DEPTH:
            raise ValueError(f"a name has {path.count(SEPARATOR) + 1} parts, at most {MAX_DEPTH + 1} are taken")
        *parents, name = path.split(SEPARATOR)
        place = state
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{path!r} lies below a tensor")
        place[name] = tensor
    return state


def leaves(state: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a state, in order."""
    return [leaf for value in state.values() for leaf in (leaves(value) if isinstance(value, Mapping) else [value])]


@dataclass(frozen=True)
class Layout:
    """Names, shapes and dtypes of several trees, to convert between them and one flat buffer per dtype.

    One collective per dtype is much cheaper than one per tensor.

    Args:
        entries: ``(tree, name, shape, dtype)`` of each tensor, in order.
    """

    entries: tuple[tuple[str, str, torch.Size, torch.dtype], ...]

    @classmethod
    def of(cls, trees: Mapping[str, Tree]) -> Layout:
        """The layout of ``trees``, with the dtypes of :func:`sum_dtype`."""
        return cls(
            tuple(
                (tree, name, tensor.shape, sum_dtype(tensor.dtype))
                for tree, tensors in trees.items()
                for name, tensor in tensors.items()
            )
        )

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes in order of first use."""
        return list(dict.fromkeys(dtype for *_, dtype in self.entries))

    def size(self, dtype: torch.dtype) -> int:
        """Number of elements of ``dtype``."""
        return sum(shape.numel() for _, _, shape, entry_dtype in self.entries if entry_dtype == dtype)

    def zeros(self, device: torch.device) -> Flat:
        """One flat buffer of zeros per dtype."""
        return {dtype: torch.zeros(self.size(dtype), dtype=dtype, device=device) for dtype in self.dtypes}

    def check(self, trees: Mapping[str, Tree]) -> None:
        """Makes sure that the trees have this layout.

        Raises:
            ValueError: If a tensor is missing, unexpected, or of another shape.
        """
        has_others = sum(map(len, trees.values())) != len(self.entries)
        shapes = {(tree, name): tensor.shape for tree, tensors in trees.items() for name, tensor in tensors.items()}
        if has_others or any(shapes.get((tree, name)) != shape for tree, name, shape, _ in self.entries):
            raise ValueError(self._difference(trees))

    def flatten(self, trees: Mapping[str, Tree]) -> Flat:
        """Copies the trees into one flat buffer per dtype.

        Raises:
            ValueError: If a tensor is missing, unexpected, or of another shape.
        """
        self.check(trees)
        parts: dict[torch.dtype, list[Tensor]] = {dtype: [] for dtype in self.dtypes}
        for tree, name, _, dtype in self.entries:
            parts[dtype].append(trees[tree][name].detach().reshape(-1).to(dtype))
        return {dtype: torch.cat(tensors) for dtype, tensors in parts.items()}

    def unflatten(self, flat: Flat) -> dict[str, Tree]:
        """Views of the flat buffers as the trees."""
        trees: dict[str, Tree] = {}
        offsets = dict.fromkeys(flat, 0)
        for tree, name, shape, dtype in self.entries:
            start, offsets[dtype] = offsets[dtype], offsets[dtype] + shape.numel()
            trees.setdefault(tree, {})[name] = flat[dtype][start : offsets[dtype]].view(shape)
        return trees

    def _difference(self, trees: Mapping[str, Tree]) -> str:
        expected = {(tree, name): tuple(shape) for tree, name, shape, _ in self.entries}
        found = {(tree, name): tuple(tensor.shape) for tree, ts in trees.items() for name, tensor in ts.items()}
        for key in [*expected, *found]:
            if expected.get(key) != found.get(key):
                tree, name = key
                return (
                    f"The update's {tree} {name!r} has shape {found.get(key, 'none (missing)')}, expected "
                    f"{expected.get(key, 'no such tensor')}. An update must have the names and shapes of the shared "
                    "tensors, and its side channels those of `Algorithm.aux_like`."
                )
        raise AssertionError("the layouts do not differ")


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is NaN or infinite."""
    # A sum that is finite has finite terms; one that is not may have overflowed, so that each term is looked at.
    return all(bool(tensor.sum().isfinite()) or bool(torch.isfinite(tensor).all()) for tensor in tensors)


def fingerprint(tensor: Tensor) -> int:
    """A checksum of the tensor's bits, to compare the tensors of ranks without sending them."""
    # Bits rather than values: a sum of values would hide NaN, -0.0 and changes below rounding.
    values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(values.view(kinds[values.element_size()]).sum(dtype=torch.int64))
