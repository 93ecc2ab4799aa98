from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and NumPy; the processes that pytest-xdist starts inherit it

import pytest
import torch
from hypothesis import settings

from tests.helpers.distributed import PATIENCE, WorkerPool, launches
from tests.helpers.process_state import ProcessState

MAX_RANKS = 4
MAX_LAUNCHES = 16  # of commands and replaced workers in `make test`, beside a pool's workers: each costs 5 s

torch.set_num_threads(1)
gc.disable()  # until the tests are collected: nothing is garbage before
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
    """``run_ranks(world_size, fn, *args, timeout=PATIENCE, **kwargs)`` gives what ``fn`` returned on each rank.

    A world of one runs in pytest's own process, without the variables of a launcher.
    """

    def run(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = PATIENCE, **kwargs: Any) -> list[Any]:
        if world_size > 1:
            return worker_pool.run(fn, *args, world_size=world_size, timeout=timeout, **kwargs)
        state = ProcessState()
        try:
            return [fn(*args, **kwargs)]
        finally:
            state.restore()

    return run


@pytest.hookimpl(tryfirst=True)  # before pytest takes out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: dict[tuple[pytest.Item | pytest.Collector | None, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("spread") and not item.get_closest_marker("slow"):
            cases.setdefault((item.parent, item.name.split("[")[0]), []).append(item)
    for own in cases.values():
        (num_kept,) = own[0].get_closest_marker("spread").args
        kept = {index * len(own) // num_kept for index in range(num_kept)}
        for index, item in enumerate(own):
            if index not in kept:
                item.add_marker("slow")


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()  # collections during the tests leave out all that was imported and collected


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Count what a process of pytest-xdist has started, which is about to end."""
    launches.extend(getattr(node, "workeroutput", {}).get("launches", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"process launches: {len(launches)}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist; the one that started it judges
        session.config.workeroutput["launches"] = launches
        return
    num_pools = session.config.getoption("numprocesses", None) or 1
    limit = MAX_LAUNCHES + MAX_RANKS * num_pools
    if len(launches) > limit and session.config.getoption("markexpr") == "not slow":
        lines = "\n".join(launches)
        print(f"\n{len(launches)} processes were started, at most {limit} are allowed; use run_ranks:\n{lines}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
