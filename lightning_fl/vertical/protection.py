"""Protection of the labels against leakage through gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.privacy.noise import SecureNoise


@dataclass(frozen=True)
class GradientNoise:
    r"""Noise on the gradients that other parties receive, which hides the norm of each row's gradient.

    .. math:: g_i \leftarrow g_i + \mathcal{N}(0, s^2 \max_j \lVert g_j \rVert^2 / d)

    for :math:`d` elements per row. Rare labels have longer gradients, by which another party could infer them. This
    protects against that attack, but is not differential privacy: its strength is measured by the attack, not proved.

    Args:
        scale: The norm :math:`s` of the noise relative to the longest gradient of the batch. Default 4.

    Raises:
        ValueError: If ``scale`` is not positive.

    Reference:
        Li et al., "Label Leakage and Protection in Two-party Split Learning", ICLR 2022.
    """

    scale: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"GradientNoise got scale={self.scale}; expected a positive number.")

    def __call__(self, gradient: Tensor) -> Tensor:
        """The gradient of a batch, ``[rows, ...]``, with noise."""
        rows = gradient.reshape(len(gradient), -1)
        if not rows.numel():
            return gradient
        std = self.scale * float(rows.double().norm(dim=1).max()) / math.sqrt(rows.shape[1])
        noise = SecureNoise().normal(rows.numel(), std) if std else torch.zeros(rows.numel(), dtype=torch.float64)
        return gradient + noise.view_as(gradient).to(gradient)
