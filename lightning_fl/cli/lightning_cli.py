"""LightningCLI for federations: ``lightning-fl fit``, ``validate``, ``test`` and ``predict``."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry

import lightning_fl
import lightning_fl.models  # YAML files may name its classes without their module, like those of the imports below
import lightning_fl.tracking.silo_logger
from lightning_fl.callbacks import DryRun, FederatedProgressBar, RunRecord
from lightning_fl.callbacks.run_record import command_line, run_folder
from lightning_fl.cli.errors import ConfigurationError, in_one_line
from lightning_fl.cli.words import spell_out_names
from lightning_fl.strategies import FederatedStrategy

lightning_fl.register()  # in a command-line process, no script does


class FederatedParser(LightningArgumentParser):
    """A parser that reports a wrong configuration in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises the mistake that ``message`` is about."""
        if not self.exit_on_error:  # the parser of a nested class, whose message becomes part of the outer one
            super().error(message, ex)
        raise ConfigurationError(in_one_line(message)) from ex


class SaveRunConfig(SaveConfigCallback):
    """Saves the configuration as ``config.yaml`` in the run's folder, but never overwrites its own source.

    A run without a folder, for example without a logger, saves none.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Saves the configuration on rank 0."""
        record = next((found for found in trainer.callbacks if isinstance(found, RunRecord)), None)  # type: ignore[attr-defined]
        own = None if record is None else record.folder
        if self.already_saved or (own is None and not trainer.loggers):
            return
        self.already_saved = True
        folder = run_folder(trainer, own)
        if folder is None or not trainer.is_global_zero:
            return
        path = folder / self.config_filename
        if any(path.exists() and path.samefile(str(given)) for given in self.config.get("config") or ()):
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=self.multifile)


class FederatedCLI(LightningCLI):
    """LightningCLI with this package's strategies, models and datamodules; runs are seeded by default.

    Args:
        args: The arguments of the command line. None: those of the process.
    """

    def __init__(self, args: Sequence[str] | None = None) -> None:
        self.words = sys.argv[1:] if args is None else list(args)
        every = super().subcommands()
        only = self.words[0] if self.words and self.words[0] in every else None
        # Lightning creates the parsers of all subcommands, 0.2 s each; this creates only the requested one.
        self.subcommands = lambda: every if only is None else {only: every[only]}  # type: ignore[method-assign]
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            parser_class=FederatedParser,
            seed_everything_default=0,
            parser_kwargs={
                "prog": "lightning-fl",
                "description": "Federated learning with a Lightning Trainer.",
            },
            args=spell_out_names(self.words),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds this package's own options."""
        parser.add_argument(
            "--dry-run", dest="dry_run", action="store_true", help="Show clients and cost, do not train."
        )

    def before_fit(self) -> None:
        """Adds the run record and the progress bar of rounds, or with ``--dry-run`` the callback that stops the run."""
        self._find_last()
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.config[self.subcommand].dry_run:
            self.trainer.num_sanity_val_steps = 0
            callbacks.append(DryRun())
        else:
            self._add_record()
        # Lightning adds its own progress bar by default; replace it, but not one that the user has chosen.
        configured = self.config[self.subcommand].trainer.callbacks or []
        configured = configured if isinstance(configured, list) else [configured]
        is_chosen = any("ProgressBar" in callback.class_path for callback in configured)
        if isinstance(self.trainer.strategy, FederatedStrategy) and not is_chosen:
            for index, callback in enumerate(callbacks):
                if isinstance(callback, ProgressBar):
                    callbacks[index] = FederatedProgressBar()

    def _add_record(self) -> None:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.trainer.loggers and not any(isinstance(callback, RunRecord) for callback in callbacks):
            callbacks.insert(0, RunRecord(command=self._command()))

    def _command(self) -> str:
        """The command that starts this run again."""
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return command_line(["-m", "lightning_fl", *self.words])
        return shlex.join(["lightning-fl", *self.words])

    def before_test(self) -> None:
        """Adds the run record, which adds the results to the run that wrote the checkpoint."""
        self._find_last()
        self._add_record()

    before_validate = before_predict = before_test

    def _find_last(self) -> None:
        """Finds ``--ckpt_path last`` among all runs below the logger's folder, not just in this run's new one."""
        given = self.config_init[self.subcommand]
        if given.ckpt_path != "last":
            if self.trainer.global_rank == 0:  # a silo may lack it, and is sent that of rank 0
                _check_checkpoint(given.ckpt_path)
            return
        logger = self.trainer.logger
        folder = Path(self.trainer.default_root_dir)
        if logger is not None and logger.save_dir is not None:
            folder = Path(logger.save_dir, str(logger.name or ""))
        kept = sorted(folder.rglob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
        found = [path for path in kept if path.name.startswith("last")] or kept
        if not found and self.trainer.global_rank != 0:
            given.ckpt_path = str(folder / "checkpoints" / "last.ckpt")  # a silo, to which rank 0 sends its file
            return
        if not found:
            raise ConfigurationError(
                f"--ckpt_path last found no checkpoint below {folder}. Name a checkpoint, or leave the option out to "
                "start from the first round."
            )
        given.ckpt_path = str(found[-1])
        print(f"checkpoint: {found[-1]}")

    def predict(self, **kwargs: Any) -> None:
        """Predicts, and saves the outputs of ``predict_step``, concatenated into one tensor if the shapes allow it."""
        found = self.trainer.predict(**kwargs)
        if not found:
            return
        shapes = [batch.shape[1:] if isinstance(batch, torch.Tensor) and batch.ndim else None for batch in found]
        are_joined = shapes[0] is not None and all(shape == shapes[0] for shape in shapes)
        folder = run_folder(self.trainer, None) if self.trainer.loggers else None
        rank = f"_rank{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = (folder or Path(self.trainer.default_root_dir)) / f"predictions{rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(found) if are_joined else found, path)  # type: ignore[arg-type]
        print(f"predictions: {path}")

    def after_fit(self) -> None:
        """Prints how to get a report on the run."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        records = [callback for callback in callbacks if isinstance(callback, RunRecord)]
        if records and records[0].path is not None and self.trainer.is_global_zero:
            print(f"A page about this run: lightning-fl report {records[0].path}")

    def before_instantiate_classes(self) -> None:
        """Refuses unknown strategy names before Lightning does, because its error would not list the federated ones."""
        check_strategy_name(self.config[self.subcommand].trainer.strategy)

    def instantiate_classes(self) -> None:
        """Creates the objects of the configuration; settings that their classes refuse are reported in one line."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if "Does not validate against any of the Union subtypes" not in str(error):
                raise
            raise ConfigurationError(in_one_line(str(error))) from error


def _check_checkpoint(path: str | None) -> None:
    """Refuses a checkpoint that does not exist, before anything else is done.

    Places such as ``s3://`` are left to Lightning, as are its words, such as ``best``.
    """
    is_a_file = path is not None and "://" not in path and path.endswith(".ckpt")
    if path is None or not is_a_file or Path(path).exists():
        return
    near = sorted(Path(path).parent.glob("*.ckpt"))
    there = f" {Path(path).parent} has {', '.join(found.name for found in near)}." if near else ""
    raise ConfigurationError(
        f"--ckpt_path {path} does not exist.{there} --ckpt_path last finds the last one below the logger's folder."
    )


def federated_strategy_names() -> list[str]:
    """The strategy names that this package has registered."""
    package = lightning_fl.__name__
    return sorted(
        name for name, entry in StrategyRegistry.items() if entry["strategy"].__module__.partition(".")[0] == package
    )


def check_strategy_name(strategy: Any) -> None:
    """Refuses a strategy name that is not registered.

    Args:
        strategy: The configuration's ``trainer.strategy``. Anything but a name passes.

    Raises:
        ValueError: If the name is unknown; the message lists the federated ones.
    """
    known = ["auto", *StrategyRegistry.available_strategies()]
    if not isinstance(strategy, str) or strategy.lower() in known:
        return
    close = difflib.get_close_matches(strategy.lower(), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigurationError(
        f"Unknown strategy {strategy!r}; expected one of {', '.join(federated_strategy_names())}, or a strategy of "
        f"Lightning such as 'auto' or 'ddp'.{hint}"
    )
