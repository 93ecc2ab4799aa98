"""Lightning's loops, changed so that an epoch is a round of several clients. Holds for lightning >= 2.6, < 2.7.

Besides ``internals.py`` and ``results.py``, only this module uses private parts of Lightning; ``tests/trainer`` fails
when they change.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, Timer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_fl.clients.local_work import BatchPosition
from lightning_fl.engines.optimizer_states import schedules_ahead_of_optimizers
from lightning_fl.strategies.internals import consulting
from lightning_fl.strategies.results import ClientResults, showing_last_batch

OUTSIDE_CLIENTS = BatchPosition(0)
"""The position while no client trains: a window of its own, so that nothing waits for more batches."""


class RoundEpochLoop(_TrainingEpochLoop):
    """Lightning's epoch loop, in which an epoch is a round of several clients.

    - One ``advance`` runs a whole round: the strategy's driver trains one client group after the other, and calls
      :meth:`train_batch` and :meth:`end_batch` for each batch, the two halves of what Lightning does in ``advance``.
    - ``max_steps`` and ``should_stop`` take effect at the round's end only, where all ranks decide together; so does
      validation.
    - Accumulation windows, the frequency of step schedules, ``batch_idx`` and ``trainer.is_last_batch`` are counted
      within a client's pass over its data, so that they do not depend on which rank trains it, or when. Only progress
      bars are given the batch's index in the round.
    - Epoch schedules step when the round is closed.
    - A rank without clients runs the round without the user's batch hooks.
    """

    position: BatchPosition
    """The current batch's position in its client's local work."""
    is_round_done: bool | None
    """Whether the round's last batch has been reached; None before a round has begun in this fit."""
    outputs: Any
    batch: Any
    batch_idx_in_round: int
    _held_rows: list[tuple[int, Any]] | None
    _held_counters: list[tuple[Any, dict[str, Any]]]

    def prepare(self) -> None:
        """Initializes what ``__init__`` would; it has run as Lightning's before :func:`adopt_loops` set the class."""
        self._results.__class__ = ClientResults
        self.position = OUTSIDE_CLIENTS
        self.is_round_done = None
        self.outputs = self.batch = None
        self.batch_idx_in_round = -1
        self._held_rows, self._held_counters = None, []

    @property
    def collected(self) -> ClientResults:
        """Lightning's collection of the values logged in training."""
        assert isinstance(self._results, ClientResults)
        return self._results

    # ---- when it ends

    def _num_ready_batches_reached(self) -> bool:
        if self.is_round_done is None:  # a checkpoint holds complete rounds only
            return self.batch_progress.current.ready > 0
        return self.is_round_done

    @property
    def _is_training_done(self) -> bool:
        return self._num_ready_batches_reached()

    @property
    def done(self) -> bool:
        return self._is_training_done and self._is_validation_done

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        # Without Lightning's other occasions, such as `should_stop` in mid-epoch: there is no global model to validate
        # then.
        return self._num_ready_batches_reached() and self._should_check_val_epoch()

    def _accumulated_batches_reached(self) -> bool:
        return self.position.ends_window

    def reset(self) -> None:
        fit_loop = self.trainer.fit_loop
        length = fit_loop.max_batches
        # A checkpoint holds whole rounds, so the round that it ended with had the batches that were counted. The plan
        # in force may be another round's, by which Lightning would take the round to be unfinished, or warn of it.
        fit_loop.max_batches = max(1, self.batch_progress.current.ready) if self.restarting else length
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
            super().reset()
        fit_loop.max_batches = length
        if not self.restarting:
            self.is_round_done = False

    # ---- a round

    def advance(self, data_fetcher: _DataFetcher) -> None:
        # The restart logic is Lightning's own. Lightning's broadcast of SIGTERM before each batch is left out on
        # purpose: ranks have different numbers of batches, so it would pair up different batches or hang.
        if self.restarting and self._should_check_val_fx(data_fetcher):
            if self.val_loop.restarted_mid_evaluation:
                return
            if self.restarted_on_last:
                self._skip_next_val = True
                return
            self.val_loop.increment_progress_to_evaluation_end()
        self.val_loop.restarting = False
        self.trainer.strategy.driver.run_round(self)  # type: ignore[attr-defined]

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        driver = self.trainer.strategy.driver  # type: ignore[attr-defined]
        driver.settle()
        with consulting(self.trainer, driver.may_consult):  # those that monitor a metric when validation ends
            super().on_advance_end(data_fetcher)

    def train_batch(self, batch: Any, position: BatchPosition, ends_round: bool) -> Any:
        """Trains on a batch with all of Lightning's hooks up to ``on_train_batch_end``.

        Args:
            batch: The batch as it was read.
            position: Its position in its client's local work.
            ends_round: Whether it is this rank's last batch of the round.

        Returns:
            What Lightning's optimization loop returns for the output of ``training_step``.
        """
        trainer = self.trainer
        module, connector = trainer.lightning_module, trainer._logger_connector
        self.position, self.is_round_done = position, ends_round
        self.batch_idx_in_round, self.outputs = self.batch_idx + 1, None
        self.batch_progress.is_last_batch = position.ends_epoch
        # From here on the calls and their order are those of Lightning's `advance`, on which callbacks and loggers
        # rely.
        batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
        self.batch = batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
        self.batch_progress.increment_ready()
        connector.on_batch_start(batch)
        if batch is None:
            self._warning_cache.warn("train_dataloader yielded None. If this was on purpose, ignore this warning...")
        else:
            self._start_hooks(batch, position.offset)
            self.batch_progress.increment_started()
            kwargs = self._build_kwargs(OrderedDict(), batch, position.offset)
            with trainer.profiler.profile("run_training_batch"):  # type: ignore[attr-defined]
                if module.automatic_optimization:
                    optimizer = trainer.optimizers[0]
                    self.outputs = self.automatic_optimization.run(optimizer, position.offset, kwargs)
                else:
                    self.outputs = self.manual_optimization.run(kwargs)
        self.batch_progress.increment_processed()
        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        return self.outputs

    def _start_hooks(self, batch: Any, batch_idx: int) -> None:
        trainer = self.trainer
        self._call_callbacks("on_train_batch_start", batch)
        response = call._call_lightning_module_hook(trainer, "on_train_batch_start", batch, batch_idx)
        call._call_strategy_hook(trainer, "on_train_batch_start", batch, batch_idx)
        # Lightning ends the epoch without `on_train_batch_end` and without validation then, on this rank alone; the
        # others would wait for it in the round's collectives.
        if response == -1:
            raise MisconfigurationException(
                f"Round {trainer.current_epoch} ended before its last batch. `on_train_batch_start` must not return -1 "
                "in a federation; use limit_train_batches or local_steps to train less."
            )

    def _call_callbacks(self, hook: str, *args: Any) -> None:
        """Calls a hook that sees a batch as Lightning's ``_call_callback_hooks`` does; progress bars show the round."""
        trainer, module, position = self.trainer, self.trainer.lightning_module, self.position
        before, module._current_fx_name = module._current_fx_name, hook
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            is_bar = isinstance(callback, ProgressBar)
            self.position = OUTSIDE_CLIENTS if is_bar else position
            with trainer.profiler.profile(f"[Callback]{callback.state_key}.{hook}"):  # type: ignore[attr-defined]
                index = self.batch_idx_in_round if is_bar else position.offset
                getattr(callback, hook)(trainer, module, *args, index)
        self.position, module._current_fx_name = position, before

    def end_batch(self) -> None:
        """Runs the hooks after a batch; those of the round's last batch after the round has been closed."""
        trainer, batch, outputs = self.trainer, self.batch, self.outputs
        self._call_callbacks("on_train_batch_end", outputs, batch)
        call._call_lightning_module_hook(trainer, "on_train_batch_end", outputs, batch, self.position.offset)
        self.batch = self.outputs = None
        trainer._logger_connector.on_batch_end()
        self.batch_progress.increment_completed()
        # After the round has been closed callbacks see the cohort's values; the loggers get those of the batch.
        with showing_last_batch(self._results):
            trainer._logger_connector.update_train_step_metrics()
        self._end_iteration()

    def skip_batch(self) -> None:
        """Counts a batch without training, because this rank has no batch (left) in the round."""
        self.position, self.is_round_done = OUTSIDE_CLIENTS, True
        self.batch_idx_in_round = self.batch_progress.current.ready
        self.batch_progress.is_last_batch = True
        self.batch_progress.increment_ready()
        self.trainer._logger_connector.on_batch_start(None)
        self.batch_progress.increment_started()
        self.batch_progress.increment_processed()

    def end_without_hooks(self) -> None:
        """Ends the round's last batch for Lightning's own callbacks only, because no others look at batches."""
        trainer, module = self.trainer, self.trainer.lightning_module
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            # Saving is a barrier in `Trainer.save_checkpoint` and `Timer` broadcasts its decision, so that a rank that
            # ends the round without a batch must take part.
            if isinstance(callback, Checkpoint | Timer):
                callback.on_train_batch_end(trainer, module, None, None, self.batch_idx_in_round)
        trainer._logger_connector.on_batch_end()
        self.batch_progress.increment_completed()
        # After the round has been closed callbacks see the cohort's values; the loggers get those of the batch.
        with showing_last_batch(self._results):
            trainer._logger_connector.update_train_step_metrics()

    # ---- the same without the hooks, for the tight loop

    def count_start(self, batch: Any, position: BatchPosition, ends_round: bool) -> None:
        """Counts a batch that begins outside Lightning's hooks; ``self.log`` in its step finds the batch."""
        self.position, self.is_round_done = position, ends_round
        self.batch_idx_in_round = self.batch_idx + 1
        self.batch_progress.is_last_batch = position.ends_epoch
        self.batch_progress.increment_ready()
        self.batch_progress.increment_started()
        connector, results = self.trainer._logger_connector, self._results
        # As `connector.on_batch_start` does, without its slow lookup of the active loop.
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch, results.batch_size, results.dataloader_idx = batch, None, None

    def count_trained(self) -> None:
        """Counts a batch that was trained outside Lightning's hooks, and its optimizer step."""
        self.batch_progress.increment_processed()
        if self.position.ends_window:
            step = self.automatic_optimization.optim_progress.optimizer.step
            step.increment_ready()
            step.increment_completed()
            # Most modules have no schedule, and this runs in every step of the tight loop.
            if self.trainer.lr_scheduler_configs:
                self.step_client_schedules()

    def count_end(self) -> None:
        """Counts the end of a batch, and logs its values if ``log_every_n_steps`` says so."""
        self.batch_progress.increment_completed()
        connector = self.trainer._logger_connector
        # Without loggers the values would be computed for nothing: progress bars are told once a group, by
        # `show_group`.
        if self.trainer.loggers and connector.should_update_logs:
            if self._held_rows is None:
                connector.update_train_step_metrics()
            elif self.position.ends_window:
                self._held_rows.append((self._batches_that_stepped, connector.metrics["log"]))
        self._end_iteration()

    # ---- a group of clients whose steps may have to be undone

    def hold(self) -> None:
        """Notes all counters, and keeps what is logged by step from the loggers until :meth:`release`."""
        self._held_rows = []
        progress = (
            self.batch_progress,
            self.scheduler_progress,
            self.automatic_optimization.optim_progress.optimizer.step,
        )
        owners = [self, *progress, *(own for each in progress for own in (each.total, each.current))]
        self._held_counters = [(own, {name: vars(own)[name] for name in _counters(own)}) for own in owners]

    def release(self) -> None:
        """Passes on to the loggers what was held back; the steps are not undone any more."""
        rows, self._held_rows, self._held_counters = self._held_rows or [], None, []
        step = self._batches_that_stepped
        for self._batches_that_stepped, metrics in rows:
            self.trainer._logger_connector.log_metrics(metrics)
        self._batches_that_stepped = step

    def rewind(self) -> None:
        """Undoes what was counted and held back since :meth:`hold`."""
        for owner, counters in self._held_counters:
            vars(owner).update(counters)
        self._held_rows, self._held_counters = None, []

    def show_group(self) -> None:
        """Lets progress bars advance by the batches of a client group, at its last one."""
        trainer, module = self.trainer, self.trainer.lightning_module
        if self._results:
            trainer._logger_connector.on_batch_end()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ProgressBar):
                callback.on_train_batch_end(trainer, module, None, None, self.batch_idx_in_round)

    def _end_iteration(self) -> None:
        if self.is_round_done:
            return  # Lightning does it, once the global model has been validated
        if self.position.ends_window:
            self._batches_that_stepped += 1
        self._save_loggers_on_train_batch_end()
        if self.trainer.received_sigterm:
            raise SIGTERMException
        self.on_iteration_done()

    # ---- within a client

    def _build_kwargs(self, kwargs: OrderedDict, batch: Any, batch_idx: int) -> OrderedDict:
        return super()._build_kwargs(kwargs, batch, self.position.offset)

    def update_lr_schedulers(self, interval: str, update_plateau_schedulers: bool) -> None:
        # Lightning steps the other epoch schedules on the last batch, before there is a global model and not at all on
        # a rank without a batch; `step_epoch_schedules` does it when the round is closed.
        if interval == "epoch" and update_plateau_schedulers:
            self.step_plateau_schedules()
            # Nothing is left of the round that a run which resumes from here would miss.
            self.trainer.strategy.driver.end_round()  # type: ignore[attr-defined]
        elif interval == "step" and not update_plateau_schedulers and self.position.ends_window:
            self.step_client_schedules()

    def step_client_schedules(self) -> None:
        """Steps the schedules that step inside a client's local training."""
        # With manual optimization it is the module that steps its schedules, as in Lightning.
        if not self.trainer.lightning_module.automatic_optimization:
            return
        for config, schedule in self.trainer.strategy.driver.open_round.schedules:  # type: ignore[attr-defined]
            if config.interval == "step" and (self.position.offset + 1) % config.frequency == 0:
                self.scheduler_progress.increment_ready()
                schedule.take_step()
                self.scheduler_progress.increment_completed()

    def step_epoch_schedules(self) -> None:
        """Steps the schedules that step once a round."""
        with schedules_ahead_of_optimizers():
            self._update_learning_rates("epoch", update_plateau_schedulers=False)

    def step_plateau_schedules(self) -> None:
        """Steps the schedules that monitor a metric, once a round."""
        strategy: Any = self.trainer.strategy
        configs = strategy.lr_scheduler_configs
        strategy.lr_scheduler_configs = [
            config
            for config in configs
            if not config.reduce_on_plateau or strategy.driver.may_consult(config.scheduler, config.monitor)
        ]
        try:
            super().update_lr_schedulers("epoch", update_plateau_schedulers=True)
        finally:
            strategy.lr_scheduler_configs = configs

    def set_global_step(self, step: int) -> None:
        """Sets ``trainer.global_step``, which Lightning counts per process, so that all ranks agree."""
        # Lightning reads the one or the other, depending on `automatic_optimization`, so both are kept equal.
        for total in (
            self.automatic_optimization.optim_progress.optimizer.step.total,
            self.manual_optimization.optim_step_progress.total,
        ):
            total.ready = total.completed = step


