"""Names of algorithms: what a user may write instead of an object."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TypeVar

from lightning_fl.algorithms.base import Algorithm

AlgorithmClass = TypeVar("AlgorithmClass", bound=type[Algorithm])

_ALGORITHMS: dict[str, type[Algorithm]] = {}


def register(name: str) -> Callable[[AlgorithmClass], AlgorithmClass]:
    """Class decorator: makes an algorithm known by ``name``, also as ``Trainer(strategy=name)``.

    Raises:
        ValueError: If the name is taken.
    """

    def decorate(algorithm: AlgorithmClass) -> AlgorithmClass:
        if name in _ALGORITHMS:
            raise ValueError(f"The algorithm name {name!r} is taken by {_ALGORITHMS[name].__qualname__}.")
        _ALGORITHMS[name] = algorithm
        return algorithm

    return decorate


def registered() -> dict[str, type[Algorithm]]:
    """All registered algorithms by name."""
    return dict(_ALGORITHMS)


def get_algorithm(name: str) -> Algorithm:
    """The algorithm called ``name`` with its default hyper-parameters.

    Raises:
        ValueError: If no algorithm has that name; the message lists the names.
    """
    if name.lower() in _ALGORITHMS:
        return _ALGORITHMS[name.lower()]()
    close = difflib.get_close_matches(name.lower(), _ALGORITHMS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"Unknown algorithm {name!r}; expected one of {', '.join(sorted(_ALGORITHMS))}.{hint}")
