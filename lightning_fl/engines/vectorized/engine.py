"""Trains many clients at once: one step of a module whose tensors are stacked over the clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from lightning_fl.clients.local_work import BatchPosition
from lightning_fl.engines.local_trainer import (
    ONE_PHASE,
    ClientFacts,
    ClientOptimizer,
    GradTransform,
    LocalResult,
    StepFunctions,
    buffer_delta,
    loss_of,
    trained_value,
)
from lightning_fl.engines.optimizer_states import OptimizerStates
from lightning_fl.engines.sequential import SequentialEngine
from lightning_fl.engines.tensors import clones, load
from lightning_fl.engines.vectorized.batched_linear import StackedLinears
from lightning_fl.engines.vectorized.row_subset import RowSubset
from lightning_fl.engines.vectorized.stacking import num_bytes, stack
from lightning_fl.engines.vectorized.tracing import TracedStep, record, with_gradients
from lightning_fl.torch_internals import pytree
from lightning_fl.tree import cast_like
from lightning_fl.types import Phase, Tree

Step = Callable[..., tuple[Any, Any]]
"""Calls the user's step; returns the loss and tensors to be handed on."""


@dataclass(frozen=True)
class Vectorized:
    """The engine that advances many clients in one step, with its settings.

    Args:
        clients_per_step: The most clients that train in one step. None: as many as fit in ``stacked_bytes``.
        stacked_bytes: Bytes of the clients' parameters that stand side by side. Default 16 MiB, for a CPU's cache; a
            GPU takes more.
        batch_bytes: Bytes of their batches in memory at once. Default 1 GiB.
        kept_bytes: Bytes of freed memory that the process keeps for its next steps, on a CPU with glibc, from the first
            fit on; to fetch it from the operating system at each step takes longer. Environment variables of
            ``malloc`` go first. 0: what the C library does by itself. Default 64 MiB.
        record: Whether the step's tensor operations are recorded and then replayed without the Python in
            ``training_step``. It is recorded anew when something else than a tensor's values has changed in what the
            step can reach: attributes of the module, of its class and of objects in them, variables closed over, and
            global variables that its code names. A step is never recorded if it looks at the Trainer or at
            ``batch_idx``, reads a tensor's values into Python, or if what it can reach can't be watched. Turn it off
            for one that depends on something else that changes, such as a file or the time, or that shall print or
            write at each step. Default True.
        compile: Whether ``torch.compile`` makes the recorded operations faster. It takes seconds for each shape of
            batch, and needs a C++ compiler on a CPU. Default False.

    Raises:
        ValueError: If a number is below 1 (``kept_bytes``: below 0), or if what is not recorded shall be compiled.

    Example:
        >>> import lightning_fl as fl
        >>> strategy = fl.FederatedStrategy("fedavg", engine=fl.engines.Vectorized(clients_per_step=20))
    """

    clients_per_step: int | None = None
    stacked_bytes: int = 16 * 2**20
    batch_bytes: int = 2**30
    kept_bytes: int = 64 * 2**20
    record: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("clients_per_step", "stacked_bytes", "batch_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Vectorized got {name}={value}; expected at least 1.")
        if self.kept_bytes < 0:
            raise ValueError(f"Vectorized got kept_bytes={self.kept_bytes}; expected at least 0.")
        if self.compile and not self.record:
            raise ValueError("Vectorized(compile=True) compiles what record=True has recorded, but got record=False.")


class _Caller(nn.Module):
    """Gives ``torch.func.functional_call`` a ``forward`` that is the user's step."""

    def __init__(self, module: nn.Module, step: Step) -> None:
        super().__init__()
        self.module = module
        self.step = step

    def forward(self, *args: Any) -> tuple[Tensor, Any]:
        return self.step(*args)


