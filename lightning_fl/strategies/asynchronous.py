"""Asynchronous rounds in which each rank of the launch is a silo: checks of the settings, and the connection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_fl.federation import FederationSettings
from lightning_fl.strategies.network import check_asynchronous, settings_of_silo
from lightning_fl.strategies.validation import check_choice, misconfiguration

if TYPE_CHECKING:
    from lightning_fl.coordinator.launch import LaunchFederation


def check_transport(strategy: Any, transport: str | None, address: str | None) -> None:
    """Checks that the strategy's settings are effective in asynchronous rounds.

    Raises:
        ValueError: If a setting would be ignored, or is not supported.
    """
    check_choice("transport", transport, (None, "gloo", "rpc"))
    if transport is None:
        return
    if strategy.schedule is None:
        raise ValueError(
            f"transport={transport!r} is for asynchronous rounds: give schedule=fl.schedules.Buffered(...) "
            "or FedAsync(...) too. Without it ranks meet in collectives, and transport would be ignored."
        )
    check_asynchronous(strategy)
    ignored = {
        "federation": address is not None,
        "num_clients": strategy.num_clients is not None,
        "partition": strategy.partition is not None,
        "split_validation": strategy.split_validation,
        "durations (ranks arrive when they arrive)": strategy.durations is not None,
        "the schedule's concurrency (all ranks train)": strategy.schedule.concurrency is not None,
    }
    given = [name for name, is_given in ignored.items() if is_given]
    if given:
        raise ValueError(
            f"With transport={transport!r} each rank is a silo with data of its own, so {', '.join(given)} would be "
            "ignored. Leave it out."
        )
    if strategy.algorithm.sends_parts or strategy.aggregator.moves_frozen or strategy.aggregator.needs_server:
        raise ValueError(
            f"{strategy.algorithm!r} with {strategy.aggregator!r} needs all ranks in every round. Leave transport and "
            "schedule out."
        )


def open_launch(
    strategy: Any,
    trainer: L.Trainer,
    rank: int,
    size: int,
    address: str,
    port: int,
    name: str,
    seed: int,
) -> LaunchFederation:
    """Joins the ranks of a launch; the first one keeps the model.

    Args:
        strategy: The strategy.
        trainer: The Trainer, in ``fit``.
        rank: Index of this process.
        size: Number of processes.
        address: Host of the ranks' store.
        port: Port of the ranks' store.
        name: The name of this rank's silo, empty if silos have none.
        seed: Seed of the federation.

    Raises:
        MisconfigurationException: If there is only one rank, ``max_epochs`` is not set, or a library is missing.
    """
    if size == 1:
        raise MisconfigurationException(
            f"transport={strategy.transport!r} joins several ranks, but there is one. Start them with torchrun, srun "
            "or mpirun; to simulate on a clock give durations instead."
        )
    rounds = trainer.max_epochs or 0
    if rounds < 1:
        raise MisconfigurationException(f"max_epochs={trainer.max_epochs}: rounds that wait for nobody need a number.")
    try:
        # Here, because `cryptography`, which the package `coordinator` imports, comes with the extra "network".
        from lightning_fl.communication.line import Meeting
        from lightning_fl.coordinator.buffered_service import BufferedCoordinator
        from lightning_fl.coordinator.launch import LaunchFederation
    except ModuleNotFoundError as error:
        raise MisconfigurationException(
            f"Rounds that wait for no rank need {error.name}: pip install 'lightning-fl[network]'."
        ) from error

    def make(rules: Any, store: Any, audit: Any, now: float) -> BufferedCoordinator:
        settings = FederationSettings(
            strategy.algorithm,
            strategy.aggregator,
            strategy.transforms,
            strategy.weighting,
            seed=seed,
            population=size,
            schedule=strategy.schedule,
        )
        return BufferedCoordinator(settings, settings_of_silo(strategy), rules, store, audit, now)

    with misconfiguration():
        meeting = Meeting(rank, size, address, port, strategy.timeout, name)
        root = Path(trainer.default_root_dir)
        launch = LaunchFederation(meeting, strategy.transport, root, trainer.ckpt_path is not None, rounds, make)
    rank_zero_info(f"The journal of arrivals is in {launch.journal}.")
    return launch
