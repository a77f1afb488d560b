"""Joint prediction: in one process and over the network, with the weights of a run, and what is written."""

from __future__ import annotations

import csv
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import cutlayer as cl
from cutlayer.core.batching import lane_batches, microbatch_sizes
from cutlayer.engine.agree import Agreed
from cutlayer.errors import CheckpointError, ConfigError, DataError
from cutlayer.run.prediction import classes_of, predict_with_others, rows_of, write_predictions
from cutlayer.run.results import write_results
from tests.run import plans
from tests.run.trial import Trial

pytestmark = pytest.mark.timeout(100)


def asking(case: plans.Case) -> list[cl.Party]:
    """The parties of a case as they are built, untrained, with data to predict for and no labels."""

    def unlabelled(data: Any) -> cl.TensorTable | None:
        return data and cl.TensorTable(x=data.fields["x"])

    parties = [replace(p, prediction=unlabelled(p.data), data=None, evaluation=None) for p in case.parties()]
    holders = {p for lane in range(case.plan.lanes) for p in _needed(case.plan, lane)}
    return [replace(p, prediction=p.prediction if p.name in holders else None) for p in parties]


def _needed(plan: cl.Plan, lane: int) -> set[str]:
    graph = plan.graph
    active = graph.ancestors(graph.outputs)
    return {graph.origin(e, lane) for e in graph.edges if e.source.field and e.target in active}


def uncut(plan: cl.Plan, trained: Path, case: plans.Case) -> torch.Tensor:
    """A chain's stages put together, loaded from the run's files, on all samples: a plain loop."""
    modules = []
    for stage in plan.stages:
        if not isinstance(stage, cl.Loss):
            module = case.build(stage.places[0]).modules[stage.name]
            file = safetensors.torch.load_file(trained / f"{stage.places[0]}.safetensors")
            prefix = f"{stage.name}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)})
            modules.append(module)
    model = nn.Sequential(*modules).eval()
    data = next(p.prediction for p in asking(case) if p.prediction is not None).fields["x"]
    found = []
    with torch.no_grad():
        for batch in data.split(lane_batches(len(data), plan.training.batch_size, False)):
            for micro in batch.split(list(microbatch_sizes(len(batch), plan.training.microbatches))):
                found.append(model(micro))
    return torch.cat(found)


