"""Offers of a sealed link: one written from the documentation is understood, every wrong one is refused."""

import dataclasses
import struct
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
import trustme
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.errors import CertificateError, ContractError, CutlayerError, WireError
from cutlayer.transport.pki import create_authority, issue
from cutlayer.transport.seal import OFFER_LIMIT, Seal
from cutlayer.transport.tls import Credentials, load_credentials
from tests.transport.conftest import CONTEXT, LABEL, NOW, leaf_der


class ByHand:
    """The other end, written from the documentation alone with the same libraries: an independent check."""

    def __init__(self, credentials: Credentials, peer: str, context: bytes = CONTEXT) -> None:
        self.names = (credentials.party, peer)
        self.credentials, self.context = credentials, sha256(context).digest()
        self.ephemeral = X25519PrivateKey.generate()
        self.public = self.ephemeral.public_key().public_bytes_raw()
        self.certificates = [leaf_der(credentials)]

    def offer(self, **changed) -> bytes:
        held = sha256(msgspec.msgpack.encode(self.certificates)).digest()
        fields = {
            "label": LABEL,
            "from": self.names[0],
            "to": self.names[1],
            "names": sorted(self.names),
            "context": self.context,
            "held": held,
            "public": self.public,
        }
        text = msgspec.msgpack.encode(list((fields | changed).values()))
        key = serialization.load_pem_private_key(self.credentials.private_key, None)
        signature = key.sign(text, ec.ECDSA(hashes.SHA256()))
        return msgspec.msgpack.encode([1, self.certificates, self.public, signature])

    def keys(self, own: bytes, other: bytes) -> dict[str, ChaCha20Poly1305]:
        shared = self.ephemeral.exchange(X25519PublicKey.from_public_bytes(msgspec.msgpack.decode(other)[2]))
        salt = sha256(b"".join(sha256(one).digest() for one in sorted([own, other]))).digest()
        info = msgspec.msgpack.encode([LABEL, sorted(self.names), self.context])
        text = HKDF(hashes.SHA256(), 64, salt, info).derive(shared)
        first, second = sorted(self.names)
        return {first: ChaCha20Poly1305(text[:32]), second: ChaCha20Poly1305(text[32:])}


def refused(end: Seal, offer: bytes, now: datetime = NOW) -> CutlayerError:
    with pytest.raises((CertificateError, WireError, ContractError)) as caught:
        end.accept(offer, now=now)
    assert not end.ready
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_peer_written_from_the_documentation_is_understood(parties, order):
    mine, theirs = order
    end, other = Seal(parties[mine], theirs, CONTEXT), ByHand(parties[theirs], mine)
    offer = other.offer()
    end.accept(offer, now=NOW)
    keys = other.keys(offer, end.offer())
    sealed = end.seal(b"one", b"aad")
    assert sealed[:8] == bytes(8)
    assert keys[mine].decrypt(bytes(12), sealed[8:], b"aad") == b"one"
    assert end.seal(b"two", b"")[:8] == b"\x01" + bytes(7)
    assert end.open(bytes(8) + keys[theirs].encrypt(bytes(12), b"back", b"h"), b"h") == b"back"
    nonce = bytes(4) + struct.pack("<Q", 1)
    assert end.open(nonce[4:] + keys[theirs].encrypt(nonce, b"again", b""), b"") == b"again"


def test_every_byte_of_an_offer_counts(parties):
    """One bit of any byte changed: refused with a typed error; the untouched offer still passes afterwards."""
    a, offer = Seal(parties["a"], "b", CONTEXT), Seal(parties["b"], "a", CONTEXT).offer()
    codes = set()
    for place in range(len(offer)):
        changed = bytearray(offer)
        changed[place] ^= 1 << place % 8
        codes.add(refused(a, bytes(changed)).code)
    assert {"E515", "E526", "E664", "E666"} <= codes <= {"E515", "E526", *(f"E66{n}" for n in range(1, 10))}
    a.accept(offer, now=NOW)
    assert a.ready


