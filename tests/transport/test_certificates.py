"""Certificates that are wrong: each kind has its code, and the right ones pass."""

import dataclasses
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cutlayer.errors import CertificateError, ConfigError
from cutlayer.transport.certificates import names_of, readable
from cutlayer.transport.pki import create_authority, issue
from cutlayer.transport.tls import Credentials, check_credentials, load_credentials
from tests.transport.conftest import NOW

PEM = serialization.Encoding.PEM
BOTH = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)


def own_leaf(authority: Path, names: list[x509.GeneralName] | None, uses=BOTH, *, sign: bool = True, days: int = 30):
    """A certificate of this authority, built by hand, and its key: with any names, usages and end."""
    ca = x509.load_pem_x509_certificate((authority / "ca.pem").read_bytes())
    ca_key = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    start = ca.not_valid_before_utc
    builder = x509.CertificateBuilder(
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a")]),
        issuer_name=ca.subject,
        public_key=key.public_key(),
        serial_number=7,
        not_valid_before=start,
        not_valid_after=start + timedelta(days=days),
    )
    usage = x509.KeyUsage(sign, False, not sign, False, False, False, False, False, False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key())
    builder = builder.add_extension(usage, True).add_extension(identifier, False)
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    if uses:
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), False)
    text = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return builder.sign(ca_key, hashes.SHA256()).public_bytes(PEM), text


def with_leaf(good: Credentials, leaf: tuple[bytes, bytes]) -> Credentials:
    return dataclasses.replace(good, certificate=leaf[0], private_key=leaf[1])


def code_of(credentials: Credentials, now: datetime = NOW) -> str:
    with pytest.raises(CertificateError) as caught:
        check_credentials(credentials, now=now)
    assert caught.value.remedy
    return f"{caught.value.code} {caught.value.what}"


def test_expired(good: Credentials):
    assert code_of(good, NOW + timedelta(days=397, seconds=1)) == "E661 the certificate has expired"


@pytest.mark.provokes("E662")
def test_not_yet_valid(good: Credentials):
    assert code_of(good, NOW - timedelta(minutes=5, seconds=1)) == "E662 the certificate is not valid yet"


def test_the_error_names_both_times(good: Credentials):
    with pytest.raises(CertificateError, match=r"valid at 2040-01-01 .* UTC, got valid until 2031-02-02 12:00:00 UTC"):
        check_credentials(good, now=NOW.replace(year=2040))


@pytest.mark.provokes("E661")
def test_an_expired_authority_is_named_as_such(good: Credentials, tmp_path: Path):
    old = create_authority(tmp_path, name="old", days=1, now=NOW - timedelta(days=9))
    stale = dataclasses.replace(good, authority=(old / "ca.pem").read_bytes())
    assert code_of(stale) == "E661 the authority's certificate has expired"
    both = dataclasses.replace(good, authority=stale.authority + good.authority)
    check_credentials(both, now=NOW)


@pytest.mark.provokes("E664")
def test_a_foreign_authority_of_the_same_name(good: Credentials, tmp_path: Path):
    foreign = create_authority(tmp_path, name="study", now=NOW)
    other = dataclasses.replace(good, authority=(foreign / "ca.pem").read_bytes())
    assert code_of(other) == "E664 the certificate is not signed by this run's authority"


def test_a_certificate_that_is_its_own_authority(good: Credentials, authority: Path):
    text = (authority / "ca.pem").read_bytes()
    forged = dataclasses.replace(good, certificate=text, private_key=(authority / "ca.key").read_bytes())
    assert code_of(forged).startswith("E669")


def test_a_party_cannot_act_as_an_authority(good: Credentials, folder: Path, tmp_path: Path):
    (tmp_path / "ca.pem").write_bytes((folder / "b" / "party.pem").read_bytes())
    (tmp_path / "ca.key").write_bytes((folder / "b" / "party.key").read_bytes())
    forged = issue(tmp_path, "a", tmp_path / "out", days=30, now=NOW)
    stolen = load_credentials(forged, "a")
    assert code_of(dataclasses.replace(stolen, authority=good.authority)).startswith("E664")


@pytest.mark.provokes("E665")
@pytest.mark.parametrize(
    ("names", "got"),
    [
        ([x509.DNSName("b")], "b"),
        ([x509.DNSName("a"), x509.DNSName("b")], "a, b"),
        ([x509.DNSName("*")], "*"),
        ([x509.DNSName("A")], "A"),
        ([x509.UniformResourceIdentifier("a"), x509.DNSName("b")], "b"),
    ],
)
def test_another_name(good: Credentials, authority: Path, names: list[x509.GeneralName], got: str):
    wrong = with_leaf(good, own_leaf(authority, names))
    with pytest.raises(CertificateError, match=r"E665\] the certificate is another party's") as caught:
        check_credentials(wrong, now=NOW)
    assert caught.value.got == f"the names {got}"
    assert caught.value.expected == "exactly the name a"


