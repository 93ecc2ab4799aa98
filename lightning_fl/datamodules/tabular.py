"""CSV or Parquet tables with a column that names the client of each row."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.data.holdout import Part
from lightning_fl.datamodules.natural import ClientData, NaturalDataModule
from lightning_fl.datamodules.table_schema import TableSchema, Task, check_columns, fit_schema
from lightning_fl.privacy.scaling import PrivateScaling, ScalingRelease
from lightning_fl.strategies.validation import OWN_TO_EACH_SILO
from lightning_fl.types import ClientId

_EVERYONE = "everyone"  # the only client of a table without a client column


class TabularDataModule(NaturalDataModule):
    r"""A table in CSV or Parquet files, with a column ``client`` that names the client of each row.

    Numeric columns are standardised and other columns one-hot encoded, as learned from the training rows and recorded
    in ``schema``. After ``setup()`` the sizes for the model are in ``num_features`` and ``num_classes``. Batches are
    pairs of float32 features ``[batch, num_features]`` and targets ``[batch]``, int64 classes or float32 numbers.
    Without ``client`` the table is a data set in one place: a federation splits it among simulated clients, or uses it
    as the data of this silo.

    Args:
        path: A ``.csv``, ``.csv.gz`` or ``.parquet`` file, a list of such files, or a folder of them.
        target: The column to predict.
        client: The column that names the client of a row.
        features: The columns to predict from. None: all other columns.
        drop: Columns to leave out.
        task: ``"classification"`` or ``"regression"``. ``"auto"``: classification unless the target is a number with
            more than 20 different values.
        missing: ``"error"``: rows with missing features are an error. ``"mean"``: a missing number is replaced by the
            mean, a missing category by zeros.
        schema: The encoding of the columns, a file written by ``TableSchema.save``; silos that train together need the
            same one. None: learned from the training rows.
        scaling: Replaces the schema's means and standard deviations by those of the training rows, released under
            differential privacy; the ledger of the training counts the release. It needs a ``schema``. Save
            ``schema`` after ``setup()``, and give it to a run that resumes, which would otherwise release again.
        **kwargs: ``batch_size``, ``val_share``, ``test_share``, ``seed``, ``num_workers`` and ``eval_batch_size``; see
            :class:`NaturalDataModule`.

    Raises:
        ValueError: If an argument is out of range; on setup, if a file is corrupt, a column is missing, or a value is
            missing or of the wrong kind.
        FileNotFoundError: On setup, if a file does not exist.
        ImportError: On setup, if pandas is not installed.

    Example:
        >>> from pathlib import Path
        >>> rows = [f"{age},{shop},{age > 40}" for age in range(20, 60) for shop in ("north", "south")]
        >>> _ = Path("visits.csv").write_text("\n".join(["age,shop,returns", *rows]))
        >>> data = TabularDataModule("visits.csv", target="returns", client="shop")
        >>> data.setup()
        >>> data.client_ids, data.num_features, data.num_classes
        (['north', 'south'], 1, 2)
    """

    def __init__(
        self,
        path: str | Path | list[str],
        target: str,
        client: str | None = None,
        features: list[str] | None = None,
        drop: Sequence[str] = (),
        task: Task = "auto",
        missing: Literal["error", "mean"] = "error",
        schema: str | Path | None = None,
        scaling: PrivateScaling | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if task not in ("auto", "classification", "regression"):
            raise ValueError(f"task={task!r} is unknown; expected 'auto', 'classification' or 'regression'.")
        if missing not in ("error", "mean"):
            raise ValueError(f"missing={missing!r} is unknown; expected 'error' or 'mean'.")
        if schema is not None and (features is not None or drop or task != "auto"):
            raise ValueError(
                "schema already defines the columns and their encoding. Leave out features, drop and task."
            )
        if scaling is not None and schema is None:
            raise ValueError(
                "scaling gives means and standard deviations only; columns, categories and classes would still be "
                "learned from the data without noise. Give a schema of public knowledge too: "
                "TableSchema.from_ranges(...).save('schema.json'), then schema='schema.json'."
            )
        if target == client:
            raise ValueError(f"target and client are both {target!r}; a column is one or the other.")
        self.gives_clients = client is not None
        self.path, self.target, self.client = path, target, client
        self.features, self.drop, self.task, self.missing = features, drop, task, missing
        self.schema_path, self.scaling = schema, scaling

    def read(self) -> ClientData:
        """Reads the table and encodes it as tensors in which each client's rows are contiguous."""
        table = read_tables(self.path, () if self.client is None else (self.client,))
        name = str(self.path)
        used = [self.target, *([self.client] if self.client else []), *(self.features or ()), *self.drop]
        check_columns(table, used, name)
        ids: list[ClientId] = [_EVERYONE]
        if self.client is None:
            sizes = np.array([len(table)])
        else:
            num_missing = int(table[self.client].isna().sum())
            if num_missing:
                raise ValueError(
                    f"{num_missing} rows of {name} have no client in column {self.client!r}. Fill it in or delete them."
                )
            keys, owner, sizes = np.unique(_keys(table[self.client]), return_inverse=True, return_counts=True)
            ids = keys.tolist()
            # Contiguous rows, so that a client's tensors are slices of the table's tensors, not copies.
            table = table.iloc[np.argsort(owner, kind="stable")].reset_index(drop=True)
        starts = dict(zip(ids, (np.cumsum(sizes) - sizes).tolist(), strict=True))
        counts = dict(zip(ids, sizes.tolist(), strict=True))
        self._rows = {
            part: np.concatenate([starts[i] + self.holdout.indices(counts[i], part, self.seed, i) for i in ids])
            for part in ("train", "val", "test")
        }
        self.schema = self._make_schema(table, name, sizes)
        x, y = self.schema.encode(table, name, self.missing)
        self._tensors = (x, y)

        def open_client(client: ClientId) -> Dataset:
            rows = slice(starts[client], starts[client] + counts[client])
            return TensorDataset(x[rows], y[rows])

        return ClientData(ids, counts.__getitem__, open_client)

    @property
    def described_columns(self) -> dict[str, str]:
        """The meaning of the model's inputs and outputs, on which silos have to agree; after ``setup()``.

        The schema's numbers are included only if the silos share them, not if they were learned from a silo's own rows.
        """
        if self._data is None:
            return {}
        schema = self.schema
        classes = "a number" if schema.classes is None else ", ".join(map(repr, schema.classes))
        shared = OWN_TO_EACH_SILO if schema.origin == "data" else repr(dict(schema.numeric))
        return {
            "target": schema.target,
            "features": ", ".join(schema.feature_names),
            "classes": classes,
            "scaling": shared,
        }

    @property
    def learned_from_data(self) -> str:
        """What the schema learned from the data without noise, and what to do under differential privacy."""
        if self._data is None or self.schema.origin != "data":
            return ""
        return (
            "the means, deviations, categories and classes of its columns. Give a schema of public knowledge, "
            "TableSchema.from_ranges(...).save('schema.json') and schema='schema.json', and "
            "scaling=PrivateScaling(...) for means and deviations learned from the data."
        )

    @property
    def release(self) -> ScalingRelease | None:
        """The schema's release about the data under differential privacy; None if there is none."""
        return None if self._data is None else self.schema.release

    @property
    def num_features(self) -> int:
        """Number of features of an example, after ``setup()``."""
        return len(self.schema.feature_names)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, after ``setup()``; None for a regression."""
        return None if self.schema.classes is None else len(self.schema.classes)

    def pooled(self, part: Part = "train") -> Dataset:
        """The rows of all clients for training, validation or test."""
        self.setup()
        x, y = self._tensors
        return TensorDataset(x[self._rows[part]], y[self._rows[part]])

    def train_dataloader(self) -> ClientLoaders | DataLoader:
        """The clients' loaders; one loader over all rows if ``client`` is None or the strategy is not federated."""
        return self.loader_of(self.pooled(), train=True) if self.client is None else super().train_dataloader()

    def _make_schema(self, table: Any, name: str, sizes: np.ndarray) -> TableSchema:
        if self.schema_path is not None:
            schema = TableSchema.load(self.schema_path)
            if schema.target != self.target:
                raise ValueError(f"{self.schema_path} is for the target {schema.target!r}, not {self.target!r}.")
            if self.scaling is None:
                return schema
            rows = self._rows["train"]
            owners = np.repeat(np.arange(len(sizes)), sizes)[rows]
            return schema.scaled(self.scaling, table, rows, np.unique(owners, return_inverse=True)[1])
        excluded = {self.target, self.client, *self.drop}
        columns = self.features or [column for column in table.columns if column not in excluded]
        if not columns:
            raise ValueError(f"{name} has no column left to predict {self.target!r} from. Drop fewer columns.")
        # From the training rows only, or held-out data would leak into the scaling.
        return fit_schema(table, self._rows["train"], self.target, columns, self.task, name)


