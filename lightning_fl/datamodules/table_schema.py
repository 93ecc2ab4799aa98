"""How a table becomes tensors: which columns, scaled how, with which categories and classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

MAX_CATEGORIES = 100
MAX_CLASSES = 20
Task = Literal["auto", "classification", "regression"]


@dataclass(frozen=True)
class TableSchema:
    """The columns of a table and how they become numbers.

    Numeric columns become ``(value - mean) / std``, the others one column for each of their values, 1 where it is the
    row's and 0 elsewhere; a value that is not listed gives zeros. Silos that train together need the same schema: one
    saves it, all give it to their ``TabularDataModule``.

    Args:
        target: The column to predict.
        numeric: Mean and standard deviation of each numeric column.
        categories: The values of each other column.
        classes: The values of the target; None for regression.
    """

    target: str
    numeric: Mapping[str, tuple[float, float]]
    categories: Mapping[str, Sequence[Any]]
    classes: Sequence[Any] | None

    @property
    def feature_names(self) -> list[str]:
        """Names of the features, in order."""
        return [*self.numeric, *(f"{name}={value}" for name, values in self.categories.items() for value in values)]

    def save(self, path: str | Path) -> None:
        """Writes the schema as JSON; the file appears whole or not at all."""
        partial = Path(f"{path}.part")
        partial.write_text(json.dumps(asdict(self), indent=1))
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> TableSchema:
        """Reads a schema that :meth:`save` wrote.

        Raises:
            ValueError: If the file is none.
        """
        try:
            content = json.loads(Path(path).read_text())
            numeric = {name: (float(mean), float(std)) for name, (mean, std) in content["numeric"].items()}
            return cls(str(content["target"]), numeric, dict(content["categories"]), content["classes"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is no table schema ({error}); write one with TableSchema.save.") from error

    def encode(self, table: Any, name: str, missing: str = "error") -> tuple[Tensor, Tensor]:
        """Features, float32 ``[num_rows, num_features]``, and targets: int64 classes or float32 numbers ``[num_rows]``.

        Args:
            table: A pandas ``DataFrame``.
            name: Where it comes from, for messages.
            missing: ``"error"`` refuses rows with missing features; ``"mean"`` takes the mean, or no category.

        Raises:
            ValueError: If a column is missing, a value is missing or infinite, or a target is none of the classes.
        """
        check_columns(table, [*self.numeric, *self.categories, self.target], name)
        columns = []
        for column, (mean, std) in self.numeric.items():
            if not is_number(table[column]):
                raise ValueError(
                    f"Column {column!r} of {name} holds {table[column].dtype}, but it is a number elsewhere."
                )
            columns.append((table[column].to_numpy(dtype=np.float64, na_value=np.nan) - mean) / std)
        faulty = {c: int((~np.isfinite(v)).sum()) for c, v in zip(self.numeric, columns, strict=True)}
        faulty |= {c: int(table[c].isna().sum()) for c in self.categories}
        infinite = [c for c, v in zip(self.numeric, columns, strict=True) if np.isinf(v).any()]
        if infinite or (missing == "error" and any(faulty.values())):
            found = ", ".join(f"{column!r} ({number})" for column, number in faulty.items() if number)
            raise ValueError(
                f"{name} has missing or infinite values in the columns {found}. Fix or drop them; missing='mean' puts "
                "the mean for missing numbers, and no category."
            )
        columns = [np.nan_to_num(values, nan=0.0) for values in columns]
        for column, values in self.categories.items():
            text = table[column].astype(str).to_numpy()
            columns += [(text == str(value)) & table[column].notna().to_numpy() for value in values]
        features = np.stack(columns, axis=1).astype(np.float32)
        return torch.from_numpy(features), self._targets(table, name)

    def _targets(self, table: Any, name: str) -> Tensor:
        column = table[self.target]
        if column.isna().any():
            raise ValueError(f"{int(column.isna().sum())} rows of {name} have no value in the target {self.target!r}.")
        if self.classes is None:
            values = column.to_numpy(dtype=np.float64)
            if not np.isfinite(values).all():
                raise ValueError(f"The target {self.target!r} of {name} has infinite values.")
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
    """The schema of a table.

    Args:
        table: A pandas ``DataFrame``.
        rows: Positions of the training rows, from which means, deviations and categories are taken.
        target: The column to predict.
        features: The columns to predict it from.
        task: Whether the target is a class or a number. ``"auto"``: a class unless it is a number with more than 20
            values.
        name: Where the table comes from, for messages.

    Raises:
        ValueError: If a column can't become numbers, or the task does not fit the target.
    """
    numeric, categories = {}, {}
    for column in features:
        values = table[column].iloc[rows]
        if is_number(values):
            numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
            numbers = numbers[np.isfinite(numbers)]
            mean, std = (float(numbers.mean()), float(numbers.std())) if len(numbers) else (0.0, 1.0)
            numeric[column] = (mean, std if std > 0 else 1.0)
        elif values.dtype.kind in "mM":
            raise ValueError(
                f"Column {column!r} of {name} holds dates; turn it into numbers, or leave it out with `drop`."
            )
        else:
            categories[column] = sorted(map(str, values.dropna().unique()))
            if len(categories[column]) > MAX_CATEGORIES:
                raise ValueError(
                    f"Column {column!r} of {name} is text with {len(categories[column])} different values, more than "
                    f"{MAX_CATEGORIES}; leave it out with `drop`, or turn it into fewer categories."
                )
    return TableSchema(target, numeric, categories, _classes(table[target], target, task, name))


def is_number(column: Any) -> bool:
    """Whether a pandas column holds numbers or truth values."""
    return getattr(column.dtype, "kind", "O") in "iufb"


def check_columns(table: Any, expected: Sequence[str], name: str) -> None:
    """Refuses a table without the columns expected.

    Raises:
        ValueError: If one is missing.
    """
    absent = [column for column in expected if column not in table.columns]
    if absent:
        found = ", ".join(map(str, table.columns))
        raise ValueError(f"{name} has no column {', '.join(map(repr, absent))}; its columns are {found}.")


def _classes(column: Any, target: str, task: Task, name: str) -> list[Any] | None:
    values = column.dropna().unique()
    number = is_number(column) and column.dtype.kind != "b"
    if task == "regression" or (task == "auto" and number and len(values) > MAX_CLASSES):
        if not is_number(column):
            raise ValueError(f"The target {target!r} of {name} is text; a regression needs numbers.")
        return None
    if task == "classification" and len(values) > MAX_CATEGORIES and number:
        raise ValueError(f"The target {target!r} of {name} has {len(values)} different values; is it a regression?")
    if len(values) < 2:
        raise ValueError(
            f"The target {target!r} of {name} has {len(values)} different value(s); nothing can be learned."
        )
    return sorted(values.tolist())
