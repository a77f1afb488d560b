"""Shared preprocessing: what is told and put together equals numpy on the pooled samples."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.core.parts import Shared
from cutlayer.engine.agree import Agreed, apply, check_told, merge, read, summarise
from cutlayer.errors import ContractError, DataError

SCALE = Shared("age", at="a", least=1)


def agreed_of(shared: Shared, parties: list[list[object]]) -> Agreed:
    """What is agreed on when each party holds these batches."""
    told = [(f"p{n}", summarise(shared, batches, "here").told) for n, batches in enumerate(parties)]
    return read(shared, merge(shared, told), "hub")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0, 0.6))
def test_scale_equals_numpy_on_the_pooled_samples(seed, sizes, gaps):
    generator = np.random.default_rng(seed)
    parties = [generator.normal([1e4, 0.0, -3.0], [1.0, 1e-3, 50.0], (size, 3)) for size in sizes]
    for rows in parties:
        rows[generator.random(rows.shape) < gaps] = np.nan
    pooled = np.concatenate(parties)
    agreed = agreed_of(SCALE, [list(torch.from_numpy(rows).split(7)) for rows in parties])
    counted = (~np.isnan(pooled)).sum(0)
    assert list(agreed.count) == counted.tolist()
    for column in range(3):
        if not counted[column]:
            assert (agreed.mean[column], agreed.deviation[column]) == (0.0, 1.0)
            continue
        assert agreed.mean[column] == pytest.approx(np.nanmean(pooled[:, column]), rel=1e-12, abs=1e-12)
        expected = np.nanstd(pooled[:, column])
        assert agreed.deviation[column] == pytest.approx(expected or 1.0, rel=1e-6, abs=1e-12)
        scaled = apply(SCALE, agreed, torch.from_numpy(pooled), "here")[:, column].numpy()
        here = ~np.isnan(pooled[:, column])
        spread = expected or 1.0
        assert np.allclose(scaled[here], (pooled[here, column] - pooled[here, column].mean()) / spread, atol=1e-5)
        assert (scaled[~here] == 0.0).all()


def test_images_are_scaled_by_channel():
    images = torch.randn(20, 3, 4, 5, generator=torch.Generator().manual_seed(1)) * 7 + 2
    agreed = agreed_of(SCALE, [[images[:8]], [images[8:]]])
    scaled = apply(SCALE, agreed, images, "here")
    assert scaled.dtype == torch.float32
    assert scaled.shape == images.shape
    assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(3), atol=1e-6)
    assert torch.allclose(scaled.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)
    assert agreed.count == (400, 400, 400)


def test_a_column_without_batch_and_a_constant_column():
    agreed = agreed_of(SCALE, [[torch.tensor([2.0, 2.0, 2.0])]])
    assert (agreed.mean, agreed.deviation) == ((2.0,), (1.0,))
    assert apply(SCALE, agreed, torch.tensor([2.0, 5.0]), "here").tolist() == [0.0, 3.0]


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@settings(max_examples=150, deadline=None)
@given(
    st.floats(-6e4, 6e4).filter(lambda value: value == 0.0 or abs(value) > 1e-100),
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.integers(1, 64),
    st.booleans(),
)
def test_a_constant_column_has_deviation_1_in_any_split(value, dtype, sizes, batch, last_bit):
    """Also where values differ in the last bit, as 0.1 + 0.2 and 0.3 do."""
    columns = [torch.full((size,), value, dtype=dtype) for size in sizes]
    if last_bit and dtype == torch.float64:
        columns = [torch.where(torch.arange(len(c)) % 3 == 0, torch.nextafter(c, c * 2), c) for c in columns]
    agreed = agreed_of(SCALE, [list(column.split(batch)) for column in columns])
    assert agreed.deviation == (1.0,)
    near = apply(SCALE, agreed, columns[0].double() + 1.0, "here")
    assert torch.allclose(near, torch.ones_like(near), atol=1e-3)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(0.0, 1e-9), (1e6, 1e-3), (-1e8, 1.0), (1.0, 1e-13), (1e-9, 1e-12), (3e4, 64.0)]),
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.integers(1, 64),
)
def test_a_small_deviation_is_that_of_numpy_in_any_split(seed, form, dtype, sizes, batch):
    generator = np.random.default_rng(seed)
    columns = [torch.from_numpy(generator.normal(*form, size)).to(dtype) for size in sizes]
    pooled = torch.cat(columns).double().numpy()
    if not np.isfinite(pooled).all() or (pooled == pooled[0]).all():
        return  # too large for the dtype, or constant in it
    agreed = agreed_of(SCALE, [list(column.split(batch)) for column in columns])
    exact = (pooled - pooled[0]).std()  # the shift is exact; numpy's own mean would be rounded
    assert agreed.deviation[0] == pytest.approx(exact, rel=1e-3 if form == (1.0, 1e-13) else 1e-6)


def test_categories_are_one_list_and_others_are_0():
    shared = Shared("sex", at="a", kind="categories", least=1)
    agreed = agreed_of(shared, [[["m", "f"], ["f"]], [["x", "f"]]])
    assert agreed.values == ("f", "m", "x")
    assert apply(shared, agreed, ["x", "new", "f"], "here").tolist() == [3, 0, 1]
    whole = agreed_of(shared, [[torch.tensor([[3, -1]])], [torch.tensor([[7, 3]])]])
    assert apply(shared, whole, torch.tensor([[7, 8], [-1, 3]]), "here").tolist() == [[3, 0], [1, 2]]


def test_rare_values_are_not_told():
    shared = Shared("ward", at="a", kind="categories", least=2)
    agreed = agreed_of(shared, [[["rare", "a", "a"]], [["rare", "b", "b"]]])
    assert agreed.values == ("a", "b")
    told, held = summarise(shared, [["rare", "a", "a"]], "here")
    assert b"rare" not in told
    assert held == ("rare",)


def test_an_entry_counts_once_a_sample():
    shared = Shared("codes", at="a", kind="categories", least=3)
    codes = torch.tensor([[7, 7, 7, 1], [7, 1, 1, 1], [2, 2, 2, 1]])
    assert summarise(shared, [codes], "here").held == (2, 7)
    assert agreed_of(shared, [[codes[:2], codes[2:]]]).values == (1,)


def test_columns_of_few_samples_are_not_told():
    """Column 0 has five values, column 1 four, column 2 none."""
    shared = Shared("age", at="a")
    nan = float("nan")
    few = torch.tensor([[1.0, 63.5, nan], [2.0, 64.5, nan], [3.0, 65.5, nan], [4.0, nan, nan], [5.0, 66.5, nan]])
    told, held = summarise(shared, list(few.split(2)), "here")
    assert held == (1,)
    own = read(shared, told, "a")
    assert (own.count, own.mean, own.squares) == ((5, 0, 0), (3.0, 0.0, 0.0), (10.0, 0.0, 0.0))
    assert summarise(shared, [few], "here", sole=True).held == ()
    assert read(shared, summarise(shared, [few], "here", sole=True).told, "a").count == (5, 4, 0)


@pytest.mark.parametrize("first", [True, False])
def test_the_total_is_that_of_the_parties_that_tell(first: bool):
    many, few = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.6], dtype=torch.float64), torch.tensor([170.0, 171.0])
    shared = Shared("age", at="a")
    agreed = agreed_of(shared, [[few], [many]] if first else [[many], [few]])
    alone = agreed_of(shared, [[many]])
    assert agreed == alone
    assert alone.deviation[0] == pytest.approx(many.std(correction=0).item(), rel=1e-12)


def test_a_picture_is_one_sample_however_many_pixels_it_has():
    shared = Shared("scan", at="a", least=3)
    scans = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    scans[0, 1] = float("nan")
    assert summarise(shared, [scans[:1]], "here").held == (0,)
    assert summarise(shared, [scans[:1], scans[1:]], "here").held == (1,)


@pytest.mark.provokes("E261")
@pytest.mark.parametrize(
    ("kind", "few", "many", "name"),
    [
        ("scale", [torch.tensor([[1.0, 2.0]] * 4)], [torch.tensor([[1.0, float("nan")]] * 9)], "column 1"),
        ("classes", [["sepsis"] * 4 + ["none"] * 5], [["none"] * 9], "class 'sepsis'"),
    ],
)
def test_what_nobody_may_tell_but_somebody_needs_is_refused(kind: str, few, many, name: str):
    shared = Shared("age", at="a", kind=kind)
    held = summarise(shared, few, "here").held
    check_told(shared, agreed_of(shared, [few, few * 2, few]), held, "party a")  # eight samples at the second
    with pytest.raises(DataError) as caught:
        check_told(shared, agreed_of(shared, [few, many]), held, "party a")
    assert caught.value.code == "E261"
    assert f"expected a party with at least 5 samples of {name}, got fewer here, and at all others" in str(caught.value)
    assert "lower `least` in the plan" in str(caught.value)


def test_a_category_that_nobody_may_tell_is_0():
    shared = Shared("ward", at="a", kind="categories")
    wards = ["icu"] * 4 + ["surgery"] * 5
    agreed = agreed_of(shared, [[wards]])
    check_told(shared, agreed, summarise(shared, [wards], "here").held, "party a")
    assert apply(shared, agreed, ["icu", "surgery"], "here").tolist() == [0, 1]


@pytest.mark.provokes("E261")
def test_classes_are_numbered_and_an_unknown_one_is_an_error():
    shared = Shared("grade", at="a", kind="classes", least=1)
    agreed = agreed_of(shared, [[torch.tensor([4, 2])], [torch.tensor([9])]])
    assert apply(shared, agreed, torch.tensor([9, 2, 4]), "here").tolist() == [2, 0, 1]
    with pytest.raises(DataError) as caught:
        apply(shared, agreed, torch.tensor([9, 3, 5]), "party a, batch 2")
    assert caught.value.code == "E261"
    assert "party a, batch 2" in str(caught.value)
    assert "expected one of the 3 classes of the training data, got 3, and so 2 in a batch" in str(caught.value)


def test_the_largest_numbers_have_a_finite_deviation():
    far = [torch.full((9,), sign * 1e130, dtype=torch.float64) for sign in (1, -1)]
    agreed = agreed_of(SCALE, [[far[0]], [far[1]]])
    assert (agreed.count, agreed.mean) == ((18,), (0.0,))
    assert agreed.deviation == pytest.approx((1e130,))
    assert apply(SCALE, agreed, far[1], "here").tolist() == pytest.approx([-1.0] * 9)


@pytest.mark.provokes("E261")
@pytest.mark.parametrize(
    ("shared", "batches", "words"),
    [
        (SCALE, [torch.tensor([1, 2])], "expected a floating tensor"),
        (SCALE, [["a"]], "expected a floating tensor, got list"),
        (SCALE, [torch.tensor([1.0, float("inf")])], "got a larger one"),
        (SCALE, [torch.tensor([1.0, -1e200], dtype=torch.float64)], "expected numbers up to 1e+130"),
        (Shared("age", at="a", limit=2, least=1), [torch.ones(2, 3)], "expected at most 2 columns, got 3"),
        (Shared("x", at="a", kind="categories", least=1), [torch.ones(2)], "whole numbers or texts"),
        (Shared("x", at="a", kind="categories", limit=2, least=1), [["a", "b", "c"]], "at most 2 values, got 3"),
        (Shared("x", at="a", kind="classes", least=1), [["a" * 201]], "texts of at most 200 bytes"),
        (
            Shared("x", at="a", kind="classes", least=1),
            [["a"], torch.tensor([1])],
            "expected texts, or whole numbers, got both",
        ),
    ],
)
def test_a_field_that_does_not_fit_is_refused(shared, batches, words):
    with pytest.raises(DataError) as caught:
        summarise(shared, batches, "party a")
    assert caught.value.code == "E261"
    assert words in str(caught.value)
    assert "party a" in str(caught.value)


def coded(kind: str = "scale", **rest: object) -> bytes:
    return msgspec.msgpack.encode({"kind": kind, "count": [], "mean": [], "squares": [], "values": [], **rest})


@pytest.mark.provokes("E541")
@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"", "cannot be used"),
        (b"\xff" * 9, "cannot be used"),
        (coded("classes"), "expected the summary of a field to scale"),
        (coded(count=[1], mean=[1.0]), "cannot be used"),
        (coded(count=[-1], mean=[1.0], squares=[1.0]), "cannot be used"),
        (coded(count=[1], mean=[float("nan")], squares=[1.0]), "cannot be used"),
        (coded(count=[1], mean=[1.0], squares=[-1.0]), "cannot be used"),
        (coded(count=[1, 1], mean=[1.0, 1.0], squares=[1.0, 1.0]), "expected 1 columns, got 2"),
    ],
)
def test_a_message_that_cannot_be_used_names_its_sender(message, words):
    good = summarise(SCALE, [torch.ones(3)], "here").told
    with pytest.raises(ContractError) as caught:
        merge(SCALE, [("a", good), ("b", message)])
    assert caught.value.code == "E541"
    assert words in str(caught.value)
    assert "'b'" in str(caught.value)


def test_lists_that_grow_too_long_or_mix_are_refused():
    shared = Shared("x", at="a", kind="classes", limit=3, least=1)
    texts, numbers = summarise(shared, [["a", "b"]], "").told, summarise(shared, [torch.tensor([1])], "").told
    with pytest.raises(ContractError, match="whole numbers at all parties, or texts at all"):
        merge(shared, [("a", texts), ("b", numbers)])
    with pytest.raises(ContractError, match="expected at most 3, got 4"):
        merge(shared, [("a", texts), ("b", summarise(shared, [["c", "d"]], "").told)])


@pytest.mark.provokes("E541")
def test_a_list_that_is_too_long_says_whose_values_it_has_and_names_those_of_this_party_alone():
    shared = Shared("x", at="a", kind="classes", limit=3, least=1)
    told = [("a", summarise(shared, [["a", "b ", "b"]], "").told), ("b", summarise(shared, [["a", "c"]], "").told)]
    with pytest.raises(ContractError) as caught:
        merge(shared, told, "a")
    assert caught.value.got == "4 (3 at a, 2 at b; a alone has 'b', 'b ')"
    assert "written in several ways" in caught.value.remedy
    with pytest.raises(ContractError) as caught:
        merge(shared, told, "hub")
    assert caught.value.got == "4 (3 at a, 2 at b)"


@pytest.mark.provokes("E261")
@pytest.mark.parametrize("kind", ["categories", "classes"])
@pytest.mark.parametrize(
    ("trained", "given", "words"),
    [
        (["1", "2"], torch.tensor([1, 2]), "expected texts, as the parties agreed on, got whole numbers. give this"),
        (torch.tensor([1, 2]), ["1", "2"], "expected whole numbers, as the parties agreed on, got texts. give this"),
    ],
)
def test_another_kind_of_values_than_was_agreed_on_is_refused(kind: str, trained, given, words: str):
    """Each would be unknown, and so 0."""
    shared = Shared("x", at="a", kind=kind, least=1)
    with pytest.raises(DataError) as caught:
        apply(shared, agreed_of(shared, [[trained]]), given, "here")
    assert caught.value.code == "E261"
    assert words in str(caught.value)
    assert apply(shared, agreed_of(shared, [[trained]]), given[:0], "here").tolist() == []
