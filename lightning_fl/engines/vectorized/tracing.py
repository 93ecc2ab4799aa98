"""A step as a flat list of tensor operations: recorded once, then replayed without the Python that led to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.overrides import TorchFunctionMode

from lightning_fl.torch_internals import TorchDispatchMode, make_fx, pytree

Program = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class TracedStep:
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

    The generators of random numbers are left where they stood. Tensors that are no inputs are read anew by each run.

    Args:
        function: From tensors to tensors.
        tensors: Examples of what it will be given.
        compile: Whether ``torch.compile`` makes a faster program of it.

    Raises:
        RuntimeError: If it reads the values of a tensor into Python, from where they do not come anew.
    """
    reads: list[Any] = []

    def watched(*inputs: Tensor) -> list[Tensor]:
        with _Reads(reads), _HiddenReads(reads):
            return function(*inputs)

    devices = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        program: Any = make_fx(watched)(*(tensor.detach().clone() for tensor in tensors))
    if reads:
        raise RuntimeError(f"it reads the values of a tensor ({reads[0]}), which may be others the next time")
    made: Program = torch.compile(program, dynamic=False) if compile else program.forward
    return made


class _Reads(TorchDispatchMode):
    """Notes operations whose outcome in Python, or whose shape, depends on the values in a tensor."""

    def __init__(self, noted: list[Any]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_masked = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if is_masked or torch.Tag.data_dependent_output in func.tags:
            self.noted.append(func)
        return func(*args, **(kwargs or {}))


class _HiddenReads(TorchFunctionMode):
    """Notes functions that read the values of a tensor where no operation shows it."""

    _READING = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage)
    _COPYING = (torch.tensor, torch.as_tensor, torch.asarray)

    def __init__(self, noted: list[Any]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        holds_tensors = func in self._COPYING and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(args))
        if holds_tensors or func in self._READING:
            self.noted.append(getattr(func, "__name__", func))
        return func(*args, **(kwargs or {}))


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
