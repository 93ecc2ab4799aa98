"""The commands beside LightningCLI's: one module each, with ``add_arguments(parser)`` and ``run(args)``.

A module's docstring is its help: the first paragraph says what the command does, the rest shows an example.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from lightning.pytorch.utilities.exceptions import MisconfigurationException

PROGRAM = "lightning-fl"
USER_ERRORS: tuple[type[Exception], ...] = (MisconfigurationException, ValueError, OSError, ImportError)


def fail(message: object) -> SystemExit:
    """Tells the user in one line what is wrong, on the first rank; to be raised."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return SystemExit(2)


def command(module: ModuleType) -> Callable[[Sequence[str]], None]:
    """Makes a command of a module, which is called with the words after the command's name.

    What goes wrong for the user's part (``ValueError``, ``OSError``, a missing extra, a wrong configuration) ends in
    one line. A command with ``SETS_UP_A_RUN`` takes the options of ``fit`` too, and shows where the user's own code
    raises an error.
    """
    sets_up_a_run = getattr(module, "SETS_UP_A_RUN", False)
    errors = (MisconfigurationException,) if sets_up_a_run else USER_ERRORS

    def run(words: Sequence[str]) -> None:
        parser = make_parser(module)
        args, rest = parser.parse_known_args(list(words))
        if rest and not sets_up_a_run:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.rest = rest
        try:
            module.run(args)
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            sys.stderr.close()
        except errors as error:
            raise fail(error) from None

    return run


def make_parser(module: ModuleType) -> argparse.ArgumentParser:
    """The parser of a command's module."""
    description, _, epilog = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {module.__name__.rpartition('.')[2]}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return parser


def summary(module: ModuleType) -> str:
    """The first line of a command's help."""
    return inspect.cleandoc(module.__doc__ or "").partition("\n")[0]
