"""Trains on the server's own data, like a client, without a trace in the clients' training."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_fl.federation import Round
from lightning_fl.federation.client_batches import ClientBatches
from lightning_fl.strategies import internals
from lightning_fl.strategies.out_of_loop import out_of_loop
from lightning_fl.types import Update

ROOT = "\x1froot"
"""The client id used for its random numbers; no real client has this name."""


def check_root(trainer: L.Trainer) -> None:
    """Checks that the server can train on its own data.

    Raises:
        MisconfigurationException: If it can't.
    """
    if not trainer.lightning_module.automatic_optimization or len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            "The aggregator trains on the server's own data, which needs automatic optimization with one optimizer. "
            "Change the module, or let a client hold the data, as FLTrust(root=client_id)."
        )


def train_root(trainer: L.Trainer, round: Round, batches: ClientBatches) -> Update:
    """Trains on the server's data from the global model; the module's logged values, counters and state are dropped."""
    task = round.start_root(batches)
    with out_of_loop(trainer, training=True) as results, internals.running_training_step(trainer.lightning_module):
        for fetched, position in task.batches:
            batch = internals.transfer(trainer, fetched)
            results.batch, results.batch_size = batch, None
            round.step(task, batch, position)
        # Before the module's buffers are put back.
        return round.finish_root(task)
