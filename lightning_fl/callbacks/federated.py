"""The base class of callbacks with hooks for rounds and clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import lightning as L

from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.strategies.round_view import RoundView
from lightning_fl.types import Aggregate, ClientId, LocalRun, Update


class FederatedCallback(L.Callback):
    """A Lightning callback with hooks for rounds and clients; override what you need.

    The client hooks run on the rank that trains the client, the round hooks on every rank. Do not change their
    arguments in place. Each hook gets a :class:`~lightning_fl.strategies.round_view.RoundView` as ``view``; a hook
    without a parameter of that name is called without it.

    Example:
        >>> class Cohorts(FederatedCallback):
        ...     def on_round_start(self, trainer, module, round, cohort, view):
        ...         print(f"round {round}: {len(view.clients)} of {len(cohort)} clients on rank {view.group.rank}")
    """

    keeps_client_state: ClassVar[bool] = False
    """Whether the callback writes to the clients' states, so that each client must train on its home rank."""
    serves_batches_by_group: ClassVar[bool] = False
    """Whether the callback's batch hooks may be skipped in a loop that runs without batch hooks."""
    protects_examples: ClassVar[bool] = False
    """Whether the callback makes local training differentially private, so that nothing else may reveal the data."""
    is_private: bool = False
    """Whether :attr:`protects_examples` holds for this callback's settings, as a silo's policy may require."""
    evaluates_clients: ClassVar[bool] = False
    """Whether the callback evaluates each client's own model, so that no warning about personal tensors is needed."""

    def wrap_loaders(self, loaders: ClientLoaders) -> ClientLoaders:
        """Called when the clients' loaders are known; returns the loaders to use for the same clients."""
        return loaders

    def run_training_step(
        self, trainer: L.Trainer, module: L.LightningModule, step: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Runs ``step``, the module's ``training_step``, on a batch of one client; returns its output."""
        return step(*args, **kwargs)

    def on_round_start(
        self, trainer: L.Trainer, module: L.LightningModule, round: int, cohort: Sequence[ClientId], view: RoundView
    ) -> None:
        """Called when a round begins with the clients ``cohort``."""

    def on_client_start(self, trainer: L.Trainer, module: L.LightningModule, client: ClientId, view: RoundView) -> None:
        """Called when a client begins its local training; the module holds the model from which it starts."""

    def on_phase_end(self, trainer: L.Trainer, module: L.LightningModule, client: ClientId, view: RoundView) -> None:
        """Called when a client ends a phase of its local training; the module still holds the model of that phase."""

    def on_next_phase(self, trainer: L.Trainer, module: L.LightningModule, client: ClientId, view: RoundView) -> None:
        """Called when a client begins a phase other than its first; the module holds the model of that phase."""

    def on_client_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        client: ClientId,
        run: LocalRun,
        update: Update | None,
        view: RoundView,
    ) -> None:
        """Called when a client has finished; ``update`` is None if it was refused for NaN or Inf."""

    def on_group_end(
        self, trainer: L.Trainer, module: L.LightningModule, clients: Sequence[ClientId], view: RoundView
    ) -> None:
        """Called when a client group has finished: one client, or several that were trained together.

        Unlike the hooks for single clients, overriding this one still allows clients to be trained together.
        """

    def on_aggregate_end(
        self, trainer: L.Trainer, module: L.LightningModule, aggregate: Aggregate, view: RoundView
    ) -> None:
        """Called when the round has been aggregated; the module holds the new global model."""
