"""AFL: the model that is best for the worst mixture of the clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_fl.algorithms.base import Algorithm, ProbeKind, Weighting, check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, scalar_like, scale, subtract
from lightning_fl.types import Aggregate, Context, LocalRun, State, Tree, Update


@register("afl")
@dataclass(frozen=True)
class AFL(Algorithm):
    r"""AFL: federated averaging with weights that move to the clients with the largest loss.

    .. math::
        \min_x \max_{\lambda \in \Delta} \sum_i \lambda_i F_i(x): \qquad
        x \leftarrow x + \eta_s \frac{\sum_i \lambda_i (y_i - x)}{\sum_i \lambda_i}, \qquad
        \lambda \leftarrow \Pi_\Delta \big( \lambda + \gamma F(x) \big)

    :math:`\Pi_\Delta` projects onto the simplex, and both steps are from the round's start. Each client measures its
    mean loss :math:`F_i(x)` in an additional pass over its data at the global model. The paper takes one gradient step
    a round; ``local_steps=1`` is that. A client that does not take part counts with a loss of 0. The server learns each
    client's loss, also beside a secure sum.

    Args:
        mixture_lr: The step :math:`\gamma` of the mixture. Default 0.01. Too large, model and mixture chase each other.
        server_lr: The server's step :math:`\eta_s`. Default 1.

    Raises:
        ValueError: If ``mixture_lr`` is negative.

    Reference:
        Mohri, Sivek and Suresh, "Agnostic Federated Learning", ICML 2019.
    """

    mixture_lr: float = 0.01
    server_lr: float = 1.0

    weighting: ClassVar[Weighting] = "uniform"
    probe: ClassVar[ProbeKind | None] = "loss"
    knows_index: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_hyperparameter(self, "mixture_lr", self.mixture_lr >= 0, "a number that is not negative")

    def server_init(self, params: Tree, population: int) -> State:
        device = next(iter(params.values())).device
        mixture = torch.full((population,), 1 / population, dtype=torch.float64, device=device)
        return {"params": params, "mixture": mixture}

    def aux_like(self, params: Tree) -> Mapping[str, Tree]:
        return {"mixture": {"sum": scalar_like(params).double()}}

    def aux_of_clients(self, population: int) -> Mapping[str, Tree]:
        return {"losses": {"of_each": torch.zeros(population, dtype=torch.float64)}}

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        losses = torch.zeros_like(server["mixture"])
        losses[server["index"]] = probe
        return {"params": server["params"], "share": server["mixture"][server["index"]], "losses": losses}

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        # The aggregator multiplies by the client's weight, which is not to count here.
        delta = scale(subtract(params, ctx["params"]), float(ctx["share"]) / (run.weight or 1.0))
        return Update(delta=delta, aux={"mixture": {"sum": ctx["share"]}, "losses": {"of_each": ctx["losses"]}}), client

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        total, losses = float(aggregate.aux["mixture"]["sum"]), aggregate.aux["losses"]["of_each"]
        params = server["params"]
        if total > 0:  # of a sampled cohort none may count
            params = add(params, aggregate.delta, alpha=self.server_lr / total)
        return {"params": params, "mixture": onto_simplex(server["mixture"] + self.mixture_lr * losses)}


def onto_simplex(values: Tensor) -> Tensor:
    r"""The nearest point of the simplex :math:`\{\lambda \ge 0, \sum \lambda = 1\}`, for a vector ``[n]``."""
    ordered = values.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1) / torch.arange(1, len(values) + 1, device=values.device)
    last = int((ordered > excess).nonzero()[-1])
    return (values - excess[last]).clamp(min=0)
