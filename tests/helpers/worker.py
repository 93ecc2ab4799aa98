"""A live worker process of a WorkerPool: runs one check after the other until its parent is gone."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import pydoc
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def apply_warning_filters(filters: Iterable[str]) -> None:
    """Apply pytest's ``filterwarnings`` lines, ``action:message:category:module`` with regular expressions."""
    for line in filters:
        action, message, category, module = (*line.split(":"), "", "", "")[:4]
        kind: Any = pydoc.locate(category if "." in category else f"builtins.{category}") if category else Warning
        warnings.filterwarnings(action, message, kind, module)  # type: ignore[arg-type]


def run_check(request: dict[str, Any]) -> tuple[str, bytes | str]:
    """Run one function in its own directory and environment.

    Args:
        request: The pickled ``(fn, args, kwargs)``, ``environ`` to set, the ``directory`` and the ``filterwarnings``.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from tests.helpers.process_state import ProcessState

    state = ProcessState()
    os.environ.update(request["environ"])
    os.chdir(request["directory"])
    rank_zero_only.rank = int(os.environ["RANK"])  # a process that torchrun starts finds its rank at import
    try:
        with warnings.catch_warnings():
            apply_warning_filters(request["filterwarnings"])
            fn, args, kwargs = pickle.loads(request["call"])
            return "result", pickle.dumps(fn(*args, **kwargs))
    except BaseException:
        return "error", traceback.format_exc()
    finally:
        state.restore()


def exit_with_parent(parent: int) -> None:
    """End this process, whatever it hangs in, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def serve(connection: Connection, log: Path, directory: Path) -> None:
    """Serve checks until the parent closes its end.

    Args:
        connection: Takes requests and gives replies, the first of which is ``"ready"``.
        log: The file that takes this process's output.
        directory: The working directory between checks.
    """
    with log.open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.chdir(directory)
    for name in [name for name in os.environ if name.startswith(("PYTEST_", "PL_"))]:
        del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.set_start_method(None, force=True)  # the platform's own, for the processes that a check starts
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()

    import lightning.pytorch  # noqa: F401  (loaded before this process was forked)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # collections leave out what was imported
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        reply = run_check(request)
        gc.collect()  # closes what a failed check holds, so that ranks that wait for this one fail at once
        connection.send(reply)
