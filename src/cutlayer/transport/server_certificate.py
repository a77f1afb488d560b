"""Say what is wrong with a server's certificate that this party does not accept, and who renews it with what.

Nothing is judged here: TLS has refused already. The certificate is read to say why; nothing of a run crosses.

| code | error | meaning |
| --- | --- | --- |
| E667 | CertificateError | the server's certificate: out of date, of another name or authority, or refused by TLS |
"""

from __future__ import annotations

import contextlib
import ssl
from datetime import UTC, datetime
from typing import Any, Final

from cryptography import x509

from cutlayer.errors import CertificateError, CutlayerError
from cutlayer.transport.certificates import listed, names_of, parse_chain, title

__all__ = ["other_name", "refused_by_tls", "shown_by", "why_refused"]

_EXPIRED: Final = 10  # X509_V_ERR_CERT_HAS_EXPIRED and so on, of OpenSSL
_EARLY: Final = 9
_DER: Final = 2  # X509_FILETYPE_ASN1
_FOREIGN: Final = frozenset({18, 19, 20, 21})
_WHOSE: Final = "the server's certificate"
_ACCEPTED: Final = "a certificate of this run's authority, in date, in the server's name"


def shown_by(stream: ssl.SSLSocket) -> bytes:
    """Return the certificate (DER) that a server showed in a handshake that failed by it; empty: it cannot be had.

    Python gives it after a handshake that succeeds; what holds it after one that fails is not public before 3.13.
    A second handshake, which checks nothing, would give it too, and be one more visit that the server notes as refused.
    """
    inner: Any = getattr(stream, "_sslobj", None)
    with contextlib.suppress(AttributeError, TypeError, LookupError, ssl.SSLError):
        return bytes(inner.get_unverified_chain()[0].public_bytes(_DER))
    return b""


def why_refused(
    error: ssl.SSLCertVerificationError, shown: bytes, server: str, authority: bytes, where: str
) -> CertificateError:
    """Return the error for a certificate that TLS has refused here; `shown` is that certificate, if it could be had.

    Args:
        error: What TLS said.
        shown: The certificate in DER, or empty.
        server: The server's party.
        authority: What this party trusts, in PEM.
        where: Party and address.
    """
    with contextlib.suppress(CutlayerError):
        leaf, now = parse_chain(shown, where=where)[0], datetime.now(UTC)
        start, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
        if error.verify_code == _EXPIRED and now > end:
            return _out_of_date(server, where, "has expired", f"valid until {end:%Y-%m-%d %H:%M} UTC", now)
        if error.verify_code == _EARLY and now < start:
            return _out_of_date(server, where, "is not valid yet", f"valid from {start:%Y-%m-%d %H:%M} UTC", now)
        if error.verify_code in _FOREIGN:
            return _foreign(leaf, shown, server, authority, where)
    return refused_by_tls(where, error.verify_message)


def other_name(names: tuple[str, ...], server: str, where: str) -> CertificateError:
    """Return the error for a certificate of this run's authority, in date, that is made for `names`."""
    return CertificateError(
        f"{_WHOSE} is made for another name",
        where=where,
        expected=f"a certificate made for {server}",
        got=f"one made for {listed(names)}",
        remedy=f"Check that {server} listens at this address; if so, it has another's folder of certificates: its own "
        f"is made with {_issue(server)}.",
        code="E667",
    )


def refused_by_tls(where: str, got: str) -> CertificateError:
    """Return the error for a server that TLS refuses for another reason, or for one that could not be found out."""
    return CertificateError(
        f"{_WHOSE} is not one that this party accepts",
        where=where,
        expected=_ACCEPTED,
        got=got,
        remedy="Check the server's address, then compare the authority (ca.pem) of both parties.",
        code="E667",
    )


def _out_of_date(server: str, where: str, what: str, got: str, now: datetime) -> CertificateError:
    return CertificateError(
        f"{_WHOSE} {what}",
        where=where,
        expected=f"a certificate in date now, {now:%Y-%m-%d %H:%M} UTC",
        got=f"one {got}",
        remedy=f"If this machine's clock is right, have the authority of this run renew it with {_issue(server)} "
        f"and start {server} again with the new folder.",
        code="E667",
    )


def _foreign(leaf: x509.Certificate, shown: bytes, server: str, authority: bytes, where: str) -> CertificateError:
    own = parse_chain(authority, where=where)[0]
    return CertificateError(
        f"{_WHOSE} is of another authority",
        where=where,
        expected=f"one signed by {title(own.subject)}, the authority (ca.pem) that this party has",
        got=f"issuer {title(leaf.issuer)}, made for {listed(names_of(shown))}",
        remedy="Compare `cutlayer pki show` at both parties, and ask whoever issues certificates for this run which "
        f"authority is theirs: {server} needs a certificate of it, made with {_issue(server)}, and this party its own "
        "and ca.pem; an issuer that nobody knows is a proxy that opens TLS.",
        code="E667",
    )


def _issue(server: str) -> str:
    return f"`cutlayer pki issue {server}`"
