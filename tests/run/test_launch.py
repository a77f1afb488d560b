"""From contract and party file to a run: network settings, what would leave, acceptance, the run's folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import cutlayer as cl
from cutlayer.core.topologies import u_shaped, vanilla
from cutlayer.errors import CertificateError, ConfigError
from cutlayer.run.config import Contract, DeadlineTable, dump_contract
from cutlayer.run.launch import (
    LaunchRecord,
    accept,
    assumed_roster,
    begin_run,
    leaving,
    network_settings,
    read_run,
)
from cutlayer.run.partyfile import PartyFile
from cutlayer.transport.pki import create_authority, issue


def contract(address: str = "127.0.0.1:7443") -> Contract:
    plan = vanilla(["a", "b"], "server", cut="float32[batch, 8]", output="float32[batch, 2]", batch_size=4)
    return Contract(
        plan=plan, coordinator="server", addresses={"server": address}, deadlines=DeadlineTable(receive=7.0)
    )


def party_file(folder: Path, name: str = "a", **changes: object) -> PartyFile:
    plain = PartyFile(
        path=folder / f"{name}.toml", name=name, builder="x.py:f", listen="", credentials=None, insecure=True,
        folder=folder / "runs", accept="ask",
    )  # fmt: skip
    return replace(plain, **changes)


def test_settings_are_those_of_both_files(tmp_path: Path):
    create_authority(tmp_path / "ca", name="test")
    kit = issue(tmp_path / "ca", "server", tmp_path)
    file = party_file(tmp_path, "server", listen="0.0.0.0:7443", credentials=kit, insecure=False)
    agreed = contract("server.example.org:7443")
    settings = network_settings(agreed, file)
    assert (settings.party, settings.parties, settings.coordinator) == ("server", ("a", "b", "server"), "server")
    assert (settings.listen, settings.addresses) == ("0.0.0.0:7443", {"server": "server.example.org:7443"})
    assert (settings.digest, settings.run) == (agreed.digest(), "vanilla")
    assert settings.deadlines.receive == 7.0
    assert settings.credentials is not None
    assert settings.credentials.party == "server"


def test_relay_limit_is_the_largest_message_of_the_plan(tmp_path: Path):
    plan = u_shaped(
        "a", "b", cut="float32[batch, 20_000_000]".replace("_", ""), back="float32[batch, 2]",
        output="float32[batch, 2]", batch_size=2,
    )  # fmt: skip
    agreed = Contract(plan=plan, coordinator="b", addresses={"b": "localhost:1"})
    assert network_settings(agreed, party_file(tmp_path)).limit == 2 * 20_000_000 * 4
    assert network_settings(contract(), party_file(tmp_path)).limit == 64 * 2**20


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("changes", "address", "code", "message"),
    [
        ({"name": "c"}, "127.0.0.1:1", "E205", "'c' is no party of the plan"),
        ({"insecure": False}, "127.0.0.1:1", "E206", "names no certificates"),
        ({"listen": "0.0.0.0:1"}, "127.0.0.1:1", "E206", "the contract gives no address"),
        ({}, "server.example.org:1", "E211", "without certificates, parties talk on one machine only"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, object], address: str, code: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        network_settings(contract(address), party_file(tmp_path, **changes))
    assert caught.value.code == code


def test_missing_credentials_name_the_folder(tmp_path: Path):
    with pytest.raises(CertificateError, match=r"E666.*party\.pem"):
        network_settings(contract(), party_file(tmp_path, insecure=False, credentials=tmp_path / "none"))


def test_acceptance(tmp_path: Path):
    agreed, ask = contract(), party_file(tmp_path)
    digest = agreed.digest()
    kept = replace(ask, accept=digest)
    assert not accept(agreed, ask, "")
    assert accept(agreed, ask, digest)
    assert accept(agreed, kept, "")
    with pytest.raises(ConfigError, match=r"E207.*--accept.*another contract|another contract.*--accept"):
        accept(agreed, kept, "0" * 64)
    with pytest.raises(ConfigError, match=r"another contract.*run.accept"):
        accept(agreed, replace(ask, accept="0" * 64), "")
    with pytest.raises(ConfigError, match="another contract"):
        accept(agreed, ask, digest[:16])


def test_bytes_of_an_epoch_for_a_party_with_data():
    """a sends 8 float32 up and its int64 label for each of its samples; whatever the other hospital holds."""
    told = leaving(contract().plan, "a", {"train": 10, "evaluate": 3})
    assert (told.nbytes, told.samples, told.known) == (10 * (8 * 4 + 8), 10, True)
    assert told.summary() == "400 bytes over cuts an epoch (weights of replicas come on top), for its 10 samples"
    lines = told.text.splitlines()
    assert lines[0] == "a"
    assert any("activations of head to server: float32[batch, 8], 128 bytes a batch" in line for line in lines)
    assert [line for line in lines if line.startswith("  runs")] == ["  runs    head"]


def test_bytes_of_an_epoch_for_a_party_without_data():
    """The server sends a gradient of 8 float32 for each sample of both hospitals."""
    told = leaving(contract().plan, "server", {})
    assert (told.nbytes, told.samples, told.known) == (2 * 1000 * 8 * 4, 1000, False)
    assert "for every 1,000 samples a data holder has" in told.summary()
    assert told.text.splitlines()[0] == "server"


def test_unknown_counts_are_taken_to_fit_the_known_ones():
    plan = contract().plan
    assert assumed_roster(plan, {}).samples["train"] == {"a": 4, "b": 4}
    assert assumed_roster(plan, {"a": {"train": 7}}).samples == {
        "train": {"a": 7, "b": 4}, "evaluate": {"a": 0, "b": 0}, "predict": {"a": 0, "b": 0},
    }  # fmt: skip
    both = assumed_roster(plan, {"a": {"train": 7, "evaluate": 2}, "b": {"train": 5}}).samples
    assert both["train"] == {"a": 7, "b": 5}
    assert both["evaluate"] == {"a": 2, "b": 0}


def record(agreed: Contract) -> LaunchRecord:
    return LaunchRecord(kind="join", digest=agreed.digest(), party_files=("/site/a.toml",))


def test_begun_run_is_read_back(tmp_path: Path):
    agreed = contract()
    text = dump_contract(agreed)
    for _ in range(2):  # a restart begins it again, with the same contract
        begin_run(tmp_path / "run", text, record(agreed))
    assert read_run(tmp_path / "run") == (agreed, text, record(agreed))


@pytest.mark.provokes("E208")
def test_folder_of_another_contract_is_refused(tmp_path: Path):
    first, second = contract(), contract("127.0.0.1:1")
    begin_run(tmp_path, dump_contract(first), record(first))
    with pytest.raises(ConfigError, match=r"E208.*another contract"):
        begin_run(tmp_path, dump_contract(second), record(second))
    assert read_run(tmp_path)[0] == first


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_folder_that_is_no_run_is_refused(tmp_path: Path, damage: str):
    agreed = contract()
    begin_run(tmp_path, dump_contract(agreed), record(agreed))
    if damage == "missing":
        (tmp_path / "launch.json").unlink()
    elif damage == "cut":
        (tmp_path / "launch.json").write_text('{"kind": "join"')
    else:
        (tmp_path / "contract.toml").write_text(dump_contract(contract("127.0.0.1:1")))
    with pytest.raises(ConfigError, match="E208"):
        read_run(tmp_path)


BUILDER = """
from torch import nn
from cutlayer import Party


