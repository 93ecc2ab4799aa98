"""Sorts a module's tensors into shared, personal and frozen ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lightning_fl.engines.spread import is_spread, local, locals_of
from lightning_fl.torch_internals import version_counter
from lightning_fl.tree import cast_like, num_bytes
from lightning_fl.types import Tree

SMALL = 2**28
"""Bytes of frozen tensors that may be copied, however small the trainable ones are."""
QUICK = 2**16
"""Size in bytes up to which comparing a whole tensor is as fast as comparing its mark."""


class FederatedTensors:
    """A module's tensors by their role in the federation, under their ``state_dict`` names; tied ones appear once.

    Buffers are looked up each time, because a module may replace a buffer by a new tensor.

    Args:
        module: The user's module.
        personal: ``fnmatch`` globs on ``state_dict`` names: tensors that never leave their client. A tied tensor
            matches by each of its names.
        moving: Names of frozen parameters that local training writes to, such as a teacher updated as an exponential
            moving average; they count as shared buffers. None: not known yet, so all that may be such a teacher count.
        may_be_spread: Whether parameters may be sharded over the processes of a silo.
        moves: Names frozen parameters that the server updates, from the names of all and the shared parameters.
        before: The tensors of the last round, whose copies of frozen parameters are reused where they are still valid.

    Raises:
        ValueError: If a glob matches nothing, or nothing trainable is left to share.
    """

    def __init__(
        self,
        module: nn.Module,
        personal: Sequence[str] = (),
        moving: Collection[str] | None = (),
        may_be_spread: bool = False,
        moves: Callable[[Sequence[str], Mapping[str, Tensor]], Sequence[str]] | None = None,
        before: FederatedTensors | None = None,
    ) -> None:
        check_tensors(module, may_be_spread)
        # Buffers that are not persistent, such as caches and the states of metrics, are not part of the model and are
        # never sent.
        persistent = set(module.state_dict())
        params = {name: param for name, param in module.named_parameters() if param.requires_grad}
        buffers = {name: owner(module, name) for name, _ in module.named_buffers() if name in persistent}
        frozen = {name: param for name, param in module.named_parameters() if not param.requires_grad}
        # Frozen ones too, since a callback may freeze a personal tensor for some rounds.
        names = [*params, *buffers, *frozen]
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
                    f"personal={pattern!r} matches none of the module's parameters and persistent buffers; "
                    f"it has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
                )
        self.params: dict[str, nn.Parameter] = {name: param for name, param in params.items() if name not in own}
        self.personal_params = {name: param for name, param in params.items() if name in own}
        self._buffers = {name: place for name, place in buffers.items() if name not in own}
        self._personal_buffers = {name: place for name, place in buffers.items() if name in own}
        self.personal_frozen: Tree = {name: param for name, param in frozen.items() if name in own}
        """Frozen parameters that stay with their client, if it has its own value from earlier rounds."""
        found = _may_follow(params, frozen) if moving is None else frozen.keys() & set(moving)
        found = found.union(() if moves is None else moves(list(frozen), self.params))
        self.moving = {name: param for name, param in frozen.items() if name in found}
        trained_bytes = num_bytes(list(params.values()))
        still = {name: param for name, param in frozen.items() if name not in found}
        known: WatchedTensors | None = None if before is None else before.still
        self.still: WatchedTensors = WatchedTensors(still, max(2 * trained_bytes, SMALL), known)
        if not self.params:
            raise ValueError(
                "No trainable parameter is left to share: each is frozen or personal. Unfreeze some, or narrow "
                f"personal={list(personal)}."
            )

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Tensors averaged besides trainable parameters: shared persistent buffers, and frozen parameters that move."""
        return {**locals_of(self.moving), **{name: getattr(owner, key) for name, (owner, key) in self._buffers.items()}}

    @property
    def all(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer."""
        return {**self.params, **self.frozen, **self.personal, **self.buffers}

    @property
    def frozen(self) -> Tree:
        """Parameters that do not require gradients, without those that move."""
        return dict(self.still.tensors)

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
            remedy = ""
            if names == "personal":
                remedy = " Name some in FederatedStrategy(personal=...)."
                if self.personal_frozen:
                    remedy = f" All personal ones are frozen ({', '.join(self.personal_frozen)}); unfreeze some."
            raise ValueError(
                f"A phase of local training has nothing to train: {names!r} is not a trainable parameter.{remedy}"
            )
        return chosen

    @property
    def personal(self) -> dict[str, Tensor]:
        """Trainable parameters and persistent buffers that stay with their client."""
        return {**self.personal_params, **self.personal_buffers}

    @property
    def personal_buffers(self) -> dict[str, Tensor]:
        """Persistent buffers that stay with their client."""
        return {name: getattr(owner, key) for name, (owner, key) in self._personal_buffers.items()}


def check_tensors(module: nn.Module, may_be_spread: bool = False) -> None:
    """Checks that the module's tensors can be averaged and sent.

    Args:
        module: The module.
        may_be_spread: Whether parameters may be sharded over the processes of a silo.

    Raises:
        ValueError: If a tensor can't; the message names it and the remedy.
    """
    persistent = set(module.state_dict())
    buffers = [(name, own) for name, own in module.named_buffers() if name in persistent]
    for name, tensor in [*module.named_parameters(), *buffers]:
        reason = None if may_be_spread and is_spread(tensor) else _why_not(tensor)
        if reason is not None:
            raise ValueError(f"The tensor {name!r} {reason}")


def _why_not(tensor: Tensor) -> str | None:
    if nn.parameter.is_lazy(tensor):
        return (
            "is lazy and has no shape yet. Run one batch through the module before training, as in __init__ or "
            "configure_model."
        )
    if is_spread(tensor):
        return (
            "is a DTensor, which is sharded over processes, but a federation's rank trains a whole model. Set "
            "silo=fl.silos.FSDP2() if those are the processes of a silo, or leave out fully_shard and "
            "parallelize_module."
        )
    if tensor.is_nested:
        return (
            "is a nested tensor, whose parts have no common shape to average. Keep it as a padded tensor with lengths, "
            "or register it with persistent=False."
        )
    if tensor.layout is not torch.strided:
        return f"is stored as {tensor.layout}, but only dense tensors are averaged. Keep it dense."
    return None


def load(tensors: Mapping[str, Tensor], values: Tree) -> None:
    """Copies values into the tensors of the same names."""
    for name, tensor in locals_of(tensors).items():
        value = cast_like(values[name], tensor)
        # In place, because optimizers, tied modules and the user's own references hold these tensors.
        if tensor.shape == value.shape:
            tensor.detach().copy_(value)
        else:  # a buffer that stays with its client, such as a queue, may grow
            tensor.data = value.to(tensor.device, copy=True)


def clones(tensors: Mapping[str, Tensor]) -> Tree:
    """Copies of the tensors."""
    return {name: local(tensor).detach().clone() for name, tensor in tensors.items()}


class WatchedTensors:
    """Tensors that training normally leaves unchanged; finds those that it has written to, and restores them.

    The smallest tensors are copied first, as far as ``max_bytes`` allows, since a large frozen model would otherwise
    take its memory twice. Each tensor has a mark: its version counter, which misses writes through ``tensor.data``, its
    address in memory, and a sample of its elements. Tensors without a copy are compared by their mark only.

    Args:
        tensors: The tensors.
        max_bytes: Maximum memory of the copies, in bytes.
        before: An earlier watch, whose copies are reused where they are still valid.
    """

    def __init__(self, tensors: Mapping[str, Tensor], max_bytes: float, before: WatchedTensors | None = None) -> None:
        self.tensors = tensors = locals_of(tensors)
        self._copies: Tree = {}
        known = {} if before is None else before._copies
        for name in sorted(tensors, key=lambda name: num_bytes([tensors[name]])):
            max_bytes -= num_bytes([tensors[name]])
            if max_bytes >= 0:
                now, copy = tensors[name].detach(), known.get(name)
                # Compared as a whole: it may have been given another value between the rounds.
                is_known = copy is not None and copy.device == now.device and is_same(now, copy)
                self._copies[name] = copy if copy is not None and is_known else now.clone()
        self._marks = {
            name: self._mark(name)
            for name, tensor in tensors.items()
            if name not in self._copies or num_bytes([tensor]) > QUICK
        }

    def put_back(self, whole: bool = True, suspects: Collection[str] = ()) -> list[str]:
        """Restores the tensors that have a copy; returns the names of those that had changed.

        Args:
            whole: Whether each is compared with its copy; else only those whose mark has changed, and small ones.
            suspects: Names of tensors that are compared in any case.
        """
        compared = [
            name
            for name in self._copies
            if whole or name in suspects or name not in self._marks or self._has_other_mark(name)
        ]
        changed = [name for name in compared if not is_same(self.tensors[name].detach(), self._copies[name])]
        load({name: self.tensors[name] for name in changed}, self._copies)
        self._marks.update({name: self._mark(name) for name in compared if name in self._marks})
        return changed

    def lost(self) -> list[str]:
        """Names of tensors that have changed and have no copy."""
        return [name for name in self.tensors if name not in self._copies and self._has_other_mark(name)]

    def _has_other_mark(self, name: str) -> bool:
        (*place, sample), (*place_before, sample_before) = self._mark(name), self._marks[name]
        return place != place_before or not torch.equal(sample, sample_before)

    def _mark(self, name: str) -> tuple[int, int, Tensor]:
        tensor = self.tensors[name]
        elements = tensor.detach().reshape(-1)
        # Compared as bytes, a NaN equals itself.
        sample = elements[:: max(1, len(elements) // 1000)].clone().view(torch.uint8)
        return 0 if tensor.is_inference() else version_counter(tensor), tensor.data_ptr(), sample


def is_same(now: Tensor, before: Tensor) -> bool:
    """Whether two tensors are equal, also where both hold NaN."""
    if now.shape != before.shape or now.dtype != before.dtype:
        return False
    return torch.equal(now, before) or bool(((now == before) | ((now != now) & (before != before))).all())


def _may_follow(params: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> set[str]:
    """Names of frozen parameters that may follow trainable ones: a teacher is a copy of a part of its student."""
    kinds = {(param.shape, param.dtype) for param in params.values()}
    return {
        name for name, param in frozen.items() if (param.shape, param.dtype) in kinds and bool(param.isfinite().all())
    }


def owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds a tensor, and the tensor's name in it."""
    path, _, key = name.rpartition(".")
    return module.get_submodule(path), key
