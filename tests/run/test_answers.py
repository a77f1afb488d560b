"""Plans with the outputs at the server: served to clients where the plan declares an answer, with the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import cutlayer as cl
from cutlayer.core.serving import clients_of, served_plan
from cutlayer.errors import PlanError, ProgramError
from cutlayer.report.record import restored_plan
from cutlayer.run.config import Contract, dump_contract, parse_contract
from tests.run import plans
from tests.run.test_serving import ALONE, Place, at_once, rows

pytestmark = pytest.mark.timeout(60)
CUT, OUTPUT = "float32[batch, 8]", "float32[batch, 3]"


def vanilla(*clients: str, **training: object) -> cl.Plan:
    plan = cl.vanilla(clients or "alpha", "server", cut=CUT, output=OUTPUT, **{"batch_size": 8, **training})
    return plan.with_extras(cl.Answer("body", to="head"))


def built(plan: cl.Plan) -> plans.Case:
    """A loss with a weight of each class, which is a tensor among the weights that the run leaves."""

    def build(name: str) -> cl.Party:
        if name == "server":
            modules = {"body": plans._block(8, 3, 2), "loss": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]))}
            return plans._party(name, modules)
        return plans._party(name, {"head": plans._block(6, 8, len(name))}, plans._table(plans.HOSPITALS[name]))

    return plans.Case(plan, build, "server")


def two_outputs() -> plans.Case:
    """A loss at the server takes two ports of one stage, and the classes of the labels are agreed on before."""
    stages = [
        cl.Stage("head", at="alpha", inputs=["data.x"], output=CUT),
        cl.Stage("body", at="server", inputs=["head"], output={"classes": OUTPUT, "sizes": "float32[batch, 1]"}),
        cl.Loss("loss", at="server", inputs=["body.classes", "body.sizes", "data.y@head"]),
    ]
    plan = cl.Plan(
        stages,
        training=cl.Training(batch_size=8, clip_norm=1.0, clip="global", hub="server"),
        releases=[cl.Release("y", at="head", to="server", spec="int64[batch]")],
        preprocessing=[cl.Shared("y", at="head", kind="classes"), cl.Shared("x", at="head")],
        assemble_at=["server"],
        extras=[cl.Answer("body", to="alpha")],
    )

    def build(name: str) -> cl.Party:
        if name == "server":
            return plans._party(name, {"body": Two(), "loss": BothLosses()})
        return plans._party(name, {"head": plans._block(6, 8, 1)}, plans._table(slice(None)))

    return plans.Case(plan, build, "server")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.other = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.one(value), self.other(value)


class BothLosses(nn.Module):
    def forward(self, classes: torch.Tensor, sizes: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(classes, label) + sizes.square().mean()


def test_a_vanilla_plan_is_served_with_the_bits_of_one_process(tmp_path: Path):
    place = Place(tmp_path, built(vanilla(microbatches=2, drop_last=True)))
    data = {"anna": rows(21, 1), "ben": rows(3, 2), "cleo": rows(16, 3)}
    with place.serving() as told:
        found = at_once({name: place.asking(name, x) for name, x in data.items()})
        assert told.service.roles == ("alpha",)
        told.wait("went", 3)
    for name, x in data.items():
        assert torch.equal(found[name], place.expected(x)), name
    served = told.service.served()
    assert (served.requests, served.forwards) == (6 + 1 * 2 + 4, 12)
    ledgers = served.identities["anna"]
    assert ledgers.sent >= 21 * 3 * 4  # the outputs go back


def test_requests_for_answers_are_put_together(tmp_path: Path):
    place = Place(tmp_path, built(vanilla()))
    data = {name: rows(8, seed) for seed, name in enumerate(("anna", "ben", "cleo"))}
    with place.serving(cl.Serving(batch=64, wait=0.3)) as told:
        found = at_once({name: place.asking(name, x) for name, x in data.items()})
    for name, x in data.items():
        torch.testing.assert_close(found[name], place.expected(x), rtol=1e-6, atol=1e-6)
    assert told.service.served().largest > 8


def test_each_replica_gets_its_own_answers(tmp_path: Path):
    place = Place(tmp_path, built(vanilla("alpha", "beta", order="parallel")))
    with place.serving() as told:
        found = at_once({role: place.asking("anna", rows(9), role) for role in ("alpha", "beta")})
        assert told.service.roles == ("alpha", "beta")
    for role, value in found.items():
        assert torch.equal(value, place.expected(rows(9), role)), role
    assert not torch.equal(found["alpha"], found["beta"])


def test_several_outputs_and_what_was_agreed_on(tmp_path: Path):
    place = Place(tmp_path, two_outputs())
    party = place.client(cl.TensorTable(x=rows(9)))
    with place.serving():
        network = place.settings("anna", "alpha")
        found = cl.predict(place.plan, party, network=network, weights=place.weights, served=True)
    parties = [replace(one, data=None, evaluation=None) for one in place.case.parties()]
    parties = [replace(one, prediction=party.prediction) if one.name == "alpha" else one for one in parties]
    expected = cl.predict(place.plan, parties, weights=place.weights)
    assert sorted(found) == sorted(expected) == ["body.classes", "body.sizes"]
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_other_predictions_send_no_answers():
    """Only what is served does: a training of the same plan has the same programs as without an answer."""
    with_answer = vanilla()
    without = cl.vanilla("alpha", "server", cut=CUT, output=OUTPUT, batch_size=8)
    assert with_answer.graph.edges == without.graph.edges
    assert with_answer.digest() != without.digest()
    assert ALONE.batch == 1
    assert served_plan(without) is without


def test_the_printed_plan_says_who_gets_the_outputs():
    text = str(vanilla("alpha", "beta"))
    assert "  sends   outputs of body to alpha or beta, only where body is served (declared answer)" in text
    assert text.count("  gets    outputs of body from server, only where body is served (declared answer)") == 1
    assert "declared answer" not in str(cl.vanilla("alpha", "server", cut=CUT, output=OUTPUT))


def test_an_answer_survives_a_contract_and_a_record():
    plan = vanilla()
    contract = Contract(plan=plan, coordinator="server", addresses={"server": "127.0.0.1:7443"})
    text = dump_contract(contract)
    assert 'answer = [\n    { of = "body", to = "head" },\n]' in text
    assert parse_contract(text).plan.digest() == plan.digest() == restored_plan(plan.document()).digest()


def test_without_an_answer_the_error_says_how_to_declare_it():
    with pytest.raises(ProgramError, match="E453") as caught:
        clients_of(cl.vanilla("alpha", "server", cut=CUT, output=OUTPUT), "server")
    assert '[[answer]] of = "body", to = "head"' in caught.value.remedy
    assert "extras=[Answer('body', to='head')]" in caught.value.remedy


@pytest.mark.provokes("E114")
@pytest.mark.parametrize(
    ("answers", "text"),
    [
        (
            [cl.Answer("head", to="alpha")],
            "'of' of the answer 'head' is wrong: expected one of body, which feed a loss",
        ),
        ([cl.Answer("body", to="beta")], "'to' of the answer 'body' is wrong: expected one of alpha, body, head, loss"),
        ([cl.Answer("body", to="server")], "a party that does not have the output anyway, got server"),
        ([cl.Answer("body", to="loss")], "a party that does not have the output anyway, got loss"),
        ([cl.Answer("body", to="head")] * 2, "each once, got body"),
    ],
)
def test_answers_that_cannot_be(answers: list[cl.Answer], text: str):
    plan = cl.vanilla("alpha", "server", cut=CUT, output=OUTPUT)
    with pytest.raises(PlanError, match="E114") as caught:
        plan.with_extras(*answers)
    assert text in f"{caught.value.what}: {caught.value.why()}"
    assert caught.value.where == f"answer {answers[-1].of!r}"
