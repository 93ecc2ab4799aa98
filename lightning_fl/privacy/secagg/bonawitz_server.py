"""The coordinator's side of the double-masking protocol: it relays messages, sums vectors and removes the masks."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fl.privacy.secagg.errors import ProtocolError, SecureAggregationError
from lightning_fl.privacy.secagg.masks import apply_masks
from lightning_fl.privacy.secagg.messages import (
    KeyAdvertisement,
    MaskedVector,
    Roster,
    SessionParams,
    Shares,
    Signatures,
    Survivors,
    Unmasking,
)
from lightning_fl.privacy.secagg.participant import context_of, mask_of
from lightning_fl.privacy.secagg.primitives import AgreementKey
from lightning_fl.privacy.secagg.shamir import combine


class BonawitzServer:
    """The coordinator of one secure sum: a state machine that is used for one sum.

    It holds a single vector, and per client only keys and sealed shares.

    All steps raise :class:`ProtocolError` for an invalid message, and :class:`SecureAggregationError` if fewer clients
    than the threshold are left.

    Args:
        params: The parameters that all participants agreed to.
        vector_size: Length of the vectors.
        dtype: Type of their elements, int32 or int64.
    """

    def __init__(self, params: SessionParams, vector_size: int, dtype: torch.dtype) -> None:
        self.params = params
        self.total = torch.zeros(vector_size, dtype=dtype)
        self._roster = Roster({})
        self._context = b""
        self._shared: list[int] = []
        self._survivors: list[int] = []

    def roster(self, advertisements: list[bytes]) -> bytes:
        """Returns the list of all key advertisements, to be sent to every client."""
        decoded = [KeyAdvertisement.decode(advertisement) for advertisement in advertisements]
        self._roster = Roster({advertisement.number: advertisement for advertisement in decoded})
        self._need(len(self._roster.advertisements), "have advertised themselves")
        self._context = context_of(self.params, self._roster)
        return self._roster.encode()

    def bundles(self, shares: list[bytes]) -> dict[int, bytes]:
        """Returns, for each client that shared its secrets, the shares that the others sealed for it."""
        sent = {bundle.number: bundle.sealed for bundle in map(Shares.decode, shares)}
        self._need(len(sent), "have shared their secrets")
        everyone = self._roster.advertisements.keys()
        wrong = [number for number, sealed in sent.items() if sealed.keys() != everyone - {number}]
        if wrong:
            raise ProtocolError(f"Participant {wrong[0]} has not sealed a share for each of the others.")
        self._shared = list(sent)
        return {
            to: Shares(to, {sender: sealed[to] for sender, sealed in sent.items() if sender != to}).encode()
            for to in sent
        }

    def receive(self, masked: bytes) -> None:
        """Adds a client's masked vector to the sum."""
        message = MaskedVector.decode(masked, self.total.numel() * self.total.element_size())
        # A bytearray, because torch warns of tensors over memory that can't be written.
        self.receive_vector(message.number, torch.frombuffer(bytearray(message.vector), dtype=self.total.dtype))

    def receive_vector(self, number: int, vector: Tensor) -> None:
        """Adds a client's masked vector, of the sum's shape and type, that has come as a tensor."""
        if number not in self._shared or number in self._survivors:
            raise ProtocolError(f"Participant {number} sent a vector twice, or without sharing its secrets.")
        self.total += vector
        self._survivors.append(number)

    def survivors(self) -> bytes:
        """Returns the list of clients whose vectors have arrived, to be sent to every client."""
        self._need(len(self._survivors), "have sent their vectors")
        self._survivors.sort()
        return Survivors(self._survivors).encode()

    def signatures(self, agreed: list[bytes]) -> bytes:
        """Returns the signatures over the list of survivors, to be sent to every client."""
        joined = {number: sign for message in agreed for number, sign in Signatures.decode(message).by_number.items()}
        self._need(len(joined), "have signed the list of survivors")
        return Signatures(joined).encode()

    def finish(self, answers: list[bytes]) -> tuple[Tensor, list[int]]:
        """Removes the masks and returns the sum of the survivors' vectors, and the survivors' numbers."""
        decoded = [Unmasking.decode(answer) for answer in answers]
        self._need(len(decoded), "have answered")
        decoded = decoded[: self.params.threshold]  # as many shares as the secret needs; more would only cost time
        # Pairwise masks cancel between two survivors. What is left in the sum: each survivor's self-mask, and the
        # pairwise masks between survivors and clients that dropped out after sharing their secrets.
        masks: list[tuple[bytes, int]] = []
        for number in self._survivors:
            masks.append((_recover({answer.number: answer.self_masks.get(number) for answer in decoded}, number), -1))
        for number in set(self._shared) - set(self._survivors):
            key = AgreementKey(_recover({answer.number: answer.mask_keys.get(number) for answer in decoded}, number))
            # Wrong shares still yield a key, whose masks would leave noise in the sum without an error.
            if key.public != self._roster.advertisements[number].mask_key:
                raise ProtocolError(f"The shares of the mask key of participant {number} do not reconstruct it.")
            others = [self._roster.advertisements[other] for other in self._survivors]
            # The dropped client's masks as it would have added them: they are the negatives of those in the sum.
            masks += [mask_of(key, number, other, self.params.session, self._context) for other in others]
        apply_masks(self.total, masks)
        return self.total, self._survivors

    def _need(self, found: int, what: str) -> None:
        if found < self.params.threshold:
            raise SecureAggregationError(
                f"Only {found} of {self.params.num_clients} clients {what}; {self.params.threshold} are needed. The "
                "sum is dropped, and no update was revealed."
            )


def _recover(shares: dict[int, bytes | None], number: int) -> bytes:
    held = {holder: share for holder, share in shares.items() if share is not None}
    try:
        if len(held) < len(shares):
            raise ValueError("a share is missing")
        return combine(held)
    except ValueError as error:
        raise ProtocolError(f"A secret of participant {number} can't be recovered: {error}.") from error
