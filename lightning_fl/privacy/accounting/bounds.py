"""Upper bounds on epsilon, computed with dp-accounting.

dp-accounting's accountants differ in what they mean by "replace one": the PLD accountant doubles the sensitivity of a
Gaussian itself, the RDP accountant does not. Here noise is always relative to the largest norm of one contribution. A
sampling for which a method has no bound counts as no amplification.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from lightning_fl.privacy.accounting.sampling import (
    Distributed,
    FixedSize,
    Full,
    LocalSteps,
    Poisson,
    Sampling,
    client_rate,
)

Method = Literal["pld", "rdp"]
Relation = Literal["add_or_remove_one", "replace_one"]
Entry = tuple[float, Sampling, int]
"""Gaussian releases: noise multiplier, sampling, number of releases."""
INTEGER_ORDERS = (*range(2, 257), 384, 512, 1024, 2048, 4096)
GRID = 1e-4
MAX_FINE_EPSILON, MAX_EPSILON = 50.0, 1e5
"""Up to this, the grid is proportionally coarser, to bound time and memory; beyond it, sampling is not counted."""
MAX_SLACK = 1e-3
"""Maximum total slack with which distributed noise of all releases is accounted as Gaussian noise."""
MAX_FINE_LOSS = 400.0
"""The largest privacy loss of one release that is kept on the finest grid."""


def dp_accounting() -> Any:
    """Imports dp-accounting on first use.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import dp_accounting  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(
            "Privacy accounting needs dp-accounting, which is not installed: pip install 'lightning-fl[privacy]'"
        ) from error
    return dp_accounting


def default_relation(entries: Sequence[Entry]) -> Relation:
    """Returns the default relation; sampling without replacement has bounds for ``"replace_one"`` only."""
    return "replace_one" if any(map(_is_fixed_size, entries)) else "add_or_remove_one"


def check_relation(entries: Sequence[Entry], relation: Relation) -> None:
    """Checks that there is a bound for the relation.

    Raises:
        ValueError: If there is none: in a draw of fixed size, another contributor replaces a removed one.
    """
    if relation == "add_or_remove_one" and any(map(_is_fixed_size, entries)):
        raise ValueError(
            "relation='add_or_remove_one' has no bound for draws with FixedSize: if one contributor is removed, "
            "another is drawn, which changes the sum by up to twice the clip norm. Use 'replace_one', or Poisson "
            "sampling."
        )


def _is_fixed_size(entry: Entry) -> bool:
    sampling = entry[1]
    return isinstance(sampling.batches if isinstance(sampling, LocalSteps) else sampling, FixedSize)


@lru_cache(maxsize=256)
def epsilon_of(
    entries: tuple[Entry, ...], delta: float, method: Method, relation: Relation, grid: float = GRID, group: int = 1
) -> float:
    """Returns an upper bound on epsilon at ``delta`` for all entries together; infinite if one has no noise.

    Args:
        entries: The releases.
        delta: The delta at which to answer.
        method: The accountant.
        relation: How neighbouring data sets differ.
        grid: Discretization interval of the privacy loss for PLD; a coarser one is faster and looser.
        group: The number of contributors in which the data sets differ.

    Raises:
        ValueError: If there is no bound for these neighbours.
    """
    check_relation(entries, relation)
    entries = tuple((sigma, sampling, count) for sigma, sampling, count in entries if count)
    if not entries:
        return 0.0
    if any(sigma == 0 for sigma, *_ in entries):
        return math.inf
    method = usable_method(entries, method)
    if method == "pld" and any(isinstance(sampling, Distributed) for _, sampling, _ in entries):
        # Where P and Q are within e^slack of P' and Q': P(S) - e^epsilon Q(S) <= e^slack (P'(S) - e^(epsilon - 2 slack)
        # Q'(S)), and a logarithm of probabilities that is off in each release is off by the sum in all of them.
        slack = _slack(entries)
        as_gaussian = ((sigma, Full() if isinstance(own, Distributed) else own, count) for sigma, own, count in entries)
        return 2 * slack + epsilon_of(tuple(as_gaussian), delta * math.exp(-slack), method, relation, grid, group)
    if group > 1:
        entries = tuple(_of_group(entry, group, method, relation) for entry in entries)
    about = _about(entries, relation)
    loss = max(_largest_loss(sigma / _group_of(sampling), relation) for sigma, sampling, _ in entries)
    if max(about, loss) > MAX_EPSILON:
        # There is practically no privacy, so amplification by sampling is not worth a distribution of gigabytes.
        entries = tuple(
            (sigma / _group_of(sampling), _without_amplification(sampling), count * _num_steps(sampling))
            for sigma, sampling, count in entries
        )
    if method == "rdp":
        return _rdp(entries, delta, relation)
    # The exact result in closed form, which no accountant improves.
    if all(isinstance(sampling, Full) for _, sampling, _ in entries):
        return _analytic(entries, delta, relation)
    # Rounded up to a power of two, so that cached distributions on the same grid are found again.
    coarsening = math.ceil(math.log2(max(about / MAX_FINE_EPSILON, loss / MAX_FINE_LOSS, 1.0)))
    return _pld(entries, delta, relation, grid * 2.0**coarsening)


