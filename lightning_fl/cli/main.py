"""The command line: ``lightning-fl``, ``python -m lightning_fl`` or ``torchrun -m lightning_fl``."""

from __future__ import annotations

import difflib
import logging
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence

import lightning_fl
from lightning_fl.cli.command import PROGRAM, command, fail, is_told_in_one_line, print_coloured, summary
from lightning_fl.cli.run_help import HELP_ALL, short_help

TRACEBACK = "--traceback"
RUNS = {
    "fit": "Trains all rounds of a federation, or a model without a federation.",
    "validate": "Validates a checkpoint.",
    "test": "Tests a checkpoint.",
    "predict": "Writes the predictions of a checkpoint.",
}
"""LightningCLI's commands."""
_NAMES = (
    *(
        "init",
        "partition",
        "analyze",
        "psi",
        "export",
        "serve",
        "report",
        "compare",
        "sweep",
        "launch",
        "recipes",
        "algorithms",
        "privacy",
        "audit",
        "keys",
    ),
    *("coordinator", "network", "gateway", "completion"),
)
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {name: command(name) for name in _NAMES}
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
    if words == ["--version"]:
        print(f"{PROGRAM} {lightning_fl.__version__}")
        return
    if words in (["--help"], ["-h"]):
        print_coloured(overview())
        return
    known = [*RUNS, *COMMANDS]
    if not words or (words[0] not in known and not words[0].startswith("-")):
        close = difflib.get_close_matches(words[0] if words else "", known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else " New here? `lightning-fl init DIR` writes a first project."
        found = f"There is no command {words[0]!r}" if words else "No command was given"
        raise fail(f"{found}; the commands are {', '.join(known)}.{hint}")
    if words[0] in RUNS and not {"--help", "-h"}.isdisjoint(words):
        print_coloured(short_help(words[0], RUNS[words[0]]))
        return
    words = ["--help" if word == HELP_ALL else word for word in words]
    try:
        from lightning_fl.cli.lightning_cli import FederatedCLI

        FederatedCLI(words)
    except Exception as error:
        if shows_traceback or not is_told_in_one_line(error):
            raise
        raise fail(error) from None


def overview() -> str:
    """The help of the program: what each command does."""
    summaries = RUNS | {name: summary(name) for name in COMMANDS}
    width = max(map(len, summaries))
    indent = " " * (width + 4)
    columns = max(60, min(shutil.get_terminal_size().columns, 120))
    lines = [
        textwrap.fill(f"  {name:{width}}  {text}", columns, subsequent_indent=indent)
        for name, text in summaries.items()
    ]
    end = (
        f"{PROGRAM} COMMAND --help shows a command's options, {PROGRAM} --version the version. User errors are one "
        f"line; {TRACEBACK} shows their traceback. New here? `{PROGRAM} init DIR` writes a first project."
    )
    usage = f"usage: {PROGRAM} COMMAND [options]\n\nFederated learning with a Lightning Trainer.\n\ncommands:"
    return "\n".join([usage, *lines, "", textwrap.fill(end, columns)])


def prepare_process() -> None:
    """Makes classes in the current folder importable, as ``python -m`` does, and hides unhelpful warnings."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    # The first two warnings are about code that is not the user's. The third is bad advice for small simulated clients,
    # for which starting loader workers costs more than it saves.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
    # A resumed run has a new folder, by design.
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(log_filter, _WithoutTips) for log_filter in logger.filters):
        logger.addFilter(_WithoutTips())


class _WithoutTips(logging.Filter):
    """Hides Lightning's tips to install other packages."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "Tip: For seamless" not in record.getMessage()