class Runs:
    """Folders of the cases, as training runs leave them; each is trained when it is first asked for."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def __truediv__(self, name: str) -> Path:
        if not (self.base / name).exists():
            (self.base / name).mkdir()
            case = plans.CASES[name](epochs=1)
            write_results(self.base / name, cl.simulate(case.plan, case.parties()))
        return self.base / name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("name", ["u_shaped", "hops"])
def test_in_one_process_with_weights_equals_the_uncut_model(name: str, trained: Runs):
    case = plans.CASES[name]()
    found = cl.predict(case.plan, asking(case), weights=trained / name)
    (output,) = found.values()
    assert torch.equal(output, uncut(case.plan, trained / name, case))
    untrained = cl.predict(case.plan, asking(case))
    assert not torch.equal(output, next(iter(untrained.values())))  # else nothing was loaded


@pytest.mark.parametrize("name", ["u_shaped", "vertical", "hops", "relay", "parallel"])
def test_over_the_network_equals_one_process(name: str, trained: Runs, tmp_path: Path):
    case = plans.CASES[name]()
    expected = cl.predict(case.plan, asking(case), weights=trained / name)
    trial = Trial(case.plan, tmp_path)

    def ask(party: cl.Party) -> dict[str, torch.Tensor]:
        return cl.predict(case.plan, party, network=trial.settings(party.name), weights=trained / name)

    found = trial.play({party.name: (lambda party=party: ask(party)) for party in asking(case)})
    lanes = [stage.places for stage in case.plan.stages if stage.name in expected]
    for output, places in zip(expected, lanes, strict=True):
        assert torch.equal(torch.cat([found[party][output] for party in places]), expected[output])
    assert all(not found[party] for party in case.plan.parties if not any(party in places for places in lanes))


def test_labels_counts_and_gradients_stay(trained: Runs, tmp_path: Path):
    """Others are told the number of samples to predict for; bytes are those of the activations, one way."""
    case = plans.u_shaped()
    trial = Trial(case.plan, tmp_path)
    kept = [replace(p, data=q.data) for p, q in zip(asking(case), case.parties(), strict=True)]
    parts = {
        p.name: (lambda p=p: predict_with_others(case.plan, p, network=trial.settings(p.name), weights=None))
        for p in kept
    }
    found = trial.play(parts)
    for result in found.values():
        assert result.samples == {"predict": {"alpha": plans.ROWS}}
    flows = {key[:5:2]: row.payload for key, row in found["alpha"].ledgers["alpha"].flows.items() if key[3] == "up"}
    assert flows == {("sent", "predict", 1): plans.ROWS * 8 * 4, ("received", "predict", 2): plans.ROWS * 5 * 4}
    assert not [key for key in found["alpha"].ledgers["alpha"].flows if key[3] == "down"]


def test_a_prediction_and_a_training_do_not_meet(tmp_path: Path):
    case = plans.u_shaped()
    trial = Trial(case.plan, tmp_path)
    alpha, server = asking(case)[0], case.build("server")
    found = trial.play(
        {
            "alpha": lambda: cl.predict(case.plan, alpha, network=trial.settings("alpha")),
            "server": lambda: cl.join(case.plan, server, network=trial.settings("server"), folder=tmp_path / "run"),
        }
    )
    assert {name: getattr(error, "code", error) for name, error in found.items()} == {"alpha": "E643", "server": "E643"}


def test_without_data_to_predict_for(tmp_path: Path):
    case = plans.u_shaped()
    with pytest.raises(
        DataError, match=r"E252.*no party has data to predict for \(plan 'u-shaped', prediction of alpha\).*prediction="
    ):
        cl.predict(case.plan, case.parties())
    trial = Trial(case.plan, tmp_path)
    found = trial.play(
        {p.name: (lambda p=p: cl.predict(case.plan, p, network=trial.settings(p.name))) for p in case.parties()}
    )
    told = [error for error in found.values() if error.code == "E703"]  # the others were quicker, and told it
    assert len(told) < len(found)
    assert all("E252" in str(error) for error in found.values())


def test_one_process_is_one_party(tmp_path: Path):
    case = plans.u_shaped()
    trial = Trial(case.plan, tmp_path)
    with pytest.raises(ConfigError, match=r"E225.*as one party.*got 2"):
        cl.predict(case.plan, asking(case), network=trial.settings("alpha"))


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.provokes("E811")
def test_weights_that_are_missing_damaged_or_others(trained: Runs, tmp_path: Path):
    case = plans.u_shaped()
    with pytest.raises(CheckpointError, match=r"E811.*<party>.safetensors"):
        cl.predict(case.plan, asking(case), weights=tmp_path)
    for name in ("alpha", "server"):
        data = (trained / "u_shaped" / f"{name}.safetensors").read_bytes()
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    cl.predict(case.plan, asking(case), weights=tmp_path)  # without a summary there is nothing to compare with
    (tmp_path / "summary.json").write_bytes((trained / "hops" / "summary.json").read_bytes())
    cl.predict(case.plan, asking(case), weights=tmp_path)  # nor if it does not name these parties
    (tmp_path / "server.safetensors").write_bytes(data[:-7])
    with pytest.raises(CheckpointError, match="E811"):
        cl.predict(case.plan, asking(case), weights=tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"E811.*summary.json"):
        cl.predict(case.plan, asking(case), weights=tmp_path)


@pytest.mark.provokes("E811")
def test_the_folder_of_a_run_that_has_not_ended_or_of_another_party(trained: Runs, tmp_path: Path):
    case = plans.u_shaped()
    (tmp_path / "other.safetensors").write_bytes((trained / "u_shaped" / "server.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"this is the folder of other: give that of alpha's own run"):
        cl.predict(case.plan, asking(case), weights=tmp_path)
    (tmp_path / "other.safetensors").unlink()
    (tmp_path / "launch.json").write_text('{"kind": "join", "digest": "", "party_files": []}')
    with pytest.raises(CheckpointError, match=r"the run has not ended: cutlayer resume .*, then predict"):
        cl.predict(case.plan, asking(case), weights=tmp_path)


def test_a_changed_file_is_refused_where_the_summary_has_its_hash(trained: Runs, tmp_path: Path):
    case = plans.u_shaped()
    for path in (trained / "u_shaped").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    held = safetensors.torch.load_file(tmp_path / "server.safetensors")
    held["body.0.bias"][0] += 1.0
    safetensors.torch.save_file(held, tmp_path / "server.safetensors")
    with pytest.raises(CheckpointError, match=r"E811.*not those that the run wrote.*without summary.json"):
        cl.predict(case.plan, asking(case), weights=tmp_path)


@pytest.mark.provokes("E812")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda held: held.pop("body.0.bias"), "got without body.0.bias"),
        (lambda held: held.update({"body.9.bias": torch.zeros(1)}), "got also body.9.bias"),
        (
            lambda held: held.update({"body.0.bias": torch.zeros(6)}),
            r"expected float32\[5\] for 'body.0.bias', got float32\[6\]",
        ),
        (lambda held: held.update({"body.0.bias": held["body.0.bias"].half()}), r"got float16\[5\] for"),
    ],
)
def test_weights_of_other_stages_change_nothing(change: Any, text: str, trained: Runs, tmp_path: Path):
    case = plans.u_shaped()
    held = safetensors.torch.load_file(trained / "u_shaped" / "server.safetensors")
    change(held)
    safetensors.torch.save_file(held, tmp_path / "server.safetensors")
    data = (trained / "u_shaped" / "alpha.safetensors").read_bytes()
    (tmp_path / "alpha.safetensors").write_bytes(data)
    parties = asking(case)
    before = {k: v.clone() for k, v in parties[1].modules["body"].state_dict().items()}
    with pytest.raises(CheckpointError, match=f"E812.*{text}"):
        cl.predict(case.plan, parties, weights=tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in parties[1].modules["body"].state_dict().items())


def test_weights_of_several_replicas_at_one_party(tmp_path: Path):
    """`stage@lane` names: each lane gets its own."""
    plan = cl.u_shaped(["alpha", "beta"], "server", **plans.U, order="parallel", epochs=1, batch_size=6)
    stages = [
        cl.Stage("body", at=["server", "server"], inputs=["head"], output=plans.U["back"]) if s.name == "body" else s
        for s in plan.stages
    ]
    plan = cl.Plan(stages, training=plan.training)
    build = plans.relay().build
    parties = [build(name) for name in plan.parties]
    result = cl.simulate(plan, parties)
    write_results(tmp_path, result)
    modules = [result.workers["server"].site.stages["body", lane].module for lane in (0, 1)]
    assert not torch.equal(modules[0][1].running_mean, modules[1][1].running_mean)
    asked = [replace(build(name), data=None, evaluation=None) for name in plan.parties]
    asked = [
        replace(p, prediction=cl.TensorTable(x=build(p.name).data.fields["x"])) if p.name != "server" else p
        for p in asked
    ]
    found = cl.predict(plan, asked, weights=tmp_path)["tail"]
    expected = []
    for name, module in zip(("alpha", "beta"), modules, strict=True):
        ends = next(p for p in parties if p.name == name).modules
        model = nn.Sequential(ends["head"], module, ends["tail"]).eval()
        expected += [model(x) for x in build(name).data.fields["x"].split(6)]
    assert torch.equal(found, torch.cat(expected))


# --- what is written -------------------------------------------------------------------------------------------------


def test_small_outputs_are_written_as_csv_too(tmp_path: Path):
    wide, odd = torch.randn(4, 65), torch.tensor([[0.1, 1e-30], [1 / 3, -2.5], [7.0, 3e38], [0.0, -0.0]])
    outputs = {"wide": wide, "tail": odd, "class.top": torch.tensor([3, 1, 2, 0])}
    document = write_predictions(tmp_path, outputs)
    assert document["tail"] == {"dtype": "float32", "shape": [4, 2]}
    held = safetensors.torch.load_file(tmp_path / "predictions.safetensors")
    assert all(torch.equal(held[name], value) for name, value in outputs.items())
    with (tmp_path / "predictions.csv").open() as file:
        head, *rows = csv.reader(file)
    assert head == ["sample", "tail.0", "tail.1", "class.top"]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert torch.equal(torch.tensor([[float(cell) for cell in row[1:3]] for row in rows]), odd)
    assert [row[3] for row in rows] == ["3", "1", "2", "0"]


@pytest.mark.parametrize(
    ("rows", "head", "first"),
    [
        ([("b", 1), ("c", 3)], ["party", "sample"], [["b", "0"], ["c", "0"], ["c", "1"], ["c", "2"]]),
        ([("b", 4)], ["sample"], [["0"], ["1"], ["2"], ["3"]]),
        ([("b", 4), ("c", 3)], ["sample"], [["0"], ["1"], ["2"], ["3"]]),  # a party's own part of them
    ],
)
def test_rows_of_several_parties_say_whose_they_are(
    rows: list[tuple[str, int]], head: list[str], first: list[list[str]], tmp_path: Path
):
    write_predictions(tmp_path, {"tail": torch.arange(4)}, rows=rows)
    with (tmp_path / "predictions.csv").open() as file:
        found = list(csv.reader(file))
    assert found[0] == [*head, "tail"]
    assert found[1:] == [[*one, str(place)] for place, one in enumerate(first)]
    assert json.loads((tmp_path / "prediction.json").read_text())["samples"] == dict(rows)


def test_rows_are_those_of_the_data_holders_lane_by_lane():
    plan = cl.u_shaped(
        ["c", "a", "b"], "server", cut="float32[batch, 2]", back="float32[batch, 2]", output="float32[batch, 2]"
    )
    assert rows_of(plan, {"a": 3, "b": 0, "c": 2}) == [("c", 2), ("a", 3)]


def test_classes_are_named_where_they_are_known(tmp_path: Path):
    outputs = {"tail": torch.tensor([[0.1, 2.0], [3.0, 1.0]]), "map": torch.zeros(2, 2, 3), "one": torch.ones(2, 1)}
    classes = {"tail": ("mild", "severe, acute"), "map": ("a", "b"), "one": ("a", "b"), "elsewhere": (1, 2)}
    document = write_predictions(tmp_path, outputs, classes)
    assert document["tail"] == {"dtype": "float32", "shape": [2, 2], "classes": ["mild", "severe, acute"]}
    assert [name for name in document if "classes" in document[name]] == ["tail"]
    assert json.loads((tmp_path / "prediction.json").read_text()) == {"outputs": document}
    with (tmp_path / "predictions.csv").open() as file:
        head, *rows = csv.reader(file)
    assert head[:5] == ["sample", "tail.0", "tail.1", "tail.class", "map.0"]
    assert [row[3] for row in rows] == ["severe, acute", "mild"]


def test_classes_are_those_of_the_label_of_the_loss():
    stages = [
        cl.Stage("head", at=("a", "b"), inputs=["data.x"], output="float32[batch, 2]"),
        cl.Stage(
            "body", at="server", inputs=["head"], output={"kind": "float32[batch, 2]", "age": "float32[batch, 1]"}
        ),
        cl.Loss("loss", at="server", inputs=["body.kind", "data.y@head"]),
        cl.Loss("other", at="server", inputs=["body.age", "data.age@head"]),
    ]
    releases = [cl.Release(name, at="head", to="server", spec="int64[batch]") for name in ("y", "age")]
    plan = cl.Plan(stages, releases=releases)
    lists = {"y": Agreed("classes", values=("mild", "severe")), "age": Agreed("scale"), "x": Agreed("scale")}
    assert classes_of(plan, {"a": lists, "b": lists}) == {"body.kind": ("mild", "severe")}
    assert classes_of(plan, {"server": {}}) == {}


def test_nothing_is_written_where_there_is_nothing(tmp_path: Path):
    assert write_predictions(tmp_path / "no", {}) == {}
    assert not (tmp_path / "no").exists()
    write_predictions(tmp_path, {"wide": torch.zeros(2, 100)})
    assert {path.name for path in tmp_path.iterdir()} == {"prediction.json", "predictions.safetensors"}


@pytest.mark.provokes("E260")
def test_outputs_of_several_lengths_are_refused():
    stages = [
        cl.Stage("head", at="a", inputs=["data.x"], output="float32[batch, time<=9]"),
        cl.Stage("body", at="b", inputs=["head"], output="float32[batch, time<=9]"),
        cl.Loss("loss", at="b", inputs=["body", "data.y"]),
    ]
    plan = cl.Plan(stages, training=cl.Training(batch_size=2, shuffle=False))

    class Grow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, : int(x.max())]

    modules = {"a": {"head": Grow()}, "b": {"body": nn.Identity(), "loss": nn.MSELoss()}}
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(4, 9)
    parties = [cl.Party("a", modules=modules["a"], prediction=cl.TensorTable(x=x)), cl.Party("b", modules=modules["b"])]
    with pytest.raises(DataError, match=r"E260.*'body' has another shape in each batch.*got \[2\], \[4\].*pad"):
        cl.predict(plan, parties)
    for rows, length in ((slice(0, 2), 2), (slice(2, 4), 4)):  # the remedy: the samples of each length by themselves
        parties[0] = cl.Party("a", modules=modules["a"], prediction=cl.TensorTable(x=x[rows]))
        assert cl.predict(plan, parties)["body"].shape == (2, length)


def test_no_thread_stays(trained: Runs, tmp_path: Path):
    known = set(threading.enumerate())
    case = plans.u_shaped()
    trial = Trial(case.plan, tmp_path)
    trial.play({p.name: (lambda p=p: cl.predict(case.plan, p, network=trial.settings(p.name))) for p in asking(case)})
    for thread in set(threading.enumerate()) - known:
        thread.join(10)  # one of gRPC's may be at its end
    assert set(threading.enumerate()) <= known
