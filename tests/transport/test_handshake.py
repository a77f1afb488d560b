"""Errors on their way to other parties: class and code arrive, values do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cutlayer.errors import (
    CertificateError,
    CheckpointError,
    CutlayerError,
    HandshakeError,
    LinkError,
    PeerError,
    ProgramError,
    StageError,
)
from cutlayer.transport import control
from cutlayer.transport.control import Abort
from cutlayer.transport.handshake import abort_of, check_hello, error_of, tidy, typed
from cutlayer.transport.settings import NetworkSettings
from tests.transport.parties import Cast

HERE = NetworkSettings(
    party="lab",
    parties=("lab", "server", "clinic"),
    coordinator="server",
    addresses={"server": "127.0.0.1:7"},
    run="r",
    digest="d",
)


def came(abort: Any, via: str) -> CutlayerError:
    return error_of(abort, via, HERE)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (HandshakeError("differ", code="E642", remedy="do"), HandshakeError, "E642"),
        (CertificateError("old", code="E661", remedy="do"), CertificateError, "E661"),
        (PeerError("lab was lost", code="E701", remedy="do"), PeerError, "E701"),
        (StageError("a stage failed", code="E301", remedy="do"), PeerError, "E703"),
        (CheckpointError("damaged", remedy="do"), PeerError, "E703"),
    ],
)
def test_an_error_arrives_with_its_code_and_remedy(error: CutlayerError, kind: type[CutlayerError], code: str):
    arrived = came(control.decode(control.ABORT, control.encode(abort_of(error, "clinic"))), "server")
    assert type(arrived) is kind
    assert arrived.code == code
    assert error.what in arrived.what
    assert arrived.remedy == ("at clinic: do" if code == "E703" else "do")
    if code == "E703":
        assert error.code in arrived.got
        assert "clinic" in arrived.what


def test_values_stay_at_home():
    error = StageError("a stage failed", where="/home/x/data.csv", expected="1", got="secret 42")
    assert "secret" not in repr(abort_of(error, "clinic"))
    assert "home" not in repr(abort_of(error, "clinic"))
    assert "secret" not in repr(abort_of(ValueError("secret"), "clinic"))


def test_a_party_that_was_stopped_with_ctrl_c_is_no_python_word_and_a_training_is_resumed():
    told = control.decode(control.ABORT, control.encode(abort_of(KeyboardInterrupt(), "clinic")))
    error = came(told, "server")
    assert (type(error), error.code, error.what) == (PeerError, "E704", "clinic stopped: Ctrl-C")
    assert error.remedy == "look at clinic's terminal; then start all parties with resume"


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        ("at most 2 sessions", "one more"),
        ("at most 40 samples in 60 s", ""),
        ("", "the names clinic, got wrong"),
        ("valid at 09:00:00 UTC", "valid until 08:00:00 UTC"),
        ("", ""),
    ],
)
@pytest.mark.parametrize(
    ("kind", "code"), [(LinkError, "E613"), (LinkError, "E614"), (HandshakeError, "E642"), (CertificateError, "E661")]
)
def test_what_was_expected_and_got_arrives(kind: type[CutlayerError], code: str, expected: str, got: str):
    """Also through a third party, which passes the error on as it came."""
    error = kind("'anna' asks for more: so it is", expected=expected, got=got, remedy="do", code=code)
    for via in ("server", "office"):
        told = control.decode(control.ABORT, control.encode(abort_of(error, "clinic")))
        assert isinstance(told, Abort)
        error = came(told, via)
        assert (error.what, error.expected, error.got) == ("'anna' asks for more: so it is", expected, got)
        assert error.lines()[2] == f"  why:   {error.why() or 'see above'}"


@pytest.mark.parametrize(("kind", "code"), [(HandshakeError, "E646"), (PeerError, "E701"), (PeerError, "E702")])
def test_why_a_party_reaches_nobody_stays_at_home(kind: type[CutlayerError], code: str):
    """It may be text of gRPC, with addresses within the site and the name of its proxy."""
    got = "unavailable: ipv4:10.1.2.3:3128: proxy.ward.example refused"
    error = kind("server did not come", where="at 10.1.2.3", expected="all of 2", got=got, remedy="start it", code=code)
    for via in ("lab", "office"):
        told = control.decode(control.ABORT, control.encode(abort_of(error, "lab")))
        assert isinstance(told, Abort)
        assert "10.1.2.3" not in repr(told)
        assert "proxy" not in repr(told)
        error = came(told, via)
        assert (error.what, error.expected, error.got) == ("server did not come", "all of 2", "")
        assert error.remedy == "start it"


def test_a_release_that_sends_each_frame_alone_is_refused(cast: Cast):
    """Protocol 1 would fail in the middle of a run, at the first message of several frames."""
    digest = cast.settings("server").digest
    older = control.LinkHello(1, "0.1.0", "clinic", digest, "test", 7, 0, 1)
    with pytest.raises(HandshakeError, match=r"expected protocol 2 .*, got protocol 1 ") as caught:
        check_hello(older, cast.settings("server"), None)
    assert (caught.value.code, caught.value.where) == ("E641", "party server, link with clinic")


@pytest.mark.parametrize("kind", [LinkError, HandshakeError, CertificateError, PeerError])
def test_values_in_an_error_of_ones_own_stay_at_home(kind: type[CutlayerError]):
    """Code outside raises the classes too; what it gives no number of ours is not known to hold no data."""
    error = kind("the check failed", where="row 7", expected="secret 41", got="secret 42", remedy="ask")
    told = abort_of(error, "clinic")
    assert (told.what, told.remedy) == ("the check failed", "ask")


def test_what_to_do_about_anothers_failure_is_said_of_its_place():
    """Not of the place where it is read: this disk is not the one that is full."""
    full = CheckpointError("a checkpoint cannot be written", remedy="free space on the disk and resume", code="E801")
    arrived = came(abort_of(full, "clinic"), "server")
    assert (arrived.code, arrived.remedy) == ("E703", "at clinic: free space on the disk and resume")
    assert came(Abort("clinic", "E801", "no", ""), "server").remedy == "look at clinic's terminal"


def test_texts_of_others_are_fit_for_a_terminal():
    arrived = came(Abort("clinic", "E999", "\x1b[2Jgone\nnext", "\x07"), "server")
    assert all(sign.isprintable() for sign in str(arrived))
    assert len(tidy("x" * 10_000)) == control.TEXT_MAX
    refused = came(Abort("clinic", "E614", "no: expected \x1b[2Jmore, got " + "x" * 10_000, "\x07"), "server")
    assert all(sign.isprintable() for sign in str(refused))
    assert len(refused.what + refused.expected + refused.got) < control.TEXT_MAX


def test_a_long_error_still_fits_into_a_message():
    error = StageError("x" * 5000, remedy="y" * 5000)
    assert control.decode(control.ABORT, control.encode(abort_of(error, "clinic"))) == abort_of(error, "clinic")


@pytest.mark.provokes("E645")
def test_a_party_that_is_not_of_the_plan_is_refused(cast: Cast):
    stranger = control.LinkHello(control.PROTOCOL, "1", "nobody", "f" * 64, "test", 7, 0, 1)
    with pytest.raises(HandshakeError, match=r"not of this plan.*got nobody. compare the party's name") as caught:
        check_hello(stranger, cast.settings("server"), None)
    assert caught.value.code == "E645"


@pytest.mark.provokes("E605")
def test_no_memory_for_a_frame_is_said_as_such():
    error = typed(MemoryError(), "party server, link with clinic")
    assert (type(error), error.code) == (LinkError, "E605")
    assert str(error).startswith("[E605] this party has no memory for a frame (party server, link with clinic)")
    assert error.remedy == "end what else uses memory, or use smaller microbatches"


@pytest.mark.provokes("E434")
def test_what_no_check_foresaw_is_said_by_its_kind():
    error = typed(RuntimeError("can't start\nnew thread"), "party server")
    assert (type(error), error.code) == (ProgramError, "E434")
    assert error.why() == "got RuntimeError: can't start?new thread"
    assert "report it" in error.remedy


@pytest.mark.parametrize("error", [PeerError("no", remedy="r", code="E702"), LinkError("no", remedy="r", code="E614")])
def test_what_another_reported_is_handed_on_as_its_own(cast: Cast, error: CutlayerError):
    """Along a chain each party tells the one before it: where it began stays known."""
    settings = replace(cast.settings("beta"), behind=frozenset({"cloud", "hub"}))
    first = error_of(abort_of(error, "cloud"), "cloud", settings)
    second = error_of(abort_of(first, "hub"), "hub", settings)
    assert (first.where, second.where) == ("reported by cloud", "reported by cloud, told by hub")
    assert (second.code, second.what) == (error.code, "no")


def test_a_failure_that_another_told_keeps_its_place(cast: Cast):
    settings = replace(cast.settings("beta"), behind=frozenset({"cloud", "hub"}))
    first = error_of(abort_of(ProgramError("no", remedy="r", code="E450"), "cloud"), "cloud", settings)
    second = error_of(abort_of(first, "hub"), "hub", settings)
    assert (second.code, second.what, second.got) == ("E703", "cloud failed: no", "E450 at cloud")