def test_a_common_name_is_no_name(good: Credentials, authority: Path):
    assert code_of(with_leaf(good, own_leaf(authority, None))).startswith("E66")
    assert names_of(own_leaf(authority, None)[0]) == ()


def test_by_hand_but_good(good: Credentials, authority: Path):
    check_credentials(with_leaf(good, own_leaf(authority, [x509.DNSName("a")])), now=NOW)
    check_credentials(with_leaf(good, own_leaf(authority, [x509.DNSName("a")], uses=())), now=NOW)


@pytest.mark.provokes("E669")
@pytest.mark.parametrize("uses", [BOTH[:1], BOTH[1:], (ExtendedKeyUsageOID.CODE_SIGNING,)])
def test_a_certificate_for_something_else(good: Credentials, authority: Path, uses):
    wrong = with_leaf(good, own_leaf(authority, [x509.DNSName("a")], uses=uses))
    assert code_of(wrong) == "E669 the certificate may not be used to authenticate a party"


def test_a_key_that_may_not_sign(good: Credentials, authority: Path):
    assert code_of(with_leaf(good, own_leaf(authority, [x509.DNSName("a")], sign=False))).startswith("E669")


def test_a_time_without_a_zone_is_refused(good: Credentials):
    with pytest.raises(ConfigError, match=r"E233.*no time zone.*pass UTC"):
        check_credentials(good, now=NOW.replace(tzinfo=None))


def test_an_endless_certificate_file_is_not_read(good: Credentials):
    with pytest.raises(CertificateError, match="at most 65536 are read"):
        names_of(good.certificate + b"\n" * 65536)


def test_names_of_reads_pem_and_der_and_dns_names_only(good: Credentials, authority: Path):
    assert names_of(good.certificate) == ("a",)
    der = x509.load_pem_x509_certificate(good.certificate).public_bytes(serialization.Encoding.DER)
    assert names_of(der) == ("a",)
    assert names_of(good.authority) == ()
    mixed = [x509.DNSName("a"), x509.UniformResourceIdentifier("b"), x509.RFC822Name("c@d.e"), x509.DNSName("f")]
    assert names_of(own_leaf(authority, mixed)[0]) == ("a", "f")
    with pytest.raises(CertificateError, match="E666"):
        names_of(der[:-1])


def test_what_another_wrote_is_shown_as_one_printable_line(good: Credentials, authority: Path):
    wrong = with_leaf(good, own_leaf(authority, [x509.DNSName("b\x1b[2J\n" + "x" * 500)]))
    with pytest.raises(CertificateError, match="E665") as caught:
        check_credentials(wrong, now=NOW)
    assert caught.value.got == "the names b?[2J?" + "x" * 194


@pytest.mark.parametrize("error", [KeyError(13), IndexError("x"), ValueError("x"), TypeError("x"), UserWarning("x")])
def test_whatever_the_library_raises_on_hostile_bytes_is_typed(error: Exception):
    with (
        pytest.raises(CertificateError, match=r"E666\] a certificate or key cannot be read \(here\)"),
        readable("here"),
    ):
        raise error


def test_a_private_key_in_place_of_a_certificate_is_named_and_not_shown(authority: Path):
    with pytest.raises(CertificateError, match=r"E666.*a private key, which stays where it is") as caught:
        names_of((authority / "ca.key").read_bytes())
    assert "https://" not in str(caught.value)


def test_a_negative_serial_number_is_unreadable_where_warnings_are_errors(authority: Path):
    der = x509.load_pem_x509_certificate(own_leaf(authority, [x509.DNSName("a")])[0]).public_bytes(
        serialization.Encoding.DER
    )
    assert der.count(b"\xa0\x03\x02\x01\x02\x02\x01\x07") == 1
    with pytest.raises(CertificateError, match="E666"):
        names_of(der.replace(b"\xa0\x03\x02\x01\x02\x02\x01\x07", b"\xa0\x03\x02\x01\x02\x02\x01\x87"))


def test_a_text_before_the_certificate_is_not_taken_for_der(good: Credentials):
    assert names_of(b"0: subject CN=a\n" + good.certificate) == ("a",)
