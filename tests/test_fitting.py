"""A user's own model in a few lines: cut, trained, put together again; equal to the uncut model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SequentialSampler,
    TensorDataset,
)
from torchmetrics.classification import MulticlassAccuracy

import cutlayer as cl
from cutlayer.errors import ConfigError, DataError, PlanError, StageError
from cutlayer.fitting import adam, fit
from cutlayer.models.split import split
from tests.oracle import sample_order


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(out)))


class Net(nn.Module):
    """A small ResNet, as a user has it: it knows nothing of cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.layer1, self.layer2 = Residual(4), Residual(4)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(16, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.layer2(self.layer1(torch.relu(self.stem(image))))
        return self.fc(torch.flatten(self.pool(x), 1))


def model() -> Net:
    torch.manual_seed(0)
    return Net()


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def images(count: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(count, 1, 8, 8, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    )


EXAMPLE = torch.zeros(4, 1, 8, 8)


def trained(batches: list[tuple[Tensor, Tensor]]) -> Net:
    """The uncut model after a plain loop."""
    net = model()
    optimizer = torch.optim.Adam(net.parameters())
    for x, y in batches:
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("at", "labels"),
    [
        ("layer1", "client"),
        ("layer1.conv1", "client"),
        (("layer1.bn1", "layer2.conv2"), "client"),
        ("layer2", "server"),
        (("stem", "layer1", "layer2"), "server"),
    ],
)
def test_a_split_model_trains_as_the_uncut_one(at, labels, tmp_path):
    net, data = model(), images(20)
    run = fit(
        split(net, at, example=EXAMPLE, labels=labels),
        DataLoader(data, batch_size=8),
        loss=nn.CrossEntropyLoss(),
        epochs=2,
    )
    batches = [batch for _ in (1, 2) for batch in DataLoader(data, batch_size=8)]
    uncut = trained(batches).state_dict()
    assert same(run.state_dict(), uncut)
    assert same(net.state_dict(), uncut)  # in place
    run.save(tmp_path / "joined.safetensors")
    fresh = Net()
    fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "joined.safetensors"), strict=True)
    assert same(fresh.state_dict(), uncut)


@pytest.mark.parametrize(("size", "drop_last"), [(64, False), (3, True), (5, False)])
def test_an_evaluation_loader_of_another_batch_size_evaluates_the_same_samples(size: int, drop_last: bool):
    def tried(evaluation):
        net = model()
        run = fit(
            split(net, "layer1", example=EXAMPLE),
            DataLoader(images(8), batch_size=4, drop_last=True),
            loss=nn.CrossEntropyLoss(),
            evaluation=evaluation,
            party={"metrics": {"loss": lambda: {"accuracy": MulticlassAccuracy(num_classes=3, average="micro")}}},
        )
        return net.eval(), run.result.metrics("evaluate")["loss"]

    data = images(10, seed=1)
    net, plain = tried(data)
    _, other = tried(DataLoader(data, batch_size=size, drop_last=drop_last))
    assert other == plain
    x, y = data.tensors
    with torch.no_grad():
        output = net(x)
    assert other["accuracy"] == pytest.approx((output.argmax(1) == y).float().mean().item())
    assert other["loss"] == pytest.approx(nn.functional.cross_entropy(output, y).item())


class Second(Sampler):
    """Every second sample, backwards."""

    def __len__(self) -> int:
        return 8

    def __iter__(self):
        return iter(range(14, -2, -2))


def test_a_batch_size_that_is_given_counts_before_that_of_the_loaders():
    net, data = model(), images(16)
    loader = DataLoader(data, batch_size=7, sampler=Second())
    fit(split(net, "layer1", example=EXAMPLE), loader, loss=nn.CrossEntropyLoss(), batch_size=3, drop_last=True)
    rows = list(range(14, -2, -2))
    batches = [data[rows[place : place + 3]] for place in (0, 3)]
    assert same(net.state_dict(), trained(batches).state_dict())
    held = [DataLoader(images(8, seed), batch_size=size) for seed, size in enumerate((4, 8))]
    run = fit(split(model(), "layer1", example=EXAMPLE), held, loss=nn.CrossEntropyLoss(), batch_size=2)
    assert run.result.plan.training.batch_size == 2


