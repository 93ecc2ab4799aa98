"""The states of silos' clients: each silo keeps its own, where it says, and readable by itself only."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_fl as fl
from lightning_fl.clients.state_files import StateFiles
from tests.helpers.training import Plain, image_clients, loader, trainer, weights
from tests.trainer.ranks.test_hooks_and_callbacks import rank


def fit(folder: str, rounds: int, ckpt_path: str | None = None) -> torch.Tensor:
    """Rank 0 alone says where checkpoints go; the folder of the others is their own."""
    own = Path(folder, f"machine{rank()}")
    checkpoints = ModelCheckpoint(Path(folder, "rank0"), filename="last", enable_version_counter=False)
    module = Plain()
    run = trainer("scaffold", rounds, default_root_dir=own, callbacks=[checkpoints], enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory")
        run.fit(module, loader(8, seed=rank()), ckpt_path=ckpt_path)
    return weights(module)


def states(folder: Path) -> set[str]:
    """The clients whose state is below a folder."""
    return {path.parent.name for path in folder.rglob("versions/*/*.safetensors")}


def test_a_silo_writes_where_it_says_itself(run_ranks: Any, tmp_path: Path) -> None:
    at_once = run_ranks(2, fit, str(tmp_path / "at once"), 3)
    run_ranks(2, fit, str(tmp_path), 2)
    assert states(tmp_path / "rank0") == {"0"}
    assert states(tmp_path / "machine1" / "client_states" / "silo1") == {"1"}
    assert not (tmp_path / "machine0").exists() or not states(tmp_path / "machine0")
    resumed = run_ranks(2, fit, str(tmp_path), 3, str(tmp_path / "rank0" / "last.ckpt"))
    for one, other in zip(at_once, resumed, strict=True):
        assert torch.equal(one, other)
    # What no checkpoint needs any more is removed, here as well.
    assert len(list((tmp_path / "machine1").rglob("*.safetensors"))) == 1


def test_client_states_are_readable_by_their_owner_only(run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(2, fit, str(tmp_path), 1)
    for folder in (tmp_path / "rank0" / "client_states", tmp_path / "machine1" / "client_states" / "silo1"):
        below = [folder, *folder.rglob("*")]
        assert {stat.S_IMODE(path.stat().st_mode) for path in below if path.is_dir()} == {0o700}
        assert {stat.S_IMODE(path.stat().st_mode) for path in below if path.is_file()} == {0o600}


def test_a_silo_loads_its_clients_model_from_its_own_folder(tmp_path: Path) -> None:
    run = trainer(fl.FederatedStrategy("fedavg", personal=["net.3.*"]), 1)
    run.fit(Plain(), image_clients())
    run.save_checkpoint(tmp_path / "last.ckpt")
    beside = fl.load_client(tmp_path / "last.ckpt", 1)
    (tmp_path / "client_states").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="holds no state of client 1"):
        fl.load_client(tmp_path / "last.ckpt", 1)
    moved = fl.load_client(tmp_path / "last.ckpt", 1, folder=tmp_path / "elsewhere")
    assert all(torch.equal(beside[name], moved[name]) for name in beside)


@pytest.mark.parametrize("name", ["../../secrets", "/etc/passwd", "", "..", ".hidden"])
def test_a_manifest_has_a_plain_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a plain file name"):
        StateFiles(tmp_path).read_manifest(name)
