"""Trains with several seeds and settings, several runs at once; compares mean and deviation over the seeds.

All other options are passed to `lightning-fl fit`. Each run has a folder of its own. A sweep that was stopped continues
with the unfinished runs when it is started again, and more seeds or values may be added. At the end the folder holds
table.csv, table.md, table.tex, curves.png, and index.html with all runs side by side.

--vary tries every combination of values. --tune searches for the best ones with Optuna, within NAME=LOW:HIGH,
NAME=LOW:HIGH:log or a list NAME=A,B.

Examples:
  lightning-fl sweep --config digits_fedavg.yaml --seeds 0,1,2,3,4 --jobs 2 --vary trainer.strategy=fedavg,scaffold
  lightning-fl sweep --config config.yaml --vary model.lr=0.01,0.1 --vary trainer.strategy.local_epochs=1,5
  lightning-fl sweep --config config.yaml --tune model.lr=0.001:1:log --trials 20 --metric val_acc --seeds 0,1
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_fl.cli import compare, sweep_runs
from lightning_fl.cli.compare import Group
from lightning_fl.cli.sweep_runs import Point, SweepRun
from lightning_fl.tracking import Run, plots
from lightning_fl.tracking.index import write_index
from lightning_fl.tracking.metrics import best_metric, mode_of, mode_of_name
from lightning_fl.tracking.run import write_file

if TYPE_CHECKING:
    from optuna import Trial

PASSES_OPTIONS_ON = True
OWN = ("--seed_everything", "--trainer.logger")
"""Options of ``fit`` that the sweep sets."""
JOURNAL = "optuna.log"
TABLES = {"csv": "table.csv", "md": "table.md", "latex": "table.tex"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("--seeds", default="0", help="such as 0,1,2 (default: %(default)s)")
    parser.add_argument("--vary", action="append", default=[], metavar="OPTION=A,B", help="values of an option of fit")
    parser.add_argument(
        "--tune", action="append", default=[], metavar="OPTION=LOW:HIGH", help="search range of an option"
    )
    parser.add_argument("--trials", type=int, help="number of settings that --tune tries (default: 20)")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs (default: %(default)s)")
    parser.add_argument("--metric", help="what to compare (default: validation accuracy if there is one, else loss)")
    parser.add_argument("--mode", choices=("min", "max"), help=compare.MODE_HELP)
    parser.add_argument("--baseline", metavar="NAME", help="a row's name: the others show their difference from it")
    parser.add_argument("--format", choices=compare.FORMATS, default="table", help="how to print (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("sweep"), help="the folder (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Trains the unfinished runs, then compares all."""
    seeds = _seeds(args.seeds)
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} must be at least 1.")
    taken = next((word for word in args.rest if word.partition("=")[0].startswith(OWN)), None)
    if taken is not None:
        raise ValueError(f"{taken} is set by the sweep itself: each run has its own seed (--seeds) and its own folder.")
    if args.tune and args.vary:
        raise ValueError("Give --vary or --tune, not both; --tune takes lists of values too: NAME=A,B.")
    if args.trials is not None and not args.tune:
        raise ValueError("--trials is the number of settings that --tune tries; give --tune.")
    choices = dict(sweep_runs.parse_choices(text) for text in args.vary)
    with sweep_runs.claimed(args.out, args.rest):
        groups = tune(args, seeds) if args.tune else _trained(args, seeds, sweep_runs.grid(choices))
        if not groups:
            raise ValueError("No run has finished; the lines above say why.")
        summarise(groups, args)


def _seeds(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found):
        raise ValueError(f"--seeds {text} must be whole numbers, each once, such as 0,1,2.")
    return found


def _runs(args: argparse.Namespace, seeds: Sequence[int], point: Point) -> list[SweepRun]:
    folder = args.out / sweep_runs.folder_name(point)
    return [SweepRun(point, seed, folder / f"seed_{seed}", args.rest) for seed in seeds]


def _trained(args: argparse.Namespace, seeds: Sequence[int], points: Sequence[Point]) -> list[Group]:
    """A group for each point, with its seeds that have finished."""
    # Seed by seed, so that a stopped sweep has some runs of every point.
    by_point = [_runs(args, seeds, point) for point in points]
    everything = [one for together in zip(*by_point, strict=True) for one in together]
    told = 0

    def tell(one: SweepRun, seconds: float | None, error: Exception | None) -> None:
        nonlocal told
        told += 1
        what = f"failed: {error}" if error else "finished before" if seconds is None else f"{seconds:.0f} s"
        print(f"{told}/{len(everything)} {one}: {what}", flush=True)

    done = sweep_runs.train_all(everything, args.jobs, tell)
    found = [
        Group(sweep_runs.label(runs[0].point), [Run.read(one.folder) for one in runs if one in done])
        for runs in by_point
    ]
    return [group for group in found if group.runs]


def summarise(groups: Sequence[Group], args: argparse.Namespace) -> None:
    """Prints the table, and writes it with the curves and the page of all runs."""
    runs = [one for group in groups for one in group.runs]
    metric = args.metric or best_metric(runs)
    columns = compare.compare(groups, metric, None, args.baseline, args.mode)
    compare.show(columns, args.format)
    for kind, name in TABLES.items():
        write_file(args.out / name, compare.as_text(columns, kind))
    names = ", ".join(TABLES.values())
    if plots.is_available():
        (args.out / "curves.png").write_bytes(compare.curves_of(groups, metric))
        names += ", curves.png"
    write_index(runs, args.out / "index.html")
    if args.format == "table":
        print(f"in {args.out}: {names}, index.html")