class Own(DataLoader):
    """A loader that makes its batches in its own way."""

    def __iter__(self):
        return super().__iter__()


def test_a_loader_with_batches_of_its_own_making_is_not_made_anew():
    with pytest.raises(DataError, match="the loader makes other batches than the plan") as caught:
        fit(split(model(), "layer1", example=EXAMPLE), Own(images(8), 4), loss=nn.CrossEntropyLoss(), batch_size=2)
    assert caught.value.code == "E256"


def test_three_data_holders_take_turns():
    net, held = model(), [images(count, seed) for seed, count in enumerate((16, 9, 24))]
    run = fit(split(net, "layer1", example=EXAMPLE), held, loss=nn.CrossEntropyLoss(), epochs=2, batch_size=8)
    batches = []
    for epoch in (1, 2):
        for lane, data in enumerate(held):
            order = sample_order(0, epoch, lane, len(data))
            batches += [data[order[begin : begin + 8]] for begin in range(0, len(data), 8)]
    assert same(run.state_dict(), trained(batches).state_dict())
    assert run.result.plan.parties == ("client-1", "client-2", "client-3", "server")


def test_a_skip_crosses_only_where_it_must():
    inside = split(model(), "layer1.conv1", example=EXAMPLE)
    assert list(inside.plan().stage("head").ports) == list(inside.cut.pieces[0].outputs)
    assert len(inside.plan().stage("head").ports) == 2  # the block's input goes around it
    assert not inside.plan().releases
    assert str(inside.plan().stage("tail").ports[""]) == "float32[batch, 3]"


def test_metrics_evaluation_and_the_report(tmp_path):
    run = fit(
        split(model(), "layer1", example=EXAMPLE),
        images(24),
        loss=nn.CrossEntropyLoss(),
        evaluation=images(10, 9),
        party={"metrics": {"loss": lambda: {"accuracy": MulticlassAccuracy(num_classes=3, average="micro")}}},
        epochs=2,
        batch_size=8,
        evaluate_every=1,
    )
    assert 0.0 <= run.result.metrics("evaluate")["loss"]["accuracy"] <= 1.0
    assert "client: sent" in run.summary()
    page = run.report(tmp_path / "report.html")
    text = page.read_text()
    assert "accuracy" in text
    assert "https://" not in text
    assert "http://" not in text.replace("http://www.w3.org/", "")


def test_labels_of_the_server_are_a_declared_release():
    text = str(split(model(), "layer1", example=EXAMPLE, labels="server").plan())
    assert "RAW data.label (declared release) to server" in text
    assert "keeps   data.image, its weights" in text


class Masked(nn.Module):
    """Needs its mask in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(self.first(x) * mask)))


def test_a_raw_input_leaves_only_if_it_is_released():
    example = {"x": torch.zeros(4, 4), "mask": torch.ones(4, 4)}
    with pytest.raises(PlanError) as caught:
        split(Masked(), "first", example=example)
    assert caught.value.code == "E331"
    assert "needs the raw input 'mask'" in str(caught.value)
    assert "release=['mask']" in str(caught.value)
    made = split(Masked(), "first", example=example, release=["mask"])
    assert "RAW data.mask (declared release) to server: float32[batch, 4]" in str(made.plan())
    rows = cl.TensorTable(x=torch.randn(8, 4), mask=torch.ones(8, 4), label=torch.ones(8).long())
    run = fit(made, rows, loss=nn.CrossEntropyLoss(), batch_size=4)
    assert run.result.metrics("train")["loss"]["loss"] > 0
    with pytest.raises(PlanError, match="no input 'lask' to release"):
        split(Masked(), "first", example=example, release=["lask"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.out = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.tanh(self.body(self.table(words))))


def test_tied_weights_stay_one_in_a_u_shape():
    torch.manual_seed(0)
    net = Tied()
    uncut = copy.deepcopy(net)
    words = torch.randint(0, 11, (16, 5), generator=torch.Generator().manual_seed(1))

    def loss(scores: Tensor, following: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scores.transpose(1, 2), following)

    run = fit(
        split(net, ("table", "body"), example=words),
        DataLoader(TensorDataset(words, words.roll(-1, 1)), batch_size=8),
        loss=loss,
        epochs=3,
    )
    optimizer = adam(list(uncut.parameters()))
    for _ in range(3):
        for begin in (0, 8):
            loss(uncut(words[begin : begin + 8]), words.roll(-1, 1)[begin : begin + 8]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(run.state_dict(), uncut.state_dict())
    assert net.out.weight is net.table.weight
    with pytest.raises(PlanError) as caught:
        split(Tied(), "table", example=words, labels="server")
    assert caught.value.code == "E332"
    assert "are one weight, at two parties" in str(caught.value)
    assert "labels='client'" in str(caught.value)


class Shared(Tied):
    """One embedding for encoder, decoder and last layer, as in BART."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.out(torch.tanh(self.body(self.first(self.table(source) + self.table(target).flip(1)))))


