"""End-to-end sealing: two parties' frames pass through a third, which can neither read nor change them.

Sans-I/O. Each side sends one *offer* through the relay, then seals every message:

1. Each side makes a fresh X25519 key and signs, with the key of its certificate (ECDSA, P-256, SHA-256), the msgpack
   array `[label, sender, receiver, [both names, sorted], SHA-256(context), SHA-256(certificates), X25519 key]`, where
   `certificates` is the msgpack array of DER certificates, the party's first. The offer is the msgpack array
   `[version, certificates, X25519 key, signature]`, in msgpack's shortest form.
2. The receiver checks the certificates (authority, dates, the one name is the peer's), then the signature over the same
   array made from what *it* knows: an offer for another pair, direction, run or session is refused.
3. Both derive 64 bytes with HKDF-SHA256: salt `SHA-256(SHA-256(offer) || SHA-256(offer))`, the offers in bytewise
   order; info the msgpack array `[label, [both names, sorted], SHA-256(context)]`. The first 32 are the
   ChaCha20-Poly1305 key of the frames from the name that sorts first, the last 32 of those from the other. Whoever
   changes an offer changes the keys.
4. A sealed message is `counter (8 bytes, little-endian) || ciphertext || tag (16 bytes)`; the nonce is four zero bytes
   and the counter. The receiver takes exactly the next counter, so nothing is replayed, reordered or left out. A
   carrier that resends the same sealed bytes drops the second copy itself, before it calls `open`.

The first message that opens proves that the peer holds the other half of the key. The keys cannot be had from the
certificates' keys later (forward secrecy). See `docs/explanation/sealing.md` for what this does not protect.

| code | error | meaning |
| --- | --- | --- |
| E234 | ConfigError | a seal with oneself, or without a context |
| E515 | WireError | bytes are no offer |
| E516 | WireError | bytes are no sealed message, or it was changed on its way |
| E525 | ContractError | a sealed message is replayed, reordered, or one before it is missing |
| E526 | ContractError | the offer is not signed for this pair and session |
| E527 | ContractError | our own offer came back, or a second offer came |
| E528 | ContractError | a sealed message came before the peer's offer |
| E420 | ProgramError | `seal` was called before the peer's offer was accepted |
| E669 | CertificateError | a chain or key that a sealed link cannot use |
| E661-E668 | CertificateError | the peer's certificate; see `tls` |
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Final

import msgspec
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509 import Certificate, load_der_x509_certificate

from cutlayer.errors import CertificateError, ConfigError, ContractError, ProgramError, WireError
from cutlayer.transport.certificates import check_chain, check_pair, first_line, parse_chain, parse_key, readable
from cutlayer.transport.tls import Credentials

__all__ = ["MESSAGE_LIMIT", "OFFER_LIMIT", "OVERHEAD", "Seal"]

OFFER_LIMIT: Final = 16 * 1024
"""Longest offer that is read, in bytes. One of this package's own certificates makes about half a KiB."""
OVERHEAD: Final = 24
"""Bytes that sealing adds to a message: counter (8) and tag (16)."""
MESSAGE_LIMIT: Final = 64 * 1024 * 1024
"""Longest message that is sealed or opened, in bytes; carriers allow far less."""

_VERSION: Final = 1
# Longer than 64 bytes and first in the array, so that no text which TLS signs with the same key can be mistaken for it.
_LABEL: Final = "cutlayer sealed relay, version 1: offer of an ephemeral X25519 key to one peer"
_KEY: Final = 32  # bytes
_CHAIN: Final = 4  # certificates in an offer
_COUNTER: Final = struct.Struct("<Q")


