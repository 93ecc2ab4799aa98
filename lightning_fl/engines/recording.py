"""A step as a flat list of tensor operations: recorded once, then replayed without the Python that led to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.fx.experimental.proxy_tensor import make_fx

Program = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Recording:
    """A recorded step of stacked clients.

    Args:
        program: From parameters, buffers and batch to losses, gradients, new buffers and the step's other tensors.
        with_grads: Names of the parameters that get a gradient.
        replaced: Names of the buffers that the step replaces.
    """

    program: Program
    with_grads: list[str]
    replaced: list[str]

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Losses, gradients, new buffers and other tensors."""
        with torch.no_grad():
            losses, *rest = self.program(*tensors)
        num_grads, num_replaced = len(self.with_grads), len(self.replaced)
        return losses, rest[:num_grads], rest[num_grads:][:num_replaced], rest[num_grads + num_replaced :]


def record(function: Program, tensors: Sequence[Tensor], compile: bool = False) -> Program:
    """What ``function`` does to tensors like these, without the Python in it.

    The generators of random numbers are left where they stood.

    Args:
        function: From tensors to tensors.
        tensors: Examples of what it will be given.
        compile: Whether ``torch.compile`` makes a faster program of it.
    """
    devices = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        program: Any = make_fx(function)(*(tensor.detach().clone() for tensor in tensors))
    made: Program = torch.compile(program, dynamic=False) if compile else program.forward
    return made


class _Given(Function):
    """A loss whose backward hands over gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return None, None, *(grads if scale == 1 else [grad * scale for grad in grads])


def with_gradients(loss: Tensor, grads: list[Tensor], params: Sequence[Tensor]) -> Tensor:
    """``loss``, whose ``backward`` adds ``grads`` to the gradients of ``params``."""
    given: Tensor = _Given.apply(loss, grads, *params)
    return given
