"""Chooses a federation's coordinator class."""

from __future__ import annotations

from lightning_fl.coordinator.buffered_service import BufferedCoordinator
from lightning_fl.coordinator.secure_service import SecureCoordinator
from lightning_fl.coordinator.service import Coordinator
from lightning_fl.federation import FederationSettings


def kind_of(settings: FederationSettings) -> type[Coordinator]:
    """The coordinator class for a federation with these settings."""
    if settings.aggregator.hides_reports:
        return SecureCoordinator
    return Coordinator if settings.schedule is None else BufferedCoordinator
