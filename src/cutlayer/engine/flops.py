"""Floating-point operations, by the formulas of `torch.utils.flop_counter` and more; what is computed stays the same.

`FlopCounterMode` takes some operations apart while it counts (the backward of SiLU, for one), and the parts round
otherwise than the whole: the first step of a run would have other last bits than the same step uncounted. Outside
inference mode autograd has taken apart all that has to be, so counting the operations as they come is enough.

torch has no formula for the operations below, which come as one and would count as none. A multiplication with an
addition is two:

- LSTM, GRU and RNN: for each step of a sample, layer and direction, gates * (input + hidden) * hidden * 2, where gates
  are 4, 3 and 1 and `input` is the size of what enters the layer; with a projection, gates * (input + projected) *
  hidden * 2 + hidden * projected * 2. The backward is the same for what entered, and once more for the weights.
- Attention, for each head of the queries and pair of tokens: 2 * (size of a key + size of a value) forwards and
  6 * key + 4 * value backwards, as torch counts it on a GPU. The formulas of torch 2.11 refuse heads that share keys.
- `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` in evaluation: 2 for each token and weight of their linear
  layers, and 4 * width for each pair of tokens.
- Products of a matrix and a vector, of two vectors, of a batch of matrices that is added up, of groups of rows
  (mixtures of experts), and of a matrix with an activation after it: 2 for each product of two numbers.
- `nn.Bilinear`: 3 for each product of three numbers.
- `torch.cdist` of P and R rows of M numbers: 2 * P * R * M, and backwards as many for each gradient. These are its
  products, where torch takes the distance apart into them (`_euclidean_dist`); elsewhere it counts the same.
- `torch.fft`: 5 * N * log2(N) for a transform of N complex numbers, and half of it where what enters or leaves is real:
  what FFTW counts, https://www.fftw.org/speed/method.html. Of several dimensions, N is the product of their sizes.
- `torch.linalg.solve` of n equations and k right sides: 2 / 3 * n**3 for the LU decomposition and 2 * n**2 * k for the
  two triangular systems (Golub and Van Loan, Matrix Computations, 4th edition, 3.1 and 3.2). The backward solves once
  more with the same decomposition, and multiplies.

Counting never fails what is counted: where a formula raises, for arguments that it does not know, the operation counts
as none. What is compiled runs compiled: its products count where they are operations of torch, and not inside a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from math import log2, prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["FlopCounter"]


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, within `with`, the operations that have a formula.

    Products, convolutions, attention, recurrence, distances, Fourier transforms and linear equations have one.
    A multiplication with an addition counts as two. What is done element by element, a table's look-up, and what a
    formula raises for, count as none.
    """

    supports_higher_order_operators = True  # else torch refuses them while it counts

    def __init__(self) -> None:
        """Begin at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let what is compiled run compiled: torch would run it operation by operation, or refuse, while we count."""
        return True

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an OpOverload
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Carry out one operation, and count it."""
        given = dict(kwargs or {})
        result = func(*args, **given)
        packet = getattr(func, "_overloadpacket", func)  # one of a higher order has none
        with suppress(Exception):
            if str(packet) in _MORE:
                self.total += int(_MORE[str(packet)](*args))
            elif packet in flop_registry:
                self.total += int(flop_registry[packet](*args, **given, out_val=result))
        return result


def _recurrent(entered: Tensor, weights: Sequence[Tensor]) -> int:
    """Return the operations of a recurrence over (time, batch, features), or (packed, features)."""
    steps = entered.numel() // entered.shape[-1]
    return 2 * steps * sum(one.numel() for one in weights if one.dim() > 1)


def _layer(entered: Tensor, of_input: Tensor, of_hidden: Tensor, *_: object) -> int:
    return _recurrent(entered, (of_input, of_hidden))


def _layers(entered: Tensor, weights: Sequence[Tensor], *_: object) -> int:
    return _recurrent(entered, weights)


def _layers_backward(entered: Tensor, weights: Sequence[Tensor], *rest: Any) -> int:  # noqa: ANN401 - an operation's
    wanted = rest[-1][3]  # the last is which gradients are: of what entered, of two states, of the weights
    return _recurrent(entered, weights) * (2 if wanted else 1)


def _encoder(tokens: Tensor, width: int, weights: Sequence[Tensor]) -> int:
    """Return the operations of linear layers over all tokens, and of attention among those of each sample."""
    samples = tokens.unbind() if tokens.is_nested else tokens
    lengths = [one.shape[0] for one in samples]
    linear = 2 * sum(lengths) * sum(one.numel() for one in weights)
    return linear + 4 * width * sum(length**2 for length in lengths)


def _trilinear(first: Tensor, second: Tensor, third: Tensor, *expanded: Any) -> int:  # noqa: ANN401
    at_first, at_second, at_third = (set(dims) for dims in expanded[:3])
    volume = 1
    for dim in range(first.dim() + len(at_first)):
        volume *= max(_size(one, at, dim) for one, at in ((first, at_first), (second, at_second), (third, at_third)))
    return 3 * volume


def _size(tensor: Tensor, expanded: set[int], dim: int) -> int:
    return 1 if dim in expanded else tensor.shape[dim - sum(one < dim for one in expanded)]


def _batch(*shapes: torch.Size) -> int:
    return prod(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _distances(first: Tensor, second: Tensor, *_: object) -> int:
    return 2 * _batch(first.shape[:-2], second.shape[:-2]) * first.shape[-2] * second.shape[-2] * first.shape[-1]


def _transform(numbers: int, sizes: Iterable[int], each: float) -> int:
    return round(each * numbers * log2(prod(sizes)))


def _from_complex_to_real(entered: Tensor, dims: Sequence[int], _: int, last: int) -> int:
    sizes = [*(entered.shape[dim] for dim in dims[:-1]), last]
    return _transform(entered.numel() // entered.shape[dims[-1]] * last, sizes, 2.5)


def _triangular(matrix: Tensor, right: Tensor) -> int:
    """Return the operations of the two triangular systems for right sides of shape (..., n) or (..., n, k)."""
    vector = right.dim() == 1 or (right.dim() == matrix.dim() - 1 and right.shape == matrix.shape[:-1])
    dims = 1 if vector else 2
    return 2 * matrix.shape[-1] * _batch(matrix.shape[:-2], right.shape[:-dims]) * right.shape[-dims:].numel()


def _solve(matrix: Tensor, right: Tensor, *_: object) -> int:
    return round(2 / 3 * matrix.shape[-1] * matrix.numel()) + _triangular(matrix, right)


def _grouped(first: Tensor, second: Tensor, *_: object) -> int:
    flat = first.dim() == 3 and second.dim() == 2  # groups of columns
    return 2 * first.shape[-2] * second.numel() if flat else 2 * first.numel() * second.shape[-1]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: object) -> int:
    pairs = query.shape[:3].numel() * key.shape[2]  # of each sample and head
    return 2 * pairs * (key.shape[3] + value.shape[3])


def _attention_backward(_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> int:
    pairs = query.shape[:3].numel() * key.shape[2]  # the products are computed once more
    return 2 * pairs * (3 * key.shape[3] + 2 * value.shape[3])


_ATTENTION = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
_MORE: dict[str, Callable[..., int]] = {
    "aten.mkldnn_rnn_layer": _layer,
    "aten.mkldnn_rnn_layer_backward": lambda *args: 2 * _layer(*args),
    "aten._cudnn_rnn": _layers,
    "aten._cudnn_rnn_backward": _layers_backward,
    "aten.miopen_rnn": _layers,
    "aten.miopen_rnn_backward": _layers_backward,
    **{f"aten._scaled_dot_product_{kind}": _attention for kind in _ATTENTION},
    **{f"aten._scaled_dot_product_{kind}_backward": _attention_backward for kind in _ATTENTION},
    "aten._native_multi_head_attention": lambda *args: _encoder(args[0], args[3], (args[5], args[7])),
    "aten._transformer_encoder_layer_fwd": lambda *args: _encoder(
        args[0], args[1], (args[3], args[5], args[14], args[16])
    ),
    "aten._trilinear": _trilinear,
    "aten.mv": lambda first, *_: 2 * first.numel(),
    "aten.addmv": lambda _, first, *__: 2 * first.numel(),
    "aten.dot": lambda first, *_: 2 * first.numel(),
    "aten.vdot": lambda first, *_: 2 * first.numel(),
    "aten.addbmm": lambda _, first, second, *__: 2 * first.numel() * second.shape[-1],
    "aten._addmm_activation": lambda _, first, second, *__: 2 * first.numel() * second.shape[-1],
    "aten._grouped_mm": _grouped,
    "aten._euclidean_dist": _distances,
    "aten._cdist_forward": _distances,
    "aten._cdist_backward": lambda gradient, first, *_: 2 * gradient.numel() * first.shape[-1],
    "aten._fft_c2c": lambda entered, dims, *_: _transform(entered.numel(), [entered.shape[dim] for dim in dims], 5),
    "aten._fft_r2c": lambda entered, dims, *_: _transform(entered.numel(), [entered.shape[dim] for dim in dims], 2.5),
    "aten._fft_c2r": _from_complex_to_real,
    "aten._linalg_solve_ex": _solve,
    "aten.linalg_lu_solve": lambda matrix, _, right, *__: _triangular(matrix, right),
}
