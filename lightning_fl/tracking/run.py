"""A run's folder: the files that ``lightning-fl report`` and ``compare`` read, and how they are written."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_fl.files import write_whole
from lightning_fl.tracking.partition import PartitionSummary

RUN_FILE = "run.json"
ROUNDS_FILE = "rounds.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
CLIENT_EVALUATIONS_FILE = "client_evaluations.jsonl"
CLIENTS_STEM = "clients"
"""``clients.parquet``, or ``clients.csv`` without pyarrow; ``clients.jsonl`` while the run is in progress."""

Row = dict[str, Any]


def to_json(value: Any) -> str:
    """One line of JSON, with null for NaN and infinity, which JSON does not have."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, str | bool | int) else str(value)


def write_file(path: Path, text: str, is_secret: bool = False) -> None:
    """Writes a file atomically: a reader sees the old content or the new, never a part.

    Args:
        path: The file.
        text: Its content.
        is_secret: Whether only its owner may read it, including rows appended later.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode(), mode=0o600 if is_secret else 0o666, durable=False)


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Appends rows to a JSON Lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON Lines file, without a last line that was cut off because the run was killed.

    Raises:
        ValueError: If a line before the last is not a JSON object.
    """
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}, expected an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}, is corrupt: {error}") from error
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Run:
    """A run as read from its folder.

    Args:
        path: The folder.
        facts: The content of ``run.json``: settings, versions, the command line, how the run ended.
        rounds: One row per round, with its global metrics under ``"metrics"``.
        clients: One row per client and round, if the run had :class:`~lightning_fl.callbacks.ClientMetrics`.
        evaluations: One row for each ``test`` and ``validate`` of its model: stage, checkpoint, metrics.
        client_evaluations: One row for each client and model that
            :class:`~lightning_fl.callbacks.PersonalizedEvaluation` has evaluated.
    """

    path: Path
    facts: Mapping[str, Any]
    rounds: list[Row]
    clients: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    client_evaluations: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """Reads a run's folder; in a folder of several runs, the one that started last.

        Raises:
            ValueError: If there is no run in the folder, or a file is corrupt.
        """
        folder = find_run(Path(path))
        try:
            facts = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
            if not isinstance(facts, dict):
                raise ValueError(f"found a {type(facts).__name__}, expected an object")
        except ValueError as error:
            raise ValueError(f"{folder / RUN_FILE} is corrupt: {error}") from error
        files = (ROUNDS_FILE, EVALUATIONS_FILE, CLIENT_EVALUATIONS_FILE)
        rounds, *evaluations = (read_rows(folder / name) if (folder / name).exists() else [] for name in files)
        return cls(folder, facts, rounds, read_clients(folder), *evaluations)

    @property
    def name(self) -> str:
        """The last two parts of the folder's path, such as ``digits_fedavg/version_0``."""
        return "/".join(self.path.resolve().parts[-2:])

    @property
    def settings(self) -> dict[str, str]:
        """The strategy's and the Trainer's settings, as text."""
        return dict(self.facts.get("settings", {}))

    @property
    def modes(self) -> dict[str, Any]:
        """By metric ``"min"`` or ``"max"``, as the run's ``ModelCheckpoint`` and ``EarlyStopping`` monitor it."""
        found = self.facts.get("modes")
        return {n: mode for n, mode in found.items() if mode in ("min", "max")} if isinstance(found, dict) else {}

    @property
    def algorithm(self) -> str:
        """The algorithm with its hyper-parameters, or the strategy's name if the run was not federated."""
        return self.settings.get("algorithm", self.settings.get("strategy", "?"))

    @property
    def partition(self) -> PartitionSummary | None:
        """The summary of the partition, if the run recorded one."""
        fields = self.facts.get("partition")
        return None if fields is None else PartitionSummary.from_dict(fields)

    @cached_property
    def metric_names(self) -> list[str]:
        """Names of all global metrics, in order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rounds for name in row.get("metrics", {})))

    def metric(self, name: str) -> tuple[list[int], list[float]]:
        """The rounds, counted from 1, and a metric's values in them; NaN where a value was not finite."""
        rows = [row for row in self.rounds if name in row.get("metrics", {})]
        values = [row["metrics"][name] for row in rows]
        # JSON has no NaN; it was written as null.
        return [row["round"] + 1 for row in rows], [math.nan if value is None else value for value in values]

    def total(self, name: str) -> float | None:
        """The sum of a field such as ``num_bytes`` over the rounds; None if no row has it."""
        values = [row[name] for row in self.rounds if row.get(name) is not None]
        return sum(values) if values else None

    @property
    def seconds(self) -> float | None:
        """Seconds from the start of training to the end of the last round, validation included."""
        return self.rounds[-1].get("time") if self.rounds else None


def find_run(path: Path) -> Path:
    """The folder of a run: ``path`` itself, or the run below it that started last.

    Raises:
        ValueError: If there is none.
    """
    if (path / RUN_FILE).is_file():
        return path
    below = runs_below(path)
    if not below:
        found = "is a folder without" if path.is_dir() else "is not a folder, so there is no"
        raise ValueError(
            f"{path} {found} {RUN_FILE}. Give the folder of a run, such as logs/NAME/version_0; `lightning-fl fit` "
            "writes one unless the Trainer has no logger, a script with the callback fl.callbacks.RunRecord()."
        )
    return below[-1]


def runs_below(path: Path) -> list[Path]:
    """The folders of the runs in a folder, the most recently written last."""
    files = path.glob(f"**/{RUN_FILE}") if path.is_dir() else ()
    return [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime)]


def read_clients(folder: Path) -> list[Row]:
    """The rows of :class:`~lightning_fl.callbacks.ClientMetrics`, from the file format that exists."""
    parquet, table, lines = (folder / f"{CLIENTS_STEM}.{suffix}" for suffix in ("parquet", "csv", "jsonl"))
    if lines.exists():  # the run is in progress, or was killed before it could write the final file
        return read_rows(lines)
    if parquet.exists():
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(f'{parquet} needs pyarrow to be read: pip install "lightning-fl[tracking]"') from error
        # Unlike `read_table`, this does not import pandas, which takes as long as the rest of a report.
        with pyarrow.parquet.ParquetFile(parquet) as file:
            return file.read().to_pylist()
    if table.exists():
        with table.open(newline="", encoding="utf-8") as file:
            return [{key: as_number(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return []


def as_number(text: str) -> Any:
    """The number, bool or None that a string represents, otherwise the string itself."""
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
