"""Shakespeare by role: each speaking role of a play is a client, the label is the next character."""

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
"""LEAF's 80 characters. A character is encoded as its position, counted from 1; unknown characters are 0."""

VOCABULARY_SIZE = len(ALPHABET) + 1
_SPEAKER = re.compile(r"([A-Z][A-Za-z'\- ]*)\.")
_NO_SPEAKER = re.compile(r"(ACT|SCENE|PERSONS|Persons|[IVXL]+)\b.*")


def encode_text(text: str) -> np.ndarray:
    """Encodes a text by :data:`ALPHABET`, as uint8 of shape ``[len(text)]``."""
    table = np.zeros(256, dtype=np.uint8)
    table[[ord(character) for character in ALPHABET]] = np.arange(1, len(ALPHABET) + 1)
    return table[np.frombuffer(text.encode("latin-1", "replace"), dtype=np.uint8)]


class ShakespeareDataModule(NaturalDataModule):
    """Shakespeare's plays by role: sequences of characters; the label is the sequence shifted by one character.

    The plays are text files in which the speaker's name, followed by a full stop, is alone on the line before a speech,
    as in Project Gutenberg's collected works. A role's speeches are cut into windows of ``length`` characters: int64 of
    shape ``[length]``, with labels of the same shape. Roles with fewer than ``min_windows`` windows are left out.

    Args:
        root: Folder with the plays.
        pattern: Glob pattern of the plays within ``root``.
        length: Characters per sequence.
        min_windows: Minimum number of sequences per client.
        batch_size: Sequences per training batch.
        **kwargs: ``val_share``, ``test_share``, ``seed``, ``num_workers`` and ``eval_batch_size``; see
            :class:`NaturalDataModule`.

    Raises:
        ValueError: If an argument is out of range; on setup, if no role is long enough.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        if length < 1 or min_windows < 1:
            raise ValueError(f"length={length} and min_windows={min_windows} must be at least 1.")
        self.root, self.pattern, self.length, self.min_windows = root, pattern, length, min_windows

    def read(self) -> ClientData:
        """Reads the plays; the text stays in memory as one byte per character."""
        files = sorted(Path(self.root).glob(self.pattern))
        if not files:
            raise FileNotFoundError(
                f"{self.root} has no plays: no file matches {self.pattern!r}. Set `root` to their folder."
            )
        roles: dict[ClientId, np.ndarray] = {}
        for file in files:
            lines: dict[str, list[str]] = {}
            for speaker, speech in speeches(file.read_text(encoding="latin-1")):
                lines.setdefault(speaker, []).append(speech)
            for speaker, spoken in lines.items():
                text = encode_text("\n".join(spoken))
                if (len(text) - 1) // self.length >= self.min_windows:
                    roles[f"{file.stem}:{speaker}"] = text
        if not roles:
            raise ValueError(
                f"No role in the {len(files)} files of {self.root} has {self.min_windows} sequences of {self.length} "
                "characters. The speaker's name and a full stop must be alone on a line, after an empty line."
            )
        return ClientData(
            sorted(roles),
            lambda role: (len(roles[role]) - 1) // self.length,
            lambda role: _Windows(torch.from_numpy(roles[role]), self.length),
        )


class LEAFShakespeareDataModule(LEAFDataModule):
    """LEAF's Shakespeare by role: 80 characters, int64 of shape ``[80]``, labelled with the next character, int64.

    ``root`` is LEAF's directory ``data/shakespeare/data`` after its ``preprocess.sh``. The other arguments are those of
    :class:`LEAFDataModule`.

    References:
        Caldas et al., *LEAF: A Benchmark for Federated Settings*, 2018, arXiv:1812.01097.
    """

    def __init__(self, root: str | Path, **kwargs: Any) -> None:
        super().__init__(root, None, VOCABULARY_SIZE, **kwargs)

    def encode(self, x: Sequence[Any], y: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Encodes a role's sequences and labels by :data:`ALPHABET`."""
        if {len(text) for text in x} != {80} or {len(text) for text in y} != {1}:
            raise ValueError("expected sequences of 80 characters, each with a label of one character")
        sequences = np.stack([encode_text(text) for text in x]).astype(np.int64)
        return torch.from_numpy(sequences), torch.from_numpy(encode_text("".join(y)).astype(np.int64))


def speeches(play: str) -> Iterator[tuple[str, str]]:
    """Yields the speeches of a play as pairs of speaker and text."""
    speaker: str | None = None
    lines: list[str] = []
    after_gap = True
    for line in [*play.splitlines(), "END."]:  # a last "speaker" ends the last speech
        text = line.strip()
        name = _SPEAKER.fullmatch(text) if after_gap or text == "END." else None
        if name:
            if speaker and lines:
                yield speaker, "\n".join(lines)
            # stage headings look like speakers
            speaker, lines = None if _NO_SPEAKER.fullmatch(name[1]) else name[1].upper(), []
        elif text and speaker:
            lines.append(text)
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
