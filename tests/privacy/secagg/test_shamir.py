from __future__ import annotations

import itertools
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fl.privacy.secagg.shamir import PRIME, SHARE_BYTES, combine, split


def test_the_modulus_is_prime_and_above_every_secret() -> None:
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7, 11, 13, 17))
    assert PRIME > 2**256


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, secrets.token_bytes(32)], ids=["zeros", "ones", "random"])
def test_every_set_of_threshold_shares_gives_the_secret_back(secret: bytes) -> None:
    shares = split(secret, [1, 2, 4, 5, 9], 3)
    for some in itertools.combinations(shares, 3):
        assert combine({number: shares[number] for number in some}) == secret


@given(st.binary(min_size=32, max_size=32), st.integers(1, 12), st.data())
def test_any_shape(secret: bytes, num_holders: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, num_holders))
    shares = split(secret, list(range(1, num_holders + 1)), threshold)
    some = data.draw(st.permutations(list(shares)))[:threshold]
    assert combine({number: shares[number] for number in some}) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """For any other secret there is a share that completes two of threshold three: they tell nothing."""
    shares = split(secrets.token_bytes(32), [1, 2, 3], 3)
    points = {0: int.from_bytes(b"another secret of thirty-two byt", "little")}
    points |= {number: int.from_bytes(shares[number], "little") for number in (1, 2)}
    missing = sum(
        value * pow(x - y, -1, PRIME) * pow(x - z, -1, PRIME) * ((3 - y) * (3 - z))
        for (x, value), (y, _), (z, _) in (
            (first, *(other for other in points.items() if other != first)) for first in points.items()
        )
    )
    forged = (missing % PRIME).to_bytes(SHARE_BYTES, "little")
    assert combine({1: shares[1], 2: shares[2], 3: forged}) == b"another secret of thirty-two byt"


def test_a_share_changes_every_time() -> None:
    assert split(bytes(32), [1, 2, 3], 2) != split(bytes(32), [1, 2, 3], 2)


@pytest.mark.parametrize("numbers", [[0, 1, 2], [1, 1, 2], [-1, 2, 3], [PRIME, 1, 2]])
def test_wrong_numbers_are_refused(numbers: list[int]) -> None:
    with pytest.raises(ValueError, match="different and positive"):
        split(bytes(32), numbers, 2)


@pytest.mark.parametrize("threshold", [0, 4])
def test_wrong_thresholds_are_refused(threshold: int) -> None:
    with pytest.raises(ValueError, match=f"threshold {threshold}"):
        split(bytes(32), [1, 2, 3], threshold)


def test_shares_that_are_no_numbers_are_refused() -> None:
    shares = split(bytes(32), [1, 2, 3], 2)
    for wrong in (b"\xff" * SHARE_BYTES, shares[1][:-1]):
        with pytest.raises(ValueError, match="below the prime"):
            combine({1: wrong, 2: shares[2]})