def usable_method(entries: Sequence[Entry], method: Method) -> Method:
    """Returns the method, or ``"rdp"`` if releases with distributed noise have only that bound."""
    return "rdp" if _slack(entries) > MAX_SLACK else method


def _slack(entries: Sequence[Entry]) -> float:
    of_distributed = ((own, count) for _, own, count in entries if isinstance(own, Distributed))
    return sum(math.inf if own.slack is None else count * own.slack for own, count in of_distributed)


def _scale(relation: Relation) -> float:
    """Returns the sensitivity of a sum of contributions of norm 1."""
    return 2.0 if relation == "replace_one" else 1.0


def _about(entries: Sequence[Entry], relation: Relation) -> float:
    """Estimates epsilon by the central limit theorem for many releases. Not a bound; only used to choose a grid."""
    total = 0.0
    for sigma, sampling, count in entries:
        rate = 1.0 if isinstance(sampling, LocalSteps) else client_rate(sampling)
        precision = (_scale(relation) * _group_of(sampling) / sigma) ** 2
        total += count * _num_steps(sampling) * min(precision, rate**2 * math.expm1(min(precision, 100.0)))
    return total / 2 + 5 * total**0.5


@dataclass(frozen=True)
class _Group(Poisson):
    """Independent Poisson sampling of each of the ``size`` contributors in which neighbours differ."""

    size: int = 1


def _group_of(sampling: Sampling) -> int:
    return sampling.size if isinstance(sampling, _Group) else 1


def _of_group(entry: Entry, group: int, method: Method, relation: Relation) -> Entry:
    """Returns releases that cost as much for neighbours that differ in one contributor as these do for a group.

    If no bound for groups is known, sampling counts as no amplification; noise is then relative to ``group`` times the
    largest norm.
    """
    sigma, sampling, count = entry
    if isinstance(sampling, LocalSteps):
        return _of_group((sigma, sampling.batches, count * sampling.num_steps), group, method, relation)
    if isinstance(sampling, Poisson) and sampling.rate < 1 and method == "pld" and relation == "add_or_remove_one":
        return sigma, _Group(sampling.rate, group), count
    return sigma / group, _without_amplification(sampling), count


def _without_amplification(sampling: Sampling) -> Sampling:
    # Only the Rényi divergences of distributed noise are known, and they grow with the distance like a Gaussian's.
    return sampling if isinstance(sampling, Distributed) else Full()


def _largest_loss(sigma: float, relation: Relation) -> float:
    """Returns the privacy loss of one release that is exceeded with a probability of about 1e-19 only."""
    separation = _scale(relation) / sigma
    return separation**2 / 2 + 9 * separation


def _num_steps(sampling: Sampling) -> int:
    return sampling.num_steps if isinstance(sampling, LocalSteps) else 1


def _analytic(entries: Sequence[Entry], delta: float, relation: Relation) -> float:
    """Returns the exact epsilon of all releases without amplification: Gaussians compose to a single Gaussian."""
    precision = sum(count * (_scale(relation) / sigma) ** 2 for sigma, _, count in entries)
    return float(dp_accounting().get_epsilon_gaussian(precision**-0.5, delta)) + 1e-11


