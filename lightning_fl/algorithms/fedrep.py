"""FedRep: a shared representation with a personal head per client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_fl.algorithms.base import Algorithm, check_hyperparameter
from lightning_fl.algorithms.fedper import need_personal
from lightning_fl.algorithms.registry import register
from lightning_fl.types import Phase


@register("fedrep")
@dataclass(frozen=True)
class FedRep(Algorithm):
    r"""FedRep: each client first fits its own head to the shared representation, then trains the representation.

    .. math::
        h_i &\leftarrow h_i - \eta \nabla_h F_i(x, h_i) \quad \text{for ``head\_epochs``, then} \\
        y_i &\leftarrow y_i - \eta \nabla_x F_i(y_i, h_i) \quad \text{from } y_i = x, \qquad
        x \leftarrow x + \eta_s \, \mathrm{mean}_i (y_i - x)

    The head consists of the strategy's ``personal`` tensors: ``FederatedStrategy("fedrep", personal=["head.*"])``. The
    strategy's ``local_epochs`` or ``local_steps`` set how long the representation trains. While one part trains, the
    other is frozen, but buffers such as BatchNorm's statistics are updated in both phases, as in the authors' code.
    Both phases start with the same learning rates; after the round, a per-step learning-rate schedule continues from
    the longer phase. In the paper all clients have the same amount of data; here they are weighted by their examples.

    Args:
        head_epochs: Passes over the client's data to train its head. Default 10, as in the paper.
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.

    Raises:
        ValueError: If ``head_epochs`` is below 1; when training starts, if ``personal`` names no tensor.

    Reference:
        Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021.
    """

    head_epochs: int = 10
    server_lr: float = 1.0

    def __post_init__(self) -> None:
        check_hyperparameter(self, "head_epochs", self.head_epochs >= 1, "at least 1")

    def personal(self, module: nn.Module, named: Sequence[str]) -> Sequence[str]:
        return need_personal(self, named, "the head, such as personal=['head.*']")

    def phases(self) -> tuple[Phase, ...]:
        return Phase("personal", epochs=self.head_epochs), Phase("shared")
