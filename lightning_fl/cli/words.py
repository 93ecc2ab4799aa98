"""Lets settings follow the short name of a strategy or an algorithm on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_fl.algorithms import registered
from lightning_fl.yaml_files import read_yaml

STRATEGY = "--trainer.strategy"
_SETTING = re.compile(rf"{STRATEGY}\.(?:init_args\.)?(?P<name>\w+)(?P<of_it>\.[\w.]+)?$")


def spell_out_names(words: Sequence[str]) -> list[str]:
    """Replaces the names of a strategy and an algorithm by their classes if their settings follow.

    jsonargparse treats a name as a string, which has no settings: ``--trainer.strategy fedprox`` with
    ``--trainer.strategy.algorithm.mu 0.1`` would be an error. The names may also be in the files given by ``--config``.

    Args:
        words: The arguments of the command line.

    Returns:
        The same arguments, with the classes before the first setting.
    """
    words = [part for word in words for part in _split(word)]
    strategy, algorithm = _from_files(words)
    first_setting, first_of_algorithm = None, None
    for index, word in enumerate(words):
        if word == STRATEGY and index + 1 < len(words):
            strategy, algorithm = words[index + 1], None
        elif found := _SETTING.match(word):
            first_setting = index if first_setting is None else first_setting
            if found["name"] == "algorithm" and found["of_it"] is None and index + 1 < len(words):
                algorithm = words[index + 1]
            elif found["name"] == "algorithm" and first_of_algorithm is None:
                first_of_algorithm = index
    if strategy in registered() and first_setting is not None:
        chosen = algorithm if isinstance(algorithm, str) else strategy
        chosen = chosen if first_of_algorithm is None else _class_path(chosen)
        words = _without(words, STRATEGY)
        at = next(index for index, word in enumerate(words) if _SETTING.match(word))
        words[at:at] = [STRATEGY, "lightning_fl.FederatedStrategy", f"{STRATEGY}.algorithm", chosen]
    elif isinstance(algorithm, str) and algorithm.lower() in registered() and first_of_algorithm is not None:
        words[first_of_algorithm:first_of_algorithm] = [f"{STRATEGY}.algorithm", _class_path(algorithm)]
    return words


def _split(word: str) -> list[str]:
    """``--a.b=c`` as two words, for options of the strategy only."""
    name, has_value, value = word.partition("=")
    is_strategy = name == STRATEGY or _SETTING.match(name)
    return [name, value] if has_value and is_strategy else [word]


def _without(words: list[str], option: str) -> list[str]:
    """The arguments without an option and its value."""
    places = {place for at, word in enumerate(words) if word == option for place in (at, at + 1)}
    return [word for at, word in enumerate(words) if at not in places]


def _from_files(words: Sequence[str]) -> tuple[Any, Any]:
    """The strategy and algorithm of the configuration files; later files override earlier ones."""
    strategy: Any = None
    algorithm: Any = None
    for option, value in pairwise(words):
        if option in ("--config", "-c") and Path(value).is_file():
            given = read_yaml(Path(value))
            trainer = given.get("trainer") if isinstance(given, dict) else None
            strategy = (trainer or {}).get("strategy", strategy)
    if isinstance(strategy, dict):
        algorithm = (strategy.get("init_args") or {}).get("algorithm")
    return strategy if isinstance(strategy, str) else None, algorithm


def _class_path(name: str) -> str:
    found = registered().get(name.lower())
    return name if found is None else f"{found.__module__}.{found.__qualname__}"
