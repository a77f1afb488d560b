"""`cutlayer pki`: make an authority, issue certificates, look at them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cutlayer.cli.console import Output, shown_path
from cutlayer.transport.pki import create_authority, describe, issue

__all__ = ["init", "issue_all", "show"]


def init(folder: Path, name: str, days: int, output: Output) -> None:
    """Make an authority in `folder`. Raises as `transport.pki.create_authority`."""
    create_authority(folder, name=name, days=days)
    document = _document(folder / "ca.pem")
    output.say(f"authority {name}, valid until {document['not_after'][:10]}")
    output.say(f"keep {folder / 'ca.key'} here and safe: whoever has it can be any party")
    output.document({"authority": str(folder), **document})
    output.last(f"authority: {shown_path(folder)}")


def issue_all(parties: Sequence[str], authority: Path, out: Path, days: int, output: Output) -> None:
    """Issue each party its folder `out/<party>`. Raises as `transport.pki.issue`; those issued before stay."""
    issued = []
    for party in parties:
        folder = issue(authority, party, out, days=days)
        document = _document(folder / "party.pem")
        issued.append({"party": party, "folder": str(folder), **document})
        output.say(f"{party}: valid until {document['not_after'][:10]}, SHA-256 {document['fingerprint'][:16]}")
    output.document({"issued": issued})
    output.last(f"credentials: {shown_path(out)}")


def show(path: Path, output: Output) -> None:
    """Print what a certificate says; of a folder, its `party.pem`, or else its `ca.pem`."""
    if path.is_dir():
        path = path / "party.pem" if (path / "party.pem").exists() else path / "ca.pem"
    document = _document(path)
    end = datetime.fromisoformat(document["not_after"])
    days = (end - datetime.now(UTC)).days
    output.say(f"subject     {document['subject']}")
    output.say(f"names       {', '.join(document['names']) or 'none: an authority'}")
    output.say(f"issuer      {document['issuer']}")
    output.say(f"valid from  {document['not_before']}")
    output.say(f"valid until {document['not_after']} ({f'{days} more days' if days >= 0 else 'expired'})")
    output.document({**document, "days_left": days})
    output.last(f"SHA-256     {document['fingerprint']}")


def _document(path: Path) -> dict[str, Any]:
    info = describe(path)
    return {
        "subject": info.subject,
        "names": list(info.names),
        "issuer": info.issuer,
        "not_before": info.not_before.isoformat(),
        "not_after": info.not_after.isoformat(),
        "fingerprint": info.fingerprint,
    }
