"""Asks statistical questions of rows that stay with their clients: means, quantiles, survival curves, tests.

The data is one file with a column that names the client of each row or, under torchrun, one file per silo: {rank} in
its name stands for the silo's rank. Or each silo starts the command with its own file and the coordinator's address.
Options that ask a question may be repeated. With --secure nobody learns more than the sums over all clients. With
--secure or --noise, the values of grouping columns and the times of survival curves must be declared.

Examples:
  lightning-fl analyze lung.csv --client inst --mean age --quantile wt.loss=0.5,0.9 --km time,status --by sex
  lightning-fl analyze lung.csv --client inst --mean age --range age=0,120 --noise 4 --max-epsilon 2
  lightning-fl analyze lung.csv --client inst --schema schema.json --target status
  torchrun --standalone --nproc_per_node 3 -m lightning_fl analyze silo{rank}.csv --secure --mean age --by sex=1,2
  lightning-fl analyze own.csv --federation https://fl.example.org:8443 --kit kit --secure --mean age
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fl import analytics as ask  # lazy: the help and wrong options don't wait for torch
from lightning_fl.cli.command import check_output

if TYPE_CHECKING:
    from lightning_fl.communication import Group
    from lightning_fl.privacy import SecureAggregation

ASKED = {
    "variance": ("COLUMN", "mean, variance and deviation"),
    "mean": ("COLUMN", "the mean"),
    "quantile": ("COLUMN=Q,Q", "quantiles; without =Q the median"),
    "histogram": ("COLUMN=EDGE,EDGE", "counts between edges"),
    "frequency": ("COLUMN", "the number of rows with each value"),
    "correlation": ("X,Y", "Pearson's correlation"),
    "pca": ("COLUMN,COLUMN", "principal components of standardised columns"),
    "t-test": ("COLUMN,BY", "Welch's t-test between the two groups of BY"),
    "chi2": ("X,Y", "the chi-squared test of independence"),
    "km": ("TIME,STATUS", "the Kaplan-Meier estimate; a status of 1 is an event"),
    "log-rank": ("TIME,STATUS,BY", "the log-rank test between the groups of BY"),
    "cox": ("TIME,STATUS,X,X", "Cox's proportional hazards"),
    "heavy-hitters": ("COLUMN", "words that many rows hold, by TrieHH"),
    "cardinality": ("COLUMN", "the approximate number of distinct values"),
    "intersection": ("COLUMN", "the number of values that all clients have"),
}
DIVIDES = ("t-test", "chi2", "log-rank")
"""Questions that compare groups themselves, so that --by does not divide them again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("table", help="a .csv, .csv.gz or .parquet file, or a folder of them")
    parser.add_argument("--client", metavar="COLUMN", help="the column that names the client of a row")
    parser.add_argument("--federation", metavar="ADDRESS", help="ask together with other silos, through a coordinator")
    parser.add_argument("--kit", type=Path, metavar="FOLDER", help="this silo's key and certificate, for --federation")
    questions = parser.add_argument_group("questions")
    questions.add_argument("--count", action="store_true", help="the number of rows")
    for name, (metavar, text) in ASKED.items():
        questions.add_argument(f"--{name}", action="append", default=[], metavar=metavar, help=text)
    how = parser.add_argument_group("options of questions")
    how.add_argument("--by", metavar="COLUMN[=A,B]", help="ask separately for the rows of each value of this column")
    how.add_argument("--range", action="append", default=[], metavar="COLUMN=LOW,HIGH", help="a column's public range")
    how.add_argument("--values", action="append", default=[], metavar="COLUMN=A,B", help="a column's public values")
    how.add_argument("--grid", metavar="LAST,STEP", help="the times at which survival is counted: STEP, 2 STEP, ...")
    how.add_argument("--at", metavar="T,T", default="", help="times at which --km shows the share")
    how.add_argument("--event", type=float, default=1, help="the status that is an event (default: %(default)g)")
    how.add_argument(
        "--ties",
        choices=("efron", "breslow"),
        default="efron",
        help="treatment of ties by --cox (default: %(default)s)",
    )
    how.add_argument("--equal-var", action="store_true", help="--t-test pools the variances")
    guards = parser.add_argument_group("privacy")
    guards.add_argument("--secure", action="store_true", help="secure aggregation: reveal only sums over all clients")
    guards.add_argument("--noise", type=float, help="noise multiplier of row-level differential privacy")
    guards.add_argument("--delta", type=float, help="delta of row-level differential privacy (default: 1e-5)")
    guards.add_argument("--max-epsilon", type=float, help="stop before epsilon exceeds this")
    guards.add_argument(
        "--min-count", type=int, default=5, help="smallest number of rows behind an answer (default: %(default)s)"
    )
    guards.add_argument("--ledger", metavar="FILE", help="record of earlier questions about the same rows; updated")
    schema = parser.add_argument_group("a schema for training")
    schema.add_argument("--schema", type=Path, metavar="FILE", help="agree on a schema for TabularDataModule")
    schema.add_argument("--target", metavar="COLUMN", help="the column to predict")
    schema.add_argument("--drop", metavar="COLUMN,COLUMN", default="", help="columns to leave out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answers as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page with tables and plots, as HTML")


