"""A generative adversarial network for federated averaging of both its networks (FedGAN)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


class GAN(L.LightningModule):
    r"""A GAN that generates examples with values in [0, 1], similar to the training data; labels are ignored.

    .. math::
        D: \min \; \mathrm{mean} \, \log(1 + e^{-D(x)}) + \mathrm{mean} \, \log(1 + e^{D(G(z))}), \qquad
        G: \min \; \mathrm{mean} \, \log(1 + e^{-D(G(z))}), \qquad z \sim N(0, I)

    Each step trains the discriminator, then the generator, each with its own Adam optimizer. Under
    ``strategy="fedavg"`` both are averaged: FedGAN. Logs ``train_d_loss``, ``train_g_loss`` and ``val_distance``, the
    :func:`frechet_distance` between the validation data and as many generated examples.

    Args:
        features: Number of values of an example, which is flattened.
        latent: Dimension of the latent vector :math:`z`.
        hidden: Width of the two hidden layers of either network.
        lr: Learning rate of both optimizers.

    Reference:
        Goodfellow et al., "Generative Adversarial Nets", NeurIPS 2014; Rasouli, Sun and Rajagopal, "FedGAN: Federated
        Generative Adversarial Networks for Distributed Data", 2020.
    """

    def __init__(self, features: int = 64, latent: int = 16, hidden: int = 128, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.latent, self.lr = latent, lr
        self.generator = nn.Sequential(*_layers(latent, hidden, features), nn.Sigmoid())
        self.discriminator = nn.Sequential(*_layers(features, hidden, 1))
        self._seen: list[Tensor] = []

    def draw(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        """Generates examples, ``[number, features]``."""
        noise = torch.randn(number, self.latent, generator=generator)
        drawn: Tensor = self.generator(noise.to(next(self.parameters())))
        return drawn

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Trains the discriminator, then the generator."""
        x = batch[0].flatten(1)
        optimizers: Any = self.optimizers()
        for_generator, for_discriminator = optimizers
        drawn = self.draw(len(x))
        d_loss = (softplus(-self.discriminator(x)) + softplus(self.discriminator(drawn.detach()))).mean()
        for_discriminator.zero_grad()
        self.manual_backward(d_loss)
        for_discriminator.step()
        g_loss = softplus(-self.discriminator(drawn)).mean()
        for_generator.zero_grad()
        self.manual_backward(g_loss)
        for_generator.step()
        losses = {"train_d_loss": d_loss.detach(), "train_g_loss": g_loss.detach()}
        self.log_dict(losses, on_step=False, on_epoch=True, batch_size=len(x))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Collects the validation data."""
        self._seen.append(batch[0].flatten(1))

    def on_validation_epoch_end(self) -> None:
        """Logs the distance between generated examples and the validation data."""
        seen, self._seen = torch.cat(self._seen), []
        drawn = self.draw(len(seen), torch.Generator().manual_seed(0))  # the same noise each time
        self.log("val_distance", frechet_distance(seen, drawn))

    def configure_optimizers(self) -> Any:
        """Adam for the generator, and for the discriminator."""
        networks = self.generator, self.discriminator
        return [torch.optim.Adam(own.parameters(), lr=self.lr, betas=(0.5, 0.999)) for own in networks]


def frechet_distance(one: Tensor, other: Tensor) -> Tensor:
    r"""The Fréchet distance of two sets of examples, assuming normal distributions.

    .. math::
        \lVert \mu_1 - \mu_2 \rVert^2 + \mathrm{tr}(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2})

    Args:
        one: ``[n, features]``.
        other: ``[m, features]``.
    """
    a, b = one.double(), other.double()
    # The eigenvalues of a product of two covariances are real and not negative.
    product = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0)
    spread = a.var(0).sum() + b.var(0).sum() - 2 * product.sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + spread


def _layers(features: int, hidden: int, out: int) -> list[nn.Module]:
    sizes = [features, hidden, hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
    return [*layers, nn.Linear(hidden, out)]
