"""Minimum counts: no answer about so few rows that it tells of single ones, nor what would follow by subtraction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_fl.analytics.counts import OTHER
from lightning_fl.analytics.question import Answer


def withhold(answer: Answer, min_count: int) -> Answer:
    """The answer without what rests on too few rows, and without what would let it be subtracted.

    What is left holds no counts but those that are shown.

    Args:
        answer: The answer.
        min_count: Minimum number of rows.
    """
    if min_count <= 1:
        return answer
    reason = answer.withheld or _reason(answer, min_count)
    if reason:
        return Answer(0.0, withheld=reason)
    hidden = too_small(answer.counts, min_count)
    few = f"it, or what is left without it, is fewer than {min_count} rows"
    parts: dict[str, Any] = {
        name: Answer(0.0, withheld=few)
        if name in hidden
        else withhold(part, min_count)
        if isinstance(part, Answer)
        else part
        for name, part in answer.parts.items()
    }
    return Answer(answer.n, answer.values, parts)


def _reason(answer: Answer, min_count: int) -> str:
    """Why nothing of an answer may be shown; empty if something may."""
    if answer.n < min_count:
        return f"it would rest on fewer than {min_count} rows"
    if 0 < answer.fewest < min_count:
        return f"its values tell apart a set of fewer than {min_count} rows"
    hidden = too_small(answer.counts, min_count)
    if hidden and not answer.parts:
        return f"a set of rows that it tells apart ({min(hidden)}) has fewer than {min_count}"
    # What is left of the others could be subtracted from an answer about all rows.
    for name, part in answer.parts.items():
        if not isinstance(part, Answer) or name in hidden:
            continue
        if (len(part.counts) > 1 and too_small(part.counts, min_count)) or 0 < part.fewest < min_count:
            return f"one of its parts tells apart a set of fewer than {min_count} rows"
    return ""


def too_small(counts: Mapping[str, float], min_count: int) -> set[str]:
    """The parts to hide: those with too few rows, and as many more that nobody can tell their sum by subtraction.

    Args:
        counts: The rows of each part; those of no part are ``(other or missing)``, which is never shown.
        min_count: Minimum number of rows of each part that is shown, and of all hidden parts together.
    """
    hidden = {name for name, count in counts.items() if 0 < count < min_count}
    unseen = hidden | {OTHER}
    left = sorted((count, name) for name, count in counts.items() if count >= min_count and name != OTHER)
    # All rows less those shown are those that are not: together as many as an answer needs.
    while hidden and left and sum(counts.get(name, 0.0) for name in unseen) < min_count:
        unseen.add(left.pop(0)[1])
    return unseen - {OTHER} if hidden else set()
