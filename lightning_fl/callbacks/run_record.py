"""Writes a run's record for ``lightning-fl report`` and ``compare``, and logs the federation's settings and data."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_fl.callbacks.monitored import monitored_modes
from lightning_fl.callbacks.personalized_evaluation import PersonalizedEvaluation
from lightning_fl.callbacks.round_end import RoundEndCallback
from lightning_fl.strategies import FederatedStrategy
from lightning_fl.strategies.internals import own_hyperparameters
from lightning_fl.tracking import loggers
from lightning_fl.tracking.metrics import best_metric
from lightning_fl.tracking.partition_reading import summarise
from lightning_fl.tracking.run import (
    CLIENT_EVALUATIONS_FILE,
    EVALUATIONS_FILE,
    ROUNDS_FILE,
    RUN_FILE,
    Row,
    Run,
    append_rows,
    to_json,
    write_file,
)

MAX_CLIENTS = 200
MODEL_FILE = "model.ckpt"
HIDDEN = ("_instantiator",)
"""Keys that LightningCLI adds to the hyper-parameters."""


class RunRecord(RoundEndCallback):
    """Writes a record of the run to its folder, and logs the federation's settings and the partition of the data.

    ``lightning-fl fit`` adds it automatically. The folder is the logger's, which also has ``checkpoints``. It gets
    ``run.json`` (settings, versions, partition of the data, the command line) and ``rounds.jsonl`` (a line for each
    round: the figures of ``strategy.history`` and the global metrics), which ``lightning-fl report`` and ``compare``
    read. A run that is not federated is recorded too, with its epochs as rounds, for comparison.

    A silo on another rank than the first may be on another machine. It writes its own record to the folder
    ``silos/NAME`` of its Trainer's ``default_root_dir``, and at the end the global model, ``model.ckpt``.

    ``client_evaluations.jsonl`` holds the results of the callback
    :class:`~lightning_fl.callbacks.PersonalizedEvaluation` for each client.

    TensorBoard and W&B get the strategy's settings, the partition as a table and as a figure, and all metrics again by
    round, under ``round/``. Silos share their number of examples only if clients are weighted by it, and never their
    label counts, which are also left out if differential privacy protects clients or examples.

    Args:
        folder: The folder to write to. None: the folder of the first logger.
        command: The command line to reproduce the run. None: the one that started this process.

    Raises:
        MisconfigurationException: When training starts, if there is neither a logger nor a ``folder``.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(strategy="fedavg", callbacks=[RunRecord("runs/first")], logger=False, accelerator="cpu")
    """

    def __init__(self, folder: str | Path | None = None, command: str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.command = command
        self._rows: list[Row] = []
        self.path: Path | None = None
        """The run's folder, once training has started."""
        self._facts: dict[str, Any] = {}
        self._own: Path | None = None
        """The folder that this rank writes to: the run's, that of its own silo, or None."""
        self._start = 0.0
        self._last_step = 0
        self._autologs = self._is_secret = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps Lightning from logging the hyper-parameters, which :meth:`on_train_start` logs with the settings."""
        self._autologs = trainer.enable_autolog_hparams
        trainer.enable_autolog_hparams = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the facts that are known before the first round."""
        own = own_hyperparameters(trainer) if self._autologs else {}
        trainer.enable_autolog_hparams = self._autologs
        super().on_train_start(trainer, pl_module)
        _move_behind_others(trainer, self)
        self.path = run_folder(trainer, self.folder)
        if self.path is None:
            return
        strategy = trainer.strategy
        self._own = self.path if trainer.is_global_zero else silo_record(strategy)
        settings = describe_settings(trainer)
        summary = None
        if isinstance(strategy, FederatedStrategy):
            self._is_secret = strategy.view.settings.hides_clients
            population, federation = strategy.view.population, strategy.view.settings
            # With weighting by examples, silos learn each other's sizes anyway, unless secure aggregation hides them.
            if not federation.silos or (strategy.weighting == "examples" and not federation.hides_silos):
                # The sizes of clients count as public under differential privacy, their labels do not.
                shares_labels = not federation.silos and not federation.is_differentially_private
                summary = summarise(population, strategy.federation, MAX_CLIENTS, share_labels=shares_labels)
        self._facts = {
            "command": self.command or command_line(),
            "directory": os.getcwd(),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "status": "running",
            "settings": settings,
            "modes": monitored_modes(trainer),
            "versions": _versions(),
            "partition": None if summary is None else summary.as_dict(),
        }
        # Rounds after the checkpoint are trained again, and their lines are written again.
        self._rows = [row for row in self._rows if row["round"] < trainer.current_epoch]
        # The time of a resumed run continues from its last row.
        self._start = time.perf_counter() - (self._rows[-1]["time"] if self._rows else 0.0)
        self._last_step = trainer.global_step
        if self._own is not None:
            write_file(self._own / RUN_FILE, to_json(self._facts) + "\n")
            self._write_rounds()
        loggers.log_settings(trainer, settings, own)
        if summary is not None:
            loggers.log_partition(trainer, summary)

    def on_round_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Adds the current round, with what was logged in it."""
        if self.path is None:
            return
        # Without the federation's own figures, which the row has already.
        metrics = {n: value for n, value in self.logged_in_round(trainer).items() if not n.startswith("fl/")}
        row: Row = {"round": trainer.current_epoch, "num_steps": trainer.global_step - self._last_step}
        if isinstance(trainer.strategy, FederatedStrategy):
            row.update(trainer.strategy.history[-1])
        row.update(time=time.perf_counter() - self._start, metrics=metrics)
        self._last_step = trainer.global_step
        self._rows.append(row)
        if self._own is not None:
            append_rows(self._own / ROUNDS_FILE, [row])
        loggers.log_by_round(trainer, row["round"], metrics)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records that the run has finished, and the results of other callbacks at its end."""
        self._record_clients(trainer)
        is_spread = isinstance(trainer.strategy, FederatedStrategy) and trainer.strategy.federation.is_spread
        keeps_model = self._own is not None and not trainer.is_global_zero
        if keeps_model or is_spread:  # a sharded model is gathered from all processes of a silo
            model = global_model(trainer)
            if self._own is not None and keeps_model:
                torch.save(model, self._own / MODEL_FILE)
        self._close(trainer, "finished")
        if self._own is not None and (run := Run(self._own, self._facts, self._rows, [])).metric_names:
            loggers.log_outcome(trainer, run.metric(best_metric([run]))[1][-1])

    def _record_clients(self, trainer: L.Trainer) -> None:
        """Adds evaluations after the last round to its row, and writes the results of each client."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        found = [own for own in callbacks if isinstance(own, PersonalizedEvaluation) and own.metrics]
        if self._own is None or not self._rows or not found:
            return
        last = found[-1]
        self._rows[-1]["metrics"] = {**self._rows[-1]["metrics"], **last.means()}
        self._write_rounds()
        rows = [
            {"client": client, "num_examples": last.num_examples[client], "model": model, "metrics": metrics}
            for client, models in last.metrics.items()
            for model, metrics in models.items()
        ]
        write_file(self._own / CLIENT_EVALUATIONS_FILE, "".join(to_json(row) + "\n" for row in rows))

    def _write_rounds(self) -> None:
        assert self._own is not None
        # The file contains exact counts, even of rounds whose clients are hidden by noise.
        text = "".join(to_json(row) + "\n" for row in self._rows)
        write_file(self._own / ROUNDS_FILE, text, is_secret=self._is_secret)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Records the exception that ended the run."""
        if self._autologs:
            trainer.enable_autolog_hparams = True
        stopped = "stopped by the user" if isinstance(exception, KeyboardInterrupt) else f"failed: {exception!r}"
        self._close(trainer, stopped)

    def _close(self, trainer: L.Trainer, status: str) -> None:
        if self._own is None:
            return
        model = self._own / MODEL_FILE
        here = getattr(trainer.checkpoint_callback, "best_model_path", "") if trainer.is_global_zero else str(model)
        self._facts.update(status=status, checkpoint=here)
        write_file(self._own / RUN_FILE, to_json(self._facts) + "\n")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds the results to the record of the run whose model was tested."""
        self._record_evaluation(trainer, "test")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds the results of ``trainer.validate`` to the record; those of a round are in its row."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._record_evaluation(trainer, "validate")

    def _record_evaluation(self, trainer: L.Trainer, what: str) -> None:
        checkpoint = trainer.ckpt_path
        folder = self.path if checkpoint is None else run_of_checkpoint(Path(checkpoint))
        if folder is None or not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {"what": what, "checkpoint": None if checkpoint is None else str(checkpoint), "metrics": metrics}
        append_rows(folder / EVALUATIONS_FILE, [row])

    def state_dict(self) -> dict[str, Any]:
        """The rounds so far, so that a run resumed from a checkpoint has all rounds."""
        return {"rows": to_json({"rows": self._rows})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the rounds of the run that is resumed."""
        self._rows = json.loads(state_dict["rows"])["rows"]


