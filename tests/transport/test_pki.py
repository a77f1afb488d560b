"""The authority: what it writes, with which modes, what it refuses, and that its certificates work in TLS."""

import hashlib
import os
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from cutlayer.errors import CertificateError, ConfigError
from cutlayer.transport.pki import CertificateInfo, create_authority, describe, issue

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def first(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificates(path.read_bytes())[0]


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return create_authority(tmp_path / "authority", name="study of hearts", now=NOW)


@pytest.fixture
def no_umask():
    old = os.umask(0)
    yield
    os.umask(old)


def test_an_authority_is_a_p256_key_that_may_sign_certificates_only(authority: Path):
    certificate = first(authority / "ca.pem")
    key = load_pem_private_key((authority / "ca.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp256r1"
    assert key.public_key() == certificate.public_key()
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    certificate.verify_directly_issued_by(certificate)


def test_a_party_gets_leaf_chain_key_and_authority(authority: Path, tmp_path: Path):
    folder = issue(authority, "hospital-a", tmp_path / "out", now=NOW)
    assert folder == tmp_path / "out" / "hospital-a"
    assert sorted(path.name for path in folder.iterdir()) == ["ca.pem", "party.key", "party.pem"]
    assert (folder / "ca.pem").read_bytes() == (authority / "ca.pem").read_bytes()
    leaf, ca = x509.load_pem_x509_certificates((folder / "party.pem").read_bytes())
    assert ca == first(authority / "ca.pem")
    leaf.verify_directly_issued_by(ca)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.DNSName("hospital-a")]
    uses = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(uses) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.critical, usage.value.digital_signature, usage.value.key_cert_sign) == (True, True, False)
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    key = load_pem_private_key((folder / "party.key").read_bytes(), password=None)
    assert key.public_key() == leaf.public_key()


@pytest.mark.usefixtures("no_umask")
def test_key_files_have_mode_0600_whatever_the_umask(tmp_path: Path):
    authority = create_authority(tmp_path / "ca", name="study", now=NOW)
    folder = issue(authority, "a", tmp_path, now=NOW)
    assert [mode(authority / "ca.key"), mode(folder / "party.key")] == [0o600, 0o600]
    assert [mode(authority / "ca.pem"), mode(folder / "party.pem"), mode(folder / "ca.pem")] == [0o644] * 3
    assert mode(folder) == 0o700


def test_key_files_are_opened_new_and_private_from_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[tuple[str, int, int]] = []
    real = os.open

    def spy(path, flags, *args, **kwargs):
        opened.append((os.fspath(path), flags, args[0] if args else 0))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", spy)
    issue(create_authority(tmp_path / "ca", name="study", now=NOW), "a", tmp_path, now=NOW)
    keys = [(flags, given) for path, flags, given in opened if ".key" in path]
    assert len(keys) == 2
    assert all(given == 0o600 and flags & os.O_EXCL and flags & os.O_CREAT for flags, given in keys)


def test_nothing_but_the_files_is_left_behind(authority: Path, tmp_path: Path):
    issue(authority, "a", tmp_path / "out", now=NOW)
    assert sorted(path.name for path in authority.iterdir()) == ["ca.key", "ca.pem"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["ca.pem", "ca.key"])
def test_an_authority_is_never_overwritten(tmp_path: Path, name: str):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match=rf"E231\] {name} exists already and is not overwritten") as caught:
        create_authority(tmp_path, name="study", now=NOW)
    assert (tmp_path / name).read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert "cannot be brought back" in caught.value.remedy


def test_an_authority_made_at_the_same_moment_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "ca.key").write_text("precious")
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    with pytest.raises(ConfigError, match="E231"):
        create_authority(tmp_path, name="study", now=NOW)
    assert (tmp_path / "ca.key").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["ca.key"]


@pytest.mark.provokes("E231")
def test_a_party_is_never_overwritten(authority: Path, tmp_path: Path):
    folder = issue(authority, "a", tmp_path / "out", now=NOW)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"E231\] a exists already"):
        issue(authority, "a", tmp_path / "out", now=NOW)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


