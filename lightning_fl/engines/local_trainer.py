"""Local training of client groups: the interface of engines, and the training step that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fl.clients.local_work import BatchPosition
from lightning_fl.engines.buffers import contributions, where_both_finite
from lightning_fl.engines.gradient_at import BatchGradient
from lightning_fl.engines.isolation import Isolation
from lightning_fl.engines.optimizer_states import OptimizerStates, Schedule, ScheduleEnd
from lightning_fl.engines.parameter_marks import ParameterMarks
from lightning_fl.engines.spread import is_spread, local, locals_of
from lightning_fl.engines.tensors import FederatedTensors, clones, is_same, load
from lightning_fl.engines.within_silo import WithinSilo
from lightning_fl.tree import cast_like, to_sum_dtype
from lightning_fl.types import Context, Phase, Tree

ClientOptimizer = Literal["reset", "keep"]
GradTransform = Callable[[Tree, Tree], Tree]
"""Replaces the gradients of the shared parameters: ``(grads, params) -> grads``."""
ONE_PHASE = Phase()


@dataclass(frozen=True)
class StepFunctions:
    """The parts of a training step; a caller replaces those that it does differently.

    Args:
        training_step: Called with a batch and its index among the client's batches; returns the loss, a mapping with
            the entry ``"loss"``, or None to skip the batch.
        context: Returns the context in which ``training_step`` runs, such as autocast.
        backward: Computes the gradients of a loss.
        unscale: Unscales the gradients of an optimizer before they are read. None: there is nothing to unscale.
        clip: Clips the gradients that an optimizer is about to step; None: they are not clipped.
        optimizer_step: Takes the step.
        group_step: The step of several clients: called with their stacked batch, returns the sum of their losses, to be
            differentiated, and the loss of each. None: ``training_step`` of each, under ``torch.func.vmap``.
        silence: The context in which ``training_step`` leaves no trace of a batch in logs, metrics and buffers.
        silent_group_step: As ``group_step``, without a trace in logs and metrics.
    """

    training_step: Callable[[Any, int], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    backward: Callable[[Tensor], Any] = Tensor.backward
    unscale: Callable[[Optimizer], Any] | None = None
    clip: Callable[[Optimizer], Any] | None = None
    optimizer_step: Callable[[Optimizer], Any] = lambda optimizer: optimizer.step()
    group_step: Callable[[Any, int], tuple[Tensor, Tensor]] | None = None
    silence: Callable[[Any], AbstractContextManager[Any]] = lambda batch: nullcontext()
    silent_group_step: Callable[[Any, int], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class ClientFacts:
    """Facts of one client's local training.

    Args:
        num_steps: Optimizer steps actually taken, in the phases that train what is sent.
        lr_sum: For each shared parameter, the learning rates of its steps summed.
        normalizer: FedNova's ``|a_i|_1``, or None if it is unknown for the optimizer.
        schedule_end: The progress of the schedules at the end of the longest phase.
        num_steps_of_all: Optimizer steps of all phases.
    """

    num_steps: int
    lr_sum: Mapping[str, float]
    normalizer: float | None
    schedule_end: ScheduleEnd
    num_steps_of_all: int


@dataclass(frozen=True)
class LocalResult:
    """The result of a group's local training; each tensor is stacked over the clients, ``[num_clients, ...]``.

    Args:
        params: The trained shared parameters, in the dtype in which they are summed.
        buffers: What each client contributes to the shared buffers: their change.
        client_state: The clients' state for their next round: personal tensors, optimizer state.
        facts: Facts of each client's training.
    """

    params: Tree
    buffers: Tree
    client_state: Mapping[str, Tree]
    facts: Sequence[ClientFacts]


@dataclass(frozen=True)
class RoundStart:
    """The module's tensors, and the values with which every client of a round starts."""

    tensors: FederatedTensors
    buffers: Tree = field(default_factory=dict)
    personal: Tree = field(default_factory=dict)
    counts_known: bool = True


