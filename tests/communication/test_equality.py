"""Ranks find out whether they hold the same content, and tell nothing else about it."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from lightning_fl.communication import Group, Message, all_hold_the_same, equality
from tests.helpers.federation import join_ranks


def compare(contents: list[bytes]) -> tuple[bool, list[str]]:
    group = join_ranks()
    told: list[str] = []
    gather = type(group).all_gather

    def listen(self: Group, message: Message, topic: str = "") -> list[Message]:
        told.extend(message.fields.values())
        return gather(self, message, topic)

    type(group).all_gather = listen  # type: ignore[method-assign]
    try:
        return all_hold_the_same(group, contents[group.rank], "contents"), told
    finally:
        type(group).all_gather = gather  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "contents",
    [[b"x", b"x"], [b"x", b"y"], [b"x"] * 4, [b"x", b"x", b"x", b"y"], [b"y", b"x", b"x", b"x"], [b"", b"x"]],
    ids=str,
)
@pytest.mark.spread(2)
def test_ranks_learn_whether_all_hold_the_same(run_ranks: Any, contents: list[bytes]) -> None:
    expected = len(set(contents)) == 1
    assert [same for same, _ in run_ranks(len(contents), compare, contents)] == [expected] * len(contents)


def test_what_is_told_differs_each_time_and_is_no_function_of_the_content(run_ranks: Any) -> None:
    """A hash, also one whose key all ranks know, would be the same for the same content."""
    told = [text for _ in range(2) for _, own in run_ranks(2, compare, [b"x", b"x"]) for text in own]
    # The two ranks' answers are the same number, which is how they know.
    assert len(told) == 12
    assert sorted(told.count(text) for text in set(told)) == [1, 1, 1, 1, 4, 4]
    assert all(hashlib.new(kind, b"x").hexdigest() not in text for kind in ("sha256", "blake2b") for text in told)


def test_the_prime_is_safe() -> None:
    for number in (equality.PRIME, equality.PRIME // 2):
        assert number.bit_length() >= 2047
        # Fermat's test; a composite number passes it for one base in millions of millions at this length.
        assert all(pow(base, number - 1, number) == 1 for base in (2, 3, 5, 7))


class Pretender(Group):
    """Two ranks, of which the other sends what it likes."""

    def __init__(self, sent: Any) -> None:
        super().__init__(0, 2)
        self.sent = sent

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        return [message, Message({"element": self.sent})]

    def all_reduce(self, *_: Any) -> Any: ...
    def broadcast(self, *_: Any) -> Any: ...
    def barrier(self) -> None: ...


@pytest.mark.parametrize("sent", ["0", "1", f"{equality.PRIME - 1:x}", f"{equality.PRIME:x}", "f" * 513, 7, None, "-2"])
def test_what_would_always_match_is_refused(sent: Any) -> None:
    with pytest.raises(ValueError, match="not in the group modulo"):
        all_hold_the_same(Pretender(sent), b"x", "contents")
