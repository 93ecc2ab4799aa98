"""Data sets in the JSON format of LEAF, and FEMNIST by writer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_fl.datamodules.natural import ClientData, NaturalDataModule
from lightning_fl.types import ClientId

_REMEDY = "Create the files again with LEAF's preprocess.sh."


class LEAFDataModule(NaturalDataModule):
    """A LEAF data set: the files ``train/*.json`` and ``test/*.json``, or ``all_data/*.json``.

    Each file is ``{"users": [...], "num_samples": [...], "user_data": {user: {"x": [...], "y": [...]}}}``. The users
    are the clients; without a ``test`` folder each holds out ``test_share`` of its samples for test. Samples are
    float32 of shape ``shape``, labels int64. All samples are held in memory; the files are parsed one at a time.

    Args:
        root: LEAF's ``data`` directory, or a folder of JSON files.
        shape: Shape of a sample. None: the shape in the files.
        num_classes: Number of classes; labels are 0 to ``num_classes - 1``.
        batch_size: Examples per training batch.
        test_share: Fraction of each client's samples held out for test if there is no ``test`` folder, in [0, 1).
        **kwargs: ``val_share``, ``seed``, ``num_workers`` and ``eval_batch_size``; see :class:`NaturalDataModule`.

    Raises:
        ValueError: If an argument is out of range; on setup, if a file is corrupt or inconsistent.
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
        test_share: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, test_share=test_share, brings_test=True, **kwargs)
        self.root = root
        self.shape = shape
        self.num_classes = num_classes

    def read(self) -> ClientData:
        """Reads the files."""
        root = Path(self.root)
        if (root / "train").is_dir():
            test = self._read_folder(root / "test") if (root / "test").is_dir() else None
            return self._read_folder(root / "train", test)
        return self._read_folder(root / "all_data" if (root / "all_data").is_dir() else root)

    def encode(self, x: Sequence[Any], y: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Converts a user's ``x`` and ``y`` to tensors."""
        samples = torch.from_numpy(np.asarray(x, dtype=np.float32))
        if self.shape is not None:
            samples = samples.reshape(len(x), *self.shape)
        if not samples.isfinite().all():
            raise ValueError("x has NaN or infinite values")
        given = np.asarray(y, dtype=np.float64)
        if (given % 1 != 0).any():
            raise ValueError(f"labels such as {given[given % 1 != 0][0]:g} are not whole numbers")
        labels = torch.from_numpy(given.astype(np.int64))
        if not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels range from {int(labels.min())} to {int(labels.max())}, expected 0 to {self.num_classes - 1}"
            )
        return samples, labels

    def _read_folder(self, folder: Path, test: ClientData | None = None) -> ClientData:
        files = sorted(folder.glob("*.json"))
        if not files:
            raise FileNotFoundError(
                f"{folder} has no .json file; set `root` to LEAF's data directory, which contains train/."
            )
        clients: dict[ClientId, TensorDataset] = {}
        for file in files:
            for user, dataset in self._read_file(file).items():
                if user in clients:
                    raise ValueError(f"User {user!r} is in {file} and in another file of {folder}. {_REMEDY}")
                clients[user] = dataset
        return ClientData(sorted(clients), lambda user: len(clients[user]), clients.__getitem__, test)

    def _read_file(self, file: Path) -> dict[str, TensorDataset]:
        try:
            content = json.loads(file.read_bytes())
            users, counts, data = content["users"], content["num_samples"], content["user_data"]
            if not (isinstance(users, list) and isinstance(counts, list) and isinstance(data, dict)):
                raise TypeError("users and num_samples must be lists and user_data a mapping")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is not a LEAF file or is truncated ({error!r}); expected users, num_samples and user_data. "
                f"{_REMEDY}"
            ) from error
        if len(users) != len(counts):
            raise ValueError(
                f"{file} has {len(users)} users and {len(counts)} entries of num_samples, expected one for each user. "
                f"{_REMEDY}"
            )
        repeated = [user for user, times in Counter(map(str, users)).items() if times > 1]
        if repeated:
            raise ValueError(f"{file} names user {repeated[0]!r} twice. {_REMEDY}")
        found = {}
        for user, count in zip(users, counts, strict=True):
            x, y = _samples_of(data, user)
            if not len(x) == len(y) == count or count == 0:
                raise ValueError(
                    f"User {user!r} of {file} has {len(x)} samples and {len(y)} labels, expected num_samples={count} "
                    f"of each, and at least 1. {_REMEDY}"
                )
            try:
                found[user] = TensorDataset(*self.encode(x, y))
            except (ValueError, RuntimeError, TypeError) as error:
                raise ValueError(f"The samples of user {user!r} in {file} can't be read: {error}. {_REMEDY}") from error
        return found


def _samples_of(data: dict[str, Any], user: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """A user's ``x`` and ``y``; empty where the file has no lists of them."""
    own = data.get(user) if isinstance(user, str) else None
    x, y = (own.get(key) if isinstance(own, dict) else None for key in ("x", "y"))
    return x if isinstance(x, list) else (), y if isinstance(y, list) else ()


class FEMNISTDataModule(LEAFDataModule):
    """FEMNIST: handwritten digits and letters by writer, float32 images of shape ``[1, 28, 28]``, labels 0 to 61.

    ``root`` is LEAF's directory ``data/femnist/data`` after its ``preprocess.sh``. The other arguments are those of
    :class:`LEAFDataModule`. ``HuggingFaceDataModule`` reads the copies of this data set on the Hugging Face hub.

    References:
        Caldas et al., *LEAF: A Benchmark for Federated Settings*, 2018, arXiv:1812.01097. Cohen et al., *EMNIST: an
        Extension of MNIST to Handwritten Letters*, 2017, arXiv:1702.05373.
    """

    def __init__(self, root: str | Path, **kwargs: Any) -> None:
        super().__init__(root, (1, 28, 28), 62, **kwargs)
