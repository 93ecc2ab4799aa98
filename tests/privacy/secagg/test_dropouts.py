"""Double masking: clients vanish wherever they like; the sum is that of the survivors, or there is none."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fl.privacy.secagg import SecureAggregationError
from lightning_fl.privacy.secagg.dropouts import STAGES
from lightning_fl.privacy.secagg.participant import two_thirds
from tests.helpers.secagg import simulate, vectors

STAYS = "stays"


def assert_exact_or_none(num_clients: int, outcome: Mapping[int, str]) -> bool:
    """Runs the protocol; tells whether there was a sum."""
    dropouts = {number: stage for number, stage in outcome.items() if stage != STAYS}
    inputs = vectors(num_clients, 5)
    expected = [n for n in inputs if outcome[n] not in STAGES[:3]]
    enough = sum(stage == STAYS for stage in outcome.values()) >= two_thirds(num_clients)
    if not enough:
        with pytest.raises(SecureAggregationError, match=f"{two_thirds(num_clients)} (are|of them are) needed"):
            simulate(inputs, dropouts)
        return False
    vector, survivors = simulate(inputs, dropouts)
    assert survivors == expected
    assert torch.equal(vector, torch.stack([inputs[n] for n in expected]).sum(0, dtype=torch.int32))
    return True


@pytest.mark.parametrize("num_clients", [3, 4])
@pytest.mark.spread(1)
def test_every_pattern(num_clients: int) -> None:
    results = [
        assert_exact_or_none(num_clients, dict(enumerate(stages, start=1)))
        for stages in itertools.product([*STAGES, STAYS], repeat=num_clients)
    ]
    patterns_with_a_sum = {3: 1, 4: 1 + 4 * 5}
    assert sum(results) == patterns_with_a_sum[num_clients]


def test_every_pattern_of_five_up_to_their_numbers() -> None:
    results = [
        assert_exact_or_none(5, dict(enumerate(stages, start=1)))
        for stages in itertools.combinations_with_replacement([*STAGES, STAYS], 5)
    ]
    assert sum(results) == 1 + 5


@pytest.mark.slow
def test_every_pattern_of_five() -> None:
    results = [
        assert_exact_or_none(5, dict(enumerate(stages, start=1)))
        for stages in itertools.product([*STAGES, STAYS], repeat=5)
    ]
    assert sum(results) == 1 + 5 * 5


@settings(max_examples=25)
@given(st.data())
def test_random_patterns_of_up_to_twelve(data: st.DataObject) -> None:
    num_clients = data.draw(st.integers(6, 12))
    leave = data.draw(st.integers(0, num_clients - two_thirds(num_clients) + 1))
    who = data.draw(st.permutations(range(1, num_clients + 1)))[:leave]
    outcome = dict.fromkeys(range(1, num_clients + 1), STAYS)
    outcome |= {number: data.draw(st.sampled_from(STAGES)) for number in who}
    assert_exact_or_none(num_clients, outcome)
