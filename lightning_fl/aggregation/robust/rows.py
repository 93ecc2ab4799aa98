"""The updates of a round as the rows of a matrix that is distributed over the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fl.communication import Group, Message
from lightning_fl.tree import Flat, Layout, as_real
from lightning_fl.types import Tree, Update

LARGEST = 1e100
"""Coordinates are clamped to this, so that the square of an attacker's value stays finite. No honest one gets there."""
WINDOW = 1 << 21
"""Elements of a window of columns over all rows. With all its copies, a window takes at most 64 MiB."""


class Window(NamedTuple):
    """A window of columns of all rows, on the rank that processes them.

    Args:
        dtype: The dtype of the flat buffers.
        bounds: The first column of each rank, and the end of the last one's columns.
        start: The first column of this rank.
        block: This rank's columns, ``[rows, columns]``.
    """

    dtype: torch.dtype
    bounds: Sequence[int]
    start: int
    block: Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of this rank as flat buffers; complex numbers are stored as pairs of real ones.

    Args:
        layout: The position of each tensor in a row.
        device: The device of the rows.
        blocks: The rows of each client group that was added, by dtype ``[clients, elements]``.
        positions: For each row the position of its client in the cohort.
    """

    layout: Layout
    device: torch.device
    blocks: tuple[Flat, ...] = ()
    positions: tuple[int, ...] = ()

    def add(self, trees: dict[str, Tree], positions: Sequence[int]) -> Rows:
        """The rows with those of further clients added, whose tensors are stacked."""
        parts: dict[torch.dtype, list[Tensor]] = {dtype: [] for dtype in self.layout.dtypes}
        for tree, name, _, dtype in self.layout.entries:
            own = trees[tree][name].detach().to(self.device, dtype)
            parts[dtype].append(as_real(own).reshape(len(positions), -1))
        block = {dtype: torch.cat(tensors, dim=1) for dtype, tensors in parts.items()}
        return replace(self, blocks=(*self.blocks, block), positions=(*self.positions, *positions))

    def __len__(self) -> int:
        return len(self.positions)

    def trees(self) -> Iterator[dict[str, Tree]]:
        """This rank's rows as trees."""
        for block in self.blocks:
            for place in range(len(next(iter(block.values()), ()))):
                yield self.layout.unflatten(complete({dtype: own[place] for dtype, own in block.items()}))

    def updates(self) -> Iterator[Update]:
        """This rank's rows as updates."""
        for trees in self.trees():
            yield Update(trees.get("delta", {}), trees.get("buffers", {}))

    def columns(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        """Columns of all rows of this rank, ``[rows, stop - start]``."""
        if not self.blocks:
            return torch.empty(0, stop - start, dtype=real_dtype(dtype), device=self.device)
        found = torch.cat([block[dtype][:, start:stop] for block in self.blocks])
        return found.clamp_(-LARGEST, LARGEST) if found.dtype == torch.float64 else found

    def of_trees(self, kept: Sequence[Mapping[str, Tree]]) -> Flat:
        """Trees of earlier rounds as rows like these; tensors that are missing or had another shape are zero."""
        stacked: dict[str, Tree] = {}
        for tree, name, shape, dtype in self.layout.entries:
            found = [own.get(tree, {}).get(name) for own in kept]
            stacked.setdefault(tree, {})[name] = torch.stack(
                [
                    torch.zeros(shape, dtype=dtype, device=self.device)
                    if tensor is None or tensor.shape != shape
                    else tensor.to(self.device, dtype)
                    for tensor in found
                ]
            )
        return Rows(self.layout, self.device).add(stacked, range(len(kept))).blocks[0]

    def width(self, dtype: torch.dtype) -> int:
        """Number of columns."""
        return self.layout.size(dtype) * (2 if dtype.is_complex else 1)

    @property
    def trees_held(self) -> list[str]:
        """The names of the trees in a row: ``"delta"``, ``"buffers"``, ``"aux/..."``."""
        return list(dict.fromkeys(tree for tree, *_ in self.layout.entries))

    def span(self, dtype: torch.dtype, tree: str | None = None) -> tuple[int, int]:
        """The columns that hold a tree, from the first to behind the last; None: those of all trees."""
        if tree is None:
            return 0, self.width(dtype)
        before, held = self.trees_held[: self.trees_held.index(tree)], [tree]
        start, width = (
            replace(self, layout=Layout(tuple(entry for entry in self.layout.entries if entry[0] in own))).width(dtype)
            for own in (before, held)
        )
        return start, start + width

    def windows(
        self, group: Group, counts: Sequence[int], order: Sequence[int], tree: str | None = None
    ) -> Iterator[Window]:
        """All rows in windows of columns; each rank gets its share of the columns.

        Args:
            group: The ranks.
            counts: The number of rows of each rank.
            order: The order in which to return the rows of all ranks.
            tree: The tree whose columns to return. None: those of all.
        """
        index = torch.tensor(order, dtype=torch.long, device=self.device)
        width_of_window = max(1, group.size * WINDOW // max(1, len(order)))
        for dtype in self.layout.dtypes:
            begin, end = self.span(dtype, tree)
            for first in range(begin, end, width_of_window):
                last = min(end, first + width_of_window)
                bounds = [first + (last - first) * rank // group.size for rank in range(group.size + 1)]
                start, stop = bounds[group.rank], bounds[group.rank + 1]
                own = self.columns(dtype, first, last)
                parts = [own[:, a - first : b - first].reshape(-1) for a, b in pairwise(bounds)]
                del own  # keep as few copies of a window as possible
                received = group.all_to_all(parts, [count * (stop - start) for count in counts])
                del parts
                block = torch.cat(
                    [part.view(count, stop - start) for part, count in zip(received, counts, strict=True)]
                )
                del received
                block = block[index]
                yield Window(dtype, bounds, start, block)

    def own_windows(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The rows of this rank in windows of columns, ``[rows, columns]``."""
        width, step = self.width(dtype), max(1, WINDOW // max(1, len(self)))
        for start in range(0, width, step):
            yield self.columns(dtype, start, min(width, start + step))

    def gather(self, group: Group, counts: Sequence[int], round: int) -> Rows:
        """The rows of all ranks on each of them, in the order of ranks.

        Raises:
            RuntimeError: If the ranks have received different rows.
        """
        gathered, hashed = {}, hashlib.blake2b()
        for dtype in self.layout.dtypes:
            width, step = self.width(dtype), max(1, WINDOW // sum(counts))
            found = torch.empty(sum(counts), width, dtype=real_dtype(dtype), device=self.device)
            for first in range(0, width, step):
                last = min(width, first + step)
                own = self.columns(dtype, first, last).reshape(-1)
                received = group.all_to_all([own] * group.size, [count * (last - first) for count in counts])
                block = torch.cat([p.view(c, last - first) for p, c in zip(received, counts, strict=True)])
                hashed.update(block.cpu().contiguous().view(torch.uint8).numpy().tobytes())
                found[:, first:last] = block
            gathered[dtype] = found
        digests = group.all_gather(Message({"digest": hashed.hexdigest()}), f"rows of round {round}")
        others = [rank for rank, message in enumerate(digests) if message.fields["digest"] != hashed.hexdigest()]
        if others:
            raise RuntimeError(
                f"Rank {group.rank} received other updates than rank {others[0]} in round {round}: a silo sent "
                "different updates to different silos, or the network changed them. The round is dropped."
            )
        return replace(self, blocks=(gathered,), positions=tuple(range(sum(counts))))


@dataclass(frozen=True)
class RoundRows:
    """All rows of a round: this rank's, and access to those of the others.

    Args:
        rows: This rank's rows.
        group: The ranks.
        counts: The number of rows of each rank.
        order: The rows of all ranks, ordered by the position of their clients in the cohort.
        beside: Extra rows that are not updates of the round, the same on all ranks: ``[m, elements]`` by dtype.
    """

    rows: Rows
    group: Group
    counts: Sequence[int]
    order: Sequence[int]
    beside: Flat = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.order)

    @property
    def own(self) -> list[int]:
        """The positions of this rank's rows in the order."""
        before = sum(self.counts[: self.group.rank])
        place = {row: index for index, row in enumerate(self.order)}
        return [place[row] for row in range(before, before + self.counts[self.group.rank])]

    def windows(self, tree: str | None = None) -> Iterator[Window]:
        """The rows in their order, followed by the extra ones, in windows of columns: of one tree, or of all."""
        for window in self.rows.windows(self.group, self.counts, self.order, tree):
            if self.beside:
                own = self.beside[window.dtype][:, window.start : window.start + window.block.shape[1]]
                window = Window(window.dtype, window.bounds, window.start, torch.cat([window.block, own]))
            yield window

    def everywhere(self) -> Flat:
        """The rows in their order on all ranks, ``[rows, elements]`` by dtype."""
        pieces: dict[torch.dtype, list[Tensor]] = {dtype: [] for dtype in self.rows.layout.dtypes}
        for dtype, bounds, _, block in self.rows.windows(self.group, self.counts, self.order):
            widths = [stop - start for start, stop in pairwise(bounds)]
            own, sizes = block.reshape(-1), [len(self) * width for width in widths]
            received = self.group.all_to_all([own] * self.group.size, sizes)
            pieces[dtype] += [part.view(len(self), width) for part, width in zip(received, widths, strict=True)]
        return {dtype: torch.cat(parts, dim=1) for dtype, parts in pieces.items()}


def complete(flat: Flat) -> Flat:
    """Flat buffers in the layout's dtypes: pairs of real numbers become complex ones where the dtype is complex."""
    return {
        dtype: torch.view_as_complex(own.view(-1, 2)).to(dtype) if dtype.is_complex else own
        for dtype, own in flat.items()
    }


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a complex dtype's real part; other dtypes are unchanged."""
    return dtype.to_real() if dtype.is_complex else dtype
