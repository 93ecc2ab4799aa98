"""Ids that all parties have; everybody else's stay unknown, in any order of the rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lightning_fl.communication import Group, Message, TorchGroup
from lightning_fl.privacy.secagg.errors import ProtocolError
from lightning_fl.privacy.secagg.primitives import digest
from lightning_fl.vertical import SharedIds, psi
from lightning_fl.vertical.curve import (
    PRIME,
    SecretFactor,
    check_point,
    encode_to_curve,
    hash_to_field,
    map_to_curve,
    point_of,
)
from lightning_fl.vertical.psi import TAG
from lightning_fl.vertical.store import decode, encode, num_bytes
from tests.contract.helpers import run_threads

VECTORS = {  # RFC 9380, J.4.2: u[0], Q.x, P.x
    b"": (
        "608d892b641f0328523802a6603427c26e55e6f27e71a91a478148d45b5093cd",
        "51125222da5e763d97f3c10fcc92ea6860b9ccbbd2eb1285728f566721c1e65b",
        "1bb913f0c9daefa0b3375378ffa534bda5526c97391952a7789eb976edfe4d08",
    ),
    b"abc": (
        "46f5b22494bfeaa7f232cc8d054be68561af50230234d7d1d63d1d9abeca8da5",
        "7d56d1e08cb0ccb92baf069c18c49bb5a0dcd927eff8dcf75ca921ef7f3e6eeb",
        "7c22950b7d900fa866334262fcaea47a441a578df43b894b4625c9b450f9a026",
    ),
}


@pytest.mark.parametrize("message", VECTORS)
def test_points_are_those_of_the_standard(message: bytes) -> None:
    tag = b"QUUX-V01-CS02-with-curve25519_XMD:SHA-512_ELL2_NU_"
    element = hash_to_field(message, tag)
    found = element, map_to_curve(element), encode_to_curve(message, tag)
    assert tuple(f"{number:064x}" for number in found) == VECTORS[message]


def test_a_factor_is_undone_and_factors_commute() -> None:
    first, second = SecretFactor(), SecretFactor()
    point = point_of(b"id", b"test")
    assert first.undo(second.multiply(first.multiply(point))) == second.multiply(point)


@pytest.mark.parametrize(
    "point",
    [bytes(32), (1).to_bytes(32, "little"), (PRIME - 1).to_bytes(32, "little")],
    ids=["0", "1", "-1"],
)
def test_points_of_low_order_are_refused(point: bytes) -> None:
    with pytest.raises(ProtocolError, match="low order"):
        SecretFactor().multiply(point)


@pytest.mark.parametrize("point", [b"", bytes(31), PRIME.to_bytes(32, "little"), b"\xff" * 32])
def test_malformed_points_are_refused(point: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a point"):
        check_point(point)


def test_a_store_gives_its_values_and_random_ones_for_other_keys() -> None:
    values = {f"key {number}".encode(): number for number in range(200)}
    store = encode(values, 13)
    assert len(store) == num_bytes(13)
    assert all(decode(store, key, 13) == value for key, value in values.items())
    others = [decode(store, f"other {number}".encode(), 13) for number in range(200)]
    assert len(set(others)) == 200
    assert min(others) > 1000
    assert encode(values, 13) != store  # whatever is not asked for is random


def lists(num_parties: int, size: int, shared: int) -> list[list[str]]:
    """Ids of each party: some that all have, in other places, some that two have, and own ones."""
    rng = random.Random(0)
    common = [f"patient {number}" for number in range(shared)]
    found = []
    for party in range(num_parties):
        of_two = [f"pair {pair} {n}" for pair in (party, (party + 1) % num_parties) for n in range(size // 8)]
        of_two = of_two if num_parties > 2 else []
        own = [f"own {party} {n}" for n in range(size - shared - len(of_two))]
        found.append([*common, *of_two, *own])
        rng.shuffle(found[-1])
    return found


def intersect(ids: Sequence[Sequence[str]], only: bool = False, kind: type[TorchGroup] = TorchGroup) -> list[SharedIds]:
    return run_threads(len(ids), lambda group: psi(ids[group.rank], group, only), timeout=300, kind=kind)


@pytest.mark.parametrize(
    ("num_parties", "size"), [(2, 60), (3, 60), pytest.param(3, 5000, marks=pytest.mark.slow), (4, 20)]
)
def test_the_rows_of_all_parties_agree(num_parties: int, size: int) -> None:
    ids = lists(num_parties, size, size // 3)
    found = intersect(ids)
    aligned = [[own[row] for row in shared.rows or ()] for own, shared in zip(ids, found, strict=True)]
    assert all(other == aligned[0] for other in aligned)
    assert set(aligned[0]) == set.intersection(*map(set, ids))
    assert len(aligned[0]) == found[0].size == size // 3


@pytest.mark.parametrize("num_parties", [2, 3])
def test_the_size_alone(num_parties: int) -> None:
    assert intersect(lists(num_parties, 24, 7), only=True) == [SharedIds(7, None)] * num_parties


def test_nothing_and_nobody_in_common() -> None:
    assert intersect([["a", "b"], ["c"], ["a", "c"]]) == [SharedIds(0, [])] * 3
    assert intersect([["a"], []]) == [SharedIds(0, [])] * 2


# ---- what a party has received


class Spy(TorchGroup):
    """Keeps what arrives."""

    received: dict[int, list[Message]]

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        messages = super().all_gather(message, topic)
        type(self).received.setdefault(self.rank, []).extend(messages)
        return messages


def everything(messages: Sequence[Message]) -> list[bytes]:
    """All values that a party has received, in order."""
    return [bytes(row.numpy().tobytes()) for message in messages for t in message.tensors.values() for row in t]


def test_the_order_of_what_arrives_does_not_depend_on_the_order_of_rows() -> None:
    # The first party's points in their order on the wire, told apart with its secret: a random order each time.
    ids = [[f"id {number}" for number in range(40)], [f"id {number}" for number in range(40)]]
    orders = [intersect(ids)[0].rows for _ in range(2)]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0] or ())


def test_received_values_fit_any_ids() -> None:
    Spy.received = {}
    ids = [["a", "b", "secret of 0"], ["b", "c", "secret of 1"], ["b", "a", "secret of 2"]]
    assert [shared.size for shared in intersect(ids, kind=Spy)] == [1, 1, 1]
    for messages in Spy.received.values():
        received = everything(messages)
        text = b"".join(received) + "".join(str(message.fields) for message in messages).encode()
        assert b"secret" not in text
        # A party that guesses an id finds neither its point, nor a multiple by a factor of its own, among them.
        public = [bytes.fromhex(message.fields["key"]) for message in messages[:3]]
        guesses = {point_of(x.encode(), TAG + digest(b"psi", *public)[:16]) for own in ids for x in own}
        assert not guesses & set(received)
    Spy.received, first = {}, Spy.received
    intersect(ids, kind=Spy)
    # The same ids again give nothing that was seen before: keys are of one run.
    assert not set(everything(first[0])) & set(everything(Spy.received[0]))


def test_the_first_party_does_not_learn_what_two_of_three_have() -> None:
    found: dict[int, Any] = {}

    class Leading(TorchGroup):
        def all_gather(self, message: Message, topic: str = "") -> list[Message]:
            messages = super().all_gather(message, topic)
            if self.rank == 0 and topic == "psi: stores":
                found.update(dict(enumerate(messages)))
            return messages

    # "shared by two" is with 0 and 1 but not with 2: its share from 1 looks as random as that of an id nobody has.
    ids = [["all", "shared by two", "mine"], ["all", "shared by two", "x"], ["all", "y", "z"]]
    first = intersect(ids, kind=Leading)[0]
    assert [ids[0][row] for row in first.rows or ()] == ["all"]
    assert {tuple(message.tensors["store"].shape) for rank, message in found.items() if rank} == {(1, num_bytes(1))}


# ---- refusals


def refused(ids: Sequence[Sequence[str]], kind: type[TorchGroup] = TorchGroup) -> str:
    with pytest.raises((ValueError, ProtocolError)) as error:
        intersect(ids, kind=kind)
    return str(error.value)


def test_an_id_that_stands_twice_is_told_to_all() -> None:
    assert "party 1 has 1 ids more than once" in refused([["a"], ["b", "b"]])


def test_ids_that_are_no_text_are_told_to_all() -> None:
    assert "party 0 has 1 ids that are not valid Unicode" in refused([["ok", "\udc80"], ["ok"]])
    assert "party 1 has 2 ids that are not text" in refused([["1"], [1, 2]])  # type: ignore[list-item]


def test_one_party_is_refused() -> None:
    from lightning_fl.communication import LocalGroup

    with pytest.raises(ValueError, match="needs at least two parties"):
        psi(["a"], LocalGroup())


class Cheating(TorchGroup):
    """The second party answers with points of low order."""

    replacement = torch.zeros(1, 32, dtype=torch.uint8)

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        if self.rank == 1 and topic == "psi: stores":
            message = Message(message.fields, {**message.tensors, "points": self.replacement})
        return super().all_gather(message, topic)


class SendingTooMuch(Cheating):
    replacement = torch.zeros(2, 32, dtype=torch.uint8)


class SendingFloats(Cheating):
    replacement = torch.zeros(1, 32)


@pytest.mark.parametrize(
    ("kind", "message"), [(Cheating, "low order"), (SendingTooMuch, r"Party 1 sent"), (SendingFloats, "Party 1 sent")]
)
@pytest.mark.spread(1)
def test_a_party_that_cheats_is_refused(kind: type[TorchGroup], message: str) -> None:
    def check(group: Group) -> str:
        try:
            psi(["a"], group)
        except Exception as error:
            return str(error)
        return ""

    ids = run_threads(2, check, timeout=5, kind=kind)
    assert message in ids[0]


class GreetingBadly(TorchGroup):
    """The second party leaves out its number of ids."""

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        if self.rank == 1 and topic == "psi: hello":
            message = Message({name: value for name, value in message.fields.items() if name != "size"})
        return super().all_gather(message, topic)


class Boasting(TorchGroup):
    """The first party names a size that cannot be."""

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        if self.rank == 0 and topic == "psi: result":
            message = Message({"size": 2})
        return super().all_gather(message, topic)


@pytest.mark.parametrize(
    ("kind", "message"), [(GreetingBadly, "first message does not consist of"), (Boasting, "reports 2 common ids")]
)
def test_fields_that_cannot_be_are_refused(kind: type[TorchGroup], message: str) -> None:
    def check(group: Group) -> str:
        try:
            psi(["a"], group, cardinality_only=True)
        except ProtocolError as error:
            return str(error)
        return ""

    assert any(message in told for told in run_threads(2, check, timeout=5, kind=kind))
