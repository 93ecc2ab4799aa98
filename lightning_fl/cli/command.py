"""Turns a module into a command; it defines ``add_arguments(parser)`` and ``run(args)``.

Its docstring is the command's help: the first paragraph says what the command does, the rest shows examples.
"""

from __future__ import annotations

import argparse
import ast
import dis
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

PROGRAM = "lightning-fl"
_STYLES = {
    r"(?m)^[\w ]+:$|^usage:": "bold",
    r"(?<![\w-])--?[a-zA-Z][\w.-]*": "cyan",
    r"(?m)^  [a-z]+(?=  +\S)": "cyan",
    rf"(?m)^  ({PROGRAM}|torchrun) .*$": "green",
}
"""The colour of each pattern in a help text: headings, options, commands, examples."""


TOLD_IN_ONE_LINE = {
    *("ConfigurationError", "MisconfigurationException", "Disagreement", "RankLost"),
    *("CallRefused", "NotAdmitted", "PolicyBroken"),
}
"""Errors that need no traceback, by name because light commands don't import them."""


def is_told_in_one_line(error: Exception) -> bool:
    """Whether an error needs no traceback: by its kind, or because this package itself has refused something."""
    if any(kind.__name__ in TOLD_IN_ONE_LINE for kind in type(error).__mro__):
        return True
    return isinstance(error, ValueError | OSError | ImportError) and _is_raised_here(error)


def _is_raised_here(error: Exception) -> bool:
    """Whether a ``raise`` of this package's has raised it, and not the user's code or a library's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    is_own = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]
    return is_own and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def fail(message: object) -> SystemExit:
    """Prints a one-line error, once per machine, and returns the exception to raise, which exits with code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return SystemExit(2)


def command(name: str) -> Callable[[Sequence[str]], None]:
    """Makes a command from a module of this package: a function of the arguments after the command's name.

    The module is imported when the command runs, so that a command that needs no torch does not wait for its import.

    User errors (``ValueError``, ``OSError``, a missing extra, a wrong configuration) are printed in one line instead of
    a traceback. A command with ``SETS_UP_A_RUN`` also accepts the options of ``fit``, and so does one with
    ``PASSES_OPTIONS_ON``, which passes them to other processes.
    """

    def run(words: Sequence[str]) -> None:
        module = load(name)
        sets_up_a_run = getattr(module, "SETS_UP_A_RUN", False)
        # Such a command runs the user's module and datamodule, whose errors need a traceback.
        errors = () if sets_up_a_run else (ValueError, OSError, ImportError)
        parser = make_parser(module)
        args, rest = parser.parse_known_args(list(words))
        if rest and not (sets_up_a_run or getattr(module, "PASSES_OPTIONS_ON", False)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.rest = rest
        try:
            module.run(args)
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            sys.stderr.close()
        except Exception as error:
            if not (isinstance(error, errors) or is_told_in_one_line(error)):
                raise
            raise fail(error) from None

    return run


def load(name: str) -> ModuleType:
    """The module of a command."""
    return import_module(f"{__package__}.{name}")


def summary(name: str) -> str:
    """The first line of a command's help, read without importing the command."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def make_parser(module: ModuleType) -> argparse.ArgumentParser:
    """The parser of a command's module."""
    description, _, epilog = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
    parser = _Parser(
        prog=f"{PROGRAM} {module.__name__.rpartition('.')[2]}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return parser


class _Parser(argparse.ArgumentParser):
    """Shows its help in colours if the terminal supports them."""

    def print_help(self, file: Any = None) -> None:
        print_coloured(self.format_help(), file)


def print_coloured(text: str, file: Any = None) -> None:
    """Prints a help text with coloured options, commands and headings; unchanged if the output is not a terminal.

    Args:
        text: The help text.
        file: The file to print to. None: standard output.
    """
    out = sys.stdout if file is None else file
    if not (hasattr(out, "isatty") and out.isatty()):
        print(text.rstrip("\n"), file=out)
        return
    from rich.console import Console
    from rich.text import Text

    shown = Text(text.rstrip("\n"))
    for pattern, style in _STYLES.items():
        shown.highlight_regex(pattern, style)
    Console(file=out).print(shown, soft_wrap=True)


def check_output(path: Path) -> None:
    """Refuses a file that cannot be written, before any work is done. Creates folders below the current one only.

    Raises:
        ValueError: If the path is a folder, or is in a folder elsewhere that does not exist.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; name a file in it, such as --out {path / 'out'}{path.suffix or '.html'}."
        )
    is_below = Path.cwd() in path.resolve().parents
    if not is_below and not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent}. Create it (mkdir -p {path.parent}), or name another.")
    path.parent.mkdir(parents=True, exist_ok=True)
