"""The sealed link: two parties through a relay that reads, changes, replays, reorders and reflects what it carries."""

import dataclasses
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import numpy as np
import pytest
import trustme

from cutlayer.errors import CertificateError, ConfigError, ContractError, ProgramError, WireError
from cutlayer.transport import seal as seal_module
from cutlayer.transport.seal import OFFER_LIMIT, OVERHEAD, Seal
from cutlayer.transport.tls import Credentials
from tests.transport.conftest import CONTEXT, NOW, leaf_der


def test_messages_go_both_ways(pair: tuple[Seal, Seal]):
    a, b = pair
    for number in range(3):
        plain = bytes([number]) * number
        assert b.open(a.seal(plain, b"head"), b"head") == plain
        assert a.open(b.seal(plain * 2, b""), b"") == plain * 2


def test_ready_only_after_the_peers_offer(parties):
    a, b = Seal(parties["a"], "b", CONTEXT), Seal(parties["b"], "a", CONTEXT)
    assert (a.ready, b.ready) == (False, False)
    a.accept(b.offer(), now=NOW)
    assert (a.ready, b.ready) == (True, False)


def test_the_offer_is_small_and_stays_the_same(parties):
    a = Seal(parties["a"], "b", CONTEXT)
    assert a.offer() == a.offer()
    assert len(a.offer()) < 1024 < OFFER_LIMIT
    assert leaf_der(parties["a"]) in a.offer()


def test_overhead_is_what_is_documented(pair: tuple[Seal, Seal]):
    for size in (0, 1, 1000):
        assert len(pair[0].seal(b"x" * size, b"")) == size + OVERHEAD


def test_neither_plain_nor_keys_show(pair: tuple[Seal, Seal], parties):
    canary = b"the diagnosis of patient 7"
    first, second = pair[0].seal(canary, b""), pair[0].seal(canary, b"")
    assert canary not in first + second
    assert first[8:] != second[8:]
    assert "PRIVATE" not in repr(pair[0])
    assert repr(pair[0]._keys).count("0x") == 2  # addresses only


def test_two_sessions_share_no_key(parties):
    offers = {Seal(parties["a"], "b", CONTEXT).offer() for _ in range(3)}
    assert len(offers) == 3


def test_views_of_any_type_are_sealed(pair: tuple[Seal, Seal]):
    a, b = pair
    numbers = np.arange(6, dtype="f4").reshape(2, 3)
    assert b.open(memoryview(a.seal(memoryview(numbers), b"")), b"") == numbers.tobytes()
    assert b.open(a.seal(memoryview(numbers[:0]), b""), b"") == b""


def test_a_long_chain_of_another_authority_works():
    root = trustme.CA()
    middle = root.create_child_ca()
    made = {}
    for party in "ab":
        leaf = middle.issue_cert(party)
        chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
        assert chain.count(b"BEGIN CERTIFICATE") == 2
        key = leaf.private_key_pem.bytes()
        made[party] = Credentials(party=party, certificate=chain, private_key=key, authority=root.cert_pem.bytes())
    a, b = Seal(made["a"], "b", CONTEXT), Seal(made["b"], "a", CONTEXT)
    now = datetime.now(UTC)
    a.accept(b.offer(), now=now)
    b.accept(a.offer(), now=now)
    assert b.open(a.seal(b"x", b""), b"") == b"x"


# --- messages that are refused --------------------------------------------------------------------------------------


def test_every_byte_of_a_message_counts(pair: tuple[Seal, Seal]):
    a, b = pair
    sealed = a.seal(b"forty bytes of plain text, give or take a", b"aad")
    for place in range(len(sealed)):
        for bit in (0, 7):
            changed = bytearray(sealed)
            changed[place] ^= 1 << bit
            with pytest.raises((WireError, ContractError)) as caught:
                b.open(bytes(changed), b"aad")
            assert caught.value.code == ("E525" if place < 8 else "E516")
    assert b.open(sealed, b"aad").startswith(b"forty")


@pytest.mark.provokes("E516")
def test_other_associated_data(pair: tuple[Seal, Seal]):
    sealed = pair[0].seal(b"x", b"step 1")
    with pytest.raises(WireError, match=r"E516\] a sealed message cannot be opened \(party b, sealed link with a\)"):
        pair[1].open(sealed, b"step 2")
    assert pair[1].open(sealed, b"step 1") == b"x"


@pytest.mark.parametrize("size", [0, 7, 23])
def test_a_message_that_is_too_short(pair: tuple[Seal, Seal], size: int):
    with pytest.raises(WireError, match=f"E516.*expected 24 to 67108888 bytes, got {size} bytes"):
        pair[1].open(pair[0].seal(b"", b"")[:size], b"")


