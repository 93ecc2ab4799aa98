"""FedSGD: one step per round, with each client's full gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lightning_fl.algorithms.base import Algorithm, ProbeKind
from lightning_fl.algorithms.registry import register
from lightning_fl.types import Context, Phase, State, Tree


@register("fedsgd")
@dataclass(frozen=True)
class FedSGD(Algorithm):
    r"""FedSGD: each client takes one step with the gradient of all its data; the baseline of FedAvg's paper.

    .. math:: x \leftarrow x - \eta \, \eta_s \, \frac{\sum_i n_i \nabla F_i(x)}{\sum_i n_i}

    With ``torch.optim.SGD`` and all clients in each round this is gradient descent on all data together. The full
    gradient is measured in one pass over batches of any size, so a client's data need not fit into one batch. The step
    then runs the first batch again and replaces its gradient by the full one. With dropout or BatchNorm, the full
    gradient is the mean of the batches' gradients. If a client's data fits into one batch, ``"fedavg"`` with
    ``local_steps=1`` and ``ClientDatasets(..., batch_size=None)`` avoids the second run.

    Args:
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.

    Raises:
        ValueError: With ``personal`` tensors, because the full gradient covers only the shared ones.

    Reference:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
    """

    server_lr: float = 1.0

    probe: ClassVar[ProbeKind | None] = "grad"

    def personal(self, module: nn.Module, named: Sequence[str]) -> Sequence[str]:
        if named:
            raise ValueError(
                f"FedSGD steps with the gradient of the shared tensors only, but found personal={list(named)}. Leave "
                "it out."
            )
        return ()

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(steps=1),)

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        return {"params": server["params"], "gradient": probe}

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        return {name: ctx["gradient"][name] for name in grads}