@pytest.mark.parametrize("party", ["a", "9", "hospital-a", "a" * 63, "1-2"])
def test_good_party_names(authority: Path, tmp_path: Path, party: str):
    assert describe(issue(authority, party, tmp_path, now=NOW) / "party.pem").names == (party,)


@pytest.mark.parametrize(
    "party",
    ["", "-a", "a-", "A", "a.b", "a_b", "a b", "a\n", "..", "../a", "a/b", "*", "a" * 64, "é", "\u0661"],
)
def test_bad_party_names(authority: Path, tmp_path: Path, party: str):
    with pytest.raises(ConfigError, match=r"E230\] the party's name is not allowed.*a-z, 0-9 and -"):
        issue(authority, party, tmp_path / "out", now=NOW)
    assert not (tmp_path / "out").exists()


@pytest.mark.provokes("E230")
@pytest.mark.parametrize("name", ["", " ", "a" * 65, "two\nlines", "nul\0"])
def test_bad_authority_names(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match=r"E230\] the authority's name is not allowed"):
        create_authority(tmp_path / "ca", name=name, now=NOW)
    assert not (tmp_path / "ca").exists()


@pytest.mark.parametrize("days", [0, -1, 10**7, 10**12])
def test_bad_days(authority: Path, tmp_path: Path, days: int):
    with pytest.raises(ConfigError, match=r"E233.*cannot be valid for so long"):
        create_authority(tmp_path / "new", name="study", days=days, now=NOW)
    with pytest.raises(ConfigError, match="E233"):
        issue(authority, "a", tmp_path, days=days, now=NOW)


@pytest.mark.provokes("E233")
def test_a_certificate_never_outlives_its_authority(authority: Path, tmp_path: Path):
    issue(authority, "a", tmp_path, days=3650, now=NOW)
    with pytest.raises(ConfigError, match=r"E233.*valid while its authority is not.*Ask for fewer days"):
        issue(authority, "b", tmp_path, days=3651, now=NOW)
    with pytest.raises(ConfigError, match=r"E233.*valid while its authority is not"):
        issue(authority, "b", tmp_path, now=NOW - timedelta(days=1))


def test_a_time_without_a_zone_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no time zone"):
        create_authority(tmp_path / "ca", name="study", now=datetime(2030, 1, 1))


def test_describe(authority: Path, tmp_path: Path):
    folder = issue(authority, "a", tmp_path, days=10, now=NOW)
    leaf = first(folder / "party.pem")
    der = leaf.public_bytes(Encoding.DER)
    expected = CertificateInfo(
        subject="CN=a",
        names=("a",),
        issuer="CN=study of hearts",
        not_before=NOW - timedelta(minutes=5),
        not_after=NOW + timedelta(days=10),
        fingerprint=hashlib.sha256(der).hexdigest(),
    )
    assert describe(folder / "party.pem") == expected
    (tmp_path / "party.der").write_bytes(der)
    assert describe(tmp_path / "party.der") == expected
    ca = describe(authority / "ca.pem")
    assert (ca.subject, ca.issuer, ca.names) == ("CN=study of hearts", "CN=study of hearts", ())
    assert ca.not_after == NOW + timedelta(days=3650)


def test_describe_refuses_what_is_no_certificate(authority: Path, tmp_path: Path):
    with pytest.raises(CertificateError, match="E666"):
        describe(authority / "ca.key")
    with pytest.raises(
        ConfigError, match=r"E232.*none.pem of an authority or certificate cannot be read.*No such file"
    ):
        describe(tmp_path / "none.pem")


def test_without_a_time_the_clock_is_used(tmp_path: Path):
    before = datetime.now(UTC)
    info = describe(create_authority(tmp_path, name="study", days=1) / "ca.pem")
    assert before - timedelta(minutes=6) < info.not_before < before
    assert before + timedelta(days=1, seconds=-1) < info.not_after < before + timedelta(days=1, minutes=1)


