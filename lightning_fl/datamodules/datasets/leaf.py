"""Data sets in the JSON format of LEAF, and FEMNIST by writer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_fl.datamodules.natural import ClientData, NaturalDataModule
from lightning_fl.types import ClientId

_REMEDY = "Make the files again with LEAF's preprocess.sh."


class LEAFDataModule(NaturalDataModule):
    """A directory of LEAF: ``train/*.json`` and ``test/*.json``, or the files of ``all_data`` alone.

    Each file is ``{"users": [...], "num_samples": [...], "user_data": {user: {"x": [...], "y": [...]}}}``. Users are
    the clients; without a ``test`` folder each keeps ``test_share`` of its samples for test. Samples are float32 of the
    shape given, labels int64. Numbers are kept in memory as float32, one file being read at a time.

    Args:
        root: The directory (LEAF's ``data``), or one with JSON files in it.
        shape: Shape of a sample. None: as in the files.
        num_classes: Number of classes; labels are 0 to ``num_classes - 1``.
        batch_size: Examples in a training batch.
        val_share: Share of each client's training samples kept for validation, in [0, 1).
        test_share: Share of each client's samples kept for test if there is no ``test`` folder, in [0, 1).
        seed: Seed of the splits.
        num_workers: Worker processes of each loader.
        eval_batch_size: Examples in a batch of validation, test and prediction. None: the larger of ``batch_size`` and
            256.

    Raises:
        ValueError: If an argument is out of range; on setup, if a file is corrupt, or its numbers don't fit.
        FileNotFoundError: On setup, if there are no files.

    References:
        Caldas et al., *LEAF: A Benchmark for Federated Settings*, 2018, arXiv:1812.01097.
    """

    def __init__(
        self,
        root: str | Path,
        shape: Sequence[int] | None = None,
        num_classes: int = 10,
        batch_size: int = 10,
        val_share: float = 0.0,
        test_share: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            val_share=val_share,
            test_share=test_share,
            seed=seed,
            num_workers=num_workers,
            eval_batch_size=eval_batch_size,
            brings_test=True,
        )
        self.root = root
        self.shape = shape
        self.num_classes = num_classes

    def read(self) -> ClientData:
        """Reads the files, one after the other."""
        root = Path(self.root)
        if (root / "train").is_dir():
            test = self._read_folder(root / "test") if (root / "test").is_dir() else None
            return self._read_folder(root / "train", test)
        return self._read_folder(root / "all_data" if (root / "all_data").is_dir() else root)

    def encode(self, x: Sequence[Any], y: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """A user's ``x`` and ``y`` as tensors."""
        samples = torch.from_numpy(np.asarray(x, dtype=np.float32))
        if self.shape is not None:
            samples = samples.reshape(len(x), *self.shape)
        if not samples.isfinite().all():
            raise ValueError("x holds NaN or infinite numbers")
        labels = torch.from_numpy(np.asarray(y, dtype=np.int64))
        if not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"the labels go from {int(labels.min())} to {int(labels.max())}, expected 0 to {self.num_classes - 1}"
            )
        return samples, labels

    def _read_folder(self, folder: Path, test: ClientData | None = None) -> ClientData:
        files = sorted(folder.glob("*.json"))
        if not files:
            raise FileNotFoundError(f"{folder} has no .json file; `root` is LEAF's data directory with train/ in it.")
        clients: dict[ClientId, TensorDataset] = {}
        for file in files:
            for user, dataset in self._read_file(file).items():
                if user in clients:
                    raise ValueError(f"User {user!r} stands in {file} and in another file of {folder}. {_REMEDY}")
                clients[user] = dataset
        return ClientData(sorted(clients), lambda user: len(clients[user]), clients.__getitem__, test)

    def _read_file(self, file: Path) -> dict[str, TensorDataset]:
        try:
            content = json.loads(file.read_bytes())
            users, counts, data = content["users"], content["num_samples"], content["user_data"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is no LEAF file or cut short: {error!r}; expected users, num_samples and user_data. {_REMEDY}"
            ) from error
        found = {}
        for user, count in zip(users, counts, strict=False):
            own = data.get(user, {})
            x, y = own.get("x", ()), own.get("y", ())
            if not len(x) == len(y) == count or count == 0:
                raise ValueError(
                    f"User {user!r} of {file} has {len(x)} samples and {len(y)} labels; num_samples says {count}, and "
                    f"every client needs one. {_REMEDY}"
                )
            try:
                found[user] = TensorDataset(*self.encode(x, y))
            except (ValueError, RuntimeError, TypeError) as error:
                raise ValueError(f"The samples of user {user!r} in {file} can't be read: {error}. {_REMEDY}") from error
        return found


class FEMNISTDataModule(LEAFDataModule):
    """FEMNIST: handwritten digits and letters by writer, float32 images of shape ``[1, 28, 28]``, labels 0 to 61.

    ``root`` is LEAF's directory ``data/femnist/data`` after its ``preprocess.sh``. Arguments are those of
    :class:`LEAFDataModule`; ``HuggingFaceDataModule`` reads the copies of this set on the Hugging Face hub.

    References:
        Caldas et al., *LEAF: A Benchmark for Federated Settings*, 2018, arXiv:1812.01097. Cohen et al., *EMNIST: an
        Extension of MNIST to Handwritten Letters*, 2017, arXiv:1702.05373.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 10,
        val_share: float = 0.0,
        test_share: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(root, (1, 28, 28), 62, batch_size, val_share, test_share, seed, num_workers, eval_batch_size)
