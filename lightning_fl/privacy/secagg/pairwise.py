"""Pairwise masks over a collective: everyone's vector looks random, and the sum of all is the sum."""

from __future__ import annotations

from torch import Tensor

from lightning_fl.privacy.secagg.errors import ProtocolError
from lightning_fl.privacy.secagg.journal import Journal
from lightning_fl.privacy.secagg.masks import apply_masks
from lightning_fl.privacy.secagg.messages import Advert, Roster, Terms
from lightning_fl.privacy.secagg.participant import Participant, Trusted, context_of, mask_of
from lightning_fl.privacy.secagg.primitives import AgreementKey, Secret, SigningKey, digest


class PairwiseClient(Secret):
    r"""One client of a pairwise masked sum; it sends one advert and one vector.

    .. math:: y_i = x_i + \sum_{j > i} m_{ij} - \sum_{j < i} m_{ij} \pmod{2^m}

    Every key is made for this sum only, so nothing that is lost later uncovers it. It is all or nothing: if one
    participant's vector is missing, the sum stays noise.

    Args:
        number: Its number in the round, from 1.
        identity: Who it is.
        terms: What it agrees to.
        trusted: Whom it sums with; None in simulations.
        journal: Remembers with whose updates its own has been summed.
        has_update: Whether it puts an update or figures into the sum; without any it adds zeros to help the others.

    Reference:
        Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, section 4.
    """

    def __init__(
        self,
        number: int,
        identity: SigningKey,
        terms: Terms,
        trusted: Trusted,
        journal: Journal,
        has_update: bool = True,
    ) -> None:
        self._participant = Participant(number, identity, terms, trusted, AgreementKey(), has_update=has_update)
        self._journal = journal
        self._is_done = False

    def advertise(self) -> bytes:
        """The first message: its keys."""
        return self._participant.advert().encode()

    def masks(self, adverts: list[bytes], vector: bytes) -> list[tuple[bytes, int]]:
        """Keys and signs of the masks between this client and all others.

        Args:
            adverts: The first messages of all participants that are alive, its own among them.
            vector: What its vector is known by in the journal.

        Raises:
            ProtocolError: If an advert is not what an honest participant would send, or masks were asked for before.
            SecureAggregationError: If fewer than 3 participants are left.
            RetryRefused: If the vector has been summed before with the updates of others.
        """
        participant = self._participant
        if self._is_done:
            raise ProtocolError("A client was asked for the masks of a sum again; they are used once.")
        self._is_done = True
        roster = roster_of(adverts)
        participant.check(roster, participant.terms.threshold)
        context = context_of(participant.terms, roster)
        others = [advert for advert in roster.adverts.values() if advert.number != participant.number]
        session = participant.terms.session
        masks = [mask_of(participant.mask_key, participant.number, other, session, context) for other in others]
        if participant.has_update:
            self._journal.claim(vector, digest(*sorted(advert.identity for advert in with_update(roster))))
        return masks

    def mask(self, words: Tensor, adverts: list[bytes], vector: bytes) -> None:
        """Masks its vector in place; arguments and errors as for :meth:`masks`."""
        apply_masks(words, self.masks(adverts, vector))


def roster_of(adverts: list[bytes]) -> Roster:
    """The list of participants that the adverts make.

    Raises:
        ProtocolError: If one is no advert, or two have the same number.
    """
    decoded = [Advert.decode(advert) for advert in adverts]
    roster = Roster({advert.number: advert for advert in decoded})
    if len(roster.adverts) != len(decoded):
        raise ProtocolError("Two participants have the same number.")
    return roster


def with_update(roster: Roster) -> list[Advert]:
    """The adverts of those who put more than zeros into the sum."""
    return [advert for advert in roster.adverts.values() if advert.has_update]