@pytest.mark.parametrize(
    ("microbatches", "schedule"), [(1, "sequential"), (2, "sequential"), (2, "gpipe"), (2, "1f1b")], ids=str
)
def test_a_weight_used_twice_in_the_head_and_again_in_the_tail_gets_its_gradients_in_the_uncut_order(
    microbatches: int, schedule: str
):
    torch.manual_seed(0)
    net = Shared()
    uncut = copy.deepcopy(net)
    dice = torch.Generator().manual_seed(1)
    rows = TensorDataset(*(torch.randint(0, 11, (16, 5), generator=dice) for _ in range(3)))
    loader = DataLoader(rows, batch_size=8)

    def loss(scores: Tensor, following: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scores.transpose(1, 2), following)

    def strong(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=3.0)  # so that last bits of gradients are in the weights

    made = split(net, ("first", "body"), example=rows[:2][:2])
    run = fit(made, loader, loss=loss, optimizer=strong, epochs=3, microbatches=microbatches, schedule=schedule)
    optimizer = strong(list(uncut.parameters()))
    for batch in [batch for _ in range(3) for batch in loader]:
        for source, target, following in zip(*(part.chunk(microbatches) for part in batch), strict=True):
            (loss(uncut(source, target), following) / microbatches).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(run.state_dict(), uncut.state_dict())


def test_the_parties_run_under_the_autocast_of_the_split():
    def trained(at_split: str, party: dict[str, str]) -> dict[str, Tensor]:
        parts = split(model(), "layer1", example=torch.zeros(2, 1, 8, 8), autocast=at_split)
        return fit(parts, images(8), loss=nn.CrossEntropyLoss(), optimizer=sgd, party=party, batch_size=4).state_dict()

    found = trained("bfloat16", {})
    assert same(found, trained("bfloat16", {"autocast": "bfloat16"}))
    assert not same(found, trained("", {}))
    with pytest.raises(StageError, match=r"E301.*give cl.split\(autocast='bfloat16'\) too, or neither"):
        trained("", {"autocast": "bfloat16"})


def test_lengths_that_change_lead_to_longest():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    words = TensorDataset(torch.ones(4, 6).long(), torch.zeros(4, 6).long())
    with pytest.raises(
        StageError, match=r"E301.*float32\[4, 6, 4\] instead of float32\[4, 5, 4\].*longest= of cl.split"
    ):
        fit(split(net, 0, example=torch.ones(2, 5).long()), words, loss=nn.CrossEntropyLoss(), batch_size=4)


@pytest.mark.provokes("E330", "E235")
def test_cut_points_must_fit_where_the_labels_are():
    with pytest.raises(PlanError) as caught:
        split(model(), ("layer1", "layer2"), example=EXAMPLE, labels="server")
    assert caught.value.code == "E330"
    assert "2 cut points with the labels at the server" in str(caught.value)
    with pytest.raises(ConfigError) as wrong:
        split(model(), "layer1", example=EXAMPLE, labels="cloud")
    assert wrong.value.code == "E235"
    assert wrong.value.expected == "client or server"


