"""Operations that torch's counter does not know, against the same arithmetic written with those that it does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from cutlayer.engine.flops import FlopCounter

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


class ByHand(nn.Module):
    """One layer and direction of an LSTM, of two linear layers, or the products of a GRU or an RNN."""

    def __init__(self, kind: type[nn.Module], size: int, hidden: int) -> None:
        super().__init__()
        self.gates, self.hidden = GATES[kind], hidden
        self.entering = nn.Linear(size, self.gates * hidden)
        self.returning = nn.Linear(hidden, self.gates * hidden)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """Go over x of shape (batch, time, size), from a state of shape (batch, hidden)."""
        found, cell = [], torch.zeros_like(state)
        for step in x.unbind(1):
            both = self.entering(step) + self.returning(state)
            if self.gates == 4:
                enter, keep, new, out = both.chunk(4, 1)
                cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
                state = out.sigmoid() * cell.tanh()
            else:
                state = sum(both.chunk(self.gates, 1)).tanh()
            found.append(state)
        return torch.stack(found, 1)


def counted(counter: FlopCounter | FlopCounterMode, work: Callable[[], Tensor]) -> tuple[int, int]:
    """Return the operations of a forward and of its backward."""

    def total() -> int:
        return counter.total if isinstance(counter, FlopCounter) else counter.get_total_flops()

    with counter:
        output = work()
        forward = total()
        output.sum().backward()
    return forward, total() - forward


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", list(GATES))
def test_a_recurrence_counts_as_its_linear_layers(kind: type[nn.RNNBase], device: str):
    x = torch.randn(2, 5, 6, device=device, requires_grad=True)
    state = torch.randn(2, 7, device=device, requires_grad=True)
    fused = kind(6, 7, batch_first=True).to(device)
    given = (state[None], torch.zeros_like(state)[None]) if kind is nn.LSTM else state[None]
    hand = ByHand(kind, 6, 7).to(device)
    expected = counted(FlopCounterMode(display=False), lambda: hand(x, state))
    assert expected == (2 * 5 * GATES[kind] * 7 * (6 + 7) * 2, 2 * 5 * GATES[kind] * 7 * (6 + 7) * 4)
    assert counted(FlopCounter(), lambda: fused(x, given)[0]) == expected


def test_an_lstm_of_the_same_weights_gives_what_the_hand_written_one_gives():
    fused, hand, x = nn.LSTM(6, 7, batch_first=True), ByHand(nn.LSTM, 6, 7), torch.randn(2, 5, 6)
    with torch.no_grad():
        hand.entering.weight.copy_(fused.weight_ih_l0)
        hand.returning.weight.copy_(fused.weight_hh_l0)
        hand.entering.bias.copy_(fused.bias_ih_l0)
        hand.returning.bias.copy_(fused.bias_hh_l0)
    torch.testing.assert_close(fused(x)[0], hand(x, torch.zeros(2, 7)))


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("projected", "packed"), [(0, False), (3, False), (0, True)])
def test_layers_directions_and_projections(projected: int, packed: bool, device: str):
    module = nn.LSTM(6, 7, num_layers=2, bidirectional=True, batch_first=True, proj_size=projected).to(device)
    x: Tensor | nn.utils.rnn.PackedSequence = torch.randn(2, 5, 6, device=device, requires_grad=True)
    steps, out = 2 * 5, projected or 7
    if packed:
        x, steps = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True), 5 + 3  # type: ignore[arg-type]
    with FlopCounter() as counter:
        module(x)
    weights = sum(4 * (size + out) * 7 + projected * 7 for size in (6, 2 * out))
    assert counter.total == 2 * 2 * steps * weights


@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_as_its_products(masked: bool):
    q, k = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(2, 3, 5, 8, requires_grad=True)
    mask = torch.ones(4, 5, dtype=torch.bool) if masked else None

    def by_hand() -> Tensor:
        return (q @ k.transpose(2, 3)).softmax(3) @ k

    forward, backward = counted(FlopCounterMode(display=False), by_hand)
    found = counted(FlopCounter(), lambda: F.scaled_dot_product_attention(q, k, k, attn_mask=mask))
    assert found == (forward, backward + forward // 2)  # the fused backward makes the scores again


def test_attention_of_heads_that_share_keys_counts_each_head_of_the_queries():
    """As in Llama. The formulas of torch 2.11 refuse it."""
    q = torch.randn(2, 4, 5, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 7, 8, requires_grad=True) for _ in range(2))
    with FlopCounter() as forwards:
        output = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with FlopCounter() as backwards:
        output.sum().backward()
    assert forwards.total == 2 * 2 * 4 * 5 * 7 * (8 + 8)
    assert backwards.total == 2 * 2 * 4 * 5 * 7 * (3 * 8 + 2 * 8)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("nested", [False, True])
def test_the_fast_path_of_evaluation_counts_as_the_slow_one(nested: bool):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    module = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad(), FlopCounter() as fast:
        module(x, src_key_padding_mask=padding if nested else None)
    with FlopCounterMode(display=False) as slow:
        module.train()(x)
    assert fast.total == slow.get_total_flops() > 0
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with torch.no_grad(), FlopCounter() as fast:
        attention(x, x, x, need_weights=False)
    with FlopCounterMode(display=False) as slow:
        attention.train()(x, x, x)
    assert fast.total == slow.get_total_flops() > 0


@pytest.mark.parametrize(
    ("work", "flops"),
    [
        (lambda x: x @ x[0, 0], 2 * 3 * 5 * 8),
        (lambda x: x[0, 0] @ x[0, 1], 2 * 8),
        (lambda x: torch.addmv(torch.zeros(5), x[0], x[0, 0]), 2 * 5 * 8),
        (lambda x: torch.addbmm(torch.zeros(5, 5), x, x.transpose(1, 2)), 2 * 3 * 5 * 5 * 8),
        (lambda x: torch._addmm_activation(torch.zeros(5), x[0], x[0].T), 2 * 5 * 5 * 8),
        (lambda x: torch.einsum("bij,bkj->bik", x, x), 2 * 3 * 5 * 5 * 8),
        (lambda x: F.bilinear(x, x[..., :2], torch.ones(4, 8, 2)), 3 * 3 * 5 * 4 * 8 * 2),
        (lambda x: F.embedding(torch.zeros(3, 5, dtype=torch.long), x[0]), 0),
    ],
    ids=["matrix vector", "dot", "addmv", "addbmm", "addmm gelu", "einsum", "bilinear", "embedding"],
)
def test_products_of_other_shapes(work: Callable[[Tensor], Tensor], flops: int):
    with FlopCounter() as counter:
        work(torch.randn(3, 5, 8))
    assert counter.total == flops


@pytest.mark.parametrize(
    ("first", "second", "last", "flops"),
    [
        ((16, 8), (2, 8, 24), 16, 16 * 8 * 24),  # groups of rows
        ((2, 16, 8), (8, 32), 32, 16 * 8 * 32),  # groups of columns
        ((16, 32), (32, 8), 32, 16 * 32 * 8),  # groups of what is added up
        ((2, 16, 8), (2, 8, 24), None, 2 * 16 * 8 * 24),
    ],
)
def test_products_of_groups(first: tuple[int, ...], second: tuple[int, ...], last: int | None, flops: int):
    one, two = (torch.ones(shape, dtype=torch.bfloat16) for shape in (first, second))
    offsets = None if last is None else torch.tensor([8, last], dtype=torch.int32)
    with FlopCounter() as counter:
        torch._grouped_mm(one, two, offs=offsets)
    assert counter.total == 2 * flops


def test_a_formula_that_raises_counts_nothing():
    ragged = torch.nested.nested_tensor(
        [torch.randn(3, 8), torch.randn(2, 8)]
    )  # it has no shape, which torch's asks for
    with FlopCounter() as counter:
        found = torch.bmm(ragged, ragged.transpose(1, 2))
        assert counter.total == 0
        found.unbind()[0] @ torch.ones(3, 1)
    assert counter.total == 2 * 3 * 3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_is_compiled_runs_so_while_it_is_counted():
    ran = []

    def work(x: Tensor) -> Tensor:
        return (x @ x.T).relu()

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        def run(*given: object) -> object:
            ran.append(graph)
            return graph(*given)

        return run

    x = torch.randn(1, 2, 16, 8)
    with FlopCounter() as counter:
        torch.compile(work, backend=backend)(x[0, 0])
        assert len(ran) == 1
        assert counter.total == 2 * 16 * 8 * 16
        attended = flex_attention(x, x, x)  # torch compiles it, and refuses to do so under a counter that forbids it
    assert torch.equal(attended, flex_attention(x, x, x))


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    ("first", "second", "forward"),
    [
        ((5, 3), (7, 3), 2 * 5 * 7 * 3),
        ((2, 30, 3), (27, 3), 2 * 2 * 30 * 27 * 3),
        ((2, 5, 3), (2, 7, 3), 2 * 2 * 5 * 7 * 3),
    ],
    ids=["direct", "by products", "batches"],
)
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_distances(first: tuple[int, ...], second: tuple[int, ...], forward: int, power: float):
    """From 26 rows on torch takes the Euclidean distance apart into products: the count stays the same."""
    one, two = shaped(*first), shaped(*second)
    assert counted(FlopCounter(), lambda: torch.cdist(one, two, p=power)) == (forward, 2 * forward)


def test_a_distance_counts_as_the_product_that_it_is_made_of():
    """(a - b)**2 = a*a - 2*a*b + b*b: the cross terms are a product of matrices, and so is each gradient."""
    one, two = shaped(40, 6), shaped(30, 6)
    products = counted(FlopCounterMode(display=False), lambda: one @ two.T)
    assert products == (2 * 40 * 30 * 6, 2 * products[0])
    assert counted(FlopCounter(), lambda: torch.cdist(one, two)) == products


COMPLEX = torch.complex64


@pytest.mark.parametrize(
    ("work", "entered", "forward", "backward"),
    [
        (torch.fft.fft, shaped(4, 8, dtype=COMPLEX), 4 * 5 * 8 * 3, 4 * 5 * 8 * 3),
        (torch.fft.ifft, shaped(4, 8, dtype=COMPLEX), 4 * 5 * 8 * 3, 4 * 5 * 8 * 3),
        (torch.fft.fft2, shaped(3, 4, 8, dtype=COMPLEX), 3 * 5 * 32 * 5, 3 * 5 * 32 * 5),
        (torch.fft.fft, shaped(4, 6, dtype=COMPLEX), round(4 * 5 * 6 * 2.584963), round(4 * 5 * 6 * 2.584963)),
        (torch.fft.rfft, shaped(4, 8), 4 * 20 * 3, 4 * 40 * 3),  # torch goes back by a transform of complex numbers
        (torch.fft.rfft2, shaped(3, 4, 8), 3 * 80 * 5, 3 * 160 * 5),
        (torch.fft.irfft, shaped(4, 5, dtype=COMPLEX), 4 * 20 * 3, 4 * 20 * 3),
        (torch.fft.irfft2, shaped(3, 4, 5, dtype=COMPLEX), 3 * 80 * 5, 3 * 80 * 5),
        (lambda x: torch.fft.fft(x, n=16), shaped(4, 8, dtype=COMPLEX), 4 * 5 * 16 * 4, 4 * 5 * 16 * 4),
    ],
    ids=["fft", "ifft", "fft2", "of six", "rfft", "rfft2", "irfft", "irfft2", "padded"],
)
def test_fourier_transforms(work: Callable[[Tensor], Tensor], entered: Tensor, forward: int, backward: int):
    def real() -> Tensor:
        found = work(entered)
        return torch.view_as_real(found) if found.is_complex() else found

    assert counted(FlopCounter(), real) == (forward, backward)


@pytest.mark.parametrize(
    ("matrix", "right", "more", "forward", "solved", "product"),
    [
        ((6, 6), (6, 3), {}, 144 + 2 * 36 * 3, 2 * 36 * 3, 2 * 36 * 3),
        ((6, 6), (6,), {}, 144 + 2 * 36, 2 * 36, 2 * 36),
        ((5, 6, 6), (5, 6), {}, 5 * (144 + 2 * 36), 5 * 2 * 36, 5 * 2 * 36),
        ((2, 6, 6), (2, 6, 3), {}, 2 * (144 + 2 * 36 * 3), 2 * 2 * 36 * 3, 2 * 2 * 36 * 3),
        ((6, 6), (2, 6, 3), {}, 144 + 2 * 2 * 36 * 3, 2 * 2 * 36 * 3, 2 * 2 * 36 * 3),
        ((6, 6), (3, 6), {"left": False}, 144 + 2 * 36 * 3, 2 * 36 * 3, 2 * 36 * 3),
    ],
    ids=["matrix", "vector", "vectors", "batch", "one for all", "from the right"],
)
def test_linear_equations(matrix, right, more: dict[str, bool], forward: int, solved: int, product: int):
    """2 / 3 * 6**3 = 144 of the decomposition; backwards it is there."""
    one, two = torch.randn(*matrix) + 6 * torch.eye(6), shaped(*right)
    one.requires_grad_()
    found = counted(FlopCounter(), lambda: torch.linalg.solve(one, two, **more))
    assert found == (forward, solved + product)
