"""The run's record, and what it shows TensorBoard and W&B, read back from their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_fl as fl
from lightning_fl.callbacks import RunRecord
from lightning_fl.callbacks.run_record import command_line
from lightning_fl.tracking import Run, SiloWandbLogger
from tests.helpers.training import Ordinary, Plain, image_clients, loader, measured, trainer
from tests.helpers.wandb_files import read_offline_runs


def record(strategy: Any = "fedavg", rounds: int = 2, **options: Any) -> tuple[L.Trainer, Run]:
    options.setdefault("logger", CSVLogger(".", name="run", version=0))
    run = trainer(
        strategy, rounds, callbacks=[RunRecord(command="lightning-fl fit"), *options.pop("extra", [])], **options
    )
    run.fit(Ordinary(), image_clients(validate=True))
    return run, Run.read(Path("."))


def test_the_record_holds_history_metrics_settings_and_partition() -> None:
    strategy = fl.FederatedStrategy(fl.algorithms.FedProx(mu=0.5), clients_per_round=2, seed=3)
    run, found = record(strategy)
    assert found.path == Path("run/version_0")
    for row, entry in zip(found.rounds, strategy.history, strict=True):
        assert {key: row[key] for key in entry} == json.loads(json.dumps(entry))
    assert found.rounds[-1]["metrics"] == pytest.approx(measured(run))
    assert {"val_loss", "val_acc", "train_acc", "loss"} <= set(found.metric_names)
    expected = {
        "algorithm": "FedProx(mu=0.5, server_lr=1.0)",
        "algorithm.mu": "0.5",
        "num_clients": "3",
        "clients_per_round": "2",
        "seed": "3",
        "data": "ClientDatasets",
    }
    assert found.settings.items() >= expected.items()
    assert found.partition is not None
    assert found.partition.sizes == [1, 7, 23]
    assert (found.facts["status"], found.facts["command"]) == ("finished", "lightning-fl fit")
    assert found.total("num_steps") == run.global_step


@pytest.mark.parametrize("protected", ["nobody", "clients", "examples"])
def test_label_counts_are_left_out_where_privacy_protects_the_data(protected: str) -> None:
    dp = fl.privacy.ClientLevelDP(clip=0.1, noise_multiplier=1.0)
    callbacks = [fl.callbacks.SampleLevelDP(noise_multiplier=1.0)] if protected == "examples" else []
    strategy = fl.FederatedStrategy("fedavg", transforms=[dp] if protected == "clients" else [])
    trainer(strategy, callbacks=[RunRecord("run"), *callbacks]).fit(Plain(), image_clients())
    partition = Run.read(Path("run")).partition
    assert partition is not None
    assert list(partition.sizes) == [1, 7, 23]
    assert (list(partition.labels) == [], list(partition.counts) == []) == (protected != "nobody",) * 2


class Told(Logger):
    """Keeps the hyper-parameters that it is given."""

    name, version = "told", 0

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.found.update(params)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass


@pytest.mark.parametrize("is_private", [True, False])
def test_how_many_took_part_is_told_only_where_nothing_hides_it(is_private: bool) -> None:
    transforms = [fl.privacy.ClientLevelDP(clip=0.1, noise_multiplier=1.0)] if is_private else []
    # In no round 1.5 of 3 clients take part.
    cohort: Any = {"cohort": fl.clients.Poisson(0.5)} if is_private else {"clients_per_round": 2}
    told = Told()
    strategy = fl.FederatedStrategy("fedavg", transforms=transforms, **cohort)
    run = trainer(strategy, 1, logger=told, callbacks=[RunRecord("run")])
    run.fit(Plain(), image_clients())
    expected = "1.5" if is_private else "2"
    assert Run.read(Path("run")).settings["clients_per_round"] == expected
    assert told.found["fl/clients_per_round"] == float(expected)
    rights = [Path("run", name).stat().st_mode & 0o777 for name in ("rounds.jsonl", "run.json")]
    assert rights == [0o600, rights[1]] if is_private else rights[0] == rights[1] != 0o600


def test_a_centralised_run_is_recorded_to_be_compared() -> None:
    run, found = record("auto")
    assert len(found.rounds) == 2
    assert found.total("num_steps") == run.global_step == 16
    assert (found.settings["strategy"], found.partition) == ("SingleDeviceStrategy", None)


def test_the_record_says_in_which_direction_metrics_get_better() -> None:
    stop = EarlyStopping("val_loss")
    options: dict[str, Any] = {"enable_checkpointing": True}
    _, found = record(extra=[stop, ModelCheckpoint("saved", monitor="val_acc", mode="max")], rounds=1, **options)
    assert found.modes == {"val_loss": "min", "val_acc": "max"}


class Fails(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("the power failed")


def test_a_run_that_fails_keeps_its_rounds_and_says_why() -> None:
    with pytest.raises(RuntimeError, match="the power failed"):
        record(extra=[Fails()])
    found = Run.read("run")
    assert len(found.rounds) == 1
    assert found.facts["status"] == "failed: RuntimeError('the power failed')"


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_run_that_goes_on_has_all_rounds() -> None:
    class Stops(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch + 1 == rounds

    def fit(version: int, ckpt_path: str | None = None) -> Run:
        logger = CSVLogger(".", name="run", version=version)
        callbacks = [RunRecord(), Stops(), ModelCheckpoint(f"checkpoints{version}", filename="last")]
        run = trainer("fedavg", 3, logger=logger, callbacks=callbacks, enable_checkpointing=True)
        run.fit(Ordinary(), image_clients(validate=True), ckpt_path=ckpt_path)
        return Run.read(f"run/version_{version}")

    rounds = 3
    whole = fit(0)
    rounds = 2
    first = fit(1)
    resumed = fit(2, "checkpoints1/last.ckpt")
    assert len(first.rounds) == 2
    assert [row["metrics"] for row in resumed.rounds] == [row["metrics"] for row in whole.rounds]
    times = [row["time"] for row in resumed.rounds]
    assert times == sorted(times)


def test_without_a_logger_it_wants_a_folder() -> None:
    with pytest.raises(MisconfigurationException, match=r"Give the callback a folder, such as fl\.callbacks.RunRecord"):
        record(logger=False)
    trainer("fedavg", callbacks=[RunRecord("here")]).fit(Plain(), image_clients())
    assert len(Run.read("here").rounds) == 1


def test_a_fast_dev_run_leaves_nothing() -> None:
    trainer("fedavg", callbacks=[RunRecord()], logger=True, fast_dev_run=True).fit(Plain(), image_clients())
    assert not list(Path(".").rglob("run.json"))


def test_tensorboard_shows_settings_partition_and_metrics_by_round() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = record(fl.FederatedStrategy("fedavgm", clients_per_round=2), logger=TensorBoardLogger("."))
    events = EventAccumulator(run.log_dir, size_guidance={"tensors": 0}).Reload()
    points = events.Scalars("round/val_acc")
    assert [point.step for point in points] == [1, 2]
    assert points[-1].value == pytest.approx(run.callback_metrics["val_acc"].item())
    text = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "| algorithm | FedAvgM(server_lr=1.0, momentum=0.9, nesterov=False) |" in text["fl/settings/text_summary"]
    assert "| client | examples | 0 | 1 | 2 | 3 |" in text["fl/partition_table/text_summary"]
    assert events.Images("fl/partition")[0].encoded_image_string.startswith(b"\x89PNG")


@pytest.fixture
def quiet_wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    return wandb


@pytest.mark.slow
def test_an_offline_wandb_run_shows_the_same(quiet_wandb: Any) -> None:
    logger = WandbLogger(offline=True, save_dir=".")
    run, found = record(fl.FederatedStrategy(fl.algorithms.FedProx(mu=0.5)), logger=logger)
    assert found.path == Path("lightning_logs", str(logger.version))
    quiet_wandb.finish()
    quiet_wandb.teardown()  # its process writes the file's last part
    (offline,) = read_offline_runs(Path("."))
    assert offline.config["fl/algorithm.mu"] == 0.5
    assert offline.config["fl/num_clients"] == 3
    assert offline.step_metrics["round/*"] == "round/number"
    assert offline.values("round/number") == [1, 2]
    assert offline.values("round/val_acc")[-1] == pytest.approx(run.callback_metrics["val_acc"].item())
    (table,) = Path(".").rglob("fl/partition_table*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["client", "examples", "0", "1", "2", "3"]
    assert [row[:2] for row in content["data"]] == [["0", 1], ["1", 7], ["2", 23]]
    assert len(list(Path(".").rglob("media/images/fl/partition*.png"))) == 1


def fit_silo(directory: str, per_silo: bool) -> None:
    import os

    import wandb

    os.environ.update(WANDB_SILENT="true", WANDB_MODE="offline")
    options: dict[str, Any] = {"offline": True, "save_dir": directory}
    logger = SiloWandbLogger("hospitals", **options) if per_silo else WandbLogger(**options)
    rank = int(os.environ["RANK"])
    callbacks = [RunRecord(), fl.callbacks.ClientMetrics()]
    run = trainer("fedavg", 2, logger=logger, callbacks=callbacks)
    run.fit(Ordinary(), loader(8 * (rank + 1), seed=rank), loader(8, seed=9 + rank))
    if run.is_global_zero or per_silo:
        wandb.finish()
    wandb.teardown()
    for name in ("WANDB_SILENT", "WANDB_MODE", "WANDB_SERVICE"):
        os.environ.pop(name, None)


@pytest.mark.slow
def test_the_federation_has_one_wandb_run_or_each_silo_one_in_a_group(run_ranks: Any, tmp_path: Path) -> None:
    for name, per_silo in (("one", False), ("many", True)):
        (tmp_path / name).mkdir()
        run_ranks(2, fit_silo, str(tmp_path / name), per_silo)
    (one,) = read_offline_runs(tmp_path / "one")
    assert one.values("round/number") == [1, 2]
    assert not any(name.startswith("silo/") for row in one.history for name in row)
    many = sorted(read_offline_runs(tmp_path / "many"), key=lambda run: run.name)
    assert [(run.group, run.name) for run in many] == [("hospitals", "silo-0"), ("hospitals", "silo-1")]
    assert many[0].values("round/val_acc") == many[1].values("round/val_acc") == one.values("round/val_acc")
    losses = [run.values("silo/loss") for run in many]
    assert len(losses[0]) == len(losses[1]) == 2
    assert losses[0] != losses[1]
    partition = Run.read(tmp_path / "one" / "lightning_logs").partition
    assert partition is not None
    assert (list(partition.sizes), list(partition.counts)) == ([8, 16], [])


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}


@pytest.mark.parametrize(
    ("started", "environ", "expected"),
    [
        (["-W", "ignore", "many.py", "--lr", "0.1"], {}, "python -W ignore many.py --lr 0.1"),
        (["-m", "package.train"], {}, "python -m package.train"),
        (["-u", "many.py"], TORCHRUN, "torchrun --standalone --nproc_per_node 2 many.py"),
        (
            ["-u", "many.py", "--lr", "0.1"],
            {**TORCHRUN, "GROUP_WORLD_SIZE": "3", "MASTER_ADDR": "north", "MASTER_PORT": "29500"},
            "torchrun --nnodes 3 --node_rank 1 --master_addr north --master_port 29500 --nproc_per_node 2 "
            "many.py --lr 0.1",
        ),
    ],
    ids=["interpreter options", "module", "torchrun", "several nodes"],
)
def test_the_command_starts_the_run_again(
    started: list[str], environ: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", *started])
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert command_line() == expected
