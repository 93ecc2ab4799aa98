"""Answers questions about data that stays with its clients."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_fl.aggregation import Aggregator, FederationFacts, RoundContext, WeightedMean
from lightning_fl.analytics.disclosure import withhold
from lightning_fl.analytics.privacy import RowLevelDP
from lightning_fl.analytics.question import Answer, Question, by_question, by_value, labels
from lightning_fl.analytics.spent import Spent
from lightning_fl.communication import Group, LocalGroup, Message
from lightning_fl.privacy.accounting.ledger import Gaussian, Ledger
from lightning_fl.privacy.client_level.mechanism import PrivacyBudgetExceeded
from lightning_fl.types import ClientId, Tree, Update, as_client_id

WITHOUT_CLIENT = "(none)"
MAX_SUM = 2.0**43
MIN_COUNT = 5


@dataclass(frozen=True)
class Analysis:
    """The answers, and the privacy that they cost.

    Args:
        questions: The questions, including fields that were learned from the data.
        answers: The answer to each question.
        num_clients: Number of clients.
        num_steps: Number of sums over the clients.
        ledger: The releases of all questions, including earlier ones.
        delta: The delta of :attr:`epsilon`; 0 if nothing was protected by noise.
        own: Epsilon and delta of each question that is private by itself, including those of earlier calls.
    """

    questions: Sequence[Question]
    answers: Sequence[Answer]
    num_clients: int
    num_steps: int
    ledger: Ledger = field(default_factory=Ledger)
    delta: float = 0.0
    own: Sequence[tuple[float, float]] = ()

    @property
    def epsilon(self) -> tuple[float, float] | None:
        """Epsilon and delta of all releases together; None if a question was answered without privacy."""
        is_private = all(question.is_private_by_itself for question in self.questions) and not list(self.ledger)
        if not self.delta and not is_private:
            return None
        return Spent(self.ledger, list(self.own)).epsilon(self.delta)

    def to_dict(self) -> dict[str, Any]:
        """The answers as plain data for JSON."""
        answers = [
            {"question": describe(question), **answer.to_dict()}
            for question, answer in zip(self.questions, self.answers, strict=True)
        ]
        found: dict[str, Any] = {"clients": self.num_clients, "sums": self.num_steps, "answers": answers}
        if self.epsilon is not None:
            found["epsilon"], found["delta"] = self.epsilon
        return found

    def save(self, path: Any) -> None:
        """Writes the answers as JSON."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=1)


def describe(question: Question) -> str:
    """A question in one line, without long learned or declared lists."""
    inner = getattr(question, "question", None)
    if inner is not None:
        return f"{describe(inner)} by {question.column}"  # type: ignore[attr-defined]
    shown = [
        str(value)
        if isinstance(value, str)
        else ",".join(map(str, value))
        if isinstance(value, tuple)
        else f"{value:g}"
        for name, value in vars(question).items()
        if name in ("column", "time", "status", "x", "y", "by", "covariates", "columns", "q")
        if value is not None
    ]
    return f"{type(question).__name__}({', '.join(shown)})"


