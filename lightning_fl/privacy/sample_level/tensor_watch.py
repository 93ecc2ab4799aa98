"""Detects writes to tensors that only a private step may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lightning_fl.engines.tensors import is_same
from lightning_fl.privacy.noise import PrivacyError
from lightning_fl.types import Tree


class TensorWatch:
    """Compares tensors with their earlier values, of which it keeps copies.

    Args:
        tensors: Returns the tensors by name.
        remedy: What to do if one has changed.
    """

    def __init__(self, tensors: Callable[[], Mapping[str, Tensor]], remedy: str) -> None:
        self._tensors = tensors
        self._remedy = remedy
        self._copies: Tree = {}

    def note(self) -> None:
        """Records the current values as correct."""
        for name, tensor in self._tensors().items():
            known = self._copies.get(name)
            if known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype:
                known.copy_(tensor.detach())
            else:
                self._copies[name] = tensor.detach().clone()

    def check(self, when: str) -> None:
        """Compares with the values last recorded.

        Raises:
            PrivacyError: If one has changed.
        """
        for name, tensor in self._tensors().items():
            known = self._copies.get(name)
            # NaN counts as equal to itself: a client that diverges is left out elsewhere.
            if known is None or is_same(tensor.detach(), known):
                continue
            raise PrivacyError(
                f"{name} was changed {when}, bypassing the clipping and the noise, so it can reveal an example "
                f"exactly. The run stops. {self._remedy}"
            )
