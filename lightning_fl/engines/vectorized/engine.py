"""Trains many clients at once: one step of a module whose tensors are stacked over the clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from lightning_fl.clients.local_work import BatchPosition
from lightning_fl.engines.device_memory import device_memory
from lightning_fl.engines.isolation import Isolation
from lightning_fl.engines.local_trainer import (
    ONE_PHASE,
    ClientFacts,
    ClientOptimizer,
    GradTransform,
    LocalResult,
    StepFunctions,
    loss_of,
    trained_value,
)
from lightning_fl.engines.optimizer_states import OptimizerStates
from lightning_fl.engines.sequential import SequentialEngine
from lightning_fl.engines.tensors import clones, is_same, load
from lightning_fl.engines.vectorized.batching_rules import BatchingRules
from lightning_fl.engines.vectorized.buffer_pool import BufferPool
from lightning_fl.engines.vectorized.row_subset import RowSubset
from lightning_fl.engines.vectorized.stacking import NotStackable, NotVectorizable, stack
from lightning_fl.engines.vectorized.step_replay import StepReplays
from lightning_fl.engines.vectorized.tensor_slots import TensorSlots
from lightning_fl.torch_internals import flat_vmap, pytree
from lightning_fl.tree import cast_like, num_bytes
from lightning_fl.types import Phase, Tree

BYTES_ON_CPU = 16 * 2**20
"""Of the stacked parameters: what a CPU's cache holds."""

Step = Callable[..., tuple[Any, Any]]
"""Calls the user's step; returns the loss and other tensors to return with it."""


@dataclass(frozen=True)
class Vectorized:
    """The engine that advances many clients in one step, with its settings.

    Args:
        clients_per_step: The most clients that train in one step. None: as many as fit in ``stacked_bytes``. 1: clients
            train one after the other, which is of use with ``capture_steps``.
        stacked_bytes: The most bytes of the clients' stacked parameters. None: 16 MiB on a CPU, for its cache; on a GPU
            a sixteenth of its memory, or an eighth of what is free if that is less.
        batch_bytes: The most bytes of their batches in memory at once. Default 1 GiB.
        data_bytes: The most bytes of data sets in memory that stay on a GPU, where their batches are then gathered.
            None: a quarter of what is free; 0: none.
        capture_steps: Whether a GPU captures each shape of step once, as a CUDA graph, and replays it; steps of one
            shape that follow each other are replayed at once. Default False: it has not been measured on a GPU. On a
            CPU the recorded operations are repeated one after the other, which is no faster and only a way of testing
            it.

    Raises:
        ValueError: If a number is below 1, or ``data_bytes`` below 0.

    Example:
        >>> import lightning_fl as fl
        >>> strategy = fl.FederatedStrategy("fedavg", engine=fl.engines.Vectorized(clients_per_step=20))
    """

    clients_per_step: int | None = None
    stacked_bytes: int | None = None
    batch_bytes: int = 2**30
    data_bytes: int | None = None
    capture_steps: bool = False

    def __post_init__(self) -> None:
        for name in ("clients_per_step", "stacked_bytes", "batch_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Vectorized got {name}={value}; expected at least 1.")
        if self.data_bytes is not None and self.data_bytes < 0:
            raise ValueError(f"Vectorized got data_bytes={self.data_bytes}; expected at least 0.")

    @property
    def stacks_one(self) -> bool:
        """Whether a client alone trains as a group of one, so that its steps are captured."""
        return self.capture_steps and self.clients_per_step == 1


@dataclass(frozen=True)
class StepAlone:
    """What a step gives that a client makes alone."""

    loss: Tensor
    grads: Tree
    buffers: Tree
    others: Any