def analyze(
    questions: Sequence[Question],
    data: Any,
    client: str | None = None,
    group: Group | None = None,
    aggregator: Aggregator | None = None,
    privacy: RowLevelDP | None = None,
    min_count: int = MIN_COUNT,
    ledger: Ledger | str | Path | None = None,
) -> Analysis:
    """Asks questions of all clients; under secure aggregation the clients learn the answers and nothing else.

    Every rank of a federation must call it with the same questions.

    Args:
        questions: The questions.
        data: A pandas ``DataFrame`` of all clients with a column that names them, or a mapping from client id to a
            DataFrame; the same on every rank, which then computes its share of the clients. Without ``client``, a
            DataFrame is the data of this rank, a silo.
        client: The column that names the client of a row. Rows without one form a client of their own.
        group: The ranks of the federation. None: this process.
        aggregator: Computes the sums: ``WeightedMean()``, the default, or ``fl.privacy.SecureAggregation()``, which
            reveals only the sum over all clients.
        privacy: Noise on every sum. None: no noise.
        min_count: Smallest number of rows behind an answer, or a part of it; others are withheld. 1: none is.
        ledger: Earlier releases about the same rows; they count against ``privacy.max_epsilon``. If it is a file name,
            the file is read, and written before each release; it also records the bins of each column, so that no two
            calls divide a column differently. Sums released without noise are recorded with a noise multiplier of 0.

    Raises:
        ValueError: On every rank, if a column is missing, or a question can't be asked in this way.
        PrivacyBudgetExceeded: On every rank, before a release that would exceed the budget of one.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"site": ["a", "a", "b", "b", "c"], "age": [50, 60, 70, 80, 90]})
        >>> analyze([Mean("age")], table, client="site").answers[0].values["mean"]
        70.0
    """
    aggregator, group = aggregator or WeightedMean(), group or LocalGroup()
    tables, cohort, silos, no_rows = clients_of(data, client, group)
    questions = [_ready(question, aggregator, privacy) for question in questions]
    _check_same(questions, aggregator, privacy, min_count, group)
    if silos and privacy is not None:
        privacy.check_silos(aggregator)
    facts = FederationFacts(silos, len(cohort), is_training=True, max_weight=lambda: 1.0, clients=cohort)
    session = aggregator.open(group, facts)
    is_clear = silos and aggregator.integer_bits is None
    with _told_to_all(group, "start"):
        spent = Spent.of(ledger)
        if is_clear:
            _check_rows(tables, min_count)
    questions = [_declared(question, tables, group, silos, min_count) for question in questions]
    with _told_to_all(group, "cuts"):
        if min_count > 1:
            for question in questions:
                spent.divide(question.cuts)
    states: list[Any] = [question.start() for question in questions]
    num_steps = 0
    while going := [place for place, state in enumerate(states) if not isinstance(state, Answer)]:
        ctx = RoundContext(num_steps, cohort, len(cohort), group=group, silos=silos)
        noisy = [place for place in going if not questions[place].is_private_by_itself]
        own = [] if num_steps else [question.own_epsilon for question in questions if question.is_private_by_itself]
        # Reported to all before anything is summed, so that no rank waits for one that has stopped.
        with _told_to_all(group, "asked"):
            sums = {name: _prefixed(questions, states, going, table) for name, table in tables.items()}
            if privacy is not None:
                for place in noisy:
                    questions[place].sensitivity(states[place])
                privacy.check_budget(spent, len(noisy), own)
        # Recorded before the sums are released.
        with _told_to_all(group, "written down"):
            spent.own += own
            event = Gaussian(0.0, adversary="server") if privacy is None else privacy.event(silos)
            if privacy is not None or ledger is not None:
                spent.record(event, len(noisy), writes=silos or group.rank == 0)
        if privacy is not None and silos:
            shares = aggregator.min_clients_of(len(cohort))
            sums = {
                name: privacy.share(own_sums, questions, states, num_steps, group.rank, shares)
                for name, own_sums in sums.items()
            }
        # From zero rows, so that a rank without clients knows the shapes too.
        shapes = _prefixed(questions, states, going, no_rows)
        total = _summed(sums, shapes, aggregator, session, ctx, _digest(questions, states, min_count))
        if privacy is not None and not silos:
            total = privacy.add(total, questions, states, num_steps, group)
        for place, own_sums in by_question(total).items():
            states[place] = questions[place].step(own_sums, states[place])
        num_steps += 1
    answers = [withhold(answer, min_count) for answer in states]
    delta = 0.0 if privacy is None else privacy.delta
    return Analysis(questions, answers, len(cohort), num_steps, spent.releases, delta, spent.own)


def clients_of(data: Any, client: str | None, group: Group) -> tuple[dict[ClientId, Any], list[ClientId], bool, Any]:
    """This rank's clients with their rows, all clients, whether each rank is a silo, and a table without rows."""
    if isinstance(data, Mapping):
        if client is not None:
            raise ValueError(
                f"client={client!r} names a column, but the data is already a mapping by client. Leave it out."
            )
        everybody = {as_client_id(name): table for name, table in data.items()}
    elif client is not None:
        owner = np.array([WITHOUT_CLIENT if name is None else name for name in labels(data, client)], dtype=object)
        everybody = {name: data[owner == name] for name in by_value(list(owner))}
    else:
        names: list[ClientId] = list(group.names) or list(range(group.size))
        return {names[group.rank]: data}, names, group.size > 1, data[:0]
    cohort = list(everybody)
    if not cohort:
        raise ValueError("There are no rows to ask about.")
    return {name: everybody[name] for name in cohort[group.rank :: group.size]}, cohort, False, everybody[cohort[0]][:0]


def _ready(question: Question, aggregator: Aggregator, privacy: RowLevelDP | None) -> Question:
    is_secure = aggregator.integer_bits is not None
    if not (aggregator.is_sum or is_secure):
        raise ValueError(
            f"Answers are sums over all clients, but {type(aggregator).__name__} is not a sum. Use WeightedMean() or "
            "SecureAggregation()."
        )
    if is_secure:
        question.check_sums()
    if (is_secure or privacy is not None) and question.undeclared:
        what = ", ".join(f"{name} of the column {column!r}" for name, column in question.undeclared.items())
        why = "secure aggregation" if is_secure else "differential privacy"
        raise ValueError(
            f"{describe(question)} does not declare {what.replace('learned_grid', 'grid')}, so each client would have "
            f"to reveal its values, which {why} does not allow. Declare them from public knowledge."
        )
    if privacy is not None and not question.is_private_by_itself:
        question.sensitivity(question.start())
    return question


