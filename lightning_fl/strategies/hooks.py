"""Which hooks the user's module and callbacks have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L


def has_hooks(trainer: L.Trainer, *names: str) -> bool:
    """Whether the user's module or callbacks have one of these hooks; Lightning's own act alike on all ranks."""
    holders = [trainer.lightning_module, *trainer.callbacks]  # type: ignore[attr-defined]
    return any(_is_of_user(getattr(holder, name, None)) for holder in holders for name in names)


def run_training_step(trainer: L.Trainer, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """One client's training step, in the way of the callbacks that want to run it themselves."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        own = getattr(callback, "run_training_step", None)
        if own is not None:
            step = partial(own, trainer, trainer.lightning_module, step)
    return step(*args, **kwargs)


def _is_of_user(hook: Any) -> bool:
    function = getattr(hook, "__func__", hook)
    return function is not None and not getattr(function, "__module__", "").startswith(("lightning.", "lightning_fl."))
