"""Lists the algorithms: their settings, the state that server and clients keep, and what is sent besides the model.

With a name it shows that algorithm's documentation and how to select it in YAML.

Examples:
  lightning-fl algorithms
  lightning-fl algorithms fedprox
  lightning-fl fit --config config.yaml --trainer.strategy fedprox
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from lightning_fl.algorithms import Algorithm, get_algorithm, registered

EXAMPLE = {"weight": torch.zeros(10, 10)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("name", nargs="?", help="show this algorithm in full")


def run(args: argparse.Namespace) -> None:
    """Prints all algorithms, or one in full."""
    if args.name is None:
        _show_all()
    else:
        _show_one(get_algorithm(args.name), args.name.lower())


def _show_all() -> None:
    for name in sorted(registered()):
        algorithm = get_algorithm(name)
        facts = {
            "settings": settings(algorithm),
            "the server keeps": server_keeps(algorithm),
            "a client keeps": "state (d)" if algorithm.keeps_client_state else "",
            "sent besides": sent(algorithm),
            "client weight": "its number of examples" if algorithm.weighting == "examples" else "the same for all",
        }
        print(f"{name}: {what(algorithm)}")
        print("".join(f"    {label}: {value}\n" for label, value in facts.items() if value))
    print("d: the size of the shared parameters. Every algorithm also sends the model down and its update up, d each.")


def _show_one(algorithm: Algorithm, name: str) -> None:
    print(inspect.getdoc(type(algorithm)))
    fields = [field for field in dataclasses.fields(algorithm) if field.init]  # type: ignore[arg-type]
    print(
        f"\nOn the command line: lightning-fl fit --config config.yaml --trainer.strategy {name}\n"
        "\nIn YAML:\n\ntrainer:\n  strategy:\n    class_path: lightning_fl.FederatedStrategy\n    init_args:\n"
        f"      algorithm:\n        class_path: {type(algorithm).__name__}"
    )
    if fields:
        print("        init_args:")
    for field in fields:
        value = getattr(algorithm, field.name)
        print(f"          {field.name}: {'null' if value is None else value}")


def what(algorithm: Algorithm) -> str:
    """The first line of its documentation, without its name."""
    return (inspect.getdoc(type(algorithm)) or "").partition("\n")[0].partition(": ")[2].rstrip(".").replace("``", "")


def settings(algorithm: Algorithm) -> str:
    """Its hyper-parameters with their defaults."""
    fields = dataclasses.fields(algorithm)  # type: ignore[arg-type]
    return ", ".join(f"{field.name}={getattr(algorithm, field.name)!r}" for field in fields)


def server_keeps(algorithm: Algorithm) -> str:
    """What the server keeps between rounds besides the model, according to its initial state."""
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
