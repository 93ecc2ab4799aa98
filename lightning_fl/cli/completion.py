"""Prints a script with which the shell completes commands and options when Tab is pressed.

Its options are those of this version: print it again after an upgrade.

Examples:
  lightning-fl completion bash > ~/.lightning-fl-completion
  echo "source ~/.lightning-fl-completion" >> ~/.bashrc
  lightning-fl completion zsh > ~/.lightning-fl-completion
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re

from lightning_fl.cli.command import PROGRAM

SCRIPT = """\
_lightning_fl() {{
  local words current=${{COMP_WORDS[COMP_CWORD]}}
  case $COMP_CWORD:${{COMP_WORDS[1]}} in
    1:*) words="{commands}" ;;
{cases}
  esac
  [[ $COMP_CWORD == 1 || $current == -* ]] && COMPREPLY=( $(compgen -W "$words" -- "$current") )
}}
complete -o default -F _lightning_fl {program}
"""
"""The script for bash. Without a match, file names are completed."""
FOR_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("shell", choices=("bash", "zsh"))


def run(args: argparse.Namespace) -> None:
    """Prints the script."""
    from lightning_fl.cli.main import COMMANDS, RUNS

    names = [*RUNS, *COMMANDS]
    cases = "\n".join(f'    *:{name}) words="{" ".join(options(name))}" ;;' for name in names)
    script = SCRIPT.format(commands=" ".join(names), cases=cases, program=PROGRAM)
    print((FOR_ZSH if args.shell == "zsh" else "") + script, end="")


def options(name: str) -> list[str]:
    """The options of a command, as its help names them."""
    from lightning_fl.cli.main import HELP_ALL, RUNS, main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([name, HELP_ALL if name in RUNS else "--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", printed.getvalue())))
