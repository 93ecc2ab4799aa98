"""Calls the algorithm for the clients of a group: contexts, gradients, updates and states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from lightning_fl.engines import LocalResult
from lightning_fl.engines.local_trainer import GradTransform
from lightning_fl.engines.vectorized.stacking import NotStackable, part, stack
from lightning_fl.federation.checks import check_context, check_finished
from lightning_fl.federation.settings import FederationSettings
from lightning_fl.torch_internals import pytree
from lightning_fl.types import ClientId, Context, GradientAt, LocalRun, Phase, State, Tree, Update

Transform = Callable[[Tree, Tree, Context], Tree]


class GroupTransform:
    """The transform of the gradients of the clients that train in a step.

    Args:
        group: Selects these clients, from step to step.
        run: Maps gradients, parameters and contexts to gradients; all are stacked, unless the group is a client alone.
        reads_more: Whether it looks at more than these.
    """

    def __init__(self, group: ClientGroup, run: Transform, reads_more: bool) -> None:
        self._group = group
        self._run = run
        self._reads_more = reads_more

    def __call__(self, grads: Tree, params: Tree) -> Tree:
        # Read when it is called, because `select` replaces it from step to step.
        return self._run(grads, params, self._group.selected)

    @property
    def context(self) -> Context | None:
        """What it reads beside gradients and parameters; None if that is not all."""
        return None if self._reads_more else self._group.selected


@dataclass(frozen=True)
class GroupUpdate:
    """What a client group contributes to a round.

    Args:
        updates: The clients' updates, each tensor stacked, ``[num_clients, ...]``; ``weights`` replaces their
            ``weight``.
        weights: The clients' weights.
        client_states: The states to store until the clients' next round, each tensor stacked; empty if there are none.
    """

    updates: Update
    weights: Sequence[float]
    client_states: Mapping[str, Any]

    def update_of(self, index: int) -> Update:
        """The update of the client at ``index``."""
        return replace(self.updates.part(index), weight=self.weights[index])

    def state_of(self, index: int) -> dict[str, Any]:
        """The state to store for the client at ``index``."""
        state: dict[str, Any] = part(dict(self.client_states), index)
        return state


class ClientGroup:
    """Clients that train side by side; a client alone is a group of one.

    The algorithm's methods are written for one client. For several they run under ``torch.func.vmap`` on stacked
    tensors.

    Args:
        settings: The federation's settings.
        server: The algorithm's server state.
        clients: The clients.
        client_states: Each client's state from its last round.
        probe: What the algorithm's ``probe`` has measured; only for a client alone.
        version: The round with whose first model the clients start. None: the present one.
        number: How many other visits of these clients in the round come before.
        stacked: Whether the tensors of a client alone are stacked too.

    Raises:
        NotStackable: If the contexts that the algorithm returns for the clients can't be stacked.
    """

    def __init__(
        self,
        settings: FederationSettings,
        server: State,
        clients: Sequence[ClientId],
        client_states: Sequence[Mapping[str, Any]],
        probe: Any = None,
        version: int | None = None,
        number: int = 0,
        stacked: bool = False,
    ) -> None:
        self.settings = settings
        self.version = version
        self.number = number
        self.algorithm = settings.algorithm
        self.clients = tuple(clients)
        self.client_states = list(client_states)
        states = [state.get("algorithm") for state in client_states]
        # Called client by client: `stack` then recognizes tensors that are the same object for all, such as the global
        # model, and shares them instead of copying them for each client.
        self._contexts = [
            check_context(
                self.algorithm,
                self.algorithm.client_init(self._server_of(client, server), state, probe),
                server["params"],
            )
            for client, state in zip(self.clients, states, strict=True)
        ]
        self._algorithm_states = states
        self._stacked: Any = self._contexts[0]
        self._dims: Any = None
        self._is_stacked = stacked or len(clients) > 1
        if self._is_stacked:
            self._stacked, self._dims = stack(self._contexts)
        self._selected = self._stacked
        self._mask = tuple(range(len(clients)))

    def _server_of(self, client: ClientId, server: State) -> State:
        if not self.algorithm.knows_index:
            return server
        return {**server, "index": self.settings.clients.index(client)}

    @property
    def starts(self) -> list[Tree]:
        """The parameters from which the clients start."""
        return [context["params"] for context in self._contexts]

    @property
    def context(self) -> Context:
        """The context of a client alone, or those of several, stacked."""
        context: Context = self._stacked
        return context

    def select(self, mask: Sequence[int]) -> None:
        """Restricts :meth:`grad_transform` to the clients at the positions ``mask``, which train in the next step."""
        if tuple(mask) != self._mask:
            index = list(mask)
            self._mask = tuple(mask)
            self._selected = pytree.tree_map(lambda x, dim: x if dim is None else x[index], self._stacked, self._dims)

    @property
    def selected(self) -> Context:
        """The contexts of the clients that train in the next step, stacked."""
        selected: Context = self._selected
        return selected

    def grad_transform(self, phase: Phase, gradient_at: GradientAt | None = None) -> GradTransform | None:
        """The transform of the gradients in a phase; None if they stay as they are.

        Args:
            phase: The phase.
            gradient_at: What an algorithm that ``needs_gradient_at`` finds in its context under this name.
        """
        transform = phase.grad_transform
        if transform is None and self.settings.transforms_gradients:
            transform = self.algorithm.grad_transform
        if transform is None:
            return None
        if self.algorithm.needs_gradient_at:
            transform = _with_entry(transform, "gradient_at", gradient_at)
        run = vmap(transform, in_dims=(0, 0, self._dims)) if self._is_stacked else transform
        fits = _with_zeros if self.algorithm.adds_to_gradients else _with_gradients
        reads_more = self.algorithm.needs_gradient_at
        return GroupTransform(self, lambda grads, params, ctx: run(*fits(grads, params), ctx), reads_more)

    def finish(self, result: LocalResult, runs: Sequence[LocalRun]) -> GroupUpdate:
        """Calls the algorithm's ``client_finish`` for each client.

        Args:
            result: The result of the group's local training.
            runs: The facts of each client's training.
        """
        updates, algorithm_states = self._finish(result.params, runs)
        client_states: dict[str, Any] = dict(result.client_state)
        if algorithm_states is not None:
            client_states["algorithm"] = algorithm_states
        # Buffers bypass the algorithm: they are always averaged, and no algorithm's correction is meant for them.
        updates = Update(updates.delta, result.buffers, aux=updates.aux)
        return GroupUpdate(updates, [run.weight for run in runs], client_states)

    def _finish(self, params: Tree, runs: Sequence[LocalRun]) -> tuple[Update, State | None]:
        if len(runs) == 1:
            return self._finish_alone(params, runs[0])
        # Under vmap `client_finish` runs once, so a Python number in its facts can have one value only.
        if any(_work_of(run) != _work_of(runs[0]) for run in runs[1:]):
            return self._finish_each(params, runs)
        try:
            stateless = all(state is None for state in self._algorithm_states)
            state, state_dims = (None, None) if stateless else stack(self._algorithm_states)
            return self._finish_at_once(params, state, state_dims, runs)
        except (NotStackable, RuntimeError):  # RuntimeError: vmap has no rule for what `client_finish` does
            return self._finish_each(params, runs)

    def _checked(self, params: Tree, context: Context, state: Any, run: LocalRun) -> tuple[Update, State | None]:
        return check_finished(self.algorithm, self.algorithm.client_finish(params, context, state, run))

    def _finish_at_once(
        self, params: Tree, state: Any, state_dims: Any, runs: Sequence[LocalRun]
    ) -> tuple[Update, State | None]:
        keeps_state = False

        def finish(params: Tree, context: Any, state: Any, loss: Tensor) -> tuple[Tree, dict[str, Tree], Any]:
            nonlocal keeps_state
            update, own = self._checked(params, context, state, replace(runs[0], loss=loss))  # type: ignore[arg-type]
            keeps_state = own is not None
            # vmap refuses None as an output; the empty tree stands for a client without state.
            return update.delta, dict(update.aux), own if keeps_state else {}

        # Losses differ between clients in any case, so they enter as a tensor; float64 keeps the precision of a Python
        # float.
        losses = torch.tensor([run.loss for run in runs], dtype=torch.float64)
        delta, aux, states = vmap(finish, in_dims=(0, self._dims, state_dims, 0))(params, self._stacked, state, losses)
        return Update(delta=delta, aux=aux), states if keeps_state else None

    def _finish_each(self, params: Tree, runs: Sequence[LocalRun]) -> tuple[Update, State | None]:
        updates, states = [], []
        for index, (context, state, run) in enumerate(zip(self._contexts, self._algorithm_states, runs, strict=True)):
            update, own = self._checked(part(params, index), context, state, run)
            updates.append((update.delta, dict(update.aux)))
            states.append(own)
        # Not shared: the aggregator expects the client dimension in every tensor, also if all clients return the same
        # object.
        (delta, aux), _ = stack(updates, share=False)
        return Update(delta=delta, aux=aux), None if states[0] is None else stack(states, share=False)[0]

    def _finish_alone(self, params: Tree, run: LocalRun) -> tuple[Update, State | None]:
        own_params = {name: tensor[0] for name, tensor in params.items()}
        update, state = self._checked(own_params, self._contexts[0], self._algorithm_states[0], run)
        aux = {name: _as_stack(tree) for name, tree in update.aux.items()}
        return Update(delta=_as_stack(update.delta), aux=aux), None if state is None else _as_stack(state)


def _with_zeros(grads: Tree, params: Tree) -> tuple[Tree, Tree]:
    """The same with a gradient of 0 for each parameter that has none."""
    if len(grads) == len(params):
        return grads, params
    # Without it a correction that all clients share would be left out where a client does not use a parameter, and the
    # algorithm would take what it has left out for a gradient.
    return {n: grads[n] if n in grads else torch.zeros_like(param) for n, param in params.items()}, params


def _with_gradients(grads: Tree, params: Tree) -> tuple[Tree, Tree]:
    """The same with the parameters that have a gradient only."""
    return grads, params if len(grads) == len(params) else {name: params[name] for name in grads}


def _with_entry(transform: Transform, name: str, value: Any) -> Transform:
    # Added here and not to the contexts: under vmap these hold tensors only.
    return lambda grads, params, ctx: transform(grads, params, {**ctx, name: value})


def _work_of(run: LocalRun) -> tuple[Any, ...]:
    """The facts that clients must share for `client_finish` to run on all of them at once."""
    return run.num_steps, run.num_examples, run.weight, run.normalizer, run.lr_sum


def _as_stack(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with a client dimension of size 1: views, where ``stack`` would copy the model."""
    return {name: value[None] if isinstance(value, Tensor) else _as_stack(value) for name, value in tree.items()}
