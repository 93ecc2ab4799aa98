"""Every touch of torch's private and experimental parts, in one place. Holds for torch >= 2.6, < 3.

Each name says why it is needed and has no public counterpart up to torch 2.13; ``tests/test_torch_internals.py`` fails
when what it relies on has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch._functorch.vmap import lazy_load_decompositions, vmap_increment_nesting
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

BatchNorm = _BatchNorm
"""Base class of every BatchNorm; a list of the public classes would miss those of other libraries, such as apex."""

pytree = _pytree
"""Nested containers as torch.func flattens them: the ``in_dims`` of ``vmap`` must have the same structure."""

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Attributes of ``nn.Module`` that hold forward hooks, which change what a step computes; torch does not list them."""


def version_counter(tensor: Tensor) -> int:
    """Autograd's count of in-place writes to a tensor; only the counter shows a write without comparing the values.

    Writes through ``tensor.data`` are not counted.
    """
    return tensor._version


_GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def has_gradient_hooks(param: Tensor) -> bool:
    """Whether hooks would see the parameter's gradient; torch adds and removes such hooks, but does not list them."""
    return any(getattr(param, name) for name in _GRADIENT_HOOKS)


def gradient_hooks(param: Tensor) -> tuple[int, ...]:
    """What identifies the hooks that would see the parameter's gradient."""
    # Without a loop over the names: it runs for each parameter of each client.
    before, after = param._backward_hooks, param._post_accumulate_grad_hooks
    return (*(before or ()), *(after or ())) if before or after else ()


def keep_gradient_hooks(param: Tensor, hooks: tuple[int, ...]) -> None:
    """Removes the hooks that are not among those that :func:`gradient_hooks` has identified."""
    for name in _GRADIENT_HOOKS:
        registered = getattr(param, name) or {}
        for key in [key for key in registered if key not in hooks]:
            del registered[key]


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether backward hooks are registered on the module itself; torch does not list them."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def has_global_hooks() -> bool:
    """Whether forward or backward hooks of all modules are registered; torch does not list them."""
    return _has_any_global_hook()


def take_counts_as_tensors(optimizer: Optimizer, are_tensors: bool) -> None:
    """Whether ``Adam`` computes with the tensor ``"step"`` in its state, which may hold several numbers.

    Otherwise it asks for the one number in it. In torch 2.6 to 2.13 a group's ``differentiable`` chooses the formula,
    while ``optimizer.defaults`` decide whether autograd records the step.
    """
    for group in optimizer.param_groups:
        group["differentiable"] = are_tensors


def step_hooks(optimizer: Optimizer) -> list[Callable[..., Any]]:
    """The hooks before and after the optimizer's ``step``; torch does not list them."""
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dict that holds the module's own parameters, with those that are None.

    A tensor put in it takes a parameter's place even if it is no ``nn.Parameter``, which ``setattr`` refuses.
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The dict that holds the module's own buffers, with those that are None, which ``named_buffers`` leaves out.

    Putting a tensor in it replaces a buffer without the checks of ``nn.Module.__setattr__``.
    """
    return module._buffers


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dict that holds the module's own submodules; only its identity tells it from the module's other dicts."""
    return module._modules


RECURRENT_COPIES = ("_flat_weights", "_flat_weight_refs")
"""Attributes in which a recurrent layer keeps its weights a second time; its ``forward`` makes them anew when it finds
other tensors in their places."""


def set_timeout(options: Any, timeout: timedelta) -> None:
    """Sets how long collectives wait; ``ProcessGroupNCCL.Options`` takes no timeout as an argument."""
    options._timeout = timeout


def gloo_group(store: dist.Store, rank: int, size: int, timeout: timedelta, address: str | None) -> Any:
    """A Gloo group whose ranks reach this one at ``address``; the public constructor takes no address.

    Args:
        store: Where the ranks exchange their addresses.
        rank: Index of this process.
        size: Number of processes.
        timeout: How long a collective waits.
        address: This process's address. None: what ``GLOO_SOCKET_IFNAME`` or the machine's name says.
    """
    if address is None:
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    set_timeout(options, timeout)
    return dist.ProcessGroupGloo(store, rank, size, options)


def flat_vmap(function: Callable[..., Any], tensors: Sequence[Tensor], randomness: str) -> Any:
    """``torch.func.vmap(function, randomness=randomness)(*tensors)``, without its checks, which a small step feels."""
    lazy_load_decompositions()
    size = len(tensors[0])
    with vmap_increment_nesting(size, randomness) as level:
        out = function(*(functorch._add_batch_dim(tensor, 0, level) for tensor in tensors))
        return pytree.tree_map_only(Tensor, lambda own: functorch._remove_batch_dim(own, level, size, 0), out)


def unwrap(*tensors: Tensor) -> list[Tensor] | None:
    """The stacked tensors, clients first, that one ``vmap`` shows as those of a client.

    A batching rule in Python needs them: an ``autograd.Function`` with a ``vmap`` method takes ten times as long.

    Returns:
        None if ``vmap`` is not the only transform, or if a tensor is not batched.
    """
    if functorch.maybe_current_level() != 1 or not all(map(functorch.is_batchedtensor, tensors)):
        return None
    pairs = [(functorch.get_unwrapped(tensor), functorch.maybe_get_bdim(tensor)) for tensor in tensors]
    return [tensor.movedim(dim, 0) if dim else tensor for tensor, dim in pairs]


