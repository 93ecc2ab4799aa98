"""Decides which loaders a datamodule returns: by client or pooled, and none without data."""

from __future__ import annotations

from functools import partial

import lightning as L


class OptionalLoaders(L.LightningDataModule):
    """A datamodule of clients, which may turn out to have no data for validation, test or prediction."""

    gives_clients = True
    """Its clients are simulated, so every rank has the same validation data, however the ranks were launched."""

    def _hide_loaders(self, *hooks: str) -> None:
        """Makes Lightning treat these loader hooks as not implemented.

        Lightning only checks whether a hook is overridden: if it is not, ``fit`` skips validation and ``Trainer.test``
        reports what is missing. If a hook returned an empty list instead, they would silently run on no data.
        """
        for hook in hooks:
            # a partial, because a bound method would be unpickled as the subclass's method
            setattr(self, hook, partial(getattr(L.LightningDataModule, hook), self))


def wants_client_loaders(trainer: L.Trainer | None) -> bool:
    """Whether a datamodule should return loaders by client: under a federated strategy, and outside a Trainer."""
    return trainer is None or getattr(trainer.strategy, "is_federated", False)
