"""Attacks on an attacker's own update."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lightning_fl.attacks.attack import UpdateAttack, with_delta
from lightning_fl.tree import scale, zeros_like
from lightning_fl.types import Update


@dataclass(frozen=True)
class SignFlip(UpdateAttack):
    """Sends the update with the opposite sign.

    Args:
        factor: The factor by which it is also scaled. Default 1.

    Reference:
        Li et al., "RSA: Byzantine-Robust Stochastic Aggregation Methods", AAAI 2019.
    """

    factor: float = 1.0

    def corrupt(self, update: Update, num_clients: int, num_attackers: int, generator: torch.Generator) -> Update:
        return with_delta(update, scale(update.delta, -self.factor))


@dataclass(frozen=True)
class GaussianNoise(UpdateAttack):
    """Sends Gaussian noise in place of the update.

    Args:
        std: Its standard deviation in each coordinate. Default 1.

    Reference:
        Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017.
    """

    std: float = 1.0

    def corrupt(self, update: Update, num_clients: int, num_attackers: int, generator: torch.Generator) -> Update:
        # On the CPU, like the generator.
        return with_delta(
            update,
            {
                name: (self.std * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)).to(tensor.device)
                for name, tensor in update.delta.items()
            },
        )


@dataclass(frozen=True)
class Scaling(UpdateAttack):
    """Model replacement: scales the update, so that the mean becomes the attackers' model.

    Args:
        factor: The factor. Default None: clients of the round / attackers, which replaces the mean of all.

    Reference:
        Bagdasaryan et al., "How To Backdoor Federated Learning", AISTATS 2020.
    """

    factor: float | None = None

    def corrupt(self, update: Update, num_clients: int, num_attackers: int, generator: torch.Generator) -> Update:
        factor = num_clients / num_attackers if self.factor is None else self.factor
        return with_delta(update, scale(update.delta, factor))


@dataclass(frozen=True)
class Lazy(UpdateAttack):
    """Sends zeros: a free-rider that takes part without training.

    Reference:
        Fraboni et al., "Free-rider Attacks on Model Aggregation in Federated Learning", AISTATS 2021.
    """

    def corrupt(self, update: Update, num_clients: int, num_attackers: int, generator: torch.Generator) -> Update:
        aux = {name: zeros_like(tree) for name, tree in update.aux.items()}
        return replace(update, delta=zeros_like(update.delta), buffers=zeros_like(update.buffers), aux=aux)