def read_tables(path: str | Path | Sequence[str], text: Sequence[str] = ()) -> Any:
    """Reads a table in one or several files as one pandas ``DataFrame``.

    Args:
        path: A ``.csv``, ``.csv.gz`` or ``.parquet`` file, a list of such files, or a folder of them.
        text: Columns of CSV files that are read as text, such as names in which leading zeros count.

    Raises:
        FileNotFoundError: If a file does not exist, or the folder has no table.
        ValueError: If a file can't be read, has another extension, no rows, or other columns than the first file.
        ImportError: If pandas, or pyarrow for Parquet, is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError('TabularDataModule needs pandas: pip install "lightning-fl[data]"') from error
    if isinstance(path, str | Path):
        files = sorted(f for f in Path(path).iterdir() if _kind(f)) if Path(path).is_dir() else [Path(path)]
    else:
        files = [Path(file) for file in path]
    if not files:
        raise FileNotFoundError(f"{path} has no .csv, .csv.gz or .parquet file.")
    tables = []
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist; it was searched for in {file.parent.resolve()}.")
        if not _kind(file):
            raise ValueError(f"{file} is not a .csv, .csv.gz or .parquet file.")
        try:
            is_parquet = _kind(file) == "parquet"
            tables.append(
                pandas.read_parquet(file) if is_parquet else pandas.read_csv(file, dtype=dict.fromkeys(text, str))
            )
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file} can't be read: {str(error).strip()}. It may be corrupt or truncated.") from error
        if tables[-1].columns.tolist() != tables[0].columns.tolist():
            raise ValueError(
                f"The columns of {file} differ from those of {files[0]}; all files must have the same columns."
            )
        if len(tables[-1]) == 0:
            raise ValueError(f"{file} has no rows.")
    return pandas.concat(tables, ignore_index=True)


def _kind(file: Path) -> str | None:
    return "parquet" if file.suffix == ".parquet" else "csv" if file.name.endswith((".csv", ".csv.gz")) else None


def _keys(column: Any) -> np.ndarray:
    """The clients' ids: integers if all of the column are, written without leading zeros, else text."""
    if column.dtype.kind in "iub":
        return column.to_numpy().astype(int)
    names = column.to_numpy(dtype=object).astype(str)
    are_integers = all(re.fullmatch(r"\s*(0|-?[1-9]\d{0,17})\s*", name, re.ASCII) for name in np.unique(names))
    return names.astype(int) if are_integers else names
