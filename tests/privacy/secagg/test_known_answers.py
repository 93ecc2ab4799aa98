"""Published vectors of the primitives, and frozen ones of our own wire format."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_fl.privacy.secagg.errors import ProtocolError
from lightning_fl.privacy.secagg.masks import Keystream, apply_masks
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
from lightning_fl.privacy.secagg.participant import Participant, context_of, mask_of
from lightning_fl.privacy.secagg.primitives import (
    SIGNATURE_BYTES,
    AgreementKey,
    SigningKey,
    derive,
    digest,
    keystream,
    library,
    seal,
    unseal,
    verify,
)

h = bytes.fromhex


def test_x25519_rfc_7748() -> None:
    """Section 5.2, first vector, and Bob's key of section 6.1."""
    key = AgreementKey(h("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"))
    secret = key.agree(h("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"))
    assert secret == h("c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552")
    bob = AgreementKey(h("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert bob.public == h("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")


@pytest.mark.parametrize("low_order", ["00" * 32, "01" + "00" * 31, "ec" + "ff" * 30 + "7f"])
def test_x25519_refuses_points_of_low_order(low_order: str) -> None:
    with pytest.raises(ProtocolError, match="low order"):
        AgreementKey().agree(h(low_order))


@pytest.mark.parametrize(
    ("private", "public", "text", "signature"),
    [
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe2"
            "4655141438e7a100b",
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302ae"
            "eb00d291612bb0c00",
        ),
    ],
)
def test_ed25519_rfc_8032_section_7_1(private: str, public: str, text: str, signature: str) -> None:
    key = SigningKey(h(private))
    assert key.public == h(public)
    assert key.sign(h(text)) == h(signature)
    verify(key.public, h(signature), h(text), "the RFC")
    with pytest.raises(ProtocolError, match="signature of the RFC"):
        verify(key.public, h(signature), h(text) + b"x", "the RFC")


def test_hkdf_rfc_5869_a_1() -> None:
    """The first 32 of its 42 bytes: HKDF's output of another length is a prefix."""
    key = derive(h("0b" * 22), h("000102030405060708090a0b0c"), h("f0f1f2f3f4f5f6f7f8f9"))
    assert key == h("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf")


def test_aes_256_ctr_sp_800_38a_f_5_5() -> None:
    lib = library()
    key = h("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    encryptor = lib.Cipher(lib.algorithms.AES(key), lib.modes.CTR(h("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"))).encryptor()
    text = h(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e5130c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17"
        "ad2b417be66c3710"
    )
    assert encryptor.update(text) == h(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c52b0930daa23de94ce87017ba2d84988ddfc9c58db67aada6"
        "13c2dd08457941a6"
    )


def test_our_keystream_starts_at_counter_0() -> None:
    """The zero block under the zero key: NIST's AESAVS, AES-256."""
    assert keystream(bytes(32)).update(bytes(16)) == h("dc95c078a2408989ad48a21492842087")
    vector = Keystream(bytes(32)).integers(4).tolist()
    assert vector == torch.frombuffer(bytearray(h("dc95c078a2408989ad48a21492842087")), dtype=torch.int32).tolist()


def test_chacha20_poly1305_rfc_8439_section_2_8_2() -> None:
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it."
    )
    cipher = library().ChaCha20Poly1305(h("808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f"))
    sealed = cipher.encrypt(h("070000004041424344454647"), text, h("50515253c0c1c2c3c4c5c6c7"))
    assert sealed == h(
        "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b1a71de0a9e060b29"
        "05d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc3ff4def08e4b7a9de576d26586cec64b"
        "61161ae10b594f09e26a7e902ecbd0600691"
    )
    assert unseal(bytes(32), seal(bytes(32), text, b"header"), b"header") == text


def participants() -> tuple[list[Participant], Roster]:
    session_params = SessionParams(bytes(range(32)), bytes([1]) * 32, bytes([2]) * 32, 7, 1, 3, 3)
    made = [
        Participant(
            number,
            SigningKey(bytes([number]) * 32),
            session_params,
            None,
            AgreementKey(bytes([16 + number]) * 32),
            AgreementKey(bytes([32 + number]) * 32),
        )
        for number in (1, 2, 3)
    ]
    return made, Roster({participant.number: participant.advertisement() for participant in made})


def test_frozen_adverts_and_masks() -> None:
    (first, *_), roster = participants()
    assert digest(roster.advertisements[1].encode()).hex() == (
        "b784324272465f779f8d36cd58099f0790093463a5e0c31346be29d81d4448ce"
    )
    assert digest(roster.encode()).hex() == "568c08c19ce7f524a283d3c4c8facbe5a1b8095e1dedd3ffb30e77b8ac858594"
    context = context_of(first.params, roster)
    assert context.hex() == "6d2f16d72184b1e24ba2ed45cc3c04396c5c5731d7cb14a92d1375e9963b84ec"
    key, sign = mask_of(first.mask_key, 1, roster.advertisements[2], first.params.session, context)
    assert (key.hex(), sign) == ("1e63959c17f947d855572130bc093ffc93fbc7477b2b23745a2198e4873ae66e", 1)
    vector = torch.zeros(8, dtype=torch.int32)
    apply_masks(vector, [(key, sign)])
    assert vector.tolist() == [
        1872442155,
        -700265014,
        2006169780,
        -398488030,
        1958856916,
        -1097685359,
        -1330609986,
        1491096849,
    ]
    wide = torch.zeros(2, dtype=torch.int64)
    apply_masks(wide, [(key, sign)])
    assert wide.tolist() == [-3007615331790539989, -1711493054691297100]


FROZEN = {
    "2c86a2493883d4ed2d5a64052a9ff0ee920510737a7f11488e2966af8febfe6f": Shares(1, {2: bytes(range(82)), 3: bytes(82)}),
    "42a2016fb7cdc0b8c5857fa6ceeeb8cc2cc194a96683174ee7e3a5a27a2d4886": MaskedVector(2, bytes(range(16))),
    "6ce716620d13f1c4db55fc61072b45e12cbc7c282037077ab6eb64b2ff4ac11c": Survivors([1, 3]),
    "472af9de75b3dc496236dc6191e0163e734bf9fd883a2424c0e0ba97c7cfc513": Signatures({1: bytes(range(64))}),
    "4332cb8ffdc981833ed7ada2e9dee9bd79ebb4a46fc95912e2a4dc4fdb233703": Unmasking(
        3, {1: bytes(range(33))}, {2: bytes(33)}
    ),
}


def decode(message: object, data: bytes) -> object:
    kind = type(message)
    return MaskedVector.decode(data, 16) if kind is MaskedVector else kind.decode(data)  # type: ignore[attr-defined]


@pytest.mark.parametrize("expected", FROZEN)
def test_frozen_messages(expected: str) -> None:
    message = FROZEN[expected]
    data = message.encode()  # type: ignore[attr-defined]
    assert digest(data).hex() == expected
    assert decode(message, data) == message


@pytest.mark.parametrize(
    "message", [*FROZEN.values(), participants()[1].advertisements[1], participants()[1]], ids=type
)
def test_a_message_of_another_length_or_kind_is_refused(message: object) -> None:
    data = message.encode()  # type: ignore[attr-defined]
    for wrong in (b"", data[:-1], data + b"x", data[:4] + b"\x01" + data[5:], data[:5] + b"\x63" + data[6:]):
        with pytest.raises(ProtocolError):
            decode(message, wrong)
    for cut in range(0, len(data), max(1, len(data) // 40)):
        with pytest.raises(ProtocolError):
            decode(message, data[:cut])


def test_lists_have_one_encoding() -> None:
    data = bytearray(Survivors([1, 3]).encode())
    data[-8:] = (3).to_bytes(4, "little") + (1).to_bytes(4, "little")
    with pytest.raises(ProtocolError, match="out of order"):
        Survivors.decode(bytes(data))
    data[-8:] = (1).to_bytes(4, "little") * 2
    with pytest.raises(ProtocolError, match="twice"):
        Survivors.decode(bytes(data))


def test_an_advert_says_plainly_whether_it_has_an_update() -> None:
    made, _ = participants()
    data = bytearray(replace(made[0], has_update=False).advertisement().encode())
    assert not KeyAdvertisement.decode(bytes(data)).has_update
    data[-SIGNATURE_BYTES - 1] = 2
    with pytest.raises(ProtocolError, match="whether it has an update"):
        KeyAdvertisement.decode(bytes(data))


def test_a_bit_flipped_in_an_advert_is_noticed() -> None:
    made, roster = participants()
    advert = roster.advertisements[2].encode()
    for position in range(len(advert)):
        data = bytearray(advert)
        data[position] ^= 1
        with pytest.raises(ProtocolError):  # noqa: PT012
            changed = KeyAdvertisement.decode(bytes(data))
            made[0].check(Roster({**roster.advertisements, changed.number: changed}), 3)
            made[0].check(
                Roster.decode(Roster({1: roster.advertisements[1], 2: changed, 3: roster.advertisements[3]}).encode()),
                3,
            )
            pytest.fail(f"the flipped bit of byte {position} was not noticed")
