"""What a test may change in its process, kept and put back."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

SELF_SET_VARIABLES = {
    "PYTEST_CURRENT_TEST",
    "PL_GLOBAL_SEED",  # seed_everything
    "PL_SEED_WORKERS",
    "CUBLAS_WORKSPACE_CONFIG",  # Trainer(deterministic=True)
    "KMP_DUPLICATE_LIB_OK",  # scikit-learn's import
    "KMP_INIT_AT_FORK",
}
"""Variables that libraries set on their own account: put back, but no leak of the test."""


class ProcessState:
    """A snapshot of what a test may change in its process: made at its start, put back at its end."""

    def __init__(self) -> None:
        self.environ = dict(os.environ)
        self.directory = os.getcwd()
        self.signal_handlers: dict[signal.Signals, Any] = {s: signal.getsignal(s) for s in signal.valid_signals()}
        self.random_states = (torch.get_rng_state(), np.random.get_state(), random.getstate())
        self.default_dtype = torch.get_default_dtype()
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.rank_zero_rank = rank_zero_only.rank

    def restore(self) -> list[str]:
        """Put everything back and return the names of the environment variables that had changed."""
        leaked = {name for name in {*self.environ, *os.environ} if self.environ.get(name) != os.environ.get(name)}
        for name in leaked:
            os.environ.pop(name, None)
            if name in self.environ:
                os.environ[name] = self.environ[name]
        os.chdir(self.directory)
        for number, handler in self.signal_handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        torch.set_rng_state(self.random_states[0])
        np.random.set_state(self.random_states[1])
        random.setstate(self.random_states[2])
        torch.set_default_dtype(self.default_dtype)
        torch.use_deterministic_algorithms(self.deterministic)
        rank_zero_only.rank = self.rank_zero_rank
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return sorted(leaked - SELF_SET_VARIABLES)
