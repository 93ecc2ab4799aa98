"""``federation.yaml``: who may take part, and when rounds open and close."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning_fl.coordinator.identity import check_name
from lightning_fl.coordinator.machine import Rules
from lightning_fl.yaml_files import read_yaml


@dataclass(frozen=True)
class FederationConfig:
    """The coordinator's own settings.

    Args:
        rules: When rounds open and close.
        kit: The folder with the coordinator's key and certificate.
        folder: Where the federation's files go.
        host: The address to listen on. None: all, of IPv4 and IPv6.
        port: The port.
        admin_port: A port on 127.0.0.1 for health, status and metrics.
    """

    rules: Rules
    kit: Path
    folder: Path
    host: str | None = None
    port: int = 8443
    admin_port: int = 8444


_PLACES = ("kit", "folder", "host", "port", "admin_port")


def read_config(path: Path) -> FederationConfig:
    """Reads ``federation.yaml``; paths in it start from its folder.

    Raises:
        ValueError: If an entry is missing, unknown or of the wrong kind.
    """
    of_rules = {field.name: str(field.type) for field in fields(Rules)}
    content = read_entries(path, [*of_rules, *_PLACES], ("silos", "rounds", "kit", "folder"))
    rules = {name: _read(path, name, kind, content[name]) for name, kind in of_rules.items() if name in content}
    places: dict[str, Any] = {name: content[name] for name in _PLACES if name in content}
    for name in ("kit", "folder"):
        places[name] = path.parent / str(places[name])
    return FederationConfig(Rules(**rules), **places)


def read_entries(
    path: Path, known: Collection[str], needed: Collection[str], hints: Mapping[str, str] | None = None
) -> Mapping[str, Any]:
    """The entries of a YAML file.

    Args:
        path: The file.
        known: The names that it may hold.
        needed: Those that it must hold.
        hints: What the error adds where one of them is missing.

    Raises:
        ValueError: If it is not YAML, holds no mapping, an unknown entry, or not all that are needed.
    """
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no mapping; expected entries such as `rounds: 20`.")
    unknown = [name for name in content if name not in known]
    if unknown:
        raise ValueError(f"{path} has unknown entries {', '.join(map(repr, unknown))}; known are {', '.join(known)}.")
    missing = [name for name in needed if name not in content]
    if missing:
        more = [hint for name, hint in (hints or {}).items() if name in missing]
        raise ValueError(" ".join([f"{path} lacks {', '.join(missing)}.", *more]))
    return content


def _read(path: Path, name: str, kind: str, value: Any) -> Any:
    if kind.startswith("tuple"):
        if not isinstance(value, list):
            raise ValueError(f"{path} has {name}={value!r}; expected a list of names.")
        return tuple(check_name(str(item)) for item in value)
    expected = int if kind == "int" else int | float
    if isinstance(value, bool) or not isinstance(value, expected):
        raise ValueError(f"{path} has {name}={value!r}; expected a number.")
    return value
