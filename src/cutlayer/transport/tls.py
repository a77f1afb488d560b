"""Certificates of a party: load them, check them before dialling, and hand them to Python's own TLS.

A party *is* the one DNS name of its certificate. Why a link fails all the same is found out by
`cutlayer.transport.contact`.

| code | error | meaning |
| --- | --- | --- |
| E661 | CertificateError | the certificate, or the authority's, has expired |
| E662 | CertificateError | the certificate, or the authority's, is not valid yet |
| E663 | CertificateError | the private key does not belong to the certificate |
| E664 | CertificateError | the certificate is not signed by this authority |
| E665 | CertificateError | the certificate's name (SAN) is not the party's |
| E666 | CertificateError | a file is missing, or is not readable PEM or DER |
| E669 | CertificateError | the certificate may not be used for this (key usage, kind of key) |
"""

from __future__ import annotations

import secrets
import ssl
import tempfile
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from cutlayer.errors import CertificateError
from cutlayer.transport.certificates import (
    SIZE_LIMIT,
    check_chain,
    check_pair,
    first_line,
    names_of,
    parse_chain,
    parse_key,
)

__all__ = ["Credentials", "check_credentials", "context_of", "load_credentials", "names_of"]


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What a party shows and trusts: PEM texts. `repr` shows the party's name only.

    `certificate` is the party's certificate followed by intermediate ones, `private_key` is unencrypted PKCS#8 and
    never leaves the party, `authority` is the certificate (or certificates) of the run's authority.
    """

    party: str
    certificate: bytes = field(repr=False)
    private_key: bytes = field(repr=False)
    authority: bytes = field(repr=False)


def load_credentials(folder: Path, party: str) -> Credentials:
    """Read `party.pem`, `party.key` and `ca.pem` of `folder`, which `pki.issue` wrote.

    Raises CertificateError E666 if a file is missing, longer than 64 KiB or not PEM. Dates and names are left to
    `check_credentials`.
    """
    texts = {name: _read(folder / name, party) for name in ("party.pem", "party.key", "ca.pem")}
    parse_chain(texts["party.pem"], where=f"party {party}, file party.pem")
    parse_key(texts["party.key"], where=f"party {party}, file party.key")
    parse_chain(texts["ca.pem"], where=f"party {party}, file ca.pem")
    return Credentials(
        party=party, certificate=texts["party.pem"], private_key=texts["party.key"], authority=texts["ca.pem"]
    )


def check_credentials(credentials: Credentials, *, now: datetime) -> None:
    """Check at time `now` (with a time zone) all that a peer would check, so that the cause is known here.

    Raises CertificateError: E661 expired, E662 not yet valid, E663 foreign key, E664 foreign authority, E665 another
    name, E666 not readable, E669 not usable as client and server.
    """
    where = f"party {credentials.party}, own certificate"
    chain = parse_chain(credentials.certificate, where=where)
    check_pair(chain[0], parse_key(credentials.private_key, where=f"party {credentials.party}, own key"), where)
    authority = parse_chain(credentials.authority, where=f"party {credentials.party}, authority")
    check_chain(chain, authority, party=credentials.party, now=now, where=where)


def context_of(credentials: Credentials, where: str, *, server: bool = False) -> ssl.SSLContext:
    """Return a context for TLS with HTTP/2 that shows this certificate and asks for one of the same authority.

    A client's leaves it to the caller to compare the server's name, so that it can say whose it is. The key goes
    through a file (`ssl` reads no other), encrypted under a passing secret. Raises CertificateError E663, E666, E669.
    """
    key = parse_key(credentials.private_key, where=where)
    check_pair(parse_chain(credentials.certificate, where=where)[0], key, where)
    authority = parse_chain(credentials.authority, where=where)
    secret = secrets.token_hex(16).encode()
    lock = serialization.BestAvailableEncryption(secret)
    sealed = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    with tempfile.TemporaryDirectory() as folder:
        certificate_file, key_file = Path(folder, "party.pem"), Path(folder, "party.key")
        certificate_file.write_bytes(credentials.certificate)
        key_file.write_bytes(sealed)
        try:
            context.load_cert_chain(certificate_file, key_file, password=secret)
        except ssl.SSLError as error:
            raise CertificateError(
                "TLS cannot use this party's certificate",
                where=where,
                expected="a certificate and key that OpenSSL accepts",
                got=first_line(error),
                remedy="Ask the authority of this run for a certificate with a stronger key.",
                code="E669",
            ) from error
    for one in authority:
        context.load_verify_locations(cadata=one.public_bytes(serialization.Encoding.DER))
    return context


def _read(path: Path, party: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise CertificateError(
            f"the file {path.name} cannot be read",
            where=f"party {party}, folder {path.parent}",
            expected="a folder with party.pem, party.key and ca.pem",
            got=error.strerror or type(error).__name__,
            remedy="Point to the folder that the authority issued for this party.",
            code="E666",
        ) from error
