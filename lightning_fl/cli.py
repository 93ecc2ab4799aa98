"""The command line: ``lightning-fl``, ``python -m lightning_fl`` or ``torchrun -m lightning_fl``."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry

# These imports register the strategy names and let YAML files name this package's classes without their modules.
import lightning_fl
import lightning_fl.algorithms
import lightning_fl.callbacks
import lightning_fl.datamodules
import lightning_fl.models
from lightning_fl.callbacks import DryRun


class FederatedCLI(LightningCLI):
    """LightningCLI with this package's strategies, models and datamodules; a run repeats unless told otherwise.

    Args:
        args: The words of the command line; None takes those of the process.
    """

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"prog": "lightning-fl", "description": "Federated learning with a Lightning Trainer"},
            args=None if args is None else list(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds this package's own options."""
        parser.add_argument(
            "--dry-run", dest="dry_run", action="store_true", help="Show clients and cost, do not train."
        )

    def before_fit(self) -> None:
        """With ``--dry-run`` the Trainer stops before the first batch."""
        if self.config[self.subcommand].dry_run:
            self.trainer.num_sanity_val_steps = 0
            self.trainer.callbacks.append(DryRun())  # type: ignore[attr-defined]

    def before_instantiate_classes(self) -> None:
        """Refuses unknown strategy names before Lightning does, which would not list the federated ones."""
        check_strategy_name(self.config[self.subcommand].trainer.strategy)


def federated_strategy_names() -> list[str]:
    """The strategy names that this package has registered."""
    package = lightning_fl.__name__
    return sorted(
        name for name, entry in StrategyRegistry.items() if entry["strategy"].__module__.partition(".")[0] == package
    )


def check_strategy_name(strategy: Any) -> None:
    """Refuses a strategy name that nobody has registered.

    Args:
        strategy: What the configuration gives as ``trainer.strategy``. Anything but a name passes.

    Raises:
        ValueError: If it is an unknown name; the message lists the federated ones.
    """
    known = ["auto", *StrategyRegistry.available_strategies()]
    if not isinstance(strategy, str) or strategy.lower() in known:
        return
    close = difflib.get_close_matches(strategy.lower(), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UnknownStrategyError(
        f"Unknown strategy {strategy!r}; expected one of {', '.join(federated_strategy_names())}, or a strategy of "
        f"Lightning such as 'auto' or 'ddp'.{hint}"
    )


class UnknownStrategyError(ValueError):
    """The configuration names a strategy that nobody has registered."""


def recipes_directory() -> Path:
    """Where the recipes lie: in the installed package, or beside it in a checkout."""
    package = Path(lightning_fl.__file__).parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def list_recipes(args: Sequence[str]) -> None:
    """Prints each recipe's path and the first line of its header."""
    for recipe in sorted(recipes_directory().glob("*.yaml")):
        print(f"{recipe}\n    {recipe.read_text().splitlines()[0].lstrip('# ')}")


def list_algorithms(args: Sequence[str]) -> None:
    """Prints each algorithm's name, its first sentence and its hyper-parameters with their defaults."""
    for name, algorithm in sorted(lightning_fl.algorithms.registered().items()):
        print(f"{name}\n    {(algorithm.__doc__ or '').strip().splitlines()[0]}\n    {algorithm()!r}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"recipes": list_recipes, "algorithms": list_algorithms}
"""Commands beside LightningCLI's, each called with the words after its name."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command: ``fit``, ``validate``, ``test``, ``predict``, or one of :data:`COMMANDS`.

    Args:
        args: The words of the command line; None takes those of the process.

    Raises:
        SystemExit: With code 2 if the configuration names an unknown strategy.
    """
    words = sys.argv[1:] if args is None else args
    if words and words[0] in COMMANDS:
        COMMANDS[words[0]](words[1:])
        return
    try:
        FederatedCLI(args)
    except UnknownStrategyError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"lightning-fl: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
