from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_fl.datamodules import ShakespeareDataModule
from lightning_fl.datamodules.datasets.shakespeare import ALPHABET, VOCABULARY_SIZE, encode_text, speeches

PLAY = """THE TRAGEDY.

Persons Represented.

ACT I.

SCENE I.

BERNARDO.
Who's there?

FRANCISCO.
Nay, answer me: stand, and unfold yourself.
I mean it.

BERNARDO.
Long live the king!

[Exit.]

ACT II.

Queen.
Peace.
"""


def decode(sequence: torch.Tensor) -> str:
    return "".join(ALPHABET[number - 1] for number in sequence)


def test_speeches_are_found_by_their_speakers() -> None:
    assert list(speeches(PLAY)) == [
        ("BERNARDO", "Who's there?"),
        ("FRANCISCO", "Nay, answer me: stand, and unfold yourself.\nI mean it."),
        ("BERNARDO", "Long live the king!\n[Exit.]"),
        ("QUEEN", "Peace."),
    ]


def test_roles_are_clients_and_the_label_is_the_next_character(tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text(PLAY)
    data = ShakespeareDataModule(tmp_path, length=10, min_windows=3, test_share=0.0)
    data.setup("fit")
    assert data.client_ids == ["play:BERNARDO", "play:FRANCISCO"]
    assert data.num_samples("play:FRANCISCO") == 5
    x, y = data.client_dataset("play:FRANCISCO")[1]
    assert (x.dtype, x.shape, y.shape) == (torch.int64, (10,), (10,))
    assert decode(x) == "r me: stan"
    assert decode(y) == " me: stand"


def test_every_character_has_its_number() -> None:
    assert len(set(ALPHABET)) == 80
    assert VOCABULARY_SIZE == 81
    assert encode_text(ALPHABET).tolist() == list(range(1, 81))
    assert encode_text("é§#").tolist() == [0, 0, 0]


def test_what_has_no_roles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no plays: no file matches '\*\.txt'"):
        ShakespeareDataModule(tmp_path).setup("fit")
    (tmp_path / "sonnet.txt").write_text("Shall I compare thee to a summer's day?\n" * 20)
    with pytest.raises(ValueError, match=r"No role in the 1 files of .* has 2 sequences of 80 characters"):
        ShakespeareDataModule(tmp_path).setup("fit")
    with pytest.raises(ValueError, match="length=0"):
        ShakespeareDataModule(tmp_path, length=0)
