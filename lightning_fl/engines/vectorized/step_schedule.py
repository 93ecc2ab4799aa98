"""Clients of unequal work side by side: who trains in which step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

OF_ALL, OF_SOME = 2, 4
"""A step of all clients of a unit, or of some, takes as long as so many steps of a client alone, arithmetic aside."""


StepMask = tuple[int, ...]
"""Which clients of a unit train in a step: their places in it, in order."""


def step_schedule_of(works: Sequence[Sequence[Hashable]], num_steps_apart: float = 0) -> list[StepMask]:
    """In which steps clients train their batches, each its own in their order, those with equal ones together.

    Clients that wait for the same kind of batch train it together; first those among whom is the client with the most
    batches left, so that others catch up meanwhile. With one pass each that takes the fewest steps.

    Args:
        works: For each client, what its batches look like, one after the other.
        num_steps_apart: A client's first steps that it may only train with those that are at the same one.
    """
    waiting: dict[Hashable, list[int]] = {}
    positions = [0] * len(works)

    def wait(row: int) -> None:
        position = positions[row]
        if position < len(works[row]):
            waiting.setdefault((works[row][position], min(position, num_steps_apart)), []).append(row)

    for row in range(len(works)):
        wait(row)
    ticks = []
    while waiting:
        most_left = {
            kind: (max(len(works[row]) - positions[row] for row in rows), len(rows)) for kind, rows in waiting.items()
        }
        rows = sorted(waiting.pop(max(most_left, key=most_left.__getitem__)))
        ticks.append(tuple(rows))
        for row in rows:
            positions[row] += 1
            wait(row)
    return ticks


def are_equal(works: Sequence[Sequence[Hashable]]) -> bool:
    """Whether clients have the same work, so that all of them train in each step."""
    return all(work == works[0] for work in works)


def parts(
    works: Sequence[Sequence[Hashable]],
    num_steps_apart: float = 0,
    wants_equal: bool = False,
    arithmetic: float = 0.0,
) -> list[list[int]]:
    """Which clients had best train side by side: all of them, or those with equal works only.

    Args:
        works: For each client, what its batches look like, one after the other.
        num_steps_apart: A client's first steps that it may only train with those that are at the same one.
        wants_equal: Whether others must not.
        arithmetic: Share of it in a step of a client alone; among others it takes as long for each.
    """
    equal: dict[Hashable, list[int]] = {}
    for row, work in enumerate(works):
        equal.setdefault(tuple(work), []).append(row)
    groups = list(equal.values())
    if wants_equal or len(groups) < 2:
        return groups
    apart = sum(len(works[rows[0]]) * (OF_ALL + arithmetic * len(rows) if rows[1:] else 1) for rows in groups)
    least = OF_SOME * max(map(len, works)) + arithmetic * sum(map(len, works))
    if least >= apart:
        return groups
    together = sum(OF_SOME + arithmetic * len(tick) for tick in step_schedule_of(works, num_steps_apart))
    return [list(range(len(works)))] if together < apart else groups
