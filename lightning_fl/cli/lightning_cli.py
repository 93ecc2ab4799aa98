"""The command line: ``lightning-fl``, ``python -m lightning_fl`` or ``torchrun -m lightning_fl``."""

from __future__ import annotations

import difflib
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry

# These imports register the strategy names and let YAML files name this package's classes without their modules.
import lightning_fl
import lightning_fl.algorithms
import lightning_fl.callbacks
import lightning_fl.datamodules
import lightning_fl.models
import lightning_fl.tracking
from lightning_fl.callbacks import DryRun, FederatedProgressBar, RunRecord
from lightning_fl.cli import algorithms, compare, init, keys, partition, privacy, recipes, report
from lightning_fl.cli.command import command, fail
from lightning_fl.cli.recipes import recipes_directory
from lightning_fl.strategies import FederatedStrategy

__all__ = ["COMMANDS", "FederatedCLI", "check_strategy_name", "federated_strategy_names", "main", "recipes_directory"]


FIT_EXAMPLES = """examples: lightning-fl fit --config config.yaml;
lightning-fl fit --config config.yaml --trainer.strategy scaffold --trainer.max_epochs 50;
torchrun --standalone --nproc_per_node 3 -m lightning_fl fit --config silos.yaml"""


class FederatedCLI(LightningCLI):
    """LightningCLI with this package's strategies, models and datamodules; a run repeats unless told otherwise.

    Args:
        args: The words of the command line; None takes those of the process.
    """

    def __init__(self, args: Sequence[str] | None = None) -> None:
        self.words = sys.argv[1:] if args is None else list(args)
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={
                "prog": "lightning-fl",
                "description": "Federated learning with a Lightning Trainer.",
                "epilog": other_commands(),
                "fit": {"usage": "lightning-fl fit --config CONFIG [options]", "epilog": FIT_EXAMPLES},
            },
            args=None if args is None else list(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds this package's own options."""
        parser.add_argument(
            "--dry-run", dest="dry_run", action="store_true", help="Show clients and cost, do not train."
        )

    def before_fit(self) -> None:
        """Adds the run's record and the bar of rounds; with ``--dry-run`` the Trainer stops before the first batch."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.config[self.subcommand].dry_run:
            self.trainer.num_sanity_val_steps = 0
            callbacks.append(DryRun())
        elif self.trainer.loggers and not any(isinstance(callback, RunRecord) for callback in callbacks):
            command = command_line(self.words)
            callbacks.insert(0, RunRecord(command=command))
        configured = self.config[self.subcommand].trainer.callbacks or []
        chosen = any("ProgressBar" in callback.class_path for callback in configured)
        if isinstance(self.trainer.strategy, FederatedStrategy) and not chosen:
            for index, callback in enumerate(callbacks):
                if isinstance(callback, ProgressBar):
                    callbacks[index] = FederatedProgressBar()

    def after_fit(self) -> None:
        """Tells where the run's record is."""
        records = [one for one in self.trainer.callbacks if isinstance(one, RunRecord)]  # type: ignore[attr-defined]
        if records and records[0].path is not None and self.trainer.is_global_zero:
            print(f"A page about this run: lightning-fl report {records[0].path}")

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


def command_line(words: Sequence[str]) -> str:
    """What to type to start this again, with torchrun in front if that has started it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join(["lightning-fl", *words])
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    where = ["--standalone"] if nodes == "1" else ["--nnodes", nodes]
    processes = ["--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    return shlex.join(["torchrun", *where, *processes, "-m", "lightning_fl", *words])


_MODULES = (init, partition, report, compare, recipes, algorithms, privacy, keys)
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    module.__name__.rpartition(".")[2]: command(module) for module in _MODULES
}
"""Commands beside LightningCLI's, each called with the words after its name."""


def other_commands() -> str:
    """The commands beside LightningCLI's, for its help."""
    names = ", ".join(COMMANDS)
    return f"Besides these: {names}. Each has its own --help. New here? `lightning-fl init` writes a first project."


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command: ``fit``, ``validate``, ``test``, ``predict``, or one of :data:`COMMANDS`.

    Args:
        args: The words of the command line; None takes those of the process.

    Raises:
        SystemExit: With code 2 if the configuration names an unknown strategy.
    """
    words = sys.argv[1:] if args is None else args
    prepare_process()
    if words and words[0] in COMMANDS:
        COMMANDS[words[0]](words[1:])
        return
    known = [*FederatedCLI.subcommands(), *COMMANDS]
    if not words or (words[0] not in known and not words[0].startswith("-")):
        close = difflib.get_close_matches(words[0] if words else "", known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else " New here? `lightning-fl init DIR` writes a first project."
        found = f"There is no command {words[0]!r}" if words else "No command was given"
        raise fail(f"{found}; the commands are {', '.join(known)}.{hint}")
    try:
        FederatedCLI(args)
    except UnknownStrategyError as error:
        raise fail(error) from None


def prepare_process() -> None:
    """Lets configurations name classes in the folder at hand, as ``python -m`` does, and silences what is no help."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(one, _WithoutTips) for one in logger.filters):
        logger.addFilter(_WithoutTips())


class _WithoutTips(logging.Filter):
    """Leaves out Lightning's tips to install other packages."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "Tip: For seamless" not in record.getMessage()
