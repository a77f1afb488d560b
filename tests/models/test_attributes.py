"""A split leaves the user's model as it was, whatever its forward keeps from call to call."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cutlayer as cl
from cutlayer.errors import StageError
from cutlayer.models.cut import cut

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 3


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.relu(self.two(torch.relu(self.one(x)))))


class Keeps(Layers):
    """Keeps a table that its first call makes, its outputs, what it returned last, and how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last, self.seen, self.recent = 0, None, list[Tensor](), deque[Tensor](maxlen=2)
        self.by_name = {"first": torch.ones(6)}

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.one(x))
        if not hasattr(self, "scale"):
            self.scale = torch.arange(6.0).to(x.device) / 6
        self.last = self.three(torch.relu(self.two(h * self.scale)))
        self.calls += 1
        self.seen.append(h)
        self.recent.append(h.detach())
        self.by_name["last"] = h
        return self.last


class Hooked(nn.Module):
    """A backbone that puts hooks on its blocks when it is first asked for their hidden states."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(vocab_size=9, output_hidden_states=True, **sizes, **still)
        self.encoder, self.head, self.out = transformers.BertModel(config), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.relu(self.head(self.encoder(words).hidden_states[-2][:, 0])))


def trained_uncut(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for first in (0, 4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[first : first + 4]), LABELS[first : first + 4]).backward()
        optimizer.step()
    return model.state_dict()


def trains_as_uncut(made: cl.Split, uncut: nn.Module, inputs: Tensor) -> bool:
    expected = trained_uncut(uncut, inputs)
    loader, sgd = DataLoader(TensorDataset(inputs, LABELS), 4), partial(torch.optim.SGD, lr=0.1)
    found = cl.fit(made, loader, loss=nn.CrossEntropyLoss(), optimizer=sgd).state_dict()
    return all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("labels", ["client", "server"])
def test_what_a_forward_keeps_is_as_it_was(labels: str):
    model = Keeps()
    uncut, before = copy.deepcopy(model), dict(vars(model))
    made = cl.split(model, "one", example=X[:3], labels=labels)
    assert vars(model) == before
    assert (model.calls, model.last, model.seen, len(model.recent), list(model.by_name)) == (0, None, [], 0, ["first"])
    assert trains_as_uncut(made, uncut, X)


@pytest.mark.parametrize("at", ["encoder.embeddings", "encoder.encoder.layer.0", ("encoder.encoder.layer.1", "head")])
def test_hooks_that_a_first_call_puts_on_are_put_on_once(at: str | tuple[str, str]):
    words = torch.randint(1, 9, (8, 5), generator=torch.Generator().manual_seed(0))
    model, called = Hooked(), Hooked()
    called(words)
    made = cl.split(model, at, example=words[:2])
    hooks = [{name: len(one._forward_hooks) for name, one in each.named_modules()} for each in (model, called)]
    assert hooks[0] == hooks[1]
    assert torch.equal(model(words), called(words))
    assert trains_as_uncut(made, called, words)
    assert len(model.encoder(words).hidden_states) == 4


class Remembers(Layers):
    """Adds what it gave for the call before: no piece can."""

    before = None

    def forward(self, x: Tensor) -> Tensor:
        h, before = self.two(self.one(x)), self.before
        self.before = h.detach()
        return self.three(h if before is None else h + before)


@pytest.mark.provokes("E321")
def test_what_is_kept_from_call_to_call_and_used_is_refused():
    model = Remembers()
    with pytest.raises(StageError, match=r"E321.*Remembers in train mode"):
        cut(model, "one", example=X)
    assert model.before is None
    assert "before" not in vars(model)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("bias", [True, False])
def test_a_parametrized_last_layer_is_the_tail(norm: Callable[[nn.Module], nn.Module], bias: bool):
    model = Layers()
    model.three = norm(nn.Linear(6, 3, bias=bias))
    uncut = copy.deepcopy(model)
    made = cl.split(model, "one", example=X[:3])
    assert made.cut.points == ("one", "two")
    assert trains_as_uncut(made, uncut, X)


def test_what_a_hook_of_the_first_call_keeps_is_not_left_in_the_model():
    """The example's activations, with their graph: a copy of the model would fail."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.ready = nn.Linear(6, 6), nn.Linear(6, 3), False

        def keep(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
            self.h = output

        def forward(self, x: Tensor) -> Tensor:
            if not self.ready:
                self.a.register_forward_hook(self.keep)
                self.ready = True
            return self.b(torch.relu(self.a(x)))

    model = Keeping()
    made = cl.split(model, "a", example=torch.randn(2, 6), labels="server")
    assert "h" not in vars(model)
    assert len(model.a._forward_hooks) == 1
    assert made.modules("client", copied=True)
