"""Replaces a module's tensors by others during a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_fl.torch_internals import RECURRENT_COPIES, own_buffers, own_parameters
from lightning_fl.types import Tree


class TensorSlots:
    """The slots of tensors in a module, found once; ``torch.func.functional_call`` searches for them in each call.

    Args:
        module: The module.
        tensors: Some of its parameters and buffers; a tied tensor has several slots.
    """

    def __init__(self, module: nn.Module, tensors: Tree) -> None:
        names = {id(tensor): name for name, tensor in tensors.items()}
        # Written to the dicts themselves: `setattr` refuses a tensor that is no `nn.Parameter` in a parameter's place.
        owners: list[dict[str, Any]] = [get(own) for own in module.modules() for get in (own_parameters, own_buffers)]
        self._recurrent = [own for own in module.modules() if isinstance(own, nn.RNNBase)]
        self._slots = [(owner, key, names[id(t)]) for owner in owners for key, t in owner.items() if id(t) in names]

    @contextmanager
    def hold(self, tensors: Tree) -> Iterator[Tree]:
        """Puts other tensors into the slots inside the block.

        Args:
            tensors: By the names of the tensors that they replace.

        Yields:
            An empty tree. When the block ends, it is filled with the tensors that the module itself has assigned to
            slots in the block, such as a new value of a buffer.
        """
        replaced: Tree = {}
        before = [owner[key] for owner, key, _ in self._slots]
        copies = [(vars(own), name, vars(own)[name]) for own in self._recurrent for name in RECURRENT_COPIES]
        for owner, key, name in self._slots:
            owner[key] = tensors[name]
        try:
            yield replaced
        finally:
            for (owner, key, name), own in zip(self._slots, before, strict=True):
                # A module may assign a new tensor to a buffer instead of writing to it, which would be lost with the
                # slot.
                if owner[key] is not tensors[name]:
                    replaced.setdefault(name, owner[key])
                owner[key] = own
            for attributes, name, own in copies:
                attributes[name] = own
