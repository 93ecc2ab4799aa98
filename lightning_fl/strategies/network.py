"""A launch that is one silo of a federation over a network: checks of the settings, and the connection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_fl.clients import Uniform
from lightning_fl.communication import Group
from lightning_fl.privacy import SecureAggregation
from lightning_fl.schedules import Buffered, FedAsync
from lightning_fl.strategies.validation import settings_of_strategy

if TYPE_CHECKING:
    from lightning_fl.coordinator.shared_silo import SharedSilo
    from lightning_fl.coordinator.silo import NetworkFederation


def check_network(strategy: Any, address: str | None, kit: str | Path | None) -> None:
    """Checks that the strategy's settings are effective in a federation over a network.

    Raises:
        ValueError: If a setting would be ignored, or is not supported.
    """
    if address is None:
        if kit is not None:
            raise ValueError(f"kit={str(kit)!r} would be ignored without federation='https://...'. Leave it out.")
        return
    if kit is None:
        raise ValueError(f"federation={address!r} needs this silo's key and certificate: give kit='folder/'.")
    ignored = {
        "num_clients": strategy.num_clients is not None,
        "clients_per_round": strategy.clients_per_round is not None,
        "partition": strategy.partition is not None,
        "split_validation": strategy.split_validation,
        "silo_name (the certificate has the name)": strategy.silo_name is not None,
        "stragglers": strategy.stragglers is not None,
        "durations (silos arrive when they arrive)": strategy.durations is not None,
        "the schedule's concurrency (all silos train)": getattr(strategy.schedule, "concurrency", None) is not None,
        "the aggregator's keys (they are in the kit)": getattr(strategy.aggregator, "keys", None) is not None,
        "cohort": not isinstance(strategy.cohort, Uniform),
    }
    parts = strategy.algorithm.sends_parts or strategy.aggregator.moves_frozen
    if parts:
        raise ValueError(
            f"A coordinator takes whole updates and leaves frozen parameters alone, so {strategy.algorithm!r} with "
            f"{strategy.aggregator!r} does not run over it yet. Start the silos with torchrun."
        )
    given = [name for name, is_given in ignored.items() if is_given]
    if given:
        raise ValueError(
            f"With federation={address!r} this launch is one silo, and the coordinator decides who takes part, so "
            f"{', '.join(given)} would be ignored. Leave it out."
        )
    if strategy.schedule is not None:
        check_asynchronous(strategy)
    aggregator = strategy.aggregator
    if aggregator.needs_server:
        raise ValueError(
            f"{aggregator!r} evaluates updates on the server's own data, but a coordinator holds no model to "
            "try them on. Let one silo hold the data, as FLTrust(root='hospital-a'), or use another rule."
        )
    if not aggregator.hides_reports:
        return
    if secure_of(strategy) is None or aggregator.protocol != "bonawitz" or aggregator.dropout:
        raise ValueError(
            f"{aggregator!r} does not run over a coordinator, where silos may vanish at any moment: use "
            "SecureAggregation(protocol='bonawitz') without dropout."
        )


def check_asynchronous(strategy: Any) -> None:
    """Checks that a coordinator supports the strategy's asynchronous rounds.

    Raises:
        ValueError: If it does not.
    """
    if not isinstance(strategy.schedule, Buffered | FedAsync):
        raise ValueError(
            f"{strategy.schedule!r} plans by a simulated clock. Over a network give fl.schedules.Buffered or FedAsync, "
            "or leave it out and set deadline_s in federation.yaml."
        )
    if strategy.transforms:
        names = ", ".join(type(transform).__name__ for transform in strategy.transforms)
        raise ValueError(
            f"The coordinator weights each update by its staleness, which is impossible after {names} has changed it "
            "at the silo. Leave transforms or schedule out."
        )


def open_network(address: str, kit: str | Path, group: Group, module: nn.Module) -> NetworkFederation | SharedSilo:
    """The federation at an address, not joined yet.

    Args:
        address: The coordinator's address.
        kit: The folder with the silo's key and certificate, which its first process reads.
        group: The processes of this silo.
        module: The module.

    Raises:
        MisconfigurationException: If the address or the kit is invalid, or a library is missing.
    """
    try:
        # Here, because `cryptography` comes with the extra "network".
        from lightning_fl.coordinator.shared_silo import SharedSilo
        from lightning_fl.coordinator.silo import NetworkFederation

        talker = NetworkFederation(address, kit) if group.inner.rank == 0 else None
        return talker if talker is not None and group.inner.size == 1 else SharedSilo(group, module, talker)
    except ModuleNotFoundError as error:
        raise MisconfigurationException(
            f"A federation over a network needs {error.name}: pip install 'lightning-fl[network]'."
        ) from error
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


def settings_of_silo(strategy: Any) -> dict[str, str]:
    """The settings that silos and coordinator must share; personal tensors by the user's globs."""
    own = {"personal": repr(strategy.named_personal), "schedule": repr(strategy.schedule)}
    return {**settings_of_strategy(strategy), **own}


def secure_of(strategy: Any) -> SecureAggregation | None:
    """The settings of secure sums; None if the coordinator sees each update."""
    return strategy.aggregator if isinstance(strategy.aggregator, SecureAggregation) else None


def protections_of(strategy: Any, callbacks: Sequence[Any]) -> list[str]:
    """The protections of a silo that its policy may require."""
    is_private = any(getattr(own, "is_private", False) for own in (*strategy.transforms, *callbacks))
    found = {"differential privacy": is_private, "secure aggregation": strategy.aggregator.hides_reports}
    return [name for name, holds in found.items() if holds]
