"""Batching rules: functions that ``torch.func.vmap`` makes slow, computed for all clients by one kernel instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_fl.engines.vectorized.buffer_pool import BufferPool
from lightning_fl.engines.vectorized.recurrent import RULES
from lightning_fl.engines.vectorized.stacking import NotVectorizable
from lightning_fl.torch_internals import outside_vmap, unwrap, wrap

_ASKS = "asks whether a tensor requires a gradient, which none does when several clients train in one step"
_HOOKS = "puts a hook on a tensor's gradient"
_OF_OWN_TENSORS: dict[Any, str] = {
    Tensor.grad.__get__: "reads the gradients of the last step",  # type: ignore[union-attr]
    Tensor.requires_grad.__set__: "changes which tensors get a gradient",  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__: _ASKS,  # type: ignore[attr-defined]
    Tensor.is_leaf.__get__: _ASKS,  # type: ignore[attr-defined]
    Tensor.grad_fn.__get__: _ASKS,  # type: ignore[union-attr]
    Tensor.register_hook: _HOOKS,
    Tensor.register_post_accumulate_grad_hook: _HOOKS,
}
"""What ``vmap`` allows although it would see a tensor that stands for those of all clients."""


class BatchingRules(TorchFunctionMode):
    """Inside the block, linear and recurrent layers and cross-entropy have their own batching rules.

    A rule applies where ``vmap`` is the only transform and all tensors are batched; elsewhere nothing changes.

    Raises:
        NotVectorizable: Inside the block, for operations that ``vmap`` would silently compute differently than for a
            single client.

    Args:
        pool: Provides the memory of the weights' gradients. None: PyTorch's allocator.
    """

    error: Exception | None = None
    """The last error that a function has raised inside the block; the user's code may have caught it."""

    def __init__(self, pool: BufferPool | None = None) -> None:
        super().__init__()
        self._rules: dict[Any, Callable[..., Any]] = {
            **RULES,
            functional.linear: partial(_linear, pool=pool),
            functional.cross_entropy: _cross_entropy,
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = self._rules.get(func)
        if rule is None and func in _OF_OWN_TENSORS:
            self.error = NotVectorizable(f"training_step {_OF_OWN_TENSORS[func]}")
            raise self.error
        try:
            out = None if rule is None else rule(*args, **kwargs)
            return func(*args, **kwargs) if out is None else out
        except Exception as error:
            self.error = error
            raise


class StackedLinear(Function):
    """``x W^T + b`` for ``x`` of shape ``[clients, n, in]`` and ``W`` of shape ``[clients, out, in]``.

    Its backward gives the weight's gradient in the weight's own memory layout, which autograd's does not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pool: BufferPool | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pool = pool
        transposed = weight.transpose(1, 2)
        return torch.bmm(x, transposed) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_grad = None
        if ctx.needs_input_grad[1]:
            # With create_graph the backward pass is itself recorded, which writing to `out` does not allow.
            out = ctx.pool.empty(weight.shape, weight) if ctx.pool and not torch.is_grad_enabled() else None
            weight_grad = torch.bmm(grad.transpose(1, 2), x, out=out)
        return (
            torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None,
            weight_grad,
            grad.sum(1) if ctx.needs_input_grad[2] else None,
            None,
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, pool: BufferPool | None) -> Tensor | None:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    # `baddbmm` needs rows: an input without a batch dimension is left to vmap.
    stacked = None if x.dim() < 2 or _is_autocast(x) else unwrap(*tensors)
    if stacked is None:
        return None
    own_x, own_weight = stacked[:2]
    own_bias = None if bias is None else stacked[2]
    with outside_vmap():
        rows = own_x if own_x.dim() == 3 else own_x.reshape(len(own_x), -1, own_x.shape[-1])
        out = StackedLinear.apply(rows, own_weight, own_bias, pool)
        return wrap(out if own_x.dim() == 3 else out.view(*own_x.shape[:-1], -1))


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Computes the losses of all clients' examples as one batch, and the mean of each client's."""
    is_plain = weight is None and size_average is None and reduce is None and reduction == "mean"
    if not is_plain or target.is_floating_point() or input.dim() < 2 or _is_autocast(input):
        return None
    stacked = unwrap(input, target)
    if stacked is None:
        return None
    scores, labels = stacked
    with outside_vmap():
        # Unreduced, because a mean over the flattened batch would mix the clients.
        losses = functional.cross_entropy(
            scores.flatten(0, 1),
            labels.flatten(0, 1),
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        # 0 / 0 gives NaN where every label is ignored, as torch's mean does.
        num_counted = (labels.flatten(1) != ignore_index).sum(1)
        return wrap(losses.view(len(labels), -1).sum(1) / num_counted)


def _is_autocast(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)
