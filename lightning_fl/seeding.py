"""Randomness from (seed, round, client), independent of the rank and the order in which clients are trained."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from lightning_fl.types import ClientId


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from numbers and names; different parts give unrelated seeds."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def round_rng(seed: int, round: int, purpose: str) -> np.random.Generator:
    """A NumPy generator for choices about a whole round, such as its cohort."""
    return np.random.default_rng(derive_seed(seed, round, purpose))


def visit_seed(seed: int, number: int) -> int:
    """The seed of a client's visit in a round that comes after ``number`` others of the same client."""
    return derive_seed(seed, "visit", number) if number else seed


class Randomness(Protocol):
    """The random generator of cohorts: NumPy's, or :class:`SystemRandomness`."""

    def random(self, size: int) -> np.ndarray:
        """Numbers in [0, 1)."""

    def choice(self, a: int, size: int, *, replace: bool, shuffle: bool) -> np.ndarray:
        """``size`` different integers below ``a``."""

    def permutation(self, x: int) -> np.ndarray:
        """The integers below ``x`` in random order."""


class SystemRandomness:
    """The operating system's randomness, which nobody can predict or repeat, with a NumPy generator's methods."""

    def random(self, size: int) -> np.ndarray:
        """Numbers in [0, 1), multiples of ``2**-53``."""
        return (self._words(size) >> np.uint64(11)) * 2.0**-53

    def choice(self, a: int, size: int, *, replace: bool, shuffle: bool) -> np.ndarray:
        """``size`` different integers below ``a``, each subset equally likely."""
        assert not replace
        return np.array(random.SystemRandom().sample(range(a), size), dtype=np.int64)

    def permutation(self, x: int) -> np.ndarray:
        """The integers below ``x`` in random order."""
        return np.argsort(self._words(x))

    def _words(self, size: int) -> np.ndarray:
        return np.frombuffer(os.urandom(8 * size), dtype=np.uint64)


def client_generator(seed: int, round: int, client: ClientId, purpose: str) -> torch.Generator:
    """A torch generator for one client in one round."""
    return torch.Generator().manual_seed(derive_seed(seed, round, purpose, client))


@dataclass
class ClientRandomness:
    """Seeds torch, NumPy and random for a client, and restores their state afterwards."""

    _saved: list[Any] = field(default_factory=list)
    _numpy: np.random.MT19937 = field(default_factory=np.random.MT19937)
    _generators: list[tuple[torch.Generator, torch.Tensor]] = field(default_factory=list)

    def enter(self, seed: int, round: int, client: ClientId, purpose: str = "client") -> None:
        """Seeds the global generators for a client in a round; each purpose has another seed."""
        self._restore_generators()
        if not self._saved:
            cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
            own, state = np.random.get_bit_generator(), np.random.get_state(legacy=False)  # type: ignore[attr-defined]
            self._saved = [torch.get_rng_state(), cuda, random.getstate(), own, state]
            # NumPy's functions get another generator, because copying the state of theirs back takes 25 us per client.
            np.random.set_bit_generator(self._numpy)  # type: ignore[attr-defined]
        client_seed = derive_seed(seed, round, purpose, client)
        torch.default_generator.manual_seed(client_seed)
        if self._saved[1] is not None:
            torch.cuda.manual_seed(client_seed)
        np.random.seed(client_seed % 2**32)  # NumPy accepts 32 bits
        random.seed(client_seed)

    def seed_loader(self, loader: Any, seed: int, round: int, client: ClientId, purpose: str = "loader") -> None:
        """Seeds the generators of a client's loader and its samplers until :meth:`exit`."""
        loader_seed = derive_seed(seed, round, purpose, client)
        for generator in loader_generators(loader):
            self.seed_generator(generator, loader_seed)

    def seed_generator(self, generator: torch.Generator, seed: int) -> None:
        """Seeds a generator that belongs to the client's loader until :meth:`exit`."""
        self._generators.append((generator, generator.get_state()))
        generator.manual_seed(seed)

    def exit(self) -> None:
        """Restores the generators; does nothing if no client has entered."""
        self._restore_generators()
        if self._saved:
            cpu, cuda, python_state, numpy_generator, numpy_state = self._saved
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda)
            np.random.set_bit_generator(numpy_generator)  # type: ignore[attr-defined]
            if numpy_state["has_gauss"]:  # NumPy caches the second of a pair of normal numbers next to the generator
                np.random.set_state(numpy_state)
            random.setstate(python_state)
            self._saved = []

    def _restore_generators(self) -> None:
        for generator, state in reversed(self._generators):
            generator.set_state(state)
        self._generators.clear()


def loader_generators(loader: Any) -> list[torch.Generator]:
    """The generators of a loader and its samplers, each once."""
    samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in (loader, *samplers)]
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())


@contextmanager
def isolated_randomness(seed: int, round: int, client: ClientId, purpose: str = "client") -> Iterator[ClientRandomness]:
    """Runs a block with the randomness of a client in a round."""
    randomness = ClientRandomness()
    randomness.enter(seed, round, client, purpose)
    try:
        yield randomness
    finally:
        randomness.exit()
