"""A site's files, good and bad: keys and passwords that others may read, certificates, acceptance, builder and data."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cutlayer.run.doctor_site import acceptance_row, check_rows, key_row, secret_row
from cutlayer.transport.pki import create_authority, issue
from tests.cli.conftest import CODE
from tests.run.practice import LONG_AGO, SECRET, Practice, by_name

PARTY = "check of hospital"


@pytest.fixture
def practice(tmp_path: Path) -> Practice:
    return Practice(tmp_path)


def soon() -> datetime:
    return datetime.now(UTC) + timedelta(days=9)


def check(practice: Practice, name: str = "hospital") -> list[tuple[str, str, str, str]]:
    """Return (status, code, seen, do) of what is found of a party's certificate, code and data."""
    rows = list(check_rows(practice.contract, practice.file(name), now=datetime.now(UTC)))
    assert rows[0].name == "contract"
    assert {row.name for row in rows[1:]} == {f"check of {name}"}
    for row in rows:
        by_name([row])
    return [(row.status, row.code, row.seen, row.do) for row in rows[1:]]


# --- keys, passwords, acceptance -------------------------------------------------------------------------------------


def test_a_key_of_ones_own_and_one_that_others_may_read(practice: Practice):
    folder = practice.folder / "kits" / "hospital"
    good = by_name([key_row(folder)])["private key"]
    assert (good.status, good.seen) == ("ok", f"{folder / 'party.key'}: only this user may read it")
    (folder / "party.key").chmod(0o640)
    bad = by_name([key_row(folder)])["private key"]
    assert bad.status == "problem"
    assert "mode 0640" in bad.seen
    assert bad.do.startswith(f"chmod 600 {folder / 'party.key'}")


def test_a_key_that_is_not_there(practice: Practice):
    row = by_name([key_row(practice.folder)])["private key"]
    assert row.status == "problem"
    assert row.seen.endswith("party.key: No such file or directory")
    assert row.do == "give the folder that the authority issued"


@pytest.mark.parametrize(
    ("network", "more", "held"),
    [
        (f'proxy = "http://doctor:{SECRET}@proxy:1"', "", "proxy"),
        ("", f'[logging]\nmlflow = "https://doctor:{SECRET}@store"\n', "mlflow"),
        (f'proxy = "http://a:{SECRET}@b:1"', f'[logging]\nmlflow = "https://a:{SECRET}@b"\n', "proxy and mlflow"),
    ],
)
def test_a_party_file_with_a_password(practice: Practice, network: str, more: str, held: str):
    path = practice.write("hospital", network, more=more)
    good = by_name([secret_row(practice.file("hospital"))])["party file"]
    assert (good.status, good.seen) == ("ok", f"{path}: only this user may read it")
    path.chmod(0o644)
    bad = by_name([secret_row(practice.file("hospital"))])["party file"]
    assert (bad.status, bad.seen) == ("warning", f"{path}: mode 0644, and it holds a password ({held})")
    assert bad.do.startswith(f"chmod 600 {path}")


def test_a_party_file_without_a_password_may_be_read(practice: Practice):
    practice.write("hospital").chmod(0o644)
    row = by_name([secret_row(practice.file("hospital"))])["party file"]
    assert row.status == "ok"
    assert row.seen.endswith("it holds no password")


@pytest.mark.provokes("E207")
def test_acceptance(practice: Practice):
    file, contract = practice.file("hospital"), practice.contract
    assert "join` will ask" in by_name([acceptance_row(contract, file)])["acceptance"].seen
    agreed = acceptance_row(contract, dataclasses.replace(file, accept=contract.digest()))
    assert (agreed.status, agreed.seen) == ("ok", "the party file accepts this contract")
    other = by_name([acceptance_row(contract, dataclasses.replace(file, accept="0" * 64))])["acceptance"]
    assert (other.status, other.code) == ("problem", "E207")
    assert "accepted another contract" in other.seen
    assert contract.digest() in other.seen
    assert "cutlayer plan" in other.do


# --- certificates ----------------------------------------------------------------------------------------------------


def test_all_is_well(practice: Practice):
    certificate, batch = check(practice)
    assert certificate[:2] == batch[:2] == ("ok", "")
    assert "certificate valid until" in certificate[2]
    assert batch[2] == "one batch through head, loss; samples: train 40, evaluate 20"


def test_a_certificate_that_ends_soon(practice: Practice):
    practice.certify("hospital", days=10)
    status, _, seen, do = check(practice)[0]
    assert status == "warning"
    assert seen.endswith(("9 more days", "10 more days"))
    assert do == "ask the authority of this run for a new certificate"


def test_an_authority_that_ends_soon(practice: Practice):
    create_authority(practice.folder / "old", name="old", days=110, now=LONG_AGO)
    practice.certify("hospital", authority=practice.folder / "old", days=9)
    own, authority, batch = check(practice)
    assert (own[0], authority[0], batch[0]) == ("warning", "warning", "ok")
    assert authority[2].startswith("the authority's certificate valid until ")
    assert "all parties need new certificates" in authority[3]


def mixed(practice: Practice) -> None:
    other = practice.certify("server")
    (practice.folder / "kits/hospital/party.key").write_bytes((other / "party.key").read_bytes())


def foreign(practice: Practice) -> None:
    create_authority(practice.folder / "theirs", name="theirs")
    made = practice.certify("hospital", authority=practice.folder / "theirs")
    (made / "ca.pem").write_bytes((practice.folder / "ca" / "ca.pem").read_bytes())


def anothers(practice: Practice) -> None:
    practice.write("hospital", 'credentials = "kits/server"')


