"""Robust rules in plain NumPy, straight from the papers: what the contract suite expects of those that are shipped.

A rule is a function of the rows ``[n, d]`` and of the number of attackers. One that weighs whole updates gives the
coefficients ``[n]``, one that works on coordinates the values ``[d]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import torch

from lightning_fl.tree import to_sum_dtype, update_trees
from lightning_fl.types import Aggregate, Tree, Update

Array = Any
Rule = Callable[[Array, int], Array]
SHARE = 0.2


def distances(rows: Array) -> Array:
    return np.linalg.norm(rows[:, None] - rows, axis=2)


def cosines(rows: Array) -> Array:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def scores(rows: Array, f: int) -> Array:
    squares = np.sort(distances(rows) ** 2, axis=1)[:, 1:]
    return squares[:, : max(1, len(rows) - f - 2)].sum(1)


def one_hot(chosen: Sequence[int], n: int) -> Array:
    return np.bincount(chosen, minlength=n) / len(chosen)


def krum(rows: Array, f: int) -> Array:
    return one_hot([int(np.argmin(scores(rows, f)))], len(rows))


def multi_krum(rows: Array, f: int) -> Array:
    return one_hot(np.argsort(scores(rows, f), kind="stable")[: len(rows) - f], len(rows))


def geometric_median(rows: Array, f: int) -> Array:
    """By Weiszfeld's iteration, long enough for rows among which the median is none."""
    c = np.full(len(rows), 1 / len(rows))
    for _ in range(5000):
        c = 1 / np.linalg.norm(rows - c @ rows, axis=1)
        c /= c.sum()
    return c


def clipping(rows: Array, f: int) -> Array:
    """Three steps with tau = 1, on the coefficients themselves."""
    c = np.zeros(len(rows))
    for _ in range(3):
        factors = np.minimum(1, 1 / np.linalg.norm(rows - c @ rows, axis=1)) / len(rows)
        c = c + factors - factors.sum() * c
    return c


def norm_bound(rows: Array, f: int) -> Array:
    norms = np.linalg.norm(rows, axis=1)
    return np.minimum(1, np.median(norms) / norms) / len(rows)


def fedmgda(rows: Array, f: int) -> Array:
    """By trying which shares are at a bound."""
    norms, n, gram = np.linalg.norm(rows, axis=1), len(rows), cosines(rows)
    low, high = max(0, 1 / n - 0.1), min(1, 1 / n + 0.1)
    best, least = np.full(n, 1 / n), np.inf
    for bounds in product((low, high, None), repeat=n):
        free = [place for place, bound in enumerate(bounds) if bound is None]
        shares = np.array([0 if bound is None else bound for bound in bounds], dtype=float)
        if free:
            ones = np.ones((len(free), 1))
            system = np.block([[gram[np.ix_(free, free)], ones], [ones.T, 0]])
            shares[free] = np.linalg.lstsq(system, np.append(-(gram @ shares)[free], 1 - shares.sum()))[0][:-1]
        if abs(shares.sum() - 1) < 1e-12 and (shares > low - 1e-12).all() and (shares < high + 1e-12).all():
            length = shares @ gram @ shares
            best, least = (shares, length) if length < least - 1e-15 else (best, least)
    found: Array = np.median(norms) * best / norms
    return found


def fltrust(rows: Array, f: int) -> Array:
    """With the first row as the root client's."""
    norms = np.linalg.norm(rows, axis=1)
    trust = np.maximum(0, cosines(rows)[0])
    trust[0] = 0
    return trust * norms[0] / norms / trust.sum() if trust.sum() else trust


def dnc(rows: Array, f: int) -> Array:
    centred = rows - rows.mean(0)
    along = (centred @ np.linalg.svd(centred)[2][0]) ** 2
    return one_hot(np.argsort(along, kind="stable")[: len(rows) - f], len(rows))


def flame(rows: Array, f: int) -> Array:
    """The smallest cosine distance at which more than half of the rows hang together."""
    n, apart = len(rows), 1 - cosines(rows)
    for threshold in sorted(apart[i, j] for i, j in combinations(range(n), 2)):
        reach = np.linalg.matrix_power((apart <= threshold).astype(int), n) > 0
        inside = max(reach, key=lambda row: row.sum())
        if 2 * inside.sum() > n:
            return norm_bound(rows, f) * n * inside / inside.sum()
    raise AssertionError


def screened(rows: Array, f: int) -> Array:
    """The mean of the rows whose norm, and cosine to the sum of the others, lie within 3 robust deviations."""

    def z(values: Array) -> Array:
        apart = values - np.median(values)
        return apart / (1.4826 * np.median(np.abs(apart)))

    norms = np.linalg.norm(rows, axis=1)
    others = rows.sum(0) - rows
    cosine = (rows * others).sum(1) / norms / np.linalg.norm(others, axis=1)
    return one_hot(np.flatnonzero((np.abs(z(norms)) <= 3) & (z(cosine) >= -3)), len(rows))


