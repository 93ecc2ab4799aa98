from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from lightning_fl.cli import main
from tests.helpers.distributed import run_script

LUNG = Path(__file__).parents[2] / "examples" / "lung.csv"


def answers(words: str) -> list[dict]:
    main(["analyze", str(LUNG), "--client", "inst", "--json", "answers.json", *words.split()])
    return json.loads(Path("answers.json").read_text())["answers"]


def test_answers_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    mean, quantiles, km = answers("--mean age --quantile wt.loss=0.5,0.9 --km time,status --by sex")
    assert mean["parts"]["1"]["mean"] == pytest.approx(63.34057971014493)
    assert quantiles["parts"]["2"]["0.9"] == 28
    assert [km["parts"][sex]["median"] for sex in ("1", "2")] == [270, 426]
    printed = capsys.readouterr().out
    assert "Answers of 19 clients" in printed
    assert "KaplanMeier(time, status) by sex" in printed


def test_every_question_can_be_asked() -> None:
    found = answers(
        "--count --variance age --histogram age=30,50,70,90 --frequency sex --correlation age,time --pca age,time "
        "--t-test age,sex --chi2 sex,status --log-rank time,status,sex --cox time,status,age,sex --at 365 "
        "--heavy-hitters sex --cardinality time --intersection time --km time,status"
    )
    assert len(found) == 14
    assert found[0]["count"] == 228
    km = next(answer for answer in found if answer["question"].startswith("KaplanMeier"))
    assert km["S(365)"]["share"] == pytest.approx(0.4092416, abs=1e-7)


def test_noise_shows_its_epsilon(capsys: pytest.CaptureFixture[str]) -> None:
    answers("--mean age --range age=0,120 --noise 4")
    assert "epsilon at most 0.9" in capsys.readouterr().out


def test_the_ledger_adds_up_over_calls(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--mean age --range age=0,120 --noise 4 --max-epsilon 1.5 --ledger ledger.json"
    answers(words)
    answers(words)
    with pytest.raises(SystemExit):
        answers(words)
    assert "above max_epsilon=1.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "No question was given"),
        ("--cox time,status --at x", "'x' is not a number"),
        ("--t-test age", "--t-test age: expected COLUMN,BY"),
        ("--mean age --delta 1e-6", "add --noise"),
        ("--mean age --range age=1", "needs two numbers"),
        ("--mean age --noise 1", "no declared range"),
        ("--mean age --range age=0,120 --noise 1 --max-epsilon 0.1", "above max_epsilon=0.1"),
        ("--mean age --by sex --secure", "does not declare values of the column 'sex'"),
        ("--mean agee", "There is no column 'agee'"),
    ],
)
def test_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        answers(words)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_one_file_a_silo_under_torchrun(tmp_path: Path) -> None:
    table = pd.read_csv(LUNG)
    for rank in range(3):
        table[rank::3].to_csv(tmp_path / f"silo{rank}.csv", index=False)
        main(["keys", "create", f"keys/silo{rank}"])
    for rank in range(3):
        others = [f"keys/silo{other}/identity.pub" for other in range(3) if other != rank]
        main(["keys", "trust", f"keys/silo{rank}", *others])
    words = ["--secure", "--mean", "age", "--by", "sex=1,2", "--json", "answers.json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    run_script([*torchrun, "-m", "lightning_fl", "analyze", "silo{rank}.csv", *words], cwd=tmp_path, num_processes=4)
    (mean,) = json.loads((tmp_path / "answers.json").read_text())["answers"]
    assert mean["parts"]["2"]["mean"] == pytest.approx(61.077777777777776, rel=1e-12)
