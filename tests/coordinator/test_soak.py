"""Real processes, killed with SIGKILL: the model is that of the recorded participation, bit for bit."""

from __future__ import annotations

import pytest

from tests.helpers.distributed import PATIENCE, REPOSITORY, run_script


@pytest.mark.slow
@pytest.mark.parametrize("buffered", [0, 2])
def test_random_kills_of_silos_and_coordinator_change_no_bit(buffered: int) -> None:
    options = {"silos": 4, "rounds": 30, "train": 1, "kill-every": 3, "port": 28543, "buffered": buffered}
    words = [f"--{name}={value}" for name, value in options.items()]
    done = run_script(
        ["python", str(REPOSITORY / "benchmarks" / "soak.py"), *words], timeout=2 * PATIENCE, num_processes=5
    )
    assert "equals the replay bit for bit" in done.stdout