class _Offer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One side's half of the key exchange; certificates are DER, the party's own first."""

    version: int
    certificates: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(min_length=1)], ...], msgspec.Meta(min_length=1, max_length=_CHAIN)
    ]
    public: Annotated[bytes, msgspec.Meta(min_length=_KEY, max_length=_KEY)]
    signature: Annotated[bytes, msgspec.Meta(min_length=8, max_length=80)]


@dataclass(frozen=True, kw_only=True)
class _Link:
    """Who talks to whom, and where; `context` is the SHA-256 of what the user gave, `where` is for errors."""

    party: str
    peer: str
    context: bytes
    where: str

    @property
    def names(self) -> list[str]:
        """Both names, sorted, so that both sides write them alike."""
        return sorted((self.party, self.peer))


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """One key a direction. `repr` shows nothing of them."""

    sending: ChaCha20Poly1305
    receiving: ChaCha20Poly1305


class Seal:
    """One sealed link of `credentials.party` with `peer`, for one session: `context` is the same bytes on both sides.

    Send `offer()`, give the peer's offer to `accept`; when `ready`, `seal` and `open` work. A reconnection goes on with
    the same object; a new process makes a new one, with a new context. An error changes nothing: the object goes on as
    if the bytes had not come. Threads may share it.

    Raises ConfigError E234 for an empty context or a seal with oneself; CertificateError E663, E666 or E669 for own
    credentials that cannot sign.
    """

    def __init__(self, credentials: Credentials, peer: str, context: bytes) -> None:
        """Make the ephemeral key and sign the offer."""
        where = f"party {credentials.party}, sealed link with {peer}"
        if peer == credentials.party or not context:
            raise ConfigError(
                "a sealed link needs another party and a context",
                where=where,
                expected="two different names and the bytes of run and session",
                got="an empty context" if not context else "the party itself",
                remedy="Name the peer, and pass the same non-empty context on both sides.",
                code="E234",
            )
        self._link = _Link(party=credentials.party, peer=peer, context=sha256(context).digest(), where=where)
        self._authority = parse_chain(credentials.authority, where=where)
        self._ephemeral = X25519PrivateKey.generate()
        self._own_offer = _sign(self._link, credentials, self._ephemeral)
        self._peer_offer = b""
        self._keys: _Keys | None = None
        self._sent = self._received = 0
        self._sending, self._receiving = threading.Lock(), threading.Lock()

    @property
    def ready(self) -> bool:
        """Whether the peer's offer was accepted, so that messages can be sealed and opened."""
        return self._keys is not None

    def offer(self) -> bytes:
        """Return this side's offer, at most `OFFER_LIMIT` bytes; the same bytes on each call."""
        return self._own_offer

    def accept(self, peer_offer: bytes, *, now: datetime) -> None:
        """Check the peer's offer at time `now` (with a time zone) and derive the keys; the same offer again is ignored.

        Raises WireError E515 for bytes that are no offer, CertificateError E661 to E669 for its certificate,
        ContractError E526 for an offer of another pair or session, E527 for a reflected or second offer.
        """
        with self._receiving:
            if self._keys is not None and peer_offer == self._peer_offer:
                return
            if self._keys is not None or peer_offer == self._own_offer:
                raise ContractError(
                    "a second offer came" if self._keys is not None else "our own offer came back",
                    where=self._link.where,
                    expected=f"one offer of {self._link.peer}",
                    got="another offer" if self._keys is not None else "a reflection",
                    remedy="The relaying party mixes up or replays frames: ask it why, or relay through another.",
                    code="E527",
                )
            offer = _decode(peer_offer, self._link.where)
            _check(self._link, offer, self._authority, now)
            try:
                shared = self._ephemeral.exchange(X25519PublicKey.from_public_bytes(offer.public))
            except ValueError as error:  # a point of low order: the secret would be known to all
                raise _no_offer(self._link.where, "an X25519 key", "a key of low order") from error
            self._keys = _derive(self._link, shared, (self._own_offer, peer_offer))
            self._peer_offer = peer_offer

    def seal(self, plain: bytes | memoryview, aad: bytes) -> bytes:
        """Return `plain` sealed for the peer, `OVERHEAD` bytes longer, bound to `aad`, which the relay may read.

        Messages must reach the peer in the order of the calls. Raises ProgramError E420 if not `ready`, ConfigError
        E234 for more than `MESSAGE_LIMIT` bytes.
        """
        keys = self._keys
        if keys is None:
            raise ProgramError(
                "a message was to be sealed before the peer's offer was accepted",
                where=self._link.where,
                expected="accept(offer of the peer) first",
                got="seal()",
                remedy="Wait until `ready`.",
                code="E420",
            )
        view = memoryview(plain)
        if view.nbytes > MESSAGE_LIMIT:
            raise ConfigError(
                "a message is too long to be sealed",
                where=self._link.where,
                expected=f"at most {MESSAGE_LIMIT} bytes",
                got=f"{view.nbytes} bytes",
                remedy="Send it in chunks.",
                code="E234",
            )
        with self._sending:  # a counter used twice would break the cipher
            head = _COUNTER.pack(self._sent)
            sealed = head + keys.sending.encrypt(_nonce(head), view.cast("B") if view.nbytes else b"", aad)
            self._sent += 1
        return sealed

    def open(self, sealed: bytes | memoryview, aad: bytes) -> bytes:
        """Return the plain bytes of the peer's next sealed message, which was sealed with the same `aad`.

        Raises ContractError E528 if not `ready`, E525 if it is not the next one; WireError E516 if it is too short or
        too long, or was changed, or sealed with another `aad`.
        """
        with self._receiving:
            if self._keys is None:
                raise ContractError(
                    "a sealed message came before the peer's offer",
                    where=self._link.where,
                    expected=f"the offer of {self._link.peer}",
                    got="a sealed message",
                    remedy="The relaying party lost or reordered a frame: reconnect.",
                    code="E528",
                )
            view = memoryview(sealed)
            if not OVERHEAD <= view.nbytes <= MESSAGE_LIMIT + OVERHEAD:
                raise _damaged(
                    self._link.where, f"{OVERHEAD} to {MESSAGE_LIMIT + OVERHEAD} bytes", f"{view.nbytes} bytes"
                )
            view = view.cast("B")
            _check_counter(_COUNTER.unpack_from(view)[0], self._received, self._link)
            try:
                plain = self._keys.receiving.decrypt(_nonce(view[: _COUNTER.size]), view[_COUNTER.size :], aad)
            except InvalidTag as error:
                raise _damaged(
                    self._link.where, "bytes as the peer sealed them, in this place", "other bytes"
                ) from error
            self._received += 1
            return plain


