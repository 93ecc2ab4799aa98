"""Averages the products of low-rank adapters instead of their factors."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fl.aggregation import Aggregator, RoundContext, WeightedMean
from lightning_fl.algorithms import Algorithm
from lightning_fl.algorithms.lora import base_of, pairs_of
from lightning_fl.communication import Group, Message
from lightning_fl.seeding import derive_seed
from lightning_fl.types import Aggregate, Tree, Update

Pairs = Mapping[str, str]
"""The name of each ``lora_A``, and that of its ``lora_B``."""


@dataclass(frozen=True)
class Products:
    """Accumulator of :class:`LoRAProduct`.

    Args:
        mean: The accumulator of the weighted mean, with a product in place of each pair of factors.
        pairs: The name of each ``lora_A``, mapped to that of its ``lora_B``.
        factors: The values of the factors at the round's start.
        bases: The name of each ``lora_A``, mapped to that of its layer's weight; empty unless products are merged
            into it.
        weights: The values of these weights at the round's start.
    """

    mean: Any
    pairs: Pairs
    factors: Tree
    bases: Pairs = field(default_factory=dict)
    weights: Tree = field(default_factory=dict)

    def with_products(self, update: Update, factors: Tree | None = None) -> Update:
        """The update with ``B_i A_i`` in place of the changes of the factors, for one client or a stacked group."""
        factors = self.factors if factors is None else factors
        replaced = {*self.pairs, *self.pairs.values()}
        delta = {name: tensor for name, tensor in update.delta.items() if name not in replaced}
        for down, up in self.pairs.items():
            delta[down] = (factors[up] + update.delta[up]) @ (factors[down] + update.delta[down])
        # No client changes the base, so it need not travel.
        buffers = {name: tensor for name, tensor in update.buffers.items() if name not in self.weights}
        return replace(update, delta=delta, buffers=buffers)


@dataclass(frozen=True)
class LoRAProduct(Aggregator):
    r"""The weighted mean of the clients' products :math:`B_i A_i`, factorised again or merged into the base weights.

    A layer with a low-rank adapter computes :math:`W x + s B A x`. The product of the mean factors is not the mean of
    the products: :math:`\sum_i p_i B_i A_i - \bar B \bar A = \sum_i p_i (B_i - \bar B)(A_i - \bar A)`. Here

    .. math::
        B A = \left[ \sum_i p_i \, B_i A_i \right]_r, \quad B = U_r \sqrt{\Sigma_r}, \quad A = \sqrt{\Sigma_r} V_r^T

    is the best rank-r approximation, by the singular value decomposition :math:`U \Sigma V^T`. Signs are chosen such
    that the largest entry of each column of U is positive. All other tensors are averaged.

    With ``method="stack"`` nothing is truncated: the mean of the products is added to the base weights,
    :math:`W \leftarrow W + s \sum_i p_i B_i A_i`, and the adapters are reinitialised, B to 0 and A at random as in
    peft. This is equivalent to stacking the factors of all clients. The base weights change in every round, so
    checkpoints contain them.

    The names of a pair differ in ``lora_A`` and ``lora_B`` only, as in peft; A has the shape ``[r, in]``, B
    ``[out, r]``. Ranks exchange a product of ``out x in`` numbers for each pair, as many as the layer has.

    Args:
        method: ``"svd"`` or ``"stack"``. Default ``"svd"``.
        rank: The rank r of ``"svd"``; rows and columns beyond it are 0. Default None: the adapters' rank.
        alpha: peft's ``lora_alpha``, required for ``"stack"``, whose scale is s = alpha / r. Default None.
        rslora: Whether to use rsLoRA's scale alpha / sqrt(r). Default False.

    Raises:
        ValueError: If ``alpha`` is missing for ``"stack"`` or given for ``"svd"``; with an algorithm whose server does
            more than average, or that sends side channels; in the first round, if the trained tensors contain no pair,
            or only half of one.

    References:
        Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
        NeurIPS 2024, for ``"stack"``.

    Example:
        >>> from lightning_fl.strategies import FederatedStrategy
        >>> strategy = FederatedStrategy("fedavg", aggregator=LoRAProduct())
    """

    method: Literal["svd", "stack"] = "svd"
    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        stacks = self.method == "stack"
        if self.method not in ("svd", "stack"):
            raise ValueError(f"method={self.method!r} is not known; expected 'svd' or 'stack'.")
        if stacks != (self.alpha is not None) or (self.rslora and not stacks):
            raise ValueError(
                f"{self!r}: method='stack' merges adapters into the base with the scale alpha / r, so it needs "
                "alpha=lora_alpha; method='svd' does not."
            )
        if self.rank is not None and (stacks or self.rank < 1):
            raise ValueError(f"{self!r}: rank must be a positive number, and is for method='svd' only.")

    @property
    def moves_frozen(self) -> bool:
        return self.method == "stack"

    def moves(self, names: Sequence[str], trained: Mapping[str, Tensor]) -> Sequence[str]:
        return [base_of(down, names) for down in pairs_of(trained)] if self.moves_frozen else []

    def check(self, algorithm: Algorithm) -> None:
        averages = type(algorithm).server_update is Algorithm.server_update and algorithm.server_lr == 1
        if not averages or type(algorithm).aux_like is not Algorithm.aux_like:
            raise ValueError(
                f"LoRAProduct changes the basis of the adapters in every round, so {algorithm!r} can't keep or combine "
                "tensors of earlier rounds. Use FedAvg or FedProx with server_lr=1."
            )

    def init(self, template: Update, device: torch.device, session: Any = None) -> Products:
        pairs = pairs_of(template.delta)
        bases = {down: base_of(down, list(template.buffers)) for down in pairs} if self.method == "stack" else {}
        factors = {name: template.delta[name] for pair in pairs.items() for name in pair}
        zeros = {name: torch.zeros_like(one) for name, one in factors.items()}
        acc = Products(None, pairs, factors, bases, {name: template.buffers[name] for name in bases.values()})
        start = acc.with_products(template, zeros)
        return replace(acc, mean=WeightedMean().init(start, device, session))

    def add(self, acc: Products, update: Update, ctx: RoundContext) -> Products:
        return replace(acc, mean=WeightedMean().add(acc.mean, acc.with_products(update), ctx))

    def add_group(self, acc: Products, updates: Update, weights: Sequence[float], ctx: RoundContext) -> Products:
        return replace(acc, mean=WeightedMean().add_group(acc.mean, acc.with_products(updates), weights, ctx))

    def merge(self, acc: Products, group: Group, report: Message, ctx: RoundContext) -> tuple[Products, list[Message]]:
        mean, messages = WeightedMean().merge(acc.mean, group, report, ctx)
        return replace(acc, mean=mean), messages

    def result(self, acc: Products, ctx: RoundContext) -> Aggregate:
        aggregate = WeightedMean().result(acc.mean, ctx)
        delta, buffers, weight = dict(aggregate.delta), dict(aggregate.buffers), aggregate.weight
        for down, up in acc.pairs.items():
            before_up, before_down = acc.factors[up], acc.factors[down]
            product, rank = delta.pop(down), len(before_down)
            if self.alpha is None:
                after_up, after_down = factorize(product / weight, min(self.rank or rank, rank), rank)
            else:
                buffers[acc.bases[down]] = self.alpha / (rank**0.5 if self.rslora else rank) * product
                after_up, after_down = torch.zeros_like(before_up), _drawn(before_down, ctx, down)
            delta[up] = (after_up - before_up) * weight
            delta[down] = (after_down - before_down) * weight
        return replace(aggregate, delta=delta, buffers=buffers)


def _drawn(like: Tensor, ctx: RoundContext, name: str) -> Tensor:
    """A new random factor A, initialised as in peft: uniform in +-1 / sqrt(in), the same on all ranks."""
    generator = torch.Generator().manual_seed(derive_seed(ctx.seed, ctx.round, "adapter", name))
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    return ((2 * drawn - 1) / like.shape[1] ** 0.5).to(like)


def factorize(product: Tensor, rank: int, size: int | None = None) -> tuple[Tensor, Tensor]:
    """The factors ``[out, size]`` and ``[size, in]`` of the best low-rank approximation; 0 beyond the rank.

    Args:
        product: The matrix ``[out, in]``.
        rank: The rank.
        size: Number of columns of the first factor and of rows of the second. None: ``rank``.
    """
    left, values, right = torch.linalg.svd(product.double(), full_matrices=False)
    rows = left.abs().argmax(dim=0)
    signs = torch.sign(left[rows, torch.arange(left.shape[1], device=left.device)])
    roots = values[:rank].sqrt()
    up = (left * signs)[:, :rank] * roots
    down = roots[:, None] * (signs[:, None] * right)[:rank]
    missing = (size or rank) - len(roots)
    up = torch.nn.functional.pad(up, (0, missing))
    down = torch.nn.functional.pad(down, (0, 0, 0, missing))
    return up.to(product.dtype), down.to(product.dtype)
