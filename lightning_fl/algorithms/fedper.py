"""FedPer, LG-FedAvg and FedBN: part of the model is averaged, the rest stays with each client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_fl.algorithms.base import Algorithm
from lightning_fl.algorithms.fedavg import FedAvg
from lightning_fl.algorithms.registry import register
from lightning_fl.torch_internals import BatchNorm


def need_personal(algorithm: Algorithm, named: Sequence[str], what: str) -> Sequence[str]:
    """The tensors that the user named as personal.

    Raises:
        ValueError: If there are none.
    """
    if not named:
        name = type(algorithm).__name__
        raise ValueError(
            f"{name} keeps a part of the model with each client, but FederatedStrategy got no personal tensors. Name "
            f"{what}."
        )
    return named


@register("fedper")
@dataclass(frozen=True)
class FedPer(FedAvg):
    r"""FedPer: the body of the model is averaged, its head stays with each client.

    .. math:: x \leftarrow x + \eta_s \, \mathrm{mean}_i (y_i - x), \qquad
        (y_i, h_i) \text{ trained together from } (x, h_i)

    The same as ``FederatedStrategy("fedavg", personal=["head.*"])``, except that it refuses to run without a head.
    :class:`FedRep` trains body and head one after the other.

    Args:
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.

    Raises:
        ValueError: When training starts, if ``personal`` names no tensor.

    Reference:
        Arivazhagan et al., "Federated Learning with Personalization Layers", 2019.
    """

    def personal(self, module: nn.Module, named: Sequence[str]) -> Sequence[str]:
        return need_personal(self, named, "the head, such as personal=['head.*']")


@register("lgfedavg")
@dataclass(frozen=True)
class LGFedAvg(FedAvg):
    r"""LG-FedAvg: each client keeps its own representation layers, and the head above them is averaged.

    .. math:: x \leftarrow x + \eta_s \, \mathrm{mean}_i (y_i - x), \qquad
        (y_i, \ell_i) \text{ trained together from } (x, \ell_i)

    The reverse of FedPer: ``FederatedStrategy("lgfedavg", personal=["body.*"])``. The paper begins with rounds of
    FedAvg; to do the same, start from a checkpoint of FedAvg (``MyModule.load_from_checkpoint``).

    Args:
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.

    Raises:
        ValueError: When training starts, if ``personal`` names no tensor.

    Reference:
        Liang et al., "Think Locally, Act Globally: Federated Learning with Local and Global Representations", 2020.
    """

    def personal(self, module: nn.Module, named: Sequence[str]) -> Sequence[str]:
        return need_personal(self, named, "the layers next to the input, such as personal=['body.*']")


@register("fedbn")
@dataclass(frozen=True)
class FedBN(FedAvg):
    r"""FedBN: everything is averaged except BatchNorm, whose weights and statistics stay with each client.

    .. math:: x \leftarrow x + \eta_s \, \mathrm{mean}_i (y_i - x), \qquad x \text{ without BatchNorm}

    The module's BatchNorm layers are found by their class; ``personal`` may name more tensors. Suits clients whose
    inputs are distributed differently, such as hospitals with different scanners.

    Args:
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.

    Raises:
        ValueError: When training starts, if the module has no BatchNorm layer.

    Reference:
        Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021.
    """

    def personal(self, module: nn.Module, named: Sequence[str]) -> Sequence[str]:
        layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, BatchNorm)]
        params = dict(module.named_parameters(remove_duplicate=False))
        frozen = {name for name, param in params.items() if not param.requires_grad}  # never change, so never personal
        norms = [f"{name}.{tensor}" for name, layer in layers for tensor in layer.state_dict()]
        norms = [name for name in norms if name not in frozen]
        if not norms:
            raise ValueError(
                "FedBN keeps BatchNorm with the clients, but the module has none. Use fedavg, or name other layers: "
                "FederatedStrategy('fedavg', personal=['norm*'])."
            )
        return [*named, *norms]