def unwrap_or_spread(tensors: Sequence[Tensor], size: int) -> list[Tensor] | None:
    """As :func:`unwrap`, for tensors of which some may be the same for all ``size`` clients; None outside ``vmap``."""
    if functorch.maybe_current_level() is None:
        return None
    spread = (unwrap(own) or [own.expand(size, *own.shape)] for own in tensors)
    return [own for (own,) in spread]


def wrap(stacked: Tensor) -> Tensor:
    """The reverse of :func:`unwrap`: makes a batching rule's result a tensor of one client again."""
    wrapped: Tensor = functorch._add_batch_dim(stacked, 0, 1)
    return wrapped


def outside_vmap() -> AbstractContextManager[None]:
    """Inside the block, operations are those on plain tensors: a batching rule works on what it has unwrapped."""
    return temporarily_pop_interpreter_stack()


def num_references(storage: torch.UntypedStorage) -> int:
    """How many tensors and storage objects refer to the memory; autograd's are not visible to Python's counts."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


def copy_tensors(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies each value into its target: on a GPU by few kernels, where ``copy_`` launches one for each tensor."""
    with torch.no_grad():
        torch._foreach_copy_(list(targets), list(values))


def record_operations(function: Callable[[], list[Tensor]], tensors: Sequence[Tensor]) -> Callable[..., Any]:
    """What a function does with tensors; ``torch.fx`` alone can't see into autograd, ``vmap`` and optimizers.

    Args:
        function: Reads and writes ``tensors`` by itself.
        tensors: Are replaced by what the result is called with; other tensors are read from where they are.

    Raises:
        RuntimeError: If the function turns one of the tensors into a number.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # here, because it imports sympy, which takes long

    # The arguments reach the function as the objects that they are, which the function knows.
    return make_fx(lambda *own: function())(*tensors)


def decompositions(operators: Sequence[Any]) -> dict[Any, Callable[..., Any]]:
    """How torch computes operators from others; the public table of ``torch.export`` has no choice of operators."""
    from torch._decomp import get_decompositions  # here, because it imports sympy, which takes long

    return dict(get_decompositions(operators))


class _AnyBatch(TorchFunctionMode):
    """Keeps two functions from fixing the batch's size.

    ``len(tensor)`` is the example's, because Python wants a plain number: ``self.log(..., batch_size=len(y))`` is
    common. A loss that rests on it computes something else at other sizes. ``linear`` of more than two dimensions is a
    product, because torch's own way through ``addmm`` reads the sizes as plain numbers.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__len__:
            size = args[0].shape[0]
            return size if isinstance(size, int) else size.node.hint
        if func is nn.functional.linear and args[0].dim() > 2:
            x, weight, *rest = args
            bias = rest[0] if rest else (kwargs or {}).get("bias")
            return x @ weight.t() if bias is None else x @ weight.t() + bias
        return func(*args, **(kwargs or {}))


def export_with_any_batch(
    step: Callable[..., list[Tensor]],
    inputs: tuple[list[Tensor], list[Tensor], list[Tensor], Tensor],
    constants: list[Tensor],
    decompositions: Mapping[Any, Callable[..., Any]],
) -> torch.export.ExportedProgram:
    """A function with gradients inside as a program; ``torch.export`` alone does not look into ``torch.func.grad``.

    Args:
        step: Maps parameters, state, a batch, a number and the constants to tensors.
        inputs: An example of all but the constants; the first dimension of the batch's tensors may be any.
        constants: What is put into the program.
        decompositions: How operators are computed from others.
    """
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental import _config
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    params, state, batch, scalar = inputs
    # Not plain tensors: with symbols for the shapes of parameters, too, it takes ten times as long.
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def static(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor, static_shapes=True)

    def any_batch(tensor: Tensor) -> Tensor:
        sizes = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (tensor.dim() - 1)]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    def traced(*given: Any) -> Any:
        with _AnyBatch():
            return step(*given)

    fake = ([*map(static, params)], [*map(static, state)], [*map(any_batch, batch)], static(scalar))
    # Fused attention and oneDNN have backward operators of their own, which no other runtime has. Without duck shapes a
    # batch that is as long as another dimension is wide is still a batch.
    plain = torch.backends.mkldnn.flags(enabled=False)
    any_size = _config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    with sdpa_kernel(SDPBackend.MATH), plain, any_size:
        trace = make_fx(traced, decomposition_table=dict(decompositions), tracing_mode="symbolic")
        graph = trace(*fake, [*map(static, constants)])

    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = graph
            for index, constant in enumerate(constants):
                self.register_buffer(f"constant{index}", constant)

        def forward(self, params: list[Tensor], state: list[Tensor], batch: list[Tensor], scalar: Tensor) -> Any:
            return self.graph(params, state, batch, scalar, list(self.buffers()))

    size = torch.export.Dim("batch", min=1)
    shapes: Any = ([{}] * len(params), [{}] * len(state), [{0: size}] * len(batch), {})
    return torch.export.export(Program(), inputs, dynamic_shapes=shapes)
