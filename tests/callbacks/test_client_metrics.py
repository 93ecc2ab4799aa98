"""What each client did: against closed forms, and the same on any number of ranks."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_fl as fl
from lightning_fl.callbacks import ClientMetrics
from lightning_fl.tracking.run import Row, read_clients
from tests.helpers.training import Plain, Quadratic, image_clients, quadratic_clients, trainer

SECONDS = ("seconds", "rank")


def rows(strategy: Any, module: L.LightningModule, data: Any, rounds: int = 1, **options: Any) -> list[Row]:
    callbacks = [ClientMetrics("run"), *options.pop("callbacks", [])]
    trainer(strategy, rounds, callbacks=callbacks, **options).fit(module, data)
    return read_clients(Path("run"))


@pytest.mark.parametrize("algorithm", ["fedavg", "fednova", "scaffold"])
def test_drift_is_how_far_a_client_moves_the_model_whatever_it_sends(algorithm: str) -> None:
    found = rows(fl.FederatedStrategy(algorithm, local_steps=2), Quadratic(start=10.0), quadratic_clients())
    for row, center, steepness in zip(found, (0.0, 1.0, 4.0), (1.0, 2.0, 0.5), strict=True):
        gap = 10.0 - center
        assert row["drift"] == pytest.approx(gap - gap * (1 - 0.1 * steepness) ** 2, rel=1e-6)
        first, second = (0.5 * steepness * (gap * (1 - 0.1 * steepness) ** step) ** 2 for step in (0, 1))
        assert row["loss"] == pytest.approx((first + second) / 2, rel=1e-6)
    assert [row["num_examples"] for row in found] == [1, 2, 1]
    assert {row["num_steps"] for row in found} == {2}
    assert all(row["seconds"] > 0 for row in found)


class Logs(Plain):
    """Logs numbers of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("doubled", 2 * loss.detach(), on_step=False, on_epoch=True, batch_size=len(batch[0]))
        self.log("by_step", 3 * loss.detach())
        self.log("most", float(batch_idx), on_step=False, on_epoch=True, reduce_fx="max")
        return loss


