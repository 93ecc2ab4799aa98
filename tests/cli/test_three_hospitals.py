"""Three hospitals with tables that differ in all ways, each with its own launch, from the wheel in an empty folder."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lightning_fl.datamodules import TableSchema
from tests.helpers.distributed import PATIENCE
from tests.helpers.wheel import environment, run

pytestmark = pytest.mark.slow
PORT = 28763
HOSPITALS = ("north", "east", "south")
ROUNDS = 12
TRAIN = f"""
seed_everything: 0
trainer:
  strategy:
    class_path: FederatedStrategy
    init_args: {{algorithm: fedavg, federation: "https://localhost:{PORT}", kit: kit}}
  max_epochs: {ROUNDS}
  accelerator: cpu
  log_every_n_steps: 1
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: logs, name: study}}
model:
  class_path: TabularMLP
  init_args: {{in_features: 7, num_classes: 2, hidden: [8], lr: 0.05}}
data:
  class_path: TabularDataModule
  init_args: {{path: table.csv, target: ill, schema: schema.json, batch_size: 16, val_share: 0.2, test_share: 0.2}}
"""
FEDERATION = f"""
silos: [{", ".join(HOSPITALS)}]
rounds: {ROUNDS}
min_silos: 3
gather_s: 600
deadline_s: 600
evaluation_s: 600
kit: authority/coordinator
folder: federation
port: {PORT}
admin_port: {PORT + 1}
"""
ANOTHER_VERSION = "import lightning_fl; lightning_fl.__version__ = '0.0.9'; from lightning_fl.cli import main; main()"
SMOKERS = ("no", "ex", "yes")


def write_table(folder: Path, columns: tuple[str, ...], sexes: tuple[str, str], smokers: tuple[str, ...]) -> None:
    draw = random.Random(folder.name)
    rows = [",".join(columns)]
    for _ in range(60):
        age, bmi, sex, smoker = draw.randint(20, 90), draw.randint(18, 40), draw.randrange(2), draw.choice(smokers)
        ill = "yes" if age + bmi + 10 * (smoker == "yes") + draw.randint(-10, 10) > 90 else "no"
        row = {"age": str(age), "bmi": str(bmi), "sex": sexes[sex], "smoker": smoker, "ill": ill}
        rows.append(",".join(row[name] for name in columns))
    (folder / "table.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_schema(folder: Path, sexes: tuple[str, str] = ("f", "m"), classes: tuple[str, str] = ("no", "yes")) -> None:
    categories = {"sex": sexes, "smoker": SMOKERS}
    ranges = {"age": (20.0, 90.0), "bmi": (18.0, 40.0)}
    TableSchema.from_ranges("ill", ranges, categories, classes).save(folder / "schema.json")


def set_up(site: Path) -> dict[str, Path]:
    """The hospitals' folders, each with a kit, the table and the configuration."""
    run(site, "network", "ca", "init", "authority", "--name", "study", "--host", "localhost")
    Path("federation.yaml").write_text(FEDERATION, encoding="utf-8")
    Path("train.yaml").write_text(TRAIN, encoding="utf-8")
    folders = {}
    for name in HOSPITALS:
        folder = folders[name] = Path(name).resolve()
        run(site, "network", "request", name, "--out", str(folder / "kit"))
        run(site, "network", "approve", "authority", str(folder / "kit" / "request.csr"))
        for file in ("cert.pem", "ca.pem"):
            shutil.copy(Path("authority", "issued", name, file), folder / "kit")
        shutil.copy("train.yaml", folder)
        write_schema(folder)
    order = ("age", "bmi", "sex", "smoker", "ill")
    write_table(folders["north"], order, ("f", "m"), SMOKERS)
    write_table(folders["east"], order[::-1], ("f", "m"), SMOKERS)  # the schema names the columns, so it may
    write_table(folders["south"], order, ("f", "m"), ("no", "yes"))  # has no former smokers, and may
    return folders


@contextmanager
def started(site: Path, *words: str, cwd: Path, log: str, code: str | None = None) -> Iterator[subprocess.Popen]:
    """A command in the background, which ends with the block."""
    start = ["-m", "lightning_fl"] if code is None else ["-c", code]
    with (cwd / log).open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, *start, *words],
            cwd=cwd,
            env={**os.environ, **environment(site)},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for(what: Callable[[], bool], logs: list[Path]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        told = "\n".join(f"{log}: {log.read_text(encoding='utf-8')[-2000:]}" for log in logs)
        assert time.monotonic() < end, told
        time.sleep(0.2)


def last_line(path: Path) -> str:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("lightning-fl: error")][
        -1
    ]


def test_three_hospitals(site: Path) -> None:
    folders = set_up(site)
    north, east, south = folders.values()
    here = Path().resolve()
    fit = ("fit", "--config", "train.yaml")
    logs = [here / "coordinator.log", *(folder / "fit.log" for folder in folders.values())]
    with started(
        site,
        "coordinator",
        "--config",
        "train.yaml",
        "--federation",
        "federation.yaml",
        cwd=here,
        log="coordinator.log",
    ) as coordinator:
        wait_for(lambda: "Serving" in logs[0].read_text(encoding="utf-8") or coordinator.poll() is not None, logs[:1])
        with started(site, *fit, cwd=north, log="fit.log") as first:
            wait_for((here / "federation" / "state.json").exists, logs[:2])
            told = refused(site, folders, fit)
            # What is agreed on by then is trained, although hospital south dies in the middle of a round or after it.
            with started(site, *fit, cwd=east, log="fit.log") as second:
                with started(site, *fit, cwd=south, log="fit.log") as third:
                    wait_for(lambda: (here / "federation" / "rounds" / "000003").is_dir(), logs)
                    assert third.poll() is None
                with started(site, *fit, cwd=south, log="fit.log") as third:
                    for process in (first, second, third):
                        assert process.wait(PATIENCE) == 0, [log.read_text(encoding="utf-8")[-2000:] for log in logs]
    assert "lightning_fl" in told["south"]
    check_what_is_left(site, folders)


def refused(site: Path, folders: dict[str, Path], fit: tuple[str, ...]) -> dict[str, str]:
    """What hospitals are told that would train something else: all of it, and before they have trained."""
    east, south = folders["east"], folders["south"]
    write_schema(south, ("0", "1"), ("yes", "no"))
    write_table(south, ("age", "bmi", "sex", "smoker", "ill"), ("0", "1"), ("no", "yes"))
    own = ("--data.schema", "null", "--model.lr", "0.5")  # columns in the order of its own table
    with (
        started(site, *fit, *own, cwd=east, log="refused.log") as other,
        started(site, *fit, cwd=south, log="refused.log", code=ANOTHER_VERSION) as third,
    ):
        assert other.wait(PATIENCE) != 0
        assert third.wait(PATIENCE) != 0
    told = {name: last_line(folders[name] / "refused.log") for name in ("east", "south")}
    assert "'model.lr' is 0.5 on silo east and 0.05 on" in told["east"]
    assert "'features' are in another order: number 1 is bmi on silo east" in told["east"]
    assert "'lightning_fl' is 0.0.9 on silo south" in told["south"]
    assert "'features' on silo south have sex=0, sex=1 and lack sex=f, sex=m" in told["south"]
    assert "'classes' are in another order: number 1 is 'yes' on silo south" in told["south"]
    assert not list(east.rglob("*.ckpt"))
    write_schema(south)
    write_table(south, ("age", "bmi", "sex", "smoker", "ill"), ("f", "m"), ("no", "yes"))
    return told


def check_what_is_left(site: Path, folders: dict[str, Path]) -> None:
    models = []
    for folder in folders.values():
        # The model,
        checkpoint = max(folder.glob("logs/study/*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
        models.append(torch.load(checkpoint, weights_only=True)["state_dict"])
        assert torch.load(checkpoint, weights_only=True)["epoch"] == ROUNDS - 1
        # its own evaluation on its own rows,
        options = ("--trainer.strategy", "auto", "--ckpt_path", str(checkpoint))
        tested = run(site, "test", "--config", "train.yaml", *options, cwd=folder).stdout
        assert "test_acc" in tested
        # and a list of what has left the building.
        left = run(site, "network", "audit", "show", "kit/state/audit.jsonl", cwd=folder).stdout
        assert left.count("change of 4 tensors") >= ROUNDS - 1, left
        run(site, "network", "audit", "verify", "kit/state/audit.jsonl", cwd=folder)
    for model in models[1:]:
        for key, value in model.items():
            torch.testing.assert_close(value, models[0][key])
