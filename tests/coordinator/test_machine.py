"""The life of rounds, with a clock that the test sets."""

from __future__ import annotations

import pytest

from lightning_fl.coordinator.machine import GRACE, Exchange, RoundMachine, Rules

RULES = {"silos": ("a", "b", "c"), "rounds": 3, "gather_s": 10.0, "deadline_s": 100.0, "max_deadline_s": 300.0}


def machine(**options: object) -> RoundMachine:
    return RoundMachine(Rules(**{**RULES, **options}))  # type: ignore[arg-type]


def opened(*silos: str, **options: object) -> RoundMachine:
    own = machine(**options)
    for silo in silos or ("a", "b", "c"):
        own.ask(silo, 0.0)
    own.open(0.0)
    return own


def close(own: RoundMachine) -> None:
    own.begin_close()
    own.closed()


def test_a_round_opens_at_once_when_all_have_asked() -> None:
    own = machine()
    for silo in ("a", "b"):
        own.ask(silo, 5.0)
        assert own.due(5.0) is None
    own.ask("c", 6.0)
    assert own.due(6.0) == "open"


def test_a_round_opens_after_a_while_without_those_that_have_not_asked() -> None:
    own = machine()
    own.ask("a", 5.0)
    own.ask("b", 14.0)  # does not make it later
    assert (own.due(14.9), own.due(15.0)) == (None, "open")
    own.open(15.0)
    assert own.cohort == {"a", "b"}


def test_a_round_with_too_few_does_not_open() -> None:
    own = machine(min_silos=2)
    own.ask("a", 0.0)
    assert own.due(1e6) is None
    assert own.lacks == 1
    own.ask("b", 1e6)
    assert own.due(1e6) == "open"


def test_a_round_closes_when_the_whole_cohort_has_sent() -> None:
    own = opened()
    own.accept("a", "1")
    own.accept("b", "2")
    assert own.due(99.0) is None
    own.accept("c", "3")
    assert own.due(1.0) == "close"


def test_the_deadline_closes_without_the_dead() -> None:
    own = opened()
    own.accept("a", "1")
    assert (own.due(99.9), own.due(100.0)) == (None, "close")
    close(own)
    assert (own.round, own.phase) == (1, "gathering")


def test_silence_excludes_nobody_before_the_deadline() -> None:
    own = opened()
    own.accept("a", "1")
    own.accept("b", "2")
    assert own.due(99.0) is None  # c has not said anything for 99 s
    own.accept("c", "3")
    close(own)
    assert own.expected == {"a", "b", "c"}


def test_a_round_with_too_few_updates_waits_and_says_so() -> None:
    own = opened(min_silos=2)
    own.accept("a", "1")
    assert own.due(1e6) is None
    assert own.lacks == 1
    own.accept("b", "2")
    assert own.due(1e6) == "close"


def test_the_next_round_does_not_wait_for_the_dead() -> None:
    own = opened()
    own.accept("a", "1")
    own.accept("b", "2")
    close(own)
    own.ask("a", 200.0)
    own.ask("b", 201.0)
    assert own.due(201.0) == "open"


def test_the_next_round_waits_for_one_that_has_come_back() -> None:
    own = opened()
    own.accept("a", "1")
    own.accept("b", "2")
    close(own)
    own.join("c")
    own.ask("a", 200.0)
    own.ask("b", 201.0)
    assert own.due(201.0) is None
    own.ask("c", 202.0)
    assert own.due(202.0) == "open"


def test_one_that_is_late_joins_the_open_round() -> None:
    own = opened("a", "b")
    assert own.ask("c", 50.0)
    assert own.takes("c", 0)
    own.accept("a", "1")
    own.accept("b", "2")
    assert own.due(60.0) is None
    assert not own.ask("c", 60.0)  # asked again: the same


def test_one_that_comes_to_a_round_over_its_deadline_gets_its_full_time() -> None:
    own = opened("a", "b", min_silos=2)
    own.accept("a", "1")
    own.ask("c", 500.0)
    own.accept("b", "2")
    assert own.due(599.0) is None
    assert own.due(600.0) == "close"


