"""Pairwise masks: they cancel in the sum of all, and whatever less is seen looks random."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_fl.privacy.secagg import ProtocolError, RetryRefused, SecureAggregationError
from lightning_fl.privacy.secagg.journal import Journal
from lightning_fl.privacy.secagg.masks import apply_masks
from lightning_fl.privacy.secagg.messages import KeyAdvertisement
from lightning_fl.privacy.secagg.pairwise import PairwiseClient
from lightning_fl.privacy.secagg.participant import Participant
from lightning_fl.privacy.secagg.primitives import AgreementKey, SigningKey
from tests.helpers.secagg import VECTOR_ID, identities, pairwise_clients, pairwise_views, session_params, vectors

MILLION = 1_000_000
COALITIONS = list(itertools.combinations(range(1, 5), 2))
Masking = Callable[[Tensor, Sequence[tuple[bytes, int]]], None]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_clients", [3, 4, 7])
@pytest.mark.parametrize("vector_size", [0, 1, 100_000])
def test_the_sum_is_exact(num_clients: int, vector_size: int, dtype: torch.dtype) -> None:
    inputs = vectors(num_clients, vector_size, dtype)
    views = pairwise_views(inputs)
    assert torch.equal(
        torch.stack(list(views.values())).sum(0, dtype=dtype), torch.stack(list(inputs.values())).sum(0, dtype=dtype)
    )
    if vector_size > 1:
        assert all((views[number] == inputs[number]).double().mean() < 0.001 for number in inputs)


def chi_squares(vector: Tensor) -> list[float]:
    """Of each byte of the words, against the uniform distribution: about 255, above 400 once in 10^8."""
    columns = vector.contiguous().view(torch.uint8).reshape(len(vector), -1)
    expected = len(vector) / 256
    counts = [torch.bincount(column.long(), minlength=256).double() for column in columns.T]
    return [float(((count - expected) ** 2 / expected).sum()) for count in counts]


def victims_views(
    vector_size: int, value: int, coalition: Sequence[int], masking: Masking
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What two clients send, and that with all masks that the other clients know taken off."""
    clients = pairwise_clients(len(coalition) + 2)
    advertisements = [client.advertise() for client in clients.values()]
    keys = {number: dict(client.masks(advertisements, VECTOR_ID)) for number, client in clients.items()}
    sent, left = {}, {}
    for victim in clients.keys() - set(coalition):
        sent[victim] = torch.full((vector_size,), value, dtype=torch.int32)
        masking(sent[victim], list(keys[victim].items()))
        known = [(key, sign) for other in coalition for key, sign in keys[other].items() if key in keys[victim]]
        assert len(known) == len(coalition)
        left[victim] = sent[victim].clone()
        apply_masks(left[victim], known)
    return sent, left


def assert_looks_random(masking: Masking, vector_size: int = MILLION, coalition: Sequence[int] = (1, 3)) -> None:
    for value in (0, 2**31 - 1):
        _, left = victims_views(vector_size, value, coalition, masking)
        for view in left.values():
            assert max(chi_squares(view)) < 400
    torch.manual_seed(0)
    first, _ = victims_views(1000, 0, coalition, masking)
    torch.manual_seed(0)
    again, _ = victims_views(1000, 0, coalition, masking)
    assert not any(torch.equal(first[victim], again[victim]) for victim in first), "the masks follow torch's seed"


def assert_look_random(masking: Masking, vector_size: int) -> None:
    for coalition in COALITIONS:
        assert_looks_random(masking, vector_size, coalition)


@pytest.mark.parametrize("coalition", COALITIONS, ids=str)
def test_every_coalition_of_all_but_two_sees_noise(coalition: tuple[int, ...]) -> None:
    assert_looks_random(apply_masks, coalition=coalition)


def test_partial_sums_on_a_ring_are_noise() -> None:
    inputs = {number: torch.zeros(MILLION, dtype=torch.int32) for number in range(1, 5)}
    views = pairwise_views(inputs)
    for size in (1, 2, 3):
        for start in range(4):
            ranks = [(start + step) % 4 + 1 for step in range(size)]
            partial = torch.stack([views[rank] for rank in ranks]).sum(0, dtype=torch.int32)
            assert max(chi_squares(partial)) < 400


