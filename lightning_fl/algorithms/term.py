"""TERM: tilted losses, for fairness or robustness to outliers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lightning_fl.algorithms.base import Algorithm, AuxRole, ProbeKind
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, scalar_like, scale, subtract, sum_dtype
from lightning_fl.types import Aggregate, Context, LocalRun, State, Tree, Update

MARGIN = 18.0
"""How far the tilt's exponents stay below the largest that their precision holds, for weights, changes and clients."""


@register("term")
@dataclass(frozen=True)
class TERM(Algorithm):
    r"""TERM: clients are weighted by the exponential of their tilted loss, for fairness or against outliers.

    .. math::
        \min_x \frac{1}{t} \log \sum_i p_i e^{t F_i(x)}: \qquad
        x \leftarrow x + \eta_s \frac{\sum_i p_i e^{t F_i} (y_i - x)}{\sum_i p_i e^{t F_i}}, \qquad F_i = F_i(x)

    As ``t`` goes to infinity only the largest loss counts; with ``t`` below 0 clients with a large loss count less.
    Each client measures its mean loss in an additional pass over its data at the global model. The tilted loss of the
    last round is subtracted from the exponents, which leaves the shares unchanged and prevents overflow. In the first
    round it is not known yet: there, clients with :math:`|t F_i|` beyond 70 in float32, or 690 in float64, count alike.

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
    aux_role: ClassVar[AuxRole] = "divisor"
    client_keys: ClassVar[tuple[str, ...]] = ("params", "shift")

    def __post_init__(self) -> None:
        if not math.isfinite(self.t):
            raise ValueError(f"TERM got t={self.t}; expected a finite number.")

    def server_init(self, params: Tree, population: int) -> State:
        return {"params": params, "shift": scalar_like(params).double()}

    def aux_like(self, params: Tree) -> Mapping[str, Tree]:
        return {"divisor": {"sum": scalar_like(params)}, "exponent": {"sum": scalar_like(params).double()}}

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        return {"params": server["params"], "exponent": self.t * probe - server["shift"].to(probe.device)}

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        exponent, largest = float(ctx["exponent"]), _largest(params)
        factor = math.exp(min(largest, max(-largest, exponent)))
        aux = {
            "divisor": {"sum": scalar_like(params, run.weight * factor)},
            "exponent": {"sum": scalar_like(params).double() + run.weight * exponent},
        }
        return Update(delta=scale(subtract(params, ctx["params"]), factor), aux=aux), client

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        divisor = aggregate.aux["divisor"]["sum"].double()
        tilted = torch.log(divisor / aggregate.weight)
        # The mean exponent is never above the tilted one, and closer to it where exponents were cut.
        mean = aggregate.aux["exponent"]["sum"] / aggregate.weight
        moved = torch.maximum(tilted, mean) if tilted > -0.99 * _largest(server["params"]) else mean
        params = add(server["params"], aggregate.delta, alpha=self.server_lr / float(divisor))
        return {"params": params, "shift": server["shift"] + moved}


def _largest(params: Tree) -> float:
    """The largest exponent, up to the sign: beyond it a client's share is as good as all or nothing."""
    return math.log(torch.finfo(sum_dtype(scalar_like(params).dtype)).max) - MARGIN
