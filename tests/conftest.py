from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.helpers.distributed import WorkerPool, launches
from tests.helpers.process_state import ProcessState

MAX_LAUNCHES = 20  # `make test` starts no more processes than this: each costs 5 s
MAX_RANKS = 4

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def clean_process(tmp_path: Path) -> Iterator[None]:
    """Each test runs in an empty directory and leaves its process as it found it."""
    state = ProcessState()
    os.chdir(tmp_path)
    yield
    leaked = state.restore()
    if leaked:
        pytest.fail(f"The test left environment variables changed: {leaked}. Set them with monkeypatch.setenv.")


@pytest.fixture(scope="session")
def worker_pool(pytestconfig: pytest.Config) -> Iterator[WorkerPool]:
    """The live worker processes that all tests share."""
    pool = WorkerPool(MAX_RANKS, pytestconfig.getini("filterwarnings"))
    yield pool
    pool.close()


@pytest.fixture
def run_ranks(worker_pool: WorkerPool) -> Callable[..., list[Any]]:
    """``run_ranks(world_size, fn, *args, timeout=60, **kwargs)`` gives what ``fn`` returned on each rank.

    A world of one runs in pytest's own process, without the variables of a launcher.
    """

    def run(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, **kwargs: Any) -> list[Any]:
        if world_size > 1:
            return worker_pool.run(fn, *args, world_size=world_size, timeout=timeout, **kwargs)
        state = ProcessState()
        try:
            return [fn(*args, **kwargs)]
        finally:
            state.restore()

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"process launches: {len(launches)}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if len(launches) > MAX_LAUNCHES and session.config.getoption("markexpr") == "not slow":
        lines = "\n".join(launches)
        print(f"\n{len(launches)} processes were started, at most {MAX_LAUNCHES} are allowed; use run_ranks:\n{lines}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
