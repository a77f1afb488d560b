"""What to do when a module fails, or gives another tensor than the plan says. Pure: dtypes and shapes, never values.

The texts go to the other parties too, so they hold nothing that only this party may know.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cutlayer.core.spec import TensorSpec
from cutlayer.engine.tensors import dtype_name

__all__ = ["after_failure", "for_other_tensor"]

_UNLIKE = re.compile("same dtype|should be the same|expected scalar type|not implemented for|Found dtype|mixed dtype")
_UNFIT = re.compile(
    r"shapes cannot be multiplied|to have \d+ channels|expected input with shape|should contain \d+ elements|"
    r"must be equal to input_size|expecting embedding dimension"
)
_NAMES = {  # in lower case, what torch's errors call a dtype
    torch.float64: ("double",),
    torch.float32: ("float",),
    torch.float16: ("half",),
    torch.bfloat16: ("bfloat16",),
    torch.uint8: ("byte", "unsigned char"),
    torch.int8: ("signed char", "char"),
    torch.int16: ("short",),
    torch.uint16: ("uint16", "short unsigned"),
    torch.int32: ("int",),
    torch.int64: ("long",),
    torch.bool: ("bool",),
}
_CASTS = {torch.float32: ".float()", torch.float64: ".double()"}
_FLOATS = frozenset({"float32", "bfloat16", "float16"})


def after_failure(module: nn.Module, inputs: Sequence[Tensor], error: Exception) -> str:
    """Return what most likely helps a module that raised `error` on `inputs`."""
    words = str(error)
    if "Expected more than 1 value per channel" in words:
        return "BatchNorm needs two samples a microbatch: set drop_last, or fewer microbatches"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in words:
        return "take more microbatches, or a smaller batch"
    if isinstance(error, IndexError) and "out of range in self" in words:
        return "an id is outside of an embedding's table: give ids in 0..num_embeddings-1, or a larger table"
    if "is a view and is being modified inplace" in words:
        return "the module writes in place to one of several views: let it take x.clone() first"
    if "modified by an inplace operation" in words or "its base has been modified inplace" in words:
        return "a stage or loss writes in place to what this one needs for its backward: let it take x.clone() first"
    if "scalar types: Long, Int" in words:
        return "an embedding takes whole numbers: give the ids as int64, .long() in the data set"
    weights = next((one.dtype for one in module.parameters() if one.is_floating_point()), None)
    if weights is not None and _UNLIKE.search(words) and _named(inputs, weights, words.lower()):
        cast = _CASTS.get(weights, f".to({weights})")
        where = f"{cast} in the data set, or in the stage before"
        return f"give the inputs in the dtype of the module's weights, {dtype_name(weights)}: {where}"
    if _UNFIT.search(words):
        return "the inputs have another size than a layer takes: compare them with the data, the plan and the module"
    return "run the module alone on inputs of these shapes"


def _named(inputs: Sequence[Tensor], weights: torch.dtype, words: str) -> bool:
    """Whether an error speaks of the dtype of an input that is not the weights'; ids may be whole for good."""
    others = {value.dtype for value in inputs} - {weights}
    if "mixed dtype" in words:  # of a normalisation, which does not say which
        return any(dtype.is_floating_point for dtype in others)
    return any(name in words for dtype in others for name in _NAMES.get(dtype, ()))


def for_other_tensor(spec: TensorSpec, output: Tensor, batch: int, autocast: torch.dtype | None) -> str:
    """Return what to do about an output that is not of its spec, from a module that ran under `autocast`."""
    want, given = spec.concrete(batch), tuple(output.shape)
    kind = dtype_name(output.dtype)
    if kind != spec.dtype and {kind, spec.dtype} <= _FLOATS and not spec.mismatch(spec.dtype, given, batch):
        if autocast is not None and kind == dtype_name(autocast):
            return f"the party runs under autocast, the plan does not: give cl.split(autocast={kind!r}) too, or neither"
        if autocast is None and spec.dtype != "float32":
            return (
                f"if the plan was made for autocast, run the party under it: Party(autocast={spec.dtype!r}); else "
                "correct the plan or the module"
            )
    if len(given) == len(want) and given[:1] == want[:1] and given != want:
        return (
            "correct the stage's output in the plan, or the module; a length that changes with the batch needs "
            "longest= of cl.split, or a free dimension in the plan, such as time<=512"
        )
    return "correct the stage's output in the plan, or the module"
