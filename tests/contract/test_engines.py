"""Every way of training clients gives the same: a new engine or form of a step is one entry in ``FORMS``.

The reference trains each client alone, with each batch passing Lightning's hooks. The tight loop must give the same bit
for bit, logged means to rounding; clients side by side to rounding; and one client that keeps its optimizer what a
plain Trainer gives.
"""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from rich.console import Console

import lightning_fl as fl
from lightning_fl.callbacks import FederatedCallback, FederatedProgressBar
from lightning_fl.engines import LocalTrainer, SequentialEngine
from lightning_fl.federation import ClientTask
from lightning_fl.strategies import batch_steps, engine_selection
from lightning_fl.strategies.logged_values import LoggedValues
from lightning_fl.strategies.loops import RoundEpochLoop
from tests.contract.engine_runs import (
    FORMS,
    OF_GROUPS,
    OF_STEPS,
    REFERENCE,
    SEEN,
    ClipsFromRoundOne,
    Counting,
    Entry,
    EpochLogging,
    Fit,
    Frozen,
    Logging,
    Mappings,
    NotedOrdinary,
    NotedPlain,
    OnDicts,
    Poisoned,
    Random,
    Skipping,
    StepLogging,
    Stream,
    Tied,
    WithoutIndex,
    assert_plain,
    assert_same,
    clients_of,
    clients_with_missing_batches,
    failing_clients,
    poisoned_clients,
    scaling,
    scheduled,
)
from tests.helpers.training import Plain, image_clients, loader, trainer, weights

