"""AFL: minimises the loss of the worst-case mixture of the clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_fl.algorithms.base import Algorithm, AuxRole, ProbeKind, Weighting, check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, scalar_like, scale, subtract
from lightning_fl.types import Aggregate, Context, LocalRun, State, Tree, Update


@register("afl")
@dataclass(frozen=True)
class AFL(Algorithm):
    r"""AFL: federated averaging whose weights shift towards the clients with the largest loss.

    .. math::
        \min_x \max_{\lambda \in \Delta} \sum_i \lambda_i F_i(x): \qquad
        x \leftarrow x + \eta_s \frac{\sum_i \lambda_i (y_i - x)}{\sum_i \lambda_i}, \qquad
        \lambda \leftarrow \Pi_\Delta \big( \lambda + \gamma F(x) \big)

    :math:`\Pi_\Delta` projects onto the simplex, and both steps use the values at the start of the round. Each client
    measures its mean loss :math:`F_i(x)` in an additional pass over its data at the global model. The paper takes one
    gradient step per round, which is ``local_steps=1``. A client that does not take part counts with a loss of 0. The
    server learns each client's loss, even with secure aggregation.

    Args:
        mixture_lr: The learning rate :math:`\gamma` of the mixture. Default 0.01. If it is too large, model and mixture
            oscillate.
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.

    Raises:
        ValueError: If ``mixture_lr`` is negative.

    Reference:
        Mohri, Sivek and Suresh, "Agnostic Federated Learning", ICML 2019.
    """

    mixture_lr: float = 0.01
    server_lr: float = 1.0

    weighting: ClassVar[Weighting] = "uniform"
    probe: ClassVar[ProbeKind | None] = "loss"
    aux_role: ClassVar[AuxRole] = "divisor"
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
        # Cancels the client's weight, by which the aggregator multiplies.
        delta = scale(subtract(params, ctx["params"]), float(ctx["share"]) / (run.weight or 1.0))
        return Update(delta=delta, aux={"mixture": {"sum": ctx["share"]}, "losses": {"of_each": ctx["losses"]}}), client

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        total, losses = float(aggregate.aux["mixture"]["sum"]), aggregate.aux["losses"]["of_each"]
        params = server["params"]
        if total > 0:  # in a sampled cohort, every client may have a weight of 0
            params = add(params, aggregate.delta, alpha=self.server_lr / total)
        return {"params": params, "mixture": onto_simplex(server["mixture"] + self.mixture_lr * losses)}


def onto_simplex(values: Tensor) -> Tensor:
    r"""The nearest point of the simplex :math:`\{\lambda \ge 0, \sum \lambda = 1\}`, for a vector ``[n]``."""
    ordered = values.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1) / torch.arange(1, len(values) + 1, device=values.device)
    last = int((ordered > excess).nonzero()[-1])
    return (values - excess[last]).clamp(min=0)
