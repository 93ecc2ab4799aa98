"""Runs the recipes and compares each with the number in its header; figures and curves go to docs/experiments/.

    python benchmarks/recipes.py                     # all
    python benchmarks/recipes.py fashion_2nn         # one

A recipe whose data is not there is left out, with the reason. Exits with 1 if a number is out of its tolerance.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "docs" / "experiments"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ}  # the models are small
COLUMNS = ("recipe", "metric", "expected", "tolerance", "found", "seconds")
EXPECTED = re.compile(
    r"^# expected: (?P<metric>[\w/]+) (?P<value>[\d.]+) within (?P<tolerance>[\d.]+)"
    r"(?: in the last round|, the mean of rounds (?P<first>\d+) to (?P<last>\d+))",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Expectation:
    """What a recipe's header promises: a metric's value, in the last round or as a mean over rounds."""

    metric: str
    value: float
    tolerance: float
    first: int | None
    last: int | None

    @classmethod
    def read(cls, recipe: Path) -> Expectation | None:
        found = EXPECTED.search(recipe.read_text(encoding="utf-8"))
        if not found:
            return None
        first, last = (int(found[name]) if found[name] else None for name in ("first", "last"))
        return cls(found["metric"], float(found["value"]), float(found["tolerance"]), first, last)

    def of(self, curve: Sequence[tuple[int, float]]) -> float:
        if self.first is None or self.last is None:
            return curve[-1][1]
        return statistics.fmean(value for number, value in curve if self.first <= number <= self.last)


def command(recipe: Path) -> list[str]:
    """How the header says that the recipe is started."""
    line = re.search(
        r"^# +((?:lightning-fl|torchrun).* fit --config .*)$", recipe.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert line, recipe
    launcher, _, rest = line[1].replace(f"recipes/{recipe.name}", str(recipe)).partition(" ")
    if launcher == "lightning-fl":
        return [sys.executable, "-m", "lightning_fl", *rest.split()]
    return [sys.executable, "-m", "torch.distributed.run", *rest.split()]


def curve(log: Path, metric: str) -> list[tuple[int, float]]:
    """Pairs of round, counted from 1, and metric."""
    with log.open(encoding="utf-8") as file:
        return [(int(row["epoch"]) + 1, float(row[metric])) for row in csv.DictReader(file) if row.get(metric)]


def run(recipe: Path) -> tuple[dict[str, object], list[tuple[int, float]]] | None:
    expectation = Expectation.read(recipe)
    if expectation is None:
        print(f"{recipe.stem}: left out, no line '# expected: METRIC VALUE within TOLERANCE in the last round'")
        return None
    with tempfile.TemporaryDirectory() as folder:
        logger = ["--trainer.logger.init_args.save_dir", folder, "--trainer.enable_checkpointing", "false"]
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
        callbacks = ["--trainer.callbacks", "null"] if "ModelCheckpoint" in recipe.read_text(encoding="utf-8") else []
        start = time.perf_counter()
        result = subprocess.run(
            [*command(recipe), *logger, *quiet, *callbacks], capture_output=True, text=True, env=ENVIRONMENT
        )
        seconds = time.perf_counter() - start
        if result.returncode:
            reason = result.stderr.strip().splitlines()[-1]
            if "FileNotFoundError" not in result.stderr:
                raise SystemExit(f"{recipe.name} failed: {reason}\n{result.stderr}")
            print(f"{recipe.stem}: left out, {reason}", flush=True)
            return None
        points = curve(next(Path(folder).rglob("metrics.csv")), expectation.metric)
    found = expectation.of(points)
    off = abs(found - expectation.value) > expectation.tolerance
    wanted = f"{expectation.value} within {expectation.tolerance}"
    print(
        f"{recipe.stem}: {expectation.metric} {found:.4f}, expected {wanted}{' OFF' if off else ''}, {seconds:.0f} s",
        flush=True,
    )
    values = (
        recipe.stem,
        expectation.metric,
        expectation.value,
        expectation.tolerance,
        round(found, 4),
        round(seconds),
    )
    return dict(zip(COLUMNS, values, strict=True)), points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="names without .yaml; none: all")
    names = parser.parse_args().recipes
    recipes = sorted((REPOSITORY / "recipes").glob("*.yaml"))
    unknown = set(names) - {recipe.stem for recipe in recipes}
    if unknown:
        parser.error(f"no recipe {', '.join(sorted(unknown))}; there are {', '.join(r.stem for r in recipes)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    table, is_off = RESULTS / "recipes.csv", False
    rows = {row["recipe"]: row for row in csv.DictReader(table.open(encoding="utf-8"))} if table.exists() else {}
    for recipe in recipes:
        outcome = run(recipe) if not names or recipe.stem in names else None
        if outcome is None:
            continue
        row, points = outcome
        rows[recipe.stem] = {key: str(value) for key, value in row.items()}
        is_off |= abs(float(str(row["found"])) - float(str(row["expected"]))) > float(str(row["tolerance"]))
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows[name] for name in sorted(rows))
        with (RESULTS / f"recipe_{recipe.stem}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("round", row["metric"]), *points])
    plot()
    raise SystemExit(int(is_off))


def plot() -> None:
    """ParticipationSampler the curves of all recipes."""
    files = sorted(RESULTS.glob("recipe_*.csv"))
    figure, axes = plt.subplots(figsize=(8, 5))
    for file in files:
        with file.open(encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
        axes.plot(
            [int(number) for number, _ in rows[1:]],
            [float(value) for _, value in rows[1:]],
            marker=".",
            label=f"{file.stem.removeprefix('recipe_')} ({rows[0][1]})",
        )
    axes.set(xlabel="round", ylabel="accuracy on the test data", ylim=(0, 1), title="The recipes")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS / "recipes.png", dpi=120)


if __name__ == "__main__":
    main()
