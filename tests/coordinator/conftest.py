"""Three silos' kits, and a coordinator that serves them; files with other settings have fixtures of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.network import LiveCoordinator, live_coordinator, make_kits, rules, settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_kits(tmp_path)
    return tmp_path


@pytest.fixture
def live(folder: Path) -> Iterator[LiveCoordinator]:
    with live_coordinator(folder, rules(), settings()) as own:
        yield own