BAD_FILES = {
    "expired": (lambda p: p.certify("hospital", days=2, now=LONG_AGO), "E661", "has expired", "new certificate"),
    "not yet": (
        lambda p: p.certify("hospital", now=soon()),
        "E662",
        "not valid yet",
        "clock",
    ),
    "foreign key": (mixed, "E663", "does not belong", "same folder"),
    "foreign authority": (foreign, "E664", "not signed by this run's authority", "new certificate"),
    "another's": (anothers, "E665", "another party's", "in the name hospital"),
    "missing": (lambda p: (p.folder / "kits/hospital/ca.pem").unlink(), "E666", "ca.pem cannot be read", "Point to"),
    "garbage": (lambda p: p.edit("kits/hospital/party.pem", "x"), "E666", "cannot be read", "as the authority wrote"),
}


@pytest.mark.parametrize("how", BAD_FILES)
def test_certificates_that_cannot_be_used(practice: Practice, how: str):
    """The modules and data are tried all the same."""
    spoil, code, seen, do = BAD_FILES[how]
    spoil(practice)
    bad, batch = check(practice)
    assert bad[:2] == ("problem", code)
    assert seen in bad[2]
    assert do in bad[3]
    assert batch[0] == "ok"


@pytest.mark.parametrize("network", ["", "insecure = true"])
def test_no_certificates(practice: Practice, network: str):
    practice.write("hospital", network)
    status, _, seen, do = check(practice)[0]
    assert (status, seen[:15]) == ("warning", "no certificates")
    assert "`cutlayer pki issue hospital`" in do
    assert do.startswith("for a trial nothing") == bool(network)


# --- builder, modules, data ------------------------------------------------------------------------------------------

FIXED = "table(40, 1), evaluation"
BUILDERS = {
    "no file": ("no.py:hospital", CODE, "E204", "cannot be loaded", "check -v"),
    "no package": ("no_such_package:hospital", CODE, "E204", "No module named 'no_such_package'", "check -v"),
    "no function": ("parties.py:clinic", CODE, "E204", "no function 'clinic'", "check -v"),
    "no import": ("", "import no_such_package\n" + CODE, "E204", "No module named 'no_such_package'", "check -v"),
    "no syntax": ("", CODE + "\nif:", "E204", "SyntaxError", "check -v"),
    "fails": (
        "",
        CODE + "\ndef hospital(name): raise OSError('disk\\n unplugged')",
        "E204",
        "disk unplugged",
        "check -v",
    ),
    "exits": ("", CODE + "\nimport sys\ndef hospital(name): sys.exit(3)", "E204", "SystemExit: 3", "check -v"),
    "no party": ("", CODE + "\ndef hospital(name): return 7", "E204", "the builder gives no Party", "check -v"),
    "another": ("parties.py:server", CODE.replace("Party(name,", "Party('x',"), "E204", "another party", "check -v"),
    "no module": ("", CODE.replace('"head": linear(4, 8), ', ""), "E223", "no module for stage", "modules="),
    "no optimizer": ("", CODE.replace("optimizer=adam, seed=1", "seed=1"), "E221", "no optimizer", "optimizer="),
    "no data": ("", CODE.replace("data=table(40, 1), ", ""), "E252", "no data for train", "data set"),
    "empty data": ("", CODE.replace(FIXED, "table(0, 1), evaluation"), "E252", "no data for train", "data set"),
    "no field": (
        "",
        CODE.replace("y=(x[:, 0] > 0).long()", "z=x[:, 0]"),
        "E253",
        "no usable field 'y'",
        "give this field",
    ),
    "wide data": (
        "",
        CODE.replace("randn(count, 4", "randn(count, 5"),
        "E304",
        "stage 'head' failed in its forward",
        "another size than a layer takes",
    ),
    "nan": ("", CODE.replace("TensorTable(x=x", "TensorTable(x=x / 0 * 0"), "E351", "NaN", ""),
}


@pytest.mark.parametrize("how", BUILDERS)
def test_builders_modules_and_data_that_do_not_fit(practice: Practice, how: str):
    builder, code, number, seen, do = BUILDERS[how]
    practice.edit("parties.py", code)
    practice.write("hospital", builder=builder)
    certificate, bad = check(practice)
    assert certificate[0] == "ok"
    assert bad[:2] == ("problem", number), bad
    assert seen in bad[2]
    assert do in bad[3]


def test_data_that_gives_no_batch(practice: Practice):
    text = (practice.folder / "contract.toml").read_text()
    practice.edit("contract.toml", text.replace("batch_size = 16", "batch_size = 64\ndrop_last = true"))
    bad = check(practice)[1]
    assert bad[:2] == ("problem", "E259")
    assert "not enough" in bad[2] or "enough samples" in bad[2]
    assert "batch_size" in bad[3]


@pytest.mark.provokes("E268")
def test_a_data_set_that_fails_at_a_sample(practice: Practice):
    lazy = (
        "\nclass Scans:\n    def __len__(self): return 40\n"
        "    def __getitem__(self, index): raise FileNotFoundError(2, 'No such file', f'scan-{index}.nii')\n"
        "def hospital(name):\n"
        "    return Party(name, modules={'head': linear(4, 8), 'loss': nn.functional.cross_entropy}, data=Scans(),"
        " optimizer=adam, seed=1)\n"
    )
    practice.edit("parties.py", CODE + lazy)
    bad = check(practice)[1]
    assert bad[:2] == ("problem", "E268")
    assert bad[2].startswith("the data set failed at a sample (got FileNotFoundError: [Errno 2] No such file: 'scan-")
    assert "data[index]" in bad[3]


def test_a_party_that_is_not_of_the_plan(practice: Practice):
    issue(practice.folder / "ca", "clinic", practice.folder / "kits")
    practice.write("clinic", builder="parties.py:hospital")
    assert [row[1] for row in check(practice, "clinic")] == ["E205", "E205"]