def test_logged_numbers_are_the_clients_own() -> None:
    found = rows("fedavg", Logs(), image_clients((4, 10)), rounds=2)
    assert [(row["round"], row["client"]) for row in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for row in found:
        assert row["doubled"] == pytest.approx(2 * row["loss"], rel=1e-5)
        assert row["by_step"] == pytest.approx(3 * row["loss"], rel=1e-5)
        assert row["most"] == row["num_steps"] - 1


def test_the_loggers_get_mean_variance_and_the_worst() -> None:
    logger = CSVLogger(".", name="", version="")
    sizes = tuple(range(1, 21))
    callbacks = [ClientMetrics(names=["doubled"])]
    trainer("fedavg", 1, logger=logger, callbacks=callbacks).fit(Logs(), image_clients(sizes))
    found = read_clients(Path(logger.log_dir))
    losses = torch.tensor([row["loss"] for row in found], dtype=torch.float64)
    import csv

    with Path(logger.log_dir, "metrics.csv").open() as file:
        logged = next(row for row in csv.DictReader(file) if row.get("clients/loss_mean"))
    assert float(logged["clients/loss_mean"]) == pytest.approx(losses.mean().item())
    assert float(logged["clients/loss_variance"]) == pytest.approx(losses.var(correction=0).item())
    assert float(logged["clients/loss_worst_decile"]) == pytest.approx(losses.sort().values[-2:].mean().item())
    assert float(logged["clients/doubled_highest_decile"]) == pytest.approx(2 * losses.sort().values[-2:].mean().item())
    assert float(logged["clients/doubled_lowest_decile"]) == pytest.approx(2 * losses.sort().values[:2].mean().item())
    assert "clients/doubled_worst_decile" not in logged  # whether less is worse is not known
    assert float(logged["clients/doubled_mean"]) == pytest.approx(2 * losses.mean().item(), rel=1e-5)


class Diverges(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if len(batch[0]) == 3 else loss


@pytest.mark.filterwarnings("ignore:.*hold NaN or Inf and were left out")
def test_a_refused_client_is_marked() -> None:
    found = rows("fedavg", Diverges(), image_clients((3, 4)))
    assert [row["refused"] for row in found] == [True, False]
    assert found[0]["loss"] is None


def test_without_pyarrow_the_table_is_csv(monkeypatch: pytest.MonkeyPatch) -> None:
    with_pyarrow = rows("fedavg", Plain(), image_clients((4, 8)))
    assert Path("run/clients.parquet").exists()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    without = rows("fedavg", Plain(), image_clients((4, 8)))
    assert [path.name for path in Path("run").iterdir()] == ["clients.csv"]
    for row, expected in zip(without, with_pyarrow, strict=True):
        for name in expected.keys() - set(SECONDS):
            assert row[name] == pytest.approx(expected[name]), name


class Fails(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("the power failed")


def test_a_run_that_is_cut_off_loses_no_finished_round() -> None:
    with pytest.raises(RuntimeError, match="the power failed"):
        rows("fedavg", Plain(), image_clients((4, 8)), rounds=3, callbacks=[Fails()])
    assert Path("run/clients.jsonl").exists()
    assert [row["round"] for row in read_clients(Path("run"))] == [0, 0, 1, 1]


def test_a_strategy_without_clients_has_nothing_to_record() -> None:
    callbacks = [ClientMetrics("run")]
    trainer("auto", 1, callbacks=callbacks).fit(Plain(), image_clients((8,)))
    assert not Path("run").exists()


def on_ranks(directory: str) -> None:
    callbacks = [ClientMetrics(directory)]
    strategy = fl.FederatedStrategy(clients_per_round=3, seed=1)
    trainer(strategy, 2, callbacks=callbacks).fit(Plain(), image_clients((1, 7, 23, 4, 9)))


def test_the_ranks_rows_come_together_on_the_first(run_ranks: Any, tmp_path: Path) -> None:
    on_ranks(str(tmp_path / "alone"))
    run_ranks(2, on_ranks, str(tmp_path / "two"))
    alone, two = (
        sorted(read_clients(tmp_path / name), key=lambda row: (row["round"], row["client"]))
        for name in ("alone", "two")
    )
    assert {row["rank"] for row in two} == {0, 1}
    for row, expected in zip(two, alone, strict=True):
        for name in expected.keys() - set(SECONDS):
            assert row[name] == pytest.approx(expected[name], rel=1e-9), name


def test_names_of_clients_are_texts_when_one_is() -> None:
    data = fl.datamodules.ClientDatasets({"north": image_clients()._train[1], 7: image_clients()._train[2]})
    found = rows("fedavg", Plain(), data)
    assert sorted(row["client"] for row in found) == ["7", "north"]
    json.dumps(found)


@pytest.mark.slow
def test_the_table_keeps_what_the_rows_say_and_needs_no_pandas() -> None:
    rows = [
        {"client": "2026-01-01", "round": 0, "loss": 1, "refused": True, "note": None},
        {"client": "2026-01-02T10:00:00", "round": 1, "loss": 0.1, "refused": False, "norm": 1e-30},
    ]
    program = (
        "import sys; from pathlib import Path; from lightning_fl.callbacks import client_metrics as table; "
        "from lightning_fl.tracking.run import append_rows, read_clients; "
        f"append_rows(Path('clients.jsonl'), {rows!r}); table.write_table(Path()); read = read_clients(Path()); "
        "assert not Path('clients.jsonl').exists(); print(read); assert 'pandas' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole = {"client": None, "round": None, "loss": None, "refused": None, "note": None, "norm": None}
    assert ast.literal_eval(done.stdout) == [whole | row for row in rows]


def test_without_a_logger_there_is_no_table_and_a_warning_says_so() -> None:
    with pytest.warns(UserWarning, match="ClientMetrics writes no table, because the Trainer has no logger"):
        trainer("fedavg", 1, callbacks=[ClientMetrics()]).fit(Plain(), image_clients((4, 8)))
    assert not list(Path().rglob("clients.*"))
