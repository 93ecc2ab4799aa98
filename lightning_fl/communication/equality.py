"""Tests whether all ranks hold the same content, without revealing it."""

from __future__ import annotations

import hashlib
import secrets

from lightning_fl.communication.group import Group
from lightning_fl.communication.message import Message

PRIME = int(
    "FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DDEF9519B3CD3A431B"
    "302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7EDEE386BFB5A899FA5AE9F24117C4B1FE6"
    "49286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F83655D23DCA3AD961C62F356208552BB9ED529077096966D"
    "670C354E4ABC9804F1746C08CA18217C32905E462E36CE3BE39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF695581718"
    "3995497CEA956AE515D2261898FA051015728E5A8AACAA68FFFFFFFFFFFFFFFF",
    16,
)
"""The 2048-bit safe prime of RFC 3526, group 14."""
NUM_BYTES = 256
SECRET_BITS = 256


def all_hold_the_same(group: Group, content: bytes, topic: str) -> bool:
    r"""Returns whether all ranks hold the same content; every rank must call it.

    Rank i maps its content to a square :math:`h_i` modulo a safe prime and sends :math:`h_i^{a_i}` for a secret
    :math:`a_i` of this call. Its neighbour j raises that to :math:`a_j`, and i the neighbour's to :math:`a_i`:
    the results are equal if and only if :math:`h_i = h_j`. Ranks that follow the protocol learn which neighbours hold
    the same content, and nothing else if the decisional Diffie-Hellman problem is hard: unlike a hash, no message
    confirms a guess of the content. A rank that deviates can test one guess per call, by claiming to hold it.

    Args:
        group: The ranks.
        content: This rank's content.
        topic: The subject of the content; the same on every rank.

    Raises:
        ValueError: If a rank sends something that is not an element of the group.
    """
    secret = secrets.randbits(SECRET_BITS - 1) + (1 << (SECRET_BITS - 1))
    own = pow(_to_square(content), secret, PRIME)
    masked = [_element(message) for message in group.all_gather(Message({"element": f"{own:x}"}), topic)]
    # In a ring, so that each rank answers two others for any number of ranks.
    before, after = masked[group.rank - 1], masked[(group.rank + 1) % group.size]
    answers = {"before": f"{pow(before, secret, PRIME):x}", "after": f"{pow(after, secret, PRIME):x}"}
    found = [message.fields for message in group.all_gather(Message(answers), topic)]
    return all(found[rank - 1]["after"] == found[rank]["before"] for rank in range(group.size))


def _to_square(content: bytes) -> int:
    # Squares form the subgroup of prime order. The hash is longer than the prime, so that the remainder is unbiased.
    return pow(int.from_bytes(hashlib.shake_256(content).digest(NUM_BYTES + 32), "big"), 2, PRIME)


def _element(message: Message) -> int:
    text = message.fields.get("element")
    value = int(text, 16) if isinstance(text, str) and len(text) <= 2 * NUM_BYTES else 0
    # 1 and -1 stay 1 or -1 under every exponent, so a rank could pretend to hold the same content as all others.
    if not 1 < value < PRIME - 1:
        raise ValueError(f"A rank sent {str(text)[:20]!r}, which is not in the group modulo the common prime.")
    return value
