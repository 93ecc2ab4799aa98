"""Optimizer state as trees of tensors, so that it can be checkpointed, moved and sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fl.types import Tree

# A tree holds only tensors; this suffix marks the entries that were Python numbers. Checkpoints contain it.
_NUMBER = ":number"


def pack_param_state(optimizer: Optimizer, param: Tensor, remedy: str) -> Tree:
    """The optimizer's state of one parameter as a tree; tensors are not copied.

    Args:
        optimizer: Any ``torch.optim`` optimizer.
        param: One of its parameters.
        remedy: What to do about a state that cannot be packed; the last sentence of the error message.

    Raises:
        ValueError: If an entry is neither a tensor, a number nor None.
    """
    return pack_values(type(optimizer), optimizer.state.get(param, {}), remedy)


def pack_values(kind: type[Optimizer], values: Mapping[str, Any], remedy: str) -> Tree:
    """Values of an optimizer of this kind as a tree, as :func:`pack_param_state` does it."""
    packed: Tree = {}
    for entry, value in values.items():
        if isinstance(value, Tensor):
            packed[entry] = value.detach()
        elif isinstance(value, bool | int | float):
            packed[entry + _NUMBER] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        elif value is not None:  # torch's optimizers recreate an entry that is None
            raise ValueError(
                f"Only tensors and numbers can be kept from round to round, but {kind.__name__} holds a "
                f"{type(value).__name__} as {entry!r}. {remedy}"
            )
    return packed


def unpack_param_state(packed: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state that :func:`pack_param_state` packed; tensors are copied, because optimizers update them in place."""
    return {
        entry.removesuffix(_NUMBER): value.item() if entry.endswith(_NUMBER) else value.clone()
        for entry, value in packed.items()
    }
