"""Compression as a transform: the server receives the decoded update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_fl.aggregation.aggregator import Aggregator
from lightning_fl.aggregation.compression.compressed_mean import CompressedMean
from lightning_fl.aggregation.compression.compressor import Compressor, refuse_server_data
from lightning_fl.aggregation.compression.sparse import RandomK, count
from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.rows import complete, real_dtype
from lightning_fl.aggregation.transform import Transform
from lightning_fl.seeding import client_generator
from lightning_fl.tree import Layout, as_real, updated
from lightning_fl.types import Aggregate, State, Update


@dataclass(frozen=True)
class Compress(Transform):
    r"""Compresses the change of the parameters, with error feedback: the compression error is added in the next round.

    .. math::
        p_i = \Delta_i + e_i, \qquad \text{sent: } C(p_i), \qquad e_i \leftarrow p_i - C(p_i)

    The loggers get ``fl/bytes_per_client``, the size of a compressed update; ``fl/num_bytes`` still counts the bytes
    that were actually sent. With :class:`RandomK` all clients choose the same coordinates, so only those are summed and
    sent, between ranks and silos and under secure aggregation. The output of other compressors can't be summed: between
    silos, use :class:`CompressedMean` with the same compressor to send the compressed bytes; in a simulation, no bytes
    are saved. Buffers and side channels are not compressed. A client that is refused or lost keeps its residual.

    Args:
        compressor: Encodes a vector as bytes and decodes it.
        error_feedback: Whether each client keeps the residual :math:`e_i`. Default True.

    Raises:
        ValueError: If ``compressor`` is none; if it scales what it sends and ``error_feedback`` is on; when the
            strategy is built, if it can't be combined with the aggregator or the privacy mechanism.

    Reference:
        Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019.
    """

    is_lossy: ClassVar[bool] = True
    client_keys: ClassVar[tuple[str, ...]] = ("seed",)
    compressor: Compressor
    error_feedback: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.compressor, Compressor):
            raise ValueError(f"compressor={self.compressor!r} must be a compressor, such as fl.compression.TopK(0.01).")
        if self.error_feedback and isinstance(self.compressor, RandomK) and self.compressor.scale:
            raise ValueError(
                "RandomK(scale=True) lengthens updates, so the residual would grow without bound. Use scale=False, or "
                "error_feedback=False."
            )

    @property
    def keeps_client_state(self) -> bool:  # type: ignore[override]
        """Whether clients keep a residual."""
        return self.error_feedback

    @property
    def keeps_norm_bound(self) -> bool:  # type: ignore[override]
        """Whether no update gets longer; the residual of the last round may lengthen it."""
        return self.compressor.shortens and not self.error_feedback

    def check(self, later: Sequence[Transform], aggregator: Aggregator, weighting: str) -> None:
        if aggregator.hides_reports and not self.compressor.shares_randomness:
            raise ValueError(
                f"{type(self.compressor).__name__} sends a selection or scale that differs between clients, which "
                f"can't be summed under the masks of {type(aggregator).__name__}. Use RandomK, whose coordinates are "
                "the same for all clients, or no compression."
            )
        if self._is_linear:
            refuse_server_data(self, aggregator)
        if isinstance(aggregator, CompressedMean) and (
            aggregator.compressor != self.compressor or not self.compressor.is_idempotent
        ):
            raise ValueError(
                f"CompressedMean({aggregator.compressor}) would compress the output of Compress({self.compressor}) "
                "again, with an error that error feedback does not correct. Give both the same compressor, one of "
                "Cast, Quantize, TopK and ScaledSign, or leave Compress out."
            )

    @property
    def _is_linear(self) -> bool:
        """Whether all clients send the same coordinates, which can then be summed."""
        return isinstance(self.compressor, RandomK)

    def like(self, update: Update) -> Update:
        if not isinstance(self.compressor, RandomK):
            return update
        sizes = sizes_of(Layout.of({"delta": update.delta}))
        device = next((tensor.device for tensor in update.delta.values()), None)
        delta = {
            str(dtype): torch.zeros(count(self.compressor.share, size), dtype=real_dtype(dtype), device=device)
            for dtype, size in sizes.items()
        }
        return replace(update, delta=delta)

    def start_round(self, state: State, ctx: RoundContext) -> State:
        if not self._is_linear:
            return state
        # Sent by the server, since a silo on another machine may have another seed.
        generator = client_generator(ctx.seed, ctx.round, "all", "compression")
        return {**state, "seed": torch.randint(2**62, (), generator=generator)}

    def _generator(self, ctx: RoundContext, server: State) -> torch.Generator:
        """The generator of a client in a round, or of all clients if they share their random numbers."""
        if self._is_linear:
            return torch.Generator().manual_seed(int(server["seed"]))
        client = "all" if self.compressor.shares_randomness or ctx.client is None else ctx.client
        return client_generator(ctx.seed, ctx.round, client, "compression")

    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        # By name, since callbacks freeze and unfreeze layers between rounds: a new parameter has no residual yet.
        kept = state.get("residual", {})
        own = {name: tensor + kept[name] if name in kept else tensor for name, tensor in update.delta.items()}
        layout = Layout.of({"delta": own})
        sent: dict[torch.dtype, Tensor] = {}
        residual: dict[torch.dtype, Tensor] = {}
        chosen: dict[str, Tensor] = {}
        for dtype, flat in layout.flatten({"delta": own}).items():
            vector = as_real(flat).reshape(-1)
            payload = self.compressor.encode(vector, self._generator(ctx, ctx.server))
            decoded = self.compressor.decode(payload, len(vector)).to(vector)
            sent[dtype], residual[dtype] = decoded, vector - decoded
            if isinstance(self.compressor, RandomK):
                places = self.compressor.places(len(vector), self._generator(ctx, ctx.server))
                chosen[str(dtype)] = decoded[places.to(decoded.device)]
        next_state: State = {}
        if self.error_feedback:
            next_state = {"residual": updated(kept, layout.unflatten(complete(residual)).get("delta", {}))}
        if self._is_linear:
            return replace(update, delta=chosen), next_state
        changed = layout.unflatten(complete(sent)).get("delta", {})
        delta = {name: changed[name].to(tensor.dtype) for name, tensor in update.delta.items()}
        return replace(update, delta=delta), next_state

    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        whole = aggregate.delta if ctx.template is None else ctx.template.delta
        layout = Layout.of({"delta": whole})
        sizes = sizes_of(layout)
        total = sum(map(self.compressor.num_bytes, sizes.values()))
        if isinstance(self.compressor, RandomK):
            flat = {}
            for dtype, size in sizes.items():
                values = aggregate.delta[str(dtype)]
                places = self.compressor.places(size, self._generator(ctx, state)).to(values.device)
                flat[dtype] = values.new_zeros(size).index_put((places,), values)
            delta = layout.unflatten(complete(flat)).get("delta", {})
            aggregate = replace(aggregate, delta=delta)
        return aggregate, {**state, "bytes": torch.tensor(total, dtype=torch.int64)}

    def report(self, state: State, ctx: RoundContext) -> Mapping[str, float | str]:
        return {"bytes_per_client": float(state["bytes"])}


def sizes_of(layout: Layout) -> dict[torch.dtype, int]:
    """The number of real numbers of each dtype in a layout."""
    return {dtype: layout.size(dtype) * (2 if dtype.is_complex else 1) for dtype in layout.dtypes}
