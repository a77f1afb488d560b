"""The page loads nothing, runs nothing, escapes everything, and says what the ledgers say."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import cutlayer as cl
from cutlayer.report.palette import DARK, LIGHT
from cutlayer.report.words import size
from cutlayer.report.write import write_report
from cutlayer.run.outcome import Result
from cutlayer.run.results import write_results
from tests.report import synthetic
from tests.report.conftest import EPOCHS, SAMPLES, Real
from tests.report.reading import Page, about, page, table

PLANS = synthetic.topologies()
LOADING = {
    "src",
    "srcset",
    "href",
    "xlink:href",
    "action",
    "formaction",
    "poster",
    "data",
    "background",
    "ping",
    "cite",
}
TAGS = {
    "script",
    "link",
    "img",
    "iframe",
    "object",
    "embed",
    "audio",
    "video",
    "source",
    "base",
    "form",
    "image",
    "use",
}


def reported(folder: Path, name: str = "vanilla-1", **changes: Any) -> Page:
    synthetic.write(folder, {**synthetic.summary(PLANS[name]), **changes})
    write_report(folder, png=False)
    return page(folder)


def history(*rows: tuple[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"mode": "train", "round": at, "loss": "loss", "party": "server", "metrics": m} for at, m in rows]


# --- it loads nothing and needs nothing -------------------------------------------------------------------------------


def check_alone(text: str) -> Page:
    found = Page(text)
    assert {tag for tag, _ in found.tags} & TAGS == set()
    names = {name for _, attrs in found.tags for name in attrs}
    assert names & LOADING == set()
    assert not [name for name in names if name.startswith("on") or name == "style"]
    assert not re.search(r"url\(|@import|@font-face|expression\(", found.styles)
    assert set(re.findall(r"\w+://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}
    return found


@pytest.mark.parametrize("name", ["vanilla-8", "u-shaped-hub", "vertical-2", "multitask-4-4", "hybrid-5-3"])
def test_the_page_loads_nothing(tmp_path: Path, name: str):
    reported(tmp_path, name)
    for path in (tmp_path / "report.html", *(tmp_path / "report").glob("*.svg")):
        check_alone(path.read_text(encoding="utf-8"))


def test_the_policy_allows_its_own_style_and_nothing_else(real: Real):
    text = real.report.page.read_text(encoding="utf-8")
    (policy,) = [a["content"] for _, a in page(real.folder).tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    assert rules["style-src"] == f"'sha256-{b64encode(sha256(style[1].encode()).digest()).decode()}'"
    assert text.count("<style") == 1
    assert set(rules) == {"default-src", "style-src", "base-uri", "form-action"}


def test_light_and_dark_and_print(real: Real):
    styles = page(real.folder).styles
    light, _, rest = styles.partition("@media (prefers-color-scheme:dark)")
    dark, _, printed = rest.partition("@media print")
    for name in LIGHT:
        assert f"--{name}:{LIGHT[name]};" in light
        assert f"--{name}:{DARK[name]};" in dark
        assert f"--{name}:{LIGHT[name]};" in printed
    assert set(re.findall(r"var\(--([\w-]+)\)", styles)) <= set(LIGHT)
    assert not re.search(r"[:\s]#[0-9a-f]{3,8}\b(?!;)", re.sub(r"--[\w-]+:#\w+;", "", styles)), (
        "a colour outside the table"
    )


def test_it_can_be_read_without_seeing_it(real: Real):
    found = page(real.folder)
    assert [a["lang"] for tag, a in found.tags if tag == "html"] == ["en"]
    heads = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h\d", tag)]
    assert heads.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(heads))
    assert [tag for tag, _ in found.tags if tag == "main"] == ["main"]
    drawings = [a for tag, a in found.tags if tag == "svg"]
    assert {a["role"] for a in drawings} == {"img"}
    assert all(title and text for title, text in found.figures)
    assert all(a.get("scope") in ("col", "row") for tag, a in found.tags if tag == "th")
    assert all(found.tables), "every table has a name"
    assert all(a.get("tabindex") == "0" for _, a in found.tags if a.get("role") == "region")


# --- escaping ---------------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><script>", "</title></svg>", "{{ 7 * 7 }}",
    "{% raw %}", "a&b;&lt;", "' onload='x", "<!--", "]]>", "javascript://a",
    "\x00\x1b[31m", "\N{RIGHT-TO-LEFT OVERRIDE}abc",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_metric_names_are_text(tmp_path: Path, text: str):
    metrics = {text: 0.5, "list": [0.25]}
    rows = [*history((1, metrics), (2, {text: 0.25})), *history((3, {f"{text}2": None, text: 0.5}))]
    reported(tmp_path, history=rows, metrics={"train": {"loss": {text: 0.5}}})
    plain = reported(
        tmp_path / "plain", history=history((1, {"m": 0.5}), (2, {"m": 0.25}), (3, {"m2": None, "m": 0.5}))
    )
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = check_alone(raw.replace("javascript://", "javascript:"))
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in plain.tags}
    shown = re.sub(r"[\x00\x1b]", "\N{REPLACEMENT CHARACTER}", text).replace("://", ":")
    assert shown in found.words
    assert any(title.startswith(shown) for title, _ in found.figures)
    for path in (tmp_path / "report").glob("*.svg"):
        check_alone(path.read_text(encoding="utf-8").replace("javascript://", "javascript:"))


@pytest.mark.parametrize("part", ["versions", "contract", "ended", "weights_sha256"])
def test_hostile_parts_of_a_summary_are_text(tmp_path: Path, part: str):
    bad = "<script>alert(1)</script>"
    found = reported(tmp_path, **{part: {bad: bad} if part in ("versions", "weights_sha256") else bad})
    assert "script" not in {tag for tag, _ in found.tags}
    assert bad in found.words


@pytest.mark.parametrize("name", ["<script>", 'a"b', "a b", "a&b"])
def test_parties_and_stages_cannot_have_such_names(name: str):
    cut = {"cut": "float32[batch, 2]", "output": "float32[batch, 2]"}
    with pytest.raises(cl.CutlayerError):
        cl.vanilla(name, "server", **cut)
    loss = cl.Loss("loss", at="north", inputs=[name, "data.y"])
    with pytest.raises(cl.CutlayerError):
        cl.Plan([cl.Stage(name, at="north", inputs=["data.x"], output="float32[batch, 2]"), loss])
    end = cl.Loss("loss", at="north", inputs=["net", "data.y"])
    with pytest.raises(cl.CutlayerError):
        cl.Plan([cl.Stage("net", at="north", inputs=[f"data.{name}"], output="float32[batch, 2]"), end])
    assert cl.Plan([cl.Stage("net", at="north", inputs=["data.x"], output="float32[batch, 2]"), end])


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_the_ledgers(real: Real):
    found = page(real.folder)
    columns = {head: found.column("Cost by party", head) for head in found.tables["Cost by party"][0]}
    for party, ledger in real.result.ledgers.items():
        assert about(columns["sent"][party], ledger.total("sent"))
        assert about(columns["received"][party], ledger.total("received"))
        assert about(columns["framing"][party], ledger.total("sent", "framing") + ledger.total("received", "framing"))
        for kind in ("forward", "backward"):
            assert about(columns[kind][party], sum(n for (k, _), n in ledger.flops.items() if k == kind))
        assert columns["parameters"][party] == ("35" if party == "server" else "48")
        messages = [cell for row in found.tables["Cost by party"] if row[0] == party for cell in (row[5], row[7])]
        assert messages == [str(ledger.total(way, "messages")) for way in ("sent", "received")]


def test_what_left_each_party_is_in_its_ledger(real: Real):
    found = page(real.folder)
    for party, ledger in real.result.ledgers.items():
        _, *rows, last = found.tables[f"What left {party}"]
        for peer in real.result.plan.parties:
            flows = [row for key, row in ledger.flows.items() if key[:2] == ("sent", peer)]
            mine = [row for row in rows if row[1] == peer]
            for place, part in ((3, "payload"), (5, "framing"), (6, "messages")):
                shown = sum(int(row[place].replace(",", "")) for row in mine)
                assert shown == sum(getattr(flow, part) for flow in flows)
        assert last[1].replace(",", "") == str(ledger.total("sent"))
        assert last[-1] == str(ledger.total("sent", "messages"))
        for row in rows:
            assert row[4] in ("", row[3]), "as planned"


def test_the_lead_and_the_facts(real: Real):
    found = page(real.folder)
    words = " ".join(found.words.split())
    sent = sum(ledger.total("sent") for ledger in real.result.ledgers.values())
    assert (
        f"A network of 3 stages (head, body, tail) was trained for {EPOCHS} epochs in batches of 8 by 3 parties"
        in words
    )
    assert "clinic (20 samples), lab (12 samples) and server" in words
    evaluated = real.result.metrics("evaluate")["loss"]
    assert f"loss {evaluated['loss']:.4f} and accuracy {evaluated['accuracy']:.4f} on evaluation data" in words
    assert f"{sum(SAMPLES.values())}training samples" in words
    crossed = re.search(r"([\d.]+ kB) of tensors crossed", words)
    assert crossed is not None
    assert about(crossed[1], sent)
    assert real.result.plan.digest() in found.words
    assert str(real.result.plan).splitlines()[1] in found.words
    for digest in real.record.summary.weights_sha256.values():
        assert digest in found.words
    assert "recall" in words  # said to be in curves.csv
    assert "All parties ran in one process." in words


def test_more_than_planned_is_an_alarm(tmp_path: Path):
    document = synthetic.summary(PLANS["vanilla-1"])
    row = next(row for row in document["ledgers"]["north"]["flows"] if row["direction"] == "up")
    row["payload"] += 4096
    found = reported(tmp_path, ledgers=document["ledgers"])
    (alarm,) = [a for tag, a in found.tags if tag == "p" and "alarm" in a.get("class", "")]
    planned = row["payload"] - 4096
    assert alarm
    assert "north sent server more" in found.words
    assert f"{row['payload']:,} bytes instead of {planned:,}." in found.words
    assert "more" not in reported(tmp_path).words.split("Who holds")[0]


def test_what_was_sent_in_steps_that_were_undone_has_left_too(tmp_path: Path):
    plain = reported(tmp_path)
    before = [int(cell.replace(",", "")) for cell in (plain.tables["What left north"][-1][i] for i in (1, 3, 4))]
    (tmp_path / "metrics.jsonl").write_text('{"event":"rollback"}\n')
    found = reported(tmp_path, undone={"north": {"payload": 7_000_000, "framing": 900, "messages": 30}})
    *_, row, last = found.tables["What left north"]
    assert row == ["sent in steps that a restart undid", "", "", "7,000,000", "", "900", "30"]
    after = [int(last[place].replace(",", "")) for place in (1, 3, 4)]
    assert after == [before[0] + 7_000_000, before[1] + 900, before[2] + 30]
    assert found.tables["What left server"] == plain.tables["What left server"]
    assert "handed to the links is counted each time: in steps that a restart undid, north 7.0 MB." in found.words
    assert about(found.column("Cost by party", "sent")["north"], after[0])
    crossed = before[0] + 7_000_000 + int(found.tables["What left server"][-1][1].replace(",", ""))
    assert f"{size(crossed)} of tensors crossed" in found.words
    (row,) = [row for row in table(tmp_path, "cuts.csv") if row["direction"] == "undone"]
    assert (row["from"], row["to"], row["payload_bytes"], row["messages"]) == ("north", "", "7000000", "30")
    costs = {row["party"]: row for row in table(tmp_path, "costs.csv")}
    assert costs["north"]["sent_payload_bytes"] == str(after[0])


def test_where_the_numbers_of_samples_are_counted_is_said(tmp_path: Path):
    assert "numbers of samples, which all parties are told when they meet" in " ".join(reported(tmp_path).words.split())


def test_what_happened_on_the_way_is_told(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"event":"lost"}\n{"event":"returned"}\n{"event":"lost"}\n')
    assert "On the way a party was lost 2 times and a lost party came back 1 time." in reported(tmp_path).words


def test_processes(tmp_path: Path):
    parts = [{"parties": [name], "seconds": 2.0, "memory": 3 * 10**8} for name in ("north", "server")]
    found = reported(tmp_path, processes=parts, seconds=9.0)
    assert "The parties ran in 2 processes." in found.words
    assert "From start to end it was 9.00 s" in " ".join(found.words.split())
    assert found.column("Cost by party", "peak memory") == {"north": "300 MB", "server": "300 MB"}
    assert "From start to end" not in reported(tmp_path, processes=parts, seconds=2.5).words


# --- odd histories ----------------------------------------------------------------------------------------------------


def test_no_round_at_all(tmp_path: Path):
    found = reported(tmp_path, history=[], metrics={})
    assert "Metrics by round" not in found.words
    assert "It reached" not in found.words
    assert len(found.figures) == 2


def test_a_loss_that_was_no_number(tmp_path: Path):
    found = reported(tmp_path, history=history((1, {"loss": None})), metrics={"train": {"loss": {"loss": None}}})
    assert "Not a finite number, so not drawn: loss of loss (train) in round 1." in found.words
    assert "It reached" not in found.words


def test_one_round(tmp_path: Path):
    found = reported(tmp_path, history=history((1, {"loss": 0.5})))
    assert found.tables["loss by round"] == [["round", "train, server"], ["1", "0.5000"]]


# --- one party's own report -------------------------------------------------------------------------------------------


def test_a_join_tells_nothing_of_others_that_it_was_not_told(real: Real, tmp_path: Path):
    """What `join` leaves: its own ledger, metrics and weights, and the numbers of samples, which all are told."""
    result = real.result
    mine = Result(
        plan=result.plan,
        history=[row for row in result.history if row["party"] == "clinic"],
        ledgers={"clinic": result.ledgers["clinic"]},
        workers={"clinic": result.workers["clinic"]},
        seconds=result.seconds,
        samples=result.samples,
    )
    write_results(tmp_path, mine)
    report = write_report(tmp_path, png=False)
    found = page(tmp_path)
    everything = "".join(file.read_text(encoding="utf-8") for file in (report.page, *report.files))
    for party, digest in real.record.summary.weights_sha256.items():
        if party == "server":
            assert digest not in everything
    assert list(found.column("Cost by party", "sent")) == ["clinic"]
    assert {row["party"] for row in table(tmp_path, "costs.csv")} == {"clinic"}
    assert {row["party"] for row in table(tmp_path, "curves.csv")} == {"clinic"}
    for row in table(tmp_path, "cuts.csv"):
        assert "clinic" in (row["from"], row["to"])
        assert row["seen_by"] == ("sender" if row["from"] == "clinic" else "receiver")
    assert "lab to server: head, float32[batch, 6], not seen here" in found.figures[0][1]
    assert "35 param." not in found.words
    words = " ".join(found.words.split())
    assert "This folder holds the record of clinic only. What lab and server computed" in words
    assert "as far as this party saw" in words
    assert "Seen from clinic." in words
    assert "lab, as far as it was received here" in words
