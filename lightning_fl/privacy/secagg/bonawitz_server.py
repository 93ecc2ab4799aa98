"""Double masking, the coordinator's side: it passes messages on, adds vectors up, and takes off the masks left over."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fl.privacy.secagg.errors import ProtocolError, SecureAggregationError
from lightning_fl.privacy.secagg.masks import apply_masks
from lightning_fl.privacy.secagg.messages import (
    Advert,
    MaskedVector,
    Roster,
    Shares,
    Signatures,
    Survivors,
    Terms,
    Unmasking,
)
from lightning_fl.privacy.secagg.participant import context_of, mask_of
from lightning_fl.privacy.secagg.primitives import AgreementKey
from lightning_fl.privacy.secagg.shamir import combine


class BonawitzServer:
    """The coordinator of one secure sum; memory does not grow with the number of clients but for their keys.

    Args:
        terms: What all have agreed to.
        num_words: Length of the vectors.
        dtype: Type of the words, int32 or int64.

    All steps raise :class:`ProtocolError` for a message that is none, and :class:`SecureAggregationError` if too few
    clients are left.
    """

    def __init__(self, terms: Terms, num_words: int, dtype: torch.dtype) -> None:
        self.terms = terms
        self.words = torch.zeros(num_words, dtype=dtype)
        self._survivors: list[int] = []

    def roster(self, adverts: list[bytes]) -> bytes:
        """The adverts of all, for everyone."""
        decoded = [Advert.decode(advert) for advert in adverts]
        self._roster = Roster({advert.number: advert for advert in decoded})
        self._need(len(self._roster.adverts), "have advertised themselves")
        self._context = context_of(self.terms, self._roster)
        return self._roster.encode()

    def bundles(self, shares: list[bytes]) -> dict[int, bytes]:
        """For each client that has shared its secrets, what the others have sealed for it."""
        sent = {bundle.number: bundle.sealed for bundle in map(Shares.decode, shares)}
        self._need(len(sent), "have shared their secrets")
        everyone = self._roster.adverts.keys()
        wrong = [number for number, sealed in sent.items() if sealed.keys() != everyone - {number}]
        if wrong:
            raise ProtocolError(f"Participant {wrong[0]} has not sealed a share for each of the others.")
        self._shared = list(sent)
        return {
            to: Shares(to, {sender: sealed[to] for sender, sealed in sent.items() if sender != to}).encode()
            for to in sent
        }

    def receive(self, vector: bytes) -> None:
        """Adds a masked vector to the sum."""
        message = MaskedVector.decode(vector, self.words.numel() * self.words.element_size())
        if message.number not in self._shared or message.number in self._survivors:
            raise ProtocolError(f"Participant {message.number} sent a vector twice, or without sharing its secrets.")
        self.words += torch.frombuffer(bytearray(message.words), dtype=self.words.dtype)
        self._survivors.append(message.number)

    def survivors(self) -> bytes:
        """Those whose vectors have arrived, for everyone."""
        self._need(len(self._survivors), "have sent their vectors")
        self._survivors.sort()
        return Survivors(self._survivors).encode()

    def signatures(self, agreed: list[bytes]) -> bytes:
        """The signatures over the list of survivors, for everyone."""
        joined = {number: sign for message in agreed for number, sign in Signatures.decode(message).by_number.items()}
        self._need(len(joined), "have signed the list of survivors")
        return Signatures(joined).encode()

    def finish(self, answers: list[bytes]) -> tuple[Tensor, list[int]]:
        """The sum of the survivors' vectors, and who they are."""
        decoded = [Unmasking.decode(answer) for answer in answers]
        self._need(len(decoded), "have answered")
        decoded = decoded[: self.terms.threshold]
        masks: list[tuple[bytes, int]] = []
        for number in self._survivors:
            masks.append((_recover({answer.number: answer.own_masks.get(number) for answer in decoded}, number), -1))
        for number in set(self._shared) - set(self._survivors):
            key = AgreementKey(_recover({answer.number: answer.mask_keys.get(number) for answer in decoded}, number))
            if key.public != self._roster.adverts[number].mask_key:
                raise ProtocolError(f"The shares of the mask key of participant {number} do not give it back.")
            others = [self._roster.adverts[other] for other in self._survivors]
            masks += [mask_of(key, number, other, self.terms.session, self._context) for other in others]
        apply_masks(self.words, masks)
        return self.words, self._survivors

    def _need(self, found: int, what: str) -> None:
        if found < self.terms.threshold:
            raise SecureAggregationError(
                f"Only {found} of {self.terms.num_clients} clients {what}; {self.terms.threshold} are needed. The sum "
                "is dropped, and nobody has learned anything of an update."
            )


def _recover(shares: dict[int, bytes | None], number: int) -> bytes:
    held = {holder: share for holder, share in shares.items() if share is not None}
    try:
        if len(held) < len(shares):
            raise ValueError("a share is missing")
        return combine(held)
    except ValueError as error:
        raise ProtocolError(f"A secret of participant {number} can't be recovered: {error}.") from error
