"""Under differential privacy, prevents changes to the model between rounds other than the server's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_fl.engines.spread import local
from lightning_fl.engines.tensors import FederatedTensors, is_same
from lightning_fl.privacy.noise import PrivacyError
from lightning_fl.types import Tree


class ReleasedModel:
    """Detects and undoes changes that hooks make to the global model after a round is closed.

    Hooks have seen clients' batches, and their changes are neither clipped nor noised. A copy of all trainable tensors
    and buffers is kept from one round to the next.
    """

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._copies: Tree = {}
        self._frozen: dict[str, Tensor] = {}
        self._tensors: FederatedTensors | None = None

    def note(self, module: nn.Module, tensors: FederatedTensors) -> None:
        """Notes the current model as the right one.

        Args:
            module: The module.
            tensors: Its tensors.
        """
        self._module, self._tensors = module, tensors
        # The parameters themselves: `put_back` and `lost` compare their values.
        self._frozen = {name: param for name, param in module.named_parameters() if name in tensors.still.tensors}
        self._copies = {name: local(tensor).detach().clone() for name, tensor in self._present()}

    def forget(self) -> None:
        """Allows changes while clients train, and frees the copies."""
        self._module = self._tensors = None
        self._copies, self._frozen = {}, {}

    def check(self, when: str) -> None:
        """Compares the model with the noted one, and restores what has changed.

        Args:
            when: When it may have changed, for the message.

        Raises:
            PrivacyError: If something has changed.
        """
        # Restored too, for a checkpoint that a callback may save because of the error.
        changed = self.put_back()
        if changed:
            raise PrivacyError(
                f"A hook has changed {changed[0]} {when}, past the clipping and the noise, so it can reveal an example "
                "exactly. The run stops, with the model put back. Under differential privacy only the server changes "
                "the model between rounds: a hook may write to a copy, and to the model once fit has returned."
            )

    def put_back(self) -> list[str]:
        """Restores what has changed, except for replaced tensors; returns the names of all changes."""
        if self._module is None or self._tensors is None:
            return []
        still = self._tensors.still
        params = dict(self._module.named_parameters())
        changed = [name for name, param in self._frozen.items() if params.get(name) is not param]
        changed += [*still.put_back(), *still.lost()]
        for name, tensor in self._present():
            now, known = local(tensor).detach(), self._copies.get(name)
            if known is not None and is_same(now, known):
                continue
            changed.append(name)
            if known is not None and known.shape == now.shape:
                with torch.no_grad():
                    now.copy_(known)
        return changed

    def _present(self) -> Iterator[tuple[str, Tensor]]:
        """The module's current tensors that are sent or saved, except for frozen parameters."""
        assert self._module is not None
        persistent = set(self._module.state_dict())
        named = chain(self._module.named_parameters(), self._module.named_buffers())
        return ((name, tensor) for name, tensor in named if name in persistent and name not in self._frozen)


def averages_models(trainer: Trainer) -> bool:
    """Whether one of Lightning's callbacks loads the mean of the rounds' models into the module."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(own, StochasticWeightAveraging | WeightAveraging) for own in callbacks)
