"""What a forward that is cut apart asks of values: here, the checks of transformers, which the pieces carry out."""

from __future__ import annotations

import pytest
import torch

from cutlayer.models import asked
from cutlayer.models.cut import Cut, compose, cut
from tests.models.zoo import SUBJECTS

END = 2


@pytest.fixture(scope="module")
def halves() -> Cut:
    subject = SUBJECTS["bart"]
    return cut(subject.make().eval(), "model.decoder.layers.0", example={k: v[:2] for k, v in subject.inputs.items()})


@pytest.mark.parametrize(
    ("ends", "message"),
    [((1, 3), "same number of <eos> tokens"), ((0, 0), "at least one <eos> token")],
)
def test_pieces_check_what_the_model_checks(halves: Cut, ends: tuple[int, ...], message: str):
    words = torch.full((2, 7), 5)
    for row, count in zip(words, ends, strict=True):
        row[7 - count :] = END
    with pytest.raises(ValueError, match=message):
        SUBJECTS["bart"].make()(input_ids=words)
    with pytest.raises(ValueError, match=message):
        compose(halves, {"input_ids": words})


def test_texts_with_as_many_ends_pass(halves: Cut):
    words = torch.full((2, 7), 5)
    words[:, 5:] = END
    assert torch.equal(compose(halves, {"input_ids": words}), SUBJECTS["bart"].make().eval()(words).logits)


def test_the_librarys_own_check_is_put_back():
    from transformers.models.bart import modeling_bart
    from transformers.utils import torch_compilable_check

    subject = SUBJECTS["bart"]
    cut(subject.make(), "model.decoder.layers.1", example={k: v[:2] for k, v in subject.inputs.items()})
    assert modeling_bart.torch_compilable_check is torch_compilable_check
    assert "isinstance" not in vars(modeling_bart)
    assert asked.__all__ == ["answering"]
