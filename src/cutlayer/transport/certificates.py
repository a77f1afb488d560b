"""Certificates: read them, and check that one names a party, is in date and comes from the run's authority.

A party *is* the one DNS name (SAN) of its certificate. Path validation is the `cryptography` library's; what it would
report in one sentence is checked here point by point, so that each has a code (E661 to E666, E669; see `tls`) and a
remedy.
Sans-I/O: bytes and the time come in, errors go out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID

from cutlayer.errors import CertificateError, ConfigError

__all__ = [
    "SIZE_LIMIT",
    "check_chain",
    "check_pair",
    "first_line",
    "listed",
    "names_of",
    "parse_chain",
    "parse_key",
    "printable",
    "readable",
    "title",
]

SIZE_LIMIT: Final = 64 * 1024
"""Longest PEM or DER that is read, in bytes."""
# What the library raises on hostile bytes (found by fuzzing two of its versions); warnings, where they are errors.
_NOT_READABLE: Final = (
    ValueError,
    TypeError,
    LookupError,
    Warning,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_SHOWN: Final = 200  # characters of a text that somebody else wrote
_REISSUE: Final = "Ask the authority of this run for a new certificate (`cutlayer pki issue NAME`)"


def check_chain(
    chain: Sequence[x509.Certificate],
    authority: Sequence[x509.Certificate],
    *,
    party: str,
    now: datetime,
    where: str,
) -> None:
    """Check that `chain` (the party's certificate first) is `party`'s, in date at `now` and signed by `authority`.

    The only name of the certificate must be `party`: a certificate of two names could act as two parties.
    Raises CertificateError E661, E662, E664, E665, E666 or E669; ConfigError E233 if `now` has no time zone.
    """
    if now.tzinfo is None:
        raise ConfigError(
            "the time to check certificates at has no time zone", where=where, remedy="pass UTC", code="E233"
        )
    with readable(where):
        _check_dates(chain[0], now, where, "the certificate")
        usable = [one for one in authority if one.not_valid_before_utc <= now <= one.not_valid_after_utc]
        if not usable:
            _check_dates(authority[0], now, where, "the authority's certificate")
        _check_usage(chain[0], where)
        try:
            _verifier(usable, now).verify(chain[0], list(chain[1:]))
        except verification.VerificationError as error:
            raise CertificateError(
                "the certificate is not signed by this run's authority",
                where=where,
                expected=f"a chain to {title(usable[0].subject)}",
                got=f"issuer {title(chain[0].issuer)} ({first_line(error)})",
                remedy=f"{_REISSUE}, or exchange ca.pem if the authority is new.",
                code="E664",
            ) from error
        names = _names(chain[0])
    if names != (party,):
        raise CertificateError(
            "the certificate is another party's",
            where=where,
            expected=f"exactly the name {party}",
            got=f"the names {listed(names)}",
            remedy=f"{_REISSUE} in the name {party}, or correct `party` in the party file; a client of a served stage "
            "names its own certificate there: `identity` in [network].",
            code="E665",
        )


def names_of(certificate: bytes) -> tuple[str, ...]:
    """Return the DNS names (SAN) of the first certificate in PEM or DER; the common name is never one of them.

    Other kinds of names (addresses, mail, URI) are left out: none of them names a party.
    Raises CertificateError E666 if the bytes are no certificate.
    """
    chain = parse_chain(certificate, where="names of a certificate")
    with readable("names of a certificate"):
        return _names(chain[0])


def parse_chain(data: bytes, *, where: str) -> list[x509.Certificate]:
    """Return the certificates of a PEM text, or the one of a DER; at least one. Raises CertificateError E666."""
    with readable(where):
        if b"PRIVATE KEY-----" in data and b"BEGIN CERTIFICATE-----" not in data:
            raise ValueError("a private key, which stays where it is; the certificate is party.pem or ca.pem")
        if len(data) > SIZE_LIMIT:
            raise ValueError(f"{len(data)} bytes, at most {SIZE_LIMIT} are read")
        if data[:1] == b"\x30" and data[1:2] >= b"\x80":  # a DER sequence of more than 127 bytes; never text
            return [x509.load_der_x509_certificate(data)]
        return x509.load_pem_x509_certificates(data)


def parse_key(data: bytes, *, where: str) -> PrivateKeyTypes:
    """Return the private key of an unencrypted PEM text. Raises CertificateError E666, which never shows the key."""
    with readable(where, expected="an unencrypted private key in PEM"):
        return serialization.load_pem_private_key(data, password=None)


@contextlib.contextmanager
def readable(where: str, *, expected: str = "an X.509 certificate in PEM or DER") -> Iterator[None]:
    """Turn what the library raises on bytes that it cannot read into CertificateError E666."""
    try:
        yield
    except _NOT_READABLE as error:
        raise CertificateError(
            "a certificate or key cannot be read",
            where=where,
            expected=expected,
            got=first_line(error),
            remedy="Give the file as the authority wrote it.",
            code="E666",
        ) from error


def _check_dates(certificate: x509.Certificate, now: datetime, where: str, whose: str) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise CertificateError(
            f"{whose} has expired",
            where=where,
            expected=f"valid at {now:%Y-%m-%d %H:%M:%S} UTC",
            got=f"valid until {end:%Y-%m-%d %H:%M:%S} UTC",
            remedy=f"{_REISSUE}; check this machine's clock.",
            code="E661",
        )
    if now < start:
        raise CertificateError(
            f"{whose} is not valid yet",
            where=where,
            expected=f"valid at {now:%Y-%m-%d %H:%M:%S} UTC",
            got=f"valid from {start:%Y-%m-%d %H:%M:%S} UTC",
            remedy="Check this machine's clock; if it is right, wait, or ask for a new certificate.",
            code="E662",
        )


def check_pair(certificate: x509.Certificate, key: PrivateKeyTypes, where: str) -> None:
    """Check that `key` is the certificate's. Raises CertificateError E663."""
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    with readable(where):
        same = certificate.public_key().public_bytes(*form) == key.public_key().public_bytes(*form)
    if not same:
        raise CertificateError(
            "the private key does not belong to the certificate",
            where=where,
            expected="the key that the certificate was issued for",
            got="another key",
            remedy="Take party.pem and party.key from the same folder, as they were issued.",
            code="E663",
        )


def _check_usage(certificate: x509.Certificate, where: str) -> None:
    got = ""
    with contextlib.suppress(x509.ExtensionNotFound):
        uses = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        if not {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH} <= uses:
            got = "an extended key usage without one of them"
    with contextlib.suppress(x509.ExtensionNotFound):
        if not certificate.extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature:
            got = "a key usage without digital signature"
    if got:
        raise CertificateError(
            "the certificate may not be used to authenticate a party",
            where=where,
            expected="digital signature, as TLS client and as TLS server",
            got=got,
            remedy=f"{_REISSUE} with these usages.",
            code="E669",
        )


def _verifier(authority: Sequence[x509.Certificate], now: datetime) -> verification.ClientVerifier:
    """Path validation by the library. Of the web's profile, only *critical or not* is relaxed for two extensions."""
    agnostic = verification.Criticality.AGNOSTIC
    leaf = (
        verification.ExtensionPolicy.webpki_defaults_ee()
        .require_present(x509.SubjectAlternativeName, agnostic, None)
        .may_be_present(x509.ExtendedKeyUsage, agnostic, None)
    )
    issuer = verification.ExtensionPolicy.webpki_defaults_ca()
    builder = verification.PolicyBuilder().store(verification.Store(list(authority))).time(now)
    return builder.extension_policies(ca_policy=issuer, ee_policy=leaf).build_client_verifier()


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(names.get_values_for_type(x509.DNSName))


def title(name: x509.Name) -> str:
    """Return a subject or an issuer as one printable line: a peer chose its characters, a person will see them."""
    return printable(name.rfc4514_string())


def listed(names: tuple[str, ...]) -> str:
    """Return names for an error's text, as one printable line."""
    return printable(", ".join(names)) or "(none)"


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its class's name, as one printable line."""
    return printable((str(error).splitlines() or [""])[0]) or type(error).__name__


def printable(text: str) -> str:
    """Return the first 200 characters of a text that somebody else wrote, as one printable line."""
    return "".join(one if one.isprintable() else "?" for one in text[:_SHOWN])
