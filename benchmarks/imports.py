"""What `import lightning_fl` adds to `import lightning`, and what commands take beside `python -c pass`.

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

REPEATS = 5
IMPORTS = ("pass", "import torch", "import lightning", "import lightning, lightning_fl")
COMMANDS = ("--help", "--version", "recipes", "algorithms", "algorithms scaffold", "compare --help", "keys --help")
COMMANDS += ("init --help", "partition --help", "analyze --help", "privacy --help", "export --help", "report --help")


def seconds(words: list[str], env: dict[str, str]) -> float:
    """CPU seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, env=env, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        lines = {f"python -c '{code}'": [sys.executable, "-c", code] for code in IMPORTS}
        lines |= {f"lightning-fl {c}": [sys.executable, "-m", "lightning_fl", *c.split()] for c in COMMANDS}
        for words in lines.values():
            seconds(words, env)  # compiles
        measured = {
            name: min(seconds(words, env) for _ in range(REPEATS if "import" in name else 3))
            for name, words in lines.items()
        }
    for name, found in measured.items():
        print(f"{found:6.2f} s  {name}")
    lightning, both = (measured[f"python -c '{code}'"] for code in IMPORTS[2:])
    print(f"import lightning_fl adds {both - lightning:.2f} s to import lightning, {both / lightning - 1:.0%} of it")


if __name__ == "__main__":
    main()
