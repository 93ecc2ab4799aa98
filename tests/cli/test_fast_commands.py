"""Commands that need neither torch nor Lightning do not import them, which takes seconds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_fl
from lightning_fl.algorithms import registered
from lightning_fl.cli import COMMANDS, FederatedCLI, algorithm_facts, algorithm_source, main
from lightning_fl.cli.algorithms import BUILT_IN
from lightning_fl.cli.command import load, summary
from lightning_fl.cli.main import RUNS
from lightning_fl.cli.maths_text import plain, readable
from lightning_fl.lazy import lazy_names
from lightning_fl.serving import FORMATS
from tests.tracking.test_run import write_run

LIGHT = [
    ["--version"],
    ["--help"],
    ["recipes"],
    ["recipes", "copy", "digits_fedavg"],
    ["init", "first"],
    ["keys", "create", "keys/north"],
    ["algorithms"],
    ["algorithms", "Scaffold"],
    *([name, "--help"] for name in (*RUNS, *COMMANDS)),
    ["compare", "a", "a"],
    ["report", "a"],
    ["network", "--help"],
]
PROGRAM = f"""
import sys
from lightning_fl.cli import main

for words in {LIGHT!r}:
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, words
    for heavy in ("torch", "lightning"):
        assert heavy not in sys.modules, (words, heavy)
    assert "lightning_fl.strategies" not in sys.modules

import lightning_fl as fl

assert not set(fl.__all__) - set(dir(fl))
"""


def test_light_commands_import_neither_torch_nor_lightning() -> None:
    write_run(Path("a"), [0.5, 0.6])
    Path("lightning-fl").write_text(PROGRAM, encoding="utf-8")  # as the console script, whose name tells
    run = subprocess.run([sys.executable, "lightning-fl"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert f"lightning-fl {lightning_fl.__version__}" in run.stdout.splitlines()


def test_the_module_is_as_light_as_the_script() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "lightning_fl", "--version"]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    assert run.stdout == f"lightning-fl {lightning_fl.__version__}\n"
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "lightning_fl.cli.main" in imported
    assert not imported & {"torch", "lightning", "lightning_fl.strategies"}


@pytest.mark.slow
def test_importing_lightning_fl_brings_its_own_modules_and_little_else() -> None:
    program = "import sys, lightning; old = set(sys.modules); import lightning_fl; print(*set(sys.modules) - old)"
    words = [sys.executable, "-c", program]
    new = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    others = {name.partition(".")[0] for name in new} - {"lightning_fl", "safetensors"}
    assert not others
    assert len(new) < 350  # each costs a millisecond; 0.3 s in all beside 5 s of Lightning, benchmarks/imports.py


def test_every_command_is_known_and_summarised_without_its_import() -> None:
    assert set(RUNS) == set(FederatedCLI.subcommands())
    folder = Path(lightning_fl.__file__).parent / "cli"
    commands = {path.stem for path in folder.glob("*.py") if "\ndef add_arguments(" in path.read_text(encoding="utf-8")}
    assert commands == set(COMMANDS)
    for name in COMMANDS:
        assert summary(name)
        assert (load(name).__doc__ or "").startswith(summary(name))


def test_the_list_of_algorithms_is_what_they_tell_of_themselves() -> None:
    hint = f"write algorithm_facts.all_in_short() to {BUILT_IN}"
    assert BUILT_IN.read_text(encoding="utf-8") == algorithm_facts.all_in_short(), hint


def test_an_algorithm_is_shown_from_its_source_as_its_class_tells_of_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    built_in = {name for name, kind in registered().items() if kind.__module__.startswith("lightning_fl.")}
    assert set(algorithm_source.names()) == built_in
    for name in built_in:
        main(["algorithms", name])
        shown = capsys.readouterr().out
        assert shown == algorithm_facts.one_in_full(name)
        documentation = shown.partition("On the command line")[0]
        assert not re.search(r"\\[a-zA-Z]|:math|\.\. math", documentation), "a formula is not readable"


@pytest.mark.parametrize(
    ("latex", "expected"),
    [
        (r"x \leftarrow x + \eta_s \, \mathrm{mean}_i (y_i - x)", "x ← x + η_s mean_i (y_i - x)"),
        (r"h - \frac{\mu}{N} \sum_i \frac{a - b}{\sum_k c_k}", "h - μ/N Σ_i (a - b) / (Σ_k c_k)"),
        (r"x^{t+1} &= \lVert x \rVert^2, \quad y \in \mathbb{R}^r", "x^(t+1) = ‖x‖^2,   y ∈ R^r"),
        (r"\max\left(1, \frac{m}{\sqrt{v} + \tau}\right) \qquad \text{or}", "max(1, m / (√v + τ))   or"),
    ],
)
def test_formulas_are_readable_in_a_terminal(latex: str, expected: str) -> None:
    assert plain(latex) == expected
    assert readable(f"Is:\n\n.. math::\n    {latex} \\\\\n    x\n\nSo :math:`{latex}`.") == (
        f"Is:\n\n    {expected}\n    x\n\nSo {expected}."
    )


def test_help_has_colours_in_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["--help"])
    plain_help = capsys.readouterr().out
    assert "\x1b[" not in plain_help
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    main(["--help"])
    coloured = capsys.readouterr().out
    assert "\x1b[36m" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain_help


def test_formats_of_export_are_those_of_serving() -> None:
    assert tuple(FORMATS) == load("export").FORMATS


@pytest.mark.parametrize(
    "package", ["lightning_fl", *(f"lightning_fl.{room}" for room in ("analytics", "privacy", "tracking", "cli"))]
)
def test_lazy_names_are_those_that_are_promised(package: str) -> None:
    module = sys.modules[package] if package in sys.modules else __import__(package, fromlist=["x"])
    get, names = lazy_names(package)
    assert set(module.__all__) <= set(names())
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        get("nothing")


def test_the_shell_completes_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    Path("script").write_text(capsys.readouterr().out, encoding="utf-8")

    def completed(*words: str) -> list[str]:
        ask = (
            f"source ./script; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _lightning_fl; "
            'echo "${COMPREPLY[@]}"'
        )
        found = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        return found.stdout.split()

    assert completed("lightning-fl", "rep") == ["report"]
    assert completed("lightning-fl", "compare", "--gr") == ["--group-by"]
    assert completed("lightning-fl", "fit", "--trainer.max_ep") == ["--trainer.max_epochs"]
    assert completed("lightning-fl", "report", "lo") == []  # the shell completes files
    main(["completion", "zsh"])
    assert capsys.readouterr().out.startswith("autoload -U +X compinit")
