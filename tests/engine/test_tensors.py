"""Tensors as bytes, and what may leave."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.core.spec import DTYPES, TensorSpec
from cutlayer.engine.tensors import (
    check_finite,
    check_spec,
    dtype_name,
    from_payload,
    memory_order,
    pack,
    to_payload,
    torch_dtype,
    unpack,
)
from cutlayer.errors import ContractError, NonFiniteError

CPU = torch.device("cpu")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(st.sampled_from(list(DTYPES)), SHAPES, st.data())
def test_bytes_become_a_tensor_and_the_same_bytes_again(dtype, shape, data):
    """All dtypes; 0-d and empty tensors too; NaNs keep their bits."""
    size = math.prod(shape) * DTYPES[dtype]
    payload = data.draw(st.binary(min_size=size, max_size=size))
    if dtype == "bool":
        payload = bytes(byte & 1 for byte in payload)
    for kind in (bytes, bytearray, memoryview):
        value = from_payload(kind(payload), dtype, shape, CPU)
        assert (dtype_name(value.dtype), tuple(value.shape)) == (dtype, shape)
        assert bytes(to_payload(value)) == payload
        assert check_spec(value, TensorSpec(dtype, shape), 0) == ""


@given(st.sampled_from(list(DTYPES)), SHAPES)
def test_a_tensor_crosses_unchanged(dtype, shape):
    value = (torch.rand(shape) * 5).to(torch_dtype(dtype))
    copy = from_payload(bytes(to_payload(value)), dtype, shape, CPU)
    assert copy.dtype == value.dtype
    assert torch.equal(copy, value)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_one_number_out_of_a_larger_tensor_crosses(dtype, shape):
    """A last batch of one sample: PyTorch calls it contiguous, whatever its strides."""
    value = torch.ones(1, 4).to(torch_dtype(dtype))[:, 2].as_strided(shape, (4,) * len(shape))
    order = memory_order(value)
    assert torch.equal(from_payload(bytes(to_payload(value, order)), dtype, shape, CPU, order), value)


def test_strided_and_trained_tensors_cross_in_c_order():
    value = torch.arange(24.0).reshape(2, 3, 4)
    for other in (value.transpose(0, 2), value[:, ::2], value[:1].expand(5, 3, 4), value.requires_grad_()):
        copy = from_payload(bytes(to_payload(other)), "float32", tuple(other.shape), CPU)
        assert torch.equal(copy, other)
        assert copy.is_contiguous()
        assert not copy.requires_grad


@given(st.sampled_from(list(DTYPES)), SHAPES, st.randoms(use_true_random=False))
def test_a_transposed_tensor_crosses_with_its_strides(dtype, shape, dice):
    dims = list(range(len(shape)))
    dice.shuffle(dims)
    value = (torch.rand(shape) * 5).to(torch_dtype(dtype)).permute(dims)
    order = memory_order(value)
    copy = from_payload(bytes(to_payload(value, order)), dtype, tuple(value.shape), CPU, order)
    assert torch.equal(copy, value)
    assert not order or copy.permute(order).is_contiguous()
    if value.numel():
        assert copy.stride() == value.stride()


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(1, 3, 2, 2),
        torch.ones(2, 1),
        torch.ones(1, 0),
        torch.ones(0, 1, 4),
        torch.ones(4, 8)[1:2],
        torch.ones(4, 8)[::3][:1],
        torch.ones(8).expand(1, 8),
        torch.ones(1, 8).mean(0, keepdim=True).expand(1, 8),
    ],
    ids=lambda value: f"{list(value.shape)} by {list(value.stride())}",
)
def test_a_dimension_of_one_step_adds_nothing_to_the_wire(value):
    assert memory_order(value) == ()


def test_one_image_with_channels_last_is_told_from_one_without():
    """By strides that no number lies at: PyTorch chooses a convolution's kernel by them."""
    value = torch.rand(1, 4, 4, 8).permute(0, 3, 1, 2)
    gray = torch.rand(2, 4, 4, 1).permute(0, 3, 1, 2)
    for one, order in ((value, (0, 2, 3, 1)), (gray, (0, 2, 3, 1)), (torch.rand(4, 1).t(), (1, 0))):
        assert memory_order(one) == order
        copy = from_payload(bytes(to_payload(one, order)), "float32", tuple(one.shape), CPU, order)
        assert (copy.stride(), torch.equal(copy, one)) == (one.stride(), True)


def test_transposed_bytes_are_shared():
    value = torch.arange(24.0).reshape(2, 3, 4)
    turned = value.movedim(-1, 1)
    to_payload(turned, memory_order(turned))[:4] = struct.pack("<f", 7)
    assert value[0, 0, 0] == 7
    assert memory_order(value[:1].expand(5, 3, 4).transpose(1, 2)) == ()  # its numbers share memory


