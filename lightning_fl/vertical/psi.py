"""Private set intersection: parties find the ids that all of them have, and learn no others."""

from __future__ import annotations

import hashlib
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_fl.communication import Group, Message
from lightning_fl.privacy.secagg.errors import ProtocolError
from lightning_fl.privacy.secagg.primitives import KEY_BYTES, AgreementKey, derive, digest
from lightning_fl.vertical.curve import POINT_BYTES, SecretFactor, point_of
from lightning_fl.vertical.store import FIELD, decode, encode, num_bins, num_bytes

TAG = b"lightning_fl-psi-with-curve25519_XMD:SHA-512_ELL2_NU_"
LABEL_BYTES = 16


@dataclass(frozen=True)
class SharedIds:
    """The ids that the parties have in common.

    Args:
        size: The number of ids that all parties have.
        rows: Positions of these ids in this party's list, in a random order that is the same for all parties; None if
            only the size was requested.
    """

    size: int
    rows: list[int] | None


def psi(ids: Sequence[str], group: Group, cardinality_only: bool = False) -> SharedIds:
    r"""Finds the ids that all parties have; every party must call it.

    The first party sends its ids as points :math:`a H(x)` with a secret :math:`a`. Every other party j multiplies them
    by its secret :math:`k_j`, and the first removes :math:`a` again: it then has :math:`k_j H(x)`, which no other party
    can compute for ids that it does not have. With these points as keys, party j sends its share of zero for each of
    its own ids, in an oblivious key-value store, which returns a random number for any other key. The shares of an id
    add up to zero only if all parties have it. The first party tells the others which ids these are.

    A party that follows the protocol learns the ids that all parties have, and the number of ids of each. Among three
    or more parties, the first one together with another one can learn which ids they share with a third.

    Args:
        ids: This party's ids, without duplicates.
        group: The parties.
        cardinality_only: Whether to reveal only the number of common ids. The other parties then answer in a secret
            order. Default False.

    Raises:
        ValueError: On every party, if one has an id twice, there is only one party, or they disagree on
            ``cardinality_only``.
        ProtocolError: If a party sends an invalid point, a point of low order, or a wrong number of values.

    Reference:
        Kolesnikov et al., "Practical Multi-party Private Set Intersection from Symmetric-Key Techniques", CCS 2017,
        in the augmented semi-honest model; keys by Diffie-Hellman as in Jarecki and Liu, SCN 2010.
    """
    if group.size < 2:
        raise ValueError("An intersection needs at least two parties, but there is one. Start them with torchrun.")
    own = AgreementKey()
    hello = {"size": len(ids), "key": own.public.hex(), "problem": _problem(ids, group.rank), "only": cardinality_only}
    hellos = [message.fields for message in group.all_gather(Message(hello), "psi: hello")]
    if any(told.keys() != hello.keys() for told in hellos):
        raise ProtocolError(f"A party's first message does not consist of {', '.join(hello)}.")
    problems = [str(told["problem"])[:200] for told in hellos if told["problem"]]
    if problems:
        raise ValueError("The ids can't be aligned: " + "; ".join(problems) + ".")
    if len({told["only"] for told in hellos}) > 1:
        raise ValueError("Some parties request only the size of the intersection, others its ids. Agree on one.")
    sizes = [_size(told["size"]) for told in hellos]
    public = [_key(told["key"]) for told in hellos]
    session = digest(b"psi", *public)
    bins = [num_bins(size) for size in sizes]
    pairs = {
        other: derive(own.agree(key), session, b"lightning_fl psi")
        for other, key in enumerate(public)
        if other != group.rank and 0 not in (other, group.rank)
    }
    secret = SecretFactor()
    tag = TAG + session[:16]
    if group.rank == 0:
        return _lead(ids, group, secret, tag, sizes, bins, cardinality_only)
    return _follow(ids, group, secret, tag, sizes[0], bins[group.rank], pairs, cardinality_only)