ENTRIES = {
    "logging": Entry(plain=True, rounds=3),
    "logging every third step": Entry(trainer={"log_every_n_steps": 3}, plain=True, rounds=3),
    "logging by step only": Entry(StepLogging),
    "logging by epoch only": Entry(EpochLogging, plain=True, rounds=3),
    "logging by epoch only, unequal work": Entry(EpochLogging, data=lambda: image_clients((7, 5, 7, 2, 7))),
    "an ordinary module": Entry(NotedOrdinary, data=lambda: image_clients((7, 5, 7, 2, 7), validate=True)),
    "without batch_idx": Entry(WithoutIndex, plain=True),
    "buffers": Entry(Counting, plain=True),
    "frozen": Entry(Frozen, plain=True),
    "tied": Entry(Tied, plain=True),
    "skipped batches": Entry(Skipping, groups=False, plain=True, warns="returned `None`"),
    "skipped batches with accumulation": Entry(
        Skipping, {"accumulate_grad_batches": 2}, groups=False, plain=True, warns="returned `None`"
    ),
    "accumulation": Entry(trainer={"accumulate_grad_batches": 2}, data=lambda: image_clients((11, 9, 11)), plain=True),
    "accumulation, logging every third step": Entry(
        trainer={"accumulate_grad_batches": 2, "log_every_n_steps": 3}, data=lambda: image_clients((11, 9, 11))
    ),
    "clipping by norm": Entry(trainer={"gradient_clip_val": 0.05}, plain=True),
    "clipping by value": Entry(trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, plain=True),
    "clipping from the second round": Entry(fresh=lambda: {"callbacks": [ClipsFromRoundOne()]}, rounds=3, plain=True),
    "missing batches": Entry(data=clients_with_missing_batches, groups=False, warns="yielded None"),
    "missing batches with accumulation": Entry(
        trainer={"accumulate_grad_batches": 2}, data=clients_with_missing_batches, groups=False, warns="yielded None"
    ),
    "schedule by step": Entry(scheduled("step"), plain=True),
    "schedule by every second step": Entry(scheduled("step", 2), data=lambda: image_clients((11, 9, 11)), plain=True),
    "schedule by step with accumulation": Entry(
        scheduled("step"), {"accumulate_grad_batches": 2}, data=lambda: image_clients((11, 9, 11)), plain=True
    ),
    "schedule by epoch": Entry(scheduled("epoch"), plain=True, rounds=3),
    "schedule by every second epoch": Entry(scheduled("epoch", 2), plain=True, rounds=3),
    "precision 64-true": Entry(lambda: Logging(torch.float32), {"precision": "64-true"}, plain=True),
    "precision bf16-true": Entry(lambda: Logging(torch.float32), {"precision": "bf16-true"}, rtol=0.05),
    "precision bf16-mixed": Entry(
        lambda: Logging(torch.float32), {"precision": "bf16-mixed"}, groups=False, plain=True, rtol=1e-5
    ),
    "precision 16-mixed": Entry(lambda: Logging(torch.float32), fresh=scaling, groups=False, rounds=3),
    "precision 16-mixed, skipped batches": Entry(
        lambda: Skipping(torch.float32), fresh=scaling, groups=False, warns="returned `None`"
    ),
    "precision 16-mixed, skipped batches with accumulation": Entry(
        lambda: Skipping(torch.float32), {"accumulate_grad_batches": 2}, fresh=scaling, groups=False, warns="`None`"
    ),
    "precision 16-mixed, clipping": Entry(
        lambda: Logging(torch.float32), {"gradient_clip_val": 0.05}, fresh=scaling, groups=False
    ),
    "float32": Entry(lambda: Logging(torch.float32), rtol=1e-5, plain=True),
    "fedprox": Entry(strategy={"algorithm": fl.algorithms.FedProx(1.0)}, trainer={"gradient_clip_val": 0.05}),
    "scaffold": Entry(strategy={"algorithm": "scaffold"}, rounds=3),
    "perfedavg": Entry(strategy={"algorithm": fl.algorithms.PerFedAvg(0.1)}),
    "ditto": Entry(strategy={"algorithm": "ditto"}, groups=False),
    "mimelite": Entry(strategy={"algorithm": "mimelite"}, groups=False),
    "personal": Entry(strategy={"personal": ["net.3.*"]}),
    "kept optimizers": Entry(scheduled("step"), strategy={"client_optimizer": "keep"}, groups=False),
    "cohorts": Entry(strategy={"clients_per_round": 3}, rounds=3),
    "local steps": Entry(strategy={"local_steps": 3}),
    "local epochs": Entry(strategy={"local_epochs": 2}),
    "uneven work": Entry(
        NotedPlain, strategy={"local_epochs": fl.clients.Between(1, 3)}, data=lambda: image_clients([7] * 12)
    ),
    "limit_train_batches": Entry(trainer={"limit_train_batches": 1}, plain=True),
    "a share of the batches": Entry(trainer={"limit_train_batches": 0.5}, data=lambda: image_clients((11, 9, 11))),
    "overfit_batches": Entry(trainer={"overfit_batches": 1}),
    "max_steps": Entry(trainer={"max_steps": 12, "max_epochs": -1}),
    "stragglers": Entry(strategy={"stragglers": fl.clients.Stragglers(0.5)}, data=lambda: image_clients([7] * 8)),
    "fednova": Entry(scheduled("step"), strategy={"algorithm": "fednova"}),
    "fedrep": Entry(strategy={"algorithm": "fedrep", "personal": ["net.3.*"]}, groups=False),
    "random numbers": Entry(Random, groups=False),
    "batches that are mappings": Entry(OnDicts, data=clients_of(Mappings)),
    "loaders without length": Entry(data=clients_of(Stream), groups=False),
    "loaders without length, with accumulation": Entry(
        scheduled("step"), {"accumulate_grad_batches": 2}, data=clients_of(Stream), groups=False
    ),
    "an empty client": Entry(data=lambda: image_clients((7, 0, 7, 7)), warns="Client 1 has no data"),
    "a refused client": Entry(Poisoned, data=poisoned_clients, warns="NaN or Inf"),
    "a loader that fails at once": Entry(
        data=lambda: failing_clients(0), strategy={"on_client_error": "skip"}, warns="the file is damaged"
    ),
    "a loader that fails in training": Entry(
        data=lambda: failing_clients(5), strategy={"on_client_error": "skip"}, warns="the file is damaged", groups=False
    ),
}


HOOKED_GROUPS = ("logging", "an ordinary module", "accumulation", "clipping by norm", "schedule by step", "personal")
"""Entries for which the default run trains hooked groups too; it trains the two halves of that form anyway."""


def param(name: str, form: str) -> Any:
    is_slow = form == "hooked group" and name not in HOOKED_GROUPS
    return pytest.param(ENTRIES[name], form, id=f"{name}-{form}", marks=[pytest.mark.slow] if is_slow else [])


@pytest.fixture(scope="module")
def reference() -> Any:
    """The fit of an entry in the reference form, made once."""
    fits: dict[int, Fit] = {}

    def of(entry: Entry) -> Fit:
        if id(entry) not in fits:
            fits[id(entry)] = entry.fit(REFERENCE)
        return fits[id(entry)]

    return of


@pytest.mark.parametrize(
    ("entry", "form"),
    [
        param(name, form)
        for name, entry in ENTRIES.items()
        for form, how in FORMS.items()
        if form != REFERENCE and (entry.groups or not how.is_group)
    ],
)
@pytest.mark.spread(8)
def test_every_form_gives_what_the_reference_gives(entry: Entry, form: str, reference: Any) -> None:
    assert_same_as_reference(entry.fit(form), entry, form, reference(entry))


