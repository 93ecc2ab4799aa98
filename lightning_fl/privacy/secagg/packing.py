"""Packs a client's update, weight and scalars into an integer vector, and unpacks a sum of vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_fl.privacy.secagg.errors import SecureAggregationError
from lightning_fl.privacy.secagg.masks import Keystream
from lightning_fl.privacy.secagg.primitives import digest
from lightning_fl.privacy.secagg.quantize import DTYPES, MAX_SCALAR, NUM_LIMBS, Quantizer, from_limbs, to_limbs
from lightning_fl.tree import Layout, is_finite, leaves, update_trees
from lightning_fl.types import Tree, Update

NUM_CHECKS = 2
"""Elements at the end to which every participant adds 1; their sum shows whether all masks have cancelled."""


@dataclass(frozen=True)
class Ranges:
    """The value ranges of an update; the wider a range, the coarser its quantization.

    Args:
        clip: Largest magnitude of a parameter's change.
        aux_clip: The same for side channels.
        max_weight: Largest weight of a client.
        modulus_bits: 32 or 64.
    """

    clip: float
    aux_clip: float
    max_weight: float
    modulus_bits: int

    def quantizer(self, tree: str, num_clients: int) -> Quantizer:
        """Returns the quantizer of a tree's coordinates."""
        return Quantizer(num_clients, self.clip if tree == "delta" else self.aux_clip, self.modulus_bits)


class Packing:
    """The layout of the vector: the position of each tensor of an update.

    A coordinate takes one element; those of integer tensors are sent unchanged, modulo 2^32 or 2^64, and must have the
    weight 1. Buffers and scalar tensors, such as counters and running variances, have no common range to which they
    could be clipped, so they are sent exactly, as six limbs each. So are three numbers for each client: 1, to count it;
    1 if it clipped a coordinate; and its weight.

    Args:
        template: An update with the names, shapes and dtypes of all.
        ranges: The value ranges of its coordinates.

    Raises:
        ValueError: If a tensor is complex.
    """

    def __init__(self, template: Update, ranges: Ranges) -> None:
        self.ranges = ranges
        trees = update_trees(template)
        self.layout = Layout.of(trees)
        self.integers = {
            (tree, name)
            for tree, tensors in trees.items()
            for name, tensor in tensors.items()
            if not tensor.is_floating_point() and not _is_exact(tree, tensor.shape)
        }
        self.num_coordinates, self.num_scalars = 0, 3
        for tree, name, shape, dtype in self.layout.entries:
            if dtype.is_complex:
                raise ValueError(f"The tensor {name!r} is complex; secure aggregation sums real ones. Split it in two.")
            if _is_exact(tree, shape):
                self.num_scalars += shape.numel()
            else:
                self.num_coordinates += shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the vector's elements."""
        return DTYPES[self.ranges.modulus_bits]

    @property
    def vector_size(self) -> int:
        """Length of the vector, without the report's scalars and the checks that :func:`with_report` appends."""
        return self.num_coordinates + NUM_LIMBS * self.num_scalars

    @cached_property
    def digest(self) -> bytes:
        """A hash of names, shapes, dtypes and ranges, which must be the same for all participants."""
        entries = [[tree, name, list(shape), str(dtype)] for tree, name, shape, dtype in self.layout.entries]
        return digest(json.dumps([entries, repr(self.ranges)]).encode())

    def zeros(self, device: torch.device) -> Tensor:
        """Returns the vector of an empty sum."""
        return torch.zeros(self.vector_size, dtype=self.dtype, device=device)

    def add(self, vector: Tensor, update: Update, num_clients: int) -> None:
        """Adds a client's update to a vector, in place.

        Args:
            vector: Shape ``[vector_size]``.
            update: The client's update.
            num_clients: The largest number of clients whose updates are summed.

        Raises:
            ValueError: If the update has other tensors than the template, is not finite, or weighs too much. The
                vector is then unchanged.
        """
        trees, weight = update_trees(update), update.weight
        self.layout.check(trees)
        if not is_finite(leaves(trees)):
            raise ValueError("The update holds NaN or Inf, which would make the sum NaN or Inf; it was not sent.")
        if self.integers and weight != 1:
            raise ValueError(
                f"An update of integers has weight {weight:g}; integers are summed exactly, with weight 1."
            )
        if not 0 <= weight <= self.ranges.max_weight:
            raise ValueError(
                f"A client weighs {weight:g}, but the vector is laid out for weights from 0 to max_weight="
                f"{self.ranges.max_weight:g}. Set SecureAggregation(max_weight=...) to a bound that holds for every "
                "client, or use weighting='uniform'."
            )
        # `torch.cat` refuses an empty list, and there may be no such tensor.
        exact = [torch.empty(0, dtype=torch.float64, device=vector.device)] + [
            trees[tree][name].detach().double().reshape(-1) * _weight(tree, weight)
            for tree, name, shape, _ in self.layout.entries
            if _is_exact(tree, shape)
        ]
        to_limbs(torch.cat(exact), self.dtype)  # raises for a number out of range, before the vector is changed
        noise, clipped, start = Keystream(), False, 0
        for tree, name, shape, _ in self.layout.entries:
            if not _is_exact(tree, shape):
                target, start = vector[start : start + shape.numel()], start + shape.numel()
                factor = _weight(tree, weight / self.ranges.max_weight)
                quantizer = self.ranges.quantizer(tree, num_clients)
                values = trees[tree][name].detach().reshape(-1)
                if not values.is_floating_point():
                    target.add_(values.to(target.dtype))
                    continue
                clipped = quantizer.add(target, values, factor, noise) or clipped
        head = torch.tensor([1.0, float(clipped), weight], dtype=torch.float64)
        vector[start:] += to_limbs(torch.cat([head.to(vector.device), *exact]), self.dtype)

    def unpack(self, vector: Tensor, num_clients: int) -> Sums:
        """Returns the sums that a sum of vectors represents.

        Args:
            vector: Shape ``[vector_size]``, without masks.
            num_clients: The largest number of clients whose updates are summed, as given to :meth:`add`.
        """
        scalars = from_limbs(vector[self.num_coordinates :])
        count, num_clipped, weight = scalars[:3].tolist()
        exact = scalars[3:]
        trees: dict[str, Tree] = {}
        start = 0
        for tree, name, shape, dtype in self.layout.entries:
            size = shape.numel()
            if _is_exact(tree, shape):
                value, exact = exact[:size], exact[size:]
            else:
                quantizer = self.ranges.quantizer(tree, num_clients)
                value = vector[start : start + size]
                if (tree, name) not in self.integers:
                    value = quantizer.decode(value) * _weight(tree, self.ranges.max_weight)
                start += size
            trees.setdefault(tree, {})[name] = value.to(dtype).reshape(shape)
        return Sums(trees, weight, round(count), round(num_clipped))


