"""Control messages: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.engine.wire import CONTROL_MAX, KIND_DATA
from cutlayer.errors import WireError
from cutlayer.transport import control
from cutlayer.transport.control import KINDS, Message, decode, encode, kind_of

COUNTS = st.integers(0, 2**63 - 1)
IDENTITIES = st.integers(1, 2**63 - 1)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=100)
PER_PARTY = st.dictionaries(NAMES, COUNTS, max_size=4)
MESSAGES: dict[int, st.SearchStrategy[Message]] = {
    control.LINK_HELLO: st.builds(
        control.LinkHello, COUNTS, NAMES, NAMES, NAMES, NAMES, IDENTITIES, COUNTS, IDENTITIES
    ),
    control.ACK: st.builds(control.Ack, COUNTS),
    control.HEARTBEAT: st.builds(control.Heartbeat),
    control.LEAVE: st.builds(control.Leave),
    control.RELAY: st.builds(control.Relay, COUNTS, NAMES, NAMES, st.booleans(), COUNTS),
    control.SEAL_OFFER: st.builds(control.SealOffer, COUNTS, NAMES, NAMES),
    control.READY: st.builds(control.Ready, COUNTS, PER_PARTY, st.lists(COUNTS, max_size=5).map(tuple)),
    control.START: st.builds(
        control.Start,
        IDENTITIES,
        st.dictionaries(NAMES, PER_PARTY, max_size=4),
        st.integers(-1, 2**63 - 1),
        st.dictionaries(NAMES, IDENTITIES, max_size=4),
    ),
    control.RESET: st.builds(control.Reset, COUNTS, NAMES),
    control.NOTICE: st.builds(
        control.Notice,
        st.sampled_from(["lost", "returned", "waiting", "resting"]),
        st.lists(NAMES, max_size=4).map(tuple),
    ),
    control.ABORT: st.builds(control.Abort, NAMES, st.from_regex(r"\AE[0-9]{3}\Z"), TEXTS, TEXTS),
    control.BYE: st.builds(control.Bye, COUNTS),
}
ANY = st.one_of(*MESSAGES.values())


def test_every_kind_is_tested():
    assert set(MESSAGES) == set(KINDS)
    assert KIND_DATA not in KINDS
    assert sorted(KINDS) == list(range(2, 14))


@given(ANY)
def test_messages_survive_the_wire(message: Message):
    assert decode(kind_of(message), encode(message)) == message


@given(ANY, st.sampled_from(sorted(KINDS)))
def test_a_message_in_a_frame_of_another_kind_is_refused(message: Message, kind: int):
    if kind != kind_of(message):
        with pytest.raises(WireError) as caught:
            decode(kind, encode(message))
        assert caught.value.code == "E509"


@pytest.mark.provokes("E509")
def test_what_is_wrong_with_a_message_is_said():
    with pytest.raises(WireError, match=r"E509\] a Ready message cannot be read.*install the same release of cutlayer"):
        decode(control.READY, encode(control.Ready(0, {"train": 9}, (1, 2)))[:-1])


@given(st.integers(0, 255), st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_wire_error(kind: int, data: bytes):
    try:
        message = decode(kind, data)
    except WireError:
        return
    assert kind_of(message) == kind


@given(ANY, st.data())
def test_a_changed_byte_gives_a_message_or_a_wire_error(message: Message, data: st.DataObject):
    raw = bytearray(encode(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        found: int | str = kind_of(decode(kind_of(message), bytes(raw)))
    except WireError as error:
        found = error.code
    assert found in (kind_of(message), "E509")


@given(ANY)
def test_one_field_more_or_less_is_refused(message: Message):
    fields = msgspec.msgpack.decode(encode(message))
    for changed in ([*fields, 0], fields[:-1]):
        with pytest.raises(WireError) as caught:
            decode(kind_of(message), msgspec.msgpack.encode(changed))
        assert caught.value.code == "E509"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (control.ACK, [control.ACK, -1]),
        (control.ACK, [control.ACK, 2**63]),
        (control.ACK, [control.ACK, 1.0]),
        (control.ACK, [control.ACK, True]),
        (control.ACK, [control.ACK, "1"]),
        (control.START, [control.START, 0, {}, -1, {}]),
        (control.START, [control.START, 1, {}, -2, {}]),
        (control.NOTICE, [control.NOTICE, "found", []]),
        (control.NOTICE, [control.NOTICE, "lost", ["x"] * 5000]),
        (control.NOTICE, [control.NOTICE, "lost", [""]]),
        (control.ABORT, [control.ABORT, "a", "E12", "", ""]),
        (control.ABORT, [control.ABORT, "a", "X123", "", ""]),
        (control.ABORT, [control.ABORT, "a", "E123", "x" * 1001, ""]),
        (control.READY, [control.READY, 0, {"a" * 256: 1}, []]),
        (control.READY, [control.READY, 0, {str(mode): 1 for mode in range(17)}, []]),
        (control.READY, [control.READY, 0, {}, list(range(4097))]),
    ],
)
def test_fields_out_of_range_are_refused(kind: int, fields: list[object]):
    with pytest.raises(WireError):
        decode(kind, msgspec.msgpack.encode(fields))


def test_what_is_too_long_is_refused_on_both_sides():
    big = control.Start(1, {"train": {f"party-{number:06}" * 10: 1 for number in range(1000)}}, -1, {})
    with pytest.raises(WireError):
        encode(big)
    with pytest.raises(WireError):
        decode(control.START, b"\x00" * (CONTROL_MAX + 1))


def test_deep_nesting_is_refused():
    for opening in (b"\x91", b"\x81\xa1a"):
        with pytest.raises(WireError):
            decode(control.READY, opening * 20_000)
