"""The Gram matrix of a round's rows, which is all that most robust rules need of the updates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_fl.types import ClientId


@dataclass(frozen=True)
class Gram:
    r"""Inner products of the rows :math:`u_i` of a round, relative to a central point :math:`m`.

    All are float64 on the CPU. Distances between rows far from zero, or with one row far away, would be lost in the
    rounding of :math:`\langle u_i, u_j \rangle`; therefore :math:`m` is the rows' coordinate-wise median.

    Args:
        relative: :math:`\langle u_i - m, u_j - m \rangle`, ``[n, n]``.
        along: :math:`\langle u_i - m, m \rangle`, ``[n]``.
        square: :math:`\langle m, m \rangle`, a scalar.
        clients: The client of each row; empty for rows that mix the updates of several clients.
        num_beside: Number of extra rows at the end that are not updates of the round, such as a rule's last centre.
        measured: For each check that examines updates one by one, its measurements, ``[n]``.
    """

    relative: Tensor
    along: Tensor
    square: Tensor
    clients: Sequence[ClientId] = ()
    num_beside: int = 0
    measured: Mapping[Any, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, blocks: Iterable[Tensor], clients: Sequence[ClientId], num_beside: int = 0) -> Gram:
        """Computes the inner products of rows that are given in blocks of columns.

        Args:
            blocks: Blocks of columns, ``[n, w]`` each.
            clients: The client of each row.
            num_beside: Number of extra rows at the end that belong to no client.
        """
        n = len(clients) + num_beside
        relative, along, square = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64), 0.0
        for block in blocks:
            if block.numel():
                middle = block.median(dim=0).values.double()
                rows = block.to(torch.float64, copy=True).sub_(middle)
                relative += (rows @ rows.t()).cpu()
                along += (rows @ middle).cpu()
                square += float(middle @ middle)
        return cls(relative, along, torch.tensor(square, dtype=torch.float64), clients, num_beside)

    @classmethod
    def joined(cls, parts: Sequence[Gram]) -> Gram:
        r"""The geometry of rows that consist of several parts, each in units of its own, such as a control's.

        Each part counts as if the median of its norms were that of the first; a part, or a first one, of which that is
        0 counts as it is. Otherwise the part with the largest numbers would hide what the others hold. Rows beside may
        raise the median, since what changed much in earlier rounds may change little now.

        Args:
            parts: The geometry of the same rows in each part.
        """
        first = parts[0]
        unit, total = first.updates.norms.median(), first.flat()
        for part in parts[1:]:
            size = torch.cat([part.updates.norms.median()[None], part.norms[part.num_updates :]]).max()
            total = total + part.flat() * ((unit / size) ** 2 if unit > 0 and size > 0 else 1.0)
        return first.with_flat(total)

    def flat(self) -> Tensor:
        """All numbers in one vector, to be summed over ranks."""
        return torch.cat([self.relative.flatten(), self.along, self.square[None]])

    def with_flat(self, flat: Tensor) -> Gram:
        """The same rows with the numbers of :meth:`flat`."""
        n = len(self.along)
        relative = flat[: n * n].view(n, n)
        # Exactly symmetric: two rows that are each other's nearest then tie on every machine.
        return replace(self, relative=(relative + relative.t()) / 2, along=flat[n * n : -1], square=flat[-1])

    def __len__(self) -> int:
        return len(self.along)

    @property
    def num_updates(self) -> int:
        """The number of rows without the extra ones."""
        return len(self) - self.num_beside

    @property
    def updates(self) -> Gram:
        """The inner products of the rows without the extra ones."""
        n = self.num_updates
        return Gram(self.relative[:n, :n], self.along[:n], self.square, self.clients, measured=self.measured)

    @property
    def squared_distances(self) -> Tensor:
        r""":math:`\lVert u_i - u_j \rVert^2`, ``[n, n]``."""
        squares = self.relative.diagonal()
        distances = (squares[:, None] + squares - 2 * self.relative).clamp_(min=0)
        return distances.fill_diagonal_(0)

    @property
    def products(self) -> Tensor:
        r""":math:`\langle u_i, u_j \rangle`, ``[n, n]``."""
        return self.relative + self.along[:, None] + self.along + self.square

    @property
    def norms(self) -> Tensor:
        r""":math:`\lVert u_i \rVert`, ``[n]``."""
        return self.products.diagonal().clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """The cosines between rows, ``[n, n]``; 0 with a row of zeros."""
        return cosines_of(self.products)

    def mix(self, matrix: Tensor) -> Gram:
        """The inner products of the rows ``matrix @ rows``; extra rows stay unchanged.

        Args:
            matrix: ``[m, n]`` for n rows without the extra ones; each of its rows has to add up to 1.
        """
        full = self.with_beside(matrix)
        return Gram(full @ self.relative @ full.t(), full @ self.along, self.square, num_beside=self.num_beside)

    def with_beside(self, matrix: Tensor) -> Tensor:
        """The mixing matrix extended such that extra rows stay unchanged."""
        return torch.block_diag(matrix, torch.eye(self.num_beside, dtype=matrix.dtype)) if self.num_beside else matrix


def cosines_of(products: Tensor) -> Tensor:
    """The cosines between rows with these inner products, ``[n, n]``; 0 with a row of zeros."""
    norms = products.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0.0)
    return (products * scale * scale[:, None]).clamp(-1, 1)


def selection(chosen: Sequence[int] | Tensor, num_rows: int) -> Tensor:
    """The matrix that selects the rows ``chosen``, ``[len(chosen), num_rows]``."""
    return torch.eye(num_rows, dtype=torch.float64)[torch.as_tensor(chosen, dtype=torch.long)]


def mean_of(chosen: Sequence[int] | Tensor, num_rows: int) -> Tensor:
    """The matrix that averages the rows ``chosen``, ``[1, num_rows]``."""
    return selection(chosen, num_rows).mean(0, keepdim=True)


def lowest(values: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` lowest values, lowest first; ties go to the lower index."""
    return values.sort(stable=True).indices[:count]
