"""Silos have names: in messages, history and records; who is waited for is said, and why a silo has failed."""

from __future__ import annotations

import logging
import os
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.communication import attendance
from lightning_fl.communication.attendance import Attendance
from lightning_fl.strategies.validation import describe_failure
from tests.helpers.training import Plain, loader, trainer

NAMES = ("north", "south")
WAIT = timedelta(seconds=20)


def own_name() -> str:
    return NAMES[int(os.environ["RANK"])]


def names_in_history() -> Any:
    rank = int(os.environ["RANK"])
    strategy = FederatedStrategy("scaffold", silo_name=own_name())
    module = Plain()
    fit = trainer(strategy, 2)
    fit.fit(module, loader(8, seed=rank))
    return strategy.view.population.ids, strategy.federation.who(1), strategy.view.cohort, strategy.history[-1]


def test_silos_are_clients_by_their_names(run_ranks: Any) -> None:
    for ids, who, cohort, entry in run_ranks(2, names_in_history):
        assert list(ids) == list(cohort) == list(NAMES)
        assert who == "silo south"
        assert entry["num_clients"] == 2


class FailsInSetup(fl.callbacks.FederatedCallback):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.global_rank == 1:
            raise MisconfigurationException("patients.csv has no column 'age'.\nAdd it.")


def fails_in_setup() -> str:
    strategy = FederatedStrategy("fedavg", silo_name=own_name(), timeout=60.0)
    try:
        trainer(strategy, 1, callbacks=[FailsInSetup()]).fit(Plain(), loader(8, seed=int(os.environ["RANK"])))
    except Exception as error:
        # The process lives on in this test; elsewhere its end closes the connection.
        strategy.federation._backends.clear() if "column" in str(error) else None  # type: ignore[attr-defined]
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_the_others_are_told_which_silo_failed_and_why(run_ranks: Any) -> None:
    survivor, failed = run_ranks(2, fails_in_setup)
    assert failed.startswith("MisconfigurationException: patients.csv")
    assert survivor.startswith("RankLost: ")
    assert "Silo south has failed: MisconfigurationException: patients.csv has no column 'age'. Add it." in survivor


def bad_names(names: tuple[str, str]) -> str:
    try:
        trainer(FederatedStrategy(silo_name=names[int(os.environ["RANK"])] or None), 1).fit(Plain(), loader(8))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("north", "north"), "Ranks 0 and 1 are both called 'north'; silo names are unique."),
        (("north", ""), "north have a silo_name, but rank 1 has none. Give one to every silo"),
    ],
)
def test_names_are_unique_and_of_all(run_ranks: Any, names: tuple[str, str], message: str) -> None:
    for found in run_ranks(2, bad_names, names):
        assert found.startswith(message)


def test_a_name_that_would_be_ignored_or_does_not_fit_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="silo_name='north' is for a launch with data of its own"):
        trainer(FederatedStrategy(silo_name="north", num_clients=2), 1).fit(Plain(), loader(8))
    with pytest.raises(ValueError, match="silo_name='North Hospital' may hold up to 63 lower-case letters"):
        FederatedStrategy(silo_name="North Hospital")
    with pytest.raises(ValueError, match=r"silo_name .the certificate has the name. would be ignored"):
        FederatedStrategy(silo_name="north", federation="https://fl.example.org", kit="kit")


def test_words_of_private_silos_stay_with_them() -> None:
    error = KeyError("Jane Doe")
    assert "Jane" in describe_failure(error, hides=False)
    assert describe_failure(error, hides=True) == "KeyError, with more in its output."


# ---- who is waited for, over a store without processes


def test_who_joins_late_is_named_from_the_first_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attendance, "FIRST_NOTICE", 0.3)
    store = dist.HashStore()
    parties = [Attendance(store, rank, 3) for rank in range(3)]
    threads = [
        threading.Thread(target=parties[rank].arrive, args=(name, WAIT)) for rank, name in enumerate(["north", "east"])
    ]
    with caplog.at_level(logging.WARNING, "lightning_fl.communication"):
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        parties[2].arrive("south", WAIT)
        for thread in threads:
            thread.join()
    assert (
        "Waiting for others to join the federation: rank 2, 1 of 3 missing; here: silo north, silo east." in caplog.text
    )
    assert [party.names for party in parties] == [["north", "east", "south"]] * 3


def test_who_never_joins_is_an_error_with_a_sentence() -> None:
    alone = Attendance(dist.HashStore(), 0, 2)
    with pytest.raises(TimeoutError, match=r"rank 1, 1 of 2 missing after 0.2 s; rank 0 joined. Start all ranks"):
        alone.arrive("", timedelta(seconds=0.2))


def test_who_is_late_in_a_round_is_named_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    store = dist.HashStore()
    north, south = (Attendance(store, rank, 2) for rank in range(2))
    for party in (north, south):
        party.names = list(NAMES)
    before = north.patience
    with caplog.at_level(logging.WARNING, "lightning_fl.communication"):
        north.notice(5)
        south.notice(5)
    assert caplog.messages == ["Waiting for silo south, 1 of 2 missing."]  # south sees that north waits too
    assert north.patience == 2 * before


def test_what_another_silo_writes_cannot_forge_the_log() -> None:
    store = dist.HashStore()
    north, south = (Attendance(store, rank, 2) for rank in range(2))
    south.note_failure("gone\n\x1b[2JRound 7: all is well" + "x" * 1000)
    words = north.explain_loss(1)
    assert words.startswith("Rank 1 has failed: gone  [2JRound 7")
    assert len(words) < 600
    store.set("here/1", "north\nis here")
    with pytest.raises(ValueError, match="may hold up to 63 lower-case letters"):
        north.arrive("north", WAIT)
