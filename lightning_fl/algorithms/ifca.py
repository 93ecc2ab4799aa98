"""IFCA: several global models; each client trains the one that fits its data best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_fl.algorithms.base import Algorithm, AuxRole, ProbeKind, Weighting, check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import scalar_like, subtract, tree_map
from lightning_fl.types import Aggregate, Context, LocalRun, State, Tree, Update


@register("ifca")
@dataclass(frozen=True)
class IFCA(Algorithm):
    r"""IFCA: each client trains whichever of several global models has the smallest loss on its data.

    .. math::
        j_i = \arg\min_j F_i(x_j), \qquad
        x_j \leftarrow x_j + \eta_s \, \mathrm{mean}_{i : j_i = j} (y_i - x_j)

    A client measures its loss under each model in a pass over its data. A model that no client chooses is unchanged.
    Validation and checkpoints see the mean of the models, weighted by the clients that chose them; the state's
    ``"models"`` holds them all, each tensor ``[num_models, ...]``.

    Args:
        num_models: Number of models :math:`k`. Default 2; 1 is federated averaging.
        spread: Standard deviation of the noise that is added to all initial models but the first, as a share of each
            parameter's root mean square (of 1 where that is zero). Default 0.1. The paper starts with several random
            models; equal ones would stay equal.
        seed: Seed of that noise. Default 0.
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.

    Raises:
        ValueError: If ``num_models`` is below 1, or ``spread`` negative.

    Reference:
        Ghosh et al., "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020.
    """

    num_models: int = 2
    spread: float = 0.1
    seed: int = 0
    server_lr: float = 1.0

    weighting: ClassVar[Weighting] = "uniform"
    probe: ClassVar[ProbeKind | None] = "losses"
    aux_role: ClassVar[AuxRole] = "divisor"
    client_keys: ClassVar[tuple[str, ...]] = ("params", "models")

    def __post_init__(self) -> None:
        check_hyperparameter(self, "num_models", self.num_models >= 1, "at least 1")
        check_hyperparameter(self, "spread", self.spread >= 0, "a number that is not negative")

    def server_init(self, params: Tree, population: int) -> State:
        generator = torch.Generator().manual_seed(self.seed)

        def several(tensor: Tensor) -> Tensor:
            size = tensor.detach().abs().double().square().mean().sqrt().item() or 1.0
            noise = torch.randn(self.num_models, *tensor.shape, generator=generator, dtype=torch.float64)
            noise[0] = 0.0
            return tensor + (self.spread * size * noise).to(tensor.device, tensor.dtype)

        return {"params": params, "models": tree_map(several, params)}

    def aux_like(self, params: Tree) -> Mapping[str, Tree]:
        return {"counts": {"weight": scalar_like(params).double().expand(self.num_models).clone()}}

    def delta_like(self, params: Tree, server: State) -> Tree:
        return tree_map(self._stack, params)

    def _stack(self, tensor: Tensor) -> Tensor:
        return tensor.new_zeros(self.num_models, *tensor.shape)

    def candidates(self, server: State) -> Sequence[Tree]:
        return [{name: own[model] for name, own in server["models"].items()} for model in range(self.num_models)]

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        chosen = torch.as_tensor(probe).nan_to_num(torch.inf).argmin()
        return {"params": self.candidates(server)[int(chosen)], "chosen": chosen}

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        chosen, change = ctx["chosen"], subtract(params, ctx["params"])
        delta = tree_map(self._stack, change)
        for name, own in change.items():
            delta[name][chosen] = own
        counts = scalar_like(params).double().expand(self.num_models).clone()
        counts[chosen] = run.weight
        return Update(delta=delta, aux={"counts": {"weight": counts}}), client

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        counts = aggregate.aux["counts"]["weight"]
        total = counts.sum()
        if not total > 0:
            return server
        steps = torch.where(counts > 0, self.server_lr / counts.clamp(min=1e-30), 0.0)
        models = {
            name: own + aggregate.delta[name] * steps.to(own.dtype).view(-1, *[1] * (own.dim() - 1))
            for name, own in server["models"].items()
        }
        shares = counts / total
        mean = tree_map(lambda own: torch.tensordot(shares.to(own.dtype), own, dims=1), models)
        return {**server, "models": models, "params": mean}
