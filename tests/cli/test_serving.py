"""`cutlayer serve` and `predict --served`: a server process, clients with certificates of their own, quotas."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch

from cutlayer.cli.console import Output
from cutlayer.cli.serving import _telling
from cutlayer.core.quota import Quota, Serving
from cutlayer.run.config import load_contract
from cutlayer.run.limits import QuotaTable, ServingTable
from cutlayer.run.partyfile import load_party_file, write_party_file
from cutlayer.transport.pki import create_authority, issue
from tests.cli.conftest import write_site
from tests.run.cluster import free_ports

pytestmark = pytest.mark.timeout(90)
Call = Callable[..., Any]
ALL = ("contract.toml", "hospital.toml", "server.toml")
TAIL = """
[[stage]]
name = "tail"
at = "hospital"
inputs = ["body"]
output = "float32[batch, 2]"
"""
SERVING = """
[serving]
batch = 1
[serving.quotas.clinic-1]
samples = 40
"""


@pytest.fixture
def trained(demo: Path, call: Call) -> Path:
    """The demo as a U-shape, trained into `out`; certificates for the server and two clinics in the hospital's role."""
    contract, code = (demo / "contract.toml").read_text(), (demo / "parties.py").read_text()
    contract = contract.replace('inputs = ["body", "data.y"]', 'inputs = ["tail", "data.y"]')
    contract = contract.replace("\n[[loss]]", f"{TAIL}\n[[loss]]").replace("7443", str(free_ports(1)[0]))
    (demo / "contract.toml").write_text(contract)
    code = code.replace('{"head": linear(4, 8), ', '{"head": linear(4, 8), "tail": linear(2, 2), ')
    code = code.replace("evaluation=table(20, 2), ", 'prediction=TensorTable(x=table(37, 3).fields["x"]), ')
    (demo / "parties.py").write_text(code)
    assert call("run", *ALL, "--folder", "out", "-q").code == 0
    authority = create_authority(demo / "ca", name="study")
    for name in ("server", "clinic-1", "clinic-2"):
        issue(authority, name, demo / "credentials")
    write_site(demo, "server", 'credentials = "credentials/server"', SERVING)
    write_site(demo, "hospital", 'credentials = "credentials/clinic-1"\nidentity = "clinic-1"')
    return demo


@pytest.fixture
def server(trained: Path) -> Iterator[subprocess.Popen[str]]:
    digest = load_contract(trained / "contract.toml").digest()
    words = ["serve", "contract.toml", "server.toml", "--weights", "out", "--accept", digest, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cutlayer", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_clients_ask_a_server_in_another_process(server: Any, trained: Path, call: Call, number: signal.Signals):
    assert call("predict", *ALL, "--weights", "out", "--folder", "here").code == 0
    digest = load_contract(trained / "contract.toml").digest()
    words = ("predict", "contract.toml", "hospital.toml", "--served", "--weights", "out", "--accept", digest)
    result = call(*words, "--folder", "asked")
    assert result.code == 0, result.err
    assert "sends   activations of head to server: float32[batch, 8], 512 bytes a batch" in "\n".join(result.err)
    here, asked = (
        safetensors.torch.load_file(trained / name / "predictions.safetensors") for name in ("here", "asked")
    )
    assert torch.equal(asked["tail"], here["tail"])
    again = call(*words, "--folder", "again")
    assert again.code == 4
    assert again.err[-4] == "E614 'clinic-1' has used up its quota"
    assert again.err[-2].startswith(
        "  why:   expected at most 40 samples in 60 s, got 3 requests and 37 samples so far"
    )
    assert "ask again in " in again.err[-1]
    server.send_signal(number)
    out, err = server.communicate(timeout=30)
    assert server.returncode == 0, err
    told = json.loads(out)
    assert told["identities"]["clinic-1"]["sessions"] == 1
    assert told["identities"]["clinic-1"]["refused"] == 1
    assert (told["requests"], told["forwards"], told["largest"]) == (3, 3, 16)
    lines = err.splitlines()
    assert any(line.startswith("serving at 127.0.0.1:") for line in lines)
    assert any("clinic-1: session 1, 37 samples, done in" in line for line in lines)
    assert "sends   activations of body to hospital" in err


def test_a_plan_that_cannot_be_served(demo: Path, call: Call):
    result = call("serve", "contract.toml", "server.toml")
    assert result.code == 1
    assert result.err[-4] == "E453 a prediction of the plan 'demo' cannot be served"
    assert "the output 'body' stays at server" in result.err[-2]


def test_what_leaves_is_accepted_first(trained: Path, call: Call):
    result = call("serve", "contract.toml", "server.toml", "--weights", "out")
    assert (result.code, result.err[-4][:4]) == (2, "E207")
    assert "served to clients in the role of hospital" in "\n".join(result.err)
    result = call("predict", "contract.toml", "server.toml", "--served")
    assert (result.code, result.err[-4][:4]) == (1, "E454")


@pytest.mark.parametrize(("table", "kind"), [(ServingTable, Serving), (QuotaTable, Quota)])
def test_the_file_has_the_limits_of_the_api(table: Any, kind: Any):
    here, there = table(), kind()
    assert list(kind.__dataclass_fields__) == [info.name for info in msgspec.structs.fields(table)]
    for info in msgspec.structs.fields(table):
        value = getattr(there, info.name)
        assert getattr(here, info.name) == (QuotaTable() if info.name == "quota" else value), info.name


def test_limits_survive_writing(trained: Path):
    file = load_party_file(trained / "server.toml")
    assert file.serving == Serving(batch=1, quotas={"clinic-1": Quota(samples=40)})
    (trained / "again.toml").write_text(write_party_file(file))
    assert load_party_file(trained / "again.toml").serving == file.serving
    assert load_party_file(trained / "hospital.toml").identity == "clinic-1"


@pytest.mark.parametrize("verbose", [False, True])
def test_who_comes_and_goes_is_said(verbose: bool, capsys: pytest.CaptureFixture[str]):
    tell = _telling(Output(False, False, verbose))
    facts = {"identity": "anna", "session": 3, "role": "hospital", "samples": 2000, "requests": 5}
    tell("came", facts)
    tell("went", {**facts, "seconds": 1.234, "code": "E701"})
    tell("refused", {"identity": "ben", "code": "E612", "what": "all places at server are taken"})
    tell("closing", {"seconds": 30.0})
    lines = capsys.readouterr().err.splitlines()
    assert lines[-3:] == [
        "anna: session 3, 2,000 samples, E701 after 1.23 s",
        "ben: refused, E612 all places at server are taken",
        "closing: sessions have 30 s to end",
    ]
    assert lines[:-3] == (["anna: session 3 for 2,000 samples"] if verbose else [])
