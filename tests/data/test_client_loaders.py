from __future__ import annotations

from typing import Any

import pytest

from lightning_fl.data.client_loaders import ClientLoaders

BATCHES = [[1, 2], [3]]


def make_batches() -> list[list[int]]:
    return list(BATCHES)


@pytest.mark.parametrize(
    ("loaders", "ids"),
    [
        (ClientLoaders({"a": BATCHES, 7: BATCHES}), ["a", 7]),
        (ClientLoaders({"b": make_batches, "a": make_batches}), ["b", "a"]),
        (ClientLoaders([BATCHES, BATCHES]), [0, 1]),
        (ClientLoaders(range(3, 5), lambda client: BATCHES), [3, 4]),
        (ClientLoaders(["x", "y"], lambda client: BATCHES), ["x", "y"]),
        (ClientLoaders({"x", 2}, lambda client: BATCHES), None),
    ],
)
def test_every_form_maps_ids_to_loaders_in_the_order_given(loaders: ClientLoaders, ids: list | None) -> None:
    assert ids is None or list(loaders) == list(loaders.ids) == ids
    assert len(loaders) == len(list(loaders))
    assert [list(loader) for loader in loaders.values()] == [BATCHES] * len(loaders)


@pytest.mark.parametrize("form", ["function", "mapping"])
def test_loaders_are_made_only_when_asked_for(form: str) -> None:
    made: list[Any] = []

    def make(client: int) -> list[int]:
        made.append(client)
        return [client]

    by_form = {
        "function": lambda: ClientLoaders(range(10**9), make),
        "mapping": lambda: ClientLoaders({client: lambda client=client: make(client) for client in range(10)}),
    }
    loaders = by_form[form]()
    assert 7 in loaders
    assert len(loaders) >= 10
    assert made == []
    assert [loaders[7], loaders[7]] == [[7], [7]]
    assert made == [7, 7]


def test_a_loader_that_can_be_called_is_still_a_loader() -> None:
    class Callable(list):
        def __call__(self) -> None:
            raise AssertionError("called")

    assert ClientLoaders({"a": Callable(BATCHES)})["a"] == BATCHES


@pytest.mark.parametrize("loaders", [ClientLoaders([BATCHES]), ClientLoaders(["a"], lambda client: BATCHES)])
@pytest.mark.parametrize("client", ["b", 1, -1, None])
def test_an_unknown_client_is_a_key_error(loaders: ClientLoaders, client: Any) -> None:
    with pytest.raises(KeyError):
        loaders[client]
    assert client not in loaders


def test_num_examples_is_what_was_told() -> None:
    assert ClientLoaders(range(2), lambda client: BATCHES, num_examples=lambda client: 3 + client).num_examples(1) == 4
    assert ClientLoaders([BATCHES]).num_examples(0) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "b", "a"], lambda client: BATCHES), "must be unique: found 2 different ids among 3"),
        (([],), "got no clients"),
        (({},), "got no clients"),
        ((range(0), lambda client: BATCHES), "got no clients"),
        ((iter([BATCHES]),), "got a list_iterator; expected a mapping"),
    ],
)
def test_clients_that_make_no_sense_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClientLoaders(*arguments)
