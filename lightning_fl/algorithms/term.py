"""TERM: tilted losses, for fairness or robustness to outliers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lightning_fl.algorithms.base import Algorithm, ProbeKind
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, scalar_like, scale, subtract
from lightning_fl.types import Aggregate, Context, LocalRun, State, Tree, Update

LARGEST = 50.0
"""Bound of the exponents: beyond it a client's share is practically 0 or 1."""


@register("term")
@dataclass(frozen=True)
class TERM(Algorithm):
    r"""TERM: clients are weighted by the exponential of their tilted loss, for fairness or against outliers.

    .. math::
        \min_x \frac{1}{t} \log \sum_i p_i e^{t F_i(x)}: \qquad
        x \leftarrow x + \eta_s \frac{\sum_i p_i e^{t F_i} (y_i - x)}{\sum_i p_i e^{t F_i}}, \qquad F_i = F_i(x)

    As ``t`` goes to infinity only the largest loss counts; with ``t`` below 0 clients with a large loss count less.
    Each client measures its mean loss in an additional pass over its data at the global model. The tilted loss of the
    last round is subtracted from the exponents, which leaves the shares unchanged and prevents overflow.

    Args:
        t: The tilt :math:`t`, in units of 1 / loss. Default 1; 0 is FedAvg, and the paper uses -2 to 50.
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.

    Raises:
        ValueError: If ``t`` is not finite.

    Reference:
        Li et al., "Tilted Empirical Risk Minimization", ICLR 2021.
    """

    t: float = 1.0
    server_lr: float = 1.0

    probe: ClassVar[ProbeKind | None] = "loss"
    client_keys: ClassVar[tuple[str, ...]] = ("params", "shift")

    def __post_init__(self) -> None:
        if not math.isfinite(self.t):
            raise ValueError(f"TERM got t={self.t}; expected a finite number.")

    def server_init(self, params: Tree, population: int) -> State:
        return {"params": params, "shift": scalar_like(params).double()}

    def aux_like(self, params: Tree) -> Mapping[str, Tree]:
        return {"divisor": {"sum": scalar_like(params)}}

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        return {"params": server["params"], "exponent": self.t * probe - server["shift"].to(probe.device)}

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        factor = math.exp(min(LARGEST, max(-LARGEST, float(ctx["exponent"]))))
        divisor = scalar_like(params, run.weight * factor)
        return Update(delta=scale(subtract(params, ctx["params"]), factor), aux={"divisor": {"sum": divisor}}), client

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        divisor = aggregate.aux["divisor"]["sum"].double()
        shift = server["shift"] + torch.log(divisor / aggregate.weight)
        params = add(server["params"], aggregate.delta, alpha=self.server_lr / float(divisor))
        return {"params": params, "shift": shift}