def assert_same_as_reference(found: Fit, entry: Entry, form: str, reference: Fit) -> None:
    if FORMS[form].is_group:
        assert_same(found, reference, OF_GROUPS, entry.rtol)
    else:
        assert_same(found, reference)


@pytest.mark.parametrize("name", [*HOOKED_GROUPS, "logging every third step", "logging by step only"])
@pytest.mark.spread(2)
def test_both_forms_of_a_groups_step_tell_the_loggers_the_same(name: str) -> None:
    tight, hooked = (ENTRIES[name].fit(form) for form in ("group", "hooked group"))
    assert_same(tight, hooked, (*OF_GROUPS, "rows", "progress"))


@pytest.mark.parametrize(
    ("entry", "form"),
    [param(name, form) for name, entry in ENTRIES.items() if entry.plain for form in ("hooked", "tight")],
)
@pytest.mark.spread(11)
def test_one_client_that_keeps_its_optimizer_is_a_plain_trainer(entry: Entry, form: str) -> None:
    alone = replace(entry, strategy={"client_optimizer": "keep"}, data=lambda: fl.datamodules.ClientLoaders([loader()]))
    assert_plain(alone.fit(form), entry.fit_plain(loader()), entry.rounds, entry.rtol)


# ---- several ranks


def fit_on_rank(name: str, form: str) -> Fit:
    return ENTRIES[name].fit(form)


@pytest.mark.parametrize("name", ["logging", "cohorts", "an ordinary module", "schedule by step"])
@pytest.mark.spread(1)
def test_the_forms_agree_on_two_ranks(name: str, run_ranks: Any, reference: Any) -> None:
    """With cohorts of three clients, a rank has sometimes one and sometimes two."""
    entry = ENTRIES[name]
    hooked, tight = (run_ranks(2, fit_on_rank, name, form) for form in ("hooked", "tight"))
    for own, expected in zip(tight, hooked, strict=True):
        assert_same(own, expected)
        one_rank = reference(entry)
        assert_same(own, one_rank, ("weights", "metrics", "rounds", "counters"), entry.rtol)


# ---- a fit that stops and goes on under another form


RESUMED = {
    "logging": ENTRIES["logging"],
    "an ordinary module": ENTRIES["an ordinary module"],
    "scaffold": ENTRIES["scaffold"],
    "kept optimizers": ENTRIES["kept optimizers"],
    "personal": ENTRIES["personal"],
}


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("entry", "first", "second"),
    [
        pytest.param(
            entry, first, second, id=f"{name}-{first}-{second}", marks=[pytest.mark.slow] if first == "tight" else []
        )
        for name, entry in RESUMED.items()
        for first, second in [("hooked", "tight"), ("tight", "hooked"), ("tight", "group"), ("group", "tight")]
        if entry.groups or not (FORMS[first].is_group or FORMS[second].is_group)
    ],
)
@pytest.mark.spread(3)
def test_a_checkpoint_of_one_form_goes_on_in_another(entry: Entry, first: str, second: str) -> None:
    entry = replace(entry, rounds=3)
    whole = entry.fit(REFERENCE)

    def saver(directory: str) -> ModelCheckpoint:
        return ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)

    entry.fit(first, enable_checkpointing=True, callbacks=[saver("first")])
    saved = {"enable_checkpointing": True, "ckpt_path": "first/epoch=1.ckpt"}
    resumed = entry.fit(second, callbacks=[saver("second")], **saved)
    has_group = FORMS[first].is_group or FORMS[second].is_group
    names = ("weights", "metrics", "bar", "counters", "history", "states")
    assert_same(resumed, whole, names, entry.rtol if has_group else 0.0)
    if not has_group:
        last = replace(whole, rows=whole.rows[-len(resumed.rows) :], seen=whole.seen[-len(resumed.seen) :])
        assert_same(resumed, last, ("rows", "seen"))


# ---- Lightning's callbacks that the tight loop serves by client group


CALLBACKS: dict[str, tuple[Callable[[], L.Callback], dict[str, Any]]] = {
    "checkpoints by step": (
        lambda: ModelCheckpoint("saved", filename="{step}", every_n_train_steps=7, save_top_k=-1),
        {"enable_checkpointing": True},
    ),
    "checkpoint of the best round": (
        lambda: ModelCheckpoint("saved", filename="{epoch}", monitor="by_epoch", save_top_k=1),
        {"enable_checkpointing": True},
    ),
    "early stopping": (lambda: EarlyStopping("by_epoch", patience=1, min_delta=10.0), {"max_epochs": 5}),
    "learning rates by epoch": (lambda: LearningRateMonitor("epoch"), {}),
    "accumulation that changes": (lambda: GradientAccumulationScheduler({0: 1, 1: 2}), {}),
    "a timer": (lambda: Timer(timedelta(milliseconds=1)), {"max_epochs": 5}),
    "max_time": (lambda: Nothing(), {"max_epochs": 5, "max_time": timedelta(milliseconds=1)}),
}


