"""Plug-ins: found by the plan's names among installed packages, and nothing else is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import cutlayer as cl
from cutlayer.engine.codec import CODECS
from cutlayer.errors import ConfigError
from cutlayer.run.plugins import plugs_of

CODE = """
class Same:
    def encode(self, value):
        return value
    def decode(self, wire, spec):
        return wire
def talk(job, me, local):
    yield from ()
NUMBER = 5
"""
POINTS = """
[cutlayer.codecs]
same = shop_of_codecs:Same
broken = shop_of_codecs:Missing
number = shop_of_codecs:NUMBER
idle = never_imported:Thing
[cutlayer.exchanges]
talk = shop_of_codecs:talk
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a package by hand."""
    (tmp_path / "shop_of_codecs.py").write_text(CODE)
    (tmp_path / "never_imported.py").write_text("raise RuntimeError('imported without need')")
    info = tmp_path / "shop-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shop\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shop_of_codecs", raising=False)
    return tmp_path


def plan(codec: str = "", *extras: cl.PlannedExchange) -> cl.Plan:
    stages = [
        cl.Stage("head", at="a", inputs=["data.x"], output="float32[batch, 2]"),
        cl.Stage("body", at="b", inputs=["head"], output="float32[batch, 2]"),
        cl.Loss("loss", at="b", inputs=["body", "data.y"]),
    ]
    crossings = [cl.Crossing("head", codec=codec, wire="float32[batch, 2]")] if codec else []
    return cl.Plan(stages, extras=[*crossings, *extras])


def plugs(made: cl.Plan, **own):
    return plugs_of(made, "a", **{"codecs": {}, "defences": {}, "exchanges": {}, **own})


def test_what_the_plan_names_is_loaded_and_nothing_else(shop: Path):
    assert set(plugs(plan()).codecs) == set(CODECS)
    assert "shop_of_codecs" not in sys.modules
    found = plugs(plan("same", cl.PlannedExchange("talk", ["a", "b"], says="nothing")))
    assert found.codecs["same"].__module__ == "shop_of_codecs"
    assert list(found.exchanges) == ["talk"]
    assert "never_imported" not in sys.modules


def test_the_partys_own_comes_before_a_plug_in(shop: Path):
    own = CODECS["bfloat16"]
    assert plugs(plan("same"), codecs={"same": own}).codecs["same"] is own


def test_an_exchange_of_others_is_not_looked_for(shop: Path):
    made = plan("", cl.PlannedExchange("talk", ["a", "b"], says="nothing"))
    assert plugs_of(made, "c", codecs={}, defences={}, exchanges={}).exchanges == {}


@pytest.mark.provokes("E290")
def test_a_name_of_cutlayers_own_cannot_be_taken():
    with pytest.raises(ConfigError, match=r"E290.*'int8' cannot be this party's.*other than bfloat16, float16, int8"):
        plugs(plan(), codecs={"int8": CODECS["bfloat16"]})
    with pytest.raises(ConfigError, match=r"E290.*'barrier' cannot be this party's"):
        plugs(plan(), exchanges={"barrier": lambda job, me, local: ()})


@pytest.mark.provokes("E290")
def test_two_packages_that_offer_one_name(shop: Path):
    other = shop / "stall-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: stall\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[cutlayer.codecs]\nsame = stall:Same\n")
    with pytest.raises(ConfigError, match=r"E290.*several packages offer the codec 'same'.*uninstall"):
        plugs(plan("same"))


@pytest.mark.provokes("E291")
@pytest.mark.parametrize(
    ("name", "words"),
    [("broken", "AttributeError"), ("idle", "RuntimeError: imported without need"), ("number", "got int")],
)
def test_a_plug_in_that_cannot_be_loaded(shop: Path, name: str, words: str):
    with pytest.raises(ConfigError, match=rf"E291.*{name!r} cannot be loaded.*{words}.*install its package again"):
        plugs(plan(name))
