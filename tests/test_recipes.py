from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lightning_fl.cli import FederatedCLI, recipes_directory
from lightning_fl.models import CausalLM
from lightning_fl.privacy.secagg.keys import KeyFolder
from tests.helpers.data_files import write_mnist
from tests.helpers.distributed import run_script

RECIPES = sorted(recipes_directory().glob("*.yaml"))
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
TOLERANCE = 0.015  # 5 of the 360 test digits: processors round differently


def header(recipe: Path) -> str:
    lines = recipe.read_text().splitlines()
    return "\n".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def expected_accuracies(name: str) -> tuple[float, float]:
    """The accuracies that a recipe's header names: the federated one and the centralised one."""
    found = re.search(r"expected: val_\w+ (0\.\d+) .*centralised .* (0\.\d+)", header(recipes_directory() / name))
    assert found, f"{name} has no line 'expected: val_acc 0.xx ..., centralised ... 0.xx'"
    return float(found[1]), float(found[2])


def final_accuracy(name: str, *options: str) -> float:
    sys.argv = ["lightning-fl"]
    trainer = FederatedCLI(["fit", "--config", str(recipes_directory() / name), *QUIET, *options]).trainer
    return trainer.callback_metrics[metric_of(name)].item()


def metric_of(name: str) -> str:
    """The metric that a recipe's header names."""
    found = re.search(r"^expected: (?:personalized/)?(\w+) ", header(recipes_directory() / name), re.MULTILINE)
    assert found, f"{name} has no line 'expected: METRIC ...'"
    return found[1]


@pytest.fixture(autouse=True)
def keep_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_header_holds_what_it_promises(recipe: Path) -> None:
    command = rf"^(lightning-fl|torchrun .* -m lightning_fl) fit --config recipes/{recipe.name}$"
    for line in (command, r"^expected: .*\d", r"^time: .*on 2 cores$"):
        assert re.search(line, header(recipe), re.MULTILINE)
    assert yaml.safe_load(recipe.read_text())["seed_everything"] == 0


def write_small_data(folder: Path) -> None:
    """Stands in for the data that recipes need files for."""
    shutil.copytree(Path(__file__).parents[1] / "examples", folder / "examples")
    write_mnist(folder / "data" / "fashion-mnist", num_train=11_000, num_test=10, zipped=False)
    rows = [f"{i % 12},{i % 24},EWR,{i},{i - 50.5},{'AA' if i % 3 else 'UA'},{i % 5 == 0}" for i in range(300)]
    rows += ["1,2,JFK,3,4,UA,True", "1,2,LGA,3,4,UA,False"] * 10
    (folder / "data" / "flights.csv").write_text(
        "\n".join(["month,hour,origin,distance,dep_delay,carrier,late", *rows])
    )
    (folder / "data" / "shakespeare").mkdir()
    # Two leading roles have much to say.
    spoken = ["To be, or not to be. " * (700 if i % 10 < 2 else 50) for i in range(20)]
    lines = "\n\n".join(f"ROLE {'ABCDEFGHIJ'[i % 10]}.\n{text}" for i, text in enumerate(spoken))
    for play in ("a_play", "play"):
        (folder / "data" / "shakespeare" / f"{play}.txt").write_text(lines)
    asked = [{"client": str(i % 3), "instruction": f"next {i}", "response": str(i + 1)} for i in range(60)]
    (folder / "data" / "instructions").mkdir()
    for file in ("base", "clients"):
        (folder / "data" / "instructions" / f"{file}.jsonl").write_text("\n".join(map(json.dumps, asked)))


def write_base(folder: Path, recipe: str) -> None:
    """The base that a recipe of adapters expects, with random weights."""
    model = yaml.safe_load((recipes_directory() / recipe).read_text())["model"].get("init_args", {})
    if "base" in model:
        path = folder / model["base"]
        path.parent.mkdir(parents=True)
        torch.save({"state_dict": CausalLM(config=model["config"]).state_dict()}, path)


def is_language(recipe: Path) -> bool:
    return "CausalLM" in recipe.read_text()


QUICK = [
    pytest.param(recipe.name, marks=[pytest.mark.slow] if is_language(recipe) else [])
    for recipe in RECIPES
    if "torchrun" not in header(recipe) and recipe.name != "digits_fedavg.yaml"
]


