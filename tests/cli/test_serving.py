"""`cutlayer serve` and `predict --served`: a server process, clients with certificates of their own, quotas."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch

import cutlayer as cl
from cutlayer.cli.app import Where
from cutlayer.cli.console import Output
from cutlayer.cli.serving import _telling
from cutlayer.core.quota import Quota, Serving
from cutlayer.run.config import load_contract
from cutlayer.run.limits import QuotaTable, ServingTable
from cutlayer.run.partyfile import load_party_file, write_party_file
from cutlayer.run.prediction import WAIT
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
    log, until = trained / "server.log", time.monotonic() + 60
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "cutlayer", *words], stdout=subprocess.PIPE, stderr=file, text=True
        )
    while "serving at" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until
        time.sleep(0.05)
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
    out, _ = server.communicate(timeout=30)
    err = (trained / "server.log").read_text()
    assert server.returncode == 0, err
    told = json.loads(out)
    assert told["identities"]["clinic-1"]["sessions"] == 1
    assert told["identities"]["clinic-1"]["refused"] == 1
    assert (told["requests"], told["forwards"], told["largest"]) == (3, 3, 16)
    lines = err.splitlines()
    assert any(line.startswith("serving at 127.0.0.1:") for line in lines)
    assert any("clinic-1: session 1, 37 samples, done in" in line for line in lines)
    assert "sends   activations of body to hospital" in err


def test_a_program_asks_a_server_of_the_command_line(server: Any, trained: Path, call: Call):
    """As the page shows it: both compare the contract's digest, which no plan alone gives."""
    assert call("predict", *ALL, "--weights", "out", "--folder", "here").code == 0
    here = safetensors.torch.load_file(trained / "here" / "predictions.safetensors")["tail"]
    (trained / "hospital.toml").rename(trained / "ward.toml")
    rows = cl.load_site(Path("contract.toml"), Path("ward.toml")).party.prediction.fields["x"]
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "serve-predictions.md").read_text()
    once, many = re.findall(r"```python\n(.*?)```", page, re.S)
    known = {"cl": cl, "Path": Path, "run": Path("out"), "wards": [rows[:1], rows[:2]]}
    exec(compile(many, "serve-predictions.md", "exec"), known)  # noqa: S102 - our own page
    torch.testing.assert_close(known["outputs"], here[:2], rtol=1e-6, atol=1e-6)
    exec(compile(once, "serve-predictions.md", "exec"), known)  # noqa: S102 - our own page
    assert torch.equal(known["outputs"]["tail"], here)


def test_a_server_that_is_killed_after_the_last_prediction_does_no_harm(server: Any, trained: Path):
    site = cl.load_site(Path("contract.toml"), Path("hospital.toml"))
    with cl.connect(site.plan, site.party, network=site.network, weights=Path("out"), wait=1) as connection:
        assert connection.predict(cl.TensorTable(x=torch.zeros(3, 4)))["tail"].shape == (3, 2)
        server.kill()
        server.wait(10)


SLOW = """

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, place):
        if place >= 16:
            time.sleep(0.3)
        return {"x": torch.zeros(4)}
"""


