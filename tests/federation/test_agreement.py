"""What parties that are about to train together are told of their differences."""

from __future__ import annotations

import pytest

from lightning_fl.federation.agreement import MAX_DIFFERENCES, differences, several


@pytest.mark.parametrize(
    ("expected", "found", "phrase"),
    [
        ("0.05", "0.5", "'x' is 0.5 on east and 0.05 on north"),
        ("0.05", None, "'x' is missing on east and 0.05 on north"),
        ("age, bmi, sex", "age, sex, bmi", "'x' are in another order: number 2 is sex on east and bmi on north"),
        ("age, sex=f, sex=m", "age, sex", "'x' on east have sex and lack sex=f, sex=m, unlike those on north"),
        ("age, smoker=ex, smoker=no", "age, smoker=no", "'x' on east lack smoker=ex, unlike those on north"),
        ("F(a=1, b=2)", "F(a=1, b=3)", "'x' is F(a=1, b=3) on east and F(a=1, b=2) on north"),
    ],
)
def test_a_difference_in_words(expected: str, found: str | None, phrase: str) -> None:
    own = {} if found is None else {"x": found}
    assert differences({"x": expected, "same": "1"}, {**own, "same": "1"}, "east", "north") == [phrase]


def test_many_differences_are_counted() -> None:
    expected = {str(number): "a" for number in range(MAX_DIFFERENCES + 3)}
    found = several(differences(expected, {}, "east", "north"))
    assert found.count("missing") == MAX_DIFFERENCES
    assert found.endswith("; and 3 more")
    assert several(["one"]) == "one"
