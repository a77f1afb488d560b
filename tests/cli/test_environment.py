"""`cutlayer env`: all that a bug report needs, and nothing that tells whose machine it is."""

from __future__ import annotations

import getpass
import json
import socket
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.cli import environment
from cutlayer.data import bundled

Call = Callable[..., Any]
SECRET = "s3cr3t-W0rd"


def test_versions_machine_and_data_sets(call: Call):
    result = call("env")
    assert (result.code, result.err) == (0, [])
    shown = "\n".join(result.out)
    assert f"cutlayer: {version('cutlayer')}" in shown
    assert f"  version: {version('torch')}" in shown
    assert f"  grpcio: {version('grpcio')}" in shown
    assert f"python: {sys.version.split()[0]} (CPython)" in shown
    assert "  usable: " in shown
    assert result.out[-1].startswith("all of this may go into a bug report")
    assert call("env", "-q").out == [result.out[-1]]


def test_the_document(call: Call):
    found = call("env", "--json").json()
    assert set(found) == {
        "cutlayer", "python", "system", "processors", "memory", "torch", "libraries", "proxies", "data_sets",
    }  # fmt: skip
    assert found["processors"]["present"] >= found["processors"]["usable"] >= 1
    assert found["memory"]["installed"] > 10**8
    assert (found["torch"]["version"], found["torch"]["threads"]) == (version("torch"), torch.get_num_threads())
    assert found["libraries"]["msgspec"] == version("msgspec")
    assert not {"torch", "pytest", "ruff"} & set(found["libraries"])  # torch has its own part, the others are ours
    assert list(found["libraries"]) == sorted(found["libraries"], key=str.lower)


def test_every_bundled_data_set_is_named(call: Call):
    loaders = {name for name in bundled.__all__ if callable(getattr(bundled, name))}
    assert set(environment.DATA_SETS) <= loaders
    assert set(call("env", "--json").json()["data_sets"]) == set(environment.DATA_SETS)


def test_nothing_tells_whose_machine_it_is(call: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTPS_PROXY", f"http://doctor:{SECRET}@proxy.hospital.example:3128")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,intranet.hospital.example")
    text = json.dumps(call("env", "--json").json()) + "\n".join(call("env").out)
    assert '"https"' in text
    for private in (SECRET, "hospital.example", "10.0.0.0", socket.gethostname(), str(Path.home()), str(Path.cwd())):
        assert private not in text
    assert getpass.getuser() not in text.replace("root", "") or getpass.getuser() == "root"


def test_a_torch_that_cannot_be_loaded_is_a_finding(call: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = call("env", "--json")
    assert result.code == 0
    assert result.json()["torch"] == {"version": version("torch"), "cannot_be_loaded": "ModuleNotFoundError"}


def test_what_is_missing_is_said(call: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "_libraries", lambda: ["no-such-library"])
    monkeypatch.setattr(environment, "memory_limit", lambda: None)
    monkeypatch.setattr(environment.urllib.request, "getproxies", dict)
    shown = call("env").out
    assert "  no-such-library: none" in shown
    assert "  limit: none" in shown
    assert "proxies: none" in shown
