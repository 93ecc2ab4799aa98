"""The wheel, built once for all tests that play users of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.wheel import build


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is installed, beside the libraries of this environment."""
    return build(tmp_path_factory.mktemp("wheel"))
