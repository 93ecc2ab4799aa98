"""Client ids become plain numbers and strings, or are refused before anything is trained."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import lightning_fl as fl
from lightning_fl.clients.state_files import folder_name
from tests.helpers.training import WithOwn, trainer, weights


class Number(enum.IntEnum):
    NORTH = 3


class Name(str, enum.Enum):
    NORTH = "north"


class Colour(enum.Enum):
    RED = 1


SEVERAL = UUID(int=7)
ACCEPTED: list[tuple[Any, int | str]] = [
    (np.int64(3), 3),
    (np.uint8(3), 3),
    (np.str_("north"), "north"),
    (SEVERAL, str(SEVERAL)),
    (Number.NORTH, 3),
    (Name.NORTH, "north"),
    (2**70, 2**70),
    (r"price $\frac{1}{0$", r"price $\frac{1}{0$"),
    ("a/../b\x00\n", "a/../b\x00\n"),
    ("\u5317\u4eac\u5e02" * 40, "\u5317\u4eac\u5e02" * 40),
    ("x" * 400, "x" * 400),
    ("", ""),
]


def _clients(first: Any) -> fl.datamodules.ClientDatasets:
    def data(e: float) -> TensorDataset:
        return TensorDataset(torch.full((2,), e, dtype=torch.float64), torch.ones(2, dtype=torch.float64))

    return fl.datamodules.ClientDatasets({first: data(0.0), "other": data(1.0)}, batch_size=None)


def _train(folder: Path, client: Any, rounds: int, checkpoint: Any = None) -> torch.Tensor:
    module = WithOwn()
    strategy = fl.FederatedStrategy("fedavg", personal=["own"], client_optimizer="keep")
    own = trainer(strategy, rounds, default_root_dir=folder)
    own.fit(module, _clients(client), ckpt_path=checkpoint)
    own.save_checkpoint(folder / f"{rounds}.ckpt")
    return weights(module)


@pytest.mark.parametrize(("given", "plain"), ACCEPTED, ids=[repr(plain)[:20] for _, plain in ACCEPTED])
@pytest.mark.spread(4)
def test_resume_and_load_client_know_every_id_that_is_accepted(tmp_path: Path, given: Any, plain: int | str) -> None:
    expected = _train(tmp_path, plain, 2)
    _train(tmp_path, given, 1)
    resumed = _train(tmp_path, given, 2, tmp_path / "1.ckpt")
    assert torch.equal(resumed, expected)
    torch.load(tmp_path / "2.ckpt", weights_only=True)
    for name in (given, plain):
        assert fl.load_client(tmp_path / "2.ckpt", name)["own"] < 10


@pytest.mark.parametrize("client", [(1, 2), None, Colour.RED, 1.5, b"north", True, "\udcff"], ids=repr)
def test_others_are_refused_in_one_sentence_before_training(client: Any) -> None:
    with pytest.raises(ValueError, match="client id"):
        _clients(client)
    with pytest.raises(ValueError, match="client id"):
        fl.datamodules.ClientLoaders({client: [], "other": []})


def test_ids_that_become_equal_are_refused() -> None:
    with pytest.raises(ValueError, match="unique"):
        fl.datamodules.ClientLoaders([SEVERAL, str(SEVERAL)], lambda client: [])


def test_the_users_functions_get_the_ids_as_they_were_given() -> None:
    seen: list[Any] = []
    loaders = fl.datamodules.ClientLoaders(
        [SEVERAL], lambda client: seen.append(client) or [], num_examples={SEVERAL: 3}
    )
    assert list(loaders) == [str(SEVERAL)]
    assert loaders[str(SEVERAL)] == []
    assert seen == [SEVERAL]
    assert loaders.num_examples(str(SEVERAL)) == 3


@pytest.mark.parametrize("name", ["\u5317" * 200, "x" * 400, "a/b", "..", "CON", "a\"'\\"])
def test_folders_of_clients_are_short_and_ascii(name: str) -> None:
    folder = folder_name(name)
    assert folder.isascii()
    assert len(folder) < 120
    assert "/" not in folder
    assert folder != folder_name(name + "!")


def test_the_folders_of_earlier_checkpoints_keep_their_names() -> None:
    assert folder_name("north") == "%27north%27"
    assert folder_name(12) == "12"


def ids_on_ranks(folder: str) -> list[float]:
    module = WithOwn()
    strategy = fl.FederatedStrategy("fedavg", personal=["own"], client_optimizer="keep", num_clients=None)
    own = trainer(strategy, 1, default_root_dir=folder)
    own.fit(module, _clients(np.int64(3)))
    own.save_checkpoint(Path(folder) / "1.ckpt")
    return weights(module).tolist()


def test_two_ranks_agree_on_them(run_ranks: Any, tmp_path: Path) -> None:
    (alone,) = run_ranks(1, ids_on_ranks, str(tmp_path))
    first, second = run_ranks(2, ids_on_ranks, str(tmp_path))
    assert first == second == pytest.approx(alone)
    torch.load(tmp_path / "1.ckpt", weights_only=True)
