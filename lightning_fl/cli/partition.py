"""Shows the partition before training: the clients, their sizes and labels, and how much they differ.

It takes the configuration and options of `lightning-fl fit`, sets the run up as `fit` would, and stops before training.
Labels come from the data set's `targets` or `labels` or the last tensor of a TensorDataset; otherwise every sample is
read.

Examples:
  lightning-fl partition --config config.yaml
  lightning-fl partition --config config.yaml --data.partitioner.alpha 0.1 --out skewed.png
  torchrun --standalone --nproc_per_node 3 -m lightning_fl partition --config silos.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_fl.cli.command import check_output, fail

SETS_UP_A_RUN = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.usage = "lightning-fl partition --config CONFIG [any option of fit] [--out PNG] [--max-clients N]"
    parser.add_argument("--config", action="append", metavar="CONFIG", help="a configuration as for `fit`")
    parser.add_argument("--out", type=Path, default=Path("partition.png"), help="the figure (default: %(default)s)")
    parser.add_argument(
        "--max-clients", type=int, default=1000, help="read at most this many clients (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Prints the table and writes the figure."""
    if args.max_clients < 1:
        raise fail(f"--max-clients {args.max_clients} must be at least 1.")
    try:
        check_output(args.out)
    except ValueError as error:
        raise fail(error) from None
    from rich.console import Console

    from lightning_fl.cli.partition_look import LookAtPartition, PartitionCLI, show
    from lightning_fl.tracking import plots

    look = LookAtPartition(args.max_clients)
    configs = [word for config in args.config or () for word in ("--config", config)]
    PartitionCLI(["fit", *configs, *args.rest], look)
    if look.summary is None:
        return
    show(look.summary, Console())
    if not plots.is_available():
        print('The figure needs matplotlib: pip install "lightning-fl[tracking]"')
        return
    args.out.write_bytes(plots.as_png(plots.partition_figure(look.summary)))
    print(f"picture: {args.out}")
