"""A loop's scaling of its loss (`torch.amp.GradScaler`): refused where it would leak into what other parties get.

| code | error | meaning |
| --- | --- | --- |
| E351 | NonFiniteError | a scaled gradient about to leave is not finite |
| E442 | ProgramError | a loss is scaled otherwise than the session knows |
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.amp import GradScaler

from cutlayer.errors import NonFiniteError, ProgramError

__all__ = ["check_scale", "check_stepper", "scale_of", "unscaled"]

_LEAST = 8  # a power of two from 2^8 on, times what a gradient should begin with, is taken for a scaler's


def scale_of(scaler: GradScaler | None) -> float:
    """Return what this party's own gradients are times: 1 without a scaler, or with one that is disabled."""
    return 1.0 if scaler is None else float(scaler.get_scale())


def unscaled(gradients: Sequence[Tensor | None], scale: float, where: str, *, finite: bool) -> list[Tensor | None]:
    """Return gradients about to leave without their scale, as its powers of two divide exactly.

    Args:
        gradients: At what `remote` gave.
        scale: What they are times.
        where: Party and round.
        finite: Whether a NaN or an infinity is refused.

    Raises:
        NonFiniteError: E351, one is not finite; the remedy is the scaler's.
    """
    if scale == 1:
        return list(gradients)
    if finite and not all(one is None or bool(torch.isfinite(one).all()) for one in gradients):
        raise NonFiniteError(
            "a scaled gradient at a cut holds a NaN or an infinity",
            where=where,
            expected="finite numbers",
            got=f"an overflow at the scale {scale:g}",
            remedy="give the GradScaler a lower init_scale, or use bfloat16, which needs no scaler",
            code="E351",
        )
    return [None if one is None else one / scale for one in gradients]


def check_scale(scaler: GradScaler | None, gradient: Tensor, due: float, where: str) -> None:
    """Refuse a loss whose scale the session does not know: others would step with gradients of that scale.

    Args:
        scaler: The session's.
        gradient: What has come to the loss, or to what `remote` gave last. Others are not looked at.
        due: What it should be without a scale.
        where: Party and round.

    Raises:
        ProgramError: E442, it is a power of two times what it should be, or a part of it, and a large one.
    """
    if gradient.numel() != 1 or due <= 0:
        return
    times, scale = abs(float(gradient)) / due, scale_of(scaler)
    if times == 0 or not math.isfinite(times):
        return
    power = math.log2(times / scale)
    if abs(power) < _LEAST or abs(power - round(power)) > 1e-6:
        return
    if power > 0:
        raise _unknown(where, f"a backward that begins with {due * scale:g}", f"{times / scale:g} times that")
    raise ProgramError(
        "the session has a scaler, and the loss is not scaled by it",
        where=where,
        expected=f"a backward that begins with {due * scale:g}",
        got=f"{times * due:g}",
        remedy="scale the loss: session.scaler.scale(loss).backward(); or leave session.scaler out",
        code="E442",
    )


def check_stepper(scaler: GradScaler | None, where: str) -> None:
    """Refuse a step of the optimizer that another scaler than the session's takes, before it moves a weight.

    A loss that is a function has no hook that `check_scale` could be called in; who steps can be seen in the callers.

    Raises:
        ProgramError: E442, an enabled scaler that the session was not told of takes the step.
    """
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(found, GradScaler) and found.is_enabled() and found is not scaler:
            told = "none" if scaler is None else "another"
            raise _unknown(where, "a step of session.scaler", f"a step of a scaler, and session.scaler is {told}")
        frame = frame.f_back  # type: ignore[assignment]


def _unknown(where: str, expected: str, got: str) -> ProgramError:
    return ProgramError(
        "the loss is scaled, and the session does not know the scaler",
        where=where,
        expected=expected,
        got=got,
        remedy="tell it before the first round: session.scaler = scaler; then what crosses is not scaled",
        code="E442",
    )