def test_no_authority_here(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"E232\] the file ca.pem of an authority or certificate cannot be read"):
        issue(tmp_path, "a", tmp_path / "out", now=NOW)


@pytest.mark.provokes("E663", "E666")
def test_a_damaged_authority(authority: Path, tmp_path: Path):
    other = create_authority(tmp_path / "other", name="other", now=NOW)
    good = (authority / "ca.key").read_bytes()
    (authority / "ca.key").write_bytes((other / "ca.key").read_bytes())
    with pytest.raises(CertificateError, match=r"E663\] the private key does not belong"):
        issue(authority, "a", tmp_path / "out", now=NOW)
    (authority / "ca.key").write_bytes(good[: len(good) // 2])
    with pytest.raises(CertificateError, match="E666") as caught:
        issue(authority, "a", tmp_path / "out", now=NOW)
    assert good.splitlines()[1].decode() not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_authority_of_another_kind_of_key(tmp_path: Path):
    foreign = trustme.CA(key_type=trustme.KeyType.RSA)
    foreign.cert_pem.write_to_path(tmp_path / "ca.pem")
    foreign.private_key_pem.write_to_path(tmp_path / "ca.key")
    with pytest.raises(ConfigError, match=r"E232.*expected an elliptic-curve key, got .*RSA"):
        issue(tmp_path, "a", tmp_path / "out")


@pytest.mark.provokes("E232")
def test_a_place_that_cannot_be_written(authority: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"E232.*cannot be written"):
        create_authority(tmp_path / "file" / "ca", name="study", now=NOW)
    with pytest.raises(ConfigError, match=r"E232.*cannot be written"):
        issue(authority, "a", tmp_path / "file" / "out", now=NOW)
    (tmp_path / "a").write_text("a file in the party's place")
    with pytest.raises(ConfigError, match="E231"):
        issue(authority, "a", tmp_path, now=NOW)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def contexts(server: Path, client: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=server / "ca.pem")
    serving.verify_mode = ssl.CERT_REQUIRED
    serving.load_cert_chain(server / "party.pem", server / "party.key")
    dialling = ssl.create_default_context(cafile=client / "ca.pem")
    dialling.load_cert_chain(client / "party.pem", client / "party.key")
    for context in (serving, dialling):
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    return serving, dialling


def shake_hands(server: Path, client: Path, name: str) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A mutual handshake of the standard library in memory; one byte each way proves that it is over."""
    serving, dialling = contexts(server, client)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        serving.wrap_bio(up, down, server_side=True),
        dialling.wrap_bio(down, up, server_hostname=name),
    )
    done = [False, False]
    for turn in range(20):
        end = ends[1 - turn % 2]
        try:
            end.do_handshake()
            done[1 - turn % 2] = True
        except ssl.SSLWantReadError:
            continue
    assert done == [True, True]
    ends[0].write(b"s")
    ends[1].write(b"c")
    assert (ends[0].read(1), ends[1].read(1)) == (b"c", b"s")
    return ends


def test_issued_certificates_work_as_server_and_client_in_a_real_handshake(tmp_path: Path):
    authority = create_authority(tmp_path / "ca", name="study")
    a, b = issue(authority, "a", tmp_path), issue(authority, "b", tmp_path)
    for server, client in ((a, b), (b, a)):
        ends = shake_hands(server, client, server.name)
        assert ends[0].getpeercert()["subjectAltName"] == (("DNS", client.name),)
        assert ends[1].getpeercert()["subjectAltName"] == (("DNS", server.name),)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(a, b, "c")


def test_a_foreign_authority_fails_the_real_handshake(tmp_path: Path):
    a = issue(create_authority(tmp_path / "ca", name="study"), "a", tmp_path)
    b = issue(create_authority(tmp_path / "ca2", name="study"), "b", tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(a, b, "a")