def test_a_server_that_is_killed_ends_a_prediction_soon_and_says_what_to_do(server: Any, trained: Path):
    """A prediction cannot be resumed: it must not wait as long as a training, nor say `resume`."""
    code = (trained / "parties.py").read_text()
    code = code.replace('prediction=TensorTable(x=table(37, 3).fields["x"])', "prediction=Slow()")
    (trained / "parties.py").write_text(f"import time\n{code}{SLOW}")
    digest = load_contract(trained / "contract.toml").digest()
    words = ["predict", "contract.toml", "hospital.toml", "--served", "--weights", "out", "--accept", digest]
    client = subprocess.Popen(
        [sys.executable, "-m", "cutlayer", *words, "--folder", "asked", "--wait", "2"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        events, until = trained / "asked" / "metrics.jsonl", time.monotonic() + 60
        while not (events.exists() and '"step"' in events.read_text()):
            assert client.poll() is None, client.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        server.kill()
        killed = time.monotonic()
        _, err = client.communicate(timeout=60)
    finally:
        client.kill()
    assert time.monotonic() - killed < 30  # the contract says patience = 60
    assert client.returncode == 5
    lines = err.splitlines()
    assert "E701 server is lost. Waiting for it; if it does not come back, run the prediction again" in lines
    assert lines[-4] == "E701 server was lost and did not come back"
    assert "expected its return within 2 seconds" in lines[-2]
    assert "ask the operator of server whether it is served; then run the prediction again" in lines[-1]
    assert "resume" not in err


def test_a_server_that_is_not_there_is_not_waited_for_long(trained: Path, call: Call):
    digest = load_contract(trained / "contract.toml").digest()
    begin = time.monotonic()
    words = ("predict", "contract.toml", "hospital.toml", "--served", "--weights", "out", "--accept", digest)
    result = call(*words, "--wait", "1")
    assert time.monotonic() - begin < 30  # the contract says join = 60
    assert (result.code, result.err[-4]) == (5, "E702 server did not come")
    assert "within 1 seconds" in result.err[-2]
    assert "ask the operator of server whether `cutlayer serve` runs there" in result.err[-1]


def test_weights_that_are_not_there_are_told_before_the_server_is_asked(trained: Path, call: Call):
    digest = load_contract(trained / "contract.toml").digest()
    words = ("predict", "contract.toml", "hospital.toml", "--served", "--weights", "absent", "--accept", digest)
    result = call(*words)  # nobody serves
    assert (result.code, result.err[-4]) == (6, "E811 a trained party cannot be read")
    assert "absent/hospital.safetensors" in result.err[-3]


def test_the_default_of_wait_is_that_of_the_api():
    assert Where().wait == WAIT == 15


def test_a_plan_that_cannot_be_served(demo: Path, call: Call):
    result = call("serve", "contract.toml", "server.toml")
    assert result.code == 1
    assert result.err[-4] == "E453 a prediction of the plan 'demo' cannot be served"
    assert "the output 'body' stays at server" in result.err[-2]


def test_what_leaves_with_an_answer_is_shown(demo: Path, call: Call):
    """The demo's outputs are at the server: its contract must say that they may go to a client."""
    contract = demo / "contract.toml"
    contract.write_text(contract.read_text() + '\n[[answer]]\nof = "body"\nto = "head"\n')
    shown = {}
    for words in (("serve", "contract.toml", "server.toml"), ("predict", "contract.toml", "hospital.toml", "--served")):
        result = call(*words)
        assert (result.code, result.err[-4][:4]) == (2, "E207")
        shown[words[0]] = "\n".join(result.err)
    assert "  sends   activations of body to hospital: float32[batch, 2], 128 bytes a batch" in shown["serve"]
    assert "served to clients in the role of hospital" in shown["serve"]
    assert "  gets    activations of body from server: float32[batch, 2], 128 bytes a batch" in shown["predict"]


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
    tell("went", {**facts, "seconds": 1.234, "code": "E701", "what": "anna was lost and did not come back"})
    tell("went", {**facts, "seconds": 1.234, "code": "E390", "what": ""})
    tell("refused", {"identity": "ben", "code": "E612", "what": "all places at server are taken"})
    tell("closing", {"seconds": 30.0})
    lines = capsys.readouterr().err.splitlines()
    assert lines[-4:] == [
        "anna: session 3, 2,000 samples, E701 after 1.23 s: anna was lost and did not come back",
        "anna: session 3, 2,000 samples, E390 after 1.23 s",
        "ben: refused, E612 all places at server are taken",
        "closing: predictions under way have 30 s to end",
    ]
    assert lines[:-4] == (["anna: session 3 for 2,000 samples"] if verbose else [])
