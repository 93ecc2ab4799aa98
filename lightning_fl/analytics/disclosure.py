"""Minimum counts: no answer about so few rows that it tells of single ones, nor what would follow by subtraction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_fl.analytics.counts import OTHER
from lightning_fl.analytics.question import Answer, Question


def check_cuts(questions: Sequence[Question]) -> None:
    """Refuses questions that cut a column in different ways, of which the difference may be a few rows.

    Raises:
        ValueError: If two do.
    """
    seen: dict[str, tuple[Any, ...]] = {}
    for question in questions:
        for column, values in question.cuts.items():
            before = seen.setdefault(column, tuple(values))
            if set(map(str, before)) != set(map(str, values)):
                raise ValueError(
                    f"Two questions divide the column {column!r} in different ways, {before[:5]} and "
                    f"{tuple(values)[:5]}; subtracting their answers could tell of a few rows. Divide it in one way."
                )


def withhold(answer: Answer, min_count: int) -> Answer:
    """The answer without what rests on too few rows, and without what would let it be subtracted.

    Args:
        answer: The answer.
        min_count: The fewest rows.
    """
    if answer.withheld or min_count <= 1:
        return answer
    if answer.n < min_count:
        return replace(answer, values={}, parts={}, withheld=f"it would rest on fewer than {min_count} rows")
    if 0 < answer.fewest < min_count:
        few = f"its values tell apart a set of fewer than {min_count} rows"
        return replace(answer, values={}, parts={}, withheld=few)
    hidden = too_small(answer.counts, min_count)
    if hidden and not answer.parts:
        few = f"a set of rows that it tells apart ({min(hidden)}) has fewer than {min_count}"
        return replace(answer, values={}, withheld=few)
    nested = [part for name, part in answer.parts.items() if isinstance(part, Answer) and name not in hidden]
    if any(len(part.counts) > 1 and too_small(part.counts, min_count) for part in nested):
        few = f"one of its parts tells apart a set of fewer than {min_count} rows"
        return replace(answer, values={}, parts={}, withheld=few)
    reason = f"it, or what is left without it, is fewer than {min_count} rows"
    parts: dict[str, Any] = {}
    for name, part in answer.parts.items():
        shown = withhold(part, min_count) if isinstance(part, Answer) else part
        parts[name] = Answer(0.0, withheld=reason) if name in hidden else shown
    return replace(answer, parts=parts)


def too_small(counts: Mapping[str, float], min_count: int) -> set[str]:
    """The parts to hide: those with too few rows, and as many more that nobody can tell their sum by subtraction.

    Args:
        counts: The rows of each part; those of no part are ``(other or missing)``, which is never shown.
        min_count: The fewest rows of a part that is shown, and of all together that are not.
    """
    hidden = {name for name, count in counts.items() if 0 < count < min_count}
    unseen = hidden | {OTHER}
    left = sorted((count, name) for name, count in counts.items() if count >= min_count and name != OTHER)
    # All rows less those shown are those that are not: together as many as an answer needs.
    while hidden and left and sum(counts.get(name, 0.0) for name in unseen) < min_count:
        unseen.add(left.pop(0)[1])
    return unseen - {OTHER} if hidden else set()
