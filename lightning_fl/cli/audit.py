"""Attacks the privacy of a configuration's own module and data, and compares what it proves with what is claimed.

The configuration is that of `lightning-fl fit`, with SampleLevelDP among its callbacks. One noisy step is attacked in
many trials, with the checks switched off: an example is there or not, and the attacker has to tell. What it gets right
proves an epsilon, which must not be larger than the one claimed. The report also says whether the checks stop the
module. The exit code is 1 if more is proven than claimed, or if the checks stop the module.

Examples:
  lightning-fl audit --config config.yaml
  lightning-fl audit --config config.yaml --trials 1000 --trainer.precision 64-true
"""

from __future__ import annotations

import argparse

SETS_UP_A_RUN = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("--trials", type=int, default=400, help="trials of the attack; more prove more")


def run(args: argparse.Namespace) -> None:
    """Audits, and prints what was found.

    Raises:
        SystemExit: With code 1 if more is proven than claimed, or the checks stop the module.
    """
    from lightning_fl.cli.audit_step import AuditCLI

    AuditCLI(["fit", *args.rest], args.trials)
