"""cutlayer: split learning. One network, its parts at different organisations, no raw data shared.

Public names are those of `__all__`; everything else is reached through submodules and may change. Names are loaded
when first used, so that `import cutlayer` and the command line's help cost no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cutlayer.core.crossing import Crossing, PlannedExchange
    from cutlayer.core.parts import Answer, Loss, Release, Shared, Stage, Training
    from cutlayer.core.plan import Plan
    from cutlayer.core.quota import Quota, Serving
    from cutlayer.core.spec import TensorSpec
    from cutlayer.core.topologies import extended_vanilla, hybrid, multihop, multitask, u_shaped, vanilla, vertical
    from cutlayer.data.sources import TensorTable
    from cutlayer.errors import CutlayerError
    from cutlayer.fitting import fit
    from cutlayer.models.split import split
    from cutlayer.run.connection import Connection, connect
    from cutlayer.run.export import assemble
    from cutlayer.run.loop import session
    from cutlayer.run.outcome import Result
    from cutlayer.run.party import Party
    from cutlayer.run.prediction import predict
    from cutlayer.run.serving import Served, serve
    from cutlayer.run.session import join
    from cutlayer.run.simulate import simulate
    from cutlayer.run.site import LocalSite, load_site
    from cutlayer.transport.settings import NetworkSettings
    from cutlayer.transport.tls import load_credentials

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Connection",
    "Crossing",
    "CutlayerError",
    "LocalSite",
    "Loss",
    "NetworkSettings",
    "Party",
    "Plan",
    "PlannedExchange",
    "Quota",
    "Release",
    "Result",
    "Served",
    "Serving",
    "Shared",
    "Stage",
    "TensorSpec",
    "TensorTable",
    "Training",
    "assemble",
    "connect",
    "extended_vanilla",
    "fit",
    "hybrid",
    "join",
    "load_credentials",
    "load_site",
    "multihop",
    "multitask",
    "predict",
    "serve",
    "session",
    "simulate",
    "split",
    "u_shaped",
    "vanilla",
    "vertical",
]

_HOMES = {
    "Answer": "core.parts",
    "Connection": "run.connection",
    "Crossing": "core.crossing",
    "CutlayerError": "errors",
    "LocalSite": "run.site",
    "Loss": "core.parts",
    "NetworkSettings": "transport.settings",
    "Party": "run.party",
    "Plan": "core.plan",
    "PlannedExchange": "core.crossing",
    "Quota": "core.quota",
    "Release": "core.parts",
    "Result": "run.outcome",
    "Served": "run.serving",
    "Serving": "core.quota",
    "Shared": "core.parts",
    "Stage": "core.parts",
    "TensorSpec": "core.spec",
    "TensorTable": "data.sources",
    "Training": "core.parts",
    "assemble": "run.export",
    "connect": "run.connection",
    "extended_vanilla": "core.topologies",
    "fit": "fitting",
    "hybrid": "core.topologies",
    "join": "run.session",
    "load_credentials": "transport.tls",
    "load_site": "run.site",
    "multihop": "core.topologies",
    "multitask": "core.topologies",
    "predict": "run.prediction",
    "serve": "run.serving",
    "session": "run.loop",
    "simulate": "run.simulate",
    "split": "models.split",
    "u_shaped": "core.topologies",
    "vanilla": "core.topologies",
    "vertical": "core.topologies",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module, when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cutlayer' has no attribute {name!r}")
    return getattr(import_module(f"cutlayer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*__all__, "__version__"])
