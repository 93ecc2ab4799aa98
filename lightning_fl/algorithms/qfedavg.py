"""q-FedAvg: fairness by giving more weight to clients with a larger loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_fl.algorithms.base import Algorithm, AuxRole, ProbeKind, check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, scalar_like, scale, squared_norm, subtract
from lightning_fl.types import Aggregate, Context, LocalRun, State, Tree, Update


@register("qfedavg")
@dataclass(frozen=True)
class QFedAvg(Algorithm):
    r"""q-FedAvg: clients with a larger loss count more, so that the clients' losses become more equal.

    .. math::
        \min_x \sum_i \frac{p_i}{q + 1} F_i(x)^{q + 1}: \qquad
        x \leftarrow x + \frac{\sum_i p_i F_i^q (y_i - x)}
        {\sum_i p_i \left( F_i^q + q F_i^{q-1} L \lVert y_i - x \rVert^2 \right)}, \qquad F_i = F_i(x)

    This is the paper's step with numerator and denominator divided by :math:`L`. Each client measures its mean loss
    :math:`F_i(x)` in an additional pass over its data at the global model. The paper samples clients by size
    :math:`p_i` and sums uniformly; here clients are sampled uniformly and weighted by their examples, which has the
    same expectation. Flower uses the evaluation loss instead of the training loss, and one fixed :math:`L`.

    Args:
        q: The weight of fairness. Default 1; 0 is FedAvg, and the paper uses 0.001 to 5, depending on the data set.
        lipschitz: The Lipschitz constant :math:`L` of the gradients. Default None: the inverse of the mean learning
            rate of the client's local steps, the paper's choice for plain SGD. Set it for other optimizers.

    Raises:
        ValueError: If ``q`` is negative or ``lipschitz`` is not positive; in training, if a client's loss is negative.

    Reference:
        Li et al., "Fair Resource Allocation in Federated Learning", ICLR 2020.
    """

    q: float = 1.0
    lipschitz: float | None = None

    probe: ClassVar[ProbeKind | None] = "loss"
    aux_role: ClassVar[AuxRole] = "divisor"

    def __post_init__(self) -> None:
        check_hyperparameter(self, "q", self.q >= 0, "a number that is not negative")
        check_hyperparameter(
            self, "lipschitz", self.lipschitz is None or self.lipschitz > 0, "None or a positive number"
        )

    def aux_like(self, params: Tree) -> Mapping[str, Tree]:
        return {"divisor": {"sum": scalar_like(params)}}

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        return {"params": server["params"], "loss": probe}

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        loss = float(ctx["loss"])
        if loss < 0:
            raise ValueError(
                f"q-FedAvg raises each client's loss to the power q={self.q}, and found the negative loss {loss:g}. "
                "Use a loss that is not negative, such as cross-entropy or a squared error, or another algorithm."
            )
        delta = subtract(params, ctx["params"])
        curvature = 0.0
        if self.q and run.num_steps and (lr := max(run.lr_sum.values()) / run.num_steps):
            lipschitz = self.lipschitz or 1 / lr
            # The bound keeps loss ** (q - 1) finite for q < 1 when a loss is 0.
            curvature = self.q * max(loss, 1e-10) ** (self.q - 1) * lipschitz * float(squared_norm(delta))
        divisor = scalar_like(params, run.weight * (loss**self.q + curvature))
        return Update(delta=scale(delta, loss**self.q), aux={"divisor": {"sum": divisor}}), client

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        divisor = float(aggregate.aux["divisor"]["sum"])
        if not divisor:  # all losses are 0: the optimum, and nothing to divide by
            return server
        return {**server, "params": add(server["params"], aggregate.delta, alpha=1 / divisor)}