def _rdp(entries: Sequence[Entry], delta: float, relation: Relation) -> float:
    from dp_accounting import rdp

    has_skellam = any(isinstance(sampling, Distributed) and sampling.noise == "skellam" for _, sampling, _ in entries)
    orders = tuple(INTEGER_ORDERS if has_skellam else rdp.RdpAccountant().orders)
    total = sum(count * _divergences(sigma, sampling, relation, orders) for sigma, sampling, count in entries)
    with quiet_accountant():
        return float(rdp.compute_epsilon(orders, total, delta)[0])


@lru_cache(maxsize=64)
def _divergences(sigma: float, sampling: Sampling, relation: Relation, orders: tuple[float, ...]) -> np.ndarray:
    """Returns the Rényi divergences of one release at each order; with sampling they take tenths of a second."""
    dpa = dp_accounting()
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(orders, dpa.NeighboringRelation[relation.upper()])
    with quiet_accountant():
        accountant.compose(*_rdp_event(dpa, sigma / _scale(relation), sampling, 1, relation))
    return np.asarray(accountant.rdp)


@contextmanager
def quiet_accountant() -> Iterator[None]:
    """Silences the warnings of the RDP accountant about orders that it skips, which only loosens the bound."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _rdp_event(dpa: Any, sigma: float, sampling: Sampling, count: int, relation: Relation) -> tuple[Any, int]:
    """Returns the event and count for dp-accounting, with ``sigma`` relative to the sensitivity."""
    if isinstance(sampling, LocalSteps):
        steps, clients = sampling.num_steps, sampling.clients
        if sampling.participation == "hidden" and isinstance(clients, Poisson) and isinstance(sampling.batches, Full):
            return _rdp_event(dpa, sigma / steps**0.5, clients, count, relation)
        return _rdp_event(dpa, sigma, sampling.batches, count * steps, relation)
    event = dpa.GaussianDpEvent(sigma)
    if isinstance(sampling, Poisson) and relation == "add_or_remove_one":
        event = dpa.PoissonSampledDpEvent(sampling.rate, event)
    elif isinstance(sampling, FixedSize) and relation == "replace_one":
        event = dpa.SampledWithoutReplacementDpEvent(sampling.population, sampling.cohort, event)
    return event, count


def _pld(entries: Sequence[Entry], delta: float, relation: Relation, grid: float) -> float:
    total = None
    for sigma, sampling, count in entries:
        loss = _loss(sigma, sampling, count, relation, grid)
        total = loss if total is None else total.compose(loss)
    assert total is not None
    return float(total.get_epsilon_for_delta(delta))


def _loss(sigma: float, sampling: Sampling, count: int, relation: Relation, grid: float) -> Any:
    """Returns the privacy loss distribution of ``count`` releases."""
    if isinstance(sampling, _Group):
        return _mixture(sigma, sampling.rate, sampling.size, grid).self_compose(count)
    if isinstance(sampling, Poisson):
        return _single(sigma, sampling.rate, relation, grid).self_compose(count)
    if isinstance(sampling, LocalSteps):
        return _round(sigma, sampling, relation, grid).self_compose(count)
    if isinstance(sampling, FixedSize) and sampling.cohort < sampling.population and relation == "replace_one":
        return _without_replacement(sigma, client_rate(sampling), grid).self_compose(count)
    # Gaussians without amplification compose to one exactly, so that no error of a grid adds up over the releases.
    return _single(sigma / count**0.5, 1.0, relation, grid)


@lru_cache(maxsize=64)
def _single(sigma: float, rate: float, relation: Relation, grid: float) -> Any:
    dpa = dp_accounting()
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        sigma,
        value_discretization_interval=grid,
        sampling_prob=rate,
        neighboring_relation=dpa.NeighboringRelation[relation.upper()],
    )


@lru_cache(maxsize=64)
def _mixture(sigma: float, rate: float, group: int, grid: float) -> Any:
    r"""Returns the privacy loss distribution of one release to which a binomial number of a group contribute.

    The pair that dominates is :math:`P = \sum_k \binom{g}{k} q^k (1 - q)^{g - k} \mathcal{N}(k, z^2)` and
    :math:`Q = \mathcal{N}(0, z^2)`, all of the group pulling in one direction. dp-accounting has it too, but needs
    minutes where this needs a second.

    Reference:
        Ganesh, "Tight Group-Level DP Guarantees for DP-SGD with Sampling via Mixture of Gaussians Mechanisms", 2024.
    """
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld import privacy_loss_distribution as pld
    from scipy.special import log_ndtr, logsumexp, ndtr  # type: ignore[import-untyped, unused-ignore]

    sizes = np.arange(group + 1)
    log_chance = np.array([math.lgamma(group + 1) - math.lgamma(k + 1) - math.lgamma(group - k + 1) for k in sizes])
    log_chance += sizes * math.log(rate) + (group - sizes) * math.log1p(-rate)

    def loss(x: np.ndarray) -> np.ndarray:
        return np.asarray(logsumexp(log_chance + (sizes * x[:, None] - sizes**2 / 2) / sigma**2, axis=1))

    # The loss increases with x, from the probability that nobody contributes.
    low, high = np.array([-12.0 * sigma]), np.array([group + 12.0 * sigma])
    bottom, top = math.floor(float(log_chance[0]) / grid), math.ceil(float(loss(high)[0]) / grid)
    epsilon = np.arange(bottom, top + 1) * grid
    low, high = np.full(len(epsilon), low[0] - group), np.full(len(epsilon), high[0] + group)
    for _ in range(60):
        middle = (low + high) / 2
        is_above = loss(middle) > epsilon
        low, high = np.where(is_above, low, middle), np.where(is_above, middle, high)
    # A small error of the threshold changes the difference only in second order.
    over = np.exp(log_chance)[:, None] * ndtr((sizes[:, None] - high) / sigma)
    removed = over.sum(0) - np.exp(epsilon + log_ndtr(-high / sigma))
    below = np.exp(log_chance)[:, None] * ndtr((high - sizes[:, None]) / sigma)
    added = ndtr(high / sigma) - np.exp(-epsilon) * below.sum(0)
    create = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap
    return pld.PrivacyLossDistribution(
        create(grid, bottom, top, np.clip(removed, 0.0, 1.0)),
        create(grid, -top, -bottom, np.clip(added[::-1], 0.0, 1.0)),
    )


@lru_cache(maxsize=64)
def _without_replacement(sigma: float, rate: float, grid: float) -> Any:
    r"""Returns the privacy loss distribution of one noisy sum over a cohort of fixed size, under "replace one".

    Let :math:`\delta(\varepsilon)` be the profile of the sum if the replaced contributor is drawn: that of a Gaussian
    with sensitivity 2. If it is drawn with probability :math:`q`, without replacement, all neighbours X, Y satisfy

    .. math::
        H_{e^{\varepsilon'}}(X \Vert Y) \le h(\varepsilon') = q \, \delta(\varepsilon)
        \text{ at } e^{\varepsilon'} = 1 + q (e^\varepsilon - 1), \quad \varepsilon' \ge 0.

    Replacing works in both directions, so :math:`h(-\varepsilon') = 1 - e^{-\varepsilon'} + e^{-\varepsilon'}
    h(\varepsilon')` bounds the rest of the curve. As a function of :math:`e^{\varepsilon'}`, h is convex: at 1 its
    slope is :math:`-\Phi(-1 / z)` from above and :math:`-1 + q (1 - 2 \Phi(-1 / z)) + \Phi(-1 / z)` from below, which
    is less. So h is the profile of a pair of distributions that dominates all neighbours at once, and the composition
    of that pair dominates any adaptive composition.

    Reference:
        Balle, Barthe and Gaboardi, "Privacy Amplification by Subsampling", NeurIPS 2018 (sampling without replacement);
        Zhu, Dong and Wang, "Optimal Accounting of Differential Privacy via Characteristic Function", AISTATS 2022
        (dominating pairs and their composition).
    """
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld import privacy_loss_distribution as pld
    from scipy.special import log_ndtr, ndtr  # type: ignore[import-untyped, unused-ignore]

    separation = 2 / sigma
    # log(1 + q (e^x - 1)) for large x too.
    top = math.ceil(float(np.logaddexp(math.log1p(-rate), _largest_loss(sigma, "replace_one") + math.log(rate))) / grid)
    up = np.arange(1, top + 1) * grid
    # log(1 + (e^x - 1) / q), where e^x would overflow too.
    inside = np.where(up < 30, np.log1p(np.expm1(np.minimum(up, 30.0)) / rate), up - math.log(rate))
    drawn = ndtr(separation / 2 - inside / separation)
    drawn = drawn - np.exp(inside + log_ndtr(-separation / 2 - inside / separation))
    above = rate * np.maximum(drawn, 0.0)
    at_zero = rate * float(ndtr(separation / 2) - ndtr(-separation / 2))
    below = -np.expm1(-up) + np.exp(-up) * above
    deltas = np.concatenate([below[::-1], [at_zero], above])
    return pld.PrivacyLossDistribution(
        pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(grid, -top, top, np.clip(deltas, 0.0, 1.0))
    )


@lru_cache(maxsize=64)
def _round(sigma: float, sampling: LocalSteps, relation: Relation, grid: float) -> Any:
    """Returns the privacy loss distribution of a round of local steps, whose client is drawn once."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    rate = client_rate(sampling.clients)
    hidden = sampling.participation == "hidden" and isinstance(sampling.clients, Poisson)
    if hidden and relation == "add_or_remove_one" and isinstance(sampling.batches, Full):
        return _single(sigma / sampling.num_steps**0.5, rate, relation, grid)
    inner = _loss(sigma, sampling.batches, sampling.num_steps, relation, grid)
    if rate == 1.0:
        return inner
    if hidden and relation == "add_or_remove_one":
        return subsample(inner, rate, grid)
    # Visible participation: the adversary knows whether the client was drawn, so the losses mix instead of shrinking.
    return inner.compute_mixture(pld.identity(grid), rate)


def subsample(inner: Any, rate: float, grid: float = GRID) -> Any:
    r"""Returns the privacy loss distribution of any mechanism after Poisson sampling.

    With :math:`(P, Q)` a dominating pair of the mechanism, the sampled one has
    :math:`\delta'(\varepsilon') = q \delta(\varepsilon)` at :math:`e^{\varepsilon'} = 1 + q (e^\varepsilon - 1)` for
    :math:`((1 - q) Q + q P, Q)`, and :math:`1 - e^{\varepsilon'} + e^{\varepsilon'} \delta'(-\varepsilon')` for the
    pair in the other order.

    Reference:
        Balle, Barthe and Gaboardi, "Privacy Amplification by Subsampling", NeurIPS 2018; Doroshenko et al., "Connect
        the Dots", PETS 2022.
    """
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld import privacy_loss_distribution as pld

    def plain(epsilon: np.ndarray) -> np.ndarray:
        """Returns the larger delta of the two orders of the pair, continued to negative epsilons by symmetry."""
        sizes, where = np.unique(np.abs(epsilon), return_inverse=True)
        found = np.asarray(inner.get_delta_for_epsilon(sizes))[where]
        return np.where(epsilon >= 0, found, -np.expm1(epsilon) + np.exp(epsilon) * found)

    def sampled(epsilon: np.ndarray) -> np.ndarray:
        odds = 1 + np.expm1(epsilon) / rate
        inside = np.log(np.maximum(odds, 1e-300))
        return np.where(odds > 1e-300, rate * plain(inside), -np.expm1(epsilon))

    # The grid must reach the highest loss. dp-accounting returns infinity for a delta below the probability that the
    # distribution keeps at infinity, hence the search for the smallest delta that works.
    ends = (inner.get_epsilon_for_delta(10.0**exponent) for exponent in range(-15, -5))
    highest = next((end for end in ends if math.isfinite(end)), 50.0)
    top = math.ceil(math.log1p(rate * math.expm1(highest)) / grid)
    bottom = math.floor(math.log1p(-rate) / grid)
    down, up = np.arange(bottom, top + 1) * grid, np.arange(-top, -bottom + 1) * grid
    # Clipped, because rounding can take these probabilities slightly out of [0, 1].
    removed = np.clip(sampled(down), 0.0, 1.0)
    added = np.clip(-np.expm1(up) + np.exp(up) * sampled(-up), 0.0, 1.0)
    create = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap
    return pld.PrivacyLossDistribution(create(grid, bottom, top, removed), create(grid, -top, -bottom, added))
