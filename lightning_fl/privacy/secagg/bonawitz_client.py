"""The client's side of the double-masking protocol. It trusts only the identities it was given.

    advertise -> share -> send -> agree -> unmask

Each step takes the coordinator's message and returns the client's answer, once. A message that an honest coordinator
would not have sent ends the client: it deletes its secrets and answers no further message.
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
    SessionParams,
    Shares,
    Signatures,
    Survivors,
    Unmasking,
)
from lightning_fl.privacy.secagg.participant import Participant, Trusted, context_of, mask_of, pair_key, two_thirds
from lightning_fl.privacy.secagg.primitives import AgreementKey, Secret, SigningKey, seal, unseal, verify
from lightning_fl.privacy.secagg.shamir import SHARE_BYTES, split

Rest = ParamSpec("Rest")


@dataclass(repr=False)
class _Secrets(Secret):
    participant: Participant
    self_mask: bytes
    shares: dict[int, tuple[bytes, bytes]]
    """By sender: this client's share of the sender's self-mask and of its mask key."""


def _step(stage: str) -> Callable[..., Callable[..., bytes]]:
    """Decorates a step that runs once and in order, and whose failure ends the client."""

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
            except BaseException:  # also KeyboardInterrupt: a client interrupted halfway must not answer again
                self.end()
                raise
            self._num_steps += 1
            return answer

        return step

    return decorate


class BonawitzClient(Secret):
    """One client of the double-masking protocol: a state machine that is used for one sum.

    Args:
        number: Its number in the round, from 1.
        identity: Its signing key.
        terms: The parameters it agrees to. The threshold must be at least floor(2n/3) + 1 for n clients.
        trusted: The identities it accepts; None in simulations.
        journal: Records which vectors were sent. Here a vector is sent only once, because the set of survivors is known
            only afterwards. If the shares of all clients are needed, the shares are given out only once instead:
            without this client's shares nobody can unmask its vector, which may then be sent again.

    Raises:
        SecureAggregationError: If the parameters would let the coordinator isolate an update.

    Reference:
        Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, figure 4.
    """

    def __init__(
        self, number: int, identity: SigningKey, params: SessionParams, trusted: Trusted, journal: Journal
    ) -> None:
        if params.num_clients < 3 or params.threshold < two_thirds(params.num_clients):
            raise SecureAggregationError(
                f"A sum over {params.num_clients} clients with threshold {params.threshold} could reveal single "
                f"updates; at least 3 clients and a threshold of {two_thirds(max(3, params.num_clients))} are needed."
            )
        self._params = params
        self._journal = journal
        participant = Participant(number, identity, params, trusted, AgreementKey(), AgreementKey())
        self._secrets: _Secrets | None = _Secrets(participant, os.urandom(32), {})
        self._num_steps = 0
        self._roster = Roster({})
        self._context = b""
        self._vector_id = b""
        self._survivors = Survivors(())

    @property
    def next_stage(self) -> str | None:
        """The step that comes next; None if the client has ended."""
        return None if self._secrets is None or self._num_steps == len(STAGES) else STAGES[self._num_steps]

    def end(self) -> None:
        """Deletes all secrets."""
        self._secrets = None

    @property
    def _live(self) -> _Secrets:
        assert self._secrets is not None
        return self._secrets

    @_step("advertise")
    def advertise(self) -> bytes:
        """Returns its public keys, signed."""
        return self._live.participant.advertisement().encode()

    @_step("share")
    def share(self, roster: bytes) -> bytes:
        """Returns Shamir shares of its two secrets (self-mask seed and mask key), sealed for each of the others.

        Args:
            roster: The key advertisements of all participants.

        Raises:
            ProtocolError: If an advertisement is invalid. All steps raise it for an invalid message.
            SecureAggregationError: If too few clients are left. All steps raise it.
        """
        secrets, params = self._live, self._params
        self._roster = Roster.decode(roster)
        secrets.participant.check(self._roster, params.threshold)
        self._context = context_of(params, self._roster)
        numbers = sorted(self._roster.advertisements)
        of_mask = split(secrets.self_mask, numbers, params.threshold)
        of_key = split(secrets.participant.mask_key.private_bytes(), numbers, params.threshold)
        me = secrets.participant.number
        secrets.shares[me] = of_mask[me], of_key[me]
        sealed = {
            other: seal(self._channel(me, other), of_mask[other] + of_key[other], self._header(me, other))
            for other in numbers
            if other != me
        }
        return Shares(me, sealed).encode()

    @_step("send")
    def send(self, shares: bytes, vector: Tensor, vector_id: bytes) -> bytes:
        """Returns its masked vector.

        Args:
            shares: The shares that the others sealed for it.
            vector: Its vector, int32 or int64 on the CPU; masked in place.
            vector_id: Identifies the vector in the journal.

        Raises:
            RetryRefused: If the vector was sent before.
        """
        secrets, participant = self._live, self._live.participant
        me = participant.number
        bundle = Shares.decode(shares)
        if bundle.number != me or me in bundle.sealed or not self._roster.advertisements.keys() >= bundle.sealed.keys():
            raise ProtocolError("The shares are not for this client, or from clients that are not in the round.")
        for other, sealed in bundle.sealed.items():
            text = unseal(self._channel(other, me), sealed, self._header(other, me))
            secrets.shares[other] = text[:SHARE_BYTES], text[SHARE_BYTES:]
        if len(secrets.shares) < self._params.threshold:
            raise SecureAggregationError(
                f"{len(secrets.shares)} clients have shared their secrets, {self._params.threshold} are needed."
            )
        key, session = participant.mask_key, self._params.session
        advertisements = [self._roster.advertisements[other] for other in bundle.sealed]
        masks = [mask_of(key, me, advertisement, session, self._context) for advertisement in advertisements]
        self._vector_id = vector_id
        if self._needs_all:
            self._journal.check(vector_id)
        else:
            self._claim()
        apply_masks(vector, [(secrets.self_mask, 1), *masks])
        return MaskedVector(me, vector.numpy().tobytes()).encode()

    @_step("agree")
    def agree(self, survivors: bytes) -> bytes:
        """Returns its signature over the list of survivors, the clients whose vectors have arrived."""
        secrets = self._live
        numbers = Survivors.decode(survivors).numbers
        self._check_survivors(numbers)
        self._survivors = Survivors(numbers)
        signature = secrets.participant.identity.sign(self._survivors.signed(self._context))
        return Signatures({secrets.participant.number: signature}).encode()

    @_step("unmask")
    def unmask(self, signatures: bytes) -> bytes:
        """Returns a share of each survivor's self-mask and of each dropped client's mask key; never both of one client.

        Both shares of one client together would let the coordinator take all masks off its vector.

        Args:
            signatures: At least as many as the threshold, over the list that this client has signed. They prove that
                a majority was given the same list, so that no client counts as survivor for some and as dropped for
                others.
        """
        signed = Signatures.decode(signatures).by_number
        survivors = set(self._survivors.numbers)
        if len(signed) < self._params.threshold or not signed.keys() <= survivors:
            raise ProtocolError(
                f"{len(signed)} clients have signed the list of survivors, {self._params.threshold} of them are needed."
            )
        for number, signature in signed.items():
            identity = self._roster.advertisements[number].identity
            verify(identity, signature, self._survivors.signed(self._context), f"participant {number}")
        if self._needs_all:
            self._claim()
        shares = self._live.shares
        answer = Unmasking(
            self._live.participant.number,
            {number: of_mask for number, (of_mask, _) in shares.items() if number in survivors},
            {number: of_key for number, (_, of_key) in shares.items() if number not in survivors},
        )
        # With another list, a second answer would reveal the other share of a client.
        self.end()
        return answer.encode()

    @property
    def _needs_all(self) -> bool:
        """Whether the sum can't be opened without the shares that this client keeps of its own secrets."""
        return len(self._roster.advertisements) == self._params.threshold

    def _claim(self) -> None:
        # A random roster never equals an earlier one, so the journal refuses the same vector a second time, whoever
        # takes part: the coordinator could otherwise ask for two sums whose survivors differ by one client.
        self._journal.claim(self._vector_id, os.urandom(32))

    def _check_survivors(self, numbers: Sequence[int]) -> None:
        survivors = set(numbers)
        secrets = self._live
        if secrets.participant.number not in survivors or not survivors <= secrets.shares.keys():
            raise ProtocolError("The list of survivors lacks this client, or names one that has shared no secrets.")
        if len(survivors) < self._params.threshold:
            raise SecureAggregationError(
                f"The vectors of {len(survivors)} clients have arrived, {self._params.threshold} are needed."
            )

    def _channel(self, sender: int, recipient: int) -> bytes:
        participant = self._live.participant
        assert participant.channel_key is not None
        other = recipient if sender == participant.number else sender
        public = self._roster.advertisements[other].channel_key
        session = self._params.session
        return pair_key(participant.channel_key, public, "channel", sender, recipient, session, self._context)

    def _header(self, sender: int, recipient: int) -> bytes:
        return self._context + sender.to_bytes(4, "little") + recipient.to_bytes(4, "little")
