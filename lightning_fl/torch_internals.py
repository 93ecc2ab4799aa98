"""Every touch of torch's private and experimental parts, in one place. Holds for torch >= 2.6, < 3.

Each name says why it is needed and has no public counterpart up to torch 2.13; ``tests/test_torch_internals.py`` fails
when what it relies on has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx as _make_fx
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode as _TorchDispatchMode

BatchNorm = _BatchNorm
"""Base class of every BatchNorm; a list of the public classes would miss those of other libraries, such as apex."""

make_fx = _make_fx
"""Records the operations of a function; what ``torch.compile`` records is not public at all."""

TorchDispatchMode = _TorchDispatchMode
"""Sees each operation below autograd and ``vmap``, where ``TorchFunctionMode`` sees the user's calls only."""

pytree = _pytree
"""Nested containers as torch.func flattens them: the ``in_dims`` of ``vmap`` must have the same structure."""

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""The attributes with a module's forward hooks: of the attributes of ``nn.Module`` itself, a forward pass depends on
these and on ``training``."""


def version_counter(tensor: Tensor) -> int:
    """Autograd's count of in-place writes to a tensor; only the counter shows a write without comparing the values.

    Writes through ``tensor.data`` are not counted.
    """
    return tensor._version


def has_gradient_hooks(param: Tensor) -> bool:
    """Whether hooks would see the parameter's gradient; torch adds and removes such hooks, but does not list them."""
    return any(getattr(param, name) for name in ("_backward_hooks", "_post_accumulate_grad_hooks"))


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether backward hooks are registered on the module itself; torch does not list them."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def step_hooks(optimizer: Optimizer) -> list[Callable[..., Any]]:
    """The hooks before and after the optimizer's ``step``; torch does not list them."""
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dict that holds the module's children; ``named_children`` leaves out those that are None or come again."""
    return module._modules


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dict that holds the module's own parameters, with those that are None."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The dict that holds the module's own buffers, with those that are None, which ``named_buffers`` leaves out.

    Putting a tensor in it replaces a buffer without the checks of ``nn.Module.__setattr__``.
    """
    return module._buffers


def non_persistent_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers that are not in its ``state_dict``; finding them there would call the user's hooks."""
    return {name: module._buffers[name] for name in module._non_persistent_buffers_set}


def set_timeout(options: Any, timeout: timedelta) -> None:
    """Sets how long collectives wait; ``ProcessGroupNCCL.Options`` takes no timeout as an argument."""
    options._timeout = timeout