def _sign(link: _Link, credentials: Credentials, ephemeral: X25519PrivateKey) -> bytes:
    """Return this side's offer. A self-signed authority is left out: the peer has its own copy of it."""
    chain = parse_chain(credentials.certificate, where=link.where)
    key = parse_key(credentials.private_key, where=link.where)
    check_pair(chain[0], key, link.where)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _not_p256(link.where, type(key).__name__)
    sent = [one for one in chain[1:] if one.issuer != one.subject]
    certificates = tuple(one.public_bytes(serialization.Encoding.DER) for one in (chain[0], *sent))
    public = ephemeral.public_key().public_bytes_raw()
    text = _transcript(link, (link.party, link.peer), certificates, public)
    signature = key.sign(text, ec.ECDSA(hashes.SHA256()))
    offer = msgspec.msgpack.encode(
        _Offer(version=_VERSION, certificates=certificates, public=public, signature=signature)
    )
    if len(certificates) > _CHAIN or len(offer) > OFFER_LIMIT:
        raise CertificateError(
            "the certificate chain is too long for a sealed link",
            where=link.where,
            expected=f"at most {_CHAIN} certificates and an offer of {OFFER_LIMIT} bytes",
            got=f"{len(certificates)} certificates, {len(offer)} bytes",
            remedy="Use a certificate closer to the authority.",
            code="E669",
        )
    return offer


