"""Every use of torchmetrics' private API, in one place. Valid for torchmetrics >= 1.4, < 2.

Each function says why it is needed; ``tests/trainer/test_torchmetrics_internals.py`` fails when what it relies on has
changed. Lightning's logged values are torchmetrics too; Lightning itself uses their private API: see ``results.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torchmetrics import Metric


def reductions(metric: Metric) -> Mapping[str, Callable[[Tensor], Any] | None]:
    """The ``dist_reduce_fx`` given to ``add_state``, by state; torchmetrics does not make it public."""
    return metric._reductions  # type: ignore[return-value]


def is_list_state(metric: Metric, name: str) -> bool:
    """Whether a state was declared as a list; the state itself may be a tensor, once its list has been concatenated."""
    return isinstance(metric._defaults[name], list)


def set_states(metric: Metric, states: Mapping[str, Any], num_updates: int) -> None:
    """Replaces states as if ``num_updates`` updates had led to them; torchmetrics has only ``merge_state``, since 1.5.

    Drops the cached result of ``compute``, which it would return again.
    """
    for name, state in states.items():
        setattr(metric, name, state)
    metric._update_count = num_updates
    metric._computed = None