@pytest.mark.provokes("E236")
def test_settings_and_data_that_do_not_fit_are_refused():
    made = split(model(), "layer1", example=EXAMPLE)
    for wrong, words in (
        ({"epoch": 3}, "fit has no setting 'epoch'"),
        ({"seed": 0, "device": "cpu"}, "give it in party={...}"),
        ({"party": {"devise": "cpu"}}, "party has no setting 'devise'"),
        ({"evaluation": [images(4), images(4)]}, "as many data sets for evaluation as for training"),
    ):
        with pytest.raises(ConfigError) as caught:
            fit(made, images(8), loss=nn.CrossEntropyLoss(), **wrong)
        assert caught.value.code == "E236"
        assert words in str(caught.value)
    loaders = [DataLoader(images(8), batch_size=size) for size in (4, 8)]
    with pytest.raises(ConfigError, match="loaders with one batch_size"):
        fit(made, loaders, loss=nn.CrossEntropyLoss())
    with pytest.raises(DataError) as missing:
        fit(made, TensorDataset(torch.zeros(8, 1, 8, 8)), loss=nn.CrossEntropyLoss())
    assert missing.value.code == "E253"
    assert "expected a tuple (image, label)" in str(missing.value)


class Stream(IterableDataset):
    def __iter__(self):
        yield from images(4)


