"""Distributed noise: each client adds a share of integer noise to its update before secure aggregation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.privacy.integer_noise import IntegerNoise, Mechanism
from lightning_fl.privacy.noise import PrivacyError, check_deviation
from lightning_fl.tree import update_trees
from lightning_fl.types import Tree, Update

ENCODED = "encoded"
MIN_LEVELS_OF_NOISE = 16.0
LEVELS_BY_DIMENSION = 32.0
MAX_ATTEMPTS = 200
ROUNDING_VARIANCE = 4
MARGIN = 12.0
"""Standard deviations of the sum's noise for which the modulus must have room; a wrap costs accuracy, not privacy."""


@dataclass(frozen=True)
class Grid:
    r"""The grid on which updates are rounded to integers, and the noise that each client adds.

    An update x of norm at most C is rounded to the integers :math:`q` by unbiased stochastic rounding of
    :math:`x / \gamma`, repeated until

    .. math::
        \lVert q \rVert^2 \le \Delta^2 = G^2 + \frac{d}{4} + G + \frac{\sqrt{d}}{2}, \qquad G = C / \gamma

    which an attempt satisfies with a probability of at least :math:`1 - e^{-1/2}`. A client adds noise of variance
    :math:`\lceil (z \Delta)^2 / n \rceil`, where n is the number of clients whose noise the adversary does not know.

    Args:
        clip: The clip norm :math:`C`.
        size: Number of coordinates :math:`d`.
        noise_multiplier: The noise of the sum :math:`z`, relative to :math:`\Delta`.
        num_honest: The number n.
        mechanism: The distribution of the noise.

    References:
        Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
        Aggregation", ICML 2021. Agarwal, Kairouz and Liu, "The Skellam Mechanism for Differentially Private Federated
        Learning", NeurIPS 2021.
    """

    clip: float
    size: int
    noise_multiplier: float
    num_honest: int
    mechanism: Mechanism

    @property
    def levels(self) -> int:
        """Number :math:`G` of grid steps within the clip norm, such that rounding adds less than 1e-3 to the norm."""
        of_noise = MIN_LEVELS_OF_NOISE * math.sqrt(self.num_honest) / max(self.noise_multiplier, 1e-2)
        # A power of two, so that dividing by it is exact.
        return 1 << math.ceil(math.log2(max(1024.0, LEVELS_BY_DIMENSION * math.sqrt(self.size), of_noise)))

    @property
    def step(self) -> float:
        r"""Distance :math:`\gamma` between two levels."""
        return self.clip / self.levels

    @property
    def max_square(self) -> int:
        r"""The largest squared norm :math:`\Delta^2` of a rounded update."""
        levels, size = self.levels, self.size
        return math.floor(levels**2 + size / 4 + levels + math.sqrt(size) / 2)

    @property
    def variance(self) -> int:
        """The variance of one client's noise; 0 without noise."""
        return math.ceil(self.noise_multiplier**2 * self.max_square / self.num_honest)

    @property
    def effective_noise_multiplier(self) -> float:
        """The noise multiplier of a Gaussian that is no more private, up to the slack; see :func:`gaussian_bound`."""
        bound = gaussian_bound(self.mechanism, self.max_square, self.size, self.variance, self.num_honest)
        if self.slack is None:
            return bound
        return min(bound, math.sqrt((self.num_honest * self.variance - ROUNDING_VARIANCE) / self.max_square))

    @property
    def slack(self) -> float | None:
        """The slack of :func:`gaussian_slack` for this noise; None if it is not known."""
        return gaussian_slack(self.mechanism, self.size, self.variance, self.num_honest)

    def check_modulus(self, num_clients: int, bits: int) -> None:
        """Checks that the sum of all clients fits into integers of ``bits`` bits.

        Raises:
            ValueError: If it does not, so that a coordinate could wrap around.
        """
        largest = num_clients * math.sqrt(self.max_square) + MARGIN * math.sqrt(num_clients * self.variance)
        if largest >= 2 ** (bits - 1):
            raise ValueError(
                f"The noisy sum of {num_clients} clients may reach {largest:.3g}, beyond integers of {bits} bits. Use "
                "SecureAggregation(modulus_bits=64), or fewer clients in a round."
            )

    def encode(self, update: Update, noise: IntegerNoise) -> Update:
        """Rounds a clipped update and adds the client's noise.

        Raises:
            PrivacyError: If the noise does not have the recorded variance.
        """
        trees = update_trees(update)
        rounded = self.round(_vector(trees), noise)
        device = next(iter(update.delta.values())).device
        if self.variance:
            added = noise.sample(self.mechanism, self.size, self.variance)
            check_deviation(added, math.sqrt(self.variance))
            rounded = rounded + added
        return Update({ENCODED: rounded.to(device)}, {}, update.weight)

    def round(self, values: Tensor, noise: IntegerNoise) -> Tensor:
        """Rounds a vector of norm at most ``clip`` to integers whose squared norm is at most ``max_square``."""
        scaled = values / self.step
        floor = scaled.floor()
        share = scaled - floor
        for _ in range(MAX_ATTEMPTS):
            rounded = (floor + (noise.uniform(len(share)) < share)).long()
            if int(rounded.square().sum()) <= self.max_square:
                return rounded
        raise PrivacyError(f"{MAX_ATTEMPTS} attempts at rounding an update exceeded the norm bound. The run stops.")

    def decode(self, total: Tensor, template: Update) -> dict[str, Tree]:
        """Decodes a sum of encoded updates to trees with the template's shapes and dtypes."""
        values = total.cpu().double() * self.step
        own = update_trees(template)
        trees: dict[str, Tree] = {name: {} for name in own}
        start = 0
        for name, key, tensor in _entries(own):
            part = values[start : start + tensor.numel()]
            trees[name][key] = part.view(tensor.shape).to(tensor.device, _sum_dtype(tensor))
            start += tensor.numel()
        return trees


