"""Plans with the outputs at the server: served to clients where the plan declares an answer, with the same bits."""

from __future__ import annotations

import itertools
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
NOISE = {"name": "gaussian", "deviation": 0.5}


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


def two_ends() -> cl.Plan:
    """Two stages at the server feed its loss."""
    stages = [
        cl.Stage("head", at="alpha", inputs=["data.x"], output=CUT),
        cl.Stage("body", at="server", inputs=["head"], output=OUTPUT),
        cl.Stage("aside", at="server", inputs=["head"], output=OUTPUT),
        cl.Loss("loss", at="server", inputs=["body", "aside", "data.y@head"]),
    ]
    return cl.Plan(stages, releases=[cl.Release("y", at="head", to="server", spec="int64[batch]")])


def chain() -> cl.Plan:
    return cl.vanilla(("alpha", "beta"), "server", cut=CUT, output=OUTPUT)


def called(name: str, head: str = "head") -> cl.Plan:
    """A vanilla plan whose stage at the server has this name."""
    stages = [
        cl.Stage(head, at="alpha", inputs=["data.x"], output=CUT),
        cl.Stage(name, at="server", inputs=[head], output=OUTPUT),
        cl.Loss("loss", at="server", inputs=[name, f"data.y@{head}"]),
    ]
    return cl.Plan(stages, releases=[cl.Release("y", at=head, to="server", spec="int64[batch]")])


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