def run(args: argparse.Namespace) -> None:
    """Asks, and prints the answers."""
    for path in (args.json, args.report):
        if path is not None:
            check_output(path)
    if args.noise is None and (args.delta is not None or args.max_epsilon is not None):
        raise ValueError("--delta and --max-epsilon need noise; add --noise Z.")
    is_silo = "{rank}" in args.table
    if is_silo and args.client is not None:
        raise ValueError("With {rank} in the file's name each rank is a silo, which is a client. Leave out --client.")
    questions = _questions(args)
    if (args.schema is None) != (args.target is None):
        raise ValueError("Give --schema FILE and --target COLUMN together: a schema is for predicting a column.")
    if args.schema is not None:
        check_output(args.schema)
    if not questions and args.schema is None:
        raise ValueError(f"No question was given. Add --count, or one of --{', --'.join(ASKED)}.")
    if is_silo and args.ledger is not None and "{rank}" not in args.ledger:
        raise ValueError("Each silo needs its own ledger: --ledger ledger{rank}.json.")
    from lightning_fl.privacy import PrivacyError, SecureAggregation
    from lightning_fl.privacy.secagg import SecureAggregationError

    privacy = None
    if args.noise is not None:
        delta = 1e-5 if args.delta is None else args.delta
        privacy = ask.RowLevelDP(args.noise, delta, args.max_epsilon)
    if args.schema is not None and privacy is not None:
        raise ValueError("A schema learned by --schema holds exact figures. Use TableSchema.from_ranges, and scaling=.")
    aggregator = SecureAggregation(keys=_keys(args)) if args.secure else None
    with _joined(args, questions, is_silo) as group:
        try:
            _ask(args, questions, group, aggregator, privacy)
        except (PrivacyError, SecureAggregationError) as error:
            raise ValueError(str(error)) from error


def _keys(args: argparse.Namespace) -> str | None:
    from lightning_fl.privacy.secagg.session import KEYS_VARIABLE

    if args.kit is None or KEYS_VARIABLE in os.environ:
        return None
    return str(args.kit / "keys")


@contextmanager
def _joined(args: argparse.Namespace, questions: Sequence[ask.Question], is_silo: bool) -> Iterator[Group]:
    """The group of participants: the silos of a federation over a network, the ranks of torchrun, or this process."""
    if (args.federation is None) != (args.kit is None):
        raise ValueError(
            "Give --federation ADDRESS and --kit FOLDER together: a silo authenticates by its certificate."
        )
    if args.federation is None:
        from lightning_fl.communication import launched_group

        group = launched_group()
        if group.size > 1 and not is_silo and args.client is None:
            raise ValueError(
                "The ranks would all read the same rows. Name a file for each, silo{rank}.csv, or --client."
            )
        if is_silo and group.size == 1:
            raise ValueError("{rank} in the file's name needs several silos: start them with torchrun.")
        yield group
        return
    if is_silo or args.client is not None:
        raise ValueError("With --federation this process is one silo, which is a client. Give only its own file.")
    from lightning_fl.analytics.analysis import describe

    try:
        from lightning_fl.coordinator.client import CallRefused, NotAdmitted
        from lightning_fl.coordinator.network_group import MeetingOver, NetworkGroup
        from lightning_fl.coordinator.policy import PolicyBroken, read_policy
    except ModuleNotFoundError as error:
        raise ImportError(f"--federation needs {error.name}: pip install 'lightning-fl[network]'.") from error
    protections = {"secure aggregation": args.secure, "differential privacy": args.noise is not None}
    names = [name for question in questions for name in _names(question)] + ["schema"] * (args.schema is not None)
    try:
        own = [name for name, holds in protections.items() if holds]
        read_policy(args.kit / "policy.yaml").check_questions(names, args.min_count, own)
        with NetworkGroup(args.federation, args.kit) as network:
            network.audit.append("asked", questions=[describe(question) for question in questions], protections=own)
            yield network
    except (CallRefused, NotAdmitted, MeetingOver, PolicyBroken) as error:
        raise ValueError(str(error)) from error


def _names(question: ask.Question) -> list[str]:
    inner = getattr(question, "question", None)
    return [type(question).__name__, *([] if inner is None else _names(inner))]


