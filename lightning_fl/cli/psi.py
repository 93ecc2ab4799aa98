"""Finds the ids that all parties share, without revealing any others, and writes each party's rows in the same order.

Each party starts it with its own table; {rank} in file names stands for the party's number. Rows at the same position
of the written files belong to the same id.

Examples:
  lightning-fl psi party0.csv --id patient --out aligned0.csv   (under torchrun or with its variables)
  torchrun --standalone --nproc_per_node 3 -m lightning_fl psi party{rank}.csv --id patient --out aligned{rank}.csv
  torchrun --standalone --nproc_per_node 2 -m lightning_fl psi party{rank}.csv --id patient --cardinality
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_fl.cli.command import check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("table", help="this party's .csv, .csv.gz or .parquet file")
    parser.add_argument("--id", required=True, metavar="COLUMN", help="the column of ids, without duplicates")
    parser.add_argument("--out", metavar="FILE", help="the CSV file for this party's shared rows")
    parser.add_argument("--cardinality", action="store_true", help="find only the number of shared ids")


def run(args: argparse.Namespace) -> None:
    """Aligns the tables."""
    if (args.out is None) != args.cardinality:
        raise ValueError("Give either --out FILE, for the shared rows, or --cardinality, for their number.")
    from lightning_fl.analytics.question import labels
    from lightning_fl.communication import launched_group
    from lightning_fl.datamodules.tabular import read_tables
    from lightning_fl.privacy.secagg.errors import ProtocolError
    from lightning_fl.vertical import psi

    group = launched_group()
    table = read_tables(args.table.replace("{rank}", str(group.rank)))
    out = None if args.out is None else Path(args.out.replace("{rank}", str(group.rank)))
    if out is not None:
        check_output(out)
    ids = labels(table, args.id)
    if any(value is None for value in ids):
        raise ValueError(f"Some rows of {args.table} have no {args.id!r}; delete them.")
    try:
        found = psi(list(ids), group, cardinality_only=args.cardinality)
    except ProtocolError as error:
        raise ValueError(str(error)) from error
    if out is not None:
        table.iloc[found.rows].to_csv(out, index=False)
    if group.rank == 0:
        print(f"{found.size} ids are shared by {group.size} parties" + ("" if out is None else f": {args.out}"))
