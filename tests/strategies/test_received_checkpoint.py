"""A checkpoint's file that comes from another organisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fl.communication import LocalGroup, Message
from lightning_fl.strategies.checkpoint import bytes_of_first_rank


class Second(LocalGroup):
    """The second of two ranks, whose first one has a file of three bytes and says something of it."""

    rank, size = 1, 2

    def __init__(self, told: Any) -> None:
        self.told = told

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        return [Message({"size": self.told}), message]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        assert tensor.shape == (3,)
        return torch.tensor([1, 2, 3], dtype=torch.uint8)


@pytest.mark.parametrize("told", [1 << 60, -2, "3", None, 3.0, True])
def test_a_size_that_cannot_be_is_refused(told: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected whole numbers"):
        bytes_of_first_rank(tmp_path / "last.ckpt", Second(told))


def test_a_file_is_received(tmp_path: Path) -> None:
    assert bytes_of_first_rank(tmp_path / "last.ckpt", Second(3)) == bytes([1, 2, 3])
    assert bytes_of_first_rank(tmp_path / "last.ckpt", Second(-1)) is None