def test_an_offer_cut_short_or_prolonged(parties):
    a, offer = Seal(parties["a"], "b", CONTEXT), Seal(parties["b"], "a", CONTEXT).offer()
    for size in (0, 1, 2, 10, 100, len(offer) - 1):
        assert refused(a, offer[:size]).code == "E515"
    assert refused(a, offer + b"\x00").code == "E515"


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=400))
def test_no_bytes_crash_accept(parties, data: bytes):
    assert refused(Seal(parties["a"], "b", CONTEXT), data).code == "E515"


@pytest.mark.parametrize(
    "offer",
    [
        [2, [b"x"], bytes(32), bytes(70)],
        [1, [], bytes(32), bytes(70)],
        [1, [b"x"] * 5, bytes(32), bytes(70)],
        [1, [b""], bytes(32), bytes(70)],
        [1, [b"x"], bytes(31), bytes(70)],
        [1, [b"x"], bytes(32), bytes(81)],
        [1, [b"x"], bytes(32), bytes(70), 0],
        [1, ["x"], bytes(32), bytes(70)],
        {"version": 1},
    ],
)
def test_an_offer_of_another_form(parties, offer):
    error = refused(Seal(parties["a"], "b", CONTEXT), msgspec.msgpack.encode(offer))
    assert (type(error), error.code, error.what) == (WireError, "E515", "the bytes are no offer of a sealed link")


def test_an_offer_of_the_right_form_with_no_certificate(parties):
    error = refused(Seal(parties["a"], "b", CONTEXT), msgspec.msgpack.encode([1, [b"x"], bytes(32), bytes(70)]))
    assert (type(error), error.code) == (CertificateError, "E666")


def test_an_offer_in_another_spelling(parties):
    """The same values in longer msgpack would give each side another salt: refused while it can be explained."""
    offer = Seal(parties["b"], "a", CONTEXT).offer()
    assert offer[:2] == b"\x94\x01"
    error = refused(Seal(parties["a"], "b", CONTEXT), b"\x94\xcc\x01" + offer[2:])
    assert (error.code, error.expected) == ("E515", "msgpack's shortest form")


def test_an_offer_that_is_too_long(parties):
    big = msgspec.msgpack.encode([1, [bytes(OFFER_LIMIT)], bytes(32), bytes(70)])
    error = refused(Seal(parties["a"], "b", CONTEXT), big)
    assert (error.code, error.expected) == ("E515", "at most 16384 bytes")


def test_another_party_of_the_same_authority(parties):
    error = refused(Seal(parties["a"], "b", CONTEXT), Seal(parties["relay"], "a", CONTEXT).offer())
    assert (type(error), error.code) == (CertificateError, "E665")
    assert (error.expected, error.got) == ("exactly the name b", "the names relay")


@pytest.mark.provokes("E526")
def test_the_peers_offer_to_somebody_else(parties):
    error = refused(Seal(parties["a"], "b", CONTEXT), Seal(parties["b"], "relay", CONTEXT).offer())
    assert (type(error), error.code) == (ContractError, "E526")
    assert error.what == "the peer's offer is not signed for this link"


def test_another_context(parties):
    error = refused(Seal(parties["a"], "b", CONTEXT), Seal(parties["b"], "a", b"run 7, session 2").offer())
    assert (type(error), error.code) == (ContractError, "E526")


@pytest.mark.parametrize(
    "changed",
    [
        {"label": "another protocol"},
        {"from": "a", "to": "b"},
        {"to": "relay"},
        {"names": ["b", "a"]},
        {"context": sha256(b"other").digest()},
        {"held": bytes(32)},
        {"public": bytes(32)},
    ],
)
def test_each_part_of_what_is_signed_counts(parties, changed):
    other = ByHand(parties["b"], "a")
    assert refused(Seal(parties["a"], "b", CONTEXT), other.offer(**changed)).code == "E526"
    Seal(parties["a"], "b", CONTEXT).accept(other.offer(), now=NOW)


def test_a_relay_cannot_put_its_own_key_into_an_offer(parties):
    fields = msgspec.msgpack.decode(Seal(parties["b"], "a", CONTEXT).offer())
    fields[2] = X25519PrivateKey.generate().public_key().public_bytes_raw()
    assert refused(Seal(parties["a"], "b", CONTEXT), msgspec.msgpack.encode(fields)).code == "E526"


def test_a_relay_cannot_sign_under_the_peers_certificate(parties):
    forger = ByHand(dataclasses.replace(parties["relay"], party="b"), "a")
    forger.certificates = [leaf_der(parties["b"])]
    assert refused(Seal(parties["a"], "b", CONTEXT), forger.offer()).code == "E526"


