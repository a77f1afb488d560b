"""Rows held out by identifier: nobody on both sides, and the same at every party, in any order."""

from __future__ import annotations

import datetime
import hashlib
import uuid

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.data.holdout import holdout
from cutlayer.errors import DataError

PEOPLE = [f"person-{number}" for number in range(2000)]


def test_all_rows_of_a_person_are_on_one_side():
    groups = torch.arange(300).repeat(4)
    split = holdout(groups)
    train, test = set(groups[split.train].tolist()), set(groups[split.test].tolist())
    assert not train & test
    assert train | test == set(range(300))
    assert sorted([*split.train.tolist(), *split.test.tolist()]) == list(range(1200))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_the_share_is_kept_on_average(share):
    assert len(holdout(PEOPLE, share=share).test) / len(PEOPLE) == pytest.approx(share, abs=0.03)


def test_a_side_is_that_of_the_documented_hash():
    split = holdout(PEOPLE, share=0.3, seed=9)
    for place, name in enumerate(PEOPLE[:50]):
        digest = hashlib.sha256(f"cutlayer:holdout:9:{name}".encode()).hexdigest()
        assert (place in split.test.tolist()) == (int(digest[:16], 16) / 2**64 < 0.3)


@given(st.permutations(range(40)))
def test_the_order_of_rows_moves_nobody(order):
    """Two parties of a vertical plan that hold the same people find the same split."""
    held = {order[place] for place in holdout(order, share=0.4).test.tolist()}
    assert held == set(holdout(range(40), share=0.4).test.tolist())


def test_rows_that_come_later_move_no_other():
    before, after = holdout(PEOPLE[:500]), holdout(PEOPLE)
    assert before.test.tolist() == [place for place in after.test.tolist() if place < 500]


def test_texts_and_integers_of_a_tensor_are_the_same_names():
    assert holdout(torch.arange(99)).test.tolist() == holdout([str(number) for number in range(99)]).test.tolist()


def test_another_seed_is_another_split():
    assert holdout(PEOPLE, seed=1).test.tolist() != holdout(PEOPLE).test.tolist()


@pytest.mark.provokes("E263")
@pytest.mark.parametrize(("groups", "share"), [(["one person"] * 5, 0.5), (PEOPLE, 0.0), (PEOPLE, 1.0), ([], 0.2)])
def test_an_empty_side_is_refused(groups, share):
    with pytest.raises(DataError, match="a split leaves one side empty") as caught:
        holdout(groups, share=share)
    assert caught.value.code == "E263"
    assert f"share={share}" in caught.value.got
    assert "person-1" not in str(caught.value)


@pytest.mark.parametrize("kind", [np.int32, np.uint8, str, np.str_])
def test_identifiers_of_any_whole_or_text_type_are_the_same_names(kind: type):
    assert holdout(kind(number) for number in range(99)).test.tolist() == holdout(torch.arange(99)).test.tolist()


def test_whole_numbers_may_be_tensors_and_arrays_of_one():
    wanted = holdout(range(99)).test.tolist()
    assert holdout(list(torch.arange(99))).test.tolist() == wanted
    assert holdout([np.array(number) for number in range(99)]).test.tolist() == wanted


@pytest.mark.provokes("E263")
@pytest.mark.parametrize("one", [torch.tensor(3), np.array(3)], ids=["tensor", "array"])
def test_a_single_number_is_one_group(one: object):
    with pytest.raises(DataError, match=r"E263.*from 1 groups"):
        holdout(one)


ROWS = list(range(98))


@pytest.mark.provokes("E254")
@pytest.mark.parametrize(
    ("groups", "got", "remedy"),
    [
        (torch.arange(99).float(), "99 others, the first at row 0: float", "with a gap"),
        (np.arange(99).astype(float), "99 others, the first at row 0: float64", "with a gap"),
        (np.arange(99).astype(np.float32), "99 others, the first at row 0: float32", "with a gap"),
        ([*ROWS, 4711.0], "1 other, at row 98: float", "with a gap"),
        ([*ROWS, float("nan")], "1 other, at row 98: float", "with a gap"),
        ([*ROWS, None], "1 other, at row 98: NoneType", "leave these rows out"),
        ([*ROWS, uuid.UUID(int=4711)], "1 other, at row 98: UUID", "str(one) of a UUID or a date"),
        ([*ROWS, datetime.date(4711, 1, 1)], "1 other, at row 98: date", "str(one) of a UUID or a date"),
        ([*ROWS, b"4711"], "1 other, at row 98: bytes", "one.decode() of bytes"),
        ([*ROWS, torch.ones(2)], "1 other, at row 98: Tensor", "give whole numbers or texts"),
        ([True, *ROWS, False], "2 others, the first at row 0: bool", "leave these rows out"),
        ([*ROWS, "4711 "], "1 text with spaces around it, at row 98", "strip()"),
        (["\t4711", *ROWS, "4712\n"], "2 texts with spaces around them, the first at row 0", "strip()"),
        ([*ROWS, "", ""], "2 texts that say that none is there, the first at row 98", "leave the rows"),
        ([*ROWS, "nan"], "1 text that says that none is there, at row 98", "leave the rows"),
        ([*ROWS, "4711.0"], "1 text of a decimal number, at row 98", "astype('int64')"),
        (["\ufeff4711", *ROWS], "1 text with signs of no width, at row 0", "utf-8-sig"),
        ("4711 4712", "a str", "one identifier a row"),
        ({"4711", "4712"}, "a set", "one identifier a row"),
    ],
)
def test_what_would_name_one_person_in_two_ways_is_refused(groups, got: str, remedy: str):
    """Of a column with a gap pandas makes floats: "1.0" is on another side than "1", with no other sign of it.

    A set has another order in each process, and the letters of a text are no people.
    """
    with pytest.raises(DataError, match="identifiers cannot be compared") as caught:
        holdout(groups)
    error = caught.value
    assert (error.code, error.got) == ("E254", got)
    assert remedy in error.remedy
    assert "4711" not in str(error)