class VectorizedEngine(SequentialEngine):
    """Advances several clients in one step, each with its own parameters, buffers and optimizer state.

    The first dimension of stacked tensors is that of the clients; ``torch.func.vmap`` runs the user's step over it, and
    the user's own optimizer steps the stacked parameters, which is correct for every optimizer that treats each element
    alone. A client alone is trained as by :class:`SequentialEngine`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: OptimizerStates,
        personal: Sequence[str] = (),
        client_optimizer: ClientOptimizer = "reset",
        functions: StepFunctions | None = None,
        isolation: Isolation | None = None,
    ) -> None:
        super().__init__(module, optimizers, personal, client_optimizer, functions, isolation)
        self._start: Tree = {}
        self._stacked: Tree = {}
        self._stacked_buffers: Tree = {}
        self.pool = BufferPool()
        self.replays: StepReplays | None = None
        """Captures the steps of groups and replays them; None: each step runs by itself."""
        self.stacks_one = False
        """Whether a client alone is a group of one, whose step runs without ``vmap``."""
        self._subset: RowSubset | None = None
        self._slots = TensorSlots(module, {})

    def start(
        self,
        starts: Sequence[Tree],
        client_states: Sequence[Mapping[str, Tree]],
        phase: Phase = ONE_PHASE,
        grad_transform: GradTransform | None = None,
    ) -> None:
        if len(starts) == 1 and not self.stacks_one:
            super().start(starts, client_states, phase, grad_transform)
            return
        self._enter()
        size, tensors = len(starts), self.tensors
        load(tensors.moving, self.start_buffers)
        self._start, _ = stack(starts)
        if any(name in state.get("personal", {}) for state in client_states for name in tensors.personal_frozen):
            raise NotStackable("each client has its own value of a frozen parameter")
        personal, _ = stack([self._personal_of(state) for state in client_states])
        values = {**self._start, **self.start_buffers, **personal}
        params = {**tensors.params, **tensors.personal_params}
        every = {**tensors.buffers, **tensors.personal}
        # Frozen parameters that move are not stacked: a step that writes to them, perhaps through `param.data`, is one
        # for clients that train alone.
        buffers = {name: buffer for name, buffer in every.items() if name not in params and name not in tensors.moving}
        spread = partial(self._spread, size=size)
        self._stacked = {name: spread(values[name], param).requires_grad_() for name, param in params.items()}
        self._stacked_buffers = {name: spread(values[name], buffer) for name, buffer in buffers.items()}
        # Found once for each group: `functional_call` would search for them in every step.
        self._slots = TensorSlots(self.module, {**params, **buffers})
        self.optimizers.restart_stacked({id(param): self._stacked[name] for name, param in params.items()})
        self.grad_transform = grad_transform

    @torch.no_grad()
    def _spread(self, value: Tensor, like: Tensor, size: int) -> Tensor:
        """``value`` in the dtype of ``like``, repeated for each client unless it is stacked already.

        Raises:
            NotStackable: If it has another shape, as a client's own buffer that grows.
        """
        if value.shape not in (like.shape, (size, *like.shape)):
            raise NotStackable("a buffer changes its shape")
        return self.pool.empty((size, *like.shape), like).copy_(cast_like(value, like))

    def choose(self, rows: Sequence[int]) -> None:
        """Lets only some of the loaded clients train in the next step.

        Args:
            rows: Their positions among those passed to :meth:`start`, in order.
        """
        if self._subset is None:
            self._subset = RowSubset(self._stacked, self._stacked_buffers, self.optimizers, self.pool)
        self._stacked, self._stacked_buffers = self._subset.choose(rows, self._stacked, self._stacked_buffers)

    @property
    def num_clients(self) -> int:
        """How many clients the next step trains."""
        return len(next(iter(self._stacked.values()))) if self._stacked else 1

    def step(self, batch: Any, position: BatchPosition) -> Tensor | None:
        losses = self.replays.step(batch, position) if self.replays is not None and self._stacked else None
        return super().step(batch, position) if losses is None else losses

    def _forward(self, batch: Any, position: BatchPosition) -> tuple[Tensor | None, Tensor | None]:
        if not self._stacked:
            return super()._forward(batch, position)
        assert self.functions is not None
        self.choose(batch.mask)
        with self.functions.context():
            return self._run_group(self.functions.group_step, batch, position.offset)

    def _run_group(
        self, group_step: Callable[[Any, int], tuple[Tensor, Tensor]] | None, batch: Any, offset: int
    ) -> tuple[Tensor, Tensor]:
        assert self.functions is not None
        if group_step is not None:
            return group_step(batch, offset)
        training_step = self.functions.training_step
        losses, _ = self.forward_stacked(lambda own: (loss_of(training_step(own, offset)), []), batch.content)
        # The sum and not the mean: a client's loss depends on its own rows only, so that its gradient is that of the
        # client alone.
        return losses.sum(), losses

    @contextmanager
    def loss_without_trace(self) -> Iterator[Tensor | None]:
        if not self._stacked:
            with super().loss_without_trace() as loss:
                yield loss
            return
        assert self.functions is not None
        assert self.batch is not None
        buffers = self.copy_buffers()
        try:
            with self.functions.context():
                losses, _ = self._run_group(self.functions.silent_group_step, *self.batch)
            yield losses
        finally:
            self.put_buffers(buffers)

    def forward_stacked(self, step: Step, batch: Any, *args: Any, randomness: str = "error") -> tuple[Tensor, Any]:
        """Runs the user's step for each client on its own part of a stacked batch.

        Args:
            step: Calls the user's step with a client's batch and ``args``.
            batch: The clients' batches, each of their tensors stacked.
            args: Passed to ``step`` as they are.
            randomness: As for ``torch.func.vmap``: ``"error"`` refuses random numbers, ``"different"`` draws different
                ones for each client.

        Returns:
            The losses, of shape ``[clients]``, and the other tensors, stacked.

        Raises:
            NotVectorizable: If the step does what has another meaning for several clients, or has caught an error.
        """
        leaves, spec = pytree.tree_flatten(batch)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        names = [*self._stacked, *self._stacked_buffers]

        def of_one(*tensors: Tensor) -> tuple[Tensor, Any, Tree]:
            own = list(leaves)
            for place, tensor in zip(places, tensors[len(names) :], strict=True):
                own[place] = tensor
            # Not strict: behind the tensors of the module stand those of the batch.
            with self._slots.hold(dict(zip(names, tensors, strict=False))) as replaced:
                loss, others = step(pytree.tree_unflatten(own, spec), *args)
            return loss, others, {name: value.to(self._stacked_buffers[name].dtype) for name, value in replaced.items()}

        inputs = (leaves[place] for place in places)
        stacked = [*self._stacked.values(), *self._stacked_buffers.values(), *inputs]
        rules = BatchingRules(self.pool)
        if self.stacks_one:
            out = of_one(*(tensor[0] for tensor in stacked))
            losses, others, replaced = pytree.tree_map_only(Tensor, lambda own: own[None], out)
        else:
            with rules, sdpa_kernel(SDPBackend.MATH):  # other kernels of attention have no rule for vmap
                losses, others, replaced = flat_vmap(of_one, stacked, randomness)
        others = _apart_from(stacked[: len(names)], others)
        if rules.error is not None:
            raise NotVectorizable("training_step catches an error, which may have another cause for several clients")
        # Detached, or the graphs of all steps would hang on the buffers.
        self._stacked_buffers.update({name: value.detach().contiguous() for name, value in replaced.items()})
        return losses, others

    def step_alone(self, step: Step, index: int, batch: Any, *args: Any) -> StepAlone:
        """The module's own step for the client at ``index``, without stacking and ``vmap``.

        The client's tensors are loaded into the module meanwhile.
        """
        own = {**self._stacked, **self._stacked_buffers}
        tensors = {name: tensor for name, tensor in self.tensors.all.items() if name in own}
        before = clones(tensors)
        load(tensors, {name: own[name][index].detach() for name in tensors})
        try:
            params = {name: tensor for name, tensor in tensors.items() if name in self._stacked}
            loss, others = step(batch, *args)
            others = _apart_from([*tensors.values()], others)
            buffers = {name: tensor for name, tensor in self.tensors.all.items() if name in self._stacked_buffers}
            return StepAlone(loss.detach(), _gradients(loss, params), clones(buffers), others)
        finally:
            load({name: tensor for name, tensor in self.tensors.all.items() if name in before}, before)

    def gradients(self, loss: Tensor) -> Tree:
        """Gradients of ``loss`` for the stacked parameters that it depends on."""
        return _gradients(loss, self._stacked)

    def copy_buffers(self) -> Tree:
        """Copies of the clients' buffers."""
        return clones(self._stacked_buffers)

    def put_buffers(self, buffers: Tree) -> None:
        """Restores what :meth:`copy_buffers` copied."""
        self._stacked_buffers = clones(buffers)

    @contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """A block at whose end the clients' buffers are the tensors that they were."""
        before, self._stacked_buffers = self._stacked_buffers, dict(self._stacked_buffers)
        try:
            yield
        finally:
            self._stacked_buffers = before

    @property
    def stacked_params(self) -> Tree:
        """The clients' parameters, stacked."""
        return self._stacked

    @property
    def stacked_buffers(self) -> Tree:
        """The clients' buffers, stacked."""
        return self._stacked_buffers

    @stacked_buffers.setter
    def stacked_buffers(self, buffers: Tree) -> None:
        self._stacked_buffers = buffers

    @property
    def bytes_of_one(self) -> int:
        """Bytes of the parameters that a client trains."""
        return num_bytes([param for param in self.module.parameters() if param.requires_grad])

    def max_clients(self, stacked_bytes: int | None, looks_at_free: bool = True) -> int:
        """How many clients' parameters take no more than ``stacked_bytes``, or the device's default; at least 1.

        Args:
            stacked_bytes: The most bytes. None: the default.
            looks_at_free: Whether the default counts what is free on a GPU.
        """
        memory = device_memory(self.device)
        if stacked_bytes is None and memory is not None:
            # The first bound is the same in each run, and with it the groups and so the last bits of the result. The
            # second one counts only where others use the GPU too.
            stacked_bytes = memory.total // 16
            if looks_at_free:
                stacked_bytes = min(stacked_bytes, memory.free // 8)
        return max(1, (stacked_bytes or BYTES_ON_CPU) // max(1, self.bytes_of_one))

    @property
    def shared_params(self) -> Mapping[str, Tensor]:
        return {name: self._stacked.get(name, param) for name, param in self.tensors.params.items()}

    def clip_norms(self, optimizer: Optimizer, max_norm: float) -> None:
        """Scales each client's gradients so that their norm is at most ``max_norm``, as for a client alone."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return
        norms = torch.stack([torch.linalg.vector_norm(grad.reshape(len(grad), -1), dim=1) for grad in grads])
        # The small summand and the clamp are those of torch's `clip_grad_norm_`.
        factors = (max_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factors.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1)))

    def finish(self, num_steps: Sequence[int] | None = None) -> LocalResult:
        if not self._stacked:
            return super().finish()
        tensors = self.tensors
        moved = self.restore_frozen(self._compares)
        self._is_compared = True
        if moved:
            raise ValueError(
                f"A step of {self.num_clients} clients has changed the frozen parameter {moved[0]!r}, which they share."
                " Let each client train alone with FederatedStrategy(engine='sequential')."
            )
        # Rows that trained by themselves are written back before the result is read.
        if self._subset is not None:
            self._stacked, self._stacked_buffers = self._subset.choose(None, self._stacked, self._stacked_buffers)
            self._subset.close()
        client_state: dict[str, Tree] = {}
        if self.personal:
            stacked = self._stacked | self._stacked_buffers
            client_state["personal"] = clones({name: stacked[name] for name in tensors.personal})
        params = {name: self._stacked[name] for name in tensors.params}
        buffers = {
            name: self._stacked_buffers.get(name, buffer.detach().expand(self.num_clients, *buffer.shape))
            for name, buffer in tensors.buffers.items()
        }
        each = num_steps or [self.optimizers.num_steps] * self.num_clients
        # Once for each number of steps, because counting changes what the optimizers have counted.
        facts = {number: self._facts(number, params) for number in sorted(set(each))}
        result = LocalResult(
            params={name: _trained(param.detach(), self._start[name]) for name, param in params.items()},
            buffers=self._contributions(buffers),
            client_state=client_state,
            facts=[facts[number] for number in each],
        )
        self.leave()
        return result

    def restore_frozen(self, whole: bool = True) -> list[str]:
        """Puts back the frozen parameters, which a group shares; returns the names of those that had changed.

        Args:
            whole: Whether each is compared as a whole.
        """
        moving, start = self.tensors.moving, self.start_buffers
        moved = [name for name, param in moving.items() if not is_same(param.detach(), start[name])]
        load(moving, start)
        return [*moved, *self.tensors.still.put_back(whole, self.moved), *self.tensors.still.lost()]

    def _facts(self, num_steps: int, params: Tree) -> ClientFacts:
        optimizers = self.optimizers
        if num_steps != optimizers.num_steps:
            optimizers.recount(num_steps)
        lr_sum, normalizer = optimizers.lr_sum(params), optimizers.normalizer(params)
        return ClientFacts(num_steps, lr_sum, normalizer, optimizers.schedule_end(), num_steps)

    def leave(self) -> None:
        # The optimizers must not go on holding the stacked tensors, which the module does not have.
        self.optimizers.unstack()
        if self.replays is not None:
            self.replays.leave()
        self._subset = None
        self._start, self._stacked, self._stacked_buffers = {}, {}, {}
        super().leave()


def _trained(param: Tensor, start: Tensor) -> Tensor:
    # No copy is needed: the stacked parameters are not stepped after this.
    return param if param.dtype == start.dtype else trained_value(param, start)


def _apart_from(own: Sequence[Tensor], values: Any) -> Any:
    """The values, copied where they are tensors of a client itself, such as a parameter, which later steps change."""
    leaves, spec = pytree.tree_flatten(values)
    if not leaves:
        return values
    memory = {tensor.untyped_storage().data_ptr() for tensor in own}
    return pytree.tree_unflatten([x.clone() if x.untyped_storage().data_ptr() in memory else x for x in leaves], spec)


def _gradients(loss: Tensor, params: Tree) -> Tree:
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {name: grad for name, grad in zip(params, grads, strict=True) if grad is not None}
