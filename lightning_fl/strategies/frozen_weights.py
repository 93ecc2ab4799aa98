"""Checkpoints without frozen parameters, which may be nearly all of a large model and never change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_fl.federation.rank_verification import digest, frozen_parameters
from lightning_fl.federation.server import some

KEY = "lightning_fl_frozen"


class FrozenWeights:
    """Replaces frozen parameters in a module's checkpoints by their digests."""

    def __init__(self) -> None:
        # Computed once: hashing a large model at every checkpoint would take longer than writing the rest.
        self._digests: dict[str, str] = {}

    def leave_out(self, checkpoint: dict[str, Any], module: nn.Module, moving: Collection[str]) -> None:
        """Removes the frozen parameters from a checkpoint's ``state_dict``.

        Args:
            checkpoint: The checkpoint, which is changed.
            module: The module.
            moving: Names of the frozen parameters that training writes to; they are kept.
        """
        own = frozen_parameters(module)
        names = [name for name in checkpoint["state_dict"] if name in own and name not in moving]
        for name in names:
            if name not in self._digests:
                self._digests[name] = digest(checkpoint["state_dict"][name]).hex()
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name not in names
        }
        checkpoint[KEY] = {name: self._digests[name] for name in names}


def put_in(checkpoint: Mapping[str, Any], whole: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """The checkpoint, with the module's own frozen parameters in place of the omitted ones.

    Args:
        checkpoint: The checkpoint.
        whole: Returns the module's ``state_dict``.

    Raises:
        MisconfigurationException: If the module's frozen parameters differ from those used in training.
    """
    names = checkpoint.get(KEY) or {}
    own = whole() if names else {}
    different = [name for name, expected in names.items() if name not in own or digest(own[name]).hex() != expected]
    if different:
        raise MisconfigurationException(
            f"The checkpoint was written without frozen parameters (checkpoint_frozen=False), and the module's own "
            f"differ from those that it was trained with: {some(different)}. Load the same base model first."
        )
    return {**checkpoint, "state_dict": {**checkpoint["state_dict"], **{name: own[name] for name in names}}}
