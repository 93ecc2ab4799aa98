"""The algorithm's side of clients that train together in a round: contexts, gradients and states side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from lightning_fl.algorithms import Algorithm
from lightning_fl.engines.vectorized.stacking import NotStackable, part, stack
from lightning_fl.types import ClientId, LocalRun, State, Tree, Update


class ClientGroup:
    """Clients that train together.

    Args:
        algorithm: The mathematics; its methods are those for one client, here under ``torch.func.vmap``.
        server: The server's state.
        clients: The clients.
        kept: What each of them has kept from its last round.

    Raises:
        NotStackable: If the algorithm gives the clients contexts that can't stand side by side.
    """

    def __init__(
        self, algorithm: Algorithm, server: State, clients: Sequence[ClientId], kept: Sequence[Mapping[str, Any]]
    ) -> None:
        self.algorithm = algorithm
        self.clients = list(clients)
        self.kept = list(kept)
        self._states = [own.get("algorithm") for own in kept]
        self._contexts = [algorithm.client_init(server, state) for state in self._states]
        self._context, self._dims = stack(self._contexts)
        self._chosen = self._context
        self._rows: Sequence[int] = tuple(range(len(self.clients)))

    def choose(self, rows: Sequence[int]) -> None:
        """Lets only the clients at ``rows`` train in the next step."""
        if rows != self._rows:
            index = list(rows)
            self._rows = rows
            self._chosen = pytree.tree_map(lambda x, dim: x if dim is None else x[index], self._context, self._dims)

    @property
    def starts(self) -> list[Tree]:
        """The parameters from which the clients start."""
        return [context["params"] for context in self._contexts]

    @property
    def transform_grads(self) -> Callable[[Tree, Tree], Tree]:
        """The algorithm's ``grad_transform`` on stacked gradients and parameters."""
        run = vmap(self.algorithm.grad_transform, in_dims=(0, 0, self._dims))
        return lambda grads, params: run(grads, params, self._chosen)

    def finish(self, params: Tree, runs: Sequence[LocalRun]) -> tuple[Update, State | None]:
        """The algorithm's ``client_finish``: stacked updates, and stacked states or None if clients keep none.

        Args:
            params: The trained parameters, stacked.
            runs: The facts of each client's training.
        """
        if any(replace(run, loss=0.0) != replace(runs[0], loss=0.0) for run in runs):
            return self._finish_each(params, runs)
        try:
            state, state_dims = stack(self._states)
            return self._finish_at_once(params, state, state_dims, runs)
        except (NotStackable, RuntimeError):
            return self._finish_each(params, runs)

    def _finish_at_once(
        self, params: Tree, state: Any, state_dims: Any, runs: Sequence[LocalRun]
    ) -> tuple[Update, State | None]:
        keeps_state = False

        def finish(params: Tree, context: Any, state: Any, loss: Tensor) -> tuple[Tree, dict[str, Tree], Any]:
            nonlocal keeps_state
            update, own = self.algorithm.client_finish(params, context, state, replace(runs[0], loss=loss))  # type: ignore[arg-type]
            keeps_state = own is not None
            return update.delta, dict(update.aux), own if keeps_state else {}

        losses = torch.tensor([run.loss for run in runs], dtype=torch.float64)
        delta, aux, states = vmap(finish, in_dims=(0, self._dims, state_dims, 0))(params, self._context, state, losses)
        return Update(delta=delta, aux=aux), states if keeps_state else None

    def _finish_each(self, params: Tree, runs: Sequence[LocalRun]) -> tuple[Update, State | None]:
        updates, states = [], []
        for index, (context, state, run) in enumerate(zip(self._contexts, self._states, runs, strict=True)):
            update, own = self.algorithm.client_finish(part(params, index), context, state, run)
            updates.append((update.delta, dict(update.aux)))
            states.append(own)
        (delta, aux), _ = stack(updates, share=False)
        return Update(delta=delta, aux=aux), None if states[0] is None else stack(states, share=False)[0]