@pytest.mark.provokes("E234")
def test_a_message_that_is_too_long(pair: tuple[Seal, Seal], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(seal_module, "MESSAGE_LIMIT", 10)
    pair[1].open(pair[0].seal(bytes(10), b""), b"")
    with pytest.raises(ConfigError, match=r"E234\] a message is too long.*at most 10 bytes, got 11 bytes"):
        pair[0].seal(bytes(11), b"")
    with pytest.raises(WireError, match=r"expected 24 to 34 bytes, got 35 bytes"):
        pair[1].open(bytes(35), b"")


@pytest.mark.provokes("E525")
def test_replay(pair: tuple[Seal, Seal]):
    a, b = pair
    sealed = a.seal(b"x", b"")
    b.open(sealed, b"")
    with pytest.raises(ContractError, match=r"E525\] a sealed message came twice.*message 1 of a, got message 0"):
        b.open(sealed, b"")
    assert b.open(a.seal(b"next", b""), b"") == b"next"


def test_reordering_and_loss(pair: tuple[Seal, Seal]):
    a, b = pair
    first, second = a.seal(b"1", b""), a.seal(b"2", b"")
    with pytest.raises(ContractError, match=r"E525\] a sealed message is missing.*message 0 of a, got message 1"):
        b.open(second, b"")
    assert [b.open(first, b""), b.open(second, b"")] == [b"1", b"2"]


def test_a_message_of_another_session_does_not_open(parties, pair: tuple[Seal, Seal]):
    a, b = Seal(parties["a"], "b", b"other"), Seal(parties["b"], "a", b"other")
    a.accept(b.offer(), now=NOW)
    b.accept(a.offer(), now=NOW)
    with pytest.raises(WireError, match="E516"):
        pair[1].open(a.seal(b"x", b""), b"")


@pytest.mark.provokes("E420", "E528")
def test_before_the_offer(parties):
    a = Seal(parties["a"], "b", CONTEXT)
    with pytest.raises(ProgramError, match=r"E420\] a message was to be sealed before"):
        a.seal(b"x", b"")
    with pytest.raises(ContractError, match=r"E528\] a sealed message came before the peer's offer"):
        a.open(bytes(30), b"")


@pytest.fixture
def slow_nonce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let other threads run between the look at a counter and its use."""
    real = seal_module._nonce

    def slow(head: bytes) -> bytes:
        time.sleep(0.005)
        return real(head)

    monkeypatch.setattr(seal_module, "_nonce", slow)


@pytest.mark.usefixtures("slow_nonce")
def test_threads_never_share_a_counter(pair: tuple[Seal, Seal]):
    a, b = pair
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: a.seal(b"x", b""), range(20)))
    made.sort(key=lambda sealed: struct.unpack_from("<Q", sealed)[0])
    assert [struct.unpack_from("<Q", sealed)[0] for sealed in made] == list(range(20))
    assert [b.open(sealed, b"") for sealed in made] == [b"x"] * 20


@pytest.mark.usefixtures("slow_nonce")
def test_threads_open_a_message_once(pair: tuple[Seal, Seal]):
    a, b = pair
    sealed = a.seal(b"x", b"")

    together = threading.Barrier(4)

    def attempt(_) -> bool:
        together.wait(20)
        try:
            return b.open(sealed, b"") == b"x"
        except ContractError:
            return False

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(attempt, range(4))) == 1


# --- a seal that cannot be made -------------------------------------------------------------------------------------


def test_a_seal_with_oneself_or_without_context(parties):
    with pytest.raises(ConfigError, match=r"E234.*the party itself"):
        Seal(parties["a"], "a", CONTEXT)
    with pytest.raises(ConfigError, match=r"E234.*an empty context"):
        Seal(parties["a"], "b", b"")


def test_credentials_that_cannot_sign(parties):
    with pytest.raises(CertificateError, match="E663"):
        Seal(dataclasses.replace(parties["a"], private_key=parties["b"].private_key), "b", CONTEXT)
    with pytest.raises(CertificateError, match="E666"):
        Seal(dataclasses.replace(parties["a"], authority=b""), "b", CONTEXT)


def test_a_chain_that_is_too_long(parties):
    leaf = parties["a"].certificate
    with pytest.raises(CertificateError, match=r"E669.*chain is too long.*at most 4 certificates"):
        Seal(dataclasses.replace(parties["a"], certificate=leaf.replace(parties["a"].authority, b"") * 5), "b", CONTEXT)
