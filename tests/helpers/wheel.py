"""The commands of the built wheel, in a folder beside the libraries of this environment."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import CompletedProcess

from tests.helpers.distributed import REPOSITORY, run_script


def build(folder: Path) -> Path:
    """Builds the wheel and installs it in a folder of its own, which it returns."""
    run_script([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder / "dist"), str(REPOSITORY)])
    (wheel,) = (folder / "dist").glob("*.whl")
    run_script(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder / "site"), str(wheel)]
    )
    return folder / "site"


def environment(site: Path) -> dict[str, str]:
    """The variables with which a process finds the wheel."""
    return {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


def run(site: Path, *words: str, cwd: Path | None = None, check: bool = True, **env: str) -> CompletedProcess[str]:
    """``lightning-fl`` of the wheel."""
    return run_script(
        [sys.executable, "-m", "lightning_fl", *words], cwd=cwd, check=check, env={**environment(site), **env}
    )
