"""PowerSGD: low-rank approximations of the matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.transform import Transform
from lightning_fl.seeding import client_generator
from lightning_fl.tree import updated
from lightning_fl.types import Aggregate, State, Tree, Update


@dataclass(frozen=True)
class PowerSGD(Transform):
    r"""PowerSGD: approximates each matrix of an update by one of rank :math:`r`, with one step of power iteration.

    .. math::
        P = \operatorname{orth}(M Q), \qquad Q \leftarrow M^\top P, \qquad \text{sent: } P Q^\top

    Each client keeps its :math:`Q` as the start of the next round, and the compression error (error feedback). A tensor
    with more than two dimensions is flattened to a matrix that keeps its first dimension; vectors are sent
    uncompressed. The loggers get ``fl/bytes_per_client``. Each client has its own :math:`P`, unlike in DDP, where all
    workers average theirs between the two steps.

    Args:
        rank: The rank :math:`r`. Default 1.

    Raises:
        ValueError: If ``rank`` is less than 1.

    Reference:
        Vogels et al., "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", NeurIPS 2019.
    """

    rank: int = 1
    keeps_client_state = True
    is_lossy = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1.")

    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        sent: Tree = {}
        residual: Tree = {}
        start: Tree = {}
        for name, tensor in update.delta.items():
            own = tensor + state["residual"][name] if state and name in state["residual"] else tensor
            if not self._is_matrix(own):
                sent[name] = own
                continue
            matrix = own.reshape(len(own), -1)
            if state and name in state["start"]:
                q = state["start"][name]
            else:
                generator = client_generator(ctx.seed, ctx.round, "all", f"powersgd {name}")
                q = torch.randn(matrix.shape[1], self.rank, generator=generator, dtype=torch.float64).to(matrix)
            p, start[name] = power_step(matrix, q)
            sent[name] = (p @ start[name].t()).reshape(own.shape)
            residual[name] = own - sent[name]
        return replace(update, delta=sent), updated(state, {"residual": residual, "start": start})

    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        numbers = sum(
            self.rank * sum(sides(tensor)) if self._is_matrix(tensor) else tensor.numel()
            for tensor in aggregate.delta.values()
        )
        return aggregate, {"bytes": torch.tensor(4 * numbers, dtype=torch.int64)}

    def report(self, state: State, ctx: RoundContext) -> Mapping[str, float | str]:
        return {"bytes_per_client": float(state["bytes"])}

    def _is_matrix(self, tensor: Tensor) -> bool:
        """Whether a low-rank product is smaller than the tensor."""
        return tensor.dim() > 1 and self.rank * sum(sides(tensor)) < tensor.numel()


def sides(tensor: Tensor) -> tuple[int, int]:
    """Number of rows and columns of a tensor flattened to a matrix."""
    return len(tensor), tensor.numel() // max(1, len(tensor))


def power_step(matrix: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """``P`` with orthonormal columns and the new ``Q``; ``P @ Q.T`` approximates the matrix.

    Args:
        matrix: ``[a, b]``.
        q: ``[b, rank]``.
    """
    p = torch.linalg.qr(matrix @ q).Q
    return p, matrix.t() @ p
