"""What is hardly meant in preprocessed fields is said at the party that has it."""

from __future__ import annotations

import pytest
import torch

from cutlayer.engine.cautions import alike, noticed

NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("entries", "pairs"),
    [
        (("icu", "icu ", "\ticu"), [("icu", "icu "), ("icu", "\ticu")]),
        ((NFC, NFD), [(NFC, NFD)]),
        (("icu", "ICU", "i cu"), []),
        (("icu", "icu"), []),
        ((1, 2), []),
        ((), []),
    ],
)
def test_texts_are_alike_but_for_spaces_around_them_and_unicodes_forms(entries: tuple, pairs: list):
    assert alike(entries) == pairs


def test_a_round_is_unknown_until_a_value_is_in_the_list():
    first = noticed((0, ()), ["x", "y", "x"], torch.tensor([0, 0, 0]))
    assert first == (3, ("x", "y"))
    assert noticed(first, torch.tensor([[7, 8]]), torch.tensor([[0, 0]])) == (5, ("x", "y", 7))
    assert noticed(first, ["z"], torch.tensor([1])) is None
    assert noticed(None, ["x"], torch.tensor([0])) is None
