"""An adversarial coordinator speaks the real messages to unmodified clients; each attack ends in the client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lightning_fl.privacy.secagg import ProtocolError, RetryRefused, SecureAggregationError
from lightning_fl.privacy.secagg.bonawitz_client import BonawitzClient
from lightning_fl.privacy.secagg.journal import Journal
from lightning_fl.privacy.secagg.messages import (
    KeyAdvertisement,
    Roster,
    SessionParams,
    Shares,
    Signatures,
    Survivors,
    Unmasking,
)
from lightning_fl.privacy.secagg.participant import Participant
from lightning_fl.privacy.secagg.primitives import AgreementKey, SigningKey
from tests.helpers.secagg import VECTOR_ID, Federation, identities, session_params


def assert_ended(client: BonawitzClient, call: Callable[[], bytes], message: str) -> None:
    """The call is refused, and the client has forgotten its secrets and answers nothing more."""
    with pytest.raises(SecureAggregationError, match=message):
        call()
    assert client.next_stage is None
    for again in (lambda: client.agree(Survivors([1, 2, 3]).encode()), lambda: client.unmask(Signatures({}).encode())):
        with pytest.raises(ProtocolError, match="answer no more"):
            again()


def test_an_honest_coordinator_gets_the_sum() -> None:
    federation = Federation()
    signatures = federation.signatures()
    answers = [client.unmask(signatures) for client in federation.clients.values()]
    vector, survivors = federation.server.finish(answers)
    assert survivors == [1, 2, 3, 4]
    assert torch.equal(vector, torch.stack(list(federation.inputs.values())).sum(0, dtype=torch.int32))


# ---- before it starts: terms


@pytest.mark.parametrize(("num_clients", "threshold"), [(2, 2), (1, 1), (4, 2), (5, 3), (9, 6), (4, 1)])
def test_a_threshold_or_round_that_is_too_small(num_clients: int, threshold: int) -> None:
    with pytest.raises(SecureAggregationError, match="could reveal single updates"):
        BonawitzClient(1, SigningKey(), session_params(num_clients, threshold), None, Journal())


# ---- the list of participants


def rosters(federation: Federation) -> dict[int, KeyAdvertisement]:
    return {number: KeyAdvertisement.decode(advertisement) for number, advertisement in federation.advertise().items()}


def assert_roster_refused(federation: Federation, advertisements: dict[int, KeyAdvertisement], message: str) -> None:
    client = federation.clients[1]
    assert_ended(client, lambda: client.share(Roster(advertisements).encode()), message)


def signed(
    federation: Federation, number: int, identity: SigningKey | None = None, **changes: object
) -> KeyAdvertisement:
    """What participant ``number`` would have signed with other keys, for another sum, or as somebody else."""
    agreed = replace(federation.agreed, **changes)  # type: ignore[type-var, arg-type]
    own = Participant(number, identity or federation.keys[number], agreed, None, AgreementKey(), AgreementKey())
    return own.advertisement()


@pytest.mark.parametrize("key", ["mask_key", "channel_key", "identity"])
def test_a_swapped_key(key: str) -> None:
    federation = Federation()
    advertisements = rosters(federation)
    advertisements[2] = replace(advertisements[2], **{key: AgreementKey().public})
    assert_roster_refused(federation, advertisements, "signature of participant 2|trusted")


@pytest.mark.parametrize("key", ["mask_key", "channel_key", "identity"])
def test_a_key_of_the_client_itself_in_the_name_of_another(key: str) -> None:
    federation = Federation()
    advertisements = rosters(federation)
    advertisements[2] = replace(advertisements[2], **{key: getattr(advertisements[1], key)})
    assert_roster_refused(federation, advertisements, "signature of participant 2")


@pytest.mark.parametrize("key", ["mask_key", "channel_key"])
def test_one_key_for_two_participants_who_conspire(key: str) -> None:
    federation = Federation()
    advertisements = rosters(federation)
    copied = replace(advertisements[3], **{key: getattr(advertisements[2], key)})
    advertisements[3] = replace(copied, signature=federation.keys[3].sign(copied.signed))
    assert_roster_refused(federation, advertisements, "same key")


def test_one_identity_twice() -> None:
    federation = Federation()
    advertisements = rosters(federation)
    advertisements[3] = signed(federation, 3, federation.keys[2])
    assert_roster_refused(federation, advertisements, "same key")


def test_an_identity_that_nobody_knows() -> None:
    federation = Federation()
    advertisements = rosters(federation)
    advertisements[4] = signed(federation, 4, SigningKey())
    assert_roster_refused(federation, advertisements, "not among the trusted identities")


def test_an_unsigned_participant() -> None:
    federation = Federation()
    advertisements = rosters(federation)
    advertisements[4] = replace(advertisements[4], signature=bytes(64))
    assert_roster_refused(federation, advertisements, "signature of participant 4")


def test_a_number_beyond_the_round() -> None:
    federation = Federation()
    advertisements = rosters(federation)
    advertisements[5] = signed(federation, 5, SigningKey())
    assert_roster_refused(federation, advertisements, "no participant 5")


def test_a_key_of_low_order() -> None:
    federation = Federation()
    advertisements = rosters(federation)
    bad = replace(advertisements[2], channel_key=bytes(32))
    advertisements[2] = replace(bad, signature=federation.keys[2].sign(bad.signed))
    assert_roster_refused(federation, advertisements, "low order")


def test_a_mask_key_of_low_order() -> None:
    """Client 2 conspires: all else in its messages is in order."""
    federation = Federation()
    federation.clients[2]._live.participant.mask_key.public = bytes(32)
    client, bundle = federation.clients[1], federation.bundles()[1]
    assert_ended(client, lambda: client.send(bundle, federation.inputs[1], VECTOR_ID), "low order")


@pytest.mark.parametrize("who", [[1, 2], [1]])
def test_a_list_below_the_threshold(who: list[int]) -> None:
    federation = Federation()
    advertisements = rosters(federation)
    assert_roster_refused(federation, {number: advertisements[number] for number in who}, "a secure sum needs 3")


@pytest.mark.parametrize("own", ["missing", "of another session"])
def test_a_list_without_the_client(own: str) -> None:
    federation = Federation()
    advertisements = rosters(federation)
    del advertisements[1]
    if own != "missing":
        advertisements[1] = signed(federation, 1)
    assert_roster_refused(federation, advertisements, "lacks number 1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": b"other" + bytes(27)}, "another global model"),
        ({"settings": bytes(32)}, "other settings"),
        ({"session": bytes(32)}, "another session"),
        ({"round": 3}, "another round"),
        ({"attempt": 7}, "another attempt"),
        ({"num_clients": 5}, "another num_clients"),
        ({"threshold": 4}, "another threshold"),
    ],
)
def test_terms_that_differ(change: dict[str, object], message: str) -> None:
    """A model of its own for each client, and messages replayed from another round, attempt or session."""
    federation = Federation()
    advertisements = rosters(federation)
    advertisements[2] = signed(federation, 2, **change)
    assert_roster_refused(federation, advertisements, message)


def test_another_list_for_each_client() -> None:
    """The honest keys of client 4 for some and a second advert that it has signed for others: nothing fits together."""
    federation = Federation()
    advertisements = rosters(federation)
    other = {**advertisements, 4: signed(federation, 4)}
    shares = {
        number: Shares.decode(federation.clients[number].share(Roster(advertisements).encode())) for number in (1, 3)
    }
    shares[2] = Shares.decode(federation.clients[2].share(Roster(other).encode()))
    client = federation.clients[1]
    bundle = Shares(1, {2: shares[2].sealed[1], 3: shares[3].sealed[1]})
    assert_ended(client, lambda: client.send(bundle.encode(), federation.inputs[1], VECTOR_ID), "changed in transit")


# ---- shares


def assert_bundle_refused(federation: Federation, bundle: bytes, message: str) -> None:
    client, vector = federation.clients[1], federation.inputs[1].clone()
    assert_ended(client, lambda: client.send(bundle, vector, VECTOR_ID), message)
    assert torch.equal(vector, federation.inputs[1])


def test_a_flipped_bit_in_a_share() -> None:
    federation = Federation()
    bundle = Shares.decode(federation.bundles()[1])
    flipped = bytearray(bundle.sealed[2])
    flipped[5] ^= 1
    assert_bundle_refused(federation, Shares(1, {**bundle.sealed, 2: bytes(flipped)}).encode(), "changed in transit")


def test_a_truncated_share() -> None:
    federation = Federation()
    assert_bundle_refused(federation, federation.bundles()[1][:-1], "bytes")


def test_a_share_for_somebody_else() -> None:
    federation = Federation()
    bundles = {number: Shares.decode(bundle) for number, bundle in federation.bundles().items()}
    wrong = {**bundles[1].sealed, 2: bundles[3].sealed[2]}
    assert_bundle_refused(federation, Shares(1, wrong).encode(), "meant for somebody else")


def test_the_shares_of_one_in_the_name_of_another() -> None:
    federation = Federation()
    bundle = Shares.decode(federation.bundles()[1])
    wrong = {**bundle.sealed, 2: bundle.sealed[3], 3: bundle.sealed[2]}
    assert_bundle_refused(federation, Shares(1, wrong).encode(), "changed in transit")


def test_a_bundle_of_somebody_else() -> None:
    federation = Federation()
    assert_bundle_refused(federation, federation.bundles()[2], "not for this client")


def test_shares_of_a_stranger() -> None:
    federation = Federation()
    bundle = Shares.decode(federation.bundles()[1])
    assert_bundle_refused(federation, Shares(1, {**bundle.sealed, 9: bundle.sealed[2]}).encode(), "not in the round")


def test_too_few_have_shared() -> None:
    federation = Federation()
    bundle = Shares.decode(federation.bundles()[1])
    assert_bundle_refused(
        federation, Shares(1, {2: bundle.sealed[2]}).encode(), "2 clients have shared .* 3 are needed"
    )


def test_replayed_shares_of_an_earlier_session() -> None:
    old, federation = Federation(), Federation()
    federation.bundles()
    assert_bundle_refused(federation, old.bundles()[1], "changed in transit")


# ---- survivors


@pytest.mark.parametrize(
    ("survivors", "message"),
    [
        ([2, 3, 4], "lacks this client"),
        ([1, 2, 3, 4, 5], "shared no secrets"),
        ([1, 2], "2 clients have arrived, 3 are needed"),
        ([1], "3 are needed"),
    ],
)
def test_lists_of_survivors_that_can_not_be(survivors: list[int], message: str) -> None:
    federation = Federation()
    federation.send()
    client = federation.clients[1]
    assert_ended(client, lambda: client.agree(Survivors(survivors).encode()), message)


def test_a_second_list_of_survivors() -> None:
    """To have the victim among the survivors and among those who left, the coordinator asks twice."""
    federation = Federation()
    federation.agree()
    client = federation.clients[1]
    assert_ended(client, lambda: client.agree(Survivors([1, 2, 3]).encode()), "asked to agree, but would unmask")


def test_other_survivors_for_each_client() -> None:
    """Clients 1 and 2 are told that 4 has left, clients 3 and 4 that it stays: no list finds enough signatures."""
    federation = Federation()
    federation.send()
    lists = {1: [1, 2, 3], 2: [1, 2, 3], 3: [1, 2, 3, 4], 4: [1, 2, 3, 4]}
    signatures: dict[int, bytes] = {}
    for number, survivors in lists.items():
        signatures |= Signatures.decode(federation.clients[number].agree(Survivors(survivors).encode())).by_number
    some = {1: [1, 2, 3], 3: [1, 3, 4]}
    for number, signers in some.items():
        client = federation.clients[number]
        request = Signatures({signer: signatures[signer] for signer in signers}).encode()
        assert_ended(client, lambda client=client, request=request: client.unmask(request), "signature of participant")


def test_too_few_signatures() -> None:
    federation = Federation()
    signatures = Signatures.decode(federation.signatures()).by_number
    client = federation.clients[1]
    request = Signatures({number: signatures[number] for number in (1, 2)}).encode()
    assert_ended(client, lambda: client.unmask(request), "2 clients have signed .* 3 of them are needed")


def test_signatures_of_one_in_the_name_of_others() -> None:
    federation = Federation()
    signatures = Signatures.decode(federation.signatures()).by_number
    client = federation.clients[1]
    request = Signatures(dict.fromkeys((1, 2, 3), signatures[1])).encode()
    assert_ended(client, lambda: client.unmask(request), "signature of participant 2")


def test_signatures_of_clients_that_have_left() -> None:
    federation = Federation()
    signatures = Signatures.decode(federation.signatures([1, 2, 3])).by_number
    client = federation.clients[1]
    request = Signatures({**signatures, 4: signatures[3]}).encode()
    assert_ended(client, lambda: client.unmask(request), "4 clients have signed")


def test_replayed_signatures_of_an_earlier_session() -> None:
    old, federation = Federation(), Federation()
    federation.agree()
    client = federation.clients[1]
    assert_ended(client, lambda: client.unmask(old.signatures()), "signature of participant")


def test_a_client_never_gives_both_secrets_of_one() -> None:
    federation = Federation()
    signatures = federation.signatures([1, 2, 3])
    for number in (1, 2, 3):
        answer = Unmasking.decode(federation.clients[number].unmask(signatures))
        assert set(answer.self_masks) == {1, 2, 3}
        assert set(answer.mask_keys) == {4}


# ---- order and repetition


def test_each_step_is_taken_once_and_in_order() -> None:
    federation = Federation()
    client = federation.clients[1]
    assert_ended(client, lambda: client.unmask(Signatures({}).encode()), "asked to unmask, but would advertise")
    federation = Federation()
    signatures = federation.signatures()
    client = federation.clients[1]
    client.unmask(signatures)
    assert_ended(client, lambda: client.unmask(signatures), "asked to unmask, but would answer no more")


def test_a_vector_leaves_once_even_if_the_round_is_said_to_have_failed() -> None:
    """The coordinator drops the round and asks again, among others or the same: the client's journal refuses."""
    keys, journal = identities(4), Journal()
    for attempt in range(2):
        federation = Federation()
        federation.agreed = session_params(4, attempt=attempt)
        trusted = [key.public for key in keys.values()]
        federation.keys = keys
        federation.clients = {
            number: BonawitzClient(number, key, federation.agreed, trusted, journal if number == 1 else Journal())
            for number, key in keys.items()
        }
        bundles = federation.bundles()
        client, vector = federation.clients[1], federation.inputs[1].clone()
        if attempt == 0:
            client.send(bundles[1], vector, VECTOR_ID)
            continue
        with pytest.raises(RetryRefused):
            client.send(bundles[1], vector, VECTOR_ID)
        assert torch.equal(vector, federation.inputs[1])


