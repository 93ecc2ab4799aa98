"""Writes one HTML page about a run, which needs no other file and no network.

A run is the folder that `lightning-fl fit` has written, such as logs/digits_fedavg/version_0; of a folder that holds
several runs the last is taken. It can be called while the run goes on.

Examples:
  lightning-fl report logs/digits_fedavg/version_0
  lightning-fl report logs/digits_fedavg --out report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_fl.tracking import Run
from lightning_fl.tracking.report import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("run", metavar="RUN", help="the folder of the run")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the run's folder)")


def run(args: argparse.Namespace) -> None:
    """Writes the page."""
    found = Run.read(args.run)
    path = args.out or found.path / "report.html"
    write_report(found, path)
    print(f"report: {path}")
