"""Compression as a transform: what the server gets is what a client's bytes decode to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_fl.aggregation.aggregator import Aggregator
from lightning_fl.aggregation.compression.compressed_mean import CompressedMean
from lightning_fl.aggregation.compression.compressor import Compressor
from lightning_fl.aggregation.compression.sparse import RandomK
from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.transform import Transform
from lightning_fl.seeding import client_generator
from lightning_fl.tree import Layout, as_real
from lightning_fl.types import Aggregate, State, Update


@dataclass(frozen=True)
class Compress(Transform):
    r"""Compresses the change of the parameters, with error feedback: what was not sent is added in the next round.

    .. math::
        p_i = \Delta_i + e_i, \qquad \text{sent: } C(p_i), \qquad e_i \leftarrow p_i - C(p_i)

    The loggers get ``fl/bytes_per_client``, the bytes of a compressed update; ``fl/num_bytes`` stays what went over the
    wire. In a simulation nothing is saved. Between silos :class:`CompressedMean` with the same compressor sends the
    bytes. Buffers and side channels stay as they are. A client that is refused or lost keeps its residual.

    Args:
        compressor: Turns a vector into bytes and back.
        error_feedback: Whether each client keeps the residual :math:`e_i`. Default True.

    Raises:
        ValueError: If it can't be right beside the aggregator or privacy.

    Reference:
        Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019.
    """

    compressor: Compressor
    error_feedback: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.compressor, Compressor):
            raise ValueError(f"compressor={self.compressor!r} must be one, such as fl.compression.TopK(0.01).")
        if self.error_feedback and isinstance(self.compressor, RandomK) and self.compressor.scale:
            raise ValueError(
                "RandomK(scale=True) lengthens what it sends, so that the residual would grow without end. Use "
                "scale=False, or error_feedback=False."
            )

    @property
    def keeps_client_state(self) -> bool:  # type: ignore[override]
        """Whether clients keep a residual."""
        return self.error_feedback

    @property
    def keeps_norm_bound(self) -> bool:  # type: ignore[override]
        """Whether no update gets longer: a residual of the last round may lengthen it."""
        return self.compressor.shortens and not self.error_feedback

    def check(self, later: Sequence[Transform], aggregator: Aggregator, weighting: str) -> None:
        if aggregator.hides_reports and not self.compressor.shares_randomness:
            raise ValueError(
                f"{type(self.compressor).__name__} sends each client's own selection or scale, which can't be added "
                f"up under the masks of {type(aggregator).__name__}. Use RandomK, whose coordinates are the same for "
                "all, or no compression."
            )
        if isinstance(aggregator, CompressedMean) and (
            aggregator.compressor != self.compressor or not self.compressor.is_idempotent
        ):
            raise ValueError(
                f"CompressedMean({aggregator.compressor}) would compress again what Compress({self.compressor}) has "
                "compressed, with another loss that no residual keeps. Give both the same one of Cast, Quantize, "
                "TopK or ScaledSign, or leave Compress out."
            )

    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        layout = Layout.of({"delta": update.delta})
        sent: dict[torch.dtype, Tensor] = {}
        residual: dict[str, Tensor] = {}
        for dtype, flat in layout.flatten({"delta": update.delta}).items():
            vector = as_real(flat).reshape(-1)
            if state:
                vector = vector + state["residual"][str(dtype)]
            payload = self.compressor.encode(vector, generator_of(self.compressor, ctx))
            own = self.compressor.decode(payload, len(vector)).to(vector)
            residual[str(dtype)] = vector - own
            sent[dtype] = torch.view_as_complex(own.view(-1, 2)) if dtype.is_complex else own
        changed = layout.unflatten(sent).get("delta", {})
        delta = {name: changed[name].to(tensor.dtype) for name, tensor in update.delta.items()}
        return replace(update, delta=delta), {"residual": residual} if self.error_feedback else {}

    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        layout = Layout.of({"delta": aggregate.delta})
        sizes = [layout.size(dtype) * (2 if dtype.is_complex else 1) for dtype in layout.dtypes]
        total = sum(self.compressor.num_bytes(size) for size in sizes)
        return aggregate, {"bytes": torch.tensor(total, dtype=torch.int64)}

    def report(self, state: State, ctx: RoundContext) -> Mapping[str, float | str]:
        return {"bytes_per_client": float(state["bytes"])}


def generator_of(compressor: Compressor, ctx: RoundContext) -> torch.Generator:
    """The random numbers of a client in a round, or of all clients."""
    client = "all" if compressor.shares_randomness or ctx.client is None else ctx.client
    return client_generator(ctx.seed, ctx.round, client, "compression")
