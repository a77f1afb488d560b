"""`cutlayer plan` and `cutlayer check`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cutlayer.run.config import load_contract

Call = Callable[..., Any]
CROSSING = '[[crossing]]\nof = "head"\n'
RELEASE = '[[release]]\nfield = "y"\nat = "hospital"\nto = "server"\n'


def test_plan_is_printed_with_the_digest_last(call: Call, demo: Path):
    contract = load_contract(demo / "contract.toml")
    result = call("plan", "contract.toml")
    assert result.code == 0
    assert result.out[:-4] == str(contract.plan).splitlines()
    assert result.out[-4].startswith(
        "training: epochs 2, batch_size 16, microbatches 1, schedule sequential, order relay"
    )
    assert result.out[-3] == "meet at server; addresses: server at 127.0.0.1:7443"
    assert result.out[-2] == "deadlines: join 60 s, patience 60 s, receive 60 s, send 60 s, close 10 s"
    assert result.out[-1] == f"contract digest: {contract.digest()}"


def test_grid_has_a_row_a_party(call: Call, demo: Path):
    rows = [line for line in call("plan", "contract.toml", "--grid").out if " | " in line]
    assert [row.split()[0] for row in rows] == ["hospital", "server"]
    assert "head:F0" in rows[0]
    assert "body:B0" in rows[1]


def test_program_has_the_steps_of_the_samples(call: Call, demo: Path):
    result = call("plan", "contract.toml", "--program", "server", "--samples", "33")
    text = "\n".join(result.out)
    assert "program of server, train" in text
    assert "program of server, evaluate" in text
    assert "2 x lane 0: 16 samples" in text
    assert "1 x lane 0: 1 samples" in text
    assert "FORWARD stage=body" in text
    assert "1 x lane 0: 16 samples" in "\n".join(call("plan", "contract.toml", "--program", "server").out)


def test_program_of_a_stranger_is_refused(call: Call, demo: Path):
    result = call("plan", "contract.toml", "--program", "severe")
    assert result.code == 2
    assert result.err[0] == "E205 'severe' is no party of the plan"
    assert "expected one of hospital, server" in result.err[2]


def test_plan_as_json(call: Call, demo: Path):
    contract = load_contract(demo / "contract.toml")
    document = call("plan", "contract.toml", "--grid", "--program", "hospital", "--json").json()
    assert document["digest"] == contract.digest()
    assert document["plan"] == contract.plan.document()
    assert document["text"] == str(contract.plan)
    assert "body:F0" in document["grid"]
    assert list(document["programs"]) == ["start", "train", "evaluate"]


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("patience = 60", "patience = 61", "deadlines"),
        ("127.0.0.1:7443", "localhost:7443", "addresses"),
        ("batch_size = 16", "batch_size = 16\nseed = 1", "plan"),
        ('at = "server"', 'at = "server"\nstate_limit = 5000000', "plan"),
    ],
)
def test_json_shows_what_makes_two_digests_differ(call: Call, demo: Path, old: str, new: str, key: str):
    text = (demo / "contract.toml").read_text()
    (demo / "other.toml").write_text(text.replace(old, new))
    first, second = (call("plan", name, "--json").json() for name in ("contract.toml", "other.toml"))
    assert {name for name in first if first[name] != second[name]} - {"text"} == {"digest", key}
    printed = [call("plan", name).out[:-1] for name in ("contract.toml", "other.toml")]
    assert printed[0] != printed[1]


def test_quiet_plan_is_the_digest(call: Call, demo: Path):
    digest = load_contract(demo / "contract.toml").digest()
    assert call("plan", "contract.toml", "-q").out == [f"contract digest: {digest}"]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("epochs", "epoch", "E201 unknown key 'epoch'"),
        ("epochs = 2", "epochs = '2'", "E202 the value of 'training.epochs' is wrong"),
        ('"body", "data.y"', '"body", "tail"', "E102 stage 'loss' takes 'tail', which the plan does not have"),
    ],
)
def test_wrong_contract_is_four_lines_and_exit_2(call: Call, demo: Path, old: str, new: str, line: str):
    path = demo / "contract.toml"
    path.write_text(path.read_text().replace(old, new))
    result = call("plan", "contract.toml")
    assert (result.code, result.out, len(result.err)) == (2, [], 4)
    assert result.err[0] == line


@pytest.mark.parametrize(
    ("old", "new", "code", "where"),
    [
        ('"float32[batch, 8]"', '"float32[8, batch]"', "E101", "contract.toml: output of 'head'"),
        ('"float32[batch, 8]"', '{ a = "float[batch]" }', "E101", "contract.toml: output 'a' of 'head'"),
        ("[training]", f'{CROSSING}wire = "?"\n[training]', "E101", "contract.toml: wire of the crossing of 'head'"),
        ("[training]", f'{RELEASE}spec = "?"\n[training]', "E101", "contract.toml: release of 'y'"),
        ('name = "body"', 'name = "head"', "E103", "contract.toml: the stages of the plan"),
        ("epochs = 2", "epochs = 0", "E110", "contract.toml: training"),
        ('inputs = ["head"]', 'inputs = ["hed"]', "E102", "contract.toml: stage body, its inputs"),
        ('"127.0.0.1:7443"', '"7443"', "E212", "contract.toml: addresses.server"),
        ('coordinator = "server"', 'coordinator = "office"', "E205", "contract.toml: contract.coordinator"),
        ('coordinator = "server"', 'coordinator = "hospital"', "E205", "contract.toml: addresses"),
    ],
)  # fmt: skip
def test_wrong_contract_says_where(call: Call, demo: Path, old: str, new: str, code: str, where: str):
    path = demo / "contract.toml"
    path.write_text(path.read_text().replace(old, new))
    for command in ("plan", "check", "run"):
        result = call(command, "contract.toml")
        assert [line.strip() for line in result.err[-4:-2]][1:] == [f"where: {where}"]
        assert result.err[-4].strip().startswith(code)


def test_missing_contract(call: Call, demo: Path):
    result = call("plan", "none.toml")
    assert result.code == 2
    assert result.err[0] == "E203 the file none.toml cannot be read"


def test_check_of_all_that_fits(call: Call, demo: Path):
    result = call("check", "contract.toml", "hospital.toml", "server.toml")
    assert result.code == 0
    assert [line.split(":")[0].split() for line in result.out[:-1] if line[0] != " "] == [
        ["ok", "contract"], ["warn", "hospital"], ["warn", "server"], ["ok", "hospital"], ["ok", "server"],
    ]  # fmt: skip
    assert result.out[2].startswith("      do: for a trial nothing; else ask the authority of this run for the folder")
    assert result.out[-1] == "all is well; nothing was sent"
    assert not (demo / "runs").exists()


def test_check_of_a_contract_alone(call: Call, demo: Path):
    result = call("check", "contract.toml", "--json")
    assert result.code == 0
    document = result.json()
    assert document["ok"] is True
    assert [finding["subject"] for finding in document["findings"]] == ["contract"]


def test_check_names_every_failure_and_exits_with_the_first(call: Call, demo: Path):
    """The server's module gives another shape (exit code 3); the hospital's code cannot be loaded (2)."""
    code = demo / "parties.py"
    code.write_text(code.read_text().replace("linear(8, 2)", "linear(8, 3)"))
    (demo / "hospital.toml").write_text((demo / "hospital.toml").read_text().replace("parties.py:hospital", "x.py:f"))
    result = call("check", "contract.toml", "server.toml", "hospital.toml")
    assert result.code == 2  # code is loaded before modules are tried
    assert sum(line.startswith("fail") for line in result.out) == 2
    assert result.out[-1] == "2 to correct; nothing was sent"
    assert len([line for line in result.err if line.startswith("        do:")]) == 2
    only = call("check", "contract.toml", "server.toml", "--json")
    assert only.code == 3
    errors = [finding["error"] for finding in only.json()["findings"] if finding["error"]]
    assert [error["kind"] for error in errors] == ["StageError"]


def test_check_names_every_file_that_cannot_be_read(call: Call, demo: Path):
    """The first of three is no TOML, the second is not there, the third is well: all are told."""
    (demo / "hospital.toml").write_text("party = ")
    files = ("hospital.toml", "none.toml", "server.toml")
    result = call("check", "contract.toml", *files)
    assert result.code == 2
    assert [line for line in result.out if line.startswith("fail")] == [
        "fail  hospital.toml: the file is not TOML",
        "fail  none.toml: the file none.toml cannot be read",
    ]
    assert any(line.startswith("ok    server: one batch through body") for line in result.out)
    assert result.out[-1] == "2 to correct; nothing was sent"
    assert [line.strip()[:4] for line in result.err if line.strip()[:1] == "E"] == ["E202", "E203"]
    document = call("check", "contract.toml", *files, "--json").json()
    told = [(row["subject"], row["error"]["code"]) for row in document["findings"] if row["error"]]
    assert told == [("hospital.toml", "E202"), ("none.toml", "E203")]
    assert [row["level"] for row in document["findings"] if row["subject"] == "server"] == ["warn", "ok"]
    assert (document["ok"], document["error"]["code"]) == (False, "E202")


def test_check_of_a_contract_that_cannot_be_read_reads_the_party_files(call: Call, demo: Path):
    (demo / "contract.toml").write_text("[contract]\nname = 3\n")
    (demo / "server.toml").write_text('party = "server"\n[code]\nbuild = "parties.py:server"\n')
    for words in (("check", "contract.toml", "hospital.toml", "server.toml"), ("check",)):
        result = call(*words)
        assert (result.code, [line.split(":")[0] for line in result.out[:-1]]) == (
            2,
            ["fail  contract", "fail  server.toml", "ok    hospital"],
        )
        document = call(*words, "--json").json()
        assert (document["ok"], document["digest"], len(document["findings"])) == (False, None, 3)


def test_check_without_arguments_names_a_file_beside_the_contract_that_is_no_toml(call: Call, demo: Path):
    (demo / "hospital.toml").write_text("party = ")
    result = call("check")
    assert result.code == 2
    assert [line for line in result.out if line.startswith("fail")] == ["fail  hospital.toml: the file is not TOML"]
    assert any(line.startswith("ok    server: one batch") for line in result.out)
