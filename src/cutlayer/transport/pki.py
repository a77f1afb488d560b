"""A small certificate authority for one run: EC P-256 keys, one DNS name a party, client and server in one.

An authority is a folder with `ca.pem` and `ca.key`; a party's folder has `party.pem` (its certificate, then the
authority's), `party.key` and `ca.pem`. Who holds `ca.key` can mint any party, so it belongs to the party that the
contract names as authority and nowhere else. Key files are created with mode 0600 from their first byte.

| code | error | meaning |
| --- | --- | --- |
| E230 | ConfigError | a party's or authority's name is not allowed |
| E231 | ConfigError | a file or folder exists already and is not overwritten |
| E232 | ConfigError | the folder is no authority, or cannot be written |
| E233 | ConfigError | the days asked for are not possible |
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cutlayer.errors import ConfigError
from cutlayer.transport.certificates import check_pair, names_of, parse_chain, parse_key, readable, title

__all__ = ["CertificateInfo", "create_authority", "describe", "issue"]

_PARTY: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NAME_LIMIT: Final = 64  # characters of an X.509 common name
_SKEW: Final = timedelta(minutes=5)  # certificates begin this much earlier, for clocks that are behind
_PUBLIC, _PRIVATE = 0o644, 0o600


@dataclass(frozen=True, kw_only=True)
class CertificateInfo:
    """What a certificate says: names are its DNS names (SAN), times are UTC, the fingerprint is SHA-256 in hex."""

    subject: str
    names: tuple[str, ...]
    issuer: str
    not_before: datetime
    not_after: datetime
    fingerprint: str


def create_authority(folder: Path, *, name: str, days: int = 3650, now: datetime | None = None) -> Path:
    """Write `ca.pem` and `ca.key` (mode 0600) into `folder`, made if it is missing; return the folder.

    `name` is a text of 1 to 64 characters that people recognise; `now` (with a time zone) is the clock unless given.
    Raises ConfigError: E230 for the name, E231 if one of the files exists, E232 if they cannot be written, E233 for
    days.
    """
    if not (0 < len(name) <= _NAME_LIMIT and name.isprintable() and name == name.strip()):
        raise ConfigError(
            "the authority's name is not allowed",
            where=f"authority {folder}",
            expected=f"1 to {_NAME_LIMIT} printable characters",
            got=repr(name[: _NAME_LIMIT + 1]),
            remedy="Choose a short name, such as the study's.",
            code="E230",
        )
    start, end = _validity(days, now)
    for path in (folder / "ca.pem", folder / "ca.key"):
        if os.path.lexists(path):
            raise _exists(path)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, subject, key.public_key(), start, end)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(authority=True), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "ca.key", _key_text(key), _PRIVATE)
        _write(folder / "ca.pem", _text(certificate), _PUBLIC)
    except OSError as error:
        raise _not_writable(folder, error) from error
    return folder


def issue(authority: Path, party: str, out: Path, *, days: int = 397, now: datetime | None = None) -> Path:
    """Issue `party` a new key and certificate as the folder `out/<party>`; return it. It appears whole or not at all.

    `authority` is a folder that `create_authority` wrote. The certificate's only name is `party`; it serves as TLS
    client and server and signs offers of the sealed relay. `now` (with a time zone) is the clock unless given.
    Raises ConfigError: E230 for the name, E231 if `out/<party>` has files, E232 for folders, E233 for days or a
    certificate that would outlive its authority; CertificateError E663 or E666 for a damaged authority.
    """
    if not _PARTY.fullmatch(party):
        raise ConfigError(
            "the party's name is not allowed",
            where=f"party to certify, by the authority {authority}",
            expected="1 to 63 of a-z, 0-9 and -, not - at either end",
            got=repr(party[:80]),
            remedy="Choose a name such as hospital-a.",
            code="E230",
        )
    start, end = _validity(days, now)
    ca_text, ca_key = _load_authority(authority)
    ca = parse_chain(ca_text, where=f"authority {authority}")[0]
    if end > ca.not_valid_after_utc or start < ca.not_valid_before_utc - _SKEW:
        raise ConfigError(
            "the certificate would be valid while its authority is not",
            where=f"authority {authority}, party {party}",
            expected=f"within {ca.not_valid_before_utc:%Y-%m-%d} to {ca.not_valid_after_utc:%Y-%m-%d}",
            got=f"{start:%Y-%m-%d} to {end:%Y-%m-%d}",
            remedy="Ask for fewer days, or create a new authority.",
            code="E233",
        )
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, party)])
    builder = _builder(subject, ca.subject, key.public_key(), start, end)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(authority=False), critical=True)
    uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = builder.add_extension(uses, critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(party)]), critical=False)
    builder = builder.add_extension(_issuer_id(ca), critical=False)
    certificate = builder.sign(ca_key, hashes.SHA256())
    return _write_folder(out, party, _text(certificate) + ca_text, _key_text(key), ca_text)


def describe(cert: Path) -> CertificateInfo:
    """Return what the first certificate of the PEM or DER file `cert` says.

    Raises ConfigError E232 if the file cannot be read, CertificateError E666 if it is no certificate.
    """
    data = _read(cert)
    with readable(f"file {cert.name}"):
        first = parse_chain(data, where=f"file {cert.name}")[0]
        return CertificateInfo(
            subject=title(first.subject),
            names=names_of(data),
            issuer=title(first.issuer),
            not_before=first.not_valid_before_utc,
            not_after=first.not_valid_after_utc,
            fingerprint=first.fingerprint(hashes.SHA256()).hex(),
        )


def _validity(days: int, now: datetime | None) -> tuple[datetime, datetime]:
    now = datetime.now(UTC) if now is None else now
    if now.tzinfo is None:
        raise ConfigError("the time to issue at has no time zone", where="now=...", remedy="Pass UTC.", code="E233")
    try:
        if days < 1:
            raise OverflowError
        return now - _SKEW, now + timedelta(days=days)
    except OverflowError:
        raise ConfigError(
            "a certificate cannot be valid for so long",
            where="--days",
            expected="1 day or more, ending before the year 10000",
            got=f"{days} days",
            remedy="Give another number of days.",
            code="E233",
        ) from None


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=public)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _issuer_id(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    own = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _load_authority(folder: Path) -> tuple[bytes, ec.EllipticCurvePrivateKey]:
    where = f"authority {folder}"
    text = _read(folder / "ca.pem")
    key = parse_key(_read(folder / "ca.key"), where=where)
    check_pair(parse_chain(text, where=where)[0], key, where)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            "the authority's key is of another kind",
            where=where,
            expected="an elliptic-curve key",
            got=type(key).__name__,
            remedy="use an authority that `cutlayer pki init` made",
            code="E232",
        )
    return text, key


def _text(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_text(key: ec.EllipticCurvePrivateKey) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def _write_folder(out: Path, party: str, certificate: bytes, key: bytes, authority: bytes) -> Path:
    """Write a party's three files beside their place, then rename the folder: it appears whole or not at all."""
    target = out / party
    try:
        out.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{party}.", dir=out))  # mode 0700
    except OSError as error:
        raise _not_writable(out, error) from error
    try:
        _write(draft / "party.key", key, _PRIVATE)
        _write(draft / "party.pem", certificate, _PUBLIC)
        _write(draft / "ca.pem", authority, _PUBLIC)
        draft.rename(target)
    except OSError as error:
        if os.path.lexists(target):
            raise _exists(target) from error
        raise _not_writable(out, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # what a failure left; nothing after the rename
    _flush_folder(out)
    return target


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a new file: never over an old one, never half a file under its name, `mode` from the first byte."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    except FileExistsError as error:
        raise _exists(path) from error
    finally:
        draft.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot flush a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the file {path.name} of an authority or certificate cannot be read",
            where=f"folder {path.parent}",
            got=error.strerror or type(error).__name__,
            remedy="make one with `cutlayer pki init FOLDER` and give its folder, or give the path of a certificate",
            code="E232",
        ) from error


def _exists(path: Path) -> ConfigError:
    return ConfigError(
        f"{path.name} exists already and is not overwritten",
        where=f"folder {path.parent}",
        expected="a new name",
        got=str(path),
        remedy="Choose another folder, or move the old one away yourself: a lost key cannot be brought back.",
        code="E231",
    )


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        "certificates cannot be written",
        where=f"folder {folder}",
        got=error.strerror or type(error).__name__,
        remedy="Choose a folder that this user may write to.",
        code="E232",
    )