class Nothing(L.Callback):
    """Does nothing."""


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.spread(2)
def test_callbacks_act_alike_in_both_forms(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make, options = CALLBACKS[name]
    entry = ENTRIES["an ordinary module"] if "rates" in name else ENTRIES["logging"]
    fits, files = [], []
    for form in ("hooked", "tight"):
        (tmp_path / form).mkdir()
        monkeypatch.chdir(tmp_path / form)
        fits.append(entry.fit(form, **options, callbacks=[make()]))
        files.append(
            sorted(str(path.relative_to(tmp_path / form)) for path in Path("saved").absolute().rglob("*.ckpt"))
        )
    # Once training is to stop, Lightning logs every step, and the tight loop looks at the time at the round's end.
    names = [part for part in OF_STEPS if part != "rows" or "time" not in name]
    assert_same(fits[1], fits[0], names)
    assert files[1] == files[0]
    assert bool(files[0]) == ("checkpoint" in name)
    stops = {"early stopping": 2, "a timer": 1, "max_time": 1}
    assert fits[0].counters["epoch"] == stops.get(name, entry.rounds)


# ---- errors and interruptions


class Returns(Plain):
    """Returns something else than a loss."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)
        return self.output


@pytest.mark.parametrize("form", ["hooked", "tight"])
@pytest.mark.parametrize("output", [{"logits": 1.0}, {"loss": None}, "loss", 1.0], ids=str)
def test_what_is_no_loss_is_refused(form: str, output: Any) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match=r"loss|must return a Tensor"):
        Entry(lambda: Returns(output)).fit(form)


class Interrupts(Logging):
    """Raises, or gets a signal, in a step of the second round."""

    def __init__(self, cause: BaseException | signal.Signals) -> None:
        super().__init__()
        self.cause = cause

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 1 and len(SEEN) == 14:
            if isinstance(self.cause, BaseException):
                raise self.cause
            os.kill(os.getpid(), self.cause)
        return super().training_step(batch, batch_idx)


class AtTheEnd(L.Callback):
    """Notes what an interrupted fit leaves."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        strategy: Any = trainer.strategy
        self.left = weights(pl_module), trainer.global_step, len(strategy.history), dict(strategy.driver.state.server)


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (KeyboardInterrupt(), SystemExit),
        (RuntimeError("a user's error"), RuntimeError),
        (signal.SIGTERM, SIGTERMException),
        (signal.SIGINT, SystemExit),
    ],
    ids=["KeyboardInterrupt", "an error", "SIGTERM", "SIGINT"],
)
@pytest.mark.parametrize("form", ["hooked", "tight"])
@pytest.mark.spread(3)
def test_an_interrupted_round_is_dropped(form: str, cause: Any, expected: type[BaseException]) -> None:
    one_round = Entry(rounds=1).fit(REFERENCE)
    watch = AtTheEnd()
    with pytest.raises(expected):
        Entry(lambda: Interrupts(cause), rounds=3).fit(form, callbacks=[watch])
    values, global_step, num_rounds, server = watch.left
    assert torch.equal(values, one_round.weights)
    assert (global_step, num_rounds) == (one_round.counters["global_step"], 1)
    torch.testing.assert_close(server, one_round.states["server"], rtol=0, atol=0)


# ---- progress bars, which are told by client group


def positions(bar: Any, form: str, sizes: Sequence[int]) -> list[tuple[float, float]]:
    """Where the bar of batches stood, and its total, after each client group and at the round's end."""
    seen: list[tuple[float, float]] = []

    class Look(FederatedCallback):
        def note(self) -> None:
            if isinstance(bar, TQDMProgressBar):
                seen.append((bar.train_progress_bar.n, bar.train_progress_bar.total))
            else:
                task = bar.progress.tasks[bar.train_progress_bar_id]
                seen.append((task.completed, task.total))

        def on_client_start(self, *args: Any) -> None:  # type: ignore[override]
            self.note()

        def on_train_epoch_end(self, *args: Any) -> None:
            self.note()

    how = FORMS[form]
    run = trainer(
        fl.FederatedStrategy(engine=how.engine), callbacks=[bar, Look(), *how.callbacks()], enable_progress_bar=True
    )
    run.fit(Plain(), image_clients(sizes))
    return seen


