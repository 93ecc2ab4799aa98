"""The weighted mean of compressed updates."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_fl.aggregation.aggregator import Aggregator, FederationFacts
from lightning_fl.aggregation.compression.compressor import Compressor
from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.weighted_mean import WeightedMean, aggregate_of
from lightning_fl.algorithms import Algorithm
from lightning_fl.communication import Group, Message
from lightning_fl.seeding import client_generator
from lightning_fl.tree import Layout, as_real, update_trees
from lightning_fl.types import Aggregate, Update

DENSE_BYTES = 4


@dataclass(frozen=True)
class Payloads:
    """Accumulator of :class:`CompressedMean`.

    Args:
        rest: The weighted mean's accumulator of buffers and side channels.
        layout: The position of each parameter in the flat vectors.
        device: The device of the sums.
        positions: For each of this rank's updates, the position of its client in the cohort.
        weights: The updates' weights.
        payloads: The updates' bytes.
        sums: The sums over all clients, after the merge.
    """

    rest: Any
    layout: Layout
    device: torch.device
    positions: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    payloads: tuple[Tensor, ...] = ()
    sums: Mapping[torch.dtype, Tensor] | None = None


class CompressedMean(Aggregator):
    r"""The weighted mean of compressed updates: each rank receives the bytes of all, decodes and sums them.

    All ranks sum in the order of the cohort, so that their results are bitwise equal. Each rank sends its payload to
    n - 1 others, whereas an all-reduce sends about twice the model for any n. So it saves bytes below
    :math:`8 D / \text{payload}` ranks for D float32 parameters: 4 in half precision, 64 with one bit, 100 with the
    largest 1 %; with more ranks, there is a warning. Buffers and side channels use the uncompressed mean.

    For error feedback, add :class:`Compress` with the same compressor to the transforms.

    Args:
        compressor: Encodes a vector as bytes and decodes it.

    Raises:
        ValueError: If ``compressor`` is none.
    """

    def __init__(self, compressor: Compressor) -> None:
        if not isinstance(compressor, Compressor):
            raise ValueError(f"compressor={compressor!r} must be a compressor, such as fl.compression.Cast().")
        self.compressor = compressor
        self._mean = WeightedMean()

    def __repr__(self) -> str:
        return f"CompressedMean({self.compressor!r})"

    def check(self, algorithm: Algorithm) -> None:
        if algorithm.needs_exact_deltas:
            raise ValueError(
                f"{type(algorithm).__name__} is right only if the server gets the very changes that the clients have "
                "computed, and CompressedMean gives it what their bytes decode to. Use the ordinary mean, or another "
                "algorithm, such as 'fedavg' or 'scaffold'."
            )

    def open(self, group: Group, facts: FederationFacts) -> None:
        size = 1_000_000
        most = 2 * DENSE_BYTES * size / self.compressor.num_bytes(size)
        if facts.is_training and facts.silos and group.size > most and group.rank == 0:
            warnings.warn(
                f"Among {group.size} silos CompressedMean({self.compressor}) sends more than an all-reduce of float32 "
                f"would: it saves bytes below {most:.0f} silos. Leave it out, or compress more.",
                stacklevel=2,
            )

    def init(self, template: Update, device: torch.device, session: Any = None) -> Payloads:
        rest = self._mean.init(replace(template, delta={}), device)
        return Payloads(rest, Layout.of({"delta": template.delta}), device)

    def add(self, acc: Payloads, update: Update, ctx: RoundContext) -> Payloads:
        assert ctx.client is not None
        Layout.check(acc.layout, {"delta": update.delta})
        # Checked together first: the uncompressed mean must not add part of an update that is then refused.
        acc.rest.layout.check(update_trees(replace(update, delta={})))
        client = "all" if self.compressor.shares_randomness else ctx.client
        parts = []
        for flat in acc.layout.flatten({"delta": update.delta}).values():
            generator = client_generator(ctx.seed, ctx.round, client, "compression")
            parts.append(self.compressor.encode(as_real(flat).reshape(-1), generator))
        return replace(
            acc,
            rest=self._mean.add(acc.rest, replace(update, delta={}), ctx),
            positions=(*acc.positions, ctx.cohort.index(ctx.client)),
            weights=(*acc.weights, update.weight),
            payloads=(*acc.payloads, torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)),
        )

    def merge(self, acc: Payloads, group: Group, report: Message, ctx: RoundContext) -> tuple[Payloads, list[Message]]:
        own = {"places": list(acc.positions), "weights": list(acc.weights)}
        rest, messages = self._mean.merge(acc.rest, group, Message({**report.fields, **own}, report.tensors), ctx)
        sizes = {dtype: acc.layout.size(dtype) * (2 if dtype.is_complex else 1) for dtype in acc.layout.dtypes}
        length = sum(map(self.compressor.num_bytes, sizes.values()))
        counts = [len(message.fields["places"]) for message in messages]
        payload = torch.cat([*acc.payloads, torch.empty(0, dtype=torch.uint8)])
        received = torch.cat(group.all_to_all([payload] * group.size, [count * length for count in counts]))
        places = [place for message in messages for place in message.fields["places"]]
        weights = [weight for message in messages for weight in message.fields["weights"]]
        sums = {dtype: torch.zeros(size, dtype=_sum_dtype(dtype)) for dtype, size in sizes.items()}
        for row in sorted(range(len(places)), key=places.__getitem__):
            start = row * length
            for dtype, size in sizes.items():
                stop = start + self.compressor.num_bytes(size)
                sums[dtype].add_(self.compressor.decode(received[start:stop], size), alpha=weights[row])
                start = stop
        return replace(acc, rest=rest, sums=sums), messages

    def result(self, acc: Payloads, ctx: RoundContext) -> Aggregate:
        assert acc.sums is not None, "merge comes before result"
        flat = {
            dtype: (torch.view_as_complex(total.view(-1, 2)) if dtype.is_complex else total).to(acc.device, copy=True)
            for dtype, total in acc.sums.items()
        }
        trees = {**acc.rest.views, **acc.layout.unflatten(flat)}
        return aggregate_of(trees, acc.rest.weight, acc.rest.num_clients, ctx)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype
