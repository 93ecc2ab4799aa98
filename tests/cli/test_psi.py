from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

from lightning_fl.cli import main
from tests.helpers.distributed import run_script


@pytest.mark.slow
def test_tables_are_aligned_under_torchrun(tmp_path: Path) -> None:
    for rank in range(3):
        ids = [f"p{number}" for number in range(rank, 30, rank + 1)]
        pd.DataFrame({"patient": ids, f"x{rank}": range(len(ids))}).to_csv(tmp_path / f"party{rank}.csv", index=False)
    words = "-m torch.distributed.run --standalone --nproc_per_node 3 -m lightning_fl psi party{rank}.csv --id patient"
    output = run_script(
        [sys.executable, *words.split(), "--out", "aligned{rank}.csv"], cwd=tmp_path, num_processes=4
    ).stdout
    tables = [pd.read_csv(tmp_path / f"aligned{rank}.csv") for rank in range(3)]
    expected = set(range(30)) & set(range(1, 30, 2)) & set(range(2, 30, 3))
    assert f"{len(expected)} ids are shared by 3 parties" in output
    assert set(tables[0].patient) == {f"p{number}" for number in expected}
    assert all(tables[0].patient.equals(table.patient) for table in tables)


def test_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pd.DataFrame({"id": [1, 2]}).to_csv("party.csv", index=False)
    for words, message in (("", "Give either --out"), ("--cardinality", "needs at least two parties")):
        with pytest.raises(SystemExit):
            main(["psi", "party.csv", "--id", "id", *words.split()])
        assert message in capsys.readouterr().err
