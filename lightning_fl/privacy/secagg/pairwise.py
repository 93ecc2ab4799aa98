"""Pairwise masks over an all-reduce: each single vector looks random, and the masks cancel in the sum of all."""

from __future__ import annotations

from torch import Tensor

from lightning_fl.privacy.secagg.errors import ProtocolError
from lightning_fl.privacy.secagg.journal import Journal
from lightning_fl.privacy.secagg.masks import apply_masks
from lightning_fl.privacy.secagg.messages import KeyAdvertisement, Roster, SessionParams
from lightning_fl.privacy.secagg.participant import Participant, Trusted, context_of, mask_of
from lightning_fl.privacy.secagg.primitives import AgreementKey, Secret, SigningKey, digest


class PairwiseClient(Secret):
    r"""One client of a pairwise masked sum; it sends one key advertisement and one vector.

    .. math:: y_i = x_i + \sum_{j > i} m_{ij} - \sum_{j < i} m_{ij} \pmod{2^m}

    Every key is made for this sum only, so a key stolen later does not unmask it. If one participant's vector is
    missing, its masks do not cancel and the sum stays noise.

    Args:
        number: Its number in the round, from 1.
        identity: Its signing key.
        params: The parameters it agrees to.
        trusted: The identities it accepts; None in simulations.
        journal: Records with whose updates its own was summed.
        has_update: Whether it adds an update or scalars to the sum. If not, it adds zeros, so that the masks of the
            others cancel.

    Reference:
        Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, section 4.
    """

    def __init__(
        self,
        number: int,
        identity: SigningKey,
        params: SessionParams,
        trusted: Trusted,
        journal: Journal,
        has_update: bool = True,
    ) -> None:
        self._participant = Participant(number, identity, params, trusted, AgreementKey(), has_update=has_update)
        self._journal = journal
        self._is_done = False

    def advertise(self) -> bytes:
        """Returns the first message: its public keys, signed."""
        return self._participant.advertisement().encode()

    def masks(self, advertisements: list[bytes], vector_id: bytes) -> list[tuple[bytes, int]]:
        """Returns the keys and signs of the masks between this client and all others.

        Args:
            advertisements: The first messages of all live participants, including its own.
            vector_id: Identifies its vector in the journal.

        Raises:
            ProtocolError: If an advertisement is invalid, or masks were requested before.
            SecureAggregationError: If fewer than 3 participants are left.
            RetryRefused: If the vector was summed before together with the updates of a different set of clients.
        """
        participant = self._participant
        if self._is_done:
            raise ProtocolError("The masks of a sum were requested from a client twice; they are used only once.")
        # Before anything can fail: otherwise a caller could try several rosters.
        self._is_done = True
        roster = roster_of(advertisements)
        participant.check(roster, participant.params.threshold)
        context = context_of(participant.params, roster)
        others = [
            advertisement
            for advertisement in roster.advertisements.values()
            if advertisement.number != participant.number
        ]
        session = participant.params.session
        masks = [mask_of(participant.mask_key, participant.number, other, session, context) for other in others]
        # Two sums over sets that differ by one update reveal that update. Participants without one add zeros, so only
        # those with an update count.
        if participant.has_update:
            self._journal.claim(
                vector_id, digest(*sorted(advertisement.identity for advertisement in with_update(roster)))
            )
        return masks

    def mask(self, vector: Tensor, advertisements: list[bytes], vector_id: bytes) -> None:
        """Masks ``vector`` in place; other arguments and errors as for :meth:`masks`."""
        apply_masks(vector, self.masks(advertisements, vector_id))


def roster_of(advertisements: list[bytes]) -> Roster:
    """Decodes the key advertisements into a roster.

    Raises:
        ProtocolError: If one is invalid, or two have the same number.
    """
    decoded = [KeyAdvertisement.decode(advertisement) for advertisement in advertisements]
    roster = Roster({advertisement.number: advertisement for advertisement in decoded})
    # For duplicate numbers the mapping keeps only one, and the masks of the other would not cancel.
    if len(roster.advertisements) != len(decoded):
        raise ProtocolError("Two participants have the same number.")
    return roster


def with_update(roster: Roster) -> list[KeyAdvertisement]:
    """Returns the advertisements of the participants that add more than zeros to the sum."""
    return [advertisement for advertisement in roster.advertisements.values() if advertisement.has_update]
