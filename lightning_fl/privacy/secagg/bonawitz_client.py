"""Double masking, the client's side: it trusts nobody but the identities that it knows.

    advertise -> share -> send -> agree -> unmask

Each step takes the coordinator's message and gives the client's answer, once. Whatever is not as an honest coordinator
would have it ends the client: it forgets its secrets and answers no more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec

from torch import Tensor

from lightning_fl.privacy.secagg.dropouts import STAGES
from lightning_fl.privacy.secagg.errors import ProtocolError, SecureAggregationError
from lightning_fl.privacy.secagg.journal import Journal
from lightning_fl.privacy.secagg.masks import apply_masks
from lightning_fl.privacy.secagg.messages import (
    MaskedVector,
    Roster,
    Shares,
    Signatures,
    Survivors,
    Terms,
    Unmasking,
)
from lightning_fl.privacy.secagg.participant import Participant, Trusted, context_of, mask_of, pair_key, two_thirds
from lightning_fl.privacy.secagg.primitives import AgreementKey, Secret, SigningKey, seal, unseal, verify
from lightning_fl.privacy.secagg.shamir import SHARE_BYTES, split

Rest = ParamSpec("Rest")


@dataclass(repr=False)
class _Secrets(Secret):
    participant: Participant
    own_mask: bytes
    shares: dict[int, tuple[bytes, bytes]]
    """By sender: its shares of its own mask and of its mask key that are for this client."""


def _step(stage: str) -> Callable[..., Callable[..., bytes]]:
    """A step that is taken once and in order, and whose failure ends the client."""

    def decorate(
        method: Callable[Concatenate[BonawitzClient, Rest], bytes],
    ) -> Callable[Concatenate[BonawitzClient, Rest], bytes]:
        @wraps(method)
        def step(self: BonawitzClient, *args: Rest.args, **kwargs: Rest.kwargs) -> bytes:
            expected = self.next_stage
            if expected != stage:
                self.end()
                raise ProtocolError(f"The client was asked to {stage}, but would {expected or 'answer no more'}.")
            try:
                answer = method(self, *args, **kwargs)
            except BaseException:
                self.end()
                raise
            self._num_steps += 1
            return answer

        return step

    return decorate


class BonawitzClient(Secret):
    """One client of the double-masking protocol.

    Args:
        number: Its number in the round, from 1.
        identity: Who it is.
        terms: What it agrees to. The threshold must be floor(2n/3) + 1 of the round's n clients.
        trusted: Whom it sums with; None in simulations.
        journal: Remembers which vectors have left. Here a vector leaves once: who stays is known only afterwards.

    Raises:
        SecureAggregationError: If the terms are such that an update could be told.

    Reference:
        Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, figure 4.
    """

    def __init__(self, number: int, identity: SigningKey, terms: Terms, trusted: Trusted, journal: Journal) -> None:
        if terms.num_clients < 3 or terms.threshold < two_thirds(terms.num_clients):
            raise SecureAggregationError(
                f"A sum over {terms.num_clients} clients with threshold {terms.threshold} could tell single updates; "
                f"at least 3 clients and a threshold of {two_thirds(max(3, terms.num_clients))} are needed."
            )
        self._terms = terms
        self._journal = journal
        participant = Participant(number, identity, terms, trusted, AgreementKey(), AgreementKey())
        self._secrets: _Secrets | None = _Secrets(participant, os.urandom(32), {})
        self._num_steps = 0

    @property
    def next_stage(self) -> str | None:
        """What the client would do next; None if it has ended."""
        return None if self._secrets is None or self._num_steps == len(STAGES) else STAGES[self._num_steps]

    def end(self) -> None:
        """Forgets all secrets."""
        self._secrets = None

    @property
    def _own(self) -> _Secrets:
        assert self._secrets is not None
        return self._secrets

    @_step("advertise")
    def advertise(self) -> bytes:
        """Its keys, signed."""
        return self._own.participant.advert().encode()

    @_step("share")
    def share(self, roster: bytes) -> bytes:
        """Shares of its two secrets, sealed for each of the others.

        Args:
            roster: The adverts of all.

        Raises:
            ProtocolError: If an advert is not as it should be, or the threshold can't be met; so do all steps.
        """
        own, terms = self._own, self._terms
        self._roster = Roster.decode(roster)
        own.participant.check(self._roster, terms.threshold)
        self._context = context_of(terms, self._roster)
        numbers = sorted(self._roster.adverts)
        of_mask = split(own.own_mask, numbers, terms.threshold)
        of_key = split(own.participant.mask_key.private_bytes(), numbers, terms.threshold)
        me = own.participant.number
        own.shares[me] = of_mask[me], of_key[me]
        sealed = {
            other: seal(self._channel(me, other), of_mask[other] + of_key[other], self._header(me, other))
            for other in numbers
            if other != me
        }
        return Shares(me, sealed).encode()

    @_step("send")
    def send(self, shares: bytes, words: Tensor, vector: bytes) -> bytes:
        """Its masked vector.

        Args:
            shares: What the others have sealed for it.
            words: Its vector, int32 or int64 on the CPU; it is masked in place.
            vector: What the vector is known by in the journal.

        Raises:
            RetryRefused: If the vector has left before.
        """
        own, participant = self._own, self._own.participant
        me = participant.number
        bundle = Shares.decode(shares)
        if bundle.number != me or me in bundle.sealed or not self._roster.adverts.keys() >= bundle.sealed.keys():
            raise ProtocolError("The shares are not for this client, or from clients that are not in the round.")
        for other, sealed in bundle.sealed.items():
            text = unseal(self._channel(other, me), sealed, self._header(other, me))
            own.shares[other] = text[:SHARE_BYTES], text[SHARE_BYTES:]
        if len(own.shares) < self._terms.threshold:
            raise SecureAggregationError(
                f"{len(own.shares)} clients have shared their secrets, {self._terms.threshold} are needed."
            )
        key, session = participant.mask_key, self._terms.session
        adverts = [self._roster.adverts[other] for other in bundle.sealed]
        masks = [mask_of(key, me, advert, session, self._context) for advert in adverts]
        self._journal.claim(vector, os.urandom(32))
        apply_masks(words, [(own.own_mask, 1), *masks])
        return MaskedVector(me, words.numpy().tobytes()).encode()

    @_step("agree")
    def agree(self, survivors: bytes) -> bytes:
        """Its signature over the list of those whose vectors have arrived."""
        own = self._own
        numbers = Survivors.decode(survivors).numbers
        self._check_survivors(numbers)
        self._survivors = Survivors(numbers)
        signature = own.participant.identity.sign(self._survivors.signed(self._context))
        return Signatures({own.participant.number: signature}).encode()

    @_step("unmask")
    def unmask(self, signatures: bytes) -> bytes:
        """For each survivor a share of its own mask, for each other that has shared one of its mask key; never both.

        Args:
            signatures: At least as many as the threshold, over the list that this client has signed.
        """
        signed = Signatures.decode(signatures).by_number
        survivors = set(self._survivors.numbers)
        if len(signed) < self._terms.threshold or not signed.keys() <= survivors:
            raise ProtocolError(
                f"{len(signed)} clients have signed the list of survivors, {self._terms.threshold} of them are needed."
            )
        for number, signature in signed.items():
            identity = self._roster.adverts[number].identity
            verify(identity, signature, self._survivors.signed(self._context), f"participant {number}")
        shares = self._own.shares
        answer = Unmasking(
            self._own.participant.number,
            {number: of_mask for number, (of_mask, _) in shares.items() if number in survivors},
            {number: of_key for number, (_, of_key) in shares.items() if number not in survivors},
        )
        self.end()
        return answer.encode()

    def _check_survivors(self, numbers: Sequence[int]) -> None:
        survivors = set(numbers)
        own = self._own
        if own.participant.number not in survivors or not survivors <= own.shares.keys():
            raise ProtocolError("The list of survivors lacks this client, or names one that has shared no secrets.")
        if len(survivors) < self._terms.threshold:
            raise SecureAggregationError(
                f"The vectors of {len(survivors)} clients have arrived, {self._terms.threshold} are needed."
            )

    def _channel(self, sender: int, recipient: int) -> bytes:
        participant = self._own.participant
        assert participant.channel_key is not None
        other = recipient if sender == participant.number else sender
        public = self._roster.adverts[other].channel_key
        session = self._terms.session
        return pair_key(participant.channel_key, public, "channel", sender, recipient, session, self._context)

    def _header(self, sender: int, recipient: int) -> bytes:
        return self._context + sender.to_bytes(4, "little") + recipient.to_bytes(4, "little")