class RoundOptimization(_AutomaticOptimization):
    """Automatic optimization that zeroes the gradients at the start of a client's accumulation window."""

    def _make_zero_grad_fn(self, batch_idx: int, optimizer: torch.optim.Optimizer) -> Callable[[], None] | None:
        # Lightning zeroes the gradients if the index is a multiple of the window, counted over the whole epoch, so that
        # a window would straddle two clients. 0 is such a multiple, and 1 never is.
        window_idx = 0 if self.trainer.fit_loop.epoch_loop.position.starts_window else 1  # type: ignore[attr-defined]
        return super()._make_zero_grad_fn(window_idx if self.trainer.accumulate_grad_batches > 1 else 0, optimizer)


class RoundFitLoop(_FitLoop):
    """Lightning's fit loop, in which ``limit_train_batches`` applies to each client.

    While a client trains, ``trainer.num_training_batches`` is the length of its own pass, whichever rank trains it.

    ``trainer.estimated_stepping_batches`` multiplies ``max_batches`` by the epochs. Until training starts, it must get
    the batches of the largest client, on which schedules depend, and not the sum over a rank's clients.
    """

    @property
    def max_batches(self) -> int | float:
        # Lightning's `__init__` has stored the value in the instance, and a property takes precedence over it, so that
        # the value can stay where it is when `adopt_loops` changes the class.
        driver = getattr(self.trainer.strategy, "driver", None)
        if driver is None or self._is_read_by_loop:
            return self.__dict__["max_batches"]
        if not driver.has_started:
            return driver.largest_num_batches()
        position = self.epoch_loop.position  # type: ignore[attr-defined]
        if position is OUTSIDE_CLIENTS:
            return self.__dict__["max_batches"]
        return float("inf") if position.epoch_length is None else position.epoch_length

    @max_batches.setter
    def max_batches(self, value: int | float) -> None:
        self.__dict__["max_batches"] = value

    @property
    def _is_read_by_loop(self) -> bool:
        return self.__dict__.get("is_read_by_loop", False)

    @contextmanager
    def _read_by_loop(self) -> Iterator[None]:
        """Inside the block, ``max_batches`` is the loop's own value."""
        before, self.__dict__["is_read_by_loop"] = self._is_read_by_loop, True
        try:
            yield
        finally:
            self.__dict__["is_read_by_loop"] = before

    @property
    def done(self) -> bool:
        with self._read_by_loop():
            return super().done

    def on_advance_start(self) -> None:
        # Before the hooks of the epoch's start, which see the round's number and model.
        self.trainer.strategy.driver.open_next()  # type: ignore[attr-defined]
        super().on_advance_start()

    def on_advance_end(self) -> None:
        driver = self.trainer.strategy.driver  # type: ignore[attr-defined]
        # In the epoch with which a run resumes, Lightning leaves out the schedules that need a metric; the federation's
        # checkpoint has the metrics.
        if driver.ends_round:
            self._restarting = False
        with consulting(self.trainer, driver.may_consult):
            super().on_advance_end()
        # Last, because `on_train_epoch_end`, which the base class calls, may set `should_stop` on one rank only.
        driver.agree_to_stop()

    def end_resumed_round(self) -> None:
        """Does what was left of the round after whose training the checkpoint was written."""
        # Where validation was the last that happened, Lightning goes on with the end of the epoch itself.
        if not self.restarted_mid_epoch:
            # The round's own number: schedules with a frequency count by it.
            self.epoch_progress.current.completed -= 1
            self.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            self.epoch_progress.current.completed += 1

    def setup_data(self) -> None:
        strategy: Any = self.trainer.strategy
        # Lightning would cut this rank's round off at the limit, which here applies to one pass of each client. The
        # driver applies it, so Lightning must see a limit that has no effect.
        limit, self.trainer.limit_train_batches = self.trainer.limit_train_batches, 1.0
        # An interval other than 1.0 is allowed only where nothing is validated.
        interval = getattr(self.trainer, "val_check_interval", 1.0)
        self.trainer.val_check_interval = 1.0
        strategy.limit_train_batches = limit
        try:
            with strategy.local_phase(), self._read_by_loop():
                super().setup_data()
        finally:
            self.trainer.limit_train_batches, self.trainer.val_check_interval = limit, interval
        # Lightning asks a loader for its length only once, but a round's length changes with its cohort.
        if self._combined_loader is not None and strategy.driver is not None:
            strategy.driver.set_length()