def build(name):
    return Party(name, modules={"head": nn.Linear(4, 8)})
"""


def site(folder: Path, text: str = "") -> tuple[Path, Path]:
    (folder / "contract.toml").write_text(dump_contract(contract()))
    (folder / "parties.py").write_text(BUILDER)
    (folder / "a.toml").write_text(
        f'party = "a"\n[code]\nbuilder = "parties.py:build"\n[network]\ninsecure = true\n{text}'
    )
    return folder / "contract.toml", folder / "a.toml"


def test_a_program_gets_what_the_command_line_takes(tmp_path: Path):
    found = cl.load_site(*site(tmp_path, "[serving]\nplaces = 3\n"))
    assert found.plan.digest() == contract().plan.digest()
    assert (found.party.name, list(found.party.modules)) == ("a", ["head"])
    assert found.network == network_settings(contract(), party_file(tmp_path))
    assert found.network.digest == contract().digest() != found.plan.digest()
    assert found.serving == cl.Serving(places=3)


def test_a_program_keeps_to_what_its_site_has_accepted(tmp_path: Path):
    files = site(tmp_path, f'[run]\naccept = "{"0" * 64}"\n')
    (tmp_path / "parties.py").write_text("raise RuntimeError")  # nothing of it is run
    with pytest.raises(ConfigError, match=r"E207.*accepted another contract"):
        cl.load_site(*files)
    assert cl.load_site(*site(tmp_path, f'[run]\naccept = "{contract().digest()}"\n')).party.name == "a"