@dataclass(frozen=True)
class Sums:
    """The unpacked sum of a round's vectors.

    Args:
        trees: The sums by tree of the update; delta and buffers are weighted, side channels are not.
        weight: The sum of the weights.
        num_clients: Number of clients in the sum.
        num_clipped: How many of them clipped a coordinate.
    """

    trees: dict[str, Tree]
    weight: float
    num_clients: int
    num_clipped: int


def with_report(vector: Tensor, names: Sequence[str], scalars: Mapping[str, float], num_participants: int) -> Tensor:
    """Returns a new vector with a report's scalars and the checks appended.

    Args:
        vector: The packed updates.
        names: Names of the scalars of all participants, in order.
        scalars: This participant's scalars; those it lacks count as 0.
        num_participants: Number of participants that the vector represents.

    Raises:
        ValueError: If a scalar is out of range or not finite; the message names it.
    """
    for name, scalar in scalars.items():
        if not math.isfinite(scalar):
            raise ValueError(f"{name!r} is {scalar}, which would make the secure sum {scalar}, so it was not sent.")
        if not abs(scalar) < MAX_SCALAR:
            raise ValueError(f"{name!r} is {scalar:g}; in a secure sum the largest is {MAX_SCALAR:g}.")
    limbs = to_limbs(torch.tensor([scalars.get(name, 0.0) for name in names], dtype=torch.float64), vector.dtype)
    checks = torch.full((NUM_CHECKS,), num_participants, dtype=vector.dtype)
    return torch.cat([vector, limbs.to(vector.device), checks.to(vector.device)])


def split_report(vector: Tensor, names: Sequence[str], num_participants: int) -> tuple[Tensor, dict[str, float]]:
    """Splits a sum of vectors into the packed updates and the report's scalars.

    Raises:
        SecureAggregationError: If masks are left in the sum.
    """
    if vector[-NUM_CHECKS:].tolist() != [num_participants] * NUM_CHECKS:
        raise SecureAggregationError(
            "The masks have not cancelled, so the sum is noise and is dropped: a participant's vector was lost or "
            "altered in transit, or participants were sent different lists. No update was revealed. Run the round "
            "again."
        )
    start = len(vector) - NUM_CHECKS - NUM_LIMBS * len(names)
    return vector[:start], dict(zip(names, from_limbs(vector[start:-NUM_CHECKS]).tolist(), strict=True))


def _is_exact(tree: str, shape: torch.Size) -> bool:
    return len(shape) == 0 or tree == "buffers"


def _weight(tree: str, weight: float) -> float:
    return 1.0 if tree.startswith("aux/") else weight
