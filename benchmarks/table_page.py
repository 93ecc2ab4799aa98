"""The page of benchmarks/table.py: which cases stand in which of its tables, and its plot."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib
from workloads import WORKLOADS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SETTINGS = ("1 process", "2 threads", "2 processes", "logs")
ENGINES = ("sequential", "auto")
PER_STEP = {1: "W1, sequential, 1 process", **{n: f"W1, {n} clients per step" for n in (10, 25, 50, 100)}}
COHORTS = {10: "W1, 10 clients a round", 100: "W1, auto, 1 process", 1000: "W1, 1000 clients a round"}
START_UP = "start-up"
SECONDS = ("cold", "plain_cold", "warm", "plain_warm")
PAGE = """\
# How fast simulation is

The time of a round in the ordinary `Trainer`, with an ordinary LightningModule, divided by the time of the same round
in a plain single-thread PyTorch loop that was run right beside it in the same process: below 1 is faster than the loop.
A run's ratio is the median over its rounds but the first; shown are the median of the runs and, in brackets, their
range. An empty cell has not been run.

Measured on {where}.

FedAvg, one local epoch of SGD at 0.05, synthetic data:

- W1: logistic regression, 1,000 clients of 60 examples, 100 a round, batches of 10.
- W1-unequal: the same with 300 clients of 3 to 200 examples, half of them with 40 or fewer.
- W2: the FedAvg CNN, 100 clients of 300 examples, 10 a round, batches of 32.
- W3: a 784-200-200-10 MLP, 100 clients of 600 examples, 10 a round, batches of 10.
- LSTM: two layers of 128 units on 40 characters, 100 clients of 24 sequences, 20 a round, batches of 8.
- transformer: two causal layers of width 64 on the data of the LSTM.

{engines}

`sequential` trains the clients one after the other; `auto`, the default, may train many in one step. Processes have one
thread each, `2 threads` is one process. `logs`: one process whose step logs its loss and a torchmetric, which the plain
loop does not. The last column is the largest difference of a final weight from the plain loop's in any of these runs.

![Ratios by workload, by clients per step, and seconds by clients a round](simulation.png)

How many clients of W1 train in one step; 1 is one after the other:

{per_step}

How many of the 1,000 clients of W1 take part in a round, with `auto`. The last column is by how much training raises
the peak of the process's memory, the plain loop's included:

{cohorts}

Start-up, which includes the making of the Trainer: a fit of one round of W1, and a plain Trainer's fit of as many
batches of the same shapes.

{start_up}

`python benchmarks/table.py` runs what is missing and writes this page; every run is in
[simulation.csv](simulation.csv), with the milliseconds that ranks take to communicate. One case alone:
`python benchmarks/simulation.py --workload W1 --check`.
"""


def values(rows: list[dict[str, str]], name: str, column: str) -> list[float]:
    """A figure of each run of a case, sorted."""
    return sorted(float(row[column]) for row in rows if row["case"] == name)


def median(rows: list[dict[str, str]], name: str, column: str) -> float:
    """NaN if there is no run."""
    return statistics.median(values(rows, name, column) or [float("nan")])


def cell(rows: list[dict[str, str]], name: str, column: str, form: str = ".2f") -> str:
    """The median over the runs, and the range of several; empty if there is no run."""
    found = values(rows, name, column)
    spread = f" ({found[0]:{form}} to {found[-1]:{form}})" if len(found) > 1 else ""
    return f"{statistics.median(found):{form}}{spread}" if found else ""


def markdown(titles: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(words)} |" for words in [titles, ["---"] * len(titles), *lines])


def tables(rows: list[dict[str, str]]) -> dict[str, str]:
    """By name, as Markdown."""
    engines = []
    for workload in WORKLOADS:
        for engine in ENGINES:
            names = [f"{workload}, {engine}, {setting}" for setting in SETTINGS]
            found = [value for name in names for value in values(rows, name, "largest_difference")]
            largest = f"{max(found):.0e}" if found else ""
            engines.append([workload, engine, *(cell(rows, name, "ratio") for name in names), largest])
    forms = {"ratio": ".2f", "round_ms": ".0f", "plain_ms": ".0f", "peak_growth_mb": ".0f"}
    cohorts = [[str(n), *(cell(rows, name, *form) for form in forms.items())] for n, name in COHORTS.items()]
    own = [cell(rows, START_UP, column) for column in SECONDS]
    return {
        "engines": markdown(["workload", "engine", *SETTINGS, "weights differ by"], engines),
        "per_step": markdown(
            ["clients per step", "ratio"], [[str(n), cell(rows, name, "ratio")] for n, name in PER_STEP.items()]
        ),
        "cohorts": markdown(["clients a round", "ratio", "ms a round", "plain loop, ms", "peak grows by, MB"], cohorts),
        "start_up": markdown(
            ["", "federated, s", "plain Trainer, s"], [["first fit of a process", *own[:2]], ["later fits", *own[2:]]]
        ),
    }


def page(rows: list[dict[str, str]]) -> str:
    """The page in the documentation."""
    where = "; ".join(", ".join(sorted({row[column] for row in rows})) for column in ("machine", "versions", "date"))
    return PAGE.format(where=where, **tables(rows))


def plot(path: Path, rows: list[dict[str, str]]) -> None:
    """Ratios by workload, ratio by clients in a step, seconds of a round by clients in it."""
    figure, (bars, steps, cohorts) = plt.subplots(1, 3, figsize=(13, 4), width_ratios=(2, 1, 1))
    kinds = [(engine, setting) for engine in ENGINES for setting in SETTINGS if setting != "logs"]
    for index, (engine, setting) in enumerate(kinds):
        heights = [median(rows, f"{workload}, {engine}, {setting}", "ratio") for workload in WORKLOADS]
        places = [place + 0.14 * (index - 2.5) for place in range(len(WORKLOADS))]
        bars.bar(places, heights, 0.13, label=f"{engine}, {setting}")
    bars.axhline(1, color="black", linewidth=0.8)
    bars.set_xticks(range(len(WORKLOADS)), list(WORKLOADS))
    bars.set(yscale="log", ylabel="round / round of the plain loop")
    bars.legend(fontsize="small")
    steps.plot(list(PER_STEP), [median(rows, name, "ratio") for name in PER_STEP.values()], marker="o")
    steps.set(xscale="log", yscale="log", xlabel="clients per step, W1", ylabel="round / round of the plain loop")
    for label, column in (("lightning_fl", "round_ms"), ("plain loop", "plain_ms")):
        seconds = [median(rows, name, column) / 1000 for name in COHORTS.values()]
        cohorts.plot(list(COHORTS), seconds, marker="o", label=label)
    cohorts.set(xscale="log", yscale="log", xlabel="clients a round, W1", ylabel="seconds a round")
    cohorts.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
