"""Installs the packages in environments of their own, checks each, and prints the table of docs/third_party.md.

Run it with ``make third-party``; ``python -m benchmarks.third_party --page docs/third_party.md`` also writes the page.
Names of files of this folder restrict it to these. It downloads some 3 GB of packages, and takes half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {"64-true": 1e-10, "32-true": 1e-5}
"""The difference that still counts as equal: only the order of sums may differ."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Args:
        folder: Its folder.
        pinned: Which of ``constraints.txt``'s versions hold in it. Empty: all.
        packages: For each file of this folder, what to install for it.
    """

    folder: str
    pinned: Sequence[str]
    packages: dict[str, Sequence[str]]


ENVIRONMENTS = (
    Environment(
        ".venv-third-party",
        (),
        {
            "lightning_demos": (),
            "darts_nbeats": ("darts",),
            "neuralforecast_mlp": ("neuralforecast",),
            "scvi_vae": ("scvi-tools",),
            "chemprop_mpnn": ("chemprop",),
            "lightly_byol": ("lightly",),
            "lightly_moco": ("lightly",),
            "pykeen_lit": ("pykeen",),
            "transformers_bert": ("transformers",),
            "peft_lora": ("peft", "transformers"),
            "timm_resnet": ("timm",),
            "segmentation_models": ("segmentation-models-pytorch",),
            "torch_geometric_gcn": ("torch_geometric",),
        },
    ),
    # These want pandas 2, and pytorch-tabular a torchmetrics before 1.9 and the requests that it does not ask for.
    Environment(
        ".venv-third-party-pandas2",
        ("torch", "lightning", "pytorch-lightning"),
        {
            "deeptab_mlp": ("pandas<3", "deeptab"),
            "pytorch_forecasting_tft": ("pandas<3", "pytorch-forecasting"),
            "pytorch_tabular_mlp": ("pandas<3", "pytorch-tabular", "requests"),
        },
    ),
)


def prepare(environment: Environment) -> Path:
    """Makes the environment with torch and lightning_fl in it, and returns its Python."""
    folder = ROOT / environment.folder
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    own = [pin for pin in pins if not environment.pinned or pin.partition("==")[0] in environment.pinned]
    (folder / "constraints.txt").write_text("\n".join(own) + "\n", encoding="utf-8")
    # First and alone, so that a build of it that pip finds on disk (say, for CPU only) is taken.
    for packages in (["torch"], ["-e", str(ROOT)]):
        install(python, packages)
    return python


def install(python: Path, packages: Sequence[str]) -> str:
    """Installs packages; returns pip's error, empty if there is none."""
    constraints = python.parents[1] / "constraints.txt"
    command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "depends on" in line]
    return " ".join(errors)[-400:] or "pip failed" if done.returncode else ""


def check(python: Path, name: str, packages: Sequence[str]) -> dict[str, Any]:
    """Installs what a file needs and runs it; returns what it found."""
    error = install(python, packages) if packages else ""
    if error:
        return {"name": name, "error": f"can't be installed: {error}"}
    command = [str(python), "-m", "benchmarks.third_party.checks", name]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"name": name, "error": f"ended with exit code {done.returncode}: {done.stderr[-300:]}"}


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table in Markdown."""
    head = (
        "package",
        "what trains",
        "precision",
        "plain Trainer",
        "auto = sequential",
        "side by side",
        "resume",
        "predict",
    )
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for result in results:
        name = result.get("version", result["name"])
        if "error" in result:
            reason = " ".join(result["error"].split()).replace("|", "/")
            lines.append(f"{name} | {result.get('what', '')} | not checked: {reason} | | | | | ")
            continue
        allowed = ALLOWED[result["precision"]]
        found = [words(result[key], allowed) for key in ("plain", "engines")]
        found += [
            str(result["side_by_side"]),
            *(words(result[k], own) for k, own in (("resume", 0.0), ("predict", allowed))),
        ]
        lines.append(" | ".join([name, result["what"], result["precision"], *found]))
    return "\n".join(f"| {line} |" for line in lines)


def words(difference: float | str, allowed: float) -> str:
    """A difference, said in words where it is none."""
    if isinstance(difference, str):
        return difference
    if difference == 0:
        return "same bits"
    return f"{difference:.0e}" if difference <= allowed else f"**differs by {difference:.0e}**"


PAGE = """# Modules of other packages

Modules that other packages have written for Lightning, or networks of theirs in one, in a federation: random
weights, data of a few examples, two rounds. `make third-party` installs the packages in environments of their own
(`.venv-third-party*`, some 3 GB), runs one short file of `benchmarks/third_party/` for each, and prints this table;
`python -m benchmarks.third_party --page docs/third_party.md` writes this page.

- *plain Trainer*: one client with `client_optimizer="keep"` beside a plain `Trainer.fit`.
- *auto = sequential*: four clients with `engine="auto"` beside `engine="sequential"`; *side by side* says how many
  auto has trained in one step, 1 where it has let each train alone.
- *resume*: a run that goes on after round 0 beside one that was not stopped.
- *predict*: `trainer.predict` beside a plain Trainer's.

Weights are compared, relative to the largest; a difference above 1e-10 in double precision or 1e-5 in single
precision, and any difference after a resume, is set in bold. Modules that draw random numbers draw the same in each
step, because a client's random numbers are not those of a plain Trainer. Where a package leaves double precision,
`32-true` stands.

{table}

torchvision's compiled operators don't load beside a CPU build of torch, and without them neither torchvision nor
torchmetrics can be imported. The checks declare the names of two of its operators, which they don't run, before
they import anything.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the checks."""
    parser = argparse.ArgumentParser(description="Modules of other packages in a federation.")
    parser.add_argument("names", nargs="*", help="files of this folder, without .py; all if none is given")
    parser.add_argument("--page", type=Path, help="the page to write")
    own = parser.parse_args(arguments)
    results = []
    for environment in ENVIRONMENTS:
        chosen = {name: what for name, what in environment.packages.items() if not own.names or name in own.names}
        if chosen:
            python = prepare(environment)
        for name, packages in chosen.items():
            results.append(check(python, name, packages))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(table(results))
    if own.page is not None:
        own.page.write_text(PAGE.format(table=table(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
