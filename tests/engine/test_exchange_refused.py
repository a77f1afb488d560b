"""Exchanges by hand: what a member says is heard, and what does not fit is refused."""

from __future__ import annotations

import struct

import pytest
import torch

from cutlayer.core.program import Exchange
from cutlayer.engine.exchange import EXCHANGES, Hear, Say
from cutlayer.engine.tensors import pack
from cutlayer.errors import ContractError


class Shelf:
    """A party that keeps what an exchange gives it."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors, self.norm, self.clipped = tensors, 1.0, 0.0
        self.gathered = {}

    def state(self, stage, lane):
        return self.tensors

    def load_state(self, stage, lane, state, where):
        self.tensors = dict(state)

    gradients = metric_sums = weights = state
    gathered: dict
    set_gradients = set_metric_sums = load_state

    @property
    def preprocess(self):
        return self

    def summary(self, name):
        return b"own"

    def merge(self, name, told):
        return b"".join(message for _, message in told)

    def take(self, name, total, source):
        self.agreed = total

    def squared_norm(self, lanes):
        return self.norm

    def clip(self, squared_norm, lanes):
        self.clipped = squared_norm


def job(name: str, *group: str, stage: str = "head") -> Exchange:
    return Exchange(name, 0, group, stage, tuple(range(len(group))), 1000, messages=len(group), hub=group[0])


def hears(name: str, payload: bytes, local: Shelf) -> None:
    """Let the first party of an exchange hear one message of the second."""
    talk = EXCHANGES[name](job(name, "a", "b"), "b" if name in ("hand_on", "broadcast") else "a", local)
    assert isinstance(next(talk), Hear)
    try:
        while not isinstance(talk.send(payload), Hear):
            payload = None
    except StopIteration:
        return


@pytest.mark.parametrize("name", ["hand_on", "broadcast", "add_gradients", "add_metrics"])
@pytest.mark.parametrize(
    "payload", [b"", b"x", struct.pack("<Q", 2**60) + b"{}", pack({"w": torch.ones(3)})[:-1]], ids=range(4)
)
def test_a_message_that_is_no_tensors_is_refused(name, payload):
    with pytest.raises(ContractError) as caught:
        hears(name, payload, Shelf())
    assert caught.value.code == "E523"
    hears(name, pack({"w": torch.ones(3)}), Shelf())


@pytest.mark.provokes("E524")
@pytest.mark.parametrize("name", ["add_gradients", "add_metrics"])
@pytest.mark.parametrize("other", [torch.ones(4), torch.ones(3, dtype=torch.float64)], ids=["shape", "dtype"])
def test_only_like_tensors_are_added(name, other):
    with pytest.raises(ContractError, match=r"different shapes|do not fit") as caught:
        hears(name, pack({"w": other}), Shelf(w=torch.ones(3)))
    assert caught.value.code == "E524"
    local = Shelf(w=torch.ones(3))
    hears(name, pack({"w": torch.ones(3)}), local)
    assert torch.equal(local.tensors["w"], torch.full((3,), 2.0))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
def test_a_norm_must_be_a_number(number):
    with pytest.raises(ContractError) as caught:
        hears("global_norm", struct.pack("<d", number), Shelf())
    assert caught.value.code == "E523"


@pytest.mark.provokes("E523")
@pytest.mark.parametrize("payload", [b"", b"1234567", b"123456789"])
def test_a_norm_has_eight_bytes(payload):
    with pytest.raises(ContractError, match=r"a number was expected.*from b.*expected 8 bytes") as caught:
        hears("global_norm", payload, Shelf())
    assert caught.value.code == "E523"
    local = Shelf()
    hears("global_norm", struct.pack("<d", 4.0), local)
    assert local.clipped == 5.0


def test_exchanges_say_nothing_to_parties_outside_the_group():
    """Each exchange, run among its members by hand, ends; and every message is heard by a member."""
    for name in EXCHANGES:
        group = ("a", "b") if name in ("gather", "hand_on") else ("a", "b", "c")
        talks = {party: EXCHANGES[name](job(name, *group), party, Shelf(w=torch.ones(2))) for party in group}
        mail: dict[tuple[str, str], list[bytes]] = {}
        waits: dict[str, str] = dict.fromkeys(group, "")
        while talks:
            for party in list(talks):
                answer = None
                if waits[party]:
                    if not mail.get((waits[party], party)):
                        continue
                    answer = mail[waits[party], party].pop(0)
                try:
                    word = talks[party].send(answer)
                except StopIteration:
                    del talks[party]
                    continue
                waits[party] = word.source if isinstance(word, Hear) else ""
                if isinstance(word, Say):
                    assert word.to in group
                    mail.setdefault((party, word.to), []).append(word.payload)
        assert not any(mail.values()), name