class Named(Dataset):
    """Items with a label that is a text."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return torch.zeros(1, 8, 8), "cat"


def test_data_that_is_none_is_refused_by_what_it_is():
    made = split(model(), "layer1", example=EXAMPLE)
    sampler = BatchSampler(SequentialSampler(images(8)), 4, drop_last=False)
    for data, code, words in (
        ([], "E236", "an empty list"),
        (
            [images(4)[0], images(4)[1]],
            "E236",
            "a list of data sets: one for each data holder, got a list of tuple of Tensor",
        ),
        (DataLoader(images(8), batch_sampler=sampler), "E236", "loaders with a batch_size"),
        (DataLoader(images(8), batch_size=None), "E236", "loaders with a batch_size"),
        (images(0), "E253", "the data has no samples"),
        (Stream(), "E255", "got Stream"),
        (DataLoader(Stream(), batch_size=2), "E255", "got Stream"),
        (iter(images(4)), "E255", "map-style data set"),
        (Named(), "E253", "what was taken for the label cannot be one: 'label'"),
    ):
        with pytest.raises((ConfigError, DataError)) as caught:
            fit(made, data, loss=nn.CrossEntropyLoss())
        assert (caught.value.code, words in str(caught.value)) == (code, True), str(caught.value)


def test_an_optimizer_that_needs_a_closure_is_refused():
    made = split(model(), "layer1", example=EXAMPLE)
    with pytest.raises(ConfigError, match=r"E221.*LBFGS.*without a closure.*such as SGD"):
        fit(made, images(8), loss=nn.CrossEntropyLoss(), optimizer=torch.optim.LBFGS)


@pytest.mark.provokes("E221")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("holders", "words"),
    [
        (1, "the optimizer of party 'server' holds parameters of 'client'"),
        (2, "the optimizer holds none of the parameters that it is made for"),  # the second holder's are copies
    ],
)
def test_an_optimizer_over_the_whole_model_is_refused(holders: int, words: str, shared: bool):
    """It would step weights amid their microbatches, and of several holders those of the first only."""
    net = model()
    one, data = sgd(list(net.parameters())), [images(8)] * holders
    made = split(net, "layer1", example=EXAMPLE)
    with pytest.raises(ConfigError, match=rf"E221.*{words}.*take the argument: lambda parameters: torch"):
        fit(
            made,
            data,
            loss=nn.CrossEntropyLoss(),
            optimizer=(lambda _: one) if shared else lambda _: sgd(list(net.parameters())),
            microbatches=2,
            batch_size=4,
        )


@pytest.mark.provokes("E341")
@pytest.mark.parametrize("holders", [1, 2])
def test_a_penalty_on_the_whole_model_in_the_loss_is_refused(holders: int):
    """Of two holders it would have pulled at the first one's weights in the second one's turn."""
    net = model()

    def penalised(score: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(score, label) + sum(p.abs().sum() for p in net.parameters())

    words = r"E341.*loss 'loss' goes back to weights that are not.*stage loss.*of a parameter of shape.*weight_decay"
    with pytest.raises(StageError, match=words):
        fit(split(net, "layer1", example=EXAMPLE), [images(8)] * holders, loss=penalised, batch_size=4)


def test_a_penalty_on_weights_at_the_losss_own_party_is_as_uncut():
    ours, theirs, data = model(), model(), images(8)

    def penalised(net: Net) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda score, label: nn.functional.cross_entropy(score, label) + net.fc.weight.abs().sum()

    made = split(ours, "layer1", example=EXAMPLE)
    fit(made, data, loss=penalised(ours), optimizer=sgd, batch_size=4, shuffle=False)
    optimizer = sgd(list(theirs.parameters()))
    for image, label in DataLoader(data, batch_size=4):
        optimizer.zero_grad()
        penalised(theirs)(theirs(image), label).backward()
        optimizer.step()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("kind", ["gradient", "accumulated"])
def test_hooks_on_weights_act_at_every_data_holder(kind: str):
    """Copies of torch have no hooks of parameters: the second holder would have trained without the clamp."""

    def accumulated(parameter: Tensor) -> None:
        parameter.grad.clamp_(-0.01, 0.01)

    def hooked() -> Net:
        net = model()
        for parameter in net.parameters():
            if kind == "gradient":
                parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
            else:
                parameter.register_post_accumulate_grad_hook(accumulated)
        return net

    ours, theirs, held = hooked(), hooked(), [images(8), images(8)]
    run = fit(
        split(ours, "layer1", example=EXAMPLE),
        held,
        loss=nn.CrossEntropyLoss(),
        optimizer=sgd,
        batch_size=4,
        shuffle=False,
        order="relay",
    )
    optimizer = sgd(list(theirs.parameters()))
    for data in held:
        for image, label in DataLoader(data, batch_size=4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(theirs(image), label).backward()
            optimizer.step()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in run.state_dict().items())


class Words(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.table, self.middle, self.out = nn.Embedding(20, 4, sparse=sparse), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.relu(self.middle(self.table(words).mean(1))))


@pytest.mark.parametrize("clip", ["party", "global"])
def test_sparse_gradients_are_clipped_as_dense_ones(clip: str):
    dice = torch.Generator().manual_seed(1)
    words, label = torch.randint(0, 20, (24, 5), generator=dice), torch.randint(0, 3, (24,), generator=dice)
    trained = []
    for sparse in (True, False):
        torch.manual_seed(0)
        made, settings = split(Words(sparse=sparse), "table", example=words[:3]), {"clip": clip, "clip_norm": 0.05}
        run = fit(
            made,
            TensorDataset(words, label),
            loss=nn.CrossEntropyLoss(),
            optimizer=sgd,
            batch_size=8,
            microbatches=2,
            shuffle=False,
            **settings,
        )
        trained.append(run.state_dict())
    torch.manual_seed(0)
    first = Words(sparse=False).state_dict()
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=0, atol=1e-6)
        assert 0 < (value - first[name]).norm() < 0.1 * 0.05 * 3 * 1.01


def test_the_label_has_the_name_that_the_data_gives_it():
    rows = [{"image": image, "labels": label} for image, label in images(8)]
    settings = {"loss": nn.CrossEntropyLoss(), "shuffle": False, "party": {"seed": 0}}
    named = fit(split(model(), "layer1", example=EXAMPLE), DataLoader(rows, batch_size=4), **settings)
    plain = fit(split(model(), "layer1", example=EXAMPLE), DataLoader(images(8), batch_size=4), **settings)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in named.state_dict().items())
    assert (named.label, plain.label) == ("labels", "label")
    more = [{**row, "id": 0} for row in rows]
    told = fit(split(model(), "layer1", example=EXAMPLE), DataLoader(more, batch_size=4), label="labels", **settings)
    assert same(told.state_dict(), plain.state_dict())
    with pytest.raises(DataError, match=r"E253.*\(image, label\).*got fields image, labels, id"):
        fit(split(model(), "layer1", example=EXAMPLE), DataLoader(more, batch_size=4), **settings)


@pytest.mark.parametrize("labels", ["client", "server"])
def test_a_run_predicts_as_the_uncut_model(labels: str):
    made = split(model(), "layer1.bn1" if labels == "client" else "layer1", example=EXAMPLE, labels=labels)
    run = fit(made, [images(12), images(9, 1)], loss=nn.CrossEntropyLoss(), batch_size=6, epochs=2)
    joined = Net()
    joined.load_state_dict(cl.assemble(run), strict=True)
    joined.eval()
    assert same(joined.state_dict(), run.state_dict())
    new, labelled = images(11, 2).tensors[0], images(11, 2)
    whole, parted = joined(new), torch.cat([joined(new[:4]), joined(new[4:8]), joined(new[8:])])
    assert torch.equal(run.predict(TensorDataset(new)), whole)
    for data in (labelled, cl.TensorTable(image=new), [{"image": one, "note": 3} for one in new], list(labelled)):
        assert torch.equal(run.predict(data, batch_size=4), parted)
    for data in (TensorDataset(new), labelled):
        for shuffle in (False, True):
            assert torch.equal(run.predict(DataLoader(data, batch_size=4, shuffle=shuffle, drop_last=True)), parted)
    assert same(joined.state_dict(), run.state_dict())


def test_a_prediction_leaves_each_modules_mode():
    made = split(model(), "layer1", example=EXAMPLE)
    run = fit(made, images(12), loss=nn.CrossEntropyLoss(), batch_size=6, epochs=1)
    made.model.train()
    made.model.layer1.bn1.eval()
    modes = {name: module.training for name, module in made.model.named_modules()}
    run.predict(images(11, 2))
    assert {name: module.training for name, module in made.model.named_modules()} == modes
    made.model.eval()
    run.predict(images(11, 2))
    assert not any(module.training for module in made.model.modules())


def test_a_further_fit_trains_the_modules_of_an_earlier_run():
    made, new = split(model(), "layer1", example=EXAMPLE), images(11, 2)
    settings = {"loss": nn.CrossEntropyLoss(), "batch_size": 6}
    first = fit(made, images(12), **settings)
    before = first.predict(new)
    second = fit(made, images(12), **settings)
    assert torch.equal(first.predict(new), second.predict(new))
    assert not torch.equal(first.predict(new), before)


@pytest.mark.provokes("E236", "E253", "E255")
def test_data_that_a_run_cannot_predict_for():
    run = fit(split(model(), "layer1", example=EXAMPLE), images(8), loss=nn.CrossEntropyLoss())
    for data, words in (
        (images(0), "E253.*the data has no samples"),
        (cl.TensorTable(x=torch.zeros(2, 1, 8, 8)), "E253.*does not give the model's inputs.*image.*got fields x"),
        (TensorDataset(*[torch.zeros(2, 1, 8, 8)] * 3), r"E253.*a tuple \(image\), with a label or without.*3 values"),
        (torch.zeros(2, 1, 8, 8), "E236.*got a list of Tensor.*make it a data set first"),
        ([images(8), images(8)], "E253.*cannot be put together"),
        (Stream(), "E255.*the data set has no length"),
    ):
        with pytest.raises((ConfigError, DataError), match=words):
            run.predict(data)


class Conditioned(nn.Module):
    """An argument of its forward is called `label`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.three(torch.relu(self.two(torch.relu(self.one(x + label)))))