def served_as_here(place: Place) -> list[str]:
    """Expect the bits of a prediction in one process from the served stage; return the outputs' names."""
    party = place.client(cl.TensorTable(x=rows(9)))
    with place.serving():
        network = place.settings("anna", "alpha")
        found = cl.predict(place.plan, party, network=network, weights=place.weights, served=True)
    parties = [replace(one, data=None, evaluation=None) for one in place.case.parties()]
    parties = [replace(one, prediction=party.prediction) if one.name == "alpha" else one for one in parties]
    expected = cl.predict(place.plan, parties, weights=place.weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    return sorted(found)


def test_several_outputs_and_what_was_agreed_on(tmp_path: Path):
    place = Place(tmp_path, two_outputs())
    assert served_as_here(place) == ["body.classes", "body.sizes"]


def test_a_loss_that_takes_outputs_of_both_ends(tmp_path: Path):
    """It stays in the plan of a session, for the client's own output; what has an answer is no output twice."""
    stages = [
        cl.Stage("head", at="alpha", inputs=["data.x"], output=CUT),
        cl.Stage("body", at="server", inputs=["head"], output=OUTPUT),
        cl.Stage("tail", at="alpha", inputs=["body"], output="float32[batch, 1]"),
        cl.Loss("loss", at="server", inputs=["body", "tail", "data.y@head"]),
    ]
    releases = [cl.Release("y", at="head", to="server", spec="int64[batch]")]
    plan = cl.Plan(stages, training=cl.Training(batch_size=8), releases=releases, extras=[cl.Answer("body", to="head")])

    def build(name: str) -> cl.Party:
        if name == "server":
            return plans._party(name, {"body": plans._block(8, 3, 2), "loss": BothLosses()})
        modules = {"head": plans._block(6, 8, 1), "tail": plans._block(3, 1, 3)}
        return plans._party(name, modules, plans._table(slice(None)))

    place = Place(tmp_path, plans.Case(plan, build, "server"))
    assert served_as_here(place) == ["body", "tail"]


def test_an_answer_goes_through_its_crossing_as_any_other_value(tmp_path: Path):
    plan = vanilla().with_extras(cl.Crossing("body", codec="int8"))
    place = Place(tmp_path, built(plan))
    with place.serving() as told:
        found = place.asking("anna", rows(9))()
        told.wait("went")
    whole = place.expected(rows(9))  # in one process nothing of it crosses
    steps = (whole.amax(1) - whole.amin(1)) / 255
    assert not torch.equal(found, whole)
    assert ((found - whole).abs().amax(1) <= steps * 0.51).all()
    sent = told.service.served().identities["anna"].sent
    (tmp_path / "plain").mkdir()
    plain = Place(tmp_path / "plain", built(vanilla()))
    with plain.serving() as told:
        assert torch.equal(plain.asking("anna", rows(9))(), whole)  # and the training was the same
        told.wait("went")
    assert told.service.served().identities["anna"].sent - sent == 9 * (3 * 4 - (8 + 3))


def test_an_answer_is_defended_before_it_leaves(tmp_path: Path):
    place = Place(tmp_path, built(vanilla().with_extras(cl.Crossing("body", defences=[NOISE]))))
    data = rows(400)
    with place.serving():
        noise = place.asking("anna", data)() - place.expected(data)
    assert 0.4 < noise.std() < 0.6


@pytest.mark.parametrize("of", ["body", "head"])
def test_noise_is_drawn_anew_for_each_prediction(tmp_path: Path, of: str):
    """Else two outputs differ by what the stages say, and an answer that is known uncovers all others."""
    place = Place(tmp_path, built(vanilla().with_extras(cl.Crossing(of, defences=[NOISE]))))
    data = cl.TensorTable(x=rows(50))
    found = []
    with place.serving():
        for _ in range(2):
            network = place.settings("anna", "alpha")
            with cl.connect(place.plan, place.client(None), network=network, weights=place.weights) as connection:
                found += [connection.predict(data)["body"] for _ in range(2)]
            once = cl.predict(place.plan, place.client(data), network=network, weights=place.weights, served=True)
            found.append(once["body"])
    assert place.case.build("server").seed is not None
    assert place.client(None).seed is not None
    for first, second in itertools.combinations(found, 2):
        assert (first - second).abs().mean() > 0.01


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


def test_the_printed_plan_says_what_is_done_to_the_outputs():
    text = str(vanilla().with_extras(cl.Crossing("body", codec="int8", defences=[NOISE])))
    done = "outputs of body (after gaussian(deviation=0.5), as int8)"
    assert f"  sends   {done} to alpha, only where body is served (declared answer)" in text
    assert f"  gets    {done} from server, only where body is served (declared answer)" in text
    ports = str(two_outputs().plan.with_extras(cl.Crossing("body.sizes", codec="float16")))
    assert "  gets    outputs of body (sizes as float16) from server, only" in ports


@pytest.mark.provokes("E130")
@pytest.mark.parametrize(
    ("plan", "crossing", "what"),
    [
        (vanilla(), cl.Crossing("body", gradient_codec="int8"), "a crossing gives an answer a gradient"),
        (vanilla(), cl.Crossing("body", gradient_defences=[NOISE]), "a crossing gives an answer a gradient"),
        (chain(), cl.Crossing("body", codec="int8"), "what a crossing names stays at its party"),
    ],
)
def test_crossings_that_an_answer_cannot_have(plan: cl.Plan, crossing: cl.Crossing, what: str):
    with pytest.raises(PlanError, match=f"E130.*{what}"):
        plan.with_extras(crossing)


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
    ("plan", "answers", "got"),
    [
        (chain(), [cl.Answer("body", to="alpha")], "the output 'body' goes to alpha, and beta gives the data"),
        (
            plans.vertical().plan,
            [cl.Answer("body", to="clinic")],
            "2 parties give data for each: clinic, laboratory",
        ),
        (
            two_ends(),
            [cl.Answer("body", to="head")],
            "the output 'aside' stays at server: the client would get nothing",
        ),
        (
            plans.u_shaped().plan,
            [cl.Answer("tail", to="server")],
            "the output 'tail' goes to server, and alpha gives the data",
        ),
    ],
)
def test_answers_that_nobody_could_be_given_are_refused_with_the_plan(
    plan: cl.Plan, answers: list[cl.Answer], got: str
):
    """Not when the trained stage is to be served."""
    with pytest.raises(PlanError, match=r"E114.*with the answer .* nothing can be served") as caught:
        plan.with_extras(*answers)
    assert caught.value.got.startswith(got)
    assert "let all outputs go to the party that gives the data" in caught.value.remedy


@pytest.mark.parametrize(
    ("plan", "name", "text"),
    [
        (called("b" * 53), "b" * 53, "expected at most 52 letters"),
        (called("body", "answer-body"), "body", "the name 'answer-body' is needed for the answer 'body'"),
        (called("body", "answer-body-end"), "body", "the name 'answer-body-end' is needed for the answer 'body'"),
    ],
)
def test_names_that_answers_need_are_free_in_the_plan(plan: cl.Plan, name: str, text: str):
    with pytest.raises(PlanError, match="E114") as caught:
        plan.with_extras(cl.Answer(name, to="alpha"))
    assert text in str(caught.value)


def test_what_is_accepted_can_be_served():
    for plan, answers in (
        (chain(), [cl.Answer("body", to="head")]),
        (two_ends(), [cl.Answer("body", to="head"), cl.Answer("aside", to="alpha")]),
        (called("b" * 52), [cl.Answer("b" * 52, to="alpha")]),
    ):
        assert "alpha" in clients_of(plan.with_extras(*answers), "server")


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