@pytest.mark.parametrize(
    "name",
    # MLflow takes 10 seconds to make its database.
    [pytest.param(name, marks=pytest.mark.slow) if name == "digits_mlflow.yaml" else name for name in QUICK],
)
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
@pytest.mark.spread(5)
def test_every_recipe_runs_for_a_round_on_data_of_its_kind(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # MLflow sets it
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    write_small_data(tmp_path)
    write_base(tmp_path, name)
    brief = ("max_epochs=1", "limit_train_batches=1", "limit_val_batches=1", "check_val_every_n_epoch=1")
    options = [f"--trainer.{option}" for option in brief]
    top = math.inf if metric_of(name) in ("val_perplexity", "val_distance") else 1
    assert 0 <= final_accuracy(name, *options) <= top


def variants(recipe: Path) -> list[str]:
    """The options that a header names in brackets, such as those of the centralised run."""
    words = " ".join(header(recipe).split())
    return re.findall(r"\((?:lightning-fl fit \.\.\. )?(--[^()]+)\)", words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    # Not MLflow's, which goes on with the database that a process has opened first; digits_fedavg has the same variant.
    [(recipe.name, own) for recipe in RECIPES for own in variants(recipe) if recipe.name != "digits_mlflow.yaml"],
)
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_variants_that_a_header_names_run(tmp_path: Path, name: str, options: str) -> None:
    write_small_data(tmp_path)
    write_base(tmp_path, name)
    sys.argv = ["lightning-fl"]
    command = ["fit", "--config", str(recipes_directory() / name), *QUIET, *shlex.split(options)]
    brief = ("max_epochs=1", "limit_train_batches=1", "limit_val_batches=1", "check_val_every_n_epoch=1")
    run = FederatedCLI([*command, *(f"--trainer.{option}" for option in brief)]).trainer
    assert run.callback_metrics[metric_of(name)].isfinite()


def perplexity_of_silos() -> float:
    brief = ("max_epochs=1", "limit_val_batches=1", "check_val_every_n_epoch=1", "strategy.local_steps=1")
    write_small_data(Path.cwd())
    return final_accuracy("diloco_transformer.yaml", *(f"--trainer.{option}" for option in brief))


@pytest.mark.slow
def test_diloco_transformer_runs_for_a_round(run_ranks: Callable[..., list[float]]) -> None:
    perplexities = run_ranks(4, perplexity_of_silos)
    assert len(set(perplexities)) == 1
    assert 50 < perplexities[0] < 120  # nothing is learnt yet: 81 characters


def test_digits_central_is_the_baseline_of_the_federation() -> None:
    central = yaml.safe_load((recipes_directory() / "digits_central.yaml").read_text())
    federated = yaml.safe_load((recipes_directory() / "digits_fedavg.yaml").read_text())
    assert central["model"] == federated["model"]
    assert central["data"] == federated["data"]["init_args"]["data"]
    assert central["trainer"]["max_epochs"] == federated["trainer"]["max_epochs"]


@pytest.mark.slow
def test_digits_fedavg_gives_the_expected_numbers() -> None:
    federated, centralised = expected_accuracies("digits_fedavg.yaml")
    assert final_accuracy("digits_fedavg.yaml") == pytest.approx(federated, abs=TOLERANCE)
    accuracy = final_accuracy("digits_fedavg.yaml", "--trainer.strategy", "auto")
    assert accuracy == pytest.approx(centralised, abs=TOLERANCE)


@pytest.mark.slow
def test_digits_silos_gives_the_expected_number(run_ranks: Callable[..., list[float]]) -> None:
    federated, centralised = expected_accuracies("digits_silos.yaml")
    accuracies = run_ranks(3, final_accuracy, "digits_silos.yaml")
    assert len(set(accuracies)) == 1
    assert accuracies[0] == pytest.approx(federated, abs=TOLERANCE)
    accuracy = final_accuracy("digits_silos.yaml", "--trainer.strategy", "auto")
    assert accuracy == pytest.approx(centralised, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lung_survival.yaml", "shapes_segmentation.yaml", "movements_timeseries.yaml"])
def test_recipes_of_other_domains_give_the_expected_numbers(tmp_path: Path, name: str) -> None:
    write_small_data(tmp_path)
    federated, centralised = expected_accuracies(name)
    assert final_accuracy(name) == pytest.approx(federated, abs=0.03)
    assert final_accuracy(name, "--trainer.strategy", "auto") == pytest.approx(centralised, abs=0.03)


@pytest.mark.slow
def test_breast_cancer_vertical_gives_the_expected_number(run_ranks: Callable[..., list[float]]) -> None:
    found = re.search(r"expected: val_acc (0\.\d+)", header(recipes_directory() / "breast_cancer_vertical.yaml"))
    assert found
    accuracies = run_ranks(3, accuracy_of_party, "breast_cancer_vertical.yaml")
    assert accuracies == [pytest.approx(float(found[1]), abs=0.02), None, None]


def accuracy_of_party(name: str) -> float | None:
    sys.argv = ["lightning-fl"]
    trainer = FederatedCLI(["fit", "--config", str(recipes_directory() / name), *QUIET]).trainer
    accuracy = trainer.callback_metrics.get("val_acc")
    return None if accuracy is None else float(accuracy)


@pytest.mark.slow
def test_digits_secagg_gives_the_number_of_the_plain_silos(
    run_ranks: Callable[..., list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [KeyFolder(tmp_path / f"silo{rank}") for rank in range(3)]
    public = [folder.create() for folder in folders]
    for folder in folders:
        folder.trust(public)
    accuracies = run_ranks(3, final_accuracy_with_keys, "digits_secagg.yaml", str(tmp_path / "silo{rank}"))
    assert len(set(accuracies)) == 1
    assert accuracies[0] == pytest.approx(expected_accuracies("digits_secagg.yaml")[0], abs=TOLERANCE)


def final_accuracy_with_keys(name: str, keys: str) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_FL_KEYS", keys)
        return final_accuracy(name)


@pytest.mark.slow
def test_digits_secagg_dropouts_gives_the_expected_numbers() -> None:
    federated, centralised = expected_accuracies("digits_secagg_dropouts.yaml")
    assert final_accuracy("digits_secagg_dropouts.yaml") == pytest.approx(federated, abs=TOLERANCE)
    accuracy = final_accuracy("digits_secagg_dropouts.yaml", "--trainer.strategy", "auto")
    assert accuracy == pytest.approx(centralised, abs=TOLERANCE)


@pytest.mark.slow
def test_the_secagg_recipe_from_the_command_line_stops_without_keys_and_runs_with_them(tmp_path: Path) -> None:
    """What the header says, word for word, with real processes."""
    train = [
        *("python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", "-m", "lightning_fl"),
        *("fit", "--config", str(recipes_directory() / "digits_secagg.yaml"), "--trainer.max_epochs", "1"),
    ]
    stopped = run_script(train, cwd=tmp_path, num_processes=4, check=False)
    assert stopped.returncode != 0
    commands = [line.strip() for line in stopped.stderr.splitlines() if line.startswith("  lightning-fl keys ")]
    assert len(set(commands)) == 6
    for command in dict.fromkeys(commands):
        run_script(["python", "-m", "lightning_fl", *command.split()[1:]], cwd=tmp_path)
    assert "max_epochs=1` reached" in run_script(train, cwd=tmp_path, num_processes=4).stderr


@pytest.mark.slow
def test_digits_dp_gives_the_expected_numbers_within_its_epsilon() -> None:
    private, centralised = re.findall(r"0\.\d\d", header(recipes_directory() / "digits_dp.yaml"))[::2]
    sys.argv = ["lightning-fl"]
    trainer = FederatedCLI(["fit", "--config", str(recipes_directory() / "digits_dp.yaml"), *QUIET]).trainer
    assert trainer.callback_metrics["val_acc"].item() == pytest.approx(float(private), abs=0.03)
    assert 7.9 < trainer.strategy.history[-1]["dp_epsilon"] <= 8.0 + 2e-3
    without = ("--trainer.strategy", "auto", "--trainer.callbacks", "null", "--model.lr", "0.5")
    assert final_accuracy("digits_dp.yaml", *without) == pytest.approx(float(centralised), abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "digits_feddf",
        "digits_ring",
        "digits_hierarchical",
        "digits_perfedavg",
        "digits_fedbuff",
        "digits_fednas",
        "digits_fedgan",
    ],
)
def test_a_recipe_gives_the_number_of_its_header(name: str) -> None:
    found = re.search(r"expected: \S+ (\d+\.\d+) within (\d\.\d+)", header(recipes_directory() / f"{name}.yaml"))
    assert found
    assert final_accuracy(f"{name}.yaml") == pytest.approx(float(found[1]), abs=float(found[2]))
