"""Every silo ends with the global model and a record of its own, and goes on from the file that rank 0 has."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_fl as fl
from tests.helpers.training import Plain, loader, trainer, weights

NAMES = ("north", "south")


def fit(root: Path, rounds: int, ckpt_path: str | None = None) -> dict[str, Any]:
    """A fit in a folder of this silo's own, as on a machine of its own."""
    rank = int(os.environ["RANK"])
    home = root / f"machine{rank}"
    home.mkdir(exist_ok=True)
    os.chdir(home)
    saver = ModelCheckpoint("checkpoints", save_last=True)
    module = Plain()
    options = {"enable_checkpointing": True, "default_root_dir": str(home)}
    strategy = fl.FederatedStrategy("scaffold", silo_name=NAMES[rank])
    run = trainer(strategy, rounds, callbacks=[saver, fl.callbacks.RunRecord("run")], **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists")  # that of the first part
        run.fit(module, loader(8, seed=rank), ckpt_path=ckpt_path)
    return {"weights": weights(module), "rounds": [entry["round"] for entry in strategy.history]}


def twice(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = fit(root / "whole", 4)
    fit(root / "parts", 2)
    return whole, fit(root / "parts", 4, "checkpoints/last.ckpt")


def test_every_silo_keeps_the_model_its_state_and_a_record(run_ranks: Any, tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    results = run_ranks(2, twice, tmp_path)
    for whole, resumed in results:
        assert torch.equal(whole["weights"], resumed["weights"])  # bit for bit, with SCAFFOLD's state of each silo
        assert resumed["rounds"] == [0, 1, 2, 3]
    first, second = tmp_path / "parts" / "machine0", tmp_path / "parts" / "machine1"
    assert (first / "checkpoints" / "last.ckpt").is_file()
    assert not list(second.rglob("last.ckpt"))  # rank 0 has sent its own
    assert not (first / "silos").exists()
    own = second / "silos" / "south"
    module = Plain()
    checkpoint = torch.load(own / "model.ckpt", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(weights(module), results[1][1]["weights"])
    facts = json.loads((own / "run.json").read_text(encoding="utf-8"))
    assert facts["status"] == "finished"
    assert facts["settings"]["silos"] == "north, south"
    assert facts["settings"]["silo_name"] == "south"
    assert len(fl.tracking.Run.read(own).rounds) == 4
    assert list((second / "client_states").rglob("*.safetensors"))


def nowhere() -> str:
    try:
        trainer(fl.FederatedStrategy(), 1).fit(Plain(), loader(8), ckpt_path="nowhere.ckpt")
    except FileNotFoundError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("world_size", [2])
def test_a_file_that_no_rank_has_is_the_same_error_on_all(run_ranks: Any, world_size: int) -> None:
    for found in run_ranks(world_size, nowhere):
        assert "nowhere.ckpt" in found
