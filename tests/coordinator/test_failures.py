"""Silos and the coordinator die and come back: what was accepted counts once, and nothing else is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fl.communication import Message
from lightning_fl.coordinator.client import CallRefused
from lightning_fl.coordinator.store import Store
from lightning_fl.types import Update
from tests.helpers.distributed import PATIENCE
from tests.helpers.network import (
    EVALUATION,
    LiveCoordinator,
    TinySilo,
    in_threads,
    live_coordinator,
    rules,
    settings,
    wait_until,
)

Make = Callable[..., TinySilo]


def silos_of(live: LiveCoordinator, **steps: float) -> list[TinySilo]:
    steps = steps or {"east": 1.0, "north": 2.0, "south": 6.0}
    return [TinySilo(live.folder, live.address, name, step).join() for name, step in steps.items()]


def test_the_model_moves_by_the_mean_update(live: LiveCoordinator) -> None:
    silos = silos_of(live)
    assert in_threads(*(silo.run for silo in silos)) == [[3.0, 6.0, 9.0]] * 3
    assert [silo.counted for silo in silos] == [3, 3, 3]
    assert [len(silo.reports) for silo in silos] == [3, 3, 3]
    closed = live.events("round closed")
    assert [event["round"] for event in closed] == [0, 1, 2]
    assert all(sorted(event["members"]) == ["east", "north", "south"] for event in closed)


def test_a_round_closes_at_its_deadline_without_a_silo_that_has_died(folder: Path) -> None:
    with live_coordinator(folder, rules(deadline_s=2.0), settings()) as live:
        silos = silos_of(live)
        openings = in_threads(*(silo.open for silo in silos))
        # The third dies in training. Nobody waits for it in the second round either.
        east, north, _ = silos
        assert in_threads(lambda: east.send(openings[0]), lambda: north.send(openings[1])) == [1.5, 1.5]
        assert live.events("round closed")[0]["lost"] == ["south"]
        assert in_threads(east.round, north.round) == [3.0, 3.0]
        # It comes back, joins the next round, and has the model of the others.
        again = TinySilo(folder, live.address, "south", 6.0).join()
        assert in_threads(east.round, north.round, again.round) == [6.0, 6.0, 6.0]
        assert (east.counted, again.counted) == (3, 1)


def test_an_update_that_was_accepted_counts_although_its_silo_dies(live: LiveCoordinator) -> None:
    east, north, south = silos_of(live)
    openings = in_threads(east.open, north.open, south.open)
    south.die_after_sending(openings[2])
    # The process that comes after it is told so: it trains nothing again, and its state of the round is kept.
    again = TinySilo(live.folder, live.address, "south", 6.0).join()
    models = in_threads(
        lambda: [east.send(openings[0]), east.round()],
        lambda: [north.send(openings[1]), north.round()],
        again.round,
    )
    assert models == [[3.0, 6.0], [3.0, 6.0], 6.0]
    assert again.counted == 2


def test_a_silo_that_was_away_for_the_outcome_learns_it_when_it_comes_back(live: LiveCoordinator) -> None:
    east, north, south = silos_of(live)
    openings = in_threads(east.open, north.open, south.open)
    south.die_after_sending(openings[2])
    in_threads(lambda: east.send(openings[0]), lambda: north.send(openings[1]))
    again = TinySilo(live.folder, live.address, "south", 6.0).join()
    assert again.counted == 1


def test_a_silo_that_comes_back_while_the_round_is_added_up_keeps_its_state(live: LiveCoordinator) -> None:
    east, north, south = silos_of(live)
    openings = in_threads(east.open, north.open, south.open)
    south.die_after_sending(openings[2])
    adds_up, may_go_on = threading.Event(), threading.Event()
    close = live.coordinator.close

    def slowly() -> None:
        adds_up.set()
        assert may_go_on.wait(PATIENCE)
        close()

    live.coordinator.close = slowly  # type: ignore[method-assign]
    again: list[TinySilo] = []

    def come_back() -> float:
        assert adds_up.wait(PATIENCE)
        again.append(TinySilo(live.folder, live.address, "south", 6.0).join())
        may_go_on.set()
        return again[0].round()

    models = in_threads(
        lambda: [east.send(openings[0]), east.round()], lambda: [north.send(openings[1]), north.round()], come_back
    )
    assert models == [[3.0, 6.0], [3.0, 6.0], 6.0]
    assert again[0].counted == 2


def test_a_silo_that_is_late_drops_its_update_and_its_state(folder: Path) -> None:
    with live_coordinator(folder, rules(deadline_s=1.0, min_silos=2), settings()) as live:
        east, north, south = silos_of(live)
        openings = in_threads(east.open, north.open, south.open)
        in_threads(lambda: east.send(openings[0]), lambda: north.send(openings[1]))
        assert south.send(openings[2]) == 1.5  # the model of the others
        assert (south.counted, south.done) == (0, 0)
        assert in_threads(east.round, north.round, south.round) == [4.5] * 3
        assert south.counted == 1


def test_a_silo_that_has_missed_whole_rounds_goes_on_with_the_newest_model(folder: Path) -> None:
    with live_coordinator(folder, rules(deadline_s=1.0, min_silos=2, rounds=5), settings()) as live:
        east, north, south = silos_of(live)
        openings = in_threads(east.open, north.open, south.open)
        in_threads(lambda: east.send(openings[0]), lambda: north.send(openings[1]))
        for _ in range(3):
            in_threads(east.round, north.round)
        assert south.send(openings[2]) == 6.0  # that of round 3: the outcome of its own round is gone
        assert south.done == 3
        assert in_threads(east.round, north.round, south.round) == [9.0] * 3


@pytest.mark.parametrize("when", ["gathering", "training", "sent"])
@pytest.mark.spread(1)
def test_the_run_goes_on_when_the_coordinator_is_started_again(live: LiveCoordinator, when: str) -> None:
    east, north, south = silos_of(live)
    if when == "gathering":
        first = threading.Thread(target=lambda: None)
        live.restart()
        assert in_threads(east.round, north.round, south.round) == [3.0] * 3
    else:
        openings = in_threads(east.open, north.open, south.open)
        results: list[float] = []
        first = threading.Thread(target=lambda: results.append(south.send(openings[2])), daemon=True)
        if when == "sent":
            first.start()
            live.wait_for("update accepted")
        live.restart()
        assert live.coordinator.machine.phase == "training"
        if when == "training":
            first.start()
        assert in_threads(lambda: east.send(openings[0]), lambda: north.send(openings[1])) == [3.0] * 2
        first.join()
        assert results == [3.0]
    assert in_threads(east.round, north.round, south.round) == [6.0] * 3
    assert [silo.counted for silo in (east, north, south)] == [2, 2, 2]


def test_silos_wait_for_a_coordinator_that_is_away(live: LiveCoordinator) -> None:
    silos = silos_of(live)
    live.stop()
    results: list[Any] = []
    waiting = threading.Thread(target=lambda: results.extend(in_threads(*(silo.round for silo in silos))), daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    live.start()
    waiting.join()
    assert results == [3.0] * 3


def test_a_wrong_update_is_refused_by_name_and_the_round_goes_on(live: LiveCoordinator) -> None:
    east, north, south = silos_of(live)
    openings = in_threads(east.open, north.open, south.open)
    wrong = {
        "NaN": Update({"x": torch.tensor([1.0, float("nan"), 1.0])}),
        "expected F32": Update({"x": torch.ones(3, dtype=torch.float64)}),
        r"expected F32 \[3\]": Update({"x": torch.ones(4)}),
        "delta y": Update({"x": torch.ones(3), "y": torch.ones(3)}),
        "weight": Update({"x": torch.ones(3)}, weight=-1.0),
        "weight is nan": Update({"x": torch.ones(3)}, weight=float("nan")),
    }
    for reason, update in wrong.items():
        with pytest.raises(CallRefused, match=f"'south'.*{reason}") as caught:
            south.send(openings[2], update)
        assert caught.value.status == 422
    assert in_threads(lambda: east.send(openings[0]), lambda: north.send(openings[1])) == [1.5] * 2
    assert "south" in live.events("round closed")[0]["refused"]
    assert len(live.events("refused")) >= len(wrong)


def test_settings_and_models_that_differ_are_refused_at_join(live: LiveCoordinator) -> None:
    live.coordinator.expected = {"algorithm": "FedAvg()"}
    TinySilo(live.folder, live.address, "east").join({"algorithm": "FedAvg()"}, {"feature 0": "age"})
    with pytest.raises(CallRefused, match=r"'algorithm' is FedProx\(\) on silo north and FedAvg\(\) on the coord"):
        TinySilo(live.folder, live.address, "north").join({"algorithm": "FedProx()"})
    with pytest.raises(CallRefused, match=r"'south' is another one: 'params x' is F32 \[4\], expected F32 \[3\]"):
        TinySilo(live.folder, live.address, "south", size=4).join({"algorithm": "FedAvg()"}, {"feature 0": "age"})
    with pytest.raises(CallRefused, match=r"'feature 0' is missing on silo south and age on the silo that came first"):
        TinySilo(live.folder, live.address, "south").join({"algorithm": "FedAvg()"})
    assert len(live.events("join refused")) == 3


@pytest.mark.parametrize("when", ["before the others have evaluated", "after"])
def test_the_evaluation_of_a_silo_that_has_started_again_is_not_waited_for(live: LiveCoordinator, when: str) -> None:
    east, north, south = silos = silos_of(live)
    openings = in_threads(east.open, north.open, south.open)
    in_threads(*(partial(silo.send, opening) for silo, opening in zip(silos, openings, strict=True)))

    def evaluate(silo: TinySilo) -> int:
        return len(silo.federation.gather(Message(EVALUATION), "evaluation"))

    def start_again() -> int:  # south has forgotten that it was to evaluate
        if when == "after":
            evaluations = live.folder / "federation" / "rounds" / "000000" / "evaluation.0"
            wait_until(lambda: len(list(evaluations.glob("*.ok"))) == 2, "two evaluations")
        TinySilo(live.folder, live.address, "south").join()
        return 0

    if when != "after":
        start_again()
        assert in_threads(partial(evaluate, east), partial(evaluate, north)) == [2, 2]
    else:
        assert in_threads(partial(evaluate, east), partial(evaluate, north), start_again) == [2, 2, 0]


def test_a_silo_that_leaves_is_not_waited_for(live: LiveCoordinator) -> None:
    east, north, south = silos_of(live)
    openings = in_threads(east.open, north.open, south.open)
    south.federation.leave("the owner wants it")
    assert in_threads(lambda: east.send(openings[0]), lambda: north.send(openings[1])) == [1.5] * 2
    assert live.events("leave")[0]["reason"] == "the owner wants it"


def test_a_silo_that_is_ahead_of_its_coordinator_says_so(live: LiveCoordinator) -> None:
    (east,) = silos_of(live, east=1.0)
    east.done = 6
    with pytest.raises(CallRefused, match="finished round 6, but the coordinator is at round 0"):
        east.open()


def test_two_coordinators_do_not_share_a_folder(live: LiveCoordinator) -> None:
    with pytest.raises(ValueError, match="Another coordinator is running"):
        Store(live.store.root)
