"""Questions about ids and words: their number, the frequent ones, and those that all clients have."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_fl.analytics.question import Answer, Question, array, codes, labels, tree
from lightning_fl.types import Tree

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
END = "$"


def trie_parameters(n: int, epsilon: float, delta: float, length: int) -> tuple[int, int]:
    r"""The threshold :math:`\theta` and the number of votes per step :math:`m` of :class:`HeavyHitters`.

    :math:`\theta` is the smallest with :math:`(\theta - 2) / ((\theta - 1) \, \theta!) \le \delta`, and
    :math:`m = \lfloor n (1 - e^{-\epsilon / L}) / \theta \rfloor`.

    Args:
        n: Number of rows.
        epsilon: The privacy of all steps together.
        delta: Its delta.
        length: Number of steps :math:`L`, the length of the longest word including its end symbol.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not (n >= 1 and epsilon > 0 and 0 < delta < 1 and length >= 1):
        raise ValueError(f"n={n}, epsilon={epsilon}, delta={delta} or length={length} is out of range.")
    threshold = 4
    while (threshold - 2) / ((threshold - 1) * math.factorial(threshold)) > delta:
        threshold += 1
    return threshold, math.floor(n * -math.expm1(-epsilon / length) / threshold)


@dataclass(frozen=True)
class HeavyHitters(Question):
    r"""The words that many rows hold, found letter by letter with (epsilon, delta) differential privacy: TrieHH.

    In step :math:`l` each row is sampled with probability :math:`m / n`, with the operating system's randomness, and
    votes for the first :math:`l` letters of its word if the prefix of :math:`l - 1` letters was chosen before. Prefixes
    with :math:`\theta` votes are chosen. The paper samples exactly :math:`m` rows. Sampling each row independently has
    the same bounds: for a word in :math:`k \le n / m` rows the votes reach :math:`\theta` with a binomial tail below
    the paper's :math:`\delta`, and for others one row changes the tail by a factor of at most
    :math:`1 + \theta / (k - \theta)`.

    Args:
        column: The column of words. Letters outside the alphabet are removed, and long words are cut.
        epsilon: The epsilon of all steps together. Default 4.
        delta: Its delta. Default 1e-9.
        length: Length of the longest word. Default 10.
        alphabet: The letters. Default: a to z and 0 to 9.
        insecure_test_seed: Makes the sampling reproducible, for tests. The answer is then NOT PRIVATE.

    Reference:
        Zhu et al., "Federated Heavy Hitters Discovery with Differential Privacy", AISTATS 2020.
    """

    column: str
    epsilon: float = 4.0
    delta: float = 1e-9
    length: int = 10
    alphabet: str = ALPHABET
    insecure_test_seed: int | None = None

    is_private_by_itself = True

    def __post_init__(self) -> None:
        trie_parameters(1, self.epsilon, self.delta, self.length)
        if END in self.alphabet or len(set(self.alphabet)) != len(self.alphabet):
            raise ValueError(f"The alphabet {self.alphabet!r} names a letter twice, or {END!r}, which ends words.")

    @property
    def own_epsilon(self) -> tuple[float, float]:
        return (self.epsilon if self.insecure_test_seed is None else math.inf), self.delta

    def start(self) -> Any:
        return {"n": None, "prefixes": [""], "found": {}}

    def local(self, table: Any, state: Any) -> Tree:
        words = [self._clean(word) for word in labels(table, self.column) if word is not None]
        if state["n"] is None:
            return tree(n=len(words))
        letters = self.alphabet + END
        place = {prefix: row for row, prefix in enumerate(state["prefixes"])}
        votes = np.zeros((len(place), len(letters)))
        size = len(state["prefixes"][0])
        rate = state["m"] / max(state["n"], 1.0)
        for word, draw in zip(words, self._draws(len(words), size), strict=True):
            if draw < rate and (row := place.get(word[:size])) is not None and len(word) > size:
                votes[row, letters.index(word[size])] += 1
        return tree(votes=votes)

    def step(self, total: Tree, state: Any) -> Any:
        if state["n"] is None:
            # The number of rows is public in the paper too; it sets the sampling rate.
            n = float(total["n"])
            if not n:
                return Answer(0.0)
            threshold, m = trie_parameters(round(n), self.epsilon, self.delta, self.length)
            if m < threshold:
                return Answer(n, withheld=f"{n:g} rows are too few: no prefix could get {threshold} of {m} votes")
            return {**state, "n": n, "m": m, "threshold": threshold}
        votes, found, prefixes = array(total["votes"]), dict(state["found"]), []
        for row, prefix in enumerate(state["prefixes"]):
            for letter, count in zip(self.alphabet + END, votes[row].tolist(), strict=True):
                if count >= state["threshold"]:
                    if letter == END:
                        found[prefix] = None
                    else:
                        prefixes.append(prefix + letter)
        if prefixes and len(prefixes[0]) < self.length:
            return {**state, "prefixes": prefixes, "found": found}
        return Answer(state["n"], {"words": sorted([*found, *prefixes])})

    def _clean(self, word: str) -> str:
        return "".join(letter for letter in word if letter in self.alphabet)[: self.length] + END

    def _draws(self, size: int, step: int) -> np.ndarray:
        seed = secrets.randbits(128) if self.insecure_test_seed is None else [self.insecure_test_seed, step]
        return np.random.Generator(np.random.Philox(seed)).random(size)