def test_an_argument_called_label_is_not_taken_for_the_label():
    x, label, target = torch.randn(8, 4), torch.randn(8, 4), torch.arange(8) % 2
    made = split(Conditioned(), "one", example=(x[:2], label[:2]))
    run = fit(made, TensorDataset(x, label, target), loss=nn.CrossEntropyLoss(), batch_size=8, optimizer=sgd)
    uncut = Conditioned()
    nn.functional.cross_entropy(uncut(x, label), target).backward()
    sgd(list(uncut.parameters())).step()
    order = {key: value.double() for key, value in uncut.state_dict().items()}
    assert all(torch.allclose(value.double(), order[key], atol=1e-6) for key, value in run.state_dict().items())


def ragged(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"image": torch.stack([one["image"] for one in items]), "notes": torch.zeros(3)}


@pytest.mark.provokes("E253")
def test_a_further_field_that_can_be_no_label_is_not_taken_for_it():
    made = split(model(), "layer1", example=EXAMPLE)
    for data, words in (
        ([{"image": image, "path": "a.png"} for image, _ in images(8)], "'path', the one field.*got list of str"),
        (DataLoader([{"image": one} for one, _ in images(8)], 4, collate_fn=ragged), r"'notes'.*shape \(3,\) for 2"),
        (Named(), r"'label' \(.*expected a number or tensor.*got tuple of str"),
    ):
        held = [data]
        with pytest.raises(DataError, match=f"E253.*what was taken for the label cannot be one: {words}"):
            fit(made, held, loss=nn.CrossEntropyLoss())
    with pytest.raises(DataError, match=r"E253.*\(image, path\).*got fields image, labels.*fit\(label=...\)"):
        fit(made, [[{"image": i, "labels": y} for i, y in images(8)]], loss=nn.CrossEntropyLoss(), label="path")


