"""A live worker process of a WorkerPool: runs one check after the other until its parent is gone."""

from __future__ import annotations

import faulthandler
import gc
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


def main() -> None:
    """Serve checks over the connection whose file descriptor is the first argument."""
    connection: Connection = Connection(int(sys.argv[1]))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()

    import lightning.pytorch  # noqa: F401  (the slow part of starting a worker: done once)
    import torch

    torch.set_num_threads(1)
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        reply = run_check(request)
        gc.collect()  # closes what a failed check holds, so that ranks that wait for this one fail at once
        connection.send(reply)


if __name__ == "__main__":
    main()