@dataclass(frozen=True)
class Range:
    """The search range of an option.

    Args:
        low: The lowest value.
        high: The highest value.
        is_log: Whether values are drawn uniformly on a logarithmic scale.
    """

    low: float
    high: float
    is_log: bool

    def suggest(self, trial: Trial, name: str) -> str:
        """A value as a string; an integer if both ends are."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return str(trial.suggest_int(name, self.low, self.high, log=self.is_log))
        return f"{trial.suggest_float(name, self.low, self.high, log=self.is_log):.6g}"


def parse_space(text: str) -> tuple[str, Range | list[str]]:
    """An option and its search range, from ``name=low:high``, ``name=low:high:log`` or ``name=a,b``.

    Raises:
        ValueError: If the text has another form.
    """
    name, _, values = text.partition("=")
    ends = values.split(":")
    if len(ends) == 1:
        return sweep_runs.parse_choices(text)
    try:
        low, high = (int(end) if end.lstrip("+-").isdigit() else float(end) for end in ends[:2])
        is_log = ends[2:] == ["log"]
        if not low < high or (is_log and low <= 0) or not (is_log or len(ends) == 2):
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is not a range; write OPTION=LOW:HIGH, or OPTION=LOW:HIGH:log (LOW > 0).") from None
    return name.removeprefix("--"), Range(low, high, is_log)


def tune(args: argparse.Namespace, seeds: Sequence[int]) -> list[Group]:
    """Searches for the best settings with Optuna; its journal in the sweep's folder allows resuming.

    The objective is the mean over the seeds of the metric in the last round.

    Returns:
        A group for each setting that was tried, the best first.

    Raises:
        ImportError: If Optuna is not installed.
        ValueError: If there is no metric, it is not known in which direction it gets
            better, or a range is not valid.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ImportError('--tune needs Optuna: pip install "lightning-fl[sweep]"') from error
    if args.metric is None:
        raise ValueError("--tune needs an objective: give --metric, such as --metric val_acc.")
    space = dict(map(parse_space, args.tune))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(args.out / JOURNAL)))
    mode = args.mode or mode_of_name(args.metric)
    if mode is None:
        raise ValueError(
            f"Whether more of {args.metric!r} is better or less is not known; give --mode max or --mode min."
        )
    study = optuna.create_study(
        study_name=f"{mode} {args.metric} of {sorted(args.tune)} with seeds {seeds}",
        storage=storage,
        direction="maximize" if mode == "max" else "minimize",
        load_if_exists=True,
    )
    # A resumed study draws different numbers than at its beginning.
    study.sampler = optuna.samplers.TPESampler(seed=seeds[0] + len(study.trials))
    state = optuna.trial.TrialState
    for stopped in study.get_trials(states=(state.RUNNING,)):  # its seeds that have finished are kept
        study.tell(stopped.number, state=state.FAIL)
        study.enqueue_trial(stopped.params)
    groups: dict[str, Group] = {}

    wanted = args.trials or 20
    for known in study.get_trials(states=(state.COMPLETE,)):
        runs = [Run.read(one.folder) for one in _runs(args, seeds, known.user_attrs["point"])]
        found_before = Group(sweep_runs.label(known.user_attrs["point"]), runs)
        groups[found_before.name] = found_before
    tried = len(study.get_trials(states=(state.COMPLETE,)))
    while tried < wanted:
        together = min(wanted - tried, max(1, args.jobs // len(seeds)))
        asked = [study.ask() for _ in range(together)]
        points = [
            {
                n: one.suggest(trial, n) if isinstance(one, Range) else trial.suggest_categorical(n, one)
                for n, one in space.items()
            }
            for trial in asked
        ]
        for trial, point in zip(asked, points, strict=True):
            trial.set_user_attr("point", point)
        different = list({sweep_runs.label(point): point for point in points}.values())
        found = {group.name: group for group in _trained(args, seeds, different)}
        for trial, point in zip(asked, points, strict=True):
            group = found.get(sweep_runs.label(point))
            if group is None or len(group.runs) < len(seeds) or not math.isfinite(_mean(group, args.metric)):
                study.tell(trial, state=state.FAIL)
                continue
            groups[group.name] = group
            if args.mode is None and mode_of(args.metric, group.runs) != mode:
                raise ValueError(
                    f"By its name the {mode} of {args.metric!r} is the best, but the runs' ModelCheckpoint has the "
                    "other mode. Give --mode, or correct the checkpoint's mode."
                )
            study.tell(trial, _mean(group, args.metric))
        tried += together
    best_first = sorted(groups.values(), key=lambda group: _mean(group, args.metric), reverse=mode == "max")
    if best_first:
        print(f"best: {best_first[0].name}")
    return best_first


def _mean(group: Group, metric: str) -> float:
    return statistics.fmean(one.metric(metric)[1][-1] for one in group.runs)