def one_mask_dropped(vector: Tensor, masks: Sequence[tuple[bytes, int]]) -> None:
    apply_masks(vector, masks[:-1])


def only_16_bits(vector: Tensor, masks: Sequence[tuple[bytes, int]]) -> None:
    """Of the mask with the last participant; the coalition knows the others."""
    for index, (key, sign) in enumerate(masks):
        noise = torch.zeros_like(vector)
        apply_masks(noise, [(key, 1)])
        vector += sign * (noise & 0xFFFF if index == len(masks) - 1 else noise)


def masks_of_torch(vector: Tensor, masks: Sequence[tuple[bytes, int]]) -> None:
    for _, sign in masks:
        vector += sign * torch.randint(-(2**31), 2**31, vector.shape, dtype=torch.int64).int()


@pytest.mark.parametrize("broken", [one_mask_dropped, only_16_bits, masks_of_torch])
def test_broken_masks_are_caught(broken: Masking) -> None:
    with pytest.raises(AssertionError):
        assert_look_random(broken, 100_000)


# ---- what a client refuses


def adverts_of(clients: Mapping[int, PairwiseClient]) -> dict[int, KeyAdvertisement]:
    return {number: KeyAdvertisement.decode(client.advertise()) for number, client in clients.items()}


def assert_refused(
    clients: Mapping[int, PairwiseClient], advertisements: Sequence[KeyAdvertisement], message: str
) -> None:
    vector = torch.arange(8, dtype=torch.int32)
    with pytest.raises(SecureAggregationError, match=message):
        clients[1].mask(vector, [advertisement.encode() for advertisement in advertisements], VECTOR_ID)
    assert torch.equal(vector, torch.arange(8, dtype=torch.int32)), "nothing was masked, so nothing is sent"


def test_two_clients_are_refused() -> None:
    clients = pairwise_clients(2)
    assert_refused(
        clients, list(adverts_of(clients).values()), "Only 2 clients are left in round 4; a secure sum needs 3"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_key": AgreementKey().public}, "signature of participant 2"),
        ({"number": 3}, "same number"),
        ({"has_update": False}, "signature of participant 2"),
        ({"signature": bytes(64)}, "signature of participant 2"),
    ],
)
def test_a_forged_advert_is_refused(change: dict[str, object], message: str) -> None:
    clients = pairwise_clients(3)
    advertisements = adverts_of(clients)
    advertisements[2] = replace(advertisements[2], **change)
    assert_refused(clients, list(advertisements.values()), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": b"x" * 32}, "another global model"),
        ({"settings": b"x" * 32}, "other settings"),
        ({"session": b"x" * 32}, "another session"),
        ({"round": 3}, "another round: they are old"),
        ({"attempt": 1}, "another attempt"),
    ],
)
def test_keys_for_another_sum_are_refused(change: dict[str, object], message: str) -> None:
    """Replayed messages, and a coordinator that gives each client another model."""
    keys = identities(3)
    trusted = [key.public for key in keys.values()]
    agreed = session_params(3, 3)
    clients = {number: PairwiseClient(number, key, agreed, trusted, Journal()) for number, key in keys.items()}
    advertisements = adverts_of(clients)
    advertisements[2] = Participant(2, keys[2], replace(agreed, **change), trusted, AgreementKey()).advertisement()
    assert_refused(clients, list(advertisements.values()), message)


def test_a_stranger_is_refused() -> None:
    clients = pairwise_clients(4)
    advertisements = adverts_of(clients)
    advertisements[4] = Participant(4, SigningKey(), session_params(4, 3), None, AgreementKey()).advertisement()
    assert_refused(clients, list(advertisements.values()), "not among the trusted identities")


def test_one_identity_under_two_numbers_is_refused() -> None:
    keys = identities(3)
    trusted = [key.public for key in keys.values()]
    clients = {n: PairwiseClient(n, key, session_params(4, 3), trusted, Journal()) for n, key in keys.items()}
    advertisements = [
        *adverts_of(clients).values(),
        Participant(4, keys[2], session_params(4, 3), None, AgreementKey()).advertisement(),
    ]
    assert_refused(clients, advertisements, "same key")