def test_a_slice_crosses_with_gaps_of_one_number():
    value = torch.arange(24.0).reshape(2, 3, 4)
    cases = {
        (~0, 1, 2): (value[:, :2], (9, 4, 1)),
        (0, ~1, 2): (value[:, :, :3], (12, 4, 1)),
        (0, 1, ~2): (value[:, :, ::2], (12, 4, 2)),
        (~1, 0, 2): (value[:, 1:].transpose(0, 1), (4, 9, 1)),
    }
    for order, (gappy, strides) in cases.items():
        copy = from_payload(bytes(to_payload(gappy, order)), "float32", tuple(gappy.shape), CPU, order)
        assert torch.equal(copy, gappy)
        assert (memory_order(gappy), memory_order(copy), copy.stride()) == (order, order, strides)


@given(st.lists(st.integers(0, 5), max_size=8).map(tuple))
def test_gaps_take_at_most_three_times_the_payload(shape):
    """Whatever a peer says: here that there are gaps everywhere."""
    copy = from_payload(bytes(math.prod(shape)), "uint8", shape, CPU, tuple(~dim for dim in range(len(shape))))
    assert copy.shape == shape
    assert copy.untyped_storage().nbytes() <= max(3 * math.prod(shape), 1)


def test_bytes_are_little_endian():
    assert bytes(to_payload(torch.tensor([1, -2], dtype=torch.int32))) == struct.pack("<ii", 1, -2)


def test_a_tensor_does_not_change_bytes_that_were_sent():
    payload = bytes(8)
    from_payload(payload, "float32", (2,), CPU).add_(1)
    assert payload == bytes(8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data))])
def test_a_payload_of_any_kind_becomes_a_tensor(dtype, shape, kind, recwarn):
    """Its bytes are the tensor's memory where they may be written to; else they are copied. Nothing warns."""
    expected = (torch.arange(math.prod(shape)).reshape(shape) % 2).to(torch_dtype(dtype))
    payload = kind(bytes(to_payload(expected)))
    value = from_payload(payload, dtype, shape, CPU)
    assert (value.dtype, value.shape, value.device) == (torch_dtype(dtype), shape, CPU)
    assert value.is_contiguous()
    assert not value.requires_grad
    assert torch.equal(value, expected)
    before = bytes(payload)
    value.logical_not_()
    assert (bytes(payload) == before) is (memoryview(payload).readonly or not value.numel())
    assert torch.equal(value, expected.logical_not_())
    assert not recwarn.list


def test_a_tensor_keeps_its_payload_alive_and_may_be_trained_on():
    value = from_payload(bytearray(struct.pack("<4f", 1, 2, 3, 4)), "float32", (2, 2), CPU)
    (value.requires_grad_() * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert value.grad.tolist() == [[1, 2], [3, 4]]
    assert value.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("offset", [1, 4, 52])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
def test_a_payload_may_lie_within_other_bytes(dtype, offset):
    """As after the head of a frame: not on a whole number of elements."""
    expected = torch.tensor([1, 2, 3]).to(torch_dtype(dtype))
    own = to_payload(expected)
    memory = bytearray(offset) + own
    value = from_payload(memoryview(memory)[offset:], dtype, (3,), CPU)
    assert torch.equal(value, expected)
    value.add_(1)
    assert memory[offset:] == to_payload(expected + 1)
    assert memory[:offset] == bytes(offset)


def test_named_tensors_round_trip():
    tensors = {
        "a.weight": torch.randn(3, 2, requires_grad=True),
        "b": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(2).bfloat16(),
        "turned": torch.randn(3, 2).t(),
    }
    found = unpack(pack(tensors), "a")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert unpack(pack({}), "a") == {}


HEADER = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2) + b"{",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", len(HEADER)) + HEADER + bytes(15),
        struct.pack("<Q", len(HEADER)) + HEADER + bytes(17),
        struct.pack("<Q", len(HEADER)) + HEADER.replace(b"[4]", b"[5]") + bytes(16),
        struct.pack("<Q", len(HEADER)) + HEADER.replace(b"F32", b"Q32") + bytes(16),
        struct.pack("<Q", len(HEADER)) + HEADER.replace(b"16", b"99") + bytes(16),
        struct.pack("<Q", len(HEADER)) + HEADER.replace(b'"w"', b'"\xff"') + bytes(16),
    ],
    ids=range(11),
)
def test_a_damaged_message_is_refused(payload):
    with pytest.raises(ContractError) as caught:
        unpack(payload, "hospital-a")
    assert caught.value.code == "E523"
    assert "hospital-a" in caught.value.where


@pytest.mark.provokes("E351")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_is_not_finite_does_not_leave(bad, dtype):
    value = torch.zeros(3, 3, dtype=dtype)
    check_finite(value, lambda: "party a, cut head->body")
    value[1, 2] = bad
    with pytest.raises(NonFiniteError) as caught:
        check_finite(value, lambda: "party a, cut head->body")
    assert caught.value.code == "E351"
    assert "head->body" in str(caught.value)


def test_whole_numbers_and_nothing_are_finite():
    check_finite(torch.tensor([2**62]), lambda: "here")
    check_finite(torch.zeros(0), lambda: "here")
    check_finite(torch.tensor(True), lambda: "here")


def test_an_unknown_dtype_is_a_type_error():
    with pytest.raises(TypeError):
        torch_dtype("nn")
