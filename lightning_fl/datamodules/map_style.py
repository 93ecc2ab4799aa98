"""Any map-style data set, from torch or Hugging Face, with a column that names the client of each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.data.holdout import Part
from lightning_fl.data.targets import column
from lightning_fl.datamodules.natural import ClientData, NaturalDataModule

_EVERYONE = "everyone"  # the only client of a data set without a client column


class TorchDataModule(NaturalDataModule):
    """Any map-style torch data set, with a column ``client`` that names the client of each sample.

    Without ``client`` it is a data set in one place: a federation splits it among simulated clients, or uses it as the
    data of this silo.

    Args:
        train: The data set, from which each client holds out samples for validation and test.
        test: Test data. None: ``test_share`` of each client's samples is held out.
        client: The column that names the client: an attribute of the data set with one value per sample, an entry of
            samples that are mappings, or the position of an entry of samples that are tuples.
        brings_test: Whether :meth:`load` may return test data even if ``test`` is None.
        **kwargs: ``batch_size``, ``val_share``, ``test_share``, ``seed``, ``num_workers`` and ``eval_batch_size``; see
            :class:`NaturalDataModule`.

    Raises:
        ValueError: If an argument is out of range; on setup, if there is no such column.
    """

    def __init__(
        self,
        train: Dataset,
        test: Dataset | None = None,
        client: str | int | None = None,
        *,
        brings_test: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(brings_test=brings_test or test is not None, **kwargs)
        self._train, self._test, self.client = train, test, client

    def read(self) -> ClientData:
        """Groups the samples by client."""
        train, test = self.load()
        return self._by_client(train, None if test is None else self._by_client(test))

    def load(self) -> tuple[Any, Any]:
        """Returns the training data, and the test data or None."""
        return self._train, self._test

    def view(self, dataset: Any) -> Dataset:
        """The examples of a data set that :meth:`load` returned."""
        return dataset

    def train_dataloader(self) -> ClientLoaders | DataLoader:
        """The clients' loaders; one loader over all data if ``client`` is None or the strategy is not federated."""
        return self.loader_of(self.pooled(), train=True) if self.client is None else super().train_dataloader()

    def pooled(self, part: Part = "train") -> Dataset:
        """All samples for training, validation or test."""
        return self.client_dataset(_EVERYONE, part) if self.client is None else super().pooled(part)

    def _by_client(self, dataset: Any, test: ClientData | None = None) -> ClientData:
        samples = self.view(dataset)
        if self.client is None:
            return ClientData([_EVERYONE], lambda _: len(dataset), lambda _: samples, test)
        names, owner, sizes = np.unique(column(dataset, self.client), return_inverse=True, return_counts=True)
        order, ends = np.argsort(owner, kind="stable"), np.cumsum(sizes)
        position = {name: index for index, name in enumerate(names.tolist())}

        def open_client(name: Any) -> Dataset:
            index = position[name]
            return Subset(samples, order[ends[index] - sizes[index] : ends[index]].tolist())

        return ClientData(list(position), lambda name: int(sizes[position[name]]), open_client, test)


