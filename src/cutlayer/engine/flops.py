"""Floating-point operations, by the formulas of `torch.utils.flop_counter`, without a change of what is computed.

`FlopCounterMode` takes some operations apart while it counts (the backward of SiLU, for one), and the parts round
otherwise than the whole: the first step of a run would have other last bits than the same step uncounted. Outside
inference mode autograd has taken apart all that has to be, so counting the operations as they come is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["FlopCounter"]


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, within `with`, the operations for which torch knows a formula (matrix products, convolutions, attention).

    A multiplication with an addition counts as two.
    """

    def __init__(self) -> None:
        """Begin at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

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
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **given, out_val=result))
        return result
