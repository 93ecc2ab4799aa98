"""Bounds on what one client contributes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_fl.aggregation.weighted_mean import update_trees
from lightning_fl.privacy.noise import PrivacyError
from lightning_fl.tree import scale, zeros_like
from lightning_fl.types import Tree, Update

ROUNDING = 1e-6


@dataclass(frozen=True)
class AdaptiveClip:
    r"""A clip norm that follows a quantile of the norms of the clients' updates.

    Each client adds to the round a bit, :math:`b_i = 1` if its norm is within the clip norm :math:`C`, less one half;
    the sum is released with noise of its own, and

    .. math::
        C \leftarrow C \exp\Bigl(-\eta \bigl(\tfrac{1}{2} + \tfrac{1}{m} \bigl(\textstyle\sum_i (b_i - \tfrac{1}{2}) +
        \mathcal{N}(0, \sigma_b^2)\bigr) - \gamma\bigr)\Bigr)

    so that a share :math:`\gamma` of the clients is not clipped. The noise on the model becomes
    :math:`(z^{-2} - (2 \sigma_b)^{-2})^{-1/2}` times :math:`C`, which makes both releases together cost what
    :math:`z` alone would.

    Args:
        initial: The clip norm of the first round. It must not be taken from the data.
        quantile: The share :math:`\gamma` of updates that is to stay unclipped. Default one half: the median.
        learning_rate: How fast the clip norm moves, :math:`\eta`.
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
            raise ValueError(f"AdaptiveClip got bit_noise={self.bit_noise}; expected a number that is not negative.")

    def noise_on_bits(self, noise_multiplier: float, cohort: float) -> float:
        """The standard deviation of the noise on the sum of the bits."""
        return max(cohort / 20, noise_multiplier) if self.bit_noise is None else self.bit_noise

    def next(self, clip: float, bits: float, cohort: float) -> float:
        """The clip norm after a round.

        Args:
            clip: The clip norm of the round.
            bits: The noisy sum of the centred bits.
            cohort: The number of clients to expect.
        """
        moved = clip * math.exp(-self.learning_rate * (0.5 + bits / cohort - self.quantile))
        return min(max(moved, 1e-12), 1e12)


def noise_on_model(noise_multiplier: float, bit_noise: float) -> float:
    """The noise multiplier of the model when bits are released too: together they cost what ``noise_multiplier`` does.

    Raises:
        ValueError: If the noise on the bits is too small for that.
    """
    if not noise_multiplier:
        return 0.0
    if not 2 * bit_noise > noise_multiplier:
        raise ValueError(
            f"AdaptiveClip(bit_noise={bit_noise:g}) is too little for noise_multiplier={noise_multiplier:g}: the bits "
            f"alone would cost more than that. Give more than {noise_multiplier / 2:g}, or leave bit_noise out."
        )
    return (noise_multiplier**-2 - (2 * bit_noise) ** -2) ** -0.5


def with_trees(update: Update, trees: Mapping[str, Tree]) -> Update:
    """An update with other trees."""
    aux = {name: trees[f"aux/{name}"] for name in update.aux}
    return replace(update, delta=trees.get("delta", {}), buffers=trees.get("buffers", {}), aux=aux)


def joint_norm(trees: Iterable[Tree]) -> float:
    """Euclidean norm of all elements of all trees together, in float64."""
    norms = [torch.linalg.vector_norm(_real(tensor), dtype=torch.float64) for tree in trees for tensor in tree.values()]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def clip_update(update: Update, clip: float) -> Update:
    """The update, shortened to the norm ``clip`` if it is longer; zeros if it holds NaN or infinities."""
    trees = update_trees(update)
    norm = joint_norm(trees.values())
    if not norm < math.inf:
        return with_trees(update, {name: zeros_like(tree) for name, tree in trees.items()})
    if norm <= clip:
        return update
    factor = clip / norm * (1 - ROUNDING)
    return with_trees(update, {name: scale(tree, factor) for name, tree in trees.items()})


def centred_bit(update: Update, clip: float) -> Tensor:
    """One half if the update is within the clip norm, minus one half if it is not, 0 if it holds NaN or infinities."""
    norm = joint_norm(update_trees(update).values())
    return torch.tensor((0.5 if norm <= clip else -0.5) if norm < math.inf else 0.0, dtype=torch.float64)


def check_clipped(update: Update, clip: float) -> None:
    """Makes sure that an update is no longer than the clip norm.

    Raises:
        PrivacyError: If it is, or holds NaN.
    """
    norm = joint_norm(update_trees(update).values())
    if not norm <= clip:
        raise PrivacyError(
            f"An update has norm {norm:.6g} after clipping to {clip:.6g}, so the noise would not cover it. The run "
            "stops before anything is released."
        )


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
