"""MNIST and Fashion-MNIST from IDX files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightning_fl.datamodules.datasets.idx import read_idx
from lightning_fl.datamodules.download import RemoteFile
from lightning_fl.datamodules.image_files import ImageFilesDataModule

_NAMES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


class MNISTDataModule(ImageFilesDataModule):
    """MNIST: 60,000 + 10,000 handwritten digits, float32 images of shape ``[1, 28, 28]``, labels 0 to 9.

    The files are ``train-images-idx3-ubyte`` and its three companions, gzipped or not, 11.6 MB in all. Without ``root``
    they are looked for in the folders ``mnist`` and ``MNIST/raw`` of ``$LIGHTNING_FL_DATA`` and of ``data``.

    Args:
        root: Folder with the files. None: the first of the default folders that has them.
        download: Whether to download the files if they are missing.
        scaling: ``"unit"``: pixels in [0, 1]. ``"channel"``: mean 0 and variance 1 over the pixels of the training
            data. ``"pixel"``: mean 0 and variance 1 per pixel of the training data.
        transform: Applied to each float32 image of the training data, such as an augmentation.
        **kwargs: ``batch_size``, ``val_share``, ``seed``, ``num_workers`` and ``eval_batch_size``; see
            :class:`CentralDataModule`.

    Raises:
        ValueError: If an argument is out of range; on setup, if a file is corrupt or truncated.
        FileNotFoundError: On setup, if the files are missing.

    References:
        LeCun, Bottou, Bengio, Haffner, *Gradient-Based Learning Applied to Document Recognition*, 1998.
    """

    title = "MNIST"
    folders = ("mnist", "MNIST/raw")
    num_classes = 10
    files = tuple(
        RemoteFile(f"{name}.gz", f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}.gz", size, sha256)
        for name, (size, sha256) in zip(
            _NAMES,
            (
                (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
                (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
                (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
                (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
            ),
            strict=True,
        )
    )

    def has_files(self, folder: Path) -> bool:
        """Whether a folder has all four files."""
        return all(_path(folder, name).exists() for name in _NAMES)

    def read_files(self, folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """See :meth:`ImageFilesDataModule.read_files`."""
        arrays = [torch.from_numpy(read_idx(_path(folder, name))) for name in _NAMES]
        for name, array, num_axes in zip(_NAMES, arrays, (3, 1, 3, 1), strict=True):
            if array.ndim != num_axes:
                raise ValueError(
                    f"{_path(folder, name)} has {array.ndim} axes, expected {num_axes}. Download it again."
                )
        images, labels, test_images, test_labels = arrays
        return (images.unsqueeze(1), labels.long()), (test_images.unsqueeze(1), test_labels.long())


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST: 60,000 + 10,000 articles of clothing, float32 images of shape ``[1, 28, 28]``, labels 0 to 9.

    The arguments and the names of the files are those of :class:`MNISTDataModule`; the files have 30.9 MB in all.
    Without ``root`` they are looked for in the folders ``fashion-mnist`` and ``FashionMNIST/raw`` of
    ``$LIGHTNING_FL_DATA`` and of ``data``, and where Debian's package ``dataset-fashion-mnist`` installs them.

    References:
        Xiao, Rasul, Vollgraf, *Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms*,
        2017, arXiv:1708.07747.
    """

    title = "Fashion-MNIST"
    folders = ("fashion-mnist", "FashionMNIST/raw")
    system_folder = "/usr/share/datasets/fashion-mnist"
    files = tuple(
        RemoteFile(f"{name}.gz", f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{name}.gz", size, sha256)
        for name, (size, sha256) in zip(
            _NAMES,
            (
                (26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
                (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
                (4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
                (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
            ),
            strict=True,
        )
    )


def _path(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).exists() else folder / f"{name}.gz"
