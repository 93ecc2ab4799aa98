"""The coordinator's side of secure sums: it relays keys and encrypted shares, and adds masked vectors.

A sum begins when key advertisements have arrived, with the update's file or an evaluation's message. Each step after
it is an exchange of one message per silo; its outcome, which all silos may read, is a file. So the coordinator can be
restarted at any moment: files and outcomes tell how far the sum has got.

::

    roster --share--> sealed shares --send--> who has sent --agree--> signatures --unmask--> the sum
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_fl.coordinator.machine import GRACE, Exchange
from lightning_fl.coordinator.wire import BadFile
from lightning_fl.privacy.secagg.bonawitz_server import BonawitzServer
from lightning_fl.privacy.secagg.errors import ProtocolError, SecureAggregationError
from lightning_fl.privacy.secagg.messages import (
    KeyAdvertisement,
    SessionParams,
    Shares,
    Signatures,
    Survivors,
    Unmasking,
)
from lightning_fl.privacy.secagg.packing import NUM_CHECKS
from lightning_fl.privacy.secagg.participant import MIN_CLIENTS
from lightning_fl.privacy.secagg.quantize import NUM_LIMBS
from lightning_fl.types import Update

ROSTER = "roster"
STEPS = ("share", "send", "agree", "unmask")
"""The messages of a silo after its key advertisement, in order."""
VECTOR = "vector"
"""Name of the tensor in the file of the step ``send``; the messages of other steps are text."""


@dataclass(frozen=True)
class Advert:
    """A silo's first message for a secure sum.

    Args:
        keys: Its key advertisement.
        names: The scalars that it adds.
        signature: Signature of both by the identity in the advertisement.
    """

    keys: bytes
    names: Sequence[str] = ()
    signature: bytes = b""

    def fields(self) -> dict[str, object]:
        """As fields of a file."""
        return {"keys": self.keys.hex(), "names": list(self.names), "signature": self.signature.hex()}

    @classmethod
    def read(cls, found: object) -> Advert:
        """Reads what :meth:`fields` returned.

        Raises:
            BadFile: If the fields are not an advertisement.
        """
        try:
            names = found["names"]  # type: ignore[index]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError("its names are no list of text")
            return cls(bytes.fromhex(found["keys"]), names, bytes.fromhex(found["signature"]))  # type: ignore[index]
        except (TypeError, KeyError, ValueError) as error:
            raise BadFile(f"its key advertisement can't be read: {type(error).__name__}: {error}") from error


def in_order(update: Update) -> Update:
    """The update with its tensors sorted by name, since files do not keep a module's own order."""
    delta, buffers = dict(sorted(update.delta.items())), dict(sorted(update.buffers.items()))
    aux = {name: dict(sorted(tree.items())) for name, tree in sorted(update.aux.items())}
    return replace(update, delta=delta, buffers=buffers, aux=aux)


def signed_names(keys: bytes, names: Sequence[str]) -> bytes:
    """The bytes that a silo signs, so that nobody can make it add a scalar that others do not list.

    They contain its key advertisement, which is new in each sum; otherwise the names of an earlier attempt of the same
    round could be replayed.
    """
    return b"lightning_fl secagg names" + keys + json.dumps(names).encode()


def summed_names(listed: Collection[Sequence[str]], threshold: int) -> list[str]:
    """The scalars that are summed: those listed by at least three silos even if as many drop out as allowed.

    Args:
        listed: For each silo of the roster, the scalars that it lists.
        threshold: Minimum number of silos that must remain.
    """
    needed = len(listed) - threshold + MIN_CLIENTS
    counts: dict[str, int] = {}
    for own in listed:
        for name in set(own):
            counts[name] = counts.get(name, 0) + 1
    return sorted(name for name, count in counts.items() if count >= needed)