def _ask(
    args: argparse.Namespace,
    questions: Sequence[ask.Question],
    group: Group,
    aggregator: SecureAggregation | None,
    privacy: ask.RowLevelDP | None,
) -> None:
    from rich.console import Console

    from lightning_fl.analytics.show import as_table
    from lightning_fl.datamodules.tabular import read_tables
    from lightning_fl.tracking.answers import write_page

    table = read_tables(args.table.replace("{rank}", str(group.rank)))
    if args.schema is not None:
        _agree(args, table, group, aggregator)
    if not questions:
        return
    ledger = None if args.ledger is None else args.ledger.replace("{rank}", str(group.rank))
    analysis = ask.analyze(questions, table, args.client, group, aggregator, privacy, args.min_count, ledger)
    if group.rank and args.federation is None:
        return
    Console().print(as_table(analysis))
    if analysis.epsilon is not None:
        print("epsilon at most {:.4g} at delta {:.3g}, for one row".format(*analysis.epsilon))
    if args.json is not None:
        analysis.save(args.json)
        print(f"answers: {args.json}")
    if args.report is not None:
        write_page(analysis.to_dict(), args.report)
        print(f"report: {args.report}")


def _agree(args: argparse.Namespace, table: Any, group: Group, aggregator: SecureAggregation | None) -> None:
    categories = dict(map(_pair, args.values))
    drop = args.drop.split(",") if args.drop else []
    found = ask.federated_schema(
        table, args.target, args.client, group, aggregator, drop, categories=categories, min_count=args.min_count
    )
    if group.rank == 0 or args.federation is not None:
        found.schema.save(args.schema)
        for note in found.notes:
            print(f"note: {note}")
        num_features, classes = len(found.schema.feature_names), found.schema.classes
        kind = "a number" if classes is None else f"{len(classes)} classes"
        print(f"schema: {args.schema}, {num_features} features, {args.target} is {kind}")


def _questions(args: argparse.Namespace) -> list[ask.Question]:
    ranges = {column: tuple(map(_number, values)) for column, values in map(_pair, args.range)}
    for column, found_range in ranges.items():
        if len(found_range) != 2:
            raise ValueError(f"--range {column} needs two numbers, {column}=LOW,HIGH; found {len(found_range)}.")
    by, has_values, groups = (args.by or "").partition("=")
    values = dict(map(_pair, args.values)) | ({by: groups.split(",")} if has_values else {})
    grid: tuple[float, ...] = ()
    if args.grid:
        last, step = _numbers(args.grid, 2, "--grid LAST,STEP")
        if not 0 < step <= last:
            raise ValueError(f"--grid {args.grid}: expected 0 < STEP <= LAST.")
        grid = tuple(step * number for number in range(1, int(last / step + 1e-9) + 1))
    at = tuple(map(_number, args.at.split(","))) if args.at else ()

    def bounds(column: str) -> Any:
        return ranges.get(column)

    def listed(column: str) -> tuple[str, ...]:
        return tuple(values.get(column, ()))

    def quantile(column: str, *q: str) -> ask.Question:
        return ask.Quantile(column, tuple(map(_number, q)) or (0.5,), bounds(column))

    make: dict[str, Callable[..., ask.Question]] = {
        "mean": lambda column: ask.Mean(column, bounds(column)),
        "variance": lambda column: ask.Variance(column, bounds(column)),
        "quantile": quantile,
        "histogram": lambda column, *edges: ask.Histogram(column, tuple(map(_number, edges))),
        "frequency": lambda column: ask.Frequency(column, listed(column)),
        "correlation": lambda x, y: ask.Correlation(x, y, (bounds(x), bounds(y))),
        "pca": lambda *columns: ask.PCA(
            columns, min(3, len(columns)), ranges=tuple(map(bounds, columns)) if ranges else ()
        ),
        "t-test": lambda column, by: ask.TTest(column, by, listed(by), args.equal_var, bounds(column)),
        "chi2": lambda x, y: ask.ChiSquare(x, y, listed(x), listed(y)),
        "km": lambda time, status: ask.KaplanMeier(time, status, args.event, grid, at),
        "log-rank": lambda time, status, by: ask.LogRank(time, status, by, args.event, listed(by), grid),
        "cox": lambda time, status, *x: ask.Cox(time, status, x, args.ties, args.event, grid),
        "heavy-hitters": ask.HeavyHitters,
        "cardinality": ask.Cardinality,
        "intersection": ask.Intersection,
    }
    found: list[ask.Question] = [ask.Count()] if args.count else []
    for name, (metavar, _) in ASKED.items():
        for text in getattr(args, name.replace("-", "_")):
            words = [word for part in text.split("=", 1) for word in part.split(",")]
            try:
                question = make[name](*words)
            except TypeError as error:
                raise ValueError(f"--{name} {text}: expected {metavar}.") from error
            found.append(question if not by or name in DIVIDES else ask.By(question, by, listed(by)))
    return found


def _pair(text: str) -> tuple[str, list[str]]:
    column, has_value, values = text.partition("=")
    if not has_value:
        raise ValueError(f"{text!r} lacks its values; expected COLUMN=A,B.")
    return column, values.split(",")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number.") from error


def _numbers(text: str, count: int, expected: str) -> Sequence[float]:
    found = [_number(part) for part in text.split(",")]
    if len(found) != count:
        raise ValueError(f"{text!r}: expected {expected}.")
    return found
