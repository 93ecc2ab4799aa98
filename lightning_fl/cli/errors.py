"""One line for a mistake in a configuration, instead of the tree of alternatives that jsonargparse tried."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass

ROOTS = ("trainer", "model", "data", "seed_everything", "ckpt_path", "optimizer", "lr_scheduler", "dry_run", "config")
ROOMS = ("algorithms", "callbacks", "datamodules", "models", "clients", "aggregation", "privacy")
_KEY = re.compile(r'Parser key "(.+)":$')
_CLASS = re.compile(r"Problem with given class_path '(.+)':$")
_EXPECTED = re.compile(r"Expected a <class '(?:\w+\.)*(\w+)'>(?:\. Got value: (.*))?$")
_IGNORED = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Subclass types expect",
    "a class path",
    "a dict ",
)


_REQUIRED = re.compile(r"the following arguments are required: ([\w., ]+)")


class ConfigurationError(ValueError):
    """The configuration is wrong; the message is one line for the user."""


@dataclass(frozen=True)
class _Leaf:
    """An error at the end of a branch of the tree.

    Args:
        depth: Its indentation.
        keys: The path of settings to it.
        class_path: The class whose settings are wrong, or an empty string.
        text: What is wrong.
    """

    depth: int
    keys: tuple[str, ...]
    class_path: str
    text: str


def in_one_line(message: str) -> str:
    """Extracts the mistake from a message of jsonargparse.

    A value that may have several types is refused once for each of them. Failed alternatives, such as "Expected a
    <class 'str'>" for a class with settings, are not informative; the innermost error names the mistake.

    Args:
        message: The text of an error of jsonargparse.
    """
    leaves = list(_leaves(message))
    if found := _REQUIRED.search(message):
        names = ", ".join(name.partition(".")[2] or name for name in found[1].split(", "))
        return f"There is no {names}. Name a file that has it, --config config.yaml; `lightning-fl init` writes one."
    if not leaves:
        return message.partition("\n")[0]
    told = [leaf for leaf in leaves if not _EXPECTED.match(leaf.text) and not leaf.text.startswith("Not a valid")]
    where = max(told or leaves, key=lambda leaf: leaf.depth)
    if told and not any(leaf.depth > where.depth for leaf in leaves):
        return _sentence(where)
    # All alternatives are plain types, and the value has none of them.
    where = max(leaves, key=lambda leaf: leaf.depth)
    types = [found[1] for leaf in leaves if leaf.depth == where.depth and (found := _EXPECTED.match(leaf.text))]
    value = next((found[2] for leaf in leaves if (found := _EXPECTED.match(leaf.text)) and found[2]), None)
    if value is None:
        value = message.rpartition("Given value: ")[2].partition("\n")[0]
    expected = " or ".join(dict.fromkeys("null" if name == "NoneType" else name for name in types))
    return f"{'.'.join(where.keys)}: expected {expected}, found {value!r}"


def _leaves(message: str) -> Iterable[_Leaf]:
    """Reads the tree by its indentation."""
    open_keys: list[tuple[int, str]] = []
    open_classes: list[tuple[int, str]] = []
    for line in message.splitlines():
        text = line.lstrip(" ")
        depth = len(line) - len(text)
        text = text.removeprefix("- ")
        open_keys = [(at, key) for at, key in open_keys if at < depth]
        open_classes = [(at, name) for at, name in open_classes if at < depth]
        if found := _KEY.match(text):
            open_keys.append((depth, found[1]))
        elif found := _CLASS.match(text):
            open_classes.append((depth, found[1]))
        elif text and not text.startswith(_IGNORED):
            class_path = open_classes[-1][1] if open_classes else ""
            yield _Leaf(depth, tuple(key for _, key in open_keys), class_path, text)


def _sentence(leaf: _Leaf) -> str:
    where = f"{'.'.join(leaf.keys)}: " if leaf.keys else ""
    if found := re.match(r"Option '(.+)' is not accepted", leaf.text):
        name = leaf.class_path.rpartition(".")[2]
        return f"{where}{name} has no setting {found[1]!r}.{_closest(found[1], _settings(leaf.class_path))}"
    if found := re.match(r"Subcommand '\w+' does not accept option '(.+)'", leaf.text):
        return _no_such_setting(found[1])
    if found := re.match(r"unrecognized arguments: --([\w.]+)", leaf.text):
        return _no_such_setting(found[1])
    if found := re.match(r"Expected a dot import path string: (.+)", leaf.text):
        known = [name for room in ROOMS for name in importlib.import_module(f"lightning_fl.{room}").__all__]
        return f"{where}no class is known as {found[1]!r}; write package.Class.{_closest(found[1], known)}"
    return where + leaf.text


def _no_such_setting(key: str) -> str:
    root, _, rest = key.partition(".")
    if root != "trainer":
        return f"There is no setting {root!r}.{_closest(root, ROOTS)}"
    key = f"trainer.{rest.partition('.')[0]}"
    return (
        f"There is no setting {key!r}.{_closest(key, [f'trainer.{name}' for name in _settings('lightning.Trainer')])}"
    )


def _settings(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []


def _closest(word: str, known: Iterable[str]) -> str:
    """A suggestion, or a short list of all options."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Its settings: {', '.join(known)}." if 0 < len(known) <= 30 else ""