@dataclass
class SecureSum:
    """A secure sum on the coordinator, from the roster on.

    Args:
        adverts: The key advertisements, by silo.
        vector_size: Number of elements of the packed updates; scalars and checks follow them.
        dtype: Their dtype.
        seconds: How long each step waits for silos, unless a transfer is in progress.
        max_seconds: How long it waits even then.
        now: The current time, in seconds.
    """

    adverts: Mapping[str, Advert]
    vector_size: int
    dtype: torch.dtype
    seconds: float
    max_seconds: float
    now: float
    place: int = field(default=0, init=False)
    messages: list[dict[str, bytes]] = field(default_factory=list, init=False)
    """For each finished step, the silos' messages; for ``send``, the digests of the vectors' files."""
    gone: set[str] = field(default_factory=set, init=False)
    """Silos whose process has died, with the secrets that its next message needs."""

    def __post_init__(self) -> None:
        decoded = {silo: KeyAdvertisement.decode(advert.keys) for silo, advert in self.adverts.items()}
        self.numbers = {silo: keys.number for silo, keys in decoded.items()}
        self.params: SessionParams = next(iter(decoded.values())).params
        self.names = summed_names([advert.names for advert in self.adverts.values()], self.params.threshold)
        self.size = self.vector_size + NUM_LIMBS * len(self.names) + NUM_CHECKS
        self._begin(self.adverts, self.now)

    def _begin(self, expected: Iterable[str], now: float) -> None:
        self.exchange = Exchange(set(expected), self.seconds, until=now + self.seconds)
        self._latest = now + self.max_seconds

    @property
    def step(self) -> str | None:
        """The step that is open; None after the last."""
        return STEPS[self.place] if self.place < len(STEPS) else None

    def roster(self) -> dict[str, object]:
        """The roster, the first message to the silos.

        Raises:
            SecureAggregationError: If there are too few silos.
        """
        roster = self._server().roster([advert.keys for advert in self.adverts.values()])
        return {
            "members": sorted(self.adverts),
            "roster": roster.hex(),
            "names": {str(self.numbers[silo]): advert.fields() for silo, advert in self.adverts.items()},
        }

    def check(self, silo: str, message: bytes) -> None:
        """Checks that a silo's message belongs to the open step and to this silo.

        Raises:
            BadFile: If it does not.
        """
        try:
            if self.step == "share":
                shares = Shares.decode(message)
                number, is_whole = shares.number, shares.sealed.keys() == set(self.numbers.values()) - {shares.number}
                if not is_whole:
                    raise BadFile("it has not sealed a share for each of the others")
            elif self.step == "agree":
                # Its entries for others would replace their own signatures, and stop all silos.
                number, *others = [*Signatures.decode(message).by_number] or [0]
                if others:
                    raise BadFile("it has signed for others")
            else:
                answer, (shared, sent) = Unmasking.decode(message), map(self._numbers_of, self.messages[:2])
                number = answer.number
                # The sum ends with the first answers; one that lacks shares would end it without a result.
                if answer.self_masks.keys() != sent or answer.mask_keys.keys() != shared - sent:
                    raise BadFile("it lacks shares, or has some that nobody has asked for")
        except ProtocolError as error:
            raise BadFile(str(error).rstrip(".")) from error
        if number != self.numbers[silo]:
            raise BadFile(f"it speaks for participant {number}, but is {self.numbers[silo]}")

    def _numbers_of(self, silos: Iterable[str]) -> set[int]:
        return {self.numbers[silo] for silo in silos}

    def progressed(self, silo: str, now: float) -> None:
        """Notes that a piece of a silo's message has arrived: the step waits for the rest."""
        if silo in self.exchange.expected and self.exchange.until is not None:
            self.exchange.until = max(self.exchange.until, min(now + GRACE, self._latest))

    def due(self, now: float, left: set[str]) -> bool:
        """Whether the open step should end."""
        exchange = self.exchange
        in_time = exchange.until is not None and now >= exchange.until
        return self.step is not None and (in_time or exchange.expected - left - self.gone <= exchange.done.keys())

    def finish_step(self, read: Callable[[str, str], bytes], now: float) -> dict[str, object]:
        """Ends the open step; returns its outcome.

        Args:
            read: Reads the message of a silo in the open step, given the silo and the digest of its file.
            now: The current time, in seconds.

        Raises:
            SecureAggregationError: If too few silos are left. No update was revealed.
        """
        step, done = self.step, dict(sorted(self.exchange.done.items()))
        if len(done) < self.params.threshold:
            raise SecureAggregationError(
                f"Only {len(done)} of {self.params.num_clients} silos have answered in the step {step!r} of a secure "
                f"sum; {self.params.threshold} are needed. The sum is dropped, and no update was revealed."
            )
        is_vector = step == "send"
        own = {silo: digest.encode() if is_vector else read(silo, digest) for silo, digest in done.items()}
        self.messages.append(own)
        self.place += 1
        self._begin(own, now)
        outcome: dict[str, object] = {"members": list(own)}
        if step == "share":
            server = self._server()
            server.roster([advert.keys for advert in self.adverts.values()])
            bundles = server.bundles(list(own.values()))
            outcome["bundles"] = {silo: bundles[self.numbers[silo]].hex() for silo in own}
        elif step == "send":
            outcome["survivors"] = Survivors(sorted(self.numbers[silo] for silo in own)).encode().hex()
        elif step == "agree":
            joined = {n: sign for message in own.values() for n, sign in Signatures.decode(message).by_number.items()}
            outcome["signatures"] = Signatures(joined).encode().hex()
        return outcome

    def total(self, read_vector: Callable[[str, str], Tensor]) -> tuple[Tensor, list[str]]:
        """The sum, and the silos whose vectors are in it; available once the last step is over.

        Args:
            read_vector: Reads a silo's masked vector, given the silo and the digest of its file.

        Raises:
            SecureAggregationError: If the masks can't be removed.
        """
        shares, vectors, agreed, answers = self.messages
        server = self._server()
        server.roster([advert.keys for advert in self.adverts.values()])
        server.bundles(list(shares.values()))
        for silo, digest in vectors.items():
            server.receive_vector(self.numbers[silo], read_vector(silo, digest.decode()))
        server.survivors()
        server.signatures(list(agreed.values()))
        total, _ = server.finish(list(answers.values()))
        return total, list(vectors)

    def _server(self) -> BonawitzServer:
        # The vectors are added when all of them have arrived: until then the server needs none.
        return BonawitzServer(self.params, self.size if self.step is None else 0, self.dtype)


def check_advert(advert: Advert, expected: Mapping[str, int], others: Iterable[Advert]) -> None:
    """Checks that a key advertisement is for the sum that is about to begin.

    Args:
        advert: The silo's key advertisement.
        expected: The expected values of ``number``, ``round``, ``attempt``, ``num_clients`` and ``threshold``.
        others: The accepted advertisements of other silos.

    Raises:
        BadFile: If it is for another sum.
    """
    try:
        keys = KeyAdvertisement.decode(advert.keys)
    except ProtocolError as error:
        raise BadFile(str(error).rstrip(".")) from error
    found = {"number": keys.number, **vars(keys.params)}
    for name, value in expected.items():
        if found[name] != value:
            raise BadFile(f"its keys are for {name}={found[name]}, expected {value}")
    for other in others:
        params = KeyAdvertisement.decode(other.keys).params
        reasons = {"model": "starts from another model", "settings": "has other tensors or settings of the secure sum"}
        for name, value in vars(params).items():
            if vars(keys.params)[name] != value:
                raise BadFile(f"it {reasons.get(name, f'has another {name}')} than the silos before it")
