from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fl.seeding import ClientRandomness, client_generator, derive_seed, isolated_randomness, round_rng

ParticipationSampler = tuple[float, float, float]


def draw() -> ParticipationSampler:
    return torch.rand(1, dtype=torch.float64).item(), float(np.random.rand()), random.random()


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def draws_of(seed: int, round: int, client: int | str) -> ParticipationSampler:
    with isolated_randomness(seed, round, client):
        return draw()


PARTS: list[tuple] = [
    (0,),
    ("0",),
    (0, 0),
    (1, 23),
    (12, 3),
    (123,),
    ("1", "23"),
    (1, "23"),
    ("a", "b"),
    ("ab",),
    (-1,),
]


def test_seeds_are_the_same_for_the_same_parts_and_differ_for_others() -> None:
    assert [derive_seed(*parts) for parts in PARTS] == [derive_seed(*parts) for parts in PARTS]
    assert len({derive_seed(*parts) for parts in PARTS}) == len(PARTS)
    assert all(0 <= derive_seed(*parts) < 2**63 for parts in PARTS)


def test_seeds_are_the_same_in_every_process() -> None:
    assert derive_seed(0, 1, "client", "a") == 1113835820959177773


def test_generators_of_rounds_and_clients_repeat_and_differ() -> None:
    rounds = [(0, 0, "cohort"), (0, 1, "cohort"), (1, 0, "cohort"), (0, 0, "other")]
    values = [round_rng(*key).random() for key in rounds]
    assert values == [round_rng(*key).random() for key in rounds]
    clients = [
        (0, 0, "a", "noise"),
        (0, 0, "b", "noise"),
        (0, 1, "a", "noise"),
        (0, 0, "a", "mask"),
        (0, 0, 1, "noise"),
    ]
    values += [torch.rand(1, generator=client_generator(*key)).item() for key in clients]
    assert len(set(values)) == len(values)


def test_a_clients_draws_depend_on_seed_round_and_client_only() -> None:
    keys = [(0, 0, "a"), (0, 0, "b"), (0, 1, "a"), (1, 0, "a"), (0, 0, 0), (0, 0, "0")]
    first = [draws_of(*key) for key in keys]
    seed_everything(5)
    assert [draws_of(*key) for key in reversed(keys)] == first[::-1]
    for one, other in combinations(first, 2):
        assert not set(one) & set(other)


def test_the_generators_are_put_back() -> None:
    seed_everything(1)
    expected = [draw() for _ in range(3)]
    seed_everything(1)
    found = []
    for client in range(3):
        found.append(draw())
        draws_of(0, 0, client)
    assert found == expected


def test_the_generators_are_put_back_after_an_error() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), isolated_randomness(0, 0, "a"):
        torch.rand(1).item() / 0
    assert torch.equal(torch.rand(2), expected)


def test_going_from_client_to_client_puts_back_what_was_before_the_first() -> None:
    randomness = ClientRandomness()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    randomness.enter(0, 0, "a")
    first = draw()
    randomness.enter(0, 0, "b")
    second = draw()
    randomness.exit()
    randomness.exit()
    assert torch.equal(torch.rand(2), expected)
    assert (first, second) == (draws_of(0, 0, "a"), draws_of(0, 0, "b"))


def test_a_loaders_generator_is_set_and_put_back() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(range(20), batch_size=20, shuffle=True, generator=generator)
    before = generator.get_state()

    def order_of(client: str) -> list[int]:
        randomness = ClientRandomness()
        randomness.enter(0, 0, client)
        randomness.seed_generator(generator, derive_seed(0, 0, "loader", client))
        (batch,) = loader
        randomness.exit()
        return batch.tolist()

    orders = [order_of("a"), order_of("b"), order_of("a")]
    assert orders[0] == orders[2] != orders[1]
    assert torch.equal(generator.get_state(), before)


def test_a_generator_seeded_twice_goes_back_to_where_it_was_first() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    randomness = ClientRandomness()
    for seed in (1, 2):
        randomness.seed_generator(generator, seed)
        assert generator.initial_seed() == seed
    randomness.exit()
    assert torch.equal(generator.get_state(), before)


def test_leaving_without_having_entered_does_nothing() -> None:
    before = torch.get_rng_state()
    ClientRandomness().exit()
    assert torch.equal(torch.get_rng_state(), before)
