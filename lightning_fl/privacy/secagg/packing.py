"""The vector that a client sends: its update, its weight and figures as integer words, and the way back from a sum."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_fl.aggregation.weighted_mean import update_trees
from lightning_fl.privacy.secagg.errors import SecureAggregationError
from lightning_fl.privacy.secagg.masks import Keystream
from lightning_fl.privacy.secagg.primitives import digest
from lightning_fl.privacy.secagg.quantize import MAX_FIGURE, NUM_LIMBS, WORDS, Quantizer, from_limbs, to_limbs
from lightning_fl.tree import Layout, is_finite, leaves
from lightning_fl.types import Tree, Update

NUM_CHECKS = 2
"""Words at the end to which every participant adds 1: their sum shows that all masks have cancelled."""


@dataclass(frozen=True)
class Ranges:
    """How far the coordinates of an update may go; the wider the range, the coarser the steps.

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
        """How the coordinates of a tree are rounded."""
        return Quantizer(num_clients, self.clip if tree == "delta" else self.aux_clip, self.modulus_bits)


class Packing:
    """Where in the vector each tensor stands.

    Coordinates take one word each. Buffers and single numbers are sent exactly, as limbs, six words each; so are 1 for
    the client, 1 if it has clipped a coordinate, and its weight.

    Args:
        like: An update with the names, shapes and dtypes of all.
        ranges: How far its coordinates may go.

    Raises:
        ValueError: If a tensor is complex.
    """

    def __init__(self, like: Update, ranges: Ranges) -> None:
        self.ranges = ranges
        self.layout = Layout.of(update_trees(like))
        self.num_coordinates, self.num_figures = 0, 3
        for tree, name, shape, dtype in self.layout.entries:
            if dtype.is_complex:
                raise ValueError(f"The tensor {name!r} is complex; secure aggregation sums real ones. Split it in two.")
            if _is_exact(tree, shape):
                self.num_figures += shape.numel()
            else:
                self.num_coordinates += shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the words."""
        return WORDS[self.ranges.modulus_bits]

    @property
    def num_words(self) -> int:
        """Length of the vector, without the report's figures and the checks that :func:`with_report` puts behind."""
        return self.num_coordinates + NUM_LIMBS * self.num_figures

    @cached_property
    def digest(self) -> bytes:
        """A hash of names, shapes, dtypes and ranges: all participants must have the same."""
        entries = [[tree, name, list(shape), str(dtype)] for tree, name, shape, dtype in self.layout.entries]
        return digest(json.dumps([entries, repr(self.ranges)]).encode())

    def zeros(self, device: torch.device) -> Tensor:
        """A vector of nothing."""
        return torch.zeros(self.num_words, dtype=self.dtype, device=device)

    def add(self, words: Tensor, update: Update, num_clients: int) -> None:
        """Adds a client's update to a vector, in place.

        Args:
            words: Shape ``[num_words]``.
            update: The client's update.
            num_clients: The most clients whose updates are summed.

        Raises:
            ValueError: If the update has another form, is not finite, or weighs too much; the vector stays as it was.
        """
        trees, weight = update_trees(update), update.weight
        self.layout.check(trees)
        if not is_finite(leaves(trees)):
            raise ValueError("The update holds NaN or Inf, which a sum would spread; it was not sent.")
        if not 0 <= weight <= self.ranges.max_weight:
            raise ValueError(
                f"A client weighs {weight:g}, but the words are laid out for weights from 0 to max_weight="
                f"{self.ranges.max_weight:g}. Give SecureAggregation(max_weight=...) a bound that holds for every "
                "client, or weigh them alike with weighting='uniform'."
            )
        exact = [torch.empty(0, dtype=torch.float64, device=words.device)] + [
            trees[tree][name].detach().double().reshape(-1) * _weight(tree, weight)
            for tree, name, shape, _ in self.layout.entries
            if _is_exact(tree, shape)
        ]
        to_limbs(torch.cat(exact), self.dtype)
        noise, clipped, start = Keystream(), False, 0
        for tree, name, shape, _ in self.layout.entries:
            if not _is_exact(tree, shape):
                target, start = words[start : start + shape.numel()], start + shape.numel()
                factor = _weight(tree, weight / self.ranges.max_weight)
                quantizer = self.ranges.quantizer(tree, num_clients)
                values = trees[tree][name].detach().reshape(-1)
                clipped = quantizer.add(target, values, factor, noise) or clipped
        head = torch.tensor([1.0, float(clipped), weight], dtype=torch.float64, device=words.device)
        words[start:] += to_limbs(torch.cat([head, *exact]), self.dtype)

    def unpack(self, words: Tensor, num_clients: int) -> Sums:
        """The sums behind summed vectors.

        Args:
            words: Shape ``[num_words]``, without masks.
            num_clients: The most clients whose updates are summed, as given to :meth:`add`.
        """
        figures = from_limbs(words[self.num_coordinates :])
        count, num_clipped, weight = figures[:3].tolist()
        exact = figures[3:]
        trees: dict[str, Tree] = {}
        start = 0
        for tree, name, shape, dtype in self.layout.entries:
            size = shape.numel()
            if _is_exact(tree, shape):
                value, exact = exact[:size], exact[size:]
            else:
                quantizer = self.ranges.quantizer(tree, num_clients)
                value = quantizer.decode(words[start : start + size]) * _weight(tree, self.ranges.max_weight)
                start += size
            trees.setdefault(tree, {})[name] = value.to(dtype).reshape(shape)
        return Sums(trees, weight, round(count), round(num_clipped))


