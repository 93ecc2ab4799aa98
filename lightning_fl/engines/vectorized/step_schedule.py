"""Schedules clients with unequal work that train together: which clients train in which step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

ALL_COST, SUBSET_COST = 2, 4
"""Cost of one grouped step on a CPU in single-client steps: 2 if all clients take part, 4 if rows must be gathered."""


StepMask = tuple[int, ...]
"""The clients of a group that train in a step: their positions in the group, in order."""


def step_masks(works: Sequence[Sequence[Hashable]], num_steps_apart: float = 0) -> list[StepMask]:
    """Schedules clients with unequal work: which clients train in each step.

    Each client trains on its batches in order; clients whose next batches have the same shape train together. The shape
    of the client with the most batches left goes first, so that the others can join its later steps. With one pass per
    client, that takes the fewest steps.

    Args:
        works: For each client, the signatures of its batches, in order.
        num_steps_apart: Initial steps for which clients must share a step index to train together.
    """
    waiting: dict[Hashable, list[int]] = {}
    positions = [0] * len(works)

    def wait(row: int) -> None:
        position = positions[row]
        if position < len(works[row]):
            # Beyond the first steps nothing in an optimizer's state depends on the position, so clients at different
            # ones may share a step.
            waiting.setdefault((works[row][position], min(position, num_steps_apart)), []).append(row)

    for row in range(len(works)):
        wait(row)
    masks = []
    while waiting:
        most_left = {
            kind: (max(len(works[row]) - positions[row] for row in rows), len(rows)) for kind, rows in waiting.items()
        }
        # Sorted, because a mask of all clients stands for the group's own tensors, whose rows are in order.
        rows = sorted(waiting.pop(max(most_left, key=most_left.__getitem__)))
        masks.append(tuple(rows))
        for row in rows:
            positions[row] += 1
            wait(row)
    return masks


def are_equal(works: Sequence[Sequence[Hashable]]) -> bool:
    """Whether clients have equal work, so that all of them train in each step."""
    return all(work == works[0] for work in works)


def group_clients(
    works: Sequence[Sequence[Hashable]],
    num_steps_apart: float = 0,
    wants_equal: bool = False,
    compute_bound: float = 0.0,
    on_gpu: bool = False,
) -> list[list[int]]:
    """Groups clients so that training takes the least time: all together, or only those with equal work.

    Args:
        works: For each client, the signatures of its batches, in order.
        num_steps_apart: Initial steps for which clients must share a step index to train together.
        wants_equal: Whether only clients with equal work may train together.
        compute_bound: Share of a single-client step that is arithmetic, which grouping does not make faster.
        on_gpu: Whether the clients train on a GPU, where gathering rows takes almost no time.
    """
    subset_cost = ALL_COST if on_gpu else SUBSET_COST
    equal: dict[Hashable, list[int]] = {}
    for row, work in enumerate(works):
        equal.setdefault(tuple(work), []).append(row)
    groups = list(equal.values())
    if wants_equal or len(groups) < 2:
        return groups
    apart = sum(len(works[rows[0]]) * (ALL_COST + compute_bound * len(rows) if rows[1:] else 1) for rows in groups)
    # A bound that needs no schedule: together, there are at least as many steps as the longest client has.
    lower_bound = subset_cost * max(map(len, works)) + compute_bound * sum(map(len, works))
    if lower_bound >= apart:
        return groups
    together = sum(subset_cost + compute_bound * len(mask) for mask in step_masks(works, num_steps_apart))
    return [list(range(len(works)))] if together < apart else groups