def _move_behind_others(trainer: L.Trainer, record: RunRecord) -> None:
    """Moves the record behind other callbacks, whose metrics it records, and before checkpoints, which save it."""
    others = [callback for callback in trainer.callbacks if callback is not record]  # type: ignore[attr-defined]
    savers = [callback for callback in others if isinstance(callback, Checkpoint)]
    # A new list, because Lightning is iterating over the old one.
    trainer.callbacks = [*(other for other in others if other not in savers), record, *savers]  # type: ignore[attr-defined]


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint: the nearest one above it with a record."""
    return next((folder for folder in checkpoint.resolve().parents if (folder / RUN_FILE).is_file()), None)


def silo_record(strategy: Any) -> Path | None:
    """The folder of the record of a silo on another rank than the first; None in a simulation."""
    if not isinstance(strategy, FederatedStrategy) or strategy.view.population.silos is None:
        return None
    group = strategy.federation
    if group.inner.rank:  # the first process of a silo writes its record
        return None
    name = group.names[group.rank] if group.names else f"silo{group.rank}"
    if strategy.network is not None:
        name = strategy.network.name
    return Path(strategy.lightning_module.trainer.default_root_dir, "silos", name)  # type: ignore[union-attr]


def global_model(trainer: L.Trainer) -> dict[str, Any]:
    """The global model as a checkpoint that ``load_from_checkpoint`` loads."""
    module = trainer.lightning_module
    state = trainer.strategy.lightning_module_state_dict()
    return {
        "state_dict": {name: value.cpu() for name, value in state.items()},
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": L.__version__,
        "hyper_parameters": dict(module.hparams),
    }


def run_folder(trainer: L.Trainer, folder: Path | None) -> Path | None:
    """The run's folder, the same on every rank; None for a run that writes no files, as with ``fast_dev_run``.

    Raises:
        MisconfigurationException: If there is neither a logger nor a folder.
    """
    if folder is not None:
        return folder
    first = trainer.loggers[0] if trainer.loggers else None
    if isinstance(first, DummyLogger):
        return None
    if first is None:
        raise MisconfigurationException(
            "There is no folder for the run's files, because the Trainer has no logger. Give the callback a folder, "
            "such as fl.callbacks.RunRecord(folder='runs/first'), or give the Trainer a logger."
        )
    # `log_dir` broadcasts the folder of rank 0 itself.
    if isinstance(first, TensorBoardLogger | CSVLogger):
        return Path(trainer.log_dir or ".")
    # Other loggers may know their version on rank 0 only, so that rank's answer counts for all.
    version = first.version if isinstance(first.version, str) else f"version_{first.version}"
    own = str(Path(first.save_dir or trainer.default_root_dir, str(first.name), version))
    return Path(trainer.strategy.broadcast(own))


def describe_settings(trainer: L.Trainer) -> dict[str, str]:
    """The settings of a run as text."""
    strategy = trainer.strategy
    settings = {}
    if isinstance(strategy, FederatedStrategy):
        algorithm, view = strategy.algorithm, strategy.view
        kind = "simulated" if view.population.silos is None else "silos"
        names = [name for name in inspect.signature(FederatedStrategy).parameters if hasattr(strategy, name)]
        given = {name: getattr(strategy, name) for name in names}
        settings = {name: _text(value) for name, value in given.items() if value not in (None, (), [])}
        if dataclasses.is_dataclass(algorithm):
            own = ((field.name, getattr(algorithm, field.name)) for field in dataclasses.fields(algorithm))
            settings.update({f"algorithm.{name}": _text(value) for name, value in own})
        settings.update(
            algorithm=repr(algorithm),
            clients=kind,
            num_clients=str(len(view.population)),
            # The exact number is secret if noise hides who takes part.
            clients_per_round=f"{view.expected_cohort_size if view.settings.hides_clients else len(view.cohort):g}",
            ranks=str(strategy.federation.size),
            seed=str(view.settings.seed),
        )
        if strategy.federation.names:
            settings["silos"] = ", ".join(strategy.federation.names)
        if strategy.local_steps is None:
            settings["local_epochs"] = str(view.max_work.epochs)
    else:
        settings["strategy"] = type(strategy).__name__
    data = getattr(trainer, "datamodule", None)
    if data is not None:
        partitioner = getattr(data, "partitioner", None)
        settings["data"] = type(data).__name__ + (f" with {_text(partitioner)}" if partitioner is not None else "")
    settings.update(
        max_epochs=str(trainer.max_epochs),
        precision=str(trainer.precision),
        accumulate_grad_batches=str(trainer.accumulate_grad_batches),
        module=type(trainer.lightning_module).__name__,
        num_parameters=f"{sum(param.numel() for param in trainer.lightning_module.parameters()):,}",
    )
    for part, owner in (("model", trainer.lightning_module), ("data", data)):
        hparams = getattr(owner, "hparams", {})
        settings.update({f"{part}.{name}": _text(value) for name, value in hparams.items() if name not in HIDDEN})
    return settings


def _text(value: Any) -> str:
    if isinstance(value, str | timedelta):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    # The default repr contains an address, so equal settings would differ from run to run.
    return type(value).__name__ if type(value).__repr__ is object.__repr__ else repr(value)


def _versions() -> dict[str, str]:
    import lightning_fl

    return {
        "lightning_fl": lightning_fl.__version__,
        "lightning": L.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def command_line(words: Sequence[str] | None = None) -> str:
    """The command that starts this run again, including torchrun and its options if torchrun started it.

    Args:
        words: The arguments of ``python`` or ``torchrun``. None: those with which this process was started.
    """
    # Not `sys.argv`, in which `-m package` was replaced by the path of a file.
    words = list(sys.orig_argv[1:] if words is None else words)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join(["python", *words])
    # torchrun starts `python -u`.
    words = words[1:] if words[:1] == ["-u"] else words
    num_nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    where = ["--standalone"]
    if num_nodes != "1":
        address = ["--node_rank", os.environ.get("GROUP_RANK", "0"), "--master_addr", os.environ["MASTER_ADDR"]]
        where = ["--nnodes", num_nodes, *address, "--master_port", os.environ["MASTER_PORT"]]
    processes = ["--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    return shlex.join(["torchrun", *where, *processes, *words])
