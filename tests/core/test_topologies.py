"""Topologies are values: short functions whose plans say who holds what."""

from __future__ import annotations

import inspect

import pytest

from cutlayer.core import topologies
from cutlayer.core.parts import Shared
from cutlayer.core.plan import Plan
from cutlayer.errors import PlanError
from tests.small import TOPOLOGIES, C, float32


def cuts(plan: Plan) -> list[str]:
    """The edges that cross, each as "source->target party>party"."""
    graph = plan.graph
    return [f"{e.label} {graph.origin(e, 0)}>{graph.place(e.target, 0)}" for e in graph.cuts(0)]


EXPECTED = {
    "vanilla": ["head->body a>server", "data.y->loss a>server"],
    "u_shaped": ["head->body a>server", "body->tail server>a"],
    "vertical": ["head-a->body a>server", "head-b->body b>server", "head-c->body c>server"],
    "extended_vanilla": ["head-a->merge a>middle", "head-b->merge b>middle", "merge->body middle>server"],
    "multitask": ["head-a->body-s a>s", "head-b->body-s b>s", "head-a->body-t a>t", "head-b->body-t b>t"],
    "multihop": ["hop-a->hop-b a>b", "hop-b->hop-c b>c", "hop-c->hop-d c>d"],
    "hybrid": ["head-a->hop-s a>s", "head-b->hop-s b>s", "hop-s->hop-t s>t", "hop-t->tail t>a"],
}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_what_crosses(name):
    assert cuts(TOPOLOGIES[name]()) == EXPECTED[name]


def test_all_topologies_are_tested():
    assert set(TOPOLOGIES) == set(topologies.__all__)


@pytest.mark.parametrize("name", topologies.__all__)
def test_a_topology_is_a_short_function(name):
    function = getattr(topologies, name)
    assert inspect.isfunction(function)
    assert len(inspect.getsource(function).splitlines()) <= 18


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_only_vanilla_releases_raw_data(name):
    assert [release.field for release in TOPOLOGIES[name]().releases] == (["y"] if name == "vanilla" else [])


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_training_is_set_by_keywords(name):
    plan = TOPOLOGIES[name](epochs=7, schedule="1f1b", microbatches=2)
    assert (plan.training.epochs, plan.training.schedule, plan.training.microbatches) == (7, "1f1b", 2)
    with pytest.raises(TypeError, match="epoch"):
        TOPOLOGIES[name](epoch=7)


@pytest.mark.provokes("E110")
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_training_that_is_none_is_refused_in_words(name):
    for given in ({"epochs": 1}, {}, 3):
        with pytest.raises(PlanError, match=r"E110.*training is a .*or the settings themselves: epochs=3"):
            TOPOLOGIES[name](training=given)
    with pytest.raises(PlanError, match=r"E110.*training is a dict"):
        Plan(TOPOLOGIES[name]().stages, training={"epochs": 1})
    with pytest.raises(TypeError, match="no such argument: 'releases'; a plan's training has epochs, batch_size"):
        TOPOLOGIES[name](releases=[])


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_preprocessing_is_that_of_the_plan_by_hand(name):
    plain = TOPOLOGIES[name](epochs=3)
    shared = Shared("x", at=plain.stages[0].name)
    plan = TOPOLOGIES[name](epochs=3, preprocessing=[shared])
    more = {"training": plain.training, "releases": plain.releases, "name": plain.name}
    by_hand = Plan(plain.stages, preprocessing=[shared], **more)
    assert plan.preprocessing == (shared,)
    assert plan.digest() == by_hand.digest() != plain.digest()


def test_preprocessing_of_a_field_that_the_party_has_not_is_refused():
    with pytest.raises(PlanError, match="cannot preprocess the field 'z'") as caught:
        TOPOLOGIES["vertical"](preprocessing=[Shared("z", at="head-a")])
    assert caught.value.code == "E112"


def test_clients_may_be_many():
    plan = topologies.vanilla(["a", "b"], "s", cut=float32(4), output=C)
    assert plan.lanes == 2
    assert plan.graph.data_fields(1) == {"b": ("x", "y")}
    assert topologies.u_shaped(["a", "b", "c"], "s", cut=C, back=C, output=C).lanes == 3


def test_the_server_of_a_chain_may_be_another_client():
    plan = topologies.multihop({"a": C, "b": C})
    assert plan.hub == "b"
    assert plan.graph.data_fields(0) == {"a": ("x",), "b": ("y",)}
