"""What a codec and a defence must keep to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cutlayer.core.spec import TensorSpec
from cutlayer.engine.codec import Codec
from cutlayer.engine.defence import Defence
from cutlayer.engine.tensors import check_spec, from_payload, to_payload, torch_dtype
from cutlayer.testing.expect import expect, random_value

__all__ = ["check_codec", "check_defence"]

_BATCHES = (1, 2, 7)
_SIZES = (1e-6, 1e-3, 1e3, 1e6)


def check_codec(
    codec: Codec,
    spec: str,
    wire: str,
    *,
    error: float = 0.0,
    hostile: int = 50,
    sizes: Sequence[float] = _SIZES,
) -> None:
    """Check a codec for values of `spec` that are `wire` on the wire.

    It writes exactly the dtype and shape of `wire` for any number of samples; reads back dtype and shape of `spec`, of
    large and small numbers too; is a function of its input; leaves its input as it is; comes back to within `error` of
    the largest number of each sample; keeps samples apart (a batch is written as its samples are, so that microbatches
    change nothing); and for any bytes of the right size gives a tensor of `spec` or raises `ValueError`, which is for
    bytes that `encode` did not write.

    Args:
        codec: Of which both methods are tried.
        spec: Such as "float32[batch, 64]".
        wire: Such as "uint8[batch, 72]".
        error: Largest error that is allowed, as a share of a sample's largest absolute number.
        hostile: How many random bytes to try.
        sizes: Largest absolute numbers of a sample to try, besides 0 and numbers around 1, for a floating `spec`. Each
            is moved into the normal numbers of the floating dtypes of `spec` and `wire`. A codec that is for a
            smaller range is checked with sizes in it.

    Raises:
        AssertionError: it does not keep to this.
    """
    value_spec, wire_spec = TensorSpec.parse(spec), TensorSpec.parse(wire)
    for batch in _BATCHES:
        values = [random_value(value_spec.concrete(batch), torch_dtype(value_spec.dtype), seed) for seed in range(3)]
        values += [torch.zeros_like(values[0]), torch.ones_like(values[0])]
        values += _sized(values[0], torch_dtype(wire_spec.dtype), sizes) if values[0].is_floating_point() else []
        for value in values:
            _round_trip(codec, value, value_spec, wire_spec, batch, error)
    for seed in range(hostile):
        _hostile(codec, value_spec, wire_spec, seed)


def _sized(value: Tensor, wire: torch.dtype, sizes: Sequence[float]) -> list[Tensor]:
    """Return each sample with these largest numbers, of both signs and all negative."""
    ranges = [torch.finfo(dtype) for dtype in (value.dtype, wire) if dtype.is_floating_point]
    low, high = max(2 * one.smallest_normal for one in ranges), min(one.max / 2 for one in ranges)
    rows = value.double().reshape(len(value), -1)
    share = (rows / rows.abs().amax(1, keepdim=True)).reshape(value.shape)
    found = [share * min(max(size, low), high) for size in sizes]
    return [one.to(value.dtype) for most in found for one in (most, -most.abs())]


def _round_trip(codec: Codec, value: Tensor, spec: TensorSpec, wire: TensorSpec, batch: int, error: float) -> None:
    before = value.clone()
    sent = codec.encode(value)
    wrong = check_spec(sent, wire, batch)
    expect(not wrong, f"what is written to be {wire}; got {wrong}")
    expect(torch.equal(value, before), "the value not to be changed")
    expect(torch.equal(sent, codec.encode(before)), "the same bytes for the same value")
    arrived = from_payload(bytes(to_payload(sent)), wire.dtype, tuple(sent.shape), value.device)
    try:
        back = codec.decode(arrived, spec)
    except ValueError as refused:
        most = f"{float(before.double().abs().max()):.3g}"
        raise AssertionError(
            f"expected what encode wrote to be read, of numbers up to {most}; got {refused!r}"
        ) from None
    wrong = check_spec(back, spec, batch)
    expect(not wrong, f"what is read to be {spec}; got {wrong}")
    rows, theirs = (one.reshape(batch, -1).double() for one in (before, back))
    largest = rows.abs().amax(1, keepdim=True)
    expect(bool(((rows - theirs).abs() <= error * largest).all()), f"an error of at most {error} of the largest number")
    if batch > 1 and not wire.free:
        alone = torch.cat([codec.encode(before[place : place + 1]) for place in range(batch)])
        expect(torch.equal(alone, sent), "each sample to be written by itself: microbatches must change nothing")


def _hostile(codec: Codec, spec: TensorSpec, wire: TensorSpec, seed: int) -> None:
    shape, kind = wire.concrete(2), torch_dtype(wire.dtype)
    dice = torch.Generator().manual_seed(seed)
    size = wire.nbytes(2)
    raw = bytes(torch.randint(0, 2 if kind is torch.bool else 256, (size,), generator=dice, dtype=torch.uint8).numpy())
    try:
        value = codec.decode(from_payload(raw, wire.dtype, shape, torch.device("cpu")), spec)
    except ValueError:
        return
    wrong = check_spec(value, spec, 2)
    expect(not wrong, f"a tensor of {spec}, or ValueError, for bytes that nobody wrote; got {wrong}")


def check_defence(defence: Defence, spec: str, *, seeds: Sequence[int] = (0, 1, 2)) -> None:
    """Check a defence for values of `spec`.

    It gives dtype and shape of what it gets; leaves that as it is; draws from the generator given and no other (the
    same seed gives the same value, and torch's own generator stays where it was).

    Raises:
        AssertionError: it does not keep to this.
    """
    value_spec = TensorSpec.parse(spec)
    for batch in _BATCHES:
        value = random_value(value_spec.concrete(batch), torch_dtype(value_spec.dtype), batch)
        before, state = value.clone(), torch.get_rng_state()
        for seed in seeds:
            given = defence(value, torch.Generator().manual_seed(seed))
            expect(isinstance(given, Tensor), "a tensor")
            expect((given.shape, given.dtype) == (value.shape, value.dtype), f"{value_spec} back")
            expect(torch.equal(value, before), "the value not to be changed: its own stage still needs it")
            again = defence(before, torch.Generator().manual_seed(seed))
            expect(torch.equal(given, again), "the same seed to give the same: draw from the generator given")
        expect(torch.equal(torch.get_rng_state(), state), "torch's own generator to stay where it was")
