"""How a module becomes a command: it defines ``add_arguments(parser)`` and ``run(args)``.

Its docstring is the command's help: the first paragraph says what the command does, the rest shows examples.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from lightning.pytorch.utilities.exceptions import MisconfigurationException

PROGRAM = "lightning-fl"
USER_ERRORS: tuple[type[Exception], ...] = (MisconfigurationException, ValueError, OSError, ImportError)


def fail(message: object) -> SystemExit:
    """Prints a one-line error on rank 0 and returns the exception to raise, which ends the process with code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return SystemExit(2)


def command(module: ModuleType) -> Callable[[Sequence[str]], None]:
    """Makes a command of a module: a function of the arguments after the command's name.

    User errors (``ValueError``, ``OSError``, a missing extra, a wrong configuration) end in one line instead of a
    traceback. A command with ``SETS_UP_A_RUN`` also accepts the options of ``fit``.
    """
    sets_up_a_run = getattr(module, "SETS_UP_A_RUN", False)
    # Such a command runs the user's module and datamodule: an error in those needs its traceback.
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


def check_output(path: Path) -> None:
    """Refuses a file that cannot be written, before anything else is done. Folders are made below the current one only.

    Raises:
        ValueError: If the path is a folder, or lies in a folder elsewhere that does not exist.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; name a file in it, such as --out {path / 'out'}{path.suffix or '.html'}."
        )
    is_below = Path.cwd() in path.resolve().parents
    if not is_below and not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent}. Make it first (mkdir -p {path.parent}), or name another.")
    path.parent.mkdir(parents=True, exist_ok=True)


def summary(module: ModuleType) -> str:
    """The first line of a command's help."""
    return inspect.cleandoc(module.__doc__ or "").partition("\n")[0]
