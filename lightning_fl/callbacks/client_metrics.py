"""Records metrics of each client in each round."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_fl.callbacks.federated import FederatedCallback
from lightning_fl.callbacks.monitored import mode_in
from lightning_fl.callbacks.run_record import run_folder
from lightning_fl.communication import Message
from lightning_fl.engines.tensors import clones
from lightning_fl.strategies import FederatedStrategy, internals
from lightning_fl.strategies.round_view import RoundView
from lightning_fl.strategies.validation import forbid_client_disclosure
from lightning_fl.tracking import loggers
from lightning_fl.tracking.metrics import Mode
from lightning_fl.tracking.run import CLIENTS_STEM, Row, append_rows, read_clients, to_json, write_file
from lightning_fl.tree import joint_norm, subtract
from lightning_fl.types import Aggregate, ClientId, LocalRun, Tree, Update

SHARE_OF_WORST = 0.1


class ClientMetrics(FederatedCallback):
    r"""Records each client's loss, logged values, examples, steps, seconds and drift in each round.

    Drift is :math:`\lVert y_i - x \rVert`, the distance by which a client's training moved the shared parameters
    :math:`x`, before any transform. ``clients.parquet`` in the run's folder (``clients.csv`` without pyarrow) has a row
    per client and round; during the run the rows are in ``clients.jsonl``, so that a run that is killed loses none.
    For the cohort of each round, the loggers get mean, variance and the mean of the worst tenth (at least one client)
    under ``clients/``, or the means of the highest and the lowest tenth if neither a ``ModelCheckpoint`` that monitors
    the value nor its name says which is worse; and at the end a table with each client's last round.

    Values logged as numbers in ``training_step``, such as ``self.log("train_acc", accuracy_of_batch)``, have a column
    of their name; logged torchmetrics do not, since their states hold several clients.

    The rows of all ranks go to rank 0. They disclose facts about single clients: do not use this callback if
    differential privacy or secure aggregation has to protect clients from people who see this run's files.

    Args:
        folder: The folder to write to. None: the folder of the first logger; without a logger there is no table.
        names: The logged values to summarize under ``clients/``, besides loss and drift.

    Example:
        >>> import lightning as L
        >>> callbacks = [ClientMetrics("runs/first")]
        >>> trainer = L.Trainer(strategy="fedavg", callbacks=callbacks, logger=False, accelerator="cpu")
    """

    def __init__(self, folder: str | Path | None = None, names: Sequence[str] = ()) -> None:
        self.folder = None if folder is None else Path(folder)
        self.names = tuple(names)
        self._path: Path | None = None
        self._rank = 0
        self._only_numbers = False
        """Whether all client ids are numbers; otherwise the rows hold all of them as strings."""
        self._start: Tree = {}
        self._start_time = 0.0
        self._own: list[Row] = []
        self._last: dict[ClientId, Row] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds the folder, and keeps the rows of a run that is resumed there."""
        strategy = trainer.strategy
        self._path = None
        if trainer.current_epoch == 0:  # another Trainer may have used this object
            self._last = {}
        if not isinstance(strategy, FederatedStrategy):
            rank_zero_info(f"ClientMetrics records nothing: {type(strategy).__name__} has no clients.")
            return
        view = strategy.view
        forbid_client_disclosure("ClientMetrics", view.settings)
        if trainer.loggers or self.folder is not None:
            self._path = run_folder(trainer, self.folder)
        else:
            rank_zero_warn(
                "ClientMetrics writes no table, because the Trainer has no logger with a folder. Give the callback a "
                "folder, such as ClientMetrics(folder='runs/first'), or leave it out."
            )
        self._rank = strategy.federation.rank
        self._only_numbers = all(isinstance(client, int) for client in view.population.ids)
        if self._path is not None and trainer.is_global_zero:
            is_resumed = trainer.current_epoch > 0
            rows = read_clients(self._path) if is_resumed else []
            # A run that was killed may have written rows after its last checkpoint; these rounds are trained again.
            earlier = [row for row in rows if row["round"] < trainer.current_epoch]
            self._remove_tables(self._path)
            write_file(self._lines(self._path), "".join(to_json(row) + "\n" for row in earlier))

    def on_client_start(self, trainer: L.Trainer, module: L.LightningModule, client: ClientId, view: RoundView) -> None:
        """Records the parameters from which the client starts, and the time."""
        # Copies, because training changes these tensors in place.
        self._start = clones(view.params)
        self._start_time = time.perf_counter()

    def on_client_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        client: ClientId,
        run: LocalRun,
        update: Update | None,
        view: RoundView,
    ) -> None:
        """Adds the client's row."""
        row: Row = {
            "round": trainer.current_epoch,
            "client": client if self._only_numbers else str(client),
            "rank": self._rank,
            "num_examples": run.num_examples,
            "num_steps": run.num_steps,
            "weight": run.weight,
            "seconds": time.perf_counter() - self._start_time,
            "loss": run.loss,
            "drift": view.trainer.within.joint_norm(joint_norm([subtract(clones(view.params), self._start)])),
            "refused": update is None,
        }
        # A value that the module logs as `loss`, or under another name of a column, does not replace that column.
        self._own.append({**row, **{name: value for name, value in run.logged.items() if name not in row}})
        # Don't keep a second model in memory between clients.
        self._start = {}

    def on_aggregate_end(
        self, trainer: L.Trainer, module: L.LightningModule, aggregate: Aggregate, view: RoundView
    ) -> None:
        """Gathers the ranks' rows, and logs their summary."""
        own, self._own = self._own, []
        # Even without rows, because every rank takes part in the collective.
        messages = view.group.all_gather(Message({"rows": own}), "client metrics")
        rows = [row for message in messages for row in message.fields["rows"]]
        self._last.update({row["client"]: row for row in rows})
        figures = {}
        for name in ("loss", "drift", *self.names):
            figures.update(
                _summary(name, mode_in(trainer, name), [row[name] for row in rows if row.get(name) is not None])
            )
        internals.log_figures(trainer, {f"clients/{name}": value for name, value in figures.items()})
        if own and view.population.silos is not None:
            loggers.log_own_silo(trainer, own[-1])
        if self._path is not None and trainer.is_global_zero:
            append_rows(self._lines(self._path), rows)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the table and logs each client's last round."""
        self._own = []
        if not trainer.is_global_zero or not self._last:
            return
        if self._path is not None:
            write_table(self._path)
        # Comparisons with NaN are never true and would make the order arbitrary; a client with a loss of NaN is the
        # worst.
        rows = sorted(self._last.values(), key=lambda row: -math.inf if math.isnan(row["loss"]) else -row["loss"])
        columns = list(dict.fromkeys(name for row in rows for name in row))
        loggers.log_table(trainer, "clients/last_round", columns, [[row.get(name) for name in columns] for row in rows])

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Drops the rows of the unfinished round."""
        self._own = []

    def _lines(self, folder: Path) -> Path:
        return folder / f"{CLIENTS_STEM}.jsonl"

    def _remove_tables(self, folder: Path) -> None:
        for suffix in ("parquet", "csv"):
            (folder / f"{CLIENTS_STEM}.{suffix}").unlink(missing_ok=True)


def _summary(name: str, mode: Mode | None, values: Sequence[float]) -> dict[str, float]:
    """Mean and variance over the clients, and the mean of the worst ones; of both ends if ``mode`` is None."""
    if not values:
        return {}
    ordered = np.sort(np.asarray(values, dtype=float))
    count = max(1, round(SHARE_OF_WORST * len(ordered)))
    lowest, highest = float(ordered[:count].mean()), float(ordered[-count:].mean())
    ends = {"worst": lowest if mode == "max" else highest} if mode else {"lowest": lowest, "highest": highest}
    return {
        f"{name}_mean": float(ordered.mean()),
        f"{name}_variance": float(ordered.var()),
        **{f"{name}_{end}_decile": value for end, value in ends.items()},
    }


_ARROW_TYPES: dict[frozenset[type], str] = {
    frozenset({bool}): "bool",
    frozenset({int}): "int64",
    frozenset({float}): "double",
    frozenset({int, float}): "double",
    frozenset({str}): "string",
}
"""The type of a column in the table, by the types of its values."""


def write_table(folder: Path) -> Path:
    """Turns ``clients.jsonl`` into ``clients.parquet``, or ``clients.csv`` without pyarrow, and removes it."""
    lines = folder / f"{CLIENTS_STEM}.jsonl"
    rows = read_clients(folder)
    try:
        import pyarrow
        import pyarrow.json
        import pyarrow.parquet
    except ImportError:
        return _write_csv(lines, rows)
    path = lines.with_suffix(".parquet")
    unfinished = path.with_name(f".{path.name}")
    # `pyarrow.table` would accept the rows, but it imports pandas, which takes a second.
    names = dict.fromkeys(name for row in rows for name in row)
    kinds = {name: {type(row[name]) for row in rows if row.get(name) is not None} for name in names}
    types = [(name, _ARROW_TYPES.get(frozenset(kinds[name]), "null")) for name in names]
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(alias)) for name, alias in types])
    options = pyarrow.json.ParseOptions(explicit_schema=schema)
    text = "".join(to_json(row) + "\n" for row in rows)
    table = pyarrow.json.read_json(pyarrow.BufferReader(text.encode()), parse_options=options)
    pyarrow.parquet.write_table(table, unfinished)
    # The lines are removed only after the complete table has its name: a run that is killed loses neither.
    unfinished.replace(path)
    lines.unlink()
    return path


def _write_csv(lines: Path, rows: Sequence[Row]) -> Path:
    import csv
    import io

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    path = lines.with_suffix(".csv")
    write_file(path, text.getvalue())
    lines.unlink()
    return path
