from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.distributed import GRACE_AFTER_FAILURE, PATIENCE, WorkerPool, run_script
from tests.helpers.process_state import ProcessState


def report_rank(offset: int, *, scale: int = 1) -> tuple[int, int, str, list[str]]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return offset + scale * rank, world_size, os.getcwd(), os.listdir()


def all_reduce_over_private_group(failing_rank: int | None = None) -> float:
    run_id = os.environ["TORCHELASTIC_RUN_ID"]
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group = dist.ProcessGroupGloo(dist.PrefixStore(run_id, store), rank, world_size, timedelta(seconds=PATIENCE))
    if rank == failing_rank:
        raise KeyError("raised before the collective")
    tensor = torch.tensor([float(rank + 1)])
    group.allreduce([tensor]).wait()
    return tensor.item()


def fail_on_rank(failing_rank: int) -> None:
    if int(os.environ["RANK"]) == failing_rank:
        raise KeyError("a message from the failing rank")


def warn() -> None:
    warnings.warn("a warning from a worker", UserWarning, stacklevel=1)


def change_process() -> None:
    os.environ["LEFT_BY_A_CHECK"] = "1"
    torch.set_default_dtype(torch.float64)


def report_process() -> tuple[str | None, torch.dtype]:
    return os.environ.get("LEFT_BY_A_CHECK"), torch.get_default_dtype()


def hang() -> None:
    print("printed before the hang", flush=True)
    time.sleep(3600)


def die() -> None:
    os._exit(7)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_per_rank(run_ranks: Callable, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if world_size == 1:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
    results = run_ranks(world_size, report_rank, 10, scale=2)
    assert [value for value, *_ in results] == [10 + 2 * rank for rank in range(world_size)]
    assert {size for _, size, _, _ in results} == {world_size}
    assert len({directory for _, _, directory, _ in results}) == world_size
    assert all(files == [] for *_, files in results)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_reach_each_other_through_the_parents_store(run_ranks: Callable, world_size: int) -> None:
    assert run_ranks(world_size, all_reduce_over_private_group) == [world_size * (world_size + 1) / 2] * world_size


def test_an_exception_shows_the_failing_ranks_traceback(run_ranks: Callable) -> None:
    with pytest.raises(RuntimeError, match="failed on 1 of 2 ranks") as error:
        run_ranks(2, fail_on_rank, 1)
    assert "--- rank 1" in str(error.value)
    assert "--- rank 0" not in str(error.value)
    assert "in fail_on_rank" in str(error.value)
    assert "a message from the failing rank" in str(error.value)


def test_a_rank_that_waits_for_a_failed_one_fails_at_once_and_lives_on(run_ranks: Callable) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)failed on 2 of 2 ranks.*Connection.*raised before the collective"):
        run_ranks(2, all_reduce_over_private_group, failing_rank=1)
    assert time.monotonic() - start < GRACE_AFTER_FAILURE  # else it was killed
    assert run_ranks(2, all_reduce_over_private_group) == [3.0, 3.0]


def test_warnings_are_errors_in_workers(run_ranks: Callable) -> None:
    with pytest.raises(RuntimeError, match="UserWarning: a warning from a worker"):
        run_ranks(2, warn)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_check_leaves_no_trace_in_its_process(run_ranks: Callable, world_size: int) -> None:
    run_ranks(world_size, change_process)
    assert run_ranks(world_size, report_process) == [(None, torch.float32)] * world_size


@pytest.fixture
def small_pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(1)
    yield pool
    pool.close()


@pytest.mark.slow
def test_hung_and_dead_workers_are_reported_and_replaced(small_pool: WorkerPool) -> None:
    small_pool.run(report_rank, 5)  # has the worker import this file, so that the timeout finds it in hang()
    with pytest.raises(RuntimeError, match="still at work after") as error:
        small_pool.run(hang, timeout=3)
    assert "printed before the hang" in str(error.value)
    assert "in hang" in str(error.value)
    with pytest.raises(RuntimeError, match="died with exit code 7"):
        small_pool.run(die)
    assert small_pool.run(report_rank, 5)[0][0] == 5


def test_world_sizes_beyond_the_pool_are_refused(worker_pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="world_size is 99, expected 1 to 4"):
        worker_pool.run(die, world_size=99)


def test_leaked_variables_are_named_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "before")
    state = ProcessState()
    os.environ["LEAKED"] = "1"
    os.environ["KEPT"] = "after"
    os.environ["PL_GLOBAL_SEED"] = "1"
    assert state.restore() == ["KEPT", "LEAKED"]
    assert "LEAKED" not in os.environ
    assert "PL_GLOBAL_SEED" not in os.environ
    assert os.environ["KEPT"] == "before"


def test_scripts_give_their_output_and_are_killed_in_time(tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text('echo "out $1"; echo err >&2; [ "$1" = slow ] && sleep 60; [ "$1" = good ]\n')
    result = run_script(["sh", str(script), "good"], num_processes=0)
    assert (result.stdout, result.stderr) == ("out good\n", "err\n")
    with pytest.raises(RuntimeError, match=r"(?s)exit code 1.*out bad.*err"):
        run_script(["sh", str(script), "bad"], num_processes=0)
    with pytest.raises(RuntimeError, match=r"(?s)longer than 1 s.*out slow.*err"):
        run_script(["sh", str(script), "slow"], timeout=1, num_processes=0)
    assert run_script(["python", "-c", "import sys; sys.exit(3)"], check=False, num_processes=0).returncode == 3
