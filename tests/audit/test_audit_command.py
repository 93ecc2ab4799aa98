"""``lightning-fl audit``: it finds what leaks, and of sound modules it proves nothing beyond the claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_fl.callbacks.sample_level_dp.audit import Audit, audit
from lightning_fl.cli.main import main
from tests.callbacks.sample_level_dp.test_past_the_step import BiasOfTheBatch
from tests.helpers.coupled import SOUND, UNSOUND, Case, Net

pytestmark = pytest.mark.slow


def of(case: Case, **options: Any) -> Audit:
    found = audit(case.module(), case.clients(1), precision=case.precision, **options)
    print(f"proven {found.proven:.2f}, claimed {found.claimed:.2f}, moved by {found.moved:.2f} clip norms")
    return found


@pytest.mark.parametrize("kind", SOUND)
def test_sound_modules_stay_below_the_claim(kind: str) -> None:
    found = of(SOUND[kind], num_trials=200)
    assert found.is_sound
    assert found.refusal is None
    assert found.claimed == pytest.approx(4.377, abs=1e-3)


@pytest.mark.parametrize("kind", ["class weights", "class weights of its own"])
def test_class_weights_are_found(kind: str) -> None:
    found = of(UNSOUND[kind])
    assert not found.is_sound
    assert "class" in str(found.refusal)


def test_a_bias_past_the_optimizer_is_found() -> None:
    found = of(Case(BiasOfTheBatch))
    assert not found.is_sound
    assert "net.0.bias" in str(found.refusal)


def test_strict_gradients_leave_nothing_to_find() -> None:
    found = of(UNSOUND["class weights"], strict=True)
    assert found.is_sound
    assert found.refusal is None


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        """
model: tests.helpers.coupled.Net
data: tests.helpers.coupled.Examples
trainer:
  accelerator: cpu
  strategy: fedavg
  logger: false
  callbacks:
    - class_path: lightning_fl.callbacks.SampleLevelDP
      init_args: {noise_multiplier: 1.0}
"""
    )
    for model, code in (("Net", 0), ("ClassWeights", 1)):
        with pytest.raises(SystemExit) as ended:
            main(["audit", "--config", str(config), "--trials", "200", "--model", f"tests.helpers.coupled.{model}"])
        assert ended.value.code == code
        printed = capsys.readouterr().out
        assert "claimed epsilon" in printed
        assert ("MORE IS PROVEN" in printed) == bool(code)


def test_it_needs_something_to_audit() -> None:
    with pytest.raises(Exception, match="at least 3 examples"):
        audit(Net(), Case(Net, "", {"dataset": lambda: [1, 2]}).clients(1))
