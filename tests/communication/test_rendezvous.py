from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_fl.communication import LocalGroup, rendezvous
from lightning_fl.communication.rendezvous import own_address
from tests.helpers.federation import join_ranks

RunRanks = Callable[..., list[Any]]


def reduce_in_two_groups() -> tuple[float, float]:
    first, second = join_ranks(), join_ranks()
    return second.all_reduce(torch.tensor(10.0)).item(), first.all_reduce(torch.tensor(1.0)).item()


def test_two_federations_of_the_same_processes_stay_apart(run_ranks: RunRanks) -> None:
    assert run_ranks(2, reduce_in_two_groups) == [(20.0, 2.0)] * 2


def wait_for_a_rank_that_stays_away() -> tuple[str, float]:
    group = join_ranks(timeout=10.0)
    tensor = torch.tensor(5.0)
    if group.rank == 0:
        with pytest.raises(RuntimeError) as caught:
            group.all_reduce(tensor)
        return str(caught.value), tensor.item()
    return "", tensor.item()


def test_a_rank_that_stays_away_is_an_error_and_the_tensor_is_kept(run_ranks: RunRanks) -> None:
    (error, kept), _ = run_ranks(2, wait_for_a_rank_that_stays_away)
    assert error
    assert kept == 5.0


def test_a_federation_of_one_needs_no_connection() -> None:
    group = join_ranks()
    assert isinstance(group, LocalGroup)
    assert (group.rank, group.size) == (0, 1)
    group.barrier()


def test_a_rank_is_reached_at_its_address_on_the_route_to_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert own_address("127.0.0.1", 29500, 2) == "127.0.0.1"
    routes = {"192.0.2.1": "10.77.0.1", "master": "127.0.1.1", "other": "10.77.0.2"}
    monkeypatch.setattr(rendezvous, "_source_of_route", lambda address, port: routes[address])
    assert own_address("other", 29500, 2) == "10.77.0.2"
    # Ranks on other machines, and a store whose name means this machine only here: the address others can reach.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert own_address("master", 29500, 2) == "10.77.0.1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_address("master", 29500, 2) == "127.0.1.1"


def address_of_gloo() -> float:
    return join_ranks().all_reduce(torch.tensor(1.0)).item()


@pytest.mark.parametrize("interface", [None, "lo"])
def test_the_interface_that_the_user_names_comes_first(run_ranks: RunRanks, interface: str | None) -> None:
    assert run_ranks(2, with_interface, interface) == [2.0] * 2


def with_interface(interface: str | None) -> float:
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        return address_of_gloo()
    finally:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
