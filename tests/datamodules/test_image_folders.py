from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_fl.datamodules import ImageFolderDataModule


def write(root: Path, client: str, label: str, name: str, colour: tuple[int, int, int], size: int = 8) -> None:
    path = root / client / label / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), colour, dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(4):
        write(tmp_path / "photos", "north", "cat", f"{i}.png", (255, 0, 51))
        write(tmp_path / "photos", "south", "dog", f"{i}.jpg", (0, 255, 0), size=20)
    write(tmp_path / "photos", "south", "cat", "9.PNG", (255, 0, 51))
    (tmp_path / "photos" / "south" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def test_folders_are_clients_and_classes(root: Path) -> None:
    data = ImageFolderDataModule(root, image_size=4, test_share=0.0)
    data.setup("fit")
    assert (data.client_ids, data.classes, data.num_classes) == (["north", "south"], ["cat", "dog"], 2)
    x, y = data.client_dataset("north")[0]
    assert (x.shape, x.dtype, y) == ((3, 4, 4), torch.float32, 0)
    assert torch.allclose(x[:, 1, 1], torch.tensor([1.0, 0.0, 0.2]))
    assert sorted(y.tolist() for _, y in data.train_dataloader()["south"])[0].count(1) == 4
    grey = ImageFolderDataModule(root, image_size=4, channels=1, transform=lambda image: image + 1)
    assert grey.client_dataset("north")[0][0].shape == (1, 4, 4)
    assert grey.client_dataset("north")[0][0].min() > 1


def test_images_are_opened_only_when_they_are_needed(root: Path) -> None:
    (root / "north" / "cat" / "0.png").write_bytes(b"no image")
    data = ImageFolderDataModule(root, test_share=0.0)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"0.png is not an image or is corrupt"):
        data.client_dataset("north")[0]


def test_an_image_cut_short_is_refused(root: Path) -> None:
    path = root / "south" / "dog" / "0.jpg"
    path.write_bytes(path.read_bytes()[:300])
    data = ImageFolderDataModule(root, test_share=0.0)
    with pytest.raises(ValueError, match=r"0.jpg is not an image or is corrupt"):
        data.client_dataset("south")[1]


def test_folders_that_are_wrong_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"Client 'south' .* has images of the unknown classes dog"):
        ImageFolderDataModule(root, classes=["cat"]).setup("fit")
    (root / "west" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"Client 'west' .* has no images; expected"):
        ImageFolderDataModule(root).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"has no folders; expected .*CLIENT/CLASS/image.png"):
        ImageFolderDataModule(root / "none").setup("fit")
    with pytest.raises(ValueError, match="channels=2"):
        ImageFolderDataModule(root, channels=2)
