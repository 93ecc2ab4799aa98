"""The registry of algorithm names, which users can write instead of an object."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar

from lightning_fl.algorithms.base import Algorithm

AlgorithmClass = TypeVar("AlgorithmClass", bound=type[Algorithm])

ENTRY_POINTS = "lightning_fl.algorithms"
"""The entry-point group with which an installed package registers its algorithms."""

_ALGORITHMS: dict[str, type[Algorithm]] = {}


def register(name: str) -> Callable[[AlgorithmClass], AlgorithmClass]:
    """Class decorator: registers an algorithm as ``name``, also for ``Trainer(strategy=name)``.

    Raises:
        ValueError: If the name is taken.
    """

    def decorate(algorithm: AlgorithmClass) -> AlgorithmClass:
        if name in _ALGORITHMS:
            raise ValueError(f"The algorithm name {name!r} is taken by {_ALGORITHMS[name].__qualname__}.")
        _ALGORITHMS[name] = algorithm
        return algorithm

    return decorate


def load_entry_points() -> None:
    """Registers the algorithms that installed packages provide in the entry-point group ``lightning_fl.algorithms``.

    An entry point that can't be loaded, is not an algorithm, or has a name that is taken is skipped with a warning.
    """
    for entry_point in entry_points(group=ENTRY_POINTS):
        name = entry_point.name.lower()
        try:
            algorithm = entry_point.load()
            if not (isinstance(algorithm, type) and issubclass(algorithm, Algorithm)):
                raise ValueError(f"{entry_point.value} is not a subclass of fl.algorithms.Algorithm.")
            if _ALGORITHMS.get(name) is not algorithm:  # it may have registered itself when it was loaded
                register(name)(algorithm)
        except Exception as error:  # a broken package must not break `import lightning_fl`
            package = entry_point.dist.name if entry_point.dist else "a package"
            warnings.warn(
                f"Skipped the algorithm {entry_point.name!r} of {package}: {type(error).__name__}: {error} Fix "
                f"its entry point {entry_point.value!r}, or uninstall it.",
                stacklevel=2,
            )


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
