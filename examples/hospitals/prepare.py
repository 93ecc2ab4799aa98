"""Writes a table for each of three hospitals, and the schema on which they have agreed.

The rows are scikit-learn's 569 breast tumours. Real hospitals bring their own tables, and agree on a schema from what
is publicly known of each column (`TableSchema.from_ranges`), not from anybody's rows.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

from lightning_fl.datamodules.table_schema import TableSchema

HOSPITALS = {"east": 0.2, "north": 0.3, "south": 0.5}


def prepare(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = load_breast_cancer(as_frame=True).frame.rename(columns=lambda name: name.replace(" ", "_"))
    order = np.random.default_rng(0).permutation(len(table))
    ends = (np.cumsum(list(HOSPITALS.values())) * len(table)).astype(int)
    for name, rows in zip(HOSPITALS, np.split(order, ends[:-1]), strict=True):
        table.iloc[rows].to_csv(folder / f"{name}.csv", index=False)
    # What is known of each column without a look at the rows; here, the ranges of the data set's description.
    ranges = {name: (float(table[name].min()), float(table[name].max())) for name in table.columns[:-1]}
    TableSchema.from_ranges("target", ranges, classes=[0, 1]).save(folder / "schema.json")


if __name__ == "__main__":
    prepare(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
