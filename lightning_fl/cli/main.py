"""The command line: ``lightning-fl``, ``python -m lightning_fl`` or ``torchrun -m lightning_fl``."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_fl.cli import (
    algorithms,
    analyze,
    audit,
    compare,
    coordinator,
    export,
    init,
    keys,
    network,
    partition,
    privacy,
    recipes,
    report,
    serve,
)
from lightning_fl.cli.command import command, fail
from lightning_fl.cli.errors import ConfigurationError
from lightning_fl.cli.lightning_cli import FederatedCLI

_MODULES = (
    init,
    partition,
    analyze,
    report,
    compare,
    recipes,
    algorithms,
    privacy,
    audit,
    keys,
    coordinator,
    network,
    export,
    serve,
)
TRACEBACK = "--traceback"
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    module.__name__.rpartition(".")[2]: command(module) for module in _MODULES
}
"""The commands besides LightningCLI's, each called with the arguments after its name."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command: ``fit``, ``validate``, ``test``, ``predict``, or one of :data:`COMMANDS`.

    Args:
        args: The arguments of the command line. None: those of the process.

    Raises:
        SystemExit: With code 2 if the command does not exist or the configuration names an unknown strategy.
    """
    words = list(sys.argv[1:] if args is None else args)
    shows_traceback = TRACEBACK in words
    words = [word for word in words if word != TRACEBACK]
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
    names = ", ".join(COMMANDS)
    epilog = (
        f"Besides these: {names}. Each has its own --help. New here? `lightning-fl init` writes a first project. "
        f"Errors of the user are one line; {TRACEBACK} shows where they come from."
    )
    try:
        FederatedCLI(words, epilog)
    except (ConfigurationError, MisconfigurationException) as error:
        if shows_traceback:
            raise
        raise fail(error) from None


def prepare_process() -> None:
    """Lets configurations name classes in the current folder, as ``python -m`` does, and hides unhelpful warnings."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    # The first two warnings are about code that is not the user's. The third is bad advice for small simulated clients,
    # for which starting loader workers costs more than it saves.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
    # A run that goes on from a checkpoint has a folder of its own, by design.
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(log_filter, _WithoutTips) for log_filter in logger.filters):
        logger.addFilter(_WithoutTips())


class _WithoutTips(logging.Filter):
    """Hides Lightning's tips to install other packages."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "Tip: For seamless" not in record.getMessage()
