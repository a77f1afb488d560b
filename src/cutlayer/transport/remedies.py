"""What to do when a party is not there: a training is resumed, a prediction is run again. Pure.

A prediction keeps no checkpoints. Who asks a served stage can start nothing at the server: its operator can.
"""

from __future__ import annotations

from cutlayer.transport.settings import NetworkSettings

__all__ = ["when_absent", "when_left", "when_lost"]


def when_lost(settings: NetworkSettings, names: str) -> str:
    """Return what to do when `names` were lost and did not come back."""
    if settings.task == "training":
        return f"restart {names}, then all others, with resume; if it needs longer, raise deadlines.patience"
    return _again(settings, names, ", --wait for longer")


def when_left(settings: NetworkSettings, name: str) -> str:
    """Return what to do when `name` left before the end."""
    if settings.task == "training":
        return f"look at {name}'s terminal; then start all parties with resume"
    return _again(settings, name, "")


def when_absent(settings: NetworkSettings, names: str, limit: str) -> str:
    """Return what to do when `names` did not come, or did not get ready, within the deadline called `limit`."""
    if settings.task == "served" and not settings.coordinates:
        return f"ask the operator of {names} whether `cutlayer serve` runs there, and its address; then run it again"
    look = "its terminal says what it could tell nobody, such as a wrong certificate"
    return f"start {names} with the same contract; {look}; if starting takes long, raise deadlines.{limit}"


def _again(settings: NetworkSettings, names: str, longer: str) -> str:
    """Say how a prediction is run again; `longer`: how to wait longer, if that may help."""
    if settings.task != "served":
        return f"look at {names}'s terminal; then run the prediction again at all parties{longer}"
    if settings.coordinates:
        return f"let {names} run the prediction again"
    return f"ask the operator of {names} whether it is served; then run the prediction again{longer}"
