"""Brings a party that has missed rounds up to date with the federation."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L

from lightning_fl.engines.tensors import FederatedTensors, load
from lightning_fl.engines.within_silo import WithinSilo
from lightning_fl.federation import Opening
from lightning_fl.strategies import internals
from lightning_fl.strategies.loops import RoundEpochLoop


def catch_up(trainer: L.Trainer, opening: Opening, personal: Sequence[str], is_spread: bool = False) -> None:
    """Loads the initial model of a round, and sets Lightning's counters and schedules to the round.

    Args:
        trainer: The Trainer.
        opening: The round.
        personal: ``fnmatch`` globs of tensors that stay with their client.
        is_spread: Whether parameters are sharded over the processes of a silo.
    """
    assert opening.state is not None
    if is_spread:
        WithinSilo.free_gathered(trainer.lightning_module)
    tensors = FederatedTensors(trainer.lightning_module, personal, may_be_spread=is_spread)
    load(tensors.params, opening.state.server["params"])
    load(tensors.buffers, opening.buffers)
    loop = trainer.fit_loop.epoch_loop
    assert isinstance(loop, RoundEpochLoop)
    for missed in range(internals.current_round(trainer), opening.round):
        internals.set_round(trainer, missed)
        loop.step_epoch_schedules()
        internals.set_round(trainer, missed + 1)
    loop.set_global_step(opening.facts["global_step"])
    internals.set_logger_steps(trainer, opening.facts["logger_steps"] + 1)
