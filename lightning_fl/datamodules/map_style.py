"""Any map-style data set, of torch or of Hugging Face, by clients that one of its columns names."""

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

_EVERYONE = "everyone"


class TorchDataModule(NaturalDataModule):
    """Any map-style torch data set, whose column ``client`` says whose each sample is.

    Without ``client`` it is a data set in one place: a federation splits it among simulated clients, or takes it as the
    data of this silo.

    Args:
        train: The data set, of which each client keeps shares for validation and test.
        test: Data for test. None: ``test_share`` of the samples.
        client: What names the client of a sample: an attribute of the data set with one value a sample, an entry of
            samples that are mappings, or the position of one in samples that are tuples.
        batch_size: Examples in a training batch.
        val_share: Share of each client's samples kept for validation, in [0, 1).
        test_share: Share of each client's samples kept for test, in [0, 1).
        seed: Seed of the splits.
        num_workers: Worker processes of each loader.
        eval_batch_size: Examples in a batch of validation, test and prediction. None: the larger of ``batch_size`` and
            256.
        brings_test: Whether :meth:`load` may bring data for test although ``test`` is None.

    Raises:
        ValueError: If an argument is out of range; on setup, if there is no such column.
    """

    def __init__(
        self,
        train: Dataset,
        test: Dataset | None = None,
        client: str | int | None = None,
        batch_size: int = 32,
        val_share: float = 0.0,
        test_share: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
        brings_test: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            val_share=val_share,
            test_share=test_share,
            seed=seed,
            num_workers=num_workers,
            eval_batch_size=eval_batch_size,
            brings_test=brings_test or test is not None,
        )
        self._train, self._test, self.client = train, test, client

    def read(self) -> ClientData:
        """Finds out whose each sample is."""
        train, test = self.load()
        return self._by_client(train, None if test is None else self._by_client(test))

    def load(self) -> tuple[Any, Any]:
        """The data, and that for test or None."""
        return self._train, self._test

    def view(self, dataset: Any) -> Dataset:
        """What batches are made of, from what :meth:`load` gives."""
        return dataset

    def train_dataloader(self) -> ClientLoaders | DataLoader:
        """The clients' loaders; one loader over all data without ``client`` or if the strategy is not federated."""
        return self._loader(self.pooled(), train=True) if self.client is None else super().train_dataloader()

    def pooled(self, part: Part = "train") -> Dataset:
        """All samples for training, validation or test together."""
        return self.client_dataset(_EVERYONE, part) if self.client is None else super().pooled(part)

    def _by_client(self, dataset: Any, test: ClientData | None = None) -> ClientData:
        samples = self.view(dataset)
        if self.client is None:
            return ClientData([_EVERYONE], lambda _: len(dataset), lambda _: samples, test)
        names, owner, sizes = np.unique(column(dataset, self.client), return_inverse=True, return_counts=True)
        order, ends = np.argsort(owner, kind="stable"), np.cumsum(sizes)
        position = {name: index for index, name in enumerate(names.tolist())}

        def own(name: Any) -> Dataset:
            index = position[name]
            return Subset(samples, order[ends[index] - sizes[index] : ends[index]].tolist())

        return ClientData(list(position), lambda name: int(sizes[position[name]]), own, test)


class HuggingFaceDataModule(TorchDataModule):
    """Any data set of Hugging Face's ``datasets``, whose column ``client`` says whose each row is.

    Batches are pairs of what ``features`` and ``target`` hold: images become float32 in [0, 1] of shape ``[channels,
    height, width]``, numbers float32 or int64 tensors. ``transform`` makes anything else of a row, such as tokens.

    Args:
        path: A folder that ``Dataset.save_to_disk`` wrote, or the name of a data set on the hub.
        features: The column to predict from, or a list of columns of numbers.
        target: The column to predict.
        name: Which configuration of the data set.
        client: The column that names the client of a row.
        train_split: Name of the split to train on.
        test_split: Name of the split for test. None: ``test_share`` of the rows.
        transform: Makes an example of a row (a mapping), instead of ``features`` and ``target``.
        download: Whether to download a data set of the hub; the library says what and how large. Else it must be on
            disk already.
        batch_size: Examples in a training batch.
        val_share: Share of each client's rows kept for validation, in [0, 1).
        test_share: Share of each client's rows kept for test, in [0, 1).
        seed: Seed of the splits.
        num_workers: Worker processes of each loader.
        eval_batch_size: Examples in a batch of validation, test and prediction. None: the larger of ``batch_size`` and
            256.

    Raises:
        ValueError: If an argument is out of range; on setup, if a column or split is missing.
        FileNotFoundError: On setup, if the data set is not on disk and ``download`` is not set.
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
        batch_size: int = 32,
        val_share: float = 0.0,
        test_share: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
    ) -> None:
        nothing: Any = None
        super().__init__(
            nothing,
            None,
            client,
            batch_size,
            val_share,
            test_share,
            seed,
            num_workers,
            eval_batch_size,
            brings_test=test_split is not None,
        )
        self.path, self.name, self.features, self.target = path, name, features, target
        self.train_split, self.test_split, self.transform, self.download = train_split, test_split, transform, download

    def load(self) -> tuple[Any, Any]:
        """The rows of the two splits."""
        loaded = self._load()
        is_split = isinstance(loaded, dict)
        wanted = [self.train_split, *([self.test_split] if self.test_split else [])]
        absent = [split for split in wanted if is_split and split not in loaded]
        if absent or (self.test_split and not is_split):
            have = ", ".join(loaded) if is_split else "one split without a name"
            raise ValueError(f"{self.path} has no split {(absent or wanted[1:])[0]!r}; it has {have}.")
        train = loaded[self.train_split] if is_split else loaded
        columns = [] if self.transform else [*([self.features] if isinstance(self.features, str) else self.features)]
        for wanted_column in [*columns, *([] if self.transform else [self.target])]:
            if wanted_column not in train.column_names:
                raise ValueError(
                    f"{self.path} has no column {wanted_column!r}; it has {', '.join(train.column_names)}."
                )
        return train, loaded[self.test_split] if self.test_split else None

    def view(self, dataset: Any) -> Dataset:
        """Rows as examples."""
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
            options = datasets.DownloadConfig(local_files_only=not self.download)
            return datasets.load_dataset(str(self.path), self.name, download_config=options)
        except Exception as error:
            if self.download:
                raise
            raise FileNotFoundError(
                f"There is no folder {self.path}, and no data set of that name on disk ({error}). Download it from the "
                "hub with download=True."
            ) from error


def to_tensor(value: Any, name: str) -> Tensor:
    """An image as float32 in [0, 1] ``[channels, height, width]``, numbers as float32 or int64.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "iufb":
        raise ValueError(
            f"Column {name!r} holds a {type(value).__name__}, which is neither an image nor numbers. Make an example "
            "of a row with `transform`."
        )
    if array.dtype == np.uint8 and array.ndim in (2, 3):
        image = torch.from_numpy(array.astype(np.float32) / 255)
        return image.unsqueeze(0) if image.ndim == 2 else image.permute(2, 0, 1).contiguous()
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))


class _Rows(Dataset):
    """Rows of a table as examples; the target column is known without reading them."""

    def __init__(self, rows: Any, make: Callable[[dict[str, Any]], Any], target: str | None) -> None:
        self.rows = rows
        self.make = make
        if target is not None:
            self.targets: Sequence[Any] = rows[target]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.make(self.rows[int(index)])
