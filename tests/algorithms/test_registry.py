from __future__ import annotations

import pytest

from lightning_fl.algorithms import Algorithm, FedAvg, Scaffold, get_algorithm, register, registered


@pytest.mark.parametrize(("name", "algorithm"), [("fedavg", FedAvg()), ("FedAvg", FedAvg()), ("scaffold", Scaffold())])
def test_a_name_gives_the_algorithm_with_its_defaults(name: str, algorithm: Algorithm) -> None:
    assert get_algorithm(name) == algorithm


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fedavgg", r"'fedavgg'; expected one of .*fedavg.*scaffold.* Did you mean 'fedavg'\?"),
        ("zzz", r"'zzz'; expected one of [^?]*$"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_algorithm(name)


def test_a_name_cannot_be_taken_twice() -> None:
    before = registered()
    with pytest.raises(ValueError, match="'fedavg' is taken by FedAvg"):
        register("fedavg")(Scaffold)
    assert registered() == before


def test_a_registered_class_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fl.algorithms.registry._ALGORITHMS", registered())

    class Own(Algorithm):
        pass

    assert register("own")(Own) is Own
    assert isinstance(get_algorithm("own"), Own)
    assert registered()["own"] is Own


def test_the_list_of_names_is_a_copy() -> None:
    registered().clear()
    assert {"fedavg", "scaffold"} <= registered().keys()