def test_a_certificate_added_to_an_offer_is_refused(parties):
    fields = msgspec.msgpack.decode(Seal(parties["b"], "a", CONTEXT).offer())
    fields[1].append(leaf_der(parties["relay"]))
    assert refused(Seal(parties["a"], "b", CONTEXT), msgspec.msgpack.encode(fields)).code == "E526"


def test_a_signature_in_its_other_form_gives_other_keys(parties):
    """ECDSA has a twin for each signature. It passes `accept`, but both offers are in the salt: nothing opens."""
    a, b = Seal(parties["a"], "b", CONTEXT), Seal(parties["b"], "a", CONTEXT)
    fields = msgspec.msgpack.decode(b.offer())
    r, s = utils.decode_dss_signature(fields[3])
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    fields[3] = utils.encode_dss_signature(r, order - s)
    a.accept(msgspec.msgpack.encode(fields), now=NOW)
    b.accept(a.offer(), now=NOW)
    with pytest.raises(WireError, match="E516"):
        b.open(a.seal(b"x", b""), b"")


@pytest.mark.provokes("E527")
def test_reflection(parties):
    a = Seal(parties["a"], "b", CONTEXT)
    error = refused(a, a.offer())
    assert (type(error), error.code, error.what) == (ContractError, "E527", "our own offer came back")
    assert refused(Seal(parties["a"], "b", CONTEXT), a.offer()).code == "E665"


def test_reflected_messages_do_not_open(pair: tuple[Seal, Seal]):
    with pytest.raises(WireError, match="E516"):
        pair[0].open(pair[0].seal(b"x", b""), b"")


def test_a_second_offer(parties, pair: tuple[Seal, Seal]):
    a, b = pair
    a.accept(b.offer(), now=NOW)  # a resend of the first changes nothing
    with pytest.raises(ContractError, match=r"E527\] a second offer came"):
        a.accept(Seal(parties["b"], "a", CONTEXT).offer(), now=NOW)
    assert b.open(a.seal(b"x", b""), b"") == b"x"


@pytest.mark.provokes("E515")
def test_a_key_of_low_order(parties):
    other = ByHand(parties["b"], "a")
    other.public = bytes(32)
    error = refused(Seal(parties["a"], "b", CONTEXT), other.offer())
    assert (type(error), error.code, error.got) == (WireError, "E515", "a key of low order")


@pytest.mark.parametrize(("days", "code"), [(-1, "E662"), (398, "E661")])
def test_dates_are_those_of_the_time_given(parties, days: int, code: str):
    offer = Seal(parties["b"], "a", CONTEXT).offer()
    error = refused(Seal(parties["a"], "b", CONTEXT), offer, NOW + timedelta(days=days))
    assert (type(error), error.code) == (CertificateError, code)
    assert "certificate of b" in error.where


def test_a_foreign_authority(parties, tmp_path: Path):
    foreign = create_authority(tmp_path / "ca", name="study", now=NOW)
    other = load_credentials(issue(foreign, "b", tmp_path, now=NOW), "b")
    error = refused(Seal(parties["a"], "b", CONTEXT), Seal(other, "a", CONTEXT).offer())
    assert (type(error), error.code) == (CertificateError, "E664")


def test_a_key_that_is_not_p256():
    ca = trustme.CA()
    made = {}
    for party, kind in (("a", trustme.KeyType.ECDSA), ("b", trustme.KeyType.RSA)):
        leaf = ca.issue_cert(party, key_type=kind)
        made[party] = Credentials(
            party=party,
            certificate=leaf.cert_chain_pems[0].bytes(),
            private_key=leaf.private_key_pem.bytes(),
            authority=ca.cert_pem.bytes(),
        )
    with pytest.raises(CertificateError, match=r"E669\] the certificate's key cannot sign.*P-256.*got RSA"):
        Seal(made["b"], "a", CONTEXT)
    forged = msgspec.msgpack.encode([1, [leaf_der(made["b"])], bytes(32), bytes(70)])
    assert refused(Seal(made["a"], "b", CONTEXT), forged, datetime.now(UTC)).code == "E669"