def gaussian_bound(mechanism: Mechanism, max_square: int, size: int, variance: int, count: int) -> float:
    r"""Returns the noise multiplier of a Gaussian whose Rényi divergences bound those of the release.

    For discrete Gaussian noise it is :math:`1 / \varepsilon` with

    .. math::
        \varepsilon = \min\Bigl\{\sqrt{\tfrac{\Delta^2}{n \sigma^2} + \tfrac{\tau d}{2}},
        \tfrac{\Delta}{\sqrt{n} \sigma} + \tau \sqrt{d}\Bigr\}, \qquad
        \tau = 10 \sum_{k=1}^{n-1} e^{-2 \pi^2 \sigma^2 k / (k + 1)}

    by Proposition 14 of Kairouz et al., for every order above 1. It needs n independent samples with the same parameter
    :math:`\sigma \ge 1/2`, and integer updates. For Skellam noise of variance :math:`\mu` in the sum, the divergence
    of an integer order :math:`\alpha > 1` is at most

    .. math::
        \frac{\alpha \Delta^2}{2 \mu} + \frac{(2 \alpha - 1) \Delta^2 + 6 \Delta_1}{4 \mu^2}, \qquad
        \Delta_1 \le \min(\Delta^2, \sqrt{d} \Delta)

    for integer updates (Agarwal et al., theorem 3.5); here the terms without :math:`\alpha` are multiplied by it. Noise
    of further clients is independent, so it can only lower the divergence.

    Args:
        mechanism: The distribution of each client's noise.
        max_square: The largest squared norm :math:`\Delta^2` of an update.
        size: Number of coordinates :math:`d`.
        variance: The parameter of one client's noise, :math:`\sigma^2` or :math:`\mu / n`; 0: no noise.
        count: Number of clients n whose noise is secret.
    """
    if not variance:
        return 0.0
    ratio, total = max_square / (count * variance), float(count * variance)
    if mechanism == "discrete_gaussian":
        tau = 10 * sum(math.exp(-2 * math.pi**2 * variance * k / (k + 1)) for k in range(1, count))
        return 1 / min(math.sqrt(ratio + tau * size / 2), math.sqrt(ratio) + tau * math.sqrt(size))
    l1 = min(float(max_square), math.sqrt(size * float(max_square)))
    slope = ratio / 2 + ratio / (2 * total) + max(6 * l1 - max_square, 0.0) / (4 * total**2)
    return float((2 * slope) ** -0.5)


