"""Sets up a run, attacks one of its private steps instead of training, and prints the result."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_fl.callbacks import SampleLevelDP
from lightning_fl.callbacks.sample_level_dp.audit import Audit, audit
from lightning_fl.cli.lightning_cli import FederatedCLI


class AuditCLI(FederatedCLI):
    """Reads a configuration as ``fit`` does, and audits instead of training.

    Args:
        args: The arguments of ``fit``.
        num_trials: Trials of the attack.
    """

    def __init__(self, args: Sequence[str], num_trials: int) -> None:
        self.num_trials = num_trials
        super().__init__(args)

    def before_fit(self) -> None:
        """Audits, prints the result, and ends the command."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        private = next((callback for callback in callbacks if isinstance(callback, SampleLevelDP)), None)
        if private is None:
            raise MisconfigurationException(
                "An audit attacks SampleLevelDP, which is not among trainer.callbacks. Add it to the configuration."
            )
        # With a target epsilon the multiplier is known in training only; any value serves for the comparison.
        noise_multiplier = private.noise_multiplier or 1.0
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # it would report on each of the trainings
        found = audit(
            self.model,
            self.datamodule,
            noise_multiplier,
            private.max_grad_norm,
            private.delta,
            self.num_trials,
            private.strict,
            self.trainer.precision,
        )
        Console().print(_table(found, noise_multiplier))
        raise SystemExit(0 if found.is_sound and found.refusal is None else 1)


def _table(found: Audit, noise_multiplier: float) -> Table:
    table = Table("what", "value", title="One step on all examples")
    table.add_row("noise multiplier", f"{noise_multiplier:g}")
    table.add_row("claimed epsilon", f"{found.claimed:.4f} at delta {found.delta:g}")
    table.add_row("proven epsilon", f"{found.proven:.4f} at least, in {found.num_trials} trials")
    table.add_row("an example moves the step by", f"{found.moved:.3g} clip norms; at most 1 is covered")
    table.add_row("self-checks", "pass" if found.refusal is None else escape(f"stop the run: {found.refusal}"))
    table.add_row("verdict", "nothing beyond the claim" if found.is_sound else "MORE IS PROVEN THAN CLAIMED")
    return table
