"""Differentiable architecture search with federated averaging of weights and architecture parameters (FedNAS)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_fl.models.classifier import Classifier

CHOICES = ("relu", "tanh", "linear", "skip")


class MixedLayer(nn.Module):
    r"""A mixture of all candidate operations of a layer, :math:`\sum_o \mathrm{softmax}(\alpha)_o \, o(x)`.

    Args:
        width: Number of input and output features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(width, width), nn.ReLU()),
                nn.Sequential(nn.Linear(width, width), nn.Tanh()),
                nn.Linear(width, width),
                nn.Identity(),
            ]
        )
        self.alpha = nn.Parameter(torch.zeros(len(CHOICES)))

    def forward(self, x: Tensor) -> Tensor:
        """The mixture of the outputs of all candidates."""
        shares = self.alpha.softmax(0)
        return sum((share * layer(x) for share, layer in zip(shares, self.layers, strict=True)), torch.zeros_like(x))


class ArchitectureSearch(Classifier):
    r"""DARTS over dense layers: each step trains the weights on half a batch, and the architecture on the other half.

    Under ``strategy="fedavg"`` weights and architecture parameters are averaged: FedNAS, with DARTS' first-order step.
    :meth:`architecture` returns the architecture found.

    Args:
        in_features: Number of features of an example, which is flattened.
        width: Number of features between the layers.
        depth: Number of layers to search.
        num_classes: Number of classes.
        lr: SGD's learning rate for the weights.
        momentum: Momentum of SGD.
        alpha_lr: Adam's learning rate for the architecture parameters :math:`\alpha`.

    Reference:
        Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search", ICLR 2019; He, Annavaram and Avestimehr,
        "Towards Non-I.I.D. and Invisible Data with FedNAS", 2020.
    """

    def __init__(
        self,
        in_features: int = 64,
        width: int = 32,
        depth: int = 2,
        num_classes: int = 10,
        lr: float = 0.1,
        momentum: float = 0.9,
        alpha_lr: float = 0.01,
    ) -> None:
        layers = [MixedLayer(width) for _ in range(depth)]
        net = nn.Sequential(nn.Flatten(), nn.Linear(in_features, width), *layers, nn.Linear(width, num_classes))
        super().__init__(net, num_classes, lr, momentum)
        self.automatic_optimization = False
        self.alpha_lr = alpha_lr

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """Trains the architecture parameters on the second half of the batch, then the weights on the first."""
        x, y = self.unpack(batch)
        half = (len(y) + 1) // 2
        optimizers: Any = self.optimizers()
        for_weights, for_choices = optimizers
        parts = [(for_choices, x[half:], y[half:]), (for_weights, x[:half], y[:half])]
        for optimizer, inputs, classes in parts:
            if len(classes):
                loss = cross_entropy(self(inputs), classes)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True, batch_size=len(y))

    def configure_optimizers(self) -> Any:
        """SGD for the weights, Adam for the architecture parameters."""
        choices = [param for name, param in self.named_parameters() if name.endswith("alpha")]
        weights = [param for name, param in self.named_parameters() if not name.endswith("alpha")]
        return [
            torch.optim.SGD(weights, lr=self.lr, momentum=self.momentum),
            torch.optim.Adam(choices, lr=self.alpha_lr, betas=(0.5, 0.999)),
        ]

    def architecture(self) -> list[str]:
        """The most likely candidate of each layer."""
        mixed = [module for module in self.modules() if isinstance(module, MixedLayer)]
        return [CHOICES[int(layer.alpha.argmax())] for layer in mixed]
