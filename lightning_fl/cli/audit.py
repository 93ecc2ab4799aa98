"""Attacks the privacy of a configuration's own module and data, and compares the proven epsilon with the claimed one.

The configuration is that of `lightning-fl fit`, with SampleLevelDP among its callbacks. One noisy step is attacked in
many trials, with the checks switched off: an example is included or not, and the attacker has to guess. Its success
rate proves a lower bound on epsilon, which must not exceed the claimed epsilon. The report also says whether the checks
stop the module. The exit code is 1 if more is proven than claimed, or if the checks stop the module.

Examples:
  lightning-fl audit --config config.yaml
  lightning-fl audit --config config.yaml --trials 1000 --trainer.precision 64-true
"""

from __future__ import annotations

import argparse

SETS_UP_A_RUN = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("--trials", type=int, default=400, help="trials of the attack; more give a tighter bound")


def run(args: argparse.Namespace) -> None:
    """Audits, and prints the result.

    Raises:
        SystemExit: With code 1 if more is proven than claimed, or the checks stop the module.
    """
    from lightning_fl.cli.audit_step import AuditCLI

    AuditCLI(["fit", *args.rest], args.trials)
