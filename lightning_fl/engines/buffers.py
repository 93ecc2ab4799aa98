"""Clients' contributions to the shared buffers, and the buffers that result from them.

A buffer is averaged by its change, except where it starts as infinity or NaN, as a running minimum does: from there no
change leads to a number. There a client sends the value itself, and beside it 1 if it has one; the mean is over those.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fl.tree import cast_like, sum_dtype, to_sum_dtype
from lightning_fl.types import Tree

_KNOWN = "\x1fknown"
_EXACT = 2**52  # integers beyond it have no neighbours in float64


def contributions_like(start: Mapping[str, Tensor], counts_known: bool = True) -> Tree:
    """Tensors with the names, shapes and dtypes of :func:`contributions`.

    Args:
        start: The buffers at the round's start.
        counts_known: Whether clients say which values they have where ``start`` is not finite.
    """
    like = to_sum_dtype(start)
    counted = {name: torch.zeros_like(like[name]) for name in start if counts_known and _has_gaps(like[name])}
    return like | {name + _KNOWN: zeros for name, zeros in counted.items()}


def contributions(stacked: Tree, start: Tree, counts_known: bool = True) -> Tree:
    """What each client contributes; 0 where it has not changed an infinity, as in an attention mask.

    Args:
        stacked: The clients' buffers, each ``[num_clients, ...]``.
        start: The buffers at the round's start.
        counts_known: See :func:`contributions_like`.

    Raises:
        ValueError: If training has changed a buffer's shape.
    """
    found: Tree = {}
    for name, buffers in stacked.items():
        before, dtype = start[name], sum_dtype(start[name].dtype)
        if buffers.shape[1:] != before.shape:
            raise ValueError(
                f"Training has changed the shape of the buffer {name!r} from {tuple(before.shape)} to "
                f"{tuple(buffers.shape[1:])}, but the clients' buffers are averaged. Give it its shape before "
                "training, as by a forward pass on one batch; or let it stay with its client: register it with "
                f"persistent=False, or set FederatedStrategy(personal=[{name!r}])."
            )
        if not _is_float(before):  # subtracted as integers: large ones can't be represented as floats
            found[name] = (buffers.detach().long() - before.long()).to(dtype)
            continue
        now, then = buffers.detach().to(dtype), before.to(dtype)
        is_same = (now == then) | (now.isnan() & then.isnan())
        change = (now - then).masked_fill(is_same, 0)
        if counts_known and _has_gaps(then):
            is_gap = ~then.isfinite()
            change = torch.where(is_gap & ~is_same, now, change)
            found[name + _KNOWN] = (is_gap & ~is_same).to(dtype)
        found[name] = change
    return found


def where_both_finite(old: Tensor, present: Tensor) -> Tensor:
    """``old`` where both are numbers, else ``present``."""
    if not _is_float(old):
        return old
    # In a wide dtype, because float8 can be neither compared nor chosen from.
    wide, now = old.to(sum_dtype(old.dtype)), present.to(sum_dtype(old.dtype))
    return torch.where(wide.isfinite() & now.isfinite(), wide, now).to(old.dtype)


def moved(start: Tree, means: Tree) -> Tree:
    """The buffers after a round; bitwise identical to the start where nothing changed.

    Args:
        start: The buffers at the round's start.
        means: The clients' mean contributions.
    """
    return {name: _moved(before, means[name], means.get(name + _KNOWN)) for name, before in start.items()}


def _moved(start: Tensor, change: Tensor, known: Tensor | None) -> Tensor:
    wide = start.to(change.dtype)
    new = cast_like(wide + change, start)
    if not _is_float(start) and start.dtype != torch.bool:
        large = start.long().abs() >= _EXACT
        new = torch.where(large, (start.long() + change.round().long()).to(start.dtype), new)
    # Float8 can be neither compared nor chosen from, so the choice is made in the wide dtype.
    result = torch.where(change == 0, start, new) if start.element_size() > 1 or not _is_float(start) else new
    if known is None:
        return result
    values = torch.where(known > 0, change / known, wide)
    return cast_like(torch.where(wide.isfinite(), result.to(wide.dtype), values), start)


def _has_gaps(wide: Tensor) -> bool:
    return _is_float(wide) and not bool(wide.isfinite().all())


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