def _problem(ids: Sequence[str], rank: int) -> str:
    """What is wrong with a party's ids, to tell all before one of them stops; empty if nothing."""
    wrong = sum(not isinstance(x, str) for x in ids)
    if wrong:
        return f"party {rank} has {wrong} ids that are not text; make them strings, in the same way on all parties"
    twice = len(ids) - len(set(ids))
    if twice:
        return f"party {rank} has {twice} ids more than once; keep each once"
    broken = sum(not _is_unicode(x) for x in ids)
    return (
        f"party {rank} has {broken} ids that are not valid Unicode; read them in their own encoding" if broken else ""
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lead(
    ids: Sequence[str],
    group: Group,
    secret: SecretFactor,
    tag: bytes,
    sizes: Sequence[int],
    bins: Sequence[int],
    cardinality_only: bool,
) -> SharedIds:
    # In a random order, which reveals nothing about the order of the rows.
    order = list(range(len(ids)))
    random.SystemRandom().shuffle(order)
    hidden = [secret.multiply(point_of(ids[row].encode(), tag)) for row in order]
    group.all_gather(Message(tensors={"points": _pack(hidden, POINT_BYTES)}), "psi: points")
    messages = group.all_gather(Message(), "psi: stores")
    totals, labels = [0] * len(ids), {}
    for other in range(1, group.size):
        tensors = messages[other].tensors
        keys = [secret.undo(point) for point in _unpack(tensors.get("points"), len(ids), POINT_BYTES, other)]
        (store,) = _unpack(tensors.get("store"), 1, num_bytes(bins[other]), other)
        totals = [
            (total + decode(store, key, bins[other]) - _pad(key)) % FIELD
            for total, key in zip(totals, keys, strict=True)
        ]
        labels[str(other)] = [_label(key) for key in keys]
    shared = [place for place, total in enumerate(totals) if total == 0]
    told = (
        {}
        if cardinality_only
        else {other: _pack([own[place] for place in shared], LABEL_BYTES) for other, own in labels.items()}
    )
    group.all_gather(Message({"size": len(shared)}, told), "psi: result")
    return SharedIds(len(shared), None if cardinality_only else [order[place] for place in shared])


def _follow(
    ids: Sequence[str],
    group: Group,
    secret: SecretFactor,
    tag: bytes,
    leader_size: int,
    bins: int,
    pairs: dict[int, bytes],
    cardinality_only: bool,
) -> SharedIds:
    # The order of the answers is hidden from the first party: the second party draws it.
    seed = secrets.token_bytes(KEY_BYTES)
    sealed = {str(other): _xor(seed, _sealing(key)).hex() for other, key in pairs.items()} if group.rank == 1 else {}
    messages = group.all_gather(Message({"orders": sealed}), "psi: points")
    hidden = _unpack(messages[0].tensors.get("points"), leader_size, POINT_BYTES, 0)
    answers = [secret.multiply(point) for point in hidden]
    if cardinality_only:
        if group.rank != 1:
            orders = messages[1].fields.get("orders")
            found = orders.get(str(group.rank)) if isinstance(orders, dict) else None
            seed = _xor(_key(found), _sealing(pairs[1]))
        answers = [answers[place] for place in _order(seed, leader_size)]
    keys = [secret.multiply(point_of(x.encode(), tag)) for x in ids]
    shares = {
        key: (_share(x.encode(), group.rank, pairs) + _pad(key)) % FIELD for x, key in zip(ids, keys, strict=True)
    }
    store = encode(shares, bins)
    tensors = {"points": _pack(answers, POINT_BYTES), "store": _pack([store], len(store))}
    group.all_gather(Message(tensors=tensors), "psi: stores")
    result = group.all_gather(Message(), "psi: result")[0]
    size = _size(result.fields.get("size"))
    if size > min(len(ids), leader_size):
        raise ProtocolError(f"Party 0 reports {size} common ids, but a party has only {min(len(ids), leader_size)}.")
    if cardinality_only:
        return SharedIds(size, None)
    rows = {_label(key): row for row, key in enumerate(keys)}
    told = _unpack(result.tensors.get(str(group.rank)), size, LABEL_BYTES, 0)
    unknown = [label for label in told if label not in rows]
    if unknown:
        raise ProtocolError(f"Party 0 names {len(unknown)} common ids that this party does not have.")
    return SharedIds(size, [rows[label] for label in told])


def _share(message: bytes, rank: int, pairs: dict[int, bytes]) -> int:
    """This party's share of zero for an id: a sum of pairwise secrets, with the opposite sign at the other party."""
    total = 0
    for other, key in pairs.items():
        common = int.from_bytes(hashlib.blake2b(message, key=key, person=b"share").digest(), "little")
        total += common if rank < other else -common
    return total % FIELD


def _sealing(key: bytes) -> bytes:
    return hashlib.blake2b(key, person=b"order", digest_size=KEY_BYTES).digest()


def _pad(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, person=b"pad").digest(), "little") % FIELD


def _label(key: bytes) -> bytes:
    return hashlib.blake2b(key, person=b"label", digest_size=LABEL_BYTES).digest()


def _order(seed: bytes, size: int) -> list[int]:
    """An order drawn from a seed by sorting hashes."""
    return sorted(range(size), key=lambda place: hashlib.blake2b(place.to_bytes(8, "little"), key=seed).digest())


def _xor(first: bytes, second: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(first, second, strict=True))


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 32:
        raise ProtocolError(f"A party reports {value!r} as its number of ids; expected a number.")
    return value


def _key(text: object) -> bytes:
    try:
        key = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ProtocolError(f"A party sent {str(text)[:80]!r} as a key; expected {KEY_BYTES} bytes in hexadecimal.")
    return key


def _pack(parts: Sequence[bytes], width: int) -> Tensor:
    flat = np.frombuffer(b"".join(parts), dtype=np.uint8).copy()
    return torch.from_numpy(flat).view(len(parts), width)


def _unpack(tensor: Tensor | None, count: int, width: int, rank: int) -> list[bytes]:
    if tensor is None or tensor.dtype != torch.uint8 or tuple(tensor.shape) != (count, width):
        found = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise ProtocolError(f"Party {rank} sent {found}; expected bytes of shape {(count, width)}.")
    raw = tensor.contiguous().numpy().tobytes()
    parts = [raw[start : start + width] for start in range(0, count * width, width)]
    if len(set(parts)) != len(parts):
        raise ProtocolError(f"Party {rank} sent the same value twice.")
    return parts
