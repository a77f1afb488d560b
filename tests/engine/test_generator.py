"""The generator of a defence: a Mersenne Twister with all of its state from the text, told from an independent one."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from cutlayer.engine.coder import generator_of
from cutlayer.engine.defence import Gaussian


def test_all_words_come_from_the_text():
    words = np.frombuffer(hashlib.shake_256(b"1:head:up:train:0:3:0:0:0").digest(4 * 624), "<u4")
    other = np.random.MT19937()
    other.state = {"bit_generator": "MT19937", "state": {"key": words.astype(np.uint32), "pos": 624}}
    drawn = torch.empty(2000, dtype=torch.int64).random_(0, 2**24, generator=generator_of("1:head:up:train:0:3:0:0:0"))
    assert torch.equal(drawn, torch.from_numpy((other.random_raw(2000) % 2**24).astype(np.int64)))


def test_one_text_gives_one_stream_and_another_text_another():
    first, again, other = (torch.randn(1000, generator=generator_of(text)) for text in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert abs(float((first * other).mean())) < 0.15
    assert abs(float(first.mean())) < 0.15
    assert 0.9 < float(first.std()) < 1.1


@pytest.mark.parametrize("shape", [(0, 3), (0,), (4,), (2, 3, 5)])
def test_a_clip_takes_any_shape(shape: tuple[int, ...]):
    """In a batch for which an optional party has nobody there are no rows."""
    left = Gaussian(0.0, clip=1.0)(torch.full(shape, 7.0), generator_of("x"))
    assert left.shape == shape
    assert bool((left.reshape(len(left), -1 if left.numel() else 1).norm(dim=1) <= 1.000001).all())


def test_noise_is_added_before_a_half_is_rounded():
    """Else the scaled value could be longer than the clip, and the noise be lost in its rounding."""
    value = torch.full((2000, 8), 1.0, dtype=torch.bfloat16)
    left = Gaussian(0.5, clip=1.0)(value, generator_of("x"))
    wide = Gaussian(0.5, clip=1.0)(value.float(), generator_of("x"))
    assert torch.equal(left, wide.to(torch.bfloat16))