@dataclass(frozen=True)
class Sums:
    """What a round's vectors add up to.

    Args:
        trees: By tree of the update, the weighted sums of the delta and buffers and the sums of the side channels.
        weight: The sum of the weights.
        num_clients: Clients whose update is in it.
        num_clipped: How many of them have clipped a coordinate.
    """

    trees: dict[str, Tree]
    weight: float
    num_clients: int
    num_clipped: int


def with_report(words: Tensor, names: Sequence[str], figures: Mapping[str, float], num_participants: int) -> Tensor:
    """A new vector with a report's figures and the checks behind the words.

    Args:
        words: The words of the updates.
        names: Names of the figures of all participants, in order.
        figures: This one's figures; what it lacks is 0.
        num_participants: Participants for which the vector stands.

    Raises:
        ValueError: If a figure is out of range or not finite; the message names it.
    """
    for name, figure in figures.items():
        if not math.isfinite(figure):
            raise ValueError(f"{name!r} is {figure}; a secure sum would spread it to everyone, so it was not sent.")
        if not abs(figure) < MAX_FIGURE:
            raise ValueError(f"{name!r} is {figure:g}; in a secure sum the largest is {MAX_FIGURE:g}.")
    limbs = to_limbs(torch.tensor([figures.get(name, 0.0) for name in names], dtype=torch.float64), words.dtype)
    checks = torch.full((NUM_CHECKS,), num_participants, dtype=words.dtype)
    return torch.cat([words, limbs.to(words.device), checks.to(words.device)])


def split_report(words: Tensor, names: Sequence[str], num_participants: int) -> tuple[Tensor, dict[str, float]]:
    """The words of the updates and the report's figures behind a sum of vectors.

    Raises:
        SecureAggregationError: If masks are left in it.
    """
    if words[-NUM_CHECKS:].tolist() != [num_participants] * NUM_CHECKS:
        raise SecureAggregationError(
            "The masks have not cancelled, so the sum is noise and is dropped: a participant's vector got lost or was "
            "changed on its way, or the participants were told different things. No update has been learned."
        )
    start = len(words) - NUM_CHECKS - NUM_LIMBS * len(names)
    return words[:start], dict(zip(names, from_limbs(words[start:-NUM_CHECKS]).tolist(), strict=True))


def _is_exact(tree: str, shape: torch.Size) -> bool:
    return len(shape) == 0 or tree == "buffers"


def _weight(tree: str, weight: float) -> float:
    return 1.0 if tree.startswith("aux/") else weight
