"""Writes a self-contained HTML page about a run, which needs no other file and no network.

A run is the folder that `lightning-fl fit` has written, such as logs/digits_fedavg/version_0; in a folder of several
runs, the last one counts, and index.html gets a row for each. The run may still be in progress.

Examples:
  lightning-fl report logs/digits_fedavg/version_0
  lightning-fl report logs
  lightning-fl report logs/digits_fedavg --out report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_fl.cli.command import check_output
from lightning_fl.tracking import Run
from lightning_fl.tracking.index import write_index
from lightning_fl.tracking.report import write_report
from lightning_fl.tracking.run import runs_below


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("run", metavar="RUN", help="the folder of the run")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the run's folder)")


def run(args: argparse.Namespace) -> None:
    """Writes the page."""
    found = Run.read(args.run)
    path = args.out or found.path / "report.html"
    check_output(path)
    write_report(found, path)
    print(f"report: {path}")
    runs = runs_below(Path(args.run))
    if len(runs) > 1 and args.out is None:
        index = Path(args.run) / "index.html"
        write_index([Run.read(one) for one in runs], index)
        print(f"all {len(runs)} runs: {index}")