def test_a_vector_may_leave_again_only_if_its_sum_can_never_be_opened() -> None:
    """Of three clients all must give their shares; one that has given none can send its vector for another sum."""
    first = Federation(3)
    signatures = first.signatures()
    answers = [first.clients[number].unmask(signatures) for number in (1, 2)]
    with pytest.raises(SecureAggregationError):
        first.server.finish(answers)
    # Only the third has kept its shares, and with them the other two's own vectors closed to everybody.
    second = Federation(3)
    second.keys, second.journals = first.keys, first.journals
    trusted = [key.public for key in second.keys.values()]
    second.clients = {
        number: BonawitzClient(number, key, second.agreed, trusted, second.journals[number])
        for number, key in second.keys.items()
    }
    bundles = second.bundles()
    for number in (1, 2):
        with pytest.raises(RetryRefused):
            second.clients[number].send(bundles[number], second.inputs[number].clone(), VECTOR_ID)
    first.clients[3].end()
    assert second.clients[3].send(bundles[3], second.inputs[3].clone(), VECTOR_ID)
    # With four, three of which suffice, one that has sent its vector has nothing left to hold it back with.
    third = Federation(4)
    third.send()
    with pytest.raises(RetryRefused):
        third.journals[1].check(VECTOR_ID)


def test_the_terms_are_compared_field_by_field() -> None:
    assert {field for field in SessionParams.__dataclass_fields__ if field != "SIZE"} == {
        "session",
        "model",
        "settings",
        "round",
        "attempt",
        "num_clients",
        "threshold",
    }
