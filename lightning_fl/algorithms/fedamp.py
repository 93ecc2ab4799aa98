"""FedAMP: one model per client, attracted to the models of similar clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fl.algorithms.base import check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.algorithms.replicas import Replicas, as_rows
from lightning_fl.tree import add, tree_map
from lightning_fl.types import Context, State, Tree


@register("fedamp")
@dataclass(frozen=True)
class FedAMP(Replicas):
    r"""FedAMP: each client trains its own model, pulled towards a mixture of the models that are similar to it.

    .. math::
        u_i &= \sum_j \xi_{ij} w_j, \qquad
        \xi_{ij} = \frac{\alpha}{\sigma} e^{-\lVert w_i - w_j \rVert^2 / \sigma} \; (j \ne i), \qquad
        \xi_{ii} = 1 - \sum_{j \ne i} \xi_{ij} \\
        w_i &\leftarrow \arg\min_w F_i(w) + \frac{\lambda}{2 \alpha} \lVert w - u_i \rVert^2

    The minimum is approximated by the round's local steps from :math:`w_i`. The more similar two models are, the more
    they attract each other, so that clusters form by themselves. The server sees each client's model, and holds two
    models per client.

    Args:
        sigma: The scale :math:`\sigma` of the squared distances within which models attract each other, in squared
            units of the parameters. Default 10.
        alpha: The step size :math:`\alpha` of the attraction. Default 1. The share of a client's own model in its
            mixture is at least :math:`1 - (n - 1) \alpha / \sigma`, which should be positive.
        lam: The strength :math:`\lambda` of the pull of a client's model towards its mixture. Default 1; 0 is local
            training.

    Raises:
        ValueError: If ``sigma`` or ``alpha`` is not positive, or ``lam`` negative.

    Reference:
        Huang et al., "Personalized Cross-Silo Federated Learning on Non-IID Data", AAAI 2021.
    """

    sigma: float = 10.0
    alpha: float = 1.0
    lam: float = 1.0

    def __post_init__(self) -> None:
        check_hyperparameter(self, "sigma", self.sigma > 0, "a positive number")
        check_hyperparameter(self, "alpha", self.alpha > 0, "a positive number")
        check_hyperparameter(self, "lam", self.lam >= 0, "a number that is not negative")

    def init_more(self, nodes: Tree) -> dict[str, Any]:
        return {"mixtures": tree_map(torch.clone, nodes)}

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        mixture = {name: tensor[server["index"]] for name, tensor in server["mixtures"].items()}
        return {**super().client_init(server, client), "mixture": mixture}

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        drawn = {name: params[name] - ctx["mixture"][name].to(params[name].dtype) for name in grads}
        return add(grads, drawn, alpha=self.lam / self.alpha)

    def update_nodes(self, server: State, deltas: Tree, weights: Tensor) -> dict[str, Any]:
        nodes = add(server["nodes"], deltas)
        attention = self.attention(nodes)
        mixtures = tree_map(lambda own: torch.tensordot(attention.to(own.dtype), own, dims=1), nodes)
        return {"nodes": nodes, "mixtures": mixtures}

    def attention(self, nodes: Tree) -> Tensor:
        r"""The matrix :math:`\xi`, float64 ``[n, n]``."""
        rows = as_rows(nodes)
        squares = torch.stack([(rows - row).square().sum(1) for row in rows])
        found = self.alpha / self.sigma * torch.exp(-squares / self.sigma)
        found.fill_diagonal_(0.0)
        return found + torch.diag(1 - found.sum(1))
