"""The checks of codecs and defences pass what is right and name what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from cutlayer.engine.codec import CODECS, Cast, Levels
from cutlayer.engine.defence import Gaussian
from cutlayer.testing import check_codec, check_defence

SPEC = "float32[batch, 3, 4]"


@pytest.mark.parametrize(
    ("name", "spec", "wire", "error"),
    [
        ("bfloat16", SPEC, "bfloat16[batch, 3, 4]", 2**-8),
        ("bfloat16", "float64[batch, 5]", "bfloat16[batch, 5]", 2**-8),
        ("float16", SPEC, "float16[batch, 3, 4]", 2**-11),
        ("float16", "bfloat16[batch, 5]", "float16[batch, 5]", 2**-11),
        ("int8", "float64[batch, 9]", "uint8[batch, 17]", 2 / 510 * 1.001),
        ("int8", SPEC, "uint8[batch, 20]", 2 / 510 * 1.001),
        ("int8", "bfloat16[batch, 9]", "uint8[batch, 17]", 2 / 510 + 2**-8),
    ],
)
def test_cutlayers_own_codecs_keep_to_it(name: str, spec: str, wire: str, error: float):
    check_codec(CODECS[name](), spec, wire, error=error)
    with pytest.raises(AssertionError, match="an error of at most"):
        check_codec(CODECS[name](), spec, wire, error=error / 20)


@pytest.mark.parametrize("settings", [{"deviation": 0.0}, {"deviation": 2.0}, {"deviation": 0.1, "clip": 0.5}])
@pytest.mark.parametrize("spec", [SPEC, "bfloat16[batch, 2]", "float64[batch]"])
def test_cutlayers_own_defence_keeps_to_it(settings: dict[str, float], spec: str):
    check_defence(Gaussian(**settings), spec)


def test_a_scaled_sample_has_at_most_the_norm_and_small_ones_stay():
    value = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    given = Gaussian(deviation=0.0, clip=1.0)(value, torch.Generator())
    assert torch.allclose(given, torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_the_noise_has_the_deviation():
    given = Gaussian(deviation=3.0)(torch.zeros(200, 500), torch.Generator().manual_seed(1))
    assert abs(given.std().item() - 3.0) < 0.03
    assert abs(given.mean().item()) < 0.03


class Stateful(Cast):
    """Writes something else each time."""

    times = 0

    def encode(self, value: Tensor) -> Tensor:
        self.times += 1
        return super().encode(value) * self.times


class Greedy(Cast):
    """Writes to its input."""

    def encode(self, value: Tensor) -> Tensor:
        return value.mul_(2).to(self.dtype)


class Together(Cast):
    """Scales by the whole batch: another microbatch gives other bytes."""

    def encode(self, value: Tensor) -> Tensor:
        return (value / value.abs().max().clamp(min=1e-9)).to(self.dtype)


class Trusting(Levels):
    """Trusts what came."""

    def decode(self, wire: Tensor, spec):
        if wire[0, 0] % 2:
            raise IndexError("read behind the end")
        return super().decode(wire, spec)


class Picky(Cast):
    """Refuses what it wrote itself, where `wrong` says so."""

    def __init__(self, dtype: str, wrong: Callable[[Tensor], Tensor]) -> None:
        super().__init__(dtype)
        self.wrong = wrong

    def decode(self, wire: Tensor, spec):
        if self.wrong(wire).any():
            raise ValueError("out of range")
        return super().decode(wire, spec)


class Clipped(Cast):
    """For numbers up to 8, as its user knows."""

    def encode(self, value: Tensor) -> Tensor:
        return super().encode(value.clamp(-8, 8))


WIRE = "bfloat16[batch, 3, 4]"


@pytest.mark.parametrize(
    ("codec", "wire", "words"),
    [
        (Stateful("bfloat16"), WIRE, "the same bytes for the same value"),
        (Greedy("bfloat16"), WIRE, "the value not to be changed"),
        (Together("bfloat16"), WIRE, "written by itself"),
        (Cast("bfloat16"), "float16[batch, 3, 4]", "what is written to be"),
    ],
)
def test_a_wrong_codec_is_named(codec, wire: str, words: str):
    with pytest.raises(AssertionError, match=words):
        check_codec(codec, SPEC, wire, error=1e9)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda wire: wire.abs() > 100, r"numbers up to 1e\+03; got ValueError\('out of range'\)"),
        (lambda wire: wire.abs().amax((1, 2)) < 1e-5, "numbers up to"),
        (lambda wire: (wire < 0).all(), "numbers up to"),
        (lambda wire: (wire == 0).all(), "numbers up to 0;"),
    ],
    ids=["large", "tiny", "negative", "zero"],
)
def test_a_codec_that_refuses_what_it_wrote_is_found(wrong: Callable[[Tensor], Tensor], words: str):
    with pytest.raises(AssertionError, match=words):
        check_codec(Picky("bfloat16", wrong), SPEC, WIRE, error=2**-8)


def test_a_codec_for_a_smaller_range_is_checked_in_it():
    check_codec(Clipped("bfloat16"), SPEC, WIRE, error=2**-8, sizes=(1e-3, 8.0))
    with pytest.raises(AssertionError, match="an error of at most"):
        check_codec(Clipped("bfloat16"), SPEC, WIRE, error=2**-8)


def test_a_codec_that_trusts_what_comes_is_found():
    with pytest.raises(IndexError):
        check_codec(Trusting(), SPEC, "uint8[batch, 20]", error=0.1)


@pytest.mark.parametrize(
    ("defence", "words"),
    [
        (lambda value, dice: value + torch.randn(value.shape), "the same seed to give the same"),
        (lambda value, dice: value.mul_(0), "the value not to be changed"),
        (lambda value, dice: value.double(), "back"),
        (lambda value, dice: None, "a tensor"),
        (lambda value, dice: (torch.randn(1), value)[1], "torch's own generator"),
    ],
)
def test_a_wrong_defence_is_named(defence, words: str):
    with pytest.raises(AssertionError, match=words):
        check_defence(defence, SPEC)


def test_a_partial_is_a_defence():
    check_defence(partial(lambda value, dice, by: value * by, by=0.5), SPEC)