def _decode(data: bytes, where: str) -> _Offer:
    if len(data) > OFFER_LIMIT:
        raise _no_offer(where, f"at most {OFFER_LIMIT} bytes", f"{len(data)} bytes")
    try:
        offer = msgspec.msgpack.decode(data, type=_Offer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _no_offer(where, "a msgpack array of four", first_line(error)) from error
    if offer.version != _VERSION:
        raise _no_offer(where, f"version {_VERSION}", f"version {offer.version}")
    if msgspec.msgpack.encode(offer) != data:
        raise _no_offer(where, "msgpack's shortest form", "another form")
    return offer


def _check(link: _Link, offer: _Offer, authority: Sequence[Certificate], now: datetime) -> None:
    """Check whose offer it is, and that it is for us and this context."""
    where = f"{link.where}, certificate of {link.peer}"
    with readable(where):
        chain: list[Certificate] = [load_der_x509_certificate(one) for one in offer.certificates]
        key = chain[0].public_key()
    check_chain(chain, authority, party=link.peer, now=now, where=where)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _not_p256(where, type(key).__name__)
    text = _transcript(link, (link.peer, link.party), offer.certificates, offer.public)
    try:
        key.verify(offer.signature, text, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise ContractError(
            "the peer's offer is not signed for this link",
            where=link.where,
            expected=f"a signature of {link.peer} for {link.party} and the same run and session",
            got="a signature over something else",
            remedy="Both must run the same contract and session; if they do, the relaying party changed the offer.",
            code="E526",
        ) from error


def _derive(link: _Link, shared: bytes, offers: tuple[bytes, bytes]) -> _Keys:
    digests = [sha256(one).digest() for one in sorted(offers)]
    info = msgspec.msgpack.encode([_LABEL, link.names, link.context])
    material = HKDF(hashes.SHA256(), 2 * _KEY, salt=sha256(b"".join(digests)).digest(), info=info).derive(shared)
    first, second = ChaCha20Poly1305(material[:_KEY]), ChaCha20Poly1305(material[_KEY:])
    ours_first = link.party < link.peer
    return _Keys(sending=first if ours_first else second, receiving=second if ours_first else first)


def _transcript(link: _Link, direction: tuple[str, str], certificates: tuple[bytes, ...], public: bytes) -> bytes:
    held = sha256(msgspec.msgpack.encode(certificates)).digest()
    return msgspec.msgpack.encode([_LABEL, *direction, link.names, link.context, held, public])


def _check_counter(counter: int, expected: int, link: _Link) -> None:
    if counter != expected:
        raise ContractError(
            "a sealed message came twice" if counter < expected else "a sealed message is missing",
            where=link.where,
            expected=f"message {expected} of {link.peer}",
            got=f"message {counter}",
            remedy="The relaying party replayed, reordered or lost frames: reconnect, or relay through another.",
            code="E525",
        )


def _no_offer(where: str, expected: str, got: str) -> WireError:
    return WireError(
        "the bytes are no offer of a sealed link",
        where=where,
        expected=expected,
        got=got,
        remedy="Both parties must run the same version; if they do, the relaying party changed the offer.",
        code="E515",
    )


def _damaged(where: str, expected: str, got: str) -> WireError:
    return WireError(
        "a sealed message cannot be opened",
        where=where,
        expected=expected,
        got=got,
        remedy="The relaying party changed it, or the offers: reconnect, or relay through another.",
        code="E516",
    )


def _nonce(head: bytes | memoryview) -> bytes:
    return b"\x00\x00\x00\x00" + bytes(head)


def _not_p256(where: str, got: str) -> CertificateError:
    return CertificateError(
        "the certificate's key cannot sign for a sealed link",
        where=where,
        expected="an elliptic-curve key on P-256",
        got=got,
        remedy="Ask the authority of this run for a certificate with such a key.",
        code="E669",
    )