class HuggingFaceDataModule(TorchDataModule):
    """Any data set of Hugging Face's ``datasets``, with a column ``client`` that names the client of each row.

    Batches are pairs of ``features`` and ``target``: images become float32 in [0, 1] of shape ``[channels, height,
    width]``, numbers become float32 or int64 tensors. For other examples, such as tokens, use ``transform``.

    Args:
        path: A folder written by ``Dataset.save_to_disk``, or the name of a data set on the hub.
        features: The column to predict from, or a list of numeric columns.
        target: The column to predict.
        name: Configuration of the data set.
        client: The column that names the client of a row.
        train_split: Name of the split to train on.
        test_split: Name of the test split. None: ``test_share`` of each client's rows is held out.
        transform: Creates an example from a row (a mapping); replaces ``features`` and ``target``.
        download: Whether to download the data set from the hub if it is not on disk.
        **kwargs: ``batch_size``, ``val_share``, ``test_share``, ``seed``, ``num_workers`` and ``eval_batch_size``; see
            :class:`NaturalDataModule`.

    Raises:
        ValueError: If an argument is out of range; on setup, if a column or split is missing.
        FileNotFoundError: On setup, if the data set is not on disk and ``download`` is False.
        ImportError: On setup, if ``datasets`` is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        features: str | list[str] = "image",
        target: str = "label",
        name: str | None = None,
        client: str | None = None,
        train_split: str = "train",
        test_split: str | None = None,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        # load() reads the data set, so the base class is given none
        no_dataset: Any = None
        super().__init__(no_dataset, None, client, brings_test=test_split is not None, **kwargs)
        self.path, self.name, self.features, self.target = path, name, features, target
        self.train_split, self.test_split, self.transform, self.download = train_split, test_split, transform, download

    def load(self) -> tuple[Any, Any]:
        """Returns the rows of the training split, and of the test split or None."""
        loaded = self._load()
        is_split = isinstance(loaded, dict)
        wanted = [self.train_split, *([self.test_split] if self.test_split else [])]
        absent = [split for split in wanted if is_split and split not in loaded]
        if absent or (self.test_split and not is_split):
            found = ", ".join(loaded) if is_split else "one split without a name"
            raise ValueError(f"{self.path} has no split {(absent or wanted[1:])[0]!r}; it has {found}.")
        train = loaded[self.train_split] if is_split else loaded
        columns = [] if self.transform else [*([self.features] if isinstance(self.features, str) else self.features)]
        for wanted_column in [*columns, *([] if self.transform else [self.target])]:
            if wanted_column not in train.column_names:
                raise ValueError(
                    f"{self.path} has no column {wanted_column!r}; it has {', '.join(train.column_names)}."
                )
        return train, loaded[self.test_split] if self.test_split else None

    def view(self, dataset: Any) -> Dataset:
        """Rows converted to examples."""
        return _Rows(dataset, self.transform or self._example, None if self.transform else self.target)

    def _example(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if isinstance(self.features, str):
            return to_tensor(row[self.features], self.features), to_tensor(row[self.target], self.target)
        values = [to_tensor(row[name], name).float().reshape(-1) for name in self.features]
        return torch.cat(values), to_tensor(row[self.target], self.target)

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ImportError("HuggingFaceDataModule needs the library datasets: pip install datasets") from error
        if Path(self.path).is_dir():
            return datasets.load_from_disk(str(self.path))
        try:
            # without download=True, only the library's cache is searched
            options = datasets.DownloadConfig(local_files_only=not self.download)
            return datasets.load_dataset(str(self.path), self.name, download_config=options)
        except Exception as error:
            if self.download:
                raise
            raise FileNotFoundError(
                f"{self.path} is neither a folder nor the name of a data set on disk ({error}). Download it from the "
                "hub with download=True."
            ) from error


def to_tensor(value: Any, name: str) -> Tensor:
    """Converts an image to float32 in [0, 1] of shape ``[channels, height, width]``, numbers to float32 or int64.

    Raises:
        ValueError: If ``value`` is neither.
    """
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "iufb":
        raise ValueError(
            f"Column {name!r} has a {type(value).__name__}, which is neither an image nor numbers. Set "
            "`transform` to a function that creates an example from a row."
        )
    if array.dtype == np.uint8 and array.ndim in (2, 3):
        image = torch.from_numpy(array.astype(np.float32) / 255)
        return image.unsqueeze(0) if image.ndim == 2 else image.permute(2, 0, 1).contiguous()
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))


class _Rows(Dataset):
    """Rows converted to examples; ``targets`` lets partitioners read the targets without converting every row."""

    def __init__(self, rows: Any, make: Callable[[dict[str, Any]], Any], target: str | None) -> None:
        self.rows = rows
        self.make = make
        if target is not None:
            self.targets: Sequence[Any] = rows[target]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.make(self.rows[int(index)])