@dataclass(frozen=True)
class Cardinality(Question):
    r"""HyperLogLog: the approximate number of distinct values, with a relative error of :math:`1.04 / \sqrt{2^p}`.

    The sketch allows testing whether it may contain a value, so it is not for secure aggregation or privacy.

    Args:
        column: The column.
        precision: :math:`p`, from 4 to 14. Default 12, an error of 1.6%.
        salt: A string that is hashed with each value.

    Reference:
        Flajolet et al., "HyperLogLog", 2007; small counts by linear counting.
    """

    column: str
    precision: int = 12
    salt: str = ""

    def __post_init__(self) -> None:
        if not 4 <= self.precision <= 14:
            raise ValueError(f"precision={self.precision} must lie between 4 and 14.")

    def check_sums(self) -> None:
        raise ValueError(
            "Cardinality's sketch reveals which values a client may hold, and summing sketches does not hide it. "
            "Ask without secure aggregation, or use fl.vertical.psi(..., cardinality_only=True)."
        )

    def local(self, table: Any, state: Any) -> Tree:
        registers, ranks = 1 << self.precision, 64 - self.precision + 1
        seen, present = np.zeros((registers, ranks + 1)), labels(table, self.column)
        for value in {label for label in present if label is not None}:
            digest = hashlib.blake2b(value.encode(), digest_size=8, key=self.salt.encode()[:64]).digest()
            register, rest = divmod(int.from_bytes(digest, "big"), 1 << (64 - self.precision))
            seen[register, ranks - rest.bit_length()] = 1
        return tree(seen=seen, n=sum(label is not None for label in present))

    def step(self, total: Tree, state: Any) -> Answer:
        seen = array(total["seen"]) > 0
        largest = (seen * np.arange(seen.shape[1])).max(1)
        size = len(largest)
        alpha = {16: 0.673, 32: 0.697, 64: 0.709}.get(size, 0.7213 / (1 + 1.079 / size))
        estimate = alpha * size**2 / float((2.0**-largest).sum())
        empty = int((largest == 0).sum())
        if estimate <= 2.5 * size and empty:
            estimate = size * math.log(size / empty)
        return Answer(float(total["n"]), {"distinct": round(estimate), "standard error": 1.04 / math.sqrt(size)})


@dataclass(frozen=True)
class Intersection(Question):
    """The number of values of a column that all clients have.

    The clients reveal their values to each other. If that is not allowed, use ``fl.vertical.psi``.

    Args:
        column: The column.
        values: Learned from the data.
    """

    column: str
    values: tuple[str, ...] = ()

    @property
    def undeclared(self) -> Mapping[str, str]:
        return {} if self.values else {"values": self.column}

    @property
    def individual(self) -> frozenset[str]:
        return frozenset({"values"})

    def local(self, table: Any, state: Any) -> Tree:
        has = np.bincount(codes(table, self.column, self.values), minlength=len(self.values) + 1) > 0
        return tree(has=has[:-1], clients=1)

    def step(self, total: Tree, state: Any) -> Answer:
        shared = float((array(total["has"]) >= float(total["clients"])).sum())
        return Answer(shared, {"shared": shared, "clients": float(total["clients"]), "distinct": len(self.values)})
