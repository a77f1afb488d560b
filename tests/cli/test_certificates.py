"""`cutlayer pki`: certificates that the transport accepts."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cutlayer.transport.tls import check_credentials, load_credentials

Call = Callable[..., Any]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_authority_to_usable_credentials(call: Call, here: Path):
    made = call("pki", "init", "ca", "--name", "heart-study", "--days", "100")
    assert (made.code, made.out[-1]) == (0, "authority: ca/")
    issued = call("pki", "issue", "hospital", "server", "--days", "50")
    assert (issued.code, issued.out[-1]) == (0, "credentials: credentials/")
    for party in ("hospital", "server"):
        check_credentials(load_credentials(here / "credentials" / party, party), now=datetime.now(UTC))
    shown = call("pki", "show", "credentials/hospital")
    assert shown.code == 0
    assert shown.out[1:3] == ["names       hospital", "issuer      CN=heart-study"]
    assert "49 more days" in shown.out[4]
    assert shown.out[-1].startswith("SHA-256     ")


def test_json(call: Call, here: Path):
    authority = call("pki", "init", "ca", "--json").json()
    issued = call("pki", "issue", "a", "b", "--json").json()["issued"]
    shown = call("pki", "show", "credentials/b", "--json").json()
    assert [row["party"] for row in issued] == ["a", "b"]
    assert shown["fingerprint"] == issued[1]["fingerprint"] != authority["fingerprint"]
    assert shown["names"] == ["b"]
    assert shown["issuer"] == authority["subject"]
    assert shown["days_left"] == 396
    assert call("pki", "show", "ca", "--json").json()["fingerprint"] == authority["fingerprint"]


def test_nothing_is_overwritten(call: Call, here: Path):
    call("pki", "init", "ca")
    call("pki", "issue", "a")
    key = (here / "credentials" / "a" / "party.key").read_bytes()
    again, authority = call("pki", "issue", "a"), call("pki", "init", "ca")
    assert (again.code, again.err[0][:4], authority.code, authority.err[0][:4]) == (2, "E231", 2, "E231")
    assert (here / "credentials" / "a" / "party.key").read_bytes() == key


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("pki", "issue", "a", "--authority", "none"), "E232"),
        (("pki", "show", "none"), "E232"),
        (("pki", "init", "ca", "--name", ""), "E230"),
    ],
)
def test_errors(call: Call, here: Path, words: tuple[str, ...], code: str):
    result = call(*words)
    assert (result.code, result.err[0][:4], len(result.err)) == (2, code, 4)
    assert ("`cutlayer pki init FOLDER`" in result.err[3]) == (code == "E232")
    assert "create_authority" not in "".join(result.err)
