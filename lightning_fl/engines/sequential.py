"""Trains clients one after the other on the user's own module; works for any module."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_fl.engines.local_trainer import (
    ONE_PHASE,
    ClientFacts,
    GradTransform,
    LocalResult,
    LocalTrainer,
    trained_value,
    transform_gradients,
)
from lightning_fl.engines.phases import LocalPhases
from lightning_fl.engines.spread import locals_of
from lightning_fl.engines.tensors import clones, load
from lightning_fl.types import Context, Phase, Tree


class SequentialEngine(LocalTrainer):
    """Switches one module and its optimizers from client to client; see :class:`LocalTrainer` for the arguments."""

    _phases: LocalPhases | None = None
    """The client's training so far; None between clients."""
    _common: Tree | None = None
    """The common values of frozen parameters that hold the client's own."""

    def start(
        self,
        starts: Sequence[Tree],
        client_states: Sequence[Mapping[str, Tree]],
        phase: Phase = ONE_PHASE,
        grad_transform: GradTransform | None = None,
    ) -> None:
        (params,), (client_state,) = starts, client_states
        self._enter()
        round_start, tensors = self.round_start, self.tensors
        personal = self._personal_of(client_state)
        load(tensors.params, params)
        load(tensors.buffers, self.start_buffers)
        load(tensors.personal, personal)
        self._lend(tensors.personal_frozen, client_state.get("personal", {}))
        # No copies are needed: the phases copy the values into the module when they load them.
        own_model = {**params, **self.start_buffers, **round_start.personal, **client_state.get("personal", {})}
        self._phases = LocalPhases(tensors, params, client_state, own_model)
        self._start_phase(phase, grad_transform)

    def next_phase(
        self, phase: Phase, grad_transform: GradTransform | None = None, context: Context | None = None
    ) -> None:
        self._end_phase()
        self._start_phase(phase, grad_transform)
        if phase.start is not None:
            self.phases.start_at(phase.start, context or {})

    def _start_phase(self, phase: Phase, grad_transform: GradTransform | None) -> None:
        self.phases.start(phase)
        # After the phase has been started, because each phase has an optimizer state of its own.
        self.optimizers.restart(self.phases.client_state.get(self.phases.optimizer_entry))
        self.grad_transform = grad_transform

    def _end_phase(self) -> None:
        self.phases.end(self.optimizers, keep=self.client_optimizer == "keep")

    @property
    def phases(self) -> LocalPhases:
        """The phases of the client that is being trained."""
        assert self._phases is not None, "no client has been started"
        return self._phases

    @property
    def shared_params(self) -> Mapping[str, Tensor]:
        return self.tensors.params

    def prepare_gradients(self, optimizer: Optimizer) -> None:
        # None while the subclass trains several clients in one step, which has no phases.
        frozen: Collection[int] = ()
        if self._phases is not None:
            self._phases.mask_frozen_grads(optimizer)
            frozen = self._phases.frozen
        if self.grad_transform is not None:
            transform_gradients(self.grad_transform, self.shared_params, optimizer, frozen)

    def finish(self, num_steps: Sequence[int] | None = None) -> LocalResult:
        tensors, phases = self.tensors, self.phases
        self.within.join_buffers({**tensors.buffers, **tensors.personal_buffers})
        self._end_phase()
        own_model = phases.restore_global_model()
        lent = self._take_back()
        # Before anything is read: a result of parameters that must not have changed would be wrong.
        self._note_moved()
        client_state: dict[str, Tree] = dict(phases.next_state)
        if self.personal or own_model:
            # The next client will overwrite the module's personal tensors; the own model was copied when it left the
            # module.
            client_state["personal"] = {**lent, **(own_model or clones(tensors.personal))}
        facts = ClientFacts(
            phases.num_steps, phases.lr_sum, phases.normalizer, phases.schedule_end, phases.num_steps_of_all
        )
        # Indexing with None gives a client dimension without the copy that stacking would make.
        result = LocalResult(
            params={
                n: trained_value(p.detach(), phases.start_params[n])[None] for n, p in locals_of(tensors.params).items()
            },
            buffers=self._contributions({name: buffer[None] for name, buffer in tensors.buffers.items()}),
            client_state={key: {n: t[None] for n, t in tree.items()} for key, tree in client_state.items()},
            facts=[facts],
        )
        self.leave()
        return result

    def _lend(self, frozen: Tree, own: Tree) -> None:
        """Loads the client's own values of frozen parameters that were trained in an earlier round."""
        kept = {name: tensor for name, tensor in frozen.items() if name in own}
        self._common = clones(kept)
        load(kept, own)

    def _take_back(self) -> Tree:
        """Restores their common values; returns the client's own."""
        common, self._common = self._common or {}, None
        tensors = {name: self.tensors.personal_frozen[name] for name in common}
        own = clones(tensors)
        load(tensors, common)
        return own

    def leave(self) -> None:
        if self._common is not None:
            self._take_back()
        self._phases = self.batch = None
        self.grad_transform = None
