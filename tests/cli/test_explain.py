"""`cutlayer explain`: all codes, one code, and a code that does not exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cutlayer.cli.catalogue import catalogue

Call = Callable[..., Any]


def test_without_a_code_all_are_listed(call: Call):
    shown = call("explain").out
    assert [line.split()[0] for line in shown[:-1]] == list(catalogue())
    assert shown[-1].startswith(f"{len(catalogue())} codes")
    codes = call("explain", "--json").json()["codes"]
    assert [one["code"] for one in codes] == list(catalogue())
    assert all(one["class"] == catalogue()[one["code"]].kind for one in codes)


@pytest.mark.parametrize("word", ["E351", "e351", "351", "[E351]:"])
def test_one_code_in_full(call: Call, word: str):
    result, entry = call("explain", word), catalogue()["E351"]
    assert result.code == 0
    shown = " ".join(" ".join(result.out).split())
    assert shown.startswith(f"E351 {entry.title} {entry.kind}, exit code 3")
    for point in (entry.what, *entry.causes, *entry.do, *entry.who):
        assert " ".join(point.split()) in shown
    assert result.out[-1] == f"who can do it: {', '.join(entry.who)}"


def test_quiet_says_what_it_means_and_what_to_do(call: Call):
    result, entry = call("explain", "351", "-q"), catalogue()["E351"]
    shown = " ".join(" ".join(result.out).split())
    assert shown.startswith(f"E351 {entry.title} {entry.what[:40]}")
    assert all(" ".join(point.split()) in shown for point in (entry.what, *entry.do, *entry.who))
    assert not [point for point in entry.causes if " ".join(point.split()) in shown]


@pytest.mark.parametrize("code", catalogue())
def test_every_code_can_be_explained_as_a_document(call: Call, code: str):
    document = call("explain", code, "--json").json()
    assert (document["code"], document["class"]) == (code, catalogue()[code].kind)
    assert len(document["example"]) == 4
    assert document["exit_code"] in (*range(1, 7), 130)


@pytest.mark.provokes("E209")
@pytest.mark.parametrize(("word", "near"), [("E999", "E812"), ("E102x", "E102"), ("nonsense", "E000")])
def test_a_code_that_does_not_exist_names_the_nearest(call: Call, word: str, near: str):
    result = call("explain", word)
    assert result.code == 2
    assert result.err[0] == f"E209 there is no error code {word!r}"
    assert result.err[1] == "  where: the code after `cutlayer explain`"
    assert near in result.err[2]
    assert "cutlayer explain" in result.err[3]
