"""Warnings about clients and their data during training."""

from __future__ import annotations

import math
import multiprocessing
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_fl.federation import RankReport, RoundResult
from lightning_fl.federation.metric_entries import Entries
from lightning_fl.federation.server import some
from lightning_fl.strategies.logged_values import monitor_names
from lightning_fl.types import ClientId

# Weak, because to remember a module must not keep its tensors in memory.
_TRAINED: WeakSet[nn.Module] = WeakSet()
"""Modules that have been trained with hidden clients."""


def _refused(round: int, clients: Sequence[ClientId]) -> str:
    return (
        f"Round {round}: the updates of {', '.join(map(repr, clients))} hold NaN or Inf and were left out. Lower the "
        "learning rate, clip gradients, or check these clients' data."
    )


def _spawns(loader: Any) -> bool:
    context = getattr(loader, "multiprocessing_context", None) or multiprocessing.get_context()
    return context.get_start_method() != "fork"


class UserWarnings:
    """Warnings about clients and their data, each given once unless it is about a single round."""

    def __init__(self) -> None:
        self._given: set[object] = set()

    def deferred_checkpoint(self) -> None:
        """Warns that a checkpoint requested inside a round is deferred."""
        if self._is_new("deferred"):
            rank_zero_warn("A checkpoint asked for inside a round is written at its end, when there is a global model.")

    def personal(self, trainer: L.Trainer, personal: Sequence[str]) -> None:
        """Warns that the global model is validated with the start values of personal tensors."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if not any(getattr(c, "evaluates_clients", False) for c in callbacks) and self._is_new("personal"):
            rank_zero_warn(
                f"The tensors personal={list(personal)} live with the clients; validation of the global model uses "
                "their common start values. fl.callbacks.PersonalizedEvaluation evaluates each client's model."
            )

    def loader(self, loader: Any) -> None:
        """Warns of a loader whose random numbers are not those of the round, or whose workers start too slowly."""
        if getattr(loader, "persistent_workers", False) and self._is_new("persistent workers"):
            rank_zero_warn(
                "A client's loader has persistent_workers=True: their random numbers are not those of the round and "
                "client, so runs may not repeat. Leave it out."
            )

        if getattr(loader, "num_workers", 0) and _spawns(loader) and self._is_new("spawned workers"):
            rank_zero_warn(
                f"The client loaders have num_workers={loader.num_workers}. Workers start anew for each client, and "
                "here as new Python processes (start method 'spawn' or 'forkserver'), each of which first imports "
                "torch: seconds per client. Set num_workers=0, which is faster unless reading is slow, or where no "
                "threads are about multiprocessing_context='fork'."
            )

    def data(self, round: int, reports: Sequence[RankReport]) -> None:
        """Warns of clients without data and of loaders that raised."""
        joined = RankReport.join(reports)
        for client in joined.empty:
            if self._is_new(("empty", client)):
                rank_zero_warn(
                    f"Client {client!r} has no data: its loader yields no batch, so it takes no part. Leave it out, "
                    "give it data, or check `drop_last` and the batch size."
                )
        for client, error in joined.failed:
            rank_zero_warn(f"Round {round}: the loader of client {client!r} raised {error}, so it was left out.")

    def same_data(self, num_ranks: int) -> None:
        """Warns of silos with the same data."""
        rank_zero_warn(
            f"All {num_ranks} ranks trained on the same first batch. Started by a launcher, each rank is a silo "
            "with its own data. To split one data set among simulated clients, give num_clients or partition."
        )

    def untold_failures(self, round: int, failed: Mapping[ClientId, str]) -> None:
        """Warns, on this rank only, of its loaders that raised, whose errors the other ranks are not told."""
        for client, error in failed.items():
            warnings.warn(
                f"Round {round}: the loader of client {client!r} raised {error}, so it was left out. The other ranks "
                "do not see this error.",
                stacklevel=2,
            )

    def result(self, round: int, result: RoundResult) -> None:
        """Warns of refused updates, and of frozen parameters that move; informs of empty and last rounds."""
        if result.report.refused:
            rank_zero_warn(_refused(round, result.report.refused))
        if result.unsent:
            rank_zero_warn(
                f"Round {round}: training has changed frozen parameters for the first time ({some(result.unsent)}). "
                "They are back at the round's start; from the next round on they are averaged like buffers."
            )
        if not result.aggregate.num_clients:
            rank_zero_info(f"Round {round}: no client takes part.")
        if result.closing.stop_reason is not None:
            rank_zero_info(result.closing.stop_reason)

    def put_back(self, paths: Collection[str]) -> None:
        """Names, once, what clients' training has changed in the module and what then was put back."""
        new = sorted(path for path in paths if self._is_new(("put back", path)))
        if new:
            names = ", ".join(f"self.{path}" for path in new[:8]) + (", ..." if len(new) > 8 else "")
            rank_zero_info(
                f"Each client starts with {names} as they were when the round started: what training changes in the "
                "module outside its state_dict is put back, so that it does not reach other clients or rounds. What is "
                "to last from round to round is a buffer in the state_dict, which is averaged; what is to be summed up "
                "over clients is logged with self.log, or a torchmetric."
            )

    def put_back_after_round(self, round: int, names: Sequence[str]) -> None:
        """Warns, once, of what a hook has written to the global model after the round's last batch."""
        if names and self._is_new("put back after the round"):
            rank_zero_warn(
                f"on_train_batch_end has changed {some(names)} after the last batch of round {round}, when the module "
                "held the global model. It was put back, because nothing clips such a change or adds noise to it. What "
                "the hook does after all other batches is part of the clients' updates."
            )

    def optimizer_state(self, round: int) -> None:
        """Warns, once, of a change to the state of an optimizer between rounds, which reaches no client."""
        if self._is_new("optimizer state"):
            rank_zero_warn(
                f"The state of an optimizer was changed before round {round}, which has no effect: each client starts "
                "with a fresh state, or with client_optimizer='keep' with its own. What is to change each client's "
                "state belongs in on_client_start of a FederatedCallback."
            )

    def not_consulted(self, round: int, judge: str, metric: str) -> None:
        """Informs that a callback or a schedule is not consulted in a round that has not measured what it monitors."""
        if self._is_new(("not consulted", round, judge)):
            rank_zero_info(
                f"Round {round}: {judge} is not consulted, because no client took part and {metric!r} was not measured."
            )

    def max_steps(self, trainer: L.Trainer, configs: Sequence[Any], report: RankReport) -> None:
        """Warns of schedules by step that may have been made for ``max_steps``, which the steps of all clients use up.

        Args:
            trainer: The Trainer.
            configs: Lightning's records of the schedules that step inside local training.
            report: The reports of all ranks of a round, joined.
        """
        limit, end, last = trainer.max_steps, report.schedule_end, trainer.max_epochs
        if limit < 1 or end is None or not any(end.num_steps) or report.num_steps <= end.num_optimizer_steps:
            return
        rounds = math.ceil(limit / report.num_steps)
        if last is not None and 0 <= last < rounds:
            return
        for config, steps in zip(configs, end.num_steps, strict=True):
            found = (getattr(config.scheduler, name, None) for name in ("total_steps", "T_max", "total_iters"))
            total, reach = next((own for own in found if own is not None), limit), rounds * steps
            if total > reach and self._is_new(("max_steps", type(config.scheduler))):
                rank_zero_warn(
                    f"max_steps={limit} counts the steps of all clients, {report.num_steps} in this round, so the run "
                    f"ends after about {rounds} rounds. {type(config.scheduler).__name__} goes on with the largest "
                    f"client only and will have taken about {reach} steps, fewer than the {total} that it may be made "
                    "for. Give max_epochs in place of max_steps: trainer.estimated_stepping_batches then counts the "
                    f"largest client's steps. Or make the schedule for {reach} steps."
                )

    def untold_refusals(self, round: int, clients: Sequence[ClientId]) -> None:
        """Warns, on this rank only, of its updates that were refused."""
        if clients:
            warnings.warn(_refused(round, clients) + " The other ranks do not see this warning.", stacklevel=2)

    def monitors(self, trainer: L.Trainer, logged: Entries) -> None:
        """Warns of callbacks and schedules that monitor an exact figure of data which differential privacy protects."""
        names = monitor_names(logged)
        schedules = [(config.scheduler, config.monitor) for config in trainer.lr_scheduler_configs if config.monitor]
        callbacks = [(c, getattr(c, "monitor", None)) for c in trainer.callbacks]  # type: ignore[attr-defined]
        for judge, monitor in [*schedules, *callbacks]:
            if monitor in names and self._is_new(("monitor", type(judge), monitor)):
                rank_zero_warn(
                    f"{type(judge).__name__} decides by {monitor!r}, an exact figure of the clients' own data: its "
                    "choices, and so the models, reveal more of the data than epsilon accounts for. Monitor a metric "
                    "of public validation data instead."
                )

    def new_ledger(self, module: nn.Module) -> None:
        """Warns if hidden clients train a module that has been trained before, whose spent epsilon is not known."""
        if module in _TRAINED:
            rank_zero_warn(
                "This module has been trained with differential privacy before, and its epsilon starts at 0 again, "
                "without what was spent before. Add the ledgers, resume with fit(ckpt_path=...), or "
                "start with a new module."
            )
        _TRAINED.add(module)

    def words(self, trainer: L.Trainer, words: Mapping[str, str]) -> None:
        """Logs a round's text values as hyper-parameters, if they are new."""
        if words and self._is_new(tuple(words.items())):
            for logger in trainer.loggers:
                logger.log_hyperparams(dict(words))

    def _is_new(self, about: object) -> bool:
        is_new = about not in self._given
        self._given.add(about)
        return is_new
