"""A loop's scaling of its loss (`torch.amp.GradScaler`): refused where it would leak into what other parties get.

| code | error | meaning |
| --- | --- | --- |
| E351 | NonFiniteError | a scaled gradient about to leave is not finite |
| E442 | ProgramError | a scaler scales the loss that the session does not know, or its own one does not |
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.amp import GradScaler

from cutlayer.errors import NonFiniteError, ProgramError

__all__ = ["check_scale", "check_stepper", "scale_of", "unscaled"]

_LEAST = 8  # a power of two from 2^8 on, times what a gradient should begin with, may be a scaler's


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


def check_scale(scaler: GradScaler | None, gradient: Tensor, due: float, where: str, factors: set[int]) -> None:
    """Refuse a loss that a `GradScaler` scales of which the session does not know: others would step with that scale.

    A factor of the loop's own is let through: others get gradients that are as many times larger or smaller.

    Args:
        scaler: The session's.
        gradient: What has come to the loss, or to what `remote` gave last. Others are not looked at.
        due: What it should be without a scale.
        where: Party and round.
        factors: Powers of two that are known for the loop's own; others are added, as all scalers are looked through.

    Raises:
        ProgramError: E442, it is `due` times the scale of another enabled scaler of this process, or `due` itself where
            the session's scaler has a large scale.
    """
    if gradient.numel() != 1 or due <= 0:
        return
    times, scale = abs(float(gradient)) / due, scale_of(scaler)
    if times == 0 or not math.isfinite(times):
        return
    if scale >= 2**_LEAST and math.isclose(times, 1, rel_tol=1e-6):
        raise ProgramError(
            "the session has a scaler, and the loss is not scaled by it",
            where=where,
            expected=f"a backward that begins with {due * scale:g}",
            got=f"{times * due:g}",
            remedy="scale the loss: session.scaler.scale(loss).backward(); or leave session.scaler out",
            code="E442",
        )
    power = math.log2(times / scale)
    whole = round(power)
    if whole < _LEAST or abs(power - whole) > 1e-6 or whole in factors:
        return
    scalers = [one for one in gc.get_objects() if issubclass(type(one), GradScaler) and one is not scaler]
    if any(one.is_enabled() and one.get_scale() == 2.0**whole for one in scalers):
        got = f"{2.0**whole:g} times that, the scale of another GradScaler than session.scaler"
        raise _unknown(where, f"a backward that begins with {due * scale:g}", got)
    factors.add(whole)


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
