"""The runs of a sweep: their settings and folders, and training of several at once."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from lightning_fl.os_differences import lock_file
from lightning_fl.tracking import Run
from lightning_fl.tracking.run import RUN_FILE, write_file

SWEEP_FILE = "sweep.json"
LOG_FILE = "output.txt"
LOGGER = "lightning.pytorch.loggers.CSVLogger"
MAX_NAME = 60

Point = Mapping[str, str]
"""The value of each option of ``fit``, by its name without dashes."""


def parse_choices(text: str) -> tuple[str, list[str]]:
    """An option and its values, from ``name=a,b,c``, or ``name=[[1, 2], [3]]`` for values with commas.

    Raises:
        ValueError: If the text has another form.
    """
    name, _, values = text.partition("=")
    found: object = None
    if values.startswith("["):
        try:
            found = yaml.safe_load(values)
        except yaml.YAMLError:
            found = None
    chosen = (
        [one if isinstance(one, str) else json.dumps(one) for one in found]
        if isinstance(found, list)
        else [one.strip() for one in values.split(",")]
    )
    if not name or not all(chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"{text!r} names no values to try; expected OPTION=A,B without duplicates, such as "
            "trainer.strategy=fedavg,fedprox."
        )
    return name.removeprefix("--"), chosen


def grid(choices: Mapping[str, Sequence[str]]) -> list[Point]:
    """Every combination of the values."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def label(point: Point) -> str:
    """The name of a point in tables: its values, prefixed by the last part of each option if there are several."""
    if len(point) == 1:
        return next(iter(point.values()))
    return ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in point.items()) or "as configured"


def folder_name(point: Point) -> str:
    """The folder name of a point, which describes it as far as the file system allows."""
    text = label(point).replace(", ", ",")
    safe = re.sub(r"[^\w.,=+-]", "_", text)[:MAX_NAME]
    return safe if safe == text else f"{safe}-{hashlib.blake2b(text.encode(), digest_size=3).hexdigest()}"


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Args:
        point: Its settings.
        seed: Its seed.
        folder: Its folder, whose record shows whether it is finished.
        common: The options of ``fit`` that all runs share.
    """

    point: Point
    seed: int
    folder: Path
    common: Sequence[str]

    @property
    def words(self) -> list[str]:
        """The arguments of ``lightning-fl``."""
        varied = [word for name, value in self.point.items() for word in (f"--{name}", value)]
        logger = ["--trainer.logger", LOGGER, "--trainer.logger.save_dir", str(self.folder.parent)]
        logger += ["--trainer.logger.name", self.folder.name, "--trainer.logger.version", ""]
        # A varied configuration file comes first, because later options override it.
        first = [*varied, *self.common] if "config" in self.point else [*self.common, *varied]
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
        return ["fit", *first, *quiet, "--seed_everything", str(self.seed), *logger]

    @property
    def is_finished(self) -> bool:
        """Whether its training is finished."""
        return (self.folder / RUN_FILE).is_file() and Run.read(self.folder).facts.get("status") == "finished"

    def __str__(self) -> str:
        """Its name in messages to the user."""
        return f"{label(self.point)}, seed {self.seed}"


def train(run: SweepRun, threads: int) -> None:
    """Trains in a separate process, whose output goes to a file in the run's folder.

    Raises:
        ValueError: If it ends with an error; the message has its last line.
    """
    # Remove the remains of a stopped run before starting it again.
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    log = run.folder / LOG_FILE
    with log.open("w", encoding="utf-8") as output:
        ended = subprocess.run(
            [sys.executable, "-m", "lightning_fl", *run.words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            check=False,
        )
    if ended.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ValueError(f"{lines[-1] if lines else f'exit status {ended.returncode}'} ({log})")


def train_all(
    runs: Sequence[SweepRun], jobs: int, tell: Callable[[SweepRun, float | None, Exception | None], None]
) -> list[SweepRun]:
    """Trains the unfinished runs, several at once; a run that fails does not stop the others.

    Args:
        runs: All runs.
        jobs: Number of parallel runs.
        tell: Called for each run with its seconds (None if it was finished before) and its error.

    Returns:
        The finished ones.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    done = [run for run in runs if run.is_finished]
    for run in done:
        tell(run, None, None)

    def timed(run: SweepRun) -> float:
        start = time.monotonic()
        train(run, threads)
        return time.monotonic() - start

    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(timed, run): run for run in runs if run not in done}
        try:
            for future in as_completed(waiting):
                run = waiting[future]
                try:
                    seconds = future.result()
                except (ValueError, OSError) as error:
                    tell(run, None, error)
                    continue
                done.append(run)
                tell(run, seconds, None)
        finally:
            for future in waiting:  # after Ctrl-C no further run starts
                future.cancel()
    return [run for run in runs if run in done]


@contextmanager
def claimed(folder: Path, common: Sequence[str]) -> Iterator[None]:
    """A block in which no other process runs a sweep in the folder.

    The options that all its runs share are recorded there, to detect runs of another sweep.

    Raises:
        ValueError: If the folder belongs to another sweep, or the same sweep runs there already.
    """
    _claim(folder, common)
    with (folder / SWEEP_FILE).open("rb+") as file:
        try:
            lock_file(file.fileno(), wait=False)
        except OSError:
            raise ValueError(
                f"Another process runs this sweep in {folder}. Wait for it, or give another --out."
            ) from None
        yield


def _claim(folder: Path, common: Sequence[str]) -> None:
    facts = {"options": list(common), "configs": dict(_digests(common))}
    path = folder / SWEEP_FILE
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != facts:
            raise ValueError(
                f"{folder} holds the runs of another sweep: `{shlex.join(found['options'])}`, or its configuration has "
                "changed since. Name another folder with --out, or delete that one."
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is a folder with other files. Name a new one with --out.")
    write_file(path, json.dumps(facts, indent=2) + "\n")


def _digests(common: Sequence[str]) -> Iterator[tuple[str, str]]:
    for option, value in itertools.pairwise(common):
        if option in ("--config", "-c"):
            if not Path(value).is_file():
                raise ValueError(f"There is no file {value} for {option}.")
            yield value, hashlib.blake2b(Path(value).read_bytes(), digest_size=16).hexdigest()
