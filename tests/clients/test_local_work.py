from __future__ import annotations

import pytest

from lightning_fl.clients.local_work import LocalWork


@pytest.mark.parametrize(
    ("limit", "num_batches", "expected"),
    [
        (1.0, 7, 7),
        (0.5, 7, 3),
        (0.99, 100, 99),
        (1.0, 0, 0),
        (0.5, 0, 0),
        (3, 7, 3),
        (7, 3, 3),
        (1, 7, 1),
        (0, 7, 0),
        (1.0, None, None),
        (3, None, None),
    ],
)
def test_a_pass_is_limited_by_a_count_or_a_share(
    limit: int | float, num_batches: int | None, expected: int | None
) -> None:
    assert LocalWork(limit=limit).pass_length(num_batches) == expected


@pytest.mark.parametrize(
    ("limit", "num_batches", "message"),
    [
        (0.1, 7, "leaves none of the client's 7 batches"),
        (0.5, None, "is a share, but the client's loader has no length"),
    ],
)
def test_a_share_that_leaves_nothing_or_of_nothing_known_is_refused(
    limit: float, num_batches: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"limit_train_batches={limit} {message}"):
        LocalWork(limit=limit).segments(num_batches)


@pytest.mark.parametrize(
    ("work", "num_batches", "segments", "num_steps"),
    [
        (LocalWork(), 5, [5], 5),
        (LocalWork(epochs=2), 5, [5, 5], 10),
        (LocalWork(epochs=2, accumulate=2), 5, [5, 5], 6),
        (LocalWork(epochs=2, accumulate=2, limit=4), 5, [4, 4], 4),
        (LocalWork(epochs=2), 0, [], 0),
        (LocalWork(epochs=2), None, [None, None], None),
        (LocalWork(steps=7), 5, [7], 7),
        (LocalWork(steps=7, accumulate=3), 5, [21], 7),
        (LocalWork(steps=7, accumulate=3), None, [21], 7),
        (LocalWork(steps=7), 0, [], 0),
        (LocalWork(epochs=2, part=0.1), 5, [1], 1),
        (LocalWork(epochs=2, part=0.5), 5, [5], 5),
        (LocalWork(epochs=2, part=0.51), 5, [5, 1], 6),
        (LocalWork(epochs=2, accumulate=2, part=0.9), 5, [5, 5], 6),
        (LocalWork(epochs=2, accumulate=2, part=0.7), 5, [5, 4], 5),
        (LocalWork(epochs=4, part=0.6), None, [None, None, None], None),
        (LocalWork(steps=7, accumulate=3, part=0.5), 5, [12], 4),
        (LocalWork(epochs=2, part=0.5), 0, [], 0),
    ],
)
def test_the_work_is_passes_or_exactly_so_many_steps(
    work: LocalWork, num_batches: int | None, segments: list[int | None], num_steps: int | None
) -> None:
    assert work.segments(num_batches) == segments
    assert work.num_steps(num_batches) == num_steps
