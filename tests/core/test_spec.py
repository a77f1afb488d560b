"""Specs: the notation round-trips, sizes are right, everything else is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.core.spec import DTYPES, TensorSpec
from cutlayer.errors import PlanError

DIMS = st.lists(st.integers(1, 2**31 - 1), max_size=5)
SPECS = st.builds(
    lambda dtype, batch, dims: TensorSpec(dtype, (*["batch"] * batch, *dims)),
    st.sampled_from(list(DTYPES)),
    st.integers(0, 1),
    DIMS,
)


@given(SPECS)
def test_the_notation_round_trips(spec):
    assert TensorSpec.parse(str(spec)) == spec
    assert TensorSpec.parse(f"  {str(spec).replace(', ', ' ,')}  ") == spec


@given(SPECS, st.integers(0, 1000))
def test_sizes(spec, batch):
    shape = spec.concrete(batch)
    assert len(shape) == len(spec.shape)
    assert spec.per_sample == (spec.shape[:1] == ("batch",))
    assert shape[:1] == ((batch,) if spec.per_sample else spec.shape[:1])
    assert spec.nbytes(batch) == math.prod(shape) * DTYPES[spec.dtype]
    assert spec.mismatch(spec.dtype, shape, batch) == ""
    assert spec.mismatch(spec.dtype, (*shape, 1), batch)
    assert spec.mismatch("complex64", shape, batch) == f"complex64{list(shape)} instead of {spec.dtype}{list(shape)}"


def test_a_free_dimension_has_a_bound():
    spec = TensorSpec.parse("int64[batch, time <= 512, 3]")
    assert str(spec) == "int64[batch, time<=512, 3]"
    assert TensorSpec.parse(str(spec)) == spec
    assert spec.free == {1}
    assert spec.concrete(4) == (4, 512, 3)
    assert spec.nbytes(4) == 4 * 512 * 3 * 8
    for length in (0, 1, 511, 512):
        assert spec.mismatch("int64", (4, length, 3), 4) == ""
    for shape in ((4, 513, 3), (3, 512, 3), (4, 512, 2), (4, 512), (4, 512, 3, 1)):
        assert spec.mismatch("int64", shape, 4) == f"int64{list(shape)} instead of int64[4, <=512, 3]"
    assert spec.mismatch("int32", (4, 512, 3), 4)


def test_some_samples_may_have_no_row():
    spec = TensorSpec.parse("float32[rows<=batch, 3]")
    assert str(spec) == "float32[rows<=batch, 3]"
    assert TensorSpec.parse(str(spec)) == spec
    assert spec.per_sample
    assert spec.free == {0}
    assert spec.concrete(6) == (6, 3)
    assert [spec.mismatch("float32", (rows, 3), 6) for rows in (0, 4, 6)] == ["", "", ""]
    assert spec.mismatch("float32", (7, 3), 6) == "float32[7, 3] instead of float32[<=6, 3]"
    with pytest.raises(PlanError, match="is not the first dimension"):
        TensorSpec.parse("float32[batch, rows<=batch]")


def test_the_wire_code_of_each_dtype_never_changes():
    """The position in DTYPES is the code on the wire."""
    names = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
    assert list(DTYPES)[: len(names)] == names


def test_gradients_flow_through_floating_dtypes_only():
    assert {name for name in DTYPES if TensorSpec(name, ()).floating} == {"float32", "float64", "float16", "bfloat16"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "cannot read the tensor spec ''"),
        ("float32", "cannot read the tensor spec 'float32'"),
        ("float32[batch", "cannot read"),
        ("float32[[batch]]", "cannot read"),
        ("Float32[batch]", "cannot read"),
        ("float32[batch] x", "cannot read"),
        ("complex64[batch]", "unknown dtype in 'complex64[batch]' (a tensor spec): expected one of float32, float64"),
        ("float32[2, batch]", "'batch' is not the first dimension of 'float32[2, batch]'"),
        ("float32[batch, batch]", "'batch' is not the first dimension"),
        ("float32[batch, 0]", "bad dimension '0'"),
        ("float32[batch, -1]", "bad dimension '-1'"),
        ("float32[batch, 1.5]", "bad dimension '1.5'"),
        ("float32[batch, n]", "bad dimension 'n'"),
        ("float32[batch,,3]", "bad dimension ''"),
        ("float32[batch, 3,]", "bad dimension ''"),
        ("float32[batch, ²]", "bad dimension '²'"),
        ("float32[batch, 2147483648]", "bad dimension '2147483648'"),
    ],
)
def test_anything_else_is_refused(text, complaint):
    with pytest.raises(PlanError) as caught:
        TensorSpec.parse(text)
    assert caught.value.code == "E101"
    assert complaint in str(caught.value)
