"""Low-rank updates that can be summed: products with a basis that all clients share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_fl.aggregation.aggregator import Aggregator
from lightning_fl.aggregation.compression.compressed_mean import CompressedMean
from lightning_fl.aggregation.compression.compressor import refuse_server_data
from lightning_fl.aggregation.compression.powersgd import sides
from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.transform import Transform
from lightning_fl.seeding import client_generator
from lightning_fl.tree import updated
from lightning_fl.types import Aggregate, State, Tree, Update


@dataclass(frozen=True)
class LowRank(Transform):
    r"""Low-rank updates that can be all-reduced: clients send the product of each matrix with a common basis.

    .. math::
        P_t = \operatorname{orth}\Bigl(\sum_i w_i M_i Q_{t-1}\Bigr), \qquad
        Q_{t+1} = \operatorname{orth}\Bigl(\sum_i w_i M_i^\top P_t\Bigr)

    In one round each client sends :math:`M_i Q`, from which the server computes :math:`\sum_i w_i M_i Q Q^\top`; in the
    next it sends :math:`M_i^\top P`. Each round is half a step of :class:`PowerSGD`'s power iteration; both halves in
    one round would need two exchanges with each client. The products are linear in the update, so they can be summed in
    an all-reduce and under the masks of secure aggregation; a rank sends :math:`r \max(a, b)` numbers for a matrix of
    a x b. With error feedback each client keeps the compression error. A tensor with more than two dimensions is
    flattened to a matrix that keeps its first dimension; vectors are sent uncompressed.

    Args:
        rank: The rank :math:`r`. Default 1.
        error_feedback: Whether each client keeps the compression error for the next round. Default True.

    Raises:
        ValueError: If ``rank`` is less than 1; when the strategy is built, if the aggregator compresses updates itself
            or evaluates whole models.

    Reference:
        Zhang et al., "Evaluation and Optimization of Gradient Compression for Distributed Deep Learning" (ACP-SGD),
        ICDCS 2023; Vogels et al., "PowerSGD", NeurIPS 2019.
    """

    is_lossy: ClassVar[bool] = True
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
                "CompressedMean would compress LowRank's products again, with an error that error feedback does not "
                "correct. Leave one of them out."
            )

    def like(self, update: Update) -> Update:
        # As many rows as the longer side has, since rounds alternate between the two sides.
        delta = {
            name: tensor.new_zeros(max(sides(tensor)), self.rank) if self._is_matrix(tensor) else tensor
            for name, tensor in update.delta.items()
        }
        return replace(update, delta=delta)

    def start_round(self, state: State, ctx: RoundContext) -> State:
        assert ctx.template is not None
        matrices = {name: tensor for name, tensor in ctx.template.delta.items() if self._is_matrix(tensor)}
        # By name, since tensors need not travel in each round: each takes turns with its two sides by itself.
        bases: dict[str, Tree] = {side: dict(state.get(side, {})) for side in ("left", "right")}
        for name, tensor in matrices.items():
            side = "left" if name in bases["left"] else "right"
            size = sides(tensor)[side == "right"]
            if name in bases[side] and bases[side][name].shape == (size, self.rank):
                continue
            generator = client_generator(ctx.seed, ctx.round, "all", f"low rank {name}")
            drawn = torch.randn(size, self.rank, generator=generator, dtype=torch.float64)
            bases[side][name] = torch.linalg.qr(drawn).Q.to(tensor)
        return {**state, **bases}

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
        return replace(update, delta=sent), {"residual": updated(kept, residual)} if self.error_feedback else {}

    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        assert ctx.template is not None
        found: Tree = {}
        bases: dict[str, Tree] = {side: dict(state.get(side, {})) for side in ("left", "right")}
        for name, template in ctx.template.delta.items():
            tensor = aggregate.delta[name]
            if not self._is_matrix(template):
                found[name] = tensor
                continue
            basis, is_right = _basis(state, name)
            product = tensor[: sides(template)[not is_right]]
            found[name] = _dense(product, basis, is_right).reshape(template.shape)
            bases["right" if is_right else "left"].pop(name)
            bases["left" if is_right else "right"][name] = torch.linalg.qr(product).Q
        numbers = sum(tensor.numel() for tensor in aggregate.delta.values())
        size = torch.tensor(4 * numbers, dtype=torch.int64)
        # A round without clients has no information about the updates' directions.
        kept = bases if aggregate.weight else state
        return replace(aggregate, delta=found), {**kept, "bytes": size}

    def report(self, state: State, ctx: RoundContext) -> Mapping[str, float | str]:
        return {"bytes_per_client": float(state["bytes"])}

    def _is_matrix(self, tensor: Tensor) -> bool:
        """Whether a low-rank product is smaller than the tensor."""
        return tensor.dim() > 1 and tensor.is_floating_point() and self.rank * max(sides(tensor)) < tensor.numel()


def _basis(state: State, name: str) -> tuple[Tensor, bool]:
    """The round's basis, and whether it is multiplied from the right."""
    is_right = name in state.get("right", {})
    return state["right" if is_right else "left"][name], is_right


def _dense(product: Tensor, basis: Tensor, is_right: bool) -> Tensor:
    basis = basis.to(product)
    return product @ basis.t() if is_right else basis @ product.t()
