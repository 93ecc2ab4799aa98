"""Linear layers of many clients as one batched matrix product, faster than what ``torch.func.vmap`` makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class _StackedLinear(Function):
    """``x W^T + b`` for ``x`` of shape ``[clients, n, in]`` and ``W`` of shape ``[clients, out, in]``.

    Its backward gives the weight's gradient in the weight's own memory layout, which autograd's does not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        transposed = weight.transpose(1, 2)
        return torch.bmm(x, transposed) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (
            torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None,
            torch.bmm(grad.transpose(1, 2), x) if ctx.needs_input_grad[1] else None,
            grad.sum(1) if ctx.has_bias and ctx.needs_input_grad[2] else None,
        )


class _Linear(Function):
    """``torch.nn.functional.linear``, with a rule of its own under ``vmap``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        return

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("differentiated below vmap")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        size, (x_dim, weight_dim, bias_dim) = info.batch_size, in_dims
        x = x.movedim(x_dim, 0) if x_dim is not None else x.expand(size, *x.shape)
        if weight_dim != 0 or (bias is not None and bias_dim != 0) or x.dim() < 2:
            return _by_product(x, weight, weight_dim, bias, bias_dim), 0
        rows = x.reshape(size, -1, x.shape[-1])
        return _StackedLinear.apply(rows, weight, bias).view(*x.shape[:-1], weight.shape[1]), 0


def _by_product(x: Tensor, weight: Tensor, weight_dim: int | None, bias: Tensor | None, bias_dim: int | None) -> Tensor:
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    out = torch.matmul(rows, weight.mT if weight_dim is None else weight.movedim(weight_dim, 0).mT)
    if bias is not None:
        out = out + (bias if bias_dim is None else bias.movedim(bias_dim, 0).unsqueeze(1))
    return out.view(*x.shape[:-1], out.shape[-1])


class StackedLinears(TorchFunctionMode):
    """Inside the block, linear layers under ``vmap`` are computed by one batched product."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and not kwargs and not torch.is_autocast_enabled(args[0].device.type):
            return _Linear.apply(*(args if len(args) == 3 else (*args, None)))
        return func(*args, **(kwargs or {}))
