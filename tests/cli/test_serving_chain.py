"""`cutlayer serve` at two servers of the chain that the page shows, and a client that asks them."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cutlayer.run.config import load_contract
from cutlayer.transport.pki import create_authority, issue
from tests.cli.conftest import CODE, write_site
from tests.run.cluster import free_ports

pytestmark = pytest.mark.timeout(120)
Call = Callable[..., Any]
ALL = ("contract.toml", "hospital.toml", "hub.toml", "cloud.toml")
CONTRACT = """
[contract]
name = "demo"
coordinator = "cloud"
{chain}
[training]
epochs = 1
batch_size = 16

[deadlines]
join = 60
patience = 60
receive = 60
"""
MODULES = """

def hospital(name):
    modules = {"head": linear(4, 8), "tail": linear(8, 2), "loss": nn.functional.cross_entropy}
    x = table(37, 3).fields["x"]
    return Party(name, modules=modules, data=table(40, 1), prediction=TensorTable(x=x), optimizer=adam, seed=1)


def hub(name):
    return Party(name, modules={"near": linear(8, 8)}, optimizer=adam, seed=2)


def cloud(name):
    return Party(name, modules={"far": linear(8, 8)}, optimizer=adam, seed=3)
"""


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> Path:
    """The chain of the page, trained into `out`; the client comes with the certificate of a ward."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "serve-predictions.md").read_text()
    (shown,) = (text for text in re.findall(r"```toml[^\n]*\n(.*?)```", page, re.S) if 'name = "near"' in text)
    for name, port in zip(("hub", "cloud"), free_ports(2), strict=True):
        shown = shown.replace(f"{name}.example:7443", f"127.0.0.1:{port}")
    (tmp_path / "contract.toml").write_text(CONTRACT.format(chain=shown))
    (tmp_path / "parties.py").write_text(CODE.partition("\ndef hospital")[0] + MODULES)
    authority = create_authority(tmp_path / "ca", name="study")
    for name in ("hub", "cloud", "ward-7"):
        issue(authority, name, tmp_path / "credentials")
    for name in ("hub", "cloud"):
        write_site(tmp_path, name, f'credentials = "credentials/{name}"', "[serving]\nbatch = 1\npatience = 2\n")
    write_site(tmp_path, "hospital", 'credentials = "credentials/ward-7"')
    assert call("run", *ALL, "--folder", "out", "-q").code == 0
    write_site(tmp_path, "hospital", 'credentials = "credentials/ward-7"\nidentity = "ward-7"')
    return tmp_path


@pytest.fixture
def servers(chain: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    digest, found = load_contract(chain / "contract.toml").digest(), {}
    try:
        for name in ("hub", "cloud"):
            words = ["serve", "contract.toml", f"{name}.toml", "--weights", "out", "--accept", digest]
            with (chain / f"{name}.log").open("w") as file:
                command = [sys.executable, "-m", "cutlayer", *words]
                found[name] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
        until = time.monotonic() + 60
        for name, process in found.items():
            while "serving at" not in said(chain, name):
                assert process.poll() is None, said(chain, name)
                assert time.monotonic() < until
                time.sleep(0.05)
        yield found
    finally:
        for process in found.values():
            process.kill()
            process.wait(20)


def said(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text()


def until_said(folder: Path, name: str, text: str) -> None:
    end = time.monotonic() + 20
    while text not in said(folder, name):
        assert time.monotonic() < end, said(folder, name)
        time.sleep(0.05)


def test_a_client_asks_a_chain_and_hears_which_server_is_gone(servers: Any, chain: Path, call: Call):
    assert call("predict", *ALL, "--weights", "out", "--folder", "here").code == 0
    digest = load_contract(chain / "contract.toml").digest()
    words = ("predict", "contract.toml", "hospital.toml", "--served", "--weights", "out", "--accept", digest)
    result = call(*words, "--folder", "asked")
    assert result.code == 0, result.err
    shown = "\n".join(result.err)
    assert "sends   activations of head to hub: float32[batch, 8]" in shown
    assert "gets    activations of far from cloud: float32[batch, 8]" in shown
    here, asked = (safetensors.torch.load_file(chain / name / "predictions.safetensors") for name in ("here", "asked"))
    assert torch.equal(asked["tail"], here["tail"])
    until_said(chain, "hub", "ward-7: session 1, 37 samples, done in")
    until_said(chain, "cloud", "ward-7: session ")
    until_said(chain, "cloud", "hub: session ")
    assert "served to clients in the role of hospital\nasks cloud with each request" in said(chain, "hub")
    assert "served to clients in the role of hospital or hub" in said(chain, "cloud")
    assert "asks" not in said(chain, "cloud")

    servers["cloud"].kill()
    servers["cloud"].wait(20)
    result = call(*words, "--folder", "again", "--wait", "30")  # the hub hears it before the client has waited so long
    assert result.code == 5
    assert result.err[-4] == "E702 cloud did not come"
    assert result.err[-3] == "  where: reported by hub"
    assert "ask the operator of cloud whether `cutlayer serve` runs there" in result.err[-1]
    until_said(chain, "hub", "ward-7: session 2, 37 samples, E702 after ")
    until_said(chain, "hub", " s: cloud did not come")