@pytest.mark.parametrize("form", ["hooked", "tight"])
@pytest.mark.parametrize("make", [TQDMProgressBar, RichProgressBar])
def test_the_bar_moves_with_each_client(make: Any, form: str) -> None:
    assert positions(make(), form, (7, 1, 11)) == [(0, 6), (2, 6), (3, 6), (6, 6)]


@pytest.mark.parametrize("refresh_rate", [1, 4])
@pytest.mark.parametrize("form", ["hooked", "tight"])
def test_the_bar_of_the_only_client_comes_to_its_end(form: str, refresh_rate: int) -> None:
    assert positions(TQDMProgressBar(refresh_rate), form, (22,))[-1] == (6, 6)


@pytest.mark.parametrize("form", FORMS)
def test_the_bar_of_the_federation_counts_clients(form: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, legacy_windows=False, _environ={})
    how = FORMS[form]
    options = {"callbacks": [FederatedProgressBar(console=console), *how.callbacks()], "enable_progress_bar": True}
    run = trainer(fl.FederatedStrategy(engine=how.engine), **how.options(), **options)
    run.fit(Plain(), image_clients((7, 7, 7)))
    shown = re.findall(r"clients\s+\S+\s+(\d)/3", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()))
    assert shown[-1] == "3"


# ---- forms of a step that break the contract, so that each property is known to find something


@pytest.fixture
def breach(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks the tight loop in the named way."""
    globals()[f"break_{request.param}"](monkeypatch)


def _with_functions(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    make = engine_selection.step_functions
    monkeypatch.setattr(engine_selection, "step_functions", lambda *args: replace(make(*args), **changes))


def _at_other_positions(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    step = LocalTrainer.step
    monkeypatch.setattr(
        LocalTrainer, "step", lambda own, batch, position: step(own, batch, position._replace(**changes))
    )


def break_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_functions(monkeypatch, clip=None)


def break_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_functions(monkeypatch, context=nullcontext)


def break_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    _at_other_positions(monkeypatch, starts_window=True, ends_window=True)


def break_window_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    _at_other_positions(monkeypatch, window=1)


def break_batch_idx(monkeypatch: pytest.MonkeyPatch) -> None:
    _at_other_positions(monkeypatch, offset=0)


def break_grad_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SequentialEngine, "prepare_gradients", lambda own, optimizer: None)


def break_step_count(monkeypatch: pytest.MonkeyPatch) -> None:
    count = RoundEpochLoop.count_trained

    def count_trained(loop: RoundEpochLoop) -> None:
        count(loop)
        loop.automatic_optimization.optim_progress.optimizer.step.increment_completed()

    monkeypatch.setattr(RoundEpochLoop, "count_trained", count_trained)


def break_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoundEpochLoop, "step_client_schedules", lambda loop: None)


def break_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_steps, "_obvious_size", lambda batch, **kwargs: 1)


def break_logger_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoundEpochLoop, "count_end", RoundEpochLoop._end_iteration)


def break_logger_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoundEpochLoop, "_end_iteration", lambda loop: None)


def break_step_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoggedValues, "after_batch", lambda *args: None)


def break_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    record = ClientTask.record
    monkeypatch.setattr(ClientTask, "record", lambda task, *args, **kw: record(task, args[0], 1, *args[2:], **kw))


@pytest.mark.parametrize(
    ("breach", "name", "form"),
    [
        ("clipping", "clipping by norm", "tight"),
        ("clipping", "clipping by value", "tight"),
        ("precision", "precision bf16-mixed", "tight"),
        ("accumulation", "accumulation", "tight"),
        ("window_mean", "accumulation", "tight"),
        ("batch_idx", "logging", "tight"),
        ("grad_transform", "fedprox", "tight"),
        ("grad_transform", "scaffold", "tight"),
        ("step_count", "frozen", "tight"),
        ("schedules", "schedule by step", "tight"),
        ("batch_size", "logging by step only", "tight"),
        ("logger_steps", "logging every third step", "tight"),
        ("logger_axis", "logging", "tight"),
        ("step_values", "logging by step only", "tight"),
        ("losses", "logging", "tight"),
        ("clipping", "clipping by norm", "group"),
        ("accumulation", "accumulation", "group"),
        ("schedules", "schedule by step", "group"),
        ("batch_size", "logging by step only", "group"),
        ("step_values", "logging by step only", "group"),
    ],
    indirect=["breach"],
)
@pytest.mark.spread(7)
def test_a_breach_is_found(breach: None, name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ENTRIES[name]
    broken = entry.fit(form)
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_same_as_reference(broken, entry, form, entry.fit(REFERENCE))
