"""The settings, state and side channels of the algorithms, as text."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from lightning_fl.algorithms import Algorithm, get_algorithm, registered
from lightning_fl.cli.algorithm_page import page

EXAMPLE = {"weight": torch.zeros(10, 10)}


def all_in_short() -> str:
    """A summary of all registered algorithms."""
    text = ""
    for name in sorted(registered()):
        algorithm = get_algorithm(name)
        facts = {
            "settings": settings(algorithm),
            "the server keeps": server_keeps(algorithm),
            "a client keeps": "state (d)" if algorithm.keeps_client_state else "",
            "sent besides": sent(algorithm),
            "client weight": "its number of examples" if algorithm.weighting == "examples" else "the same for all",
        }
        text += f"{name}: {what(algorithm)}\n"
        text += "".join(f"    {label}: {value}\n" for label, value in facts.items() if value) + "\n"
    return text + (
        "d: the size of the shared parameters. Every algorithm also sends the model down and its update up, d each.\n"
    )


def one_in_full(name: str) -> str:
    """An algorithm's documentation, and how to select it."""
    algorithm = get_algorithm(name)
    # Settings that are objects, such as a topology, have their own documentation.
    values = {field.name: getattr(algorithm, field.name) for field in dataclasses.fields(algorithm) if field.init}  # type: ignore[arg-type]
    plain = {key: value for key, value in values.items() if not dataclasses.is_dataclass(value)}
    return page(name, type(algorithm).__name__, inspect.getdoc(type(algorithm)) or "", plain)


def what(algorithm: Algorithm) -> str:
    """The first line of its documentation, without its name."""
    return (inspect.getdoc(type(algorithm)) or "").partition("\n")[0].partition(": ")[2].rstrip(".").replace("``", "")


def settings(algorithm: Algorithm) -> str:
    """Its hyper-parameters with their defaults."""
    fields = dataclasses.fields(algorithm)  # type: ignore[arg-type]
    return ", ".join(f"{field.name}={getattr(algorithm, field.name)!r}" for field in fields)


def server_keeps(algorithm: Algorithm) -> str:
    """The server's state between rounds besides the model, according to its initial state."""
    state = algorithm.server_init(EXAMPLE, 10)
    return ", ".join(f"{key.replace('_', ' ')}{_size(value)}" for key, value in state.items() if key != "params")


def sent(algorithm: Algorithm) -> str:
    """The side channels of an update."""
    return ", ".join(f"{key}{_size(tree)}" for key, tree in algorithm.aux_like(EXAMPLE).items())


def _size(value: Any) -> str:
    """The size of a state in units of the parameters (``d``); empty if it is not known before training."""
    if isinstance(value, torch.Tensor):
        value = {"": value}
    total = sum(tensor.numel() for tensor in value.values()) if isinstance(value, Mapping) else 1
    share, rest = divmod(total, sum(tensor.numel() for tensor in EXAMPLE.values()))
    if rest:
        return f" ({total} number{'s' if total > 1 else ''})"
    return f" ({'' if share == 1 else share}d)" if share else ""