def test_a_transfer_that_goes_on_holds_the_round_up_to_a_limit() -> None:
    own = opened()
    own.accept("a", "1")
    for now in range(0, 300, 10):
        own.progress("b", float(now))
    assert own.due(299.0) is None
    assert own.due(300.0) == "close"  # max_deadline_s


def test_a_transfer_that_stalls_holds_the_round_for_a_minute_only() -> None:
    own = opened()
    own.accept("a", "1")
    own.progress("b", 90.0)
    assert own.due(90.0 + GRACE - 1) is None
    assert own.due(90.0 + GRACE) == "close"


def test_one_outside_the_cohort_does_not_hold_the_round() -> None:
    own = opened("a", "b")
    own.accept("a", "1")
    own.progress("c", 99.0)
    assert own.due(100.0) == "close"


def test_one_that_leaves_is_not_waited_for() -> None:
    own = opened()
    own.accept("a", "1")
    own.accept("b", "2")
    own.leave("c")
    assert own.due(1.0) == "close"


def test_one_that_leaves_after_its_update_counts() -> None:
    own = opened()
    for silo in ("a", "b", "c"):
        own.accept(silo, "1")
    own.leave("c")
    assert own.done.keys() == {"a", "b", "c"}
    close(own)
    assert own.expected == {"a", "b"}


def test_a_refused_update_is_not_waited_for_and_a_good_one_replaces_it() -> None:
    own = opened()
    own.accept("a", "1")
    own.accept("b", "2")
    own.refuse("c", "NaN")
    assert own.due(1.0) == "close"
    assert own.takes("c", 0)
    own.accept("c", "3")
    assert own.refused == {}


@pytest.mark.parametrize("round", [-1, 1, 7])
def test_updates_of_other_rounds_are_not_taken(round: int) -> None:
    assert not opened().takes("a", round)


def test_nothing_is_taken_while_the_round_is_added_up() -> None:
    own = opened()
    own.accept("a", "1")
    own.begin_close()
    assert not own.takes("b", 0)
    assert own.due(1e9) is None


def test_after_the_last_round_it_is_over() -> None:
    own = machine(rounds=1)
    own.ask("a", 0.0)
    own.open(0.0)
    own.accept("a", "1")
    close(own)
    assert own.phase == "over"
    assert own.due(1e9) is None


def test_a_reopened_round_knows_who_has_sent_and_its_deadline_starts_anew() -> None:
    own = machine()
    own.resume({"a", "b"}, {"a": "1"}, 1000.0)
    assert own.due(1099.0) is None
    own.accept("b", "2")
    assert own.due(1000.0) == "close"


def test_a_coordinator_that_restarts_again_and_again_still_closes_the_round() -> None:
    own = machine()
    limit, step = own.rules.max_deadline_s, own.rules.deadline_s * 0.9  # dies each time before its new deadline
    age = 0.0
    while age < limit:
        own.resume({"a", "b"}, {"a": "1"}, 1000.0, age)
        assert own.due(1000.0) is None
        age += step
    own.resume({"a", "b"}, {"a": "1"}, 1000.0, age)
    assert own.due(1000.0) == "close"


def test_a_restart_gives_no_more_time_than_is_left_of_the_longest() -> None:
    own = machine()
    own.resume({"a", "b"}, {"a": "1"}, 0.0, age=own.rules.max_deadline_s - 10.0)
    own.progress("b", 9.0)
    assert own.due(9.9) is None
    assert own.due(10.0) == "close"


def test_an_exchange_ends_when_all_have_come_or_in_time() -> None:
    own = Exchange({"a", "b", "c"}, 10.0)
    assert not own.due(1e9, set())
    own.accept("a", "1", 5.0)
    own.accept("b", "2", 12.0)
    assert not own.due(14.9, set())
    assert own.due(15.0, set())
    assert own.due(14.0, {"c"})  # who has left is not waited for


@pytest.mark.parametrize(
    "wrong",
    [
        {"silos": ()},
        {"silos": ("a", "a", "b")},
        {"rounds": 0},
        {"min_silos": 4},
        {"gather_s": -1.0},
        {"deadline_s": 0.0},
        {"max_deadline_s": 50.0},
        {"evaluation_s": 0.0},
    ],
)
def test_rules_that_can_not_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        machine(**wrong)
