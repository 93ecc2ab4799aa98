"""Sorts a module's tensors into shared, personal and frozen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lightning_fl.torch_internals import version_counter
from lightning_fl.tree import cast_like
from lightning_fl.types import Tree


class FederatedTensors:
    """A module's tensors by their role in the federation, under their ``state_dict`` names; tied ones appear once.

    Buffers are looked up each time, because a module may replace a buffer by a new tensor.

    Args:
        module: The user's module.
        personal: ``fnmatch`` globs on ``state_dict`` names: tensors that never leave their client. A tied tensor
            matches by each of its names.

    Raises:
        ValueError: If a glob matches nothing, or nothing trainable is left to share.
    """

    def __init__(self, module: nn.Module, personal: Sequence[str] = ()) -> None:
        # Buffers that are not persistent, such as caches and the states of metrics, belong to no model and never
        # travel.
        persistent = set(module.state_dict())
        params = {name: param for name, param in module.named_parameters() if param.requires_grad}
        buffers = {name: owner(module, name) for name, _ in module.named_buffers() if name in persistent}
        names = [*params, *buffers]
        # With the duplicates, because a tied tensor must be found by each of its names.
        aliases = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        tensors = dict(aliases)
        own: set[str] = set()
        for pattern in personal:
            matched = {id(tensor) for alias, tensor in aliases if fnmatchcase(alias, pattern)}
            found = {name for name in names if id(tensors[name]) in matched}
            own |= found
            if not found:
                raise ValueError(
                    f"personal={pattern!r} matches none of the module's trainable parameters and persistent buffers; "
                    f"it has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
                )
        self.params: dict[str, nn.Parameter] = {name: param for name, param in params.items() if name not in own}
        self.personal_params = {name: param for name, param in params.items() if name in own}
        self._buffers = {name: place for name, place in buffers.items() if name not in own}
        self._personal_buffers = {name: place for name, place in buffers.items() if name in own}
        frozen = {name: param for name, param in module.named_parameters() if not param.requires_grad}
        # Version and sample of the start, since a copy of all frozen parameters would take another model's memory.
        self._frozen = [(name, param, version_counter(param), _sample(param)) for name, param in frozen.items()]
        if not self.params:
            raise ValueError(
                "No trainable parameter is left to share: each is frozen or personal. Unfreeze some, or narrow "
                f"personal={list(personal)}."
            )

    def check_frozen(self) -> None:
        """Makes sure that no frozen parameter has been written to since the round began.

        Raises:
            ValueError: If one has.
        """
        for name, param, version, sample in self._frozen:
            # The counter misses writes through `param.data`, the sample misses elements between those it takes.
            if version_counter(param) != version or not torch.equal(_sample(param), sample):
                raise ValueError(
                    f"The frozen parameter {name!r} was changed during local training, so one client's value would "
                    "reach the next. Register it as a buffer, which is averaged, or name it in `personal` and let it "
                    "require gradients."
                )

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Shared persistent buffers: they are averaged."""
        return {name: getattr(owner, key) for name, (owner, key) in self._buffers.items()}

    @property
    def all(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer."""
        return {**self.params, **self.frozen, **self.personal, **self.buffers}

    @property
    def frozen(self) -> Tree:
        """Parameters that do not require gradients."""
        return {name: param for name, param, *_ in self._frozen}

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Every trainable parameter, shared or personal."""
        return {**self.params, **self.personal_params}

    def select(self, names: str | Sequence[str]) -> set[str]:
        """The trainable parameters selected by ``"all"``, ``"shared"``, ``"personal"`` or ``fnmatch`` globs.

        Raises:
            ValueError: If there are none.
        """
        groups = {"all": self.trainable, "shared": self.params, "personal": self.personal_params}
        if isinstance(names, str):
            chosen = set(groups[names]) if names in groups else {n for n in self.trainable if fnmatchcase(n, names)}
        else:
            chosen = {name for name in self.trainable if any(fnmatchcase(name, glob) for glob in names)}
        if not chosen:
            remedy = " Name some in FederatedStrategy(personal=...)." if names == "personal" else ""
            raise ValueError(
                f"A phase of local training has nothing to train: {names!r} is no trainable parameter.{remedy}"
            )
        return chosen

    @property
    def personal(self) -> dict[str, Tensor]:
        """Trainable parameters and persistent buffers that stay with their client."""
        buffers = {name: getattr(owner, key) for name, (owner, key) in self._personal_buffers.items()}
        return {**self.personal_params, **buffers}


def load(tensors: Mapping[str, Tensor], values: Tree) -> None:
    """Copies values into the tensors of the same names."""
    for name, tensor in tensors.items():
        # In place, because optimizers, tied modules and the user's own references hold these tensors.
        tensor.detach().copy_(cast_like(values[name], tensor))


def clones(tensors: Mapping[str, Tensor]) -> Tree:
    """Copies of the tensors."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def moved(start: Tensor, change: Tensor) -> Tensor:
    """``start + change``; bit for bit ``start`` where nothing changed, also integers that no float can hold."""
    return torch.where(change == 0, start, cast_like(start.to(change.dtype) + change, start))


def _sample(tensor: Tensor) -> Tensor:
    """The bytes of about 1,000 elements at most, since writing to ``tensor.data`` does not change the version."""
    # Compared as bytes, a NaN equals itself.
    elements = tensor.detach().reshape(-1)
    return elements[:: max(1, len(elements) // 1000)].clone().view(torch.uint8)


def owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds a tensor, and the tensor's name in it."""
    path, _, key = name.rpartition(".")
    return module.get_submodule(path), key