def gaussian_slack(mechanism: Mechanism, size: int, variance: int, count: int) -> float | None:
    r"""Returns the maximum difference, in log-probabilities, between a release and a function of a Gaussian release.

    Let :math:`D_v` be the discrete Gaussian of parameter v, and :math:`r(v) = \log \frac{1 + t}{1 - t}` with :math:`t =
    2 \sum_{k \ge 1} e^{-2 \pi^2 v k^2}`. By Poisson summation :math:`\sum_{x \in \mathbb{Z}} e^{-(x - y)^2 / 2 v}` is
    :math:`\sqrt{2 \pi v}` up to factors of :math:`1 \pm t` for every y. Hence, by completing the square,

    - the sum of samples of :math:`D_{k v}` and :math:`D_v` has probabilities within :math:`e^{\pm r(v k / (k + 1))}` of
      those of :math:`D_{(k + 1) v}`, so that a sum of n samples of :math:`D_v` is close to :math:`D_{n v}`;
    - a value y of :math:`\mathcal{N}(0, n v - u)`, rounded to an integer x with probability proportional to
      :math:`e^{-(x - y)^2 / 2 u}`, has probabilities within :math:`e^{\pm r(u)}` of those of :math:`D_{n v}`. This
      rounding commutes with adding integers.

    So an integer sum with this noise is, up to the slack, a function of the sum with Gaussian noise of variance
    :math:`n v - u`, and each coordinate adds :math:`r(u) + \sum_{k < n} r(v k / (k + 1))` to the slack.

    Args:
        mechanism: The distribution of each client's noise; None is returned for Skellam noise.
        size: Number of coordinates.
        variance: The parameter v of one client's noise; 0: no noise.
        count: Number of clients n whose noise is secret.

    References:
        Peikert, "An Efficient and Parallel Gaussian Sampler for Lattices", CRYPTO 2010 (theorem 3.1, the rounding).
        Kairouz et al., ICML 2021 (the sums).
    """
    if mechanism != "discrete_gaussian" or count * variance <= ROUNDING_VARIANCE:
        return None
    return size * (_ratio(ROUNDING_VARIANCE) + sum(_ratio(variance * k / (k + 1)) for k in range(1, count)))


def _ratio(variance: float) -> float:
    step = math.exp(-2 * math.pi**2 * variance)
    tail = 2 * step / (1 - step)  # a geometric sum is larger
    return 2 * math.atanh(tail) if tail < 1 else math.inf


def encoded_like(update: Update) -> Update:
    """A template of encoded updates; it holds the bits of the original values, by which the model is identified."""
    values = _vector(update_trees(update))
    return Update({ENCODED: values.view(torch.int64)}, {}, update.weight)


def num_coordinates(update: Update) -> int:
    """Number of coordinates of an update."""
    return sum(tensor.numel() for tree in update_trees(update).values() for tensor in tree.values())


def _vector(trees: Mapping[str, Tree]) -> Tensor:
    return torch.cat([tensor.detach().cpu().double().reshape(-1) for _, _, tensor in _entries(trees)])


def _entries(trees: Mapping[str, Tree]) -> list[tuple[str, str, Tensor]]:
    """The tensors sorted by name, because a coordinator, which decodes the sum, does not know the module's order."""
    return [(name, key, trees[name][key]) for name in sorted(trees) for key in sorted(trees[name])]


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else torch.float64
