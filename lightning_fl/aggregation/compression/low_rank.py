"""Low-rank updates that add up: products with a basis that all clients share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_fl.aggregation.aggregator import Aggregator
from lightning_fl.aggregation.compression.compressed_mean import CompressedMean
from lightning_fl.aggregation.compression.compressor import refuse_server_data
from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.transform import Transform
from lightning_fl.seeding import client_generator
from lightning_fl.types import Aggregate, State, Tree, Update


@dataclass(frozen=True)
class LowRank(Transform):
    r"""Low rank through the all-reduce: clients send products of each matrix with a basis that is the same for all.

    .. math::
        P_t = \operatorname{orth}\Bigl(\sum_i w_i M_i Q_{t-1}\Bigr), \qquad
        Q_{t+1} = \operatorname{orth}\Bigl(\sum_i w_i M_i^\top P_t\Bigr)

    In one round each client sends :math:`M_i Q`, of which the server makes :math:`\sum_i w_i M_i Q Q^\top`; in the next
    :math:`M_i^\top P`. The rounds alternate, each half a step of the power iteration of :class:`PowerSGD`, whose two
    products in one round would need each client twice. Products are linear, so they add up in an all-reduce and
    under masks; a rank sends :math:`r \max(a, b)` numbers for a matrix of a x b. With error feedback each client keeps
    what was not sent. Tensors with more than two dimensions are matrices by their first; vectors are sent whole.

    Args:
        rank: The rank :math:`r`. Default 1.
        error_feedback: Whether each client keeps what was not sent. Default True.

    Raises:
        ValueError: If ``rank`` is less than 1, or the aggregator compresses by itself or tries whole models.

    Reference:
        Zhang et al., "Evaluation and Optimization of Gradient Compression for Distributed Deep Learning" (ACP-SGD),
        ICDCS 2023; Vogels et al., "PowerSGD", NeurIPS 2019.
    """

    client_keys: ClassVar[tuple[str, ...]] = ("right", "left")
    rank: int = 1
    error_feedback: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1.")

    @property
    def keeps_client_state(self) -> bool:  # type: ignore[override]
        """Whether clients keep a residual."""
        return self.error_feedback

    def check(self, later: Sequence[Transform], aggregator: Aggregator, weighting: str) -> None:
        refuse_server_data(self, aggregator)
        if isinstance(aggregator, CompressedMean):
            raise ValueError(
                "CompressedMean would compress LowRank's products once more, with a loss that no residual keeps. Leave "
                "one of them out."
            )

    def like(self, update: Update) -> Update:
        # As many rows as the longer side has, since the two sides take turns.
        delta = {
            name: tensor.new_zeros(max(_sides(tensor)), self.rank) if self._is_matrix(tensor) else tensor
            for name, tensor in update.delta.items()
        }
        return replace(update, delta=delta)

    def start_round(self, state: State, ctx: RoundContext) -> State:
        assert ctx.template is not None
        matrices = {name: tensor for name, tensor in ctx.template.delta.items() if self._is_matrix(tensor)}
        side = "left" if "left" in state else "right"
        known, bases = state.get(side, {}), {}
        for name, tensor in matrices.items():
            size = _sides(tensor)[side == "right"]
            if name in known and known[name].shape == (size, self.rank):
                bases[name] = known[name]
                continue
            generator = client_generator(ctx.seed, ctx.round, "all", f"low rank {name}")
            drawn = torch.randn(size, self.rank, generator=generator, dtype=torch.float64)
            bases[name] = torch.linalg.qr(drawn).Q.to(tensor)
        return {side: bases, **({"bytes": state["bytes"]} if "bytes" in state else {})}

    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        sent: Tree = {}
        residual: Tree = {}
        kept = state.get("residual", {})
        for name, tensor in update.delta.items():
            if not self._is_matrix(tensor):
                sent[name] = tensor
                continue
            own = tensor + kept[name] if name in kept else tensor
            matrix, basis, is_right = own.reshape(len(own), -1), *_basis(ctx.server, name)
            product = (matrix if is_right else matrix.t()) @ basis.to(matrix)
            residual[name] = own - _dense(product, basis, is_right).reshape(own.shape)
            sent[name] = torch.nn.functional.pad(product, (0, 0, 0, max(matrix.shape) - len(product)))
        return replace(update, delta=sent), {"residual": residual} if self.error_feedback else {}

    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        assert ctx.template is not None
        found: Tree = {}
        following: Tree = {}
        other = "right" if "left" in state else "left"
        for name, template in ctx.template.delta.items():
            tensor = aggregate.delta[name]
            if not self._is_matrix(template):
                found[name] = tensor
                continue
            basis, is_right = _basis(state, name)
            product = tensor[: _sides(template)[not is_right]]
            found[name] = _dense(product, basis, is_right).reshape(template.shape)
            following[name] = torch.linalg.qr(product).Q
        numbers = sum(tensor.numel() for tensor in aggregate.delta.values())
        size = torch.tensor(4 * numbers, dtype=torch.int64)
        # A round without clients says nothing of where updates point.
        kept = {other: following} if aggregate.weight else {key: state[key] for key in state if key != "bytes"}
        return replace(aggregate, delta=found), {**kept, "bytes": size}

    def report(self, state: State, ctx: RoundContext) -> Mapping[str, float | str]:
        return {"bytes_per_client": float(state["bytes"])}

    def _is_matrix(self, tensor: Tensor) -> bool:
        """Whether a low rank saves anything."""
        return tensor.dim() > 1 and tensor.is_floating_point() and self.rank * max(_sides(tensor)) < tensor.numel()


def _sides(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix."""
    return len(tensor), tensor.numel() // max(1, len(tensor))


def _basis(state: State, name: str) -> tuple[Tensor, bool]:
    """The basis of the round, and whether it stands on the right of the matrix."""
    is_right = "right" in state
    return state["right" if is_right else "left"][name], is_right


def _dense(product: Tensor, basis: Tensor, is_right: bool) -> Tensor:
    basis = basis.to(product)
    return product @ basis.t() if is_right else basis @ product.t()
