"""What importing lightning_fl adds to Lightning, what commands take, and the way from nothing to a first report.

Run: python benchmarks/imports.py

Each figure is the smallest of several new processes' CPU seconds, with compiled files as pip leaves them
where it installs, here in a folder of the benchmark's own.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

REPEATS = 5
IMPORTS = ("pass", "import torch", "import lightning", "import lightning, lightning_fl")
COMMANDS = ("--help", "--version", "recipes", "algorithms", "algorithms scaffold", "compare --help", "keys --help")
COMMANDS += (
    "fit --help",
    "init --help",
    "partition --help",
    "analyze --help",
    "privacy --help",
    "export --help",
    "report --help",
)

CONFIG = ("--config", "first/config.yaml", "--data.path", "first/readings.csv")
FIRST = (("init", "first"), ("partition", *CONFIG), ("fit", *CONFIG), ("report", "logs/sites"))


def seconds(words: list[str], env: dict[str, str], folder: str) -> float:
    """CPU seconds of a process in a folder."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, env=env, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    package = str(Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join([package, str(Path(folder, "first"))])
        env = {**os.environ, "PYTHONPATH": paths, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        lines = {f"python -c '{code}'": [sys.executable, "-c", code] for code in IMPORTS}
        lines |= {f"lightning-fl {c}": [sys.executable, "-m", "lightning_fl", *c.split()] for c in COMMANDS}
        for words in lines.values():
            seconds(words, env, folder)  # compiles
        measured = {
            name: min(seconds(words, env, folder) for _ in range(REPEATS if "import" in name else 3))
            for name, words in lines.items()
        }
        first = {words[0]: seconds([sys.executable, "-m", "lightning_fl", *words], env, folder) for words in FIRST}
    for name, found in measured.items():
        print(f"{found:6.2f} s  {name}")
    lightning, both = (measured[f"python -c '{code}'"] for code in IMPORTS[2:])
    print(f"import lightning_fl adds {both - lightning:.2f} s to import lightning, {both / lightning - 1:.0%} of it")
    each = ", ".join(f"{name} {found:.1f}" for name, found in first.items())
    print(f"From an empty folder to a report: {sum(first.values()):.1f} s ({each})")


if __name__ == "__main__":
    main()
