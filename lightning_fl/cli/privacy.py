"""Plans a differentially private run: epsilon for a noise multiplier, or the noise for an epsilon, over the rounds.

Every number is an upper bound at --delta. A release is a round under client-level privacy, and a step under DP-SGD.

Examples:
  lightning-fl privacy --noise-multiplier 1.0 --rate 0.1 --rounds 100 --clients 1000
  lightning-fl privacy --epsilon 8 --rate 0.1 --rounds 100 --clients 1000
  lightning-fl privacy --noise-multiplier 1.0 --cohort 100 --clients 1000 --rounds 100
  lightning-fl privacy --noise-multiplier 1.1 --rate 0.0042666667 --steps 14062

The first gives the epsilon of 100 rounds in which each of 1000 clients takes part with probability 0.1; the second the
noise for which that epsilon is 8; the third the epsilon with cohorts of exactly 100 clients; the fourth that of DP-SGD
on 60000 examples with batches of about 256.
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from lightning_fl.privacy import FixedSize, Full, Gaussian, Ledger, Poisson, Sampling, noise_multiplier_for
from lightning_fl.privacy.accounting.bounds import Relation, default_relation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--noise-multiplier", type=float, help="noise, relative to the clip norm")
    what.add_argument("--epsilon", type=float, help="privacy budget for all rounds together")
    parser.add_argument("--rounds", "--steps", type=int, required=True, help="number of releases")
    parser.add_argument("--rate", type=float, help="Poisson cohorts: the probability of taking part")
    parser.add_argument("--cohort", type=int, help="fixed cohorts: clients in a round; needs --clients")
    parser.add_argument("--clients", type=int, help="clients in the federation")
    parser.add_argument("--delta", type=float, help="default: 1e-5, or clients ** -1.1 if that is less")
    parser.add_argument("--local", action="store_true", help="local noise: any two updates of a client are neighbours")
    parser.add_argument("--method", choices=("pld", "rdp"), default="pld", help="the accountant for --epsilon")


def run(args: argparse.Namespace) -> None:
    """Prints the setting and its epsilon."""
    sampling = _sampling(args.rate, args.cohort, args.clients, args.local)
    delta = args.delta if args.delta is not None else min(1e-5, max(args.clients or 1, 1) ** -1.1)
    relation: Relation = "replace_one" if args.local else default_relation([(1.0, sampling, 1)])
    noise = args.noise_multiplier
    if noise is None:
        noise = noise_multiplier_for(args.epsilon, delta, args.rounds, sampling, args.method, relation)
    costs = _table(noise, sampling, args.rounds, delta, relation)
    console = Console()
    console.print(_facts(noise, sampling, delta, relation, args.local))
    console.print(costs)


def _sampling(rate: float | None, cohort: int | None, clients: int | None, local: bool) -> Sampling:
    if local and (rate is not None or cohort is not None):
        raise ValueError("--local counts the rounds in which a client takes part; leave out --rate and --cohort")
    if rate is not None and cohort is not None:
        raise ValueError("--rate is for Poisson cohorts, --cohort for fixed ones; give only one of them")
    if rate is not None:
        return Full() if rate == 1 else Poisson(rate)
    if cohort is None:
        return Full()
    if clients is None:
        raise ValueError("--cohort needs --clients, the number of clients from which a fixed cohort is drawn")
    return FixedSize(cohort, clients)


def _facts(noise_multiplier: float, sampling: Sampling, delta: float, relation: str, local: bool) -> Table:
    table = Table("what", "value", title="Setting")
    kind = {"Full": "everybody takes part"}.get(type(sampling).__name__, repr(sampling))
    table.add_row("noise multiplier", f"{noise_multiplier:.4f}")
    table.add_row("sampling", kind)
    table.add_row("delta", f"{delta:.3g}")
    table.add_row("neighbours", relation.replace("_", " "))
    if local:
        table.add_row("mode", "local: count the rounds in which a client takes part")
    return table


def _table(noise_multiplier: float, sampling: Sampling, rounds: int, delta: float, relation: Relation) -> Table:
    table = Table("rounds", "epsilon", "by RDP alone", title="Upper bounds")
    for count in _counts(rounds):
        ledger = Ledger()
        ledger.record(Gaussian(noise_multiplier, sampling), count)
        least, by_rdp = ledger.epsilon(delta, "pld", relation), ledger.epsilon(delta, "rdp", relation)
        table.add_row(f"{count:,}", f"{least:.4f}", f"{by_rdp:.4f}")
    return table


def _counts(rounds: int) -> list[int]:
    """1, 10, 100, ..., half of the last, and the last."""
    powers = [10**exponent for exponent in range(len(str(max(rounds, 1)))) if 10**exponent < rounds]
    return sorted({*powers, max(rounds // 2, 1), rounds})
