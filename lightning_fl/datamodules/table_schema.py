"""The encoding of a table as tensors: its columns, their scaling, categories and classes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_fl.privacy.scaling import PrivateScaling, ScalingRelease

MAX_CATEGORIES = 100
MAX_CLASSES = 20
FAR = 5.0
"""Standard deviations, or half ranges, from the schema's middle, at which most values of a column look wrong."""
Task = Literal["auto", "classification", "regression"]
Origin = Literal["public", "data", "private"]


@dataclass(frozen=True)
class TableSchema:
    """The columns of a table and how they are encoded.

    Numeric columns become ``(value - mean) / std``; other columns are one-hot encoded, a value that is not listed as
    zeros. Silos that train together need the same schema: one saves it, and all pass it to their ``TabularDataModule``.

    Args:
        target: The column to predict.
        numeric: Mean and standard deviation of each numeric column.
        categories: The values of each other column.
        classes: The values of the target; None for a regression.
        origin: ``"public"``: public knowledge; ``"data"``: learned from the rows of a table without noise, which
            differential privacy refuses; ``"private"``: ``numeric`` from ``release``, the rest public.
        release: The differentially private release of ``numeric``.
    """

    target: str
    numeric: Mapping[str, tuple[float, float]]
    categories: Mapping[str, Sequence[Any]]
    classes: Sequence[Any] | None
    origin: Origin = "public"
    release: ScalingRelease | None = None

    @classmethod
    def from_ranges(
        cls,
        target: str,
        ranges: Mapping[str, tuple[float, float]],
        categories: Mapping[str, Sequence[Any]] | None = None,
        classes: Sequence[Any] | None = None,
    ) -> TableSchema:
        """A schema from public knowledge, without reading the data: each range is scaled to [-1, 1].

        Args:
            target: The column to predict.
            ranges: The smallest and largest value of each numeric column.
            categories: The values of each other column. Default None: there are none.
            classes: The values of the target; None for a regression.
        """
        numeric = {column: ((low + high) / 2, (high - low) / 2) for column, (low, high) in ranges.items()}
        return cls(target, numeric, categories or {}, classes)

    def scaled(self, scaling: PrivateScaling, table: Any, rows: np.ndarray, owners: np.ndarray) -> TableSchema:
        """The schema with the means and deviations of a private scaling, which this call releases.

        Args:
            scaling: The scaling.
            table: A pandas ``DataFrame``.
            rows: Positions of the training rows.
            owners: The client of each of these rows, as numbers from 0.

        Raises:
            ValueError: If the scaling has other columns than the schema, or a column is not numeric.
        """
        if scaling.ranges.keys() != self.numeric.keys():
            raise ValueError(
                f"PrivateScaling has ranges for {', '.join(scaling.ranges)}, but the numeric columns of the schema are "
                f"{', '.join(self.numeric)}. Give a range for each of these and no other."
            )
        values = {column: _numbers(table[column].iloc[rows], column) for column in scaling.ranges}
        numeric, release = scaling.fit(values, owners)
        return replace(
            self, numeric={column: numeric[column] for column in self.numeric}, origin="private", release=release
        )

    @property
    def feature_names(self) -> list[str]:
        """Names of the features, in order."""
        return [*self.numeric, *(f"{name}={value}" for name, values in self.categories.items() for value in values)]

    def save(self, path: str | Path) -> None:
        """Writes the schema as JSON, atomically."""
        partial = Path(f"{path}.part")
        partial.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> TableSchema:
        """Reads a schema written by :meth:`save`.

        Raises:
            ValueError: If the file is not a schema.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            numeric = {name: (float(mean), float(std)) for name, (mean, std) in content["numeric"].items()}
            origin, release = content.get("origin", "public"), content.get("release")
            if origin not in get_args(Origin) or (origin == "private") != (release is not None):
                raise ValueError(f"origin {origin!r} with release {release}")
            return cls(
                str(content["target"]),
                numeric,
                dict(content["categories"]),
                content["classes"],
                origin,
                None if release is None else ScalingRelease(**release),
            )
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a table schema ({error}); write one with TableSchema.save.") from error

    def encode(self, table: Any, name: str, missing: str = "error") -> tuple[Tensor, Tensor]:
        """Encodes a table as float32 features ``[num_rows, num_features]`` and int64 or float32 targets ``[num_rows]``.

        Args:
            table: A pandas ``DataFrame``.
            name: Name of the table, for messages.
            missing: ``"error"``: missing features are an error. ``"mean"``: a missing number is replaced by the mean, a
                missing category by zeros.

        Raises:
            ValueError: If a column is missing, a value is missing or infinite, or a target is not one of the classes.
        """
        check_columns(table, [*self.numeric, *self.categories, self.target], name)
        columns = []
        for column, (mean, std) in self.numeric.items():
            columns.append((_numbers(table[column], column) - mean) / std)
            if self.origin != "private":  # noise may have moved the mean or shrunk the deviation
                _warn_of_other_units(column, columns[-1], mean, std, name)
        num_faulty = {c: int((~np.isfinite(v)).sum()) for c, v in zip(self.numeric, columns, strict=True)}
        num_faulty |= {c: int(table[c].isna().sum()) for c in self.categories}
        infinite = [c for c, v in zip(self.numeric, columns, strict=True) if np.isinf(v).any()]
        if infinite or (missing == "error" and any(num_faulty.values())):
            found = ", ".join(f"{column!r} ({number})" for column, number in num_faulty.items() if number)
            raise ValueError(
                f"{name} has missing or infinite values in the columns {found}. Fix or drop them; missing='mean' "
                "replaces missing numbers by the mean and missing categories by zeros."
            )
        # 0 is the mean, after standardising
        columns = [np.nan_to_num(values, nan=0.0) for values in columns]
        for column, values in self.categories.items():
            text = table[column].astype(str).to_numpy()
            # Converted to a string, a missing value is "nan", which may be the name of a category.
            is_known = [(text == str(value)) & table[column].notna().to_numpy() for value in values]
            columns += is_known
            _warn_of_unlisted(column, text[~np.any(is_known, axis=0) & table[column].notna().to_numpy()], values, name)
        features = np.stack(columns, axis=1).astype(np.float32)
        return torch.from_numpy(features), self._targets(table, name)

    def _targets(self, table: Any, name: str) -> Tensor:
        column = table[self.target]
        if column.isna().any():
            raise ValueError(
                f"{int(column.isna().sum())} rows of {name} have no value in the target {self.target!r}; delete them."
            )
        if self.classes is None:
            values = column.to_numpy(dtype=np.float64)
            if not np.isfinite(values).all():
                raise ValueError(f"The target {self.target!r} of {name} has infinite values; fix or delete these rows.")
            return torch.from_numpy(values.astype(np.float32))
        position = {value: index for index, value in enumerate(self.classes)}
        unknown = sorted({str(value) for value in column.unique().tolist() if value not in position})
        if unknown:
            raise ValueError(
                f"The target {self.target!r} of {name} has the unknown labels {', '.join(unknown[:5])}; expected one "
                f"of {', '.join(map(str, self.classes))}."
            )
        return torch.from_numpy(column.map(position).to_numpy(dtype=np.int64, copy=True))


def fit_schema(
    table: Any, rows: np.ndarray, target: str, features: Sequence[str], task: Task, name: str
) -> TableSchema:
    """Learns the schema of a table.

    Args:
        table: A pandas ``DataFrame``.
        rows: Positions of the training rows, from which means, standard deviations and categories are computed.
        target: The column to predict.
        features: The columns to predict from.
        task: Whether the target is a class or a number. ``"auto"``: a class unless it is a number with more than 20
            different values.
        name: Name of the table, for messages.

    Raises:
        ValueError: If a column can't be encoded, or the task does not fit the target.
    """
    numeric, categories = {}, {}
    for column in features:
        values = table[column].iloc[rows]
        if is_number(values):
            numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
            numbers = numbers[np.isfinite(numbers)]
            mean, std = (float(numbers.mean()), float(numbers.std())) if len(numbers) else (0.0, 1.0)
            # A constant column is not scaled, which would divide by 0.
            numeric[column] = (mean, std if std > 0 else 1.0)
        elif values.dtype.kind in "mM":
            raise ValueError(
                f"Column {column!r} of {name} has dates; convert it to numbers, or leave it out with `drop`."
            )
        else:
            # Sorted, so that the features do not depend on the order of the rows.
            categories[column] = sorted(map(str, values.dropna().unique()))
            if len(categories[column]) > MAX_CATEGORIES:
                raise ValueError(
                    f"Column {column!r} of {name} is text with {len(categories[column])} different values, more than "
                    f"{MAX_CATEGORIES}; leave it out with `drop`, or merge some of its values."
                )
    return TableSchema(target, numeric, categories, _classes(table[target], target, task, name), origin="data")


def _numbers(column: Any, name: str) -> np.ndarray:
    if not is_number(column):
        raise ValueError(f"Column {name!r} has type {column.dtype}, but the schema says it is numeric.")
    values: np.ndarray = column.to_numpy(dtype=np.float64, na_value=np.nan)
    return values


def _warn_of_other_units(column: str, scaled: np.ndarray, mean: float, std: float, name: str) -> None:
    """Warns if most values are far from those for which the schema was made."""
    distances = np.abs(scaled[np.isfinite(scaled)])
    if len(distances) and np.median(distances) > FAR:
        middle = float(np.median(scaled[np.isfinite(scaled)])) * std + mean
        warnings.warn(
            f"Column {column!r} of {name} has values around {middle:.4g}, where the schema expects {mean:.4g} give or "
            f"take {std:.4g}. Is it in other units?",
            stacklevel=2,
        )


def _warn_of_unlisted(column: str, unlisted: np.ndarray, values: Sequence[Any], name: str) -> None:
    if len(unlisted):
        found = ", ".join(map(repr, sorted(set(unlisted.tolist()))[:5]))
        warnings.warn(
            f"Column {column!r} of {name} has {len(unlisted)} values that the schema does not list, such as {found}; "
            f"encoded as zeros. It lists {', '.join(map(repr, values[:20]))}. Check how the column is coded.",
            stacklevel=2,
        )


def is_number(column: Any) -> bool:
    """Whether a pandas column has numbers or booleans."""
    return getattr(column.dtype, "kind", "O") in "iufb"


def check_columns(table: Any, expected: Sequence[str], name: str) -> None:
    """Checks that a table has the expected columns.

    Raises:
        ValueError: If one is missing.
    """
    missing = [column for column in expected if column not in table.columns]
    if missing:
        found = ", ".join(map(str, table.columns))
        raise ValueError(f"{name} has no column {', '.join(map(repr, missing))}; its columns are {found}.")


def _classes(column: Any, target: str, task: Task, name: str) -> list[Any] | None:
    values = column.dropna().unique()
    number = is_number(column) and column.dtype.kind != "b"
    if task == "regression" or (task == "auto" and number and len(values) > MAX_CLASSES):
        if not is_number(column):
            raise ValueError(f"The target {target!r} of {name} is text; a regression needs numbers.")
        return None
    if task == "classification" and len(values) > MAX_CATEGORIES and number:
        raise ValueError(
            f"The target {target!r} of {name} has {len(values)} different values, too many for classes; use "
            "task='regression'."
        )
    if len(values) < 2:
        raise ValueError(
            f"The target {target!r} of {name} has {len(values)} different value(s); nothing can be learned."
        )
    return sorted(values.tolist())
