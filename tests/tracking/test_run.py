from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lightning_fl.tracking import Run
from lightning_fl.tracking.metrics import best_metric, mode_of, mode_of_name
from lightning_fl.tracking.run import as_number, read_rows, to_json, write_file


def write_run(folder: Path, values: list[float], name: str = "val_acc", **settings: str) -> Path:
    facts = {"settings": settings or {"algorithm": "FedAvg(server_lr=1.0)"}, "status": "finished"}
    write_file(folder / "run.json", to_json(facts))
    rows = [{"round": i, "num_steps": 5, "time": i + 1.0, "metrics": {name: value}} for i, value in enumerate(values)]
    write_file(folder / "rounds.jsonl", "".join(to_json(row) + "\n" for row in rows))
    return folder


def test_a_run_is_read_as_it_was_written() -> None:
    run = Run.read(write_run(Path("logs/a/version_0"), [0.5, math.nan, 0.75]))
    rounds, values = run.metric("val_acc")
    assert rounds == [1, 2, 3]
    assert values[0] == 0.5
    assert math.isnan(values[1])
    assert (run.name, run.algorithm, run.seconds, run.total("num_steps")) == (
        "a/version_0",
        "FedAvg(server_lr=1.0)",
        3,
        15,
    )
    assert run.total("num_bytes") is None


def test_a_folder_of_runs_gives_the_last() -> None:
    write_run(Path("logs/a/version_0"), [0.5])
    last = write_run(Path("logs/a/version_1"), [0.6])
    import os

    os.utime(last / "run.json", (2e9, 2e9))
    assert Run.read("logs").path == last


@pytest.mark.parametrize("path", ["logs", "nowhere"])
def test_a_folder_without_a_run_is_refused(path: str) -> None:
    Path("logs").mkdir()
    with pytest.raises(ValueError, match=r"Give the folder of a run, such as logs/NAME/version_0"):
        Run.read(path)


def test_a_last_line_that_was_cut_off_is_left_out() -> None:
    folder = write_run(Path("run"), [0.5, 0.6])
    rounds = folder / "rounds.jsonl"
    rounds.write_text(rounds.read_text() + '{"round": 2, "met')
    assert len(Run.read(folder).rounds) == 2


@pytest.mark.parametrize("damaged", ["{nonsense\n", "[1, 2]\n"])
def test_damage_before_the_last_line_is_named(damaged: str) -> None:
    rows = Path("rounds.jsonl")
    rows.write_text('{"round": 0}\n' + damaged + '{"round": 2}\n')
    with pytest.raises(ValueError, match="line 2, is corrupt"):
        read_rows(rows)


def test_a_damaged_run_file_is_named() -> None:
    folder = write_run(Path("run"), [0.5])
    (folder / "run.json").write_text('["no", "object"]')
    with pytest.raises(ValueError, match=r"run\.json is corrupt: found a list, expected an object"):
        Run.read(folder)


def test_json_has_no_numbers_that_other_readers_refuse() -> None:
    text = to_json({"a": [math.inf, math.nan, 1.5], 3: True})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, None, 1.5], "3": True}


def test_texts_become_numbers_where_they_are() -> None:
    assert [as_number(text) for text in ("3", "0.5", "True", "", "fedavg")] == [3, 0.5, True, None, "fedavg"]


def test_the_metric_to_look_at() -> None:
    runs = [Run.read(write_run(Path(name), [1.0], name)) for name in ("val_loss", "train_acc")]
    assert best_metric(runs[:1]) == "val_loss"
    with pytest.raises(ValueError, match="no metric in common"):
        best_metric(runs)
    run = Run(Path("x"), {}, [{"round": 0, "metrics": {"train_acc": 1.0, "val_loss": 1.0, "val_acc": 1.0}}])
    assert best_metric([run]) == "val_acc"


BY_NAME = {
    "max": "val_acc train_accuracy val_MulticlassF1Score MulticlassAUROC val_mcc val_kappa val_mAP val_mAP@50 IoU "
    "val_mIoU val_ssim val_cindex c-index val_specificity val_ndcg@10 recall@5 val_reward val_top5 R2Score val_auc "
    "personalized/val_dice val_exact_match val_preferred",
    "min": "val_loss loss train_loss_epoch val_dice_loss soft-iou-loss val_brier_score fid_score MeanSquaredError "
    "val_mae top5_error val_perplexity negative_log_likelihood hd95 val_ece clients/loss_mean accuracy_error valLoss",
    None: "val_remap val_place val_x acc_gap val_acc_std neg_mean_squared_error accident diceware",
}


def test_the_direction_of_a_metric_is_read_from_whole_words() -> None:
    names = {name: mode for mode, text in BY_NAME.items() for name in text.split()}
    assert {name: mode_of_name(name) for name in names} == names


def test_what_a_run_declares_comes_before_the_name() -> None:
    run = Run(Path("x"), {"modes": {"val_acc": "min", "val_x": "max"}}, [])
    other = Run(Path("y"), {"modes": {"val_acc": "max"}}, [])
    assert [mode_of(name, [run]) for name in ("val_acc", "val_x", "personalized/val_x")] == ["min", "max", "max"]
    assert mode_of("val_acc", [run, other]) == "max"  # they disagree, so the name decides
