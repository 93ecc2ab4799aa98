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
_CHOICE = re.compile(r"Expected a typing\.Literal\[(.+)\](?:\. Got value: (.*))?$")
_SUBCLASS = re.compile(r"Not a valid subclass of (\w+)$")
_CLASS_OF_NAME = re.compile(r"(?:Expected a dot import path string|Unexpected import path format): (.+)")
_VALUE = "Given value: "
_IGNORED = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value type",
    "Subclass types expect",
    "Expected a path but",
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
        value: What was given for the innermost setting, or an empty string.
    """

    depth: int
    keys: tuple[str, ...]
    class_path: str
    text: str
    value: str

    @property
    def expected(self) -> str | None:
        """The type, or the values, that were tried in vain; None if the error is about something else."""
        if found := _EXPECTED.match(self.text):
            return "null" if found[1] == "NoneType" else found[1]
        if found := _CHOICE.match(self.text):
            return f"one of {found[1]}"
        found = _SUBCLASS.match(self.text)
        return found[1] if found else None

    @property
    def found(self) -> str:
        """The value that was refused."""
        told = _EXPECTED.match(self.text) or _CHOICE.match(self.text)
        return told[2] if told and told[2] else self.value


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
    told = [leaf for leaf in leaves if leaf.expected is None and not _is_a_number(leaf, leaves)]
    where = max(told or leaves, key=lambda leaf: leaf.depth)
    if told and not any(leaf.depth > where.depth for leaf in leaves):
        return _sentence(where)
    # All alternatives are plain types, and the value has none of them.
    where = max(leaves, key=lambda leaf: leaf.depth)
    types = dict.fromkeys(leaf.expected for leaf in leaves if leaf.depth == where.depth and leaf.expected)
    return f"{'.'.join(where.keys)}: expected {' or '.join(types)}, found {where.found!r}"


def _is_a_number(leaf: _Leaf, leaves: Iterable[_Leaf]) -> bool:
    """Whether a word that names no class, nor nearly, stands where a number may."""
    found = _CLASS_OF_NAME.match(leaf.text)
    if found is None or _closest(found[1], _known_classes()):
        return False
    return any(other.depth == leaf.depth and other.expected in ("int", "float", "bool") for other in leaves)


def _leaves(message: str) -> Iterable[_Leaf]:
    """Reads the tree by its indentation."""
    open_keys: list[tuple[int, str]] = []
    open_classes: list[tuple[int, str]] = []
    lines = [line for line in message.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        depth = _depth(line)
        text = line[depth:].removeprefix("- ")
        open_keys = [(at, key) for at, key in open_keys if at < depth]
        open_classes = [(at, name) for at, name in open_classes if at < depth]
        if found := _KEY.match(text):
            open_keys.append((depth, found[1]))
        elif found := _CLASS.match(text):
            open_classes.append((depth, found[1]))
        elif not text.startswith((*_IGNORED, _VALUE)):
            class_path = open_classes[-1][1] if open_classes else ""
            after = (other.strip() for other in lines[number:] if _depth(other) < depth)
            value = next((other.removeprefix(_VALUE) for other in after if other.startswith(_VALUE)), "")
            yield _Leaf(depth, tuple(key for _, key in open_keys), class_path, text, value)


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _sentence(leaf: _Leaf) -> str:
    where = f"{'.'.join(leaf.keys)}: " if leaf.keys else ""
    if found := re.match(r"Option '(.+)' is not accepted", leaf.text):
        return where + _no_such_option(found[1], leaf)
    if found := re.match(r"Subcommand '\w+' does not accept option '(.+)'", leaf.text):
        return _no_such_setting(found[1])
    if found := re.match(r"unrecognized arguments: --([\w.]+)", leaf.text):
        return _no_such_setting(found[1])
    if found := re.match(r"unrecognized arguments: -?([a-z_]+(?:\.\w+)*)[ =]", leaf.text):
        return f"{leaf.text}. An option begins with two dashes: --{found[1]} VALUE."
    if found := _CLASS_OF_NAME.match(leaf.text):
        return f"{where}no class is known as {found[1]!r}; write package.Class.{_closest(found[1], _known_classes())}"
    if found := re.match(r"module '(.+)' has no attribute '(\w+)'", leaf.text):
        classes = [name for name, _ in inspect.getmembers(importlib.import_module(found[1]), inspect.isclass)]
        return f"{where}module {found[1]!r} has no class {found[2]!r}.{_closest(found[2], classes)}"
    if found := re.match(r"Expected an instantiatable class, but ([\w.]*) ?is abstract", leaf.text):
        path = found[1] or leaf.value
        module, _, name = path.rpartition(".")
        methods = sorted(getattr(importlib.import_module(module), name).__abstractmethods__) if module else []
        return f"{where}{path} is abstract: it lacks the methods {', '.join(methods)}."
    if found := re.match(r'Parser key "([\w.]+)": (.+)', leaf.text):
        return f"{found[1]}: {found[2]}"
    return where + leaf.text


def _no_such_option(name: str, leaf: _Leaf) -> str:
    """About a class that has no setting of a name, or about settings beside a class instead of inside it."""
    known = {each.lower(): each for each in _known_classes()}
    head = name.partition(".")[0]
    if head == "class_path" or (head.lower() in known and "class_path" not in leaf.value):
        chosen = known.get(head.lower(), "package.Class")
        return f"found {leaf.value}; expected {{class_path: {chosen}, init_args: {{NAME: VALUE}}}}."
    return f"{leaf.class_path.rpartition('.')[2]} has no setting {name!r}.{_closest(name, _settings(leaf.class_path))}"


def _known_classes() -> list[str]:
    return [name for room in ROOMS for name in importlib.import_module(f"lightning_fl.{room}").__all__]


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
