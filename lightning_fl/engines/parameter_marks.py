"""Attributes of parameters that training can change besides their values: ``requires_grad``, ``grad``, and hooks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_fl.torch_internals import gradient_hooks, keep_gradient_hooks


class ParameterMarks:
    """Notes the parameters' attributes besides their values, to restore them before the next client.

    Args:
        params: The parameters by their names.
        looks_at_hooks: Whether hooks on their gradients are noted too.
    """

    def __init__(self, params: Iterable[tuple[str, nn.Parameter]], looks_at_hooks: bool = True) -> None:
        self._marks = [
            (name, param, param.requires_grad, gradient_hooks(param) if looks_at_hooks else None)
            for name, param in params
        ]

    def put_back(self) -> set[str]:
        """Restores the parameters without a gradient; returns the names of those that had changed."""
        changed = set()
        for name, param, requires_grad, hooks in self._marks:
            # Also for parameters that no optimizer steps: clipping by norm and the module's code may read them.
            param.grad = None
            if param.requires_grad != requires_grad:
                param.requires_grad_(requires_grad)
                changed.add(f"{name}.requires_grad")
            if hooks is not None and gradient_hooks(param) != hooks:
                keep_gradient_hooks(param, hooks)
                changed.add(f"{name} (its hooks)")
        return changed
