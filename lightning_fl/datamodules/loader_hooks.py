"""Loaders by client or pooled, and loaders that a datamodule does not have."""

from __future__ import annotations

from types import MethodType

import lightning as L


class OptionalLoaders(L.LightningDataModule):
    """A datamodule that may turn out to have no data for validation, test or prediction."""

    def _hide_loaders(self, *hooks: str) -> None:
        """Makes Lightning treat these loader hooks as not implemented.

        Lightning asks only whether a hook is overridden: if it is not, ``fit`` skips validation and ``Trainer.test``
        says what is missing. A hook that returned an empty list instead would run over nothing without a word.
        """
        for hook in hooks:
            setattr(self, hook, MethodType(getattr(L.LightningDataModule, hook), self))


def wants_client_loaders(trainer: L.Trainer | None) -> bool:
    """Whether a datamodule should return loaders by client: under a federated strategy, and outside a Trainer."""
    return trainer is None or getattr(trainer.strategy, "is_federated", False)