def _check_same(
    questions: Sequence[Question], aggregator: Aggregator, privacy: RowLevelDP | None, min_count: int, group: Group
) -> None:
    # The mean has no settings, and its repr would contain its address.
    how = [type(aggregator).__name__ if type(aggregator) is WeightedMean else repr(aggregator), repr(privacy)]
    hello = {"questions": [repr(question) for question in questions], "how": how, "min_count": min_count}
    for rank, message in enumerate(group.all_gather(Message(hello), "questions")):
        if message.fields != hello:
            raise ValueError(
                f"Rank {rank} asks other questions, or with other settings, than rank {group.rank}: "
                f"{str(message.fields)[:500]}. Ask the same questions on all ranks."
            )


def _check_rows(tables: Mapping[ClientId, Any], min_count: int) -> None:
    """Refuses to send the sums of a silo with so few rows that the sums would reveal them."""
    for table in tables.values():
        if 0 < len(table) < min_count:
            raise ValueError(
                f"This silo has {len(table)} rows, fewer than {min_count}, and others would see its sums. Use "
                "SecureAggregation() (--secure), which reveals only the sums over all silos."
            )


def _declared(
    question: Question, tables: Mapping[ClientId, Any], group: Group, silos: bool, min_count: int
) -> Question:
    """The question with its undeclared fields learned from the clients, without values that few of their rows have."""
    for name, column in question.undeclared.items():
        if name in question.individual and silos and min_count > 1:
            raise ValueError(
                f"{describe(question)} declares no {name.rpartition('.')[2].replace('learned_', '')}, so each silo "
                f"would have to reveal {column!r} of each of its rows to the others. Declare it from public "
                "knowledge, or, if the others may see it, allow min_count=1 (--min-count 1). To compare ids use "
                "fl.vertical.psi."
            )
        own: dict[str, int] = {}
        with _told_to_all(group, f"rows of {column}"):
            fewest = 1 if name in question.individual else min_count
            for table in tables.values():
                counts = Counter(label for label in labels(table, column) if label is not None)
                own.update({label: count for label, count in counts.items() if count >= fewest})
        messages = group.all_gather(Message({"found": by_value(list(own))}), f"values of {column}")
        union = by_value([str(value) for message in messages for value in message.fields["found"]])
        if not union:
            raise ValueError(
                f"The column {column!r} has no value that at least {fewest} rows of a client have. Declare its values "
                "from public knowledge: values=, or --values COLUMN=A,B."
            )
        question = question.declare(name, union)
    return question


@contextmanager
def _told_to_all(group: Group, topic: str) -> Iterator[None]:
    """Raises an error of one rank on every rank."""
    problem, is_budget = "", False
    try:
        yield
    except (ValueError, OSError, PrivacyBudgetExceeded) as error:
        problem, is_budget = str(error), isinstance(error, PrivacyBudgetExceeded)
    told = [message.fields for message in group.all_gather(Message({"problem": problem, "budget": is_budget}), topic)]
    for rank, fields in enumerate(told):
        if fields["problem"]:
            kind = PrivacyBudgetExceeded if fields["budget"] else ValueError
            raise kind(fields["problem"] if len(told) == 1 else f"{group.who(rank).capitalize()}: {fields['problem']}")


def _prefixed(questions: Sequence[Question], states: Sequence[Any], going: Sequence[int], table: Any) -> Tree:
    """A client's contribution to the sums of all questions that have no answer yet."""
    sums: Tree = {}
    for place in going:
        for key, value in questions[place].local(table, states[place]).items():
            if not bool((value.abs() < MAX_SUM).all()):
                raise ValueError(
                    f"{describe(questions[place])} gives a sum that is not finite or not below {MAX_SUM:.3g}. Measure "
                    "the column in a larger unit, or declare a range."
                )
            sums[f"{place}/{key}"] = value
    return sums


def _summed(
    sums: Mapping[Any, Tree], shapes: Tree, aggregator: Aggregator, session: Any, ctx: RoundContext, digest: bytes
) -> Tree:
    """The sums over all clients, computed by an aggregator of updates."""
    # Under secure aggregation buffers are summed exactly. The template identifies the question and its state: a client
    # refuses to add the same numbers to a second sum with other clients.
    marker = torch.tensor(list(digest))
    template = Update({"question": marker}, {name: torch.zeros_like(value) for name, value in shapes.items()})
    acc = aggregator.init(template, torch.device("cpu"), session)
    for name, tree in sums.items():
        own = RoundContext(ctx.round, ctx.cohort, ctx.population, client=name, group=ctx.group, silos=ctx.silos)
        acc = aggregator.add(acc, Update({"question": torch.zeros_like(marker)}, tree, 1.0), own)
    acc, _ = aggregator.merge(acc, ctx.group, Message(), ctx)
    return aggregator.result(acc, ctx).buffers


def _digest(questions: Sequence[Question], states: Sequence[Any], min_count: int) -> bytes:
    return hashlib.sha256(repr([questions, states, min_count]).encode()).digest()
