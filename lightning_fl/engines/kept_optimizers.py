"""A client's optimizer states as a tree, which is kept until its next round."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fl.engines.spread import local, spread_like
from lightning_fl.optimizer_tree import pack_param_state, pack_values, unpack_param_state
from lightning_fl.types import Tree

_REMEDY = "Use client_optimizer='reset' or another optimizer."
_GROUP = "group"
"""Before the number of a parameter group whose options are kept, where otherwise a parameter has its number."""


def keep(optimizers: Sequence[Optimizer], own_options: Sequence[Set[str]]) -> Tree:
    """The states of optimizers as a tree.

    Args:
        optimizers: The optimizers.
        own_options: For each of them, the options that its steps change, which are a part of its state.
    """
    states = {
        f"{index}.{position}.{entry}": local(value).clone()
        for index, optimizer in enumerate(optimizers)
        for position, param in enumerate(_params(optimizer))
        for entry, value in pack_param_state(optimizer, param, _REMEDY).items()
    }
    options = {
        f"{index}.{_GROUP}{position}.{entry}": value.clone()
        for index, (optimizer, own) in enumerate(zip(optimizers, own_options, strict=True))
        for position, group in enumerate(optimizer.param_groups if own else ())
        for entry, value in pack_values(
            type(optimizer), {name: group[name] for name in sorted(own & group.keys())}, _REMEDY
        ).items()
    }
    return {**states, **options}


def load_kept(kept: Tree, optimizers: Sequence[Optimizer]) -> None:
    """Puts the states that :func:`keep` has returned in place of the optimizers' own."""
    packed: dict[tuple[str, str], Tree] = {}
    for name, value in kept.items():
        index, position, entry = name.split(".", 2)
        packed.setdefault((index, position), {})[entry] = value
    for number, optimizer in enumerate(optimizers):
        for place, group in enumerate(optimizer.param_groups):
            group.update(unpack_param_state(packed.get((str(number), f"{_GROUP}{place}"), {})))
        optimizer.state.clear()
        for place, param in enumerate(_params(optimizer)):
            own = packed.get((str(number), str(place)))
            if own is not None:
                optimizer.state[param] = {
                    entry: _spread(value, param) for entry, value in unpack_param_state(own).items()
                }


def params_of_kept(kept: Tree, optimizers: Sequence[Optimizer]) -> Tree:
    """The parameter to which each entry of :func:`keep` belongs."""
    params = [_params(optimizer) for optimizer in optimizers]
    places = {name: name.split(".", 2) for name in kept}
    return {name: params[int(i)][int(p)] for name, (i, p, _) in places.items() if not p.startswith(_GROUP)}


def _params(optimizer: Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _spread(value: Any, param: Tensor) -> Any:
    is_elementwise = isinstance(value, Tensor) and value.shape == local(param).shape
    return spread_like(value, param) if is_elementwise else value