def test_a_key_of_another_participant_is_refused() -> None:
    keys = identities(3)
    trusted = [key.public for key in keys.values()]
    shared = AgreementKey()
    clients = {n: PairwiseClient(n, key, session_params(3, 3), trusted, Journal()) for n, key in keys.items()}
    copies = [Participant(n, keys[n], session_params(3, 3), trusted, shared).advertisement() for n in (2, 3)]
    assert_refused(clients, [adverts_of(clients)[1], *copies], "same key")


def test_a_key_of_low_order_is_refused() -> None:
    class Known(AgreementKey):
        public = bytes(32)

        def __init__(self) -> None:
            pass

    keys = identities(3)
    trusted = [key.public for key in keys.values()]
    clients = {n: PairwiseClient(n, key, session_params(3, 3), trusted, Journal()) for n, key in keys.items()}
    advertisements = adverts_of(clients)
    advertisements[2] = Participant(2, keys[2], session_params(3, 3), trusted, Known()).advertisement()
    assert_refused(clients, list(advertisements.values()), "low order")


def test_a_list_without_oneself_is_refused() -> None:
    clients = pairwise_clients(4)
    advertisements = adverts_of(clients)
    assert_refused(clients, [advertisements[2], advertisements[3], advertisements[4]], "lacks number 1")
    clients = pairwise_clients(3)
    advertisements = adverts_of(clients)
    assert_refused(
        clients, [adverts_of(pairwise_clients(3))[1], advertisements[2], advertisements[3]], "lacks number 1"
    )


# ---- the retry trap


def attempt(keys: dict[int, SigningKey], journals: dict[int, Journal], who: Sequence[int], number: int) -> list[Tensor]:
    agreed = session_params(4, 3, attempt=number)
    trusted = [key.public for key in keys.values()]
    clients = {one: PairwiseClient(one, keys[one], agreed, trusted, journals[one]) for one in who}
    advertisements = [client.advertise() for client in clients.values()]
    sent = []
    for one, client in clients.items():
        vector = torch.full((4,), one, dtype=torch.int32)
        client.mask(vector, advertisements, VECTOR_ID)
        sent.append(vector)
    return sent


def test_the_same_vector_never_leaves_among_others(tmp_path: Path) -> None:
    keys = identities(4)
    journals = {number: Journal(tmp_path / str(number)) for number in keys}
    total = torch.stack(attempt(keys, journals, [1, 2, 3, 4], 0)).sum(0, dtype=torch.int32)
    assert total.tolist() == [10] * 4
    with pytest.raises(RetryRefused, match="the difference of the two sums could reveal single updates"):
        attempt(keys, journals, [1, 2, 3], 1)
    restarted = {number: Journal(tmp_path / str(number)) for number in keys}
    with pytest.raises(RetryRefused):
        attempt(keys, restarted, [1, 2, 3], 0)
    again = torch.stack(attempt(keys, restarted, [1, 2, 3, 4], 1)).sum(0, dtype=torch.int32)
    assert again.tolist() == [10] * 4, "the same participants may try again: their sum tells nothing new"


def test_without_the_journal_two_sums_tell_an_update() -> None:
    """The trap itself: forgetful clients give client 4 away."""
    keys = identities(4)
    sums = [
        torch.stack(attempt(keys, {number: Journal() for number in keys}, who, number)).sum(0, dtype=torch.int32)
        for number, who in enumerate(([1, 2, 3, 4], [1, 2, 3]))
    ]
    assert (sums[0] - sums[1]).tolist() == [4] * 4


def test_a_new_attempt_has_new_masks() -> None:
    keys, journals = identities(4), {number: Journal() for number in range(1, 5)}
    first, again = (attempt(keys, journals, [1, 2, 3, 4], number) for number in (0, 1))
    assert not any(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_a_client_masks_once() -> None:
    clients = pairwise_clients(3)
    advertisements = [client.advertise() for client in clients.values()]
    clients[1].masks(advertisements, VECTOR_ID)
    with pytest.raises(ProtocolError, match="once"):
        clients[1].masks(advertisements, VECTOR_ID)
