"""Writes a first project that runs: a module, a datamodule with a small CSV file, YAML, a script for silos.

Its README.md explains how to adapt it to your own data and model.

Examples:
  lightning-fl init first_federation
  cd first_federation && lightning-fl fit --config config.yaml
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

STARTER = Path(__file__).parent / "starter"
SITES = {"north": (240, 0.15, 0.0), "east": (120, 0.35, 0.4), "south": (90, 0.6, 0.8), "west": (60, 0.85, 1.2)}
"""For each site: number of examples, share of failures, offset of its sensors."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("directory", nargs="?", type=Path, default=Path("."), metavar="DIR", help="default: here")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")


def run(args: argparse.Namespace) -> None:
    """Writes the files, or none of them if one already exists and ``--force`` is not given."""
    files = {path.name: path.read_text(encoding="utf-8") for path in sorted(STARTER.iterdir()) if path.is_file()}
    files["readings.csv"] = readings()
    there = [name for name in files if (args.directory / name).exists()]
    if there and not args.force:
        raise ValueError(
            f"{args.directory} already has {', '.join(there)}. Name another folder (lightning-fl init DIR), or "
            "overwrite them with --force."
        )
    args.directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = args.directory / name
        path.write_text(text, encoding="utf-8")
        if name.endswith(".sh"):
            path.chmod(0o755)
    print(f"A federation of {len(SITES)} sites in {args.directory.resolve()}:")
    for name in files:
        print(f"  {name}")
    print("\nTry:")
    if args.directory.resolve() != Path(os.getcwd()).resolve():
        print(f"  cd {args.directory}")
    for line in (
        "lightning-fl partition --config config.yaml   # who has what",
        "lightning-fl fit --config config.yaml         # a federation of the sites, simulated in this process",
        "lightning-fl report logs/sites                # a page about it: report.html",
    ):
        print(f"  {line}")


def readings() -> str:
    """Synthetic readings of machines at four sites with different sensors and failure rates; the same at every call."""
    rng = np.random.default_rng(0)
    lines = ["site,temperature,vibration,pressure,current,failed"]
    for site, (count, share, shift) in SITES.items():
        failed = rng.random(count) < share
        values = rng.normal(size=(count, 4)) + shift
        values[failed] += (1.2, 1.6, -0.8, 0.9)
        lines += [
            ",".join([site, *(f"{value:.3f}" for value in row), str(int(label))])
            for row, label in zip(values, failed, strict=True)
        ]
    return "\n".join(lines) + "\n"
