"""Certificates that are wrong are named before the dial."""

import dataclasses
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from cutlayer.errors import CertificateError
from cutlayer.transport.pki import issue
from cutlayer.transport.tls import Credentials, check_credentials, load_credentials
from tests.transport.conftest import NOW

PEM = serialization.Encoding.PEM


def code_of(credentials: Credentials, now: datetime = NOW) -> str:
    with pytest.raises(CertificateError) as caught:
        check_credentials(credentials, now=now)
    assert caught.value.remedy
    return f"{caught.value.code} {caught.value.what}"


# --- load and check -----------------------------------------------------------------------------------------------


def test_good_credentials_pass_within_their_dates(good: Credentials):
    for now in (NOW - timedelta(minutes=5), NOW, NOW + timedelta(days=397)):
        check_credentials(good, now=now)
    elsewhere = NOW.astimezone(datetime.strptime("+0900", "%z").tzinfo)
    check_credentials(good, now=elsewhere)


def test_repr_shows_the_party_and_nothing_of_the_key(good: Credentials):
    assert repr(good) == "Credentials(party='a')"
    assert "PRIVATE" not in f"{good} {good!r} {[good]}"
    with pytest.raises(dataclasses.FrozenInstanceError):
        good.party = "b"


def test_the_key_of_another_certificate(good: Credentials, folder: Path):
    other = dataclasses.replace(good, private_key=(folder / "b" / "party.key").read_bytes())
    assert code_of(other) == "E663 the private key does not belong to the certificate"


@pytest.mark.parametrize("field", ["certificate", "private_key", "authority"])
@pytest.mark.parametrize("data", [b"", b"not PEM", b"\x30\x82\x01\x00junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_unreadable(good: Credentials, field: str, data: bytes):
    assert code_of(dataclasses.replace(good, **{field: data})) == "E666 a certificate or key cannot be read"


def test_a_locked_key_is_unreadable(good: Credentials):
    key = serialization.load_pem_private_key(good.private_key, None)
    locked = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x"))
    with pytest.raises(CertificateError, match=r"E666.*unencrypted private key in PEM"):
        check_credentials(dataclasses.replace(good, private_key=locked), now=NOW)


@pytest.mark.parametrize("name", ["party.pem", "party.key", "ca.pem"])
def test_load_names_the_file_that_is_missing_or_no_pem(authority: Path, tmp_path: Path, name: str):
    made = issue(authority, "a", tmp_path, now=NOW)
    (made / name).write_bytes(b"junk")
    with pytest.raises(CertificateError, match=rf"E666\] .*{name}"):
        load_credentials(made, "a")
    (made / name).write_bytes(b"x" * 100_000)
    with pytest.raises(CertificateError, match="E666"):
        load_credentials(made, "a")
    (made / name).unlink()
    with pytest.raises(CertificateError, match=rf"E666\] the file {name} cannot be read.*No such file"):
        load_credentials(made, "a")