@pytest.mark.provokes("E235")
def test_a_label_called_as_an_input_is_refused():
    x, y = torch.randn(8, 4), torch.arange(8) % 2
    made, data = split(Conditioned(), "one", example=(x[:2], x[:2])), cl.TensorTable(x=x, label=x, y=y)
    named = r"E235.*both called 'label'.*forward of Conditioned.*another name than x, label.*label='target'"
    for call in (made.plan, lambda: fit(made, data, loss=nn.CrossEntropyLoss(), label="label")):
        with pytest.raises(ConfigError, match=named):
            call()
    assert fit(made, data, loss=nn.CrossEntropyLoss()).label == "y"
    with pytest.raises(DataError, match=r"E253.*\(x, label, target\).*got fields x, label\."):
        fit(made, cl.TensorTable(x=x, label=x), loss=nn.CrossEntropyLoss())


class Noisy(Dataset):
    """Augments each sample from torch's own generator."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        image, label = images(12)[place]
        return image + torch.rand(1), label


@pytest.mark.parametrize("rows", [DataLoader(Noisy(), batch_size=4, shuffle=True), Noisy()], ids=["loader", "data set"])
def test_a_seed_makes_a_run_the_same_to_the_bit(rows: Dataset | DataLoader):
    """Shuffling, augmentation and dropout; whatever torch's own generator was told."""

    def trained(*dice: int, **party: int) -> dict[str, Tensor]:
        net = model()
        net.layer1.add_module("bn1", nn.Sequential(net.layer1.bn1, nn.Dropout(0.3)))
        net.layer2.add_module("bn1", nn.Sequential(net.layer2.bn1, nn.Dropout(0.3)))
        torch.manual_seed(*dice)
        made = split(net, "layer1", example=EXAMPLE)
        return fit(made, rows, loss=nn.CrossEntropyLoss(), epochs=2, batch_size=4, **party).state_dict()

    assert same(trained(1, seed=3), trained(2, seed=3))
    assert not same(trained(1, seed=3), trained(1, seed=4))
    assert not same(trained(1), trained(1))


def test_a_loader_with_a_generator_trains_in_the_order_of_a_loop_over_it():
    def loader() -> DataLoader:
        return DataLoader(images(13), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))

    net = model()
    uncut = copy.deepcopy(net)
    run = fit(split(net, "layer1", example=EXAMPLE), loader(), loss=nn.CrossEntropyLoss(), optimizer=sgd, epochs=3)
    optimizer, rows = sgd(list(uncut.parameters())), loader()
    for image, label in [batch for _ in range(3) for batch in rows]:
        nn.functional.cross_entropy(uncut(image), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(run.state_dict(), uncut.state_dict())


def test_names_are_public():
    assert cl.split is split
    assert cl.fit is fit


def test_few_samples_of_a_client_are_no_secret_from_who_has_all():
    """In one process `metrics_least` guards nothing, unless it is asked for."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    split = cl.split(model, (1, 3), example=torch.randn(2, 3))
    held = [TensorDataset(torch.randn(count, 3), torch.zeros(count).long()) for count in (6, 2)]
    run = cl.fit(split, held, loss=nn.CrossEntropyLoss(), epochs=1)
    assert run.result.history[-1]["metrics"]["loss"] > 0
    with pytest.raises(DataError, match="2 of client-2") as caught:
        cl.fit(split, held, loss=nn.CrossEntropyLoss(), epochs=1, metrics_least=5)
    assert caught.value.code == "E264"
