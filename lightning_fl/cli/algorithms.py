"""Lists the algorithms: their settings, the state that server and clients keep, and what is sent besides the model.

With a name it shows that algorithm's documentation and how to select it in YAML.

Examples:
  lightning-fl algorithms
  lightning-fl algorithms fedprox
  lightning-fl fit --config config.yaml --trainer.strategy fedprox
"""

from __future__ import annotations

import argparse
from importlib.metadata import entry_points
from pathlib import Path

from lightning_fl.cli import algorithm_source
from lightning_fl.cli.algorithm_page import page

BUILT_IN = Path(__file__).with_name("builtin_algorithms.txt")
"""The printed table if no other package provides algorithms, since importing all takes seconds. A test compares it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("name", nargs="?", help="show this algorithm in full")


def run(args: argparse.Namespace) -> None:
    """Prints all algorithms, or one in full."""
    if args.name is None and not entry_points(group="lightning_fl.algorithms"):
        print(BUILT_IN.read_text(encoding="utf-8"), end="")
        return
    if args.name is not None and (node := algorithm_source.names().get(args.name.lower())) is not None:
        documentation, settings = algorithm_source.documentation(node), algorithm_source.settings(node)
        print(page(args.name, node.name, documentation, settings), end="")
        return
    from lightning_fl.algorithms import load_entry_points
    from lightning_fl.cli import algorithm_facts

    load_entry_points()
    print(algorithm_facts.all_in_short() if args.name is None else algorithm_facts.one_in_full(args.name), end="")