class RoundEvaluationLoop(_EvaluationLoop):
    """Lightning's evaluation loop, with metrics that are joined over the ranks before Lightning reads them.

    The loaders are set up without collectives: Lightning compares their lengths over the ranks one by one, but silos
    may have different numbers of loaders.
    """

    def setup_data(self) -> None:
        last = self._combined_loader
        with self.trainer.strategy.local_phase():  # type: ignore[attr-defined]
            super().setup_data()
        # Only where loaders have been made anew: the check is a collective, and all ranks make theirs at the same time.
        if self._combined_loader is not last:
            num_loaders = sum(num_batches > 0 for num_batches in self._max_batches)
            self.trainer.strategy.check_evaluation_data(num_loaders)  # type: ignore[attr-defined]

    def _store_dataloader_outputs(self) -> None:
        with self.trainer.strategy.evaluation_metrics.merged(self._results):  # type: ignore[attr-defined]
            super()._store_dataloader_outputs()

    def _on_evaluation_epoch_end(self) -> None:
        # Before the user's epoch-end hooks, in which torchmetrics are computed and collectives concern all ranks again.
        self.trainer.strategy.end_evaluation()  # type: ignore[attr-defined]
        super()._on_evaluation_epoch_end()


_OF_LOOP = ("position", "is_round_done", "batch_idx_in_round", "_batches_that_stepped")


def _counters(owner: Any) -> Iterable[str]:
    """The names of what counts in a loop, or in one of its records of progress."""
    if isinstance(owner, RoundEpochLoop):
        return _OF_LOOP
    return [name for name, value in vars(owner).items() if isinstance(value, int)]


def adopt_loops(trainer: Trainer) -> None:
    """Turns the Trainer's loops into those above; a Trainer does not accept custom loops."""
    epoch_loop = trainer.fit_loop.epoch_loop
    # The class is changed in place, because the Trainer's connectors and the loops themselves already refer to these
    # objects.
    trainer.fit_loop.__class__ = RoundFitLoop
    epoch_loop.__class__ = RoundEpochLoop
    epoch_loop.automatic_optimization.__class__ = RoundOptimization
    assert isinstance(epoch_loop, RoundEpochLoop)
    epoch_loop.prepare()
    for loop in (epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        loop.__class__ = RoundEvaluationLoop