class LocalTrainer(ABC):
    """Trains client groups on the user's module; a client alone is a group of one.

    A round is ``begin_round``, then ``start``, ``step`` for each batch and ``finish`` for each group, then
    ``end_round``.

    Args:
        module: The user's module.
        optimizers: The user's optimizers and schedules.
        personal: ``fnmatch`` globs of tensors that stay with their client.
        client_optimizer: ``"reset"``: each client starts with a fresh optimizer state; ``"keep"``: with that of its
            last round.
        functions: The parts of a step. None: :meth:`step` is not called, because another loop runs the steps and calls
            :meth:`prepare_gradients` in each.
        isolation: Puts the rest of the module's state back before each client. None: all of it.
        within: What the processes of a silo agree on. None: there is one.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: OptimizerStates,
        personal: Sequence[str] = (),
        client_optimizer: ClientOptimizer = "reset",
        functions: StepFunctions | None = None,
        isolation: Isolation | None = None,
        within: WithinSilo | None = None,
    ) -> None:
        self.module = module
        self.optimizers = optimizers
        self.personal = tuple(personal)
        self.client_optimizer = client_optimizer
        self.functions = functions
        self.grad_transform: GradTransform | None = None
        self.gradient_at = BatchGradient(self)
        self.batch: tuple[Any, int] | None = None
        """The batch of the current step, on the module's device, and its index among the client's batches."""
        self.isolation = Isolation(module) if isolation is None else isolation
        self.within = within or WithinSilo()
        self.is_alone = self.is_private = False
        self.is_shared = True
        self.moved: set[str] = set()
        """Frozen parameters that local training has written to in the current round."""
        self._is_compared = False
        """Whether all frozen parameters have been compared since a client of the round has trained."""
        self._round_start: RoundStart | None = None
        self._marks: ParameterMarks | None = None
        self.start_buffers: Tree = {}
        """The shared buffers with which the next group starts."""

    # ---- a round

    def begin_round(
        self,
        server_params: Tree | None,
        schedules: Sequence[Schedule] = (),
        counts_known: bool = True,
        moving: Collection[str] | None = (),
        is_alone: bool = False,
        is_shared: bool = True,
        is_private: bool = False,
        moves: Callable[[Sequence[str], Mapping[str, Tensor]], Sequence[str]] | None = None,
    ) -> Tree:
        """Takes the module's tensors as the round's start.

        Changes of the module between rounds take precedence: a value of ``server_params`` (in at least float32) is used
        only where the module still holds its cast.

        Args:
            server_params: The global parameters of the last round; None if there are none.
            schedules: The learning-rate schedules that step inside local training.
            counts_known: Whether clients say which values they have where a shared buffer starts as infinity or NaN.
            moving: Names of frozen parameters that local training writes to; see :class:`FederatedTensors`.
            is_alone: Whether the federation has one client only, whose state can reach no other.
            is_shared: Whether several clients train on this module, one after the other. A silo has it for itself.
            is_private: Whether differential privacy protects the data, so that frozen parameters may not move.
            moves: Names frozen parameters that the server moves.

        Returns:
            The global parameters, in the dtype in which they are summed.
        """
        # Sorted anew in each round, because callbacks freeze and unfreeze layers between rounds.
        if self.within.is_spread:
            self.within.free_gathered(self.module)
        before = None if self._round_start is None else self.tensors
        tensors = FederatedTensors(self.module, self.personal, moving, self.within.is_spread, moves, before)
        self.is_alone, self.is_shared, self.is_private = is_alone, is_shared, is_private
        self.moved, self._is_compared = set(), False
        self.isolation.begin_round()
        self._marks = None
        self._round_start = RoundStart(tensors, clones(tensors.buffers), clones(tensors.personal), counts_known)
        self.start_buffers = self._round_start.buffers
        self.optimizers.begin_round(schedules)
        shared = locals_of(tensors.params)
        params = to_sum_dtype(shared)
        for name, param in shared.items():
            if server_params is not None and name in server_params and params[name].dtype != param.dtype:
                master = server_params[name].to(param.device)
                params[name] = torch.where(cast_like(master, param) == param, master, params[name])
        return params

    def start_from(self, buffers: Tree) -> None:
        """Lets the next group start with other shared buffers than the round: those of an older model.

        Args:
            buffers: The buffers of that model; the round's own stand for those that it did not share.
        """
        present = self.round_start.buffers
        is_present = buffers is present
        self.start_buffers = present if is_present else {n: buffers.get(n, own) for n, own in present.items()}

    @abstractmethod
    def start(
        self,
        starts: Sequence[Tree],
        client_states: Sequence[Mapping[str, Tree]],
        phase: Phase = ONE_PHASE,
        grad_transform: GradTransform | None = None,
    ) -> None:
        """Loads a group for its first phase.

        Args:
            starts: The parameters from which each client starts.
            client_states: Each client's state from its last round.
            phase: The first phase.
            grad_transform: The algorithm's transform of the gradients, which are stacked if there are several clients.
        """

    @abstractmethod
    def next_phase(
        self, phase: Phase, grad_transform: GradTransform | None = None, context: Context | None = None
    ) -> None:
        """Ends the current phase and begins another.

        Args:
            phase: The next phase.
            grad_transform: The algorithm's transform of the gradients in it.
            context: What the phase's ``start`` gets.
        """

    def step(self, batch: Any, position: BatchPosition) -> Tensor | None:
        """Trains on one batch, in the order of Lightning's automatic optimization.

        Args:
            batch: The batch, on the module's device.
            position: Its position in the client's local work.

        Returns:
            The detached loss: a scalar for a client alone, ``[num_clients]`` for several; None if the batch was
            skipped.
        """
        functions, (optimizer,) = self.functions, self.optimizers.optimizers
        assert functions is not None
        self.batch = batch, position.offset
        loss, losses = self._forward(batch, position)
        if loss is None:
            self.within.refuse_skipping()
        # After the forward pass, as in Lightning's closure: a training_step may still read the gradients of the last
        # step.
        if position.starts_window:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = None
        if loss is not None:
            # A last window that is not full is divided by the full window too, as in Lightning.
            functions.backward(loss if position.window == 1 else loss / position.window)
        if position.ends_window:
            self.join_gradients()
        # Where gradients are scaled, a batch without loss at the end of a window drops the window, as in Lightning.
        if position.ends_window and (loss is not None or functions.unscale is None):
            self.apply_gradients(optimizer)
        return None if losses is None else losses.detach()

    def apply_gradients(self, optimizer: Optimizer) -> None:
        """Takes the optimizer's step with the gradients that the backward pass has left."""
        functions = self.functions
        assert functions is not None
        if functions.unscale is not None:
            # An algorithm's correction has the scale of true gradients, and clipping bounds what is stepped: unscale,
            # correct, clip.
            functions.unscale(optimizer)
        self.prepare_gradients(optimizer)
        if functions.clip is not None:
            functions.clip(optimizer)
        functions.optimizer_step(optimizer)

    def join_gradients(self) -> None:
        """Averages the gradients over the processes of the silo, before they are unscaled."""
        self.within.average_gradients(self.tensors.trainable.values())

    @abstractmethod
    def prepare_gradients(self, optimizer: Optimizer) -> None:
        """Lets phase and algorithm change the gradients before the step: unscaled and not yet clipped."""

    @property
    @abstractmethod
    def shared_params(self) -> Mapping[str, Tensor]:
        """The shared parameters that the current step trains, stacked if it trains several clients."""

    @property
    def num_clients(self) -> int:
        """How many clients the current step trains."""
        return 1

    @contextmanager
    def loss_without_trace(self) -> Iterator[Tensor | None]:
        """The loss on the current step's batch with the parameters as they are now, to be differentiated in the block.

        Summed over the clients; None if the module skips the batch. After the block logs, metrics and buffers are what
        they were.
        """
        assert self.functions is not None
        assert self.batch is not None
        with self.functions.silence(self.batch[0]):
            with self.functions.context():
                loss = loss_of(self.functions.training_step(*self.batch))
            yield loss

    @abstractmethod
    def finish(self, num_steps: Sequence[int] | None = None) -> LocalResult:
        """Ends the group's local training and returns its result.

        Args:
            num_steps: How many steps each client of a group has taken. None: all have taken every step.

        Raises:
            ValueError: If training has changed a frozen parameter of which there is no copy, so that the next client
                would inherit it.
        """

    @abstractmethod
    def leave(self) -> None:
        """Discards the group, which will not be finished."""

    def end_round(self, params: Tree, buffers: Tree, schedule_end: ScheduleEnd | None) -> None:
        """Loads the new global model.

        Args:
            params: The new global parameters.
            buffers: The new shared buffers.
            schedule_end: The progress of the schedules on the client with the most steps. None: back to the start.
        """
        # A group may still be in training where a round is abandoned, and its tensors may be in the optimizers.
        self.leave()
        # First, because a module may have replaced buffers, into which the new values are loaded.
        self.isolation.end_round()
        start = self.round_start
        load(self.tensors.params, params)
        load(self.tensors.buffers, buffers)
        # Between rounds the module holds the common start values, not those of the client that was trained last.
        load(self.tensors.personal, start.personal)
        self.put_back()
        self.optimizers.end_round(schedule_end)

    def put_back(self, also_alone: bool = False, whole: bool = True) -> None:
        """Restores what training has changed in the module beside the tensors that :meth:`start` loads.

        Args:
            also_alone: Whether to restore it also where the federation has one client only, which may keep it.
            whole: Whether each frozen parameter is compared as a whole.
        """
        if also_alone or not self.is_alone:
            self.tensors.still.put_back(whole, self.moved)
            if self._marks is not None:
                self.isolation.changed |= self._marks.put_back()

    def all_moved(self) -> list[str]:
        """The frozen parameters that the round's clients have written to, after a comparison of each as a whole."""
        if not self.is_alone:
            self.moved.update(self.tensors.still.put_back())
        return sorted(self.moved)

    def seed(self, seed: int) -> None:
        """Seeds the random generators that the module holds, once a client has been started."""
        self.isolation.seed(seed)

    # ---- parts

    def _enter(self) -> None:
        """Puts the module into the state of the round's start, except for the tensors that :meth:`start` loads."""
        if self.is_shared:
            schedulers = (schedule.scheduler for schedule in self.optimizers.schedules)
            self.isolation.start_client(self.tensors.all.values(), [*self.optimizers.optimizers, *schedulers])
        if self._marks is None:
            self._marks = ParameterMarks(self.module.named_parameters(), looks_at_hooks=not self.within.is_spread)
        self.put_back(whole=False)

    def _personal_of(self, client_state: Mapping[str, Tree]) -> Tree:
        """The client's personal tensors; what its state lacks, as a tensor unfrozen since then, has its start value."""
        own = client_state.get("personal", {})
        return {name: own.get(name, start) for name, start in self.round_start.personal.items()}

    def _contributions(self, stacked: Tree) -> Tree:
        start = self.round_start
        if self.start_buffers is start.buffers:
            return contributions(stacked, start.buffers, start.counts_known)
        # Which elements count as a change and which as a value is the same for all updates of a round.
        before = {name: where_both_finite(old, start.buffers[name]) for name, old in self.start_buffers.items()}
        return contributions(stacked, before, start.counts_known)

    @property
    def round_start(self) -> RoundStart:
        """The values with which the clients of the current round start."""
        assert self._round_start is not None, "begin_round has not been called"
        return self._round_start

    def state_of_start(self, params: Tree) -> Tree:
        """The module's tensors as they were at the round's start, under each of their names.

        Args:
            params: The global parameters of the round's start.
        """
        start = self.round_start
        own = {**self.tensors.params, **self.tensors.buffers, **self.tensors.personal}
        values = {**params, **start.buffers, **start.personal}
        found = {id(tensor): cast_like(values[name], tensor).clone() for name, tensor in own.items()}
        aliases = chain(
            self.module.named_parameters(remove_duplicate=False), self.module.named_buffers(remove_duplicate=False)
        )
        return {name: found[id(tensor)] for name, tensor in aliases if id(tensor) in found}

    @property
    def tensors(self) -> FederatedTensors:
        """The module's tensors, by their role in the federation."""
        return self.round_start.tensors

    @property
    def moving(self) -> Collection[str]:
        """Names of the frozen parameters that the current round may move; none before the first."""
        return () if self._round_start is None else self.tensors.moving.keys()

    @property
    def device(self) -> torch.device:
        """The device of the module's parameters."""
        return next(self.module.parameters()).device

    @property
    def _compares(self) -> bool:
        """Whether to compare all frozen parameters as a whole after a client, which takes long for large ones.

        What writes to them does so for each client as a rule, so that the round's first client shows it.
        """
        return self.is_private or not self._is_compared

    def _note_moved(self) -> None:
        """Notes which frozen parameters the client has written to, and puts back those that are not averaged."""
        tensors, start = self.tensors, self.start_buffers
        self.moved |= {
            name
            for name, param in tensors.moving.items()
            if name not in self.moved and not is_same(local(param).detach(), start[name])
        }
        if self.is_alone and not self.is_private:
            return
        found = tensors.still.put_back(self._compares, self.moved)
        self._is_compared = True
        self.moved.update(found)
        lost = tensors.still.lost()
        if self.is_private and (found or lost):
            raise ValueError(
                f"Training has written to the frozen parameter {[*found, *lost][0]!r}, which is neither clipped nor "
                "noised, so under differential privacy it may not move: even its name would tell of the data. The run "
                "stops before anything of it is released. Keep training from writing to it; under ClientLevelDP what "
                "follows the training, such as a teacher, can be a buffer, which is clipped and noised."
            )
        if lost:
            raise ValueError(
                f"The frozen parameter {lost[0]!r} was changed during local training, so one client's value would "
                "reach the next, and there is no copy of it, because the frozen parameters are much larger than the "
                "trainable ones. Let training change smaller tensors, or keep it from writing to this one."
            )

    def _forward(self, batch: Any, position: BatchPosition) -> tuple[Tensor | None, Tensor | None]:
        """The loss to be differentiated, and that of each client; both are the same for a client alone."""
        assert self.functions is not None
        with self.functions.context():
            loss = loss_of(self.functions.training_step(batch, position.offset))
        return loss, loss


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a ``training_step`` has returned; None if the batch is to be skipped.

    Raises:
        ValueError: If it returned something else.
    """
    if isinstance(output, Tensor):
        return output
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor) or output is None:
        return loss
    found = f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        found = f"a mapping whose 'loss' is {loss!r}" if "loss" in output else "a mapping without the entry 'loss'"
    raise ValueError(
        f"training_step returned {found}; expected a tensor, a mapping with a tensor as 'loss', or None to skip the "
        "batch."
    )


def transform_gradients(
    transform: GradTransform, params: Mapping[str, Tensor], optimizer: Optimizer, frozen: Collection[int] = ()
) -> None:
    """Replaces the gradients of those of ``params`` that ``optimizer`` steps by ``transform(grads, params)``.

    Args:
        transform: The transform. Its ``grads`` have an entry for each parameter with a gradient, ``params`` one for
            each that is trained; a parameter without a gradient gets one if the transform returns it.
        params: The shared parameters.
        optimizer: The optimizer that is about to step.
        frozen: ``id`` of the parameters that the current phase does not train.
    """
    # With several optimizers, gradients of the others must not be corrected once for each of them.
    stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}.difference(frozen)
    trained = {
        name: param
        for name, param in params.items()
        if id(param) in stepped and (param.grad is not None or param.requires_grad)
    }
    # It refuses dense gradients, which a correction of every element gives.
    if trained and type(optimizer) is torch.optim.SparseAdam:
        raise ValueError(
            f"The algorithm adds a correction to the sparse gradient of {next(iter(trained))!r}, which makes it dense, "
            "and torch.optim.SparseAdam takes sparse gradients only. Use torch.optim.SGD or Adagrad, an embedding with "
            "sparse=False, or fedavg."
        )
    found = {name: param.grad for name, param in trained.items() if param.grad is not None}
    grads = {name: grad.to_dense() if grad.is_sparse else local(grad) for name, grad in found.items()}
    transformed = transform(grads, {name: local(param).detach() for name, param in trained.items()})
    try:
        for name, grad in transformed.items():
            param = params[name]
            # A correction in float32 promotes gradients in half precision, and torch refuses one of another dtype.
            if is_spread(param):
                param.grad = torch.zeros_like(param) if param.grad is None else param.grad
                local(param.grad).copy_(grad)
            else:
                param.grad = grad.to(param.dtype)
    except (AttributeError, KeyError, RuntimeError) as error:
        shapes = {name: tuple(param.shape) for name, param in trained.items()}
        raise ValueError(
            f"The algorithm's grad_transform returned {_in_words(transformed)}; expected a dict of gradients like the "
            f"parameters, {shapes}. It failed with {type(error).__name__}: {error}"
        ) from error


def _in_words(gradients: object) -> str:
    """The kind of an object; of a dict of tensors, their shapes."""
    if not isinstance(gradients, Mapping):
        return type(gradients).__name__
    return str({name: tuple(getattr(grad, "shape", ())) for name, grad in gradients.items()})


def trained_value(param: Tensor, start: Tensor) -> Tensor:
    """The trained parameter in the dtype of ``start``, of which only what training has changed counts."""
    if param.dtype == start.dtype:
        return param.clone()
    # The module started from `start` rounded to its own dtype. The difference to that rounded value leaves a client
    # that has not trained exactly at `start`.
    return start + (param.to(start.dtype) - start.to(param.dtype).to(start.dtype))
