"""Checks on several ranks: one group of live worker processes for the whole test session, and real scripts.

A process that imports Lightning takes 5 s to start, so workers are forked from one that has imported it and serve
many checks; the first n workers are the ranks of a federation of n. The parent hosts the TCP store, as torchrun's
agent does.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.helpers.worker import serve

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 400.0
"""Seconds after which whatever a test waits for counts as hung.

No check takes a tenth of it on an idle machine, so that it is not reached on one whose load is ten times its cores.
pytest's own ``timeout`` in pyproject.toml is longer, so that a hung rank is reported with its stacks.
"""
GRACE_AFTER_FAILURE = 20.0  # seconds that the other ranks may go on once one has failed
MAX_LOG_CHARACTERS = 8000

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(["lightning.pytorch", "lightning_fl.strategies", "tests.helpers.worker"])

launches: list[str] = []
"""Every process that this test session has started."""


class Worker:
    """One live worker process.

    Args:
        log: The file that takes its output and, on a timeout, its stacks.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self._log_start = 0
        self.connection: Connection
        self.connection, child_end = _fork.Pipe()
        log.touch()
        self.process = _fork.Process(target=serve, args=(child_end, log, REPOSITORY))
        self.process.start()
        child_end.close()
        self.is_ready = False
        launches.append(f"worker {log.stem}")

    def wait_until_ready(self) -> None:
        """Wait for the worker's imports to end."""
        if self.is_ready:
            return
        if not self.connection.poll(PATIENCE) or self._receive() != "ready":
            self.stop()
            raise RuntimeError(f"A worker process did not start within {PATIENCE:.0f} s:\n{self.output()}")
        self.is_ready = True

    def send(self, request: dict[str, Any]) -> None:
        """Hand a check to the worker."""
        self._log_start = self.log.stat().st_size
        self.connection.send(request)

    def receive(self) -> tuple[str, Any]:
        """The worker's reply: ``("result", pickled)``, ``("error", traceback)`` or ``("error", how it died)``."""
        reply = self._receive()
        if reply is None:
            self.stop()
            return "error", f"the process died with exit code {self.process.exitcode}"
        return reply

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None

    def dump_stacks(self) -> None:
        """Let the worker write the stacks of all its threads into its output."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGUSR1)

    def output(self) -> str:
        """What the worker has printed since the check began."""
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")[-MAX_LOG_CHARACTERS:]

    def stop(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class WorkerPool:
    """Live worker processes that run functions as the ranks of a group.

    Workers start when they are first needed. A worker that hung or died is replaced at the next check.

    Args:
        size: The largest number of ranks.
        filterwarnings: pytest's filters, so that a warning in a worker is what it is in pytest's own process.
    """

    def __init__(self, size: int, filterwarnings: Sequence[str] = ()) -> None:
        self.size = size
        self._filterwarnings = list(filterwarnings)
        self._workers: dict[int, Worker] = {}
        self._directory = tempfile.TemporaryDirectory(prefix="worker_pool_")
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._num_checks = 0
        atexit.register(self.close)  # before multiprocessing, which waits for its processes to end

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        world_size: int | None = None,
        timeout: float = PATIENCE,
        **kwargs: Any,
    ) -> list[Any]:
        """Call ``fn(*args, **kwargs)`` on every rank, each in its own empty working directory.

        Args:
            fn: A function at the top of a module that workers can import.
            args: Its arguments.
            world_size: The number of ranks. All workers of the pool unless told.
            timeout: Seconds until the ranks still at work are killed.
            kwargs: Its keyword arguments.

        Returns:
            What each rank returned.

        Raises:
            RuntimeError: If a rank raised, died or hung. Shows every such rank's traceback, output and stacks.
        """
        world_size = self.size if world_size is None else world_size
        if not 1 <= world_size <= self.size:
            raise ValueError(f"world_size is {world_size}, expected 1 to {self.size}, the pool's size")
        workers = self._start(world_size)
        self._num_checks += 1
        call = pickle.dumps((fn, args, kwargs))
        for rank, worker in enumerate(workers):
            directory = Path(self._directory.name, f"check{self._num_checks}", f"rank{rank}")
            directory.mkdir(parents=True)
            worker.send(
                {
                    "call": call,
                    "environ": self._environ(rank, world_size),
                    "directory": str(directory),
                    "filterwarnings": self._filterwarnings,
                }
            )
        replies = self._collect(workers, timeout)
        failed = [rank for rank, (kind, _) in enumerate(replies) if kind == "error"]
        if failed:
            reports = [f"--- rank {rank}\n{replies[rank][1]}\n{workers[rank].output()}".rstrip() for rank in failed]
            title = f"{fn.__module__}.{fn.__qualname__} failed on {len(failed)} of {world_size} ranks"
            raise RuntimeError("\n".join([title, *reports]))
        return [pickle.loads(result) for _, result in replies]

    def close(self) -> None:
        """Stop all workers."""
        for worker in self._workers.values():
            worker.stop()
        self._workers.clear()
        self._directory.cleanup()

    def _start(self, world_size: int) -> list[Worker]:
        for rank in range(world_size):
            if rank not in self._workers or not self._workers[rank].process.is_alive():
                self._workers[rank] = Worker(Path(self._directory.name, f"rank{rank}_{len(launches)}.log"))
        workers = [self._workers[rank] for rank in range(world_size)]
        for worker in workers:
            worker.wait_until_ready()
        return workers

    def _environ(self, rank: int, world_size: int) -> dict[str, str]:
        """The variables that torchrun sets; a run id of its own keeps the keys of checks in the store apart."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_RUN_ID": f"check{self._num_checks}",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }

    def _collect(self, workers: list[Worker], timeout: float) -> list[tuple[str, Any]]:
        replies: dict[int, tuple[str, Any]] = {}
        pending = {worker.connection: rank for rank, worker in enumerate(workers)}
        start = time.monotonic()
        deadline = start + timeout
        try:
            while pending and (ready := wait(list(pending), max(0.0, deadline - time.monotonic()))):
                for connection in ready:
                    assert isinstance(connection, Connection)
                    rank = pending.pop(connection)
                    replies[rank] = workers[rank].receive()
                    if replies[rank][0] == "error":
                        deadline = min(deadline, time.monotonic() + GRACE_AFTER_FAILURE)
            for rank in pending.values():
                workers[rank].dump_stacks()
                replies[rank] = ("error", f"still at work after {time.monotonic() - start:.1f} s, killed; its stacks:")
            if pending:
                time.sleep(2.0)  # for the stacks to be written
        finally:
            for rank in pending.values():
                workers[rank].stop()
        return [replies[rank] for rank in range(len(workers))]


def run_script(
    argv: Sequence[str],
    *,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = PATIENCE,
    num_processes: int = 1,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a command in its own process group and return its output.

    Args:
        argv: The command. ``"python"`` stands for this interpreter.
        env: Variables to add.
        cwd: The working directory, this process's own unless told.
        timeout: Seconds until it is killed with the processes that it started.
        num_processes: How many processes it is, for the count of launches (torchrun with 3 ranks: 4).
        check: Whether an exit code other than 0 is an error.

    Raises:
        RuntimeError: If it fails or takes too long. Shows its output.
    """
    command = [sys.executable if word == "python" else word for word in argv]
    launches.extend([" ".join(argv)] * num_processes)
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    problem = ""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
        if check and process.returncode != 0:
            problem = f"ended with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        problem = f"took longer than {timeout:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
    if problem:
        raise RuntimeError(f"{' '.join(argv)} {problem}\n--- stdout\n{stdout}\n--- stderr\n{stderr}")
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
