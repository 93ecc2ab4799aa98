"""Every touch of torchmetrics' private parts, in one place. Holds for torchmetrics >= 1.4, < 2.

Each function says why it is needed; ``tests/trainer/test_torchmetrics_internals.py`` fails when what it relies on has
changed. What Lightning logs is a torchmetric too, whose private parts Lightning uses itself: see ``results.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torchmetrics import Metric


def reductions(metric: Metric) -> Mapping[str, Callable[[Tensor], Any] | None]:
    """By state the ``dist_reduce_fx`` given to ``add_state``, which torchmetrics does not make public."""
    return metric._reductions  # type: ignore[return-value]


def is_list_state(metric: Metric, name: str) -> bool:
    """Whether a state was declared as a list; the state itself may be a tensor, once its list has been concatenated."""
    return isinstance(metric._defaults[name], list)


def set_states(metric: Metric, states: Mapping[str, Any], num_updates: int) -> None:
    """Replaces states as if ``num_updates`` updates had led to them; torchmetrics has only ``merge_state``, since 1.5.

    Drops what ``compute`` returned before, which it would return again.
    """
    for name, state in states.items():
        setattr(metric, name, state)
    metric._update_count = num_updates
    metric._computed = None