def foolsgold(rows: Array, f: int) -> Array:
    """The authors' loops."""
    n = len(rows)
    cs = cosines(rows)
    np.fill_diagonal(cs, 0)
    most = cs.max(axis=1)
    for i in range(n):
        for j in range(n):
            if i != j and most[i] < most[j]:
                cs[i, j] *= most[i] / most[j]
    w = np.clip(1 - cs.max(axis=1), 0, 1)
    w = np.minimum(w / w.max(), 0.99)
    w = np.clip(np.log(w / (1 - w)) + 0.5, 0, 1)
    return w / w.sum()


def median(rows: Array, f: int) -> Array:
    return np.median(rows, axis=0)


def trimmed_mean(rows: Array, f: int) -> Array:
    return np.sort(rows, axis=0)[f : len(rows) - f].mean(0)


def around_median(rows: Array, kept: int) -> Array:
    nearest = np.argsort(np.abs(rows - np.median(rows, axis=0)), axis=0, kind="stable")[:kept]
    return np.take_along_axis(rows, nearest, axis=0).mean(0)


def mean_around_median(rows: Array, f: int) -> Array:
    return around_median(rows, len(rows) - f)


def bulyan(rows: Array, f: int) -> tuple[Array, Callable[[Array], Array]]:
    left, chosen = list(range(len(rows))), []
    for _ in range(len(rows) - 2 * f):
        chosen.append(left.pop(int(np.argmin(scores(rows[left], f))) if len(left) > 1 else 0))
    return chosen, lambda columns: around_median(columns[chosen], len(chosen) - 2 * f)


def flat(updates: Sequence[Update], tree: str) -> tuple[Array, Tree]:
    """The tree of each update as a row, and the first as a template."""
    own = [to_sum_dtype(update_trees(update)[tree]) for update in updates]
    return np.stack([np.concatenate([t.double().numpy().ravel() for t in one.values()]) for one in own]), own[0]


def unflat(row: Array, template: Tree) -> Tree:
    found, start = {}, 0
    for name, tensor in template.items():
        found[name] = torch.from_numpy(row[start : start + tensor.numel()]).reshape(tensor.shape).to(tensor.dtype)
        start += tensor.numel()
    return found


def geometry(updates: Sequence[Update]) -> Array:
    """What a rule takes distances between: the changes, and each side channel as long as they are, by the medians."""
    delta = flat(updates, "delta")[0]
    parts = [delta, *(flat(updates, f"aux/{name}")[0] for name in updates[0].aux)]
    sizes = [np.sort(np.linalg.norm(own, axis=1))[(len(updates) - 1) // 2] for own in parts]
    return np.concatenate([own * sizes[0] / size for own, size in zip(parts, sizes, strict=True)], axis=1)


def medians(updates: Sequence[Update], counts: Array) -> Tree:
    """The buffers: medians over the updates that count, or over all if attackers could be half of those."""
    rows, template = flat(updates, "buffers")
    chosen = counts if counts.sum() > 2 * attackers(updates) else np.ones(len(rows), bool)
    return unflat(len(rows) * np.median(rows[chosen], axis=0), template) if template else {}


def total(updates: Sequence[Update], combine: Callable[[Array], Array]) -> Aggregate:
    """The aggregate whose mean ``combine`` makes of the rows of each tree; weights are ignored."""
    n, found = len(updates), {}
    for tree in update_trees(updates[0]):
        rows, template = flat(updates, tree)
        found[tree] = unflat(n * combine(rows), template) if template else {}
    aux = {name.removeprefix("aux/"): own for name, own in found.items() if name.startswith("aux/")}
    return Aggregate(found["delta"], found["buffers"], float(n), aux, n, n)


def attackers(updates: Sequence[Update]) -> int:
    return int(SHARE * len(updates) + 1e-9)


def by_coefficients(rule: Rule) -> Callable[[Sequence[Update]], Aggregate]:
    """The aggregate of a rule that weighs whole updates by their changes of the parameters and side channels."""

    def expected(updates: Sequence[Update]) -> Aggregate:
        c = rule(geometry(updates), attackers(updates))
        return replace(total(updates, lambda rows: c @ rows), buffers=medians(updates, c != 0))

    return expected


def by_coordinates(rule: Rule) -> Callable[[Sequence[Update]], Aggregate]:
    """The aggregate of a rule that works on each coordinate by itself."""
    return lambda updates: total(updates, lambda rows: rule(rows, attackers(updates)))


def of_bulyan(updates: Sequence[Update]) -> Aggregate:
    """Bulyan's selection follows the changes of the parameters and side channels, the rest each coordinate."""
    chosen, combine = bulyan(geometry(updates), 0)
    return replace(total(updates, combine), buffers=medians(updates, np.isin(np.arange(len(updates)), chosen)))
