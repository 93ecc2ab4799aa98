from __future__ import annotations

import numpy as np
import pytest

from lightning_fl.data.holdout import Holdout


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.2, 0.0), (0.0, 0.3), (0.25, 0.5)])
@pytest.mark.parametrize("num_samples", [0, 1, 2, 3, 10, 101])
def test_parts_share_no_sample_and_hold_all(shares: tuple[float, float], num_samples: int) -> None:
    holdout = Holdout(*shares)
    parts = [holdout.indices(num_samples, part, seed=0, client="a") for part in ("train", "val", "test")]
    assert sorted(np.concatenate(parts).tolist()) == list(range(num_samples))
    assert [len(part) for part in parts] == [holdout.size(num_samples, part) for part in ("train", "val", "test")]
    assert len(parts[0]) >= min(num_samples, 1)
    for part, share in zip(parts[1:], shares, strict=True):
        assert abs(len(part) - share * num_samples) <= 1


def test_clients_and_seeds_differ_and_repeat() -> None:
    first, again, client, seed = (
        Holdout(0.0, 0.5).indices(100, "test", *key).tolist() for key in ((0, "a"), (0, "a"), (0, "b"), (1, "a"))
    )
    assert first == again
    assert first != client
    assert first != seed


@pytest.mark.parametrize("shares", [(-0.1, 0.0), (0.5, 0.5), (0.0, 1.0)])
def test_shares_out_of_range_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="sum to less than 1"):
        Holdout(*shares).check()
