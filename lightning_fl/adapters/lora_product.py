"""Averages what low-rank adapters do to the model, instead of their factors one by one."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_fl.aggregation import Aggregator, RoundContext, WeightedMean
from lightning_fl.algorithms import Algorithm
from lightning_fl.communication import Group, Message
from lightning_fl.types import Aggregate, Tree, Update

DOWN, UP = "lora_A", "lora_B"
Pairs = Mapping[str, str]
"""The name of each ``lora_A``, and that of its ``lora_B``."""


@dataclass(frozen=True)
class Products:
    """Accumulator of :class:`LoRAProduct`.

    Args:
        mean: That of the weighted mean, with a product in place of each pair.
        pairs: The pairs.
        factors: Their values at the round's start.
    """

    mean: Any
    pairs: Pairs
    factors: Tree


class LoRAProduct(Aggregator):
    r"""The weighted mean of the clients' products :math:`B_i A_i`, as factors of the adapters' rank.

    A layer with a low-rank adapter computes :math:`W x + s B A x`. Means of the factors are not those of the products:
    :math:`\sum_i p_i B_i A_i - \bar B \bar A = \sum_i p_i (B_i - \bar B)(A_i - \bar A)`. Here

    .. math::
        B A = \left[ \sum_i p_i \, B_i A_i \right]_r, \quad B = U_r \sqrt{\Sigma_r}, \quad A = \sqrt{\Sigma_r} V_r^T

    with the best approximation of rank r by the singular value decomposition :math:`U \Sigma V^T`. The signs are such
    that the largest entry of each column of U is positive. All other tensors are averaged.

    A pair has names that differ in ``lora_A`` and ``lora_B`` only, as peft's; A is of shape ``[r, in]``, B of
    ``[out, r]``. Between ranks a product of ``out x in`` numbers travels for each pair, as much as the layer has.

    Raises:
        ValueError: Beside an algorithm whose server does more than average, or that sends side channels; in the first
            round, if the trained tensors hold no pair, or half of one.

    Example:
        >>> from lightning_fl.strategies import FederatedStrategy
        >>> strategy = FederatedStrategy("fedavg", aggregator=LoRAProduct())
    """

    def check(self, algorithm: Algorithm) -> None:
        averages = type(algorithm).server_update is Algorithm.server_update and algorithm.server_lr == 1
        if not averages or type(algorithm).aux_like is not Algorithm.aux_like:
            raise ValueError(
                f"LoRAProduct changes the basis of the adapters in every round, so {algorithm!r} can't keep or combine "
                "tensors of earlier rounds. Use FedAvg or FedProx with server_lr=1."
            )

    def init(self, template: Update, device: torch.device, session: Any = None) -> Products:
        pairs = _pairs(template.delta)
        factors = {name: template.delta[name] for pair in pairs.items() for name in pair}
        start = _with_products(template, pairs, {name: torch.zeros_like(one) for name, one in factors.items()})
        return Products(WeightedMean().init(start, device, session), pairs, factors)

    def add(self, acc: Products, update: Update, ctx: RoundContext) -> Products:
        own = _with_products(update, acc.pairs, acc.factors)
        return replace(acc, mean=WeightedMean().add(acc.mean, own, ctx))

    def add_group(self, acc: Products, updates: Update, weights: Sequence[float], ctx: RoundContext) -> Products:
        own = _with_products(updates, acc.pairs, acc.factors)
        return replace(acc, mean=WeightedMean().add_group(acc.mean, own, weights, ctx))

    def merge(self, acc: Products, group: Group, report: Message, ctx: RoundContext) -> tuple[Products, list[Message]]:
        mean, messages = WeightedMean().merge(acc.mean, group, report, ctx)
        return replace(acc, mean=mean), messages

    def result(self, acc: Products, ctx: RoundContext) -> Aggregate:
        aggregate = WeightedMean().result(acc.mean, ctx)
        delta = dict(aggregate.delta)
        for down, up in acc.pairs.items():
            before_up, before_down = acc.factors[up], acc.factors[down]
            after_up, after_down = factorize(delta.pop(down) / aggregate.weight, len(before_down))
            delta[up] = (after_up - before_up) * aggregate.weight
            delta[down] = (after_down - before_down) * aggregate.weight
        return replace(aggregate, delta=delta)


def factorize(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors ``[out, rank]`` and ``[rank, in]`` whose product is the best approximation of ``[out, in]``.

    A product of a smaller rank leaves columns and rows of zeros.
    """
    left, values, right = torch.linalg.svd(product.double(), full_matrices=False)
    rows = left.abs().argmax(dim=0)
    signs = torch.sign(left[rows, torch.arange(left.shape[1], device=left.device)])
    roots = values[:rank].sqrt()
    up = (left * signs)[:, :rank] * roots
    down = roots[:, None] * (signs[:, None] * right)[:rank]
    missing = rank - len(roots)
    up = torch.nn.functional.pad(up, (0, missing))
    down = torch.nn.functional.pad(down, (0, 0, 0, missing))
    return up.to(product.dtype), down.to(product.dtype)


def _pairs(tensors: Mapping[str, Tensor]) -> Pairs:
    pairs = {name: name.replace(DOWN, UP) for name in tensors if DOWN in name}
    ups = {name for name in tensors if UP in name}
    alone = sorted({*ups.symmetric_difference(pairs.values())})
    if alone or not pairs:
        found = f"of the pair of {alone[0]} all train one half only" if alone else "the trained tensors hold no pair"
        raise ValueError(
            f"LoRAProduct needs tensors lora_A and lora_B in pairs, but {found}. Train both factors, leave them out of "
            "`personal`, or use the default aggregator."
        )
    for down, up in pairs.items():
        if not (tensors[down].ndim == tensors[up].ndim == 2 and len(tensors[down]) == tensors[up].shape[1]):
            raise ValueError(
                f"LoRAProduct expected {down} of shape [r, in] and {up} of [out, r], found "
                f"{list(tensors[down].shape)} and {list(tensors[up].shape)}."
            )
    return pairs


def _with_products(update: Update, pairs: Pairs, factors: Tree) -> Update:
    """The update with ``B_i A_i`` in place of the changes of the two factors; of a client or a group's, stacked."""
    delta = {name: tensor for name, tensor in update.delta.items() if name not in {*pairs, *pairs.values()}}
    for down, up in pairs.items():
        delta[down] = (factors[up] + update.delta[up]) @ (factors[down] + update.delta[down])
    return replace(update, delta=delta)
