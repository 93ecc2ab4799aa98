"""Shakespeare by role: each speaking role of a play is a client, and the next character the label."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_fl.datamodules.datasets.leaf import LEAFDataModule
from lightning_fl.datamodules.natural import ClientData, NaturalDataModule
from lightning_fl.types import ClientId

ALPHABET = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
"""The 80 characters of LEAF; a character has the number of its place, counted from 1, and any other 0."""

VOCABULARY_SIZE = len(ALPHABET) + 1
_SPEAKER = re.compile(r"([A-Z][A-Za-z'\- ]*)\.")
_NO_SPEAKER = re.compile(r"(ACT|SCENE|PERSONS|Persons|[IVXL]+)\b.*")


def encode_text(text: str) -> np.ndarray:
    """The numbers of a text's characters, uint8 of shape ``[len(text)]``."""
    table = np.zeros(256, dtype=np.uint8)
    table[[ord(character) for character in ALPHABET]] = np.arange(1, len(ALPHABET) + 1)
    return table[np.frombuffer(text.encode("latin-1", "replace"), dtype=np.uint8)]


class ShakespeareDataModule(NaturalDataModule):
    """The plays of Shakespeare by role: sequences of characters, and the same one character further as labels.

    The plays are text files, in which a speaker's name and a full stop stand alone on a line before what he or she
    says, as in Project Gutenberg's collected works. A role's lines are cut into windows of ``length`` characters: int64
    ``[length]``, labels of the same shape. Roles with fewer than ``min_windows`` windows are left out.

    Args:
        root: Folder with the plays.
        pattern: Which of its files are plays.
        length: Characters in a sequence.
        min_windows: Smallest number of sequences of a client.
        batch_size: Sequences in a training batch.
        val_share: Share of each role's sequences kept for validation, in [0, 1).
        test_share: Share of each role's sequences kept for test, in [0, 1).
        seed: Seed of the splits.
        num_workers: Worker processes of each loader.
        eval_batch_size: Sequences in a batch of validation, test and prediction. None: the larger of ``batch_size``
            and 256.

    Raises:
        ValueError: If an argument is out of range; on setup, if no file has a role that is long enough.
        FileNotFoundError: On setup, if there are no files.

    References:
        McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, 2017,
        arXiv:1602.05629.
    """

    def __init__(
        self,
        root: str | Path,
        pattern: str = "*.txt",
        length: int = 80,
        min_windows: int = 2,
        batch_size: int = 10,
        val_share: float = 0.0,
        test_share: float = 0.2,
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
        )
        if length < 1 or min_windows < 1:
            raise ValueError(f"length={length} and min_windows={min_windows} must be at least 1.")
        self.root, self.pattern, self.length, self.min_windows = root, pattern, length, min_windows

    def read(self) -> ClientData:
        """Reads the plays; the text stays in memory as one byte a character."""
        files = sorted(Path(self.root).glob(self.pattern))
        if not files:
            raise FileNotFoundError(f"{self.root} has no play: no file fits {self.pattern!r}.")
        roles: dict[ClientId, np.ndarray] = {}
        for file in files:
            lines: dict[str, list[str]] = {}
            for speaker, speech in speeches(file.read_text(encoding="latin-1")):
                lines.setdefault(speaker, []).append(speech)
            for speaker, said in lines.items():
                text = encode_text("\n".join(said))
                if (len(text) - 1) // self.length >= self.min_windows:
                    roles[f"{file.stem}:{speaker}"] = text
        if not roles:
            raise ValueError(
                f"No role in the {len(files)} files of {self.root} has {self.min_windows} sequences of {self.length} "
                "characters. A speaker's name and a full stop must stand alone on a line, after an empty one."
            )
        return ClientData(
            sorted(roles),
            lambda role: (len(roles[role]) - 1) // self.length,
            lambda role: _Windows(torch.from_numpy(roles[role]), self.length),
        )


class LEAFShakespeareDataModule(LEAFDataModule):
    """LEAF's Shakespeare by role: 80 characters, int64 ``[80]``, and the one after them as the label, int64.

    ``root`` is LEAF's directory ``data/shakespeare/data`` after its ``preprocess.sh``. Arguments are those of
    :class:`LEAFDataModule`.

    References:
        Caldas et al., *LEAF: A Benchmark for Federated Settings*, 2018, arXiv:1812.01097.
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
        super().__init__(
            root, None, VOCABULARY_SIZE, batch_size, val_share, test_share, seed, num_workers, eval_batch_size
        )

    def encode(self, x: Sequence[Any], y: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """A role's sequences and labels as numbers of characters."""
        if {len(text) for text in x} != {80} or {len(text) for text in y} != {1}:
            raise ValueError("expected sequences of 80 characters with labels of one")
        sequences = np.stack([encode_text(text) for text in x]).astype(np.int64)
        return torch.from_numpy(sequences), torch.from_numpy(encode_text("".join(y)).astype(np.int64))


def speeches(play: str) -> Iterator[tuple[str, str]]:
    """Who says what in a play: pairs of speaker and speech."""
    speaker: str | None = None
    said: list[str] = []
    after_gap = True
    for line in [*play.splitlines(), "END."]:
        text = line.strip()
        name = _SPEAKER.fullmatch(text) if after_gap or text == "END." else None
        if name:
            if speaker and said:
                yield speaker, "\n".join(said)
            speaker, said = None if _NO_SPEAKER.fullmatch(name[1]) else name[1].upper(), []
        elif text and speaker:
            said.append(text)
        after_gap = not text


class _Windows(Dataset):
    def __init__(self, text: Tensor, length: int) -> None:
        self.text = text
        self.length = length

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        piece = self.text[index * self.length : (index + 1) * self.length + 1].long()
        return piece[:-1], piece[1:]
