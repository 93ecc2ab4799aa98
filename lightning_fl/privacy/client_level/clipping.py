"""Bounds on one client's contribution: fixed and adaptive clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_fl.privacy.noise import PrivacyError
from lightning_fl.tree import joint_norm, scale, update_trees, zeros_like
from lightning_fl.types import Tree, Update

ROUNDING = 1e-6
"""A clipped update is scaled down by this extra share, so that rounding does not lift its norm above the clip norm."""


@dataclass(frozen=True)
class AdaptiveClip:
    r"""A clip norm that follows a quantile of the norms of the clients' updates.

    Each client also contributes a bit :math:`b_i`, 1 if the norm of its update is within the clip norm :math:`C`, minus
    one half. The sum of the bits is released with its own noise, and

    .. math::
        C \leftarrow C \exp\Bigl(-\eta \bigl(\tfrac{1}{2} + \tfrac{1}{m} \bigl(\textstyle\sum_i (b_i - \tfrac{1}{2}) +
        \mathcal{N}(0, \sigma_b^2)\bigr) - \gamma\bigr)\Bigr)

    so that a share :math:`\gamma` of the clients is not clipped. The noise on the model grows to
    :math:`(z^{-2} - (2 \sigma_b)^{-2})^{-1/2}` times :math:`C`, so that both releases together cost as much privacy as
    :math:`z` alone.

    Args:
        initial: The clip norm of the first round. It must not be derived from the data.
        quantile: The share :math:`\gamma` of updates that should stay unclipped. Default one half: the median.
        learning_rate: The learning rate :math:`\eta` of the clip norm.
        bit_noise: Standard deviation :math:`\sigma_b` of the noise on the sum of the bits; more than half the noise
            multiplier. None: a twentieth of the expected cohort, at least the noise multiplier.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Andrew et al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021.
    """

    initial: float = 0.1
    quantile: float = 0.5
    learning_rate: float = 0.2
    bit_noise: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.initial < math.inf:
            raise ValueError(f"AdaptiveClip got initial={self.initial}; expected a positive number.")
        if not 0 < self.quantile < 1:
            raise ValueError(f"AdaptiveClip got quantile={self.quantile}; expected a share between 0 and 1.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"AdaptiveClip got learning_rate={self.learning_rate}; expected a positive number.")
        if self.bit_noise is not None and not 0 <= self.bit_noise < math.inf:
            raise ValueError(f"AdaptiveClip got bit_noise={self.bit_noise}; expected a number >= 0.")

    def noise_on_bits(self, noise_multiplier: float, cohort: float) -> float:
        """Returns the standard deviation of the noise on the sum of the bits."""
        return max(cohort / 20, noise_multiplier) if self.bit_noise is None else self.bit_noise

    def next(self, clip: float, bits: float, cohort: float) -> float:
        """Returns the clip norm after a round.

        Args:
            clip: The clip norm of the round.
            bits: The noisy sum of the centred bits.
            cohort: The expected number of clients.
        """
        moved = clip * math.exp(-self.learning_rate * (0.5 + bits / cohort - self.quantile))
        return min(max(moved, 1e-12), 1e12)  # a sequence of extreme noise must not drive it to 0 or infinity


def noise_on_model(noise_multiplier: float, bit_noise: float) -> float:
    """Returns the model's noise multiplier with which model and bits together cost what ``noise_multiplier`` would.

    A bit is one half in magnitude, so its sum has sensitivity 1/2 and noise multiplier ``2 * bit_noise``.

    Raises:
        ValueError: If the noise on the bits is too small for that.
    """
    if not noise_multiplier:
        return 0.0
    if not 2 * bit_noise > noise_multiplier:
        raise ValueError(
            f"AdaptiveClip(bit_noise={bit_noise:g}) is too small for noise_multiplier={noise_multiplier:g}: the bits "
            f"alone would cost more privacy. Use more than {noise_multiplier / 2:g}, or leave bit_noise out."
        )
    return (noise_multiplier**-2 - (2 * bit_noise) ** -2) ** -0.5


def with_trees(update: Update, trees: Mapping[str, Tree]) -> Update:
    """Returns the update with its trees replaced."""
    aux = {name: trees[f"aux/{name}"] for name in update.aux}
    return replace(update, delta=trees.get("delta", {}), buffers=trees.get("buffers", {}), aux=aux)


def clip_update(update: Update, clip: float) -> Update:
    """Scales the update down to norm ``clip`` if it is longer; returns zeros if it holds NaN or infinities."""
    trees = update_trees(update)
    norm = joint_norm(trees.values())
    # Negated, because every comparison with NaN is false. Zeros instead of a refusal: the set of refused clients would
    # depend on the clients' data, which the noise on the sum does not cover.
    if not norm < math.inf:
        return with_trees(update, {name: zeros_like(tree) for name, tree in trees.items()})
    if norm <= clip:
        return update
    factor = clip / norm * (1 - ROUNDING)
    return with_trees(update, {name: scale(tree, factor) for name, tree in trees.items()})


def centred_bit(update: Update, clip: float) -> Tensor:
    """Returns 1/2 if the update is within the clip norm, -1/2 if it is not, 0 if it holds NaN or infinities."""
    norm = joint_norm(update_trees(update).values())
    return torch.tensor((0.5 if norm <= clip else -0.5) if norm < math.inf else 0.0, dtype=torch.float64)


def check_clipped(update: Update, clip: float) -> None:
    """Checks that an update is no longer than the clip norm.

    Raises:
        PrivacyError: If it is longer, or holds NaN.
    """
    norm = joint_norm(update_trees(update).values())
    # Negated, so that NaN fails too.
    if not norm <= clip:
        raise PrivacyError(
            f"An update has norm {norm:.6g} after clipping to {clip:.6g}, so the noise would not cover it. The run "
            "stops before anything is released."
        )
