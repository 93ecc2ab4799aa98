from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from rich.console import Console

import lightning_fl as fl
from lightning_fl.callbacks import FederatedProgressBar
from tests.helpers.training import Ordinary, image_clients, trainer, weights


def show(terminal: bool, rounds: int = 3, module: Ordinary | None = None, **options: Any) -> tuple[str, torch.Tensor]:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, legacy_windows=False, _environ={})
    module = module or Ordinary()
    strategy = fl.FederatedStrategy(clients_per_round=2)
    bar = FederatedProgressBar(console=console, **options)
    run = trainer(strategy, rounds, callbacks=[bar], enable_progress_bar=True)
    run.fit(module, image_clients(validate=True))
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()), weights(module)


def test_a_terminal_shows_rounds_cohort_metric_and_time_left() -> None:
    text, _ = show(True, metrics=["val_acc"])
    last = text.splitlines()[-1]
    assert re.search(r"rounds\s+\S+\s+3/3\s+0:00:00 left val_acc 0\.\d+", last)
    assert re.search(r"clients\s+\S+\s+2/2", text)
    assert "validation" in text


def test_a_file_gets_a_line_a_round() -> None:
    text, _ = show(False, metrics=["val_acc", "val_loss"])
    assert [line.split("  ")[0] for line in text.splitlines()] == ["round 1/3", "round 2/3", "round 3/3"]
    assert re.search(r"val_acc \S+  val_loss \S+$", text.splitlines()[-1])


@pytest.mark.parametrize("terminal", [True, False])
def test_brackets_are_shown_and_the_module_prints_above_the_bars(terminal: bool) -> None:
    class Roads(Ordinary):
        def validation_step(self, *args: Any) -> None:
            self.log("iou[/road]", 0.5, prog_bar=True)

        def on_validation_epoch_end(self) -> None:
            self.print("[the end", "of a round]", sep="_")

    text, _ = show(terminal, module=Roads())
    assert "iou[/road] 0.5" in text
    assert "[the end_of a round]" in text


@pytest.mark.slow
def test_a_long_run_gets_some_twenty_lines() -> None:
    text, _ = show(False, rounds=45)
    lines = text.splitlines()
    assert 20 <= len(lines) <= 24
    assert lines[-1].startswith("round 45/45")


def test_it_changes_nothing() -> None:
    module = Ordinary()
    trainer(fl.FederatedStrategy(clients_per_round=2), 3).fit(module, image_clients(validate=True))
    for terminal in (True, False):
        assert torch.equal(show(terminal)[1], weights(module))


def test_an_error_gives_the_terminal_back() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={})
    bar = FederatedProgressBar(console=console)

    class Fails(Ordinary):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        trainer("fedavg", 2, callbacks=[bar], enable_progress_bar=True, num_sanity_val_steps=0).fit(
            Fails(), image_clients(validate=True)
        )
    assert not console._live_stack