class VectorizedEngine(SequentialEngine):
    """Advances several clients in one step, each with its own parameters, buffers and optimizer state.

    The clients stand along the first dimension of stacked tensors; ``torch.func.vmap`` runs the user's step over them
    and the user's own optimizer steps the stacked parameters, which is right for every optimizer that treats elements
    alone. A client alone is trained as by :class:`SequentialEngine`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: OptimizerStates,
        personal: Sequence[str] = (),
        client_optimizer: ClientOptimizer = "reset",
        functions: StepFunctions | None = None,
    ) -> None:
        super().__init__(module, optimizers, personal, client_optimizer, functions)
        self._start: Tree = {}
        self._stacked: Tree = {}
        self._stacked_buffers: Tree = {}
        self._is_tied = False
        self._subset: RowSubset | None = None

    def start(
        self,
        starts: Sequence[Tree],
        client_states: Sequence[Mapping[str, Tree]],
        phase: Phase = ONE_PHASE,
        grad_transform: GradTransform | None = None,
    ) -> None:
        if len(starts) == 1:
            super().start(starts, client_states, phase, grad_transform)
            return
        size, tensors, round_start = len(starts), self.tensors, self.round_start
        self._start, _ = stack(starts)
        personal, _ = stack([state.get("personal", round_start.personal) for state in client_states])
        values = {**self._start, **round_start.buffers, **personal}
        params = {**tensors.params, **tensors.personal_params}
        every = {**tensors.buffers, **tensors.personal}
        buffers = {name: buffer for name, buffer in every.items() if name not in params}
        self._stacked = {name: _spread(values[name], param, size).requires_grad_() for name, param in params.items()}
        self._stacked_buffers = {name: _spread(values[name], buffer, size) for name, buffer in buffers.items()}
        named = (self.module.named_parameters, self.module.named_buffers)
        self._is_tied = any(len([*each(remove_duplicate=False)]) != len([*each()]) for each in named)
        self.optimizers.restart_stacked({id(param): self._stacked[name] for name, param in params.items()})
        self.grad_transform = grad_transform

    def choose(self, rows: Sequence[int]) -> None:
        """Lets only some of the loaded clients train in the next step.

        Args:
            rows: Their places among those given to :meth:`start`, in order.
        """
        if self._subset is None:
            self._subset = RowSubset(self._stacked, self._stacked_buffers, self.optimizers)
        self._stacked, self._stacked_buffers = self._subset.choose(rows, self._stacked, self._stacked_buffers)

    @property
    def num_clients(self) -> int:
        """How many clients the next step trains."""
        return len(next(iter(self._stacked.values())))

    @property
    def is_gathered(self) -> bool:
        """Whether only some of the loaded clients train."""
        return self._subset is not None and self._subset.rows is not None

    def _forward(self, batch: Any, position: BatchPosition) -> tuple[Tensor | None, Tensor | None]:
        if not self._stacked:
            return super()._forward(batch, position)
        assert self.functions is not None
        self.choose(batch.mask)
        group_step, training_step = self.functions.group_step, self.functions.training_step
        with self.functions.context():
            if group_step is not None:
                return group_step(batch, position.offset)
            losses, _ = self.forward_stacked(
                lambda own: (loss_of(training_step(own, position.offset)), []), batch.content
            )
        return losses.sum(), losses

    def forward_stacked(self, step: Step, batch: Any, *args: Any, randomness: str = "error") -> tuple[Tensor, Any]:
        """Runs the user's step for each client on its own part of a stacked batch.

        Args:
            step: Calls the user's step with a client's batch and ``args``.
            batch: The clients' batches, each of their tensors stacked.
            args: Handed to ``step`` as they are.
            randomness: Of ``torch.func.vmap``: ``"error"`` refuses random numbers, ``"different"`` draws each
                client's own.

        Returns:
            The losses, of shape ``[clients]``, and the other tensors, stacked.
        """
        losses, others, replaced = self._run(step, self._stacked, self._stacked_buffers, batch, args, randomness)
        self._stacked_buffers.update({name: value.detach() for name, value in replaced.items()})
        return losses, others

    def _run(
        self, step: Step, params: Tree, buffers: Tree, batch: Any, args: tuple[Any, ...], randomness: str
    ) -> tuple[Tensor, Any, Tree]:
        caller = _Caller(self.module, step)
        dims = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)

        def of_one(params: Tree, buffers: Tree, batch: Any) -> tuple[Tensor, Any, Tree]:
            tensors = {f"module.{name}": tensor for name, tensor in {**params, **buffers}.items()}
            loss, others = functional_call(caller, tensors, (batch, *args), tie_weights=self._is_tied)
            replaced = {
                name: tensors[f"module.{name}"].to(buffer.dtype)
                for name, buffer in buffers.items()
                if tensors[f"module.{name}"] is not buffer
            }
            return loss, others, replaced

        with StackedLinears(), sdpa_kernel(SDPBackend.MATH):  # other kernels of attention have no rule for vmap
            losses, others, replaced = vmap(of_one, in_dims=(0, 0, dims), randomness=randomness)(params, buffers, batch)
        return losses, others, {name: value.contiguous() for name, value in replaced.items()}

    def record(
        self, step: Step, batch: Any, *args: Any, randomness: str = "error", compile: bool = False
    ) -> TracedStep:
        """Records :meth:`forward_stacked`, gradients included, for batches of the same shapes; changes nothing.

        With ``compile``, ``torch.compile`` makes it faster.
        """
        leaves, spec = pytree.tree_flatten(batch)
        names, is_tensor = list(self._stacked), [isinstance(leaf, Tensor) for leaf in leaves]
        with_grads: list[str] = []
        replaced_names: list[str] = []

        def run(*tensors: Tensor) -> list[Tensor]:
            given = iter(tensors)
            params = {name: next(given).detach().requires_grad_() for name in names}
            buffers = {name: next(given) for name in self._stacked_buffers}
            own = [next(given) if is_one else leaf for leaf, is_one in zip(leaves, is_tensor, strict=True)]
            losses, others, replaced = self._run(
                step, params, buffers, pytree.tree_unflatten(own, spec), args, randomness
            )
            grads = _gradients(losses.sum(), params)
            with_grads[:], replaced_names[:] = grads, replaced
            return [losses, *grads.values(), *replaced.values(), *others]

        with torch.enable_grad():
            program = record(run, self._inputs(leaves), compile)
        return TracedStep(program, with_grads, replaced_names)

    def replay(self, recording: TracedStep, batch: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The recorded step.

        Returns:
            The sum of the losses, whose ``backward`` sets the gradients; the losses; and the other tensors.
        """
        losses, grads, replaced, others = recording.run(self._inputs(pytree.tree_flatten(batch)[0]))
        self._stacked_buffers.update(zip(recording.replaced, replaced, strict=True))
        return with_gradients(losses.sum(), grads, [self._stacked[n] for n in recording.with_grads]), losses, others

    def try_out(self, recording: TracedStep, batch: Any) -> tuple[Tensor, Tree]:
        """Losses and gradients of the recorded step; changes nothing."""
        inputs = [tensor.detach().clone() for tensor in self._inputs(pytree.tree_flatten(batch)[0])]
        losses, grads, _, _ = recording.run(inputs)
        return losses, dict(zip(recording.with_grads, grads, strict=True))

    def _inputs(self, batch: Sequence[Any]) -> list[Tensor]:
        tensors = [leaf for leaf in batch if isinstance(leaf, Tensor)]
        return [*self._stacked.values(), *self._stacked_buffers.values(), *tensors]

    def step_alone(self, step: Step, index: int, batch: Any, *args: Any) -> tuple[Tensor, Tree]:
        """Loss and gradients of the module's own step for the client at ``index``, with neither stacking nor ``vmap``.

        The module's tensors are those of the client meanwhile.
        """
        own = {**self._stacked, **self._stacked_buffers}
        tensors = {name: tensor for name, tensor in self.tensors.all.items() if name in own}
        before = clones(tensors)
        load(tensors, {name: own[name][index].detach() for name in tensors})
        try:
            params = {name: tensor for name, tensor in tensors.items() if name in self._stacked}
            loss, _ = step(batch, *args)
            return loss.detach(), _gradients(loss, params)
        finally:
            load({name: tensor for name, tensor in self.tensors.all.items() if name in before}, before)

    def gradients(self, loss: Tensor, keep: bool = False) -> Tree:
        """Gradients of ``loss`` for the stacked parameters that it depends on.

        Args:
            loss: What is differentiated.
            keep: Whether it will be differentiated again.
        """
        return _gradients(loss, self._stacked, keep)

    def copy_buffers(self) -> Tree:
        """The clients' buffers as they are."""
        return clones(self._stacked_buffers)

    def put_buffers(self, buffers: Tree) -> None:
        """Puts back what :meth:`copy_buffers` copied."""
        self._stacked_buffers = clones(buffers)

    @property
    def layout(self) -> Any:
        """What must be alike for a recording to be replayed: each client's tensors in the stack."""
        stacked = (*self._stacked.items(), *self._stacked_buffers.items())
        return [(name, tensor.shape[1:], tensor.stride(), tensor.dtype) for name, tensor in stacked]

    @property
    def stacked_names(self) -> set[str]:
        """Names of the tensors of which each client has its own."""
        return {*self._stacked, *self._stacked_buffers}

    @property
    def bytes_of_one(self) -> int:
        """Bytes of the parameters that a client trains."""
        return num_bytes([param for param in self.module.parameters() if param.requires_grad])

    def max_clients(self, stacked_bytes: int) -> int:
        """How many clients' parameters take no more than ``stacked_bytes``; at least 1."""
        return max(1, stacked_bytes // max(1, self.bytes_of_one))

    @property
    def _shared_params(self) -> Mapping[str, Tensor]:
        return {name: self._stacked.get(name, param) for name, param in self.tensors.params.items()}

    def clip_norms(self, optimizer: Optimizer, max_norm: float) -> None:
        """Scales each client's gradients so that their norm is at most ``max_norm``, as for a client alone."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return
        norms = torch.stack([torch.linalg.vector_norm(grad.reshape(len(grad), -1), dim=1) for grad in grads])
        factors = (max_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factors.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1)))

    def finish(self, num_steps: Sequence[int] | None = None) -> LocalResult:
        if not self._stacked:
            return super().finish()
        tensors, start = self.tensors, self.round_start.buffers
        tensors.check_frozen()
        if self._subset is not None:
            self._stacked, self._stacked_buffers = self._subset.choose(None, self._stacked, self._stacked_buffers)
        client_state: dict[str, Tree] = {}
        if self.personal:
            stacked = self._stacked | self._stacked_buffers
            client_state["personal"] = clones({name: stacked[name] for name in tensors.personal})
        params = {name: self._stacked[name] for name in tensors.params}
        buffers = {name: self._stacked_buffers[name] for name in tensors.buffers}
        each = num_steps or [self.optimizers.num_steps] * self.num_clients
        facts = {number: self._facts(number, params) for number in sorted(set(each))}
        result = LocalResult(
            params={name: trained_value(param.detach(), self._start[name]) for name, param in params.items()},
            buffers={name: buffer_delta(buffer, start[name]) for name, buffer in buffers.items()},
            client_state=client_state,
            facts=[facts[number] for number in each],
        )
        self.leave()
        return result

    def _facts(self, num_steps: int, params: Tree) -> ClientFacts:
        optimizers = self.optimizers
        if num_steps != optimizers.num_steps:
            optimizers.recount(num_steps)
        lr_sum, normalizer = optimizers.lr_sum(params), optimizers.normalizer(params)
        return ClientFacts(num_steps, lr_sum, normalizer, optimizers.schedule_end(), num_steps)

    def leave(self) -> None:
        self.optimizers.unstack()
        self._subset = None
        self._start, self._stacked, self._stacked_buffers = {}, {}, {}
        super().leave()


def _gradients(loss: Tensor, params: Tree, keep: bool = False) -> Tree:
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, retain_graph=keep)
    return {name: grad for name, grad in zip(params, grads, strict=True) if grad is not None}


@torch.no_grad()
def _spread(value: Tensor, like: Tensor, size: int) -> Tensor:
    """``value`` in the dtype of ``like``, repeated for each client unless it is stacked already."""
    cast = cast_like(value, like)
    return cast.detach().clone() if value.dim() > like.dim() else cast.expand(size, *like.shape).clone()
