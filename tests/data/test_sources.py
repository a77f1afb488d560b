"""Data sets and loaders as batches: the plan's order, the user's own order, and the same again after a restart."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from cutlayer.core.batching import permutation
from cutlayer.core.parts import Training
from cutlayer.data.sources import LoaderBatches, Order, OrderedBatches, TensorTable, again, batches, sample_count
from cutlayer.engine.preprocess import unread
from cutlayer.errors import DataError

COUNT = 11


class Dicts(Dataset):
    """Sample i is {"x": i + noise, "id": i}; the noise is drawn when the sample is read."""

    def __init__(self, noise: float = 0.0, count: int = COUNT) -> None:
        self.noise, self.count = noise, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": index + self.noise * torch.rand(2), "id": torch.tensor(index)}


class Tuples(Dicts):
    def __getitem__(self, index: int):
        return tuple(super().__getitem__(index).values())


class Whole(Dicts):
    """Gives whole batches, with noise for each batch."""

    def batch(self, indices):
        rows = torch.as_tensor(indices)
        return {"x": rows[:, None] + self.noise * torch.rand(len(rows), 2), "id": rows}


class Halves(Sampler):
    """A batch sampler of one's own: draws an order for each half of the samples, the second when it comes to it."""

    def __init__(self, drop_last: bool) -> None:
        self.drop_last, self.dice = drop_last, torch.Generator().manual_seed(4)

    def __iter__(self) -> Iterator[list[int]]:
        rows = torch.randperm(8, generator=self.dice).tolist()
        yield rows[:4]
        yield rows[4:]
        rest = (8 + torch.randperm(COUNT - 8, generator=self.dice)).tolist()
        if not self.drop_last:
            yield rest

    def __len__(self) -> int:
        return 2 if self.drop_last else 3


class Backwards(Sampler):
    def __iter__(self) -> Iterator[int]:
        return iter(range(COUNT - 1, -1, -1))

    def __len__(self) -> int:
        return COUNT


def order(count: int = COUNT, **changes: object) -> Order:
    numbers = {"shuffle": True, "drop_last": False, "seed": 3, "fields": None, **changes}
    return Order(training=Training(batch_size=4, seed=numbers.pop("plan_seed", 0)), count=count, **numbers)


def epoch_of(source: OrderedBatches | LoaderBatches, epoch: int = 1, start: int = 0, lane: int = 0) -> list[dict]:
    """The batches of an epoch from `start` on."""
    sizes = [4, 4, 3] if not source.order.drop_last else [4, 4]
    return [
        dict(source.load(lane=lane, epoch=epoch, index=index, size=size))
        for index, size in enumerate(sizes)
        if index >= start
    ]


def ids(found: list[dict]) -> list[int]:
    return [int(row) for batch in found for row in batch["id"]]


def same(mine: list[dict], other: list[dict]) -> bool:
    assert [batch.keys() for batch in mine] == [batch.keys() for batch in other]
    return all(torch.equal(a[name], b[name]) for a, b in zip(mine, other, strict=True) for name in a)


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [Dicts(), Whole(), TensorTable(id=torch.arange(COUNT)), DataLoader(Dicts(), batch_size=7, shuffle=True)],
    ids=["dicts", "whole batches", "table", "loader"],
)
def test_the_plan_orders_samples(data):
    """Whatever the data set is, and whatever order a loader had."""
    for epoch, lane in ((1, 0), (2, 0), (1, 2)):
        found = epoch_of(batches(data, order(), alone=False), epoch, lane=lane)
        assert ids(found) == permutation(0, epoch, lane, COUNT)
    assert ids(epoch_of(batches(data, order(shuffle=False), alone=False))) == list(range(COUNT))
    assert ids(epoch_of(batches(data, order(drop_last=True), alone=False))) == permutation(0, 1, 0, COUNT)[:8]


def test_parties_of_one_lane_load_the_same_samples():
    """Each with another private seed, another kind of data set, and noise of its own."""
    sources = [
        batches(Dicts(noise=1.0), order(seed=1), alone=False),
        batches(Whole(noise=1.0), order(seed=2), alone=False),
        batches(DataLoader(Dicts(noise=1.0), batch_size=3, sampler=Backwards()), order(seed=3), alone=False),
    ]
    found = [epoch_of(source, 5) for source in sources]
    assert ids(found[0]) == ids(found[1]) == ids(found[2])
    assert not torch.equal(found[0][0]["x"], found[1][0]["x"])


def test_a_loader_alone_keeps_its_sampler():
    loader = DataLoader(Dicts(), batch_size=4, sampler=Backwards())
    assert ids(epoch_of(batches(loader, order(), alone=True))) == list(range(COUNT - 1, -1, -1))
    plain = batches(Dicts(), order(), alone=True)
    assert ids(epoch_of(plain)) == permutation(0, 1, 0, COUNT)


@pytest.mark.parametrize("alone", [True, False])
def test_a_loader_keeps_its_collate_function(alone):
    def collate(samples):
        return {"id": torch.stack([s["id"] for s in samples]), "count": torch.full((len(samples),), len(samples))}

    source = batches(DataLoader(Dicts(), batch_size=4, collate_fn=collate), order(), alone=alone)
    assert [batch["count"][0] for batch in epoch_of(source)] == [4, 4, 3]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("alone", [True, False])
def test_a_loader_keeps_its_workers(alone):
    """Samples and their noise are drawn in other processes, and are the same again."""
    found = []
    for start in (0, 0, 1):
        loader = DataLoader(Dicts(noise=1.0), batch_size=4, num_workers=2, multiprocessing_context="fork")
        found.append(epoch_of(batches(loader, order(), alone=alone), start=start))
    assert same(found[0], found[1])
    assert same(found[0][1:], found[2])
    assert ids(found[0]) == (list(range(COUNT)) if alone else permutation(0, 1, 0, COUNT))


# --- randomness ------------------------------------------------------------------------------------------------------

NOISY = {
    "dicts": lambda: batches(Dicts(noise=1.0), order(), alone=True),
    "tuples": lambda: batches(Tuples(noise=1.0), order(fields=("x", "id")), alone=True),
    "whole batches": lambda: batches(Whole(noise=1.0), order(), alone=True),
    "ordered loader": lambda: batches(DataLoader(Dicts(noise=1.0), batch_size=4), order(), alone=False),
    "loader": lambda: batches(DataLoader(Dicts(noise=1.0), batch_size=4), order(), alone=True),
    "shuffled loader": lambda: batches(DataLoader(Dicts(noise=1.0), batch_size=4, shuffle=True), order(), alone=True),
    "loader with a generator": lambda: batches(
        DataLoader(Dicts(noise=1.0), batch_size=4, shuffle=True, generator=torch.Generator()), order(), alone=True
    ),
    "sampler with a generator": lambda: batches(
        DataLoader(Dicts(noise=1.0), batch_size=4, sampler=RandomSampler(Dicts(), generator=torch.Generator())),
        order(),
        alone=True,
    ),
}


@pytest.mark.parametrize("make", NOISY.values(), ids=NOISY)
def test_a_restart_gives_the_batches_of_an_uninterrupted_epoch(make):
    """With random augmentation, from any batch on, in a process whose global generator is elsewhere."""
    source = make()
    whole = [epoch_of(source, epoch) for epoch in (1, 2, 3)]
    for epoch in (1, 2, 3):
        for start in (0, 1, 2):
            torch.rand(epoch + start)
            assert same(epoch_of(make(), epoch, start), whole[epoch - 1][start:])
            assert same(epoch_of(source, epoch, start), whole[epoch - 1][start:])  # a roll-back


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}], ids=str)
@pytest.mark.parametrize("kind", ["loader", "sampler", "both", "batch sampler", "own batch sampler", "none"])
def test_a_loader_with_a_generator_gives_the_order_of_a_loop_over_it(workers, kind):
    """In each epoch, whatever the party's seed; after a restart in the middle of the third too."""

    drop_last = not workers

    def loader() -> DataLoader:
        own = torch.Generator().manual_seed(3)
        given: dict = {"multiprocessing_context": "fork", **workers} if workers else {}
        given |= {"generator": own} if kind in ("loader", "both") else {}
        if kind in ("batch sampler", "own batch sampler"):
            made = BatchSampler(RandomSampler(Dicts(), generator=own), 4, drop_last)
            return DataLoader(Dicts(), batch_sampler=made if kind == "batch sampler" else Halves(drop_last), **given)
        given |= (
            {"sampler": RandomSampler(Dicts(), generator=own)} if kind in ("sampler", "both") else {"shuffle": True}
        )
        return DataLoader(Dicts(), batch_size=4, drop_last=drop_last, **given)

    def source_of(seed: int = 5) -> LoaderBatches:
        return batches(loader(), order(drop_last=drop_last, seed=seed), alone=True)

    source, plain = source_of(), loader()
    found = [ids(epoch_of(source, epoch)) for epoch in (1, 2, 3)]
    assert len({tuple(one) for one in found}) == 3
    if kind != "none":  # else the order is of the party's seed
        assert found == [ids(list(plain)) for _ in range(3)]
    for epoch in (2, 3, 1, 2):  # back in the same process
        assert ids(epoch_of(source, epoch)) == found[epoch - 1]
    for epoch in (2, 1):  # from the middle of another one
        source.load(lane=0, epoch=3, index=0, size=4)
        assert ids(epoch_of(source, epoch)) == found[epoch - 1]
    for epoch, start in ((3, 1), (1, 1), (2, 0)):
        assert ids(epoch_of(source_of(5 if kind == "none" else 6), epoch, start)) == found[epoch - 1][4 * start :]


def test_a_loader_whose_workers_run_already_goes_on_as_a_loop_over_it():
    def loader() -> DataLoader:
        own = torch.Generator().manual_seed(3)
        more = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
        made = DataLoader(Dicts(), batch_size=4, shuffle=True, generator=own, **more)
        list(made)
        return made

    plain = loader()
    expected = [ids(list(plain)) for _ in range(2)]
    source = batches(loader(), order(), alone=True)
    assert [ids(epoch_of(source, epoch)) for epoch in (1, 2, 2, 1)] == [*expected, *expected[::-1]]


def test_the_samples_of_an_epoch_are_drawn_again_as_they_were_with_lasting_workers():
    """To name the one that fails: no seed of workers is drawn but in the first epoch."""
    more = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    loader = DataLoader(Dicts(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3), **more)
    source = batches(loader, order(), alone=True)
    for epoch in (1, 2):
        found = epoch_of(source, epoch)
        assert [source._drawn_at(epoch, index) for index in range(3)] == [ids([batch]) for batch in found]


def test_loaders_that_share_a_generator_do_not_disturb_each_other():
    own = torch.Generator().manual_seed(3)
    expected = [ids(list(DataLoader(Dicts(), batch_size=4, shuffle=True, generator=own))) for _ in range(2)]
    own.manual_seed(3)
    one, other = (
        batches(DataLoader(Dicts(), batch_size=4, shuffle=True, generator=own), order(), alone=True) for _ in range(2)
    )
    found = [ids(epoch_of(source, epoch)) for epoch in (1, 2) for source in (one, other)]
    assert found == [expected[0], expected[0], expected[1], expected[1]]


@pytest.mark.parametrize("make", NOISY.values(), ids=NOISY)
def test_noise_differs_from_epoch_to_epoch_and_disturbs_nothing(make):
    outer = torch.get_rng_state()
    first, second = epoch_of(make(), 1), epoch_of(make(), 2)
    assert torch.equal(torch.get_rng_state(), outer)
    noise = [
        torch.cat([batch["x"] - batch["id"][:, None] for batch in found])[torch.tensor(ids(found)).argsort()]
        for found in (first, second)
    ]
    assert noise[0].min() >= 0
    assert noise[0].max() <= 1
    assert not torch.equal(*noise)


@pytest.mark.parametrize("data", [Dicts(noise=1.0), Whole(noise=1.0), DataLoader(Dicts(noise=1.0), batch_size=4)])
def test_the_same_samples_have_other_noise_in_another_epoch(data):
    source = batches(data, order(shuffle=False), alone=False)
    first, second = epoch_of(source, 1), epoch_of(source, 2)
    assert ids(first) == ids(second)
    assert not same(first, second)


def test_noise_is_the_partys_own():
    found = [epoch_of(batches(Dicts(noise=1.0), order(seed=seed), alone=True)) for seed in (1, 2)]
    assert ids(found[0]) == ids(found[1])
    assert not same(*found)


def test_samplers_are_told_the_epoch():
    class Told(Backwards):
        epochs: list[int]

        def set_epoch(self, epoch: int) -> None:
            self.epochs = [*getattr(self, "epochs", []), epoch]

    sampler = Told()
    source = batches(DataLoader(Dicts(), batch_size=4, sampler=sampler), order(), alone=True)
    for epoch in (1, 2):
        epoch_of(source, epoch)
    assert sampler.epochs == [1, 2]


# --- fields and counts -----------------------------------------------------------------------------------------------


def test_tuples_get_names():
    found = epoch_of(batches(Tuples(), order(fields=("pixels", "id")), alone=True))
    assert found[0].keys() == {"pixels", "id"}
    assert ids(found) == permutation(0, 1, 0, COUNT)


def test_a_data_set_of_tensors_is_one_field():
    class Rows(Dicts):
        def __getitem__(self, index: int):
            return torch.tensor(index)

    assert ids(epoch_of(batches(Rows(), order(fields=("id",)), alone=True))) == permutation(0, 1, 0, COUNT)


@pytest.mark.provokes("E253")
@pytest.mark.parametrize(("fields", "got"), [(None, "none"), (("x",), "1"), (("x", "id", "y"), "3")])
@pytest.mark.parametrize("data", [Tuples(), DataLoader(Tuples(), batch_size=4)], ids=["data set", "loader"])
def test_tuples_without_names_are_refused(data, fields, got):
    with pytest.raises(DataError) as caught:
        epoch_of(batches(data, order(fields=fields), alone=True))
    assert caught.value.code == "E253"
    assert (caught.value.expected, caught.value.got) == ("2 names", got)


def test_samples_are_counted():
    assert sample_count(Dicts()) == COUNT
    assert sample_count(TensorTable(x=torch.zeros(5, 2))) == 5
    assert sample_count(DataLoader(Dicts(), batch_size=4)) == COUNT
    assert sample_count(DataLoader(Dicts(), batch_size=4, sampler=SubsetRandomSampler([1, 2, 3]))) == 3


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"x": torch.zeros(2)}])


@pytest.mark.provokes("E255")
@pytest.mark.parametrize(
    "data", [Stream(), DataLoader(Stream(), batch_size=4), DataLoader(Stream(), batch_size=None)], ids=range(3)
)
def test_a_stream_is_refused(data):
    with pytest.raises(DataError, match=r"has no length.*__len__.*load the stream into a map-style data set") as caught:
        sample_count(data)
    assert caught.value.code == "E255"


@pytest.mark.provokes("E256")
@pytest.mark.parametrize(
    ("loader", "got"),
    [
        (DataLoader(Dicts(), batch_size=5), "batch_size=5, drop_last=False"),
        (DataLoader(Dicts(), batch_size=4, drop_last=True), "batch_size=4, drop_last=True"),
    ],
)
def test_a_loader_that_makes_other_batches_is_refused(loader, got):
    with pytest.raises(DataError) as caught:
        batches(loader, order(), alone=True)
    assert caught.value.code == "E256"
    assert caught.value.expected == "batch_size=4, drop_last=False"
    assert caught.value.got == got
    batches(loader, order(), alone=False)  # there the plan makes the batches


def test_a_sampler_whose_choice_would_be_lost_is_refused():
    loader = DataLoader(Dicts(), batch_size=4, sampler=SubsetRandomSampler([8, 9, 10]))
    with pytest.raises(DataError) as caught:
        batches(loader, order(count=3), alone=False)
    assert caught.value.code == "E256"
    assert "Subset" in caught.value.remedy
    found = epoch_of_three(batches(loader, order(count=3), alone=True))
    assert sorted(ids(found)) == [8, 9, 10]


def epoch_of_three(source: LoaderBatches) -> list[dict]:
    return [dict(source.load(lane=0, epoch=1, index=0, size=3))]


def test_a_loader_that_ends_early_is_refused():
    class Short(Backwards):
        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

    source = batches(DataLoader(Dicts(), batch_size=4, sampler=Short()), order(), alone=True)
    with pytest.raises(DataError) as caught:
        epoch_of(source)
    assert caught.value.code == "E256"
    assert "epoch 1, batch 1" in caught.value.where


def test_a_loader_of_whole_batches_is_taken():
    """With a sampler that gives batches, such as one that balances classes."""
    rows = [[3, 1, 2, 0], [4, 5, 7, 6], [10, 9, 8]]
    source = batches(DataLoader(Dicts(), batch_sampler=rows), order(), alone=True)
    assert ids(epoch_of(source)) == [row for batch in rows for row in batch]


def test_another_loader_of_the_same_data_keeps_how_they_are_read():
    kept = {"num_workers": 1, "timeout": 9, "prefetch_factor": 3, "collate_fn": list}
    made = again(DataLoader(Dicts(), batch_size=4, shuffle=True, **kept), batch_size=2)
    assert {name: getattr(made, name) for name in kept} == kept
    assert (made.batch_size, list(made.sampler)) == (2, list(range(COUNT)))


LAST = {"drop_last": True}
RARE = torch.tensor([0.0, *[1.0] * (COUNT - 2), 1e6])  # the last is drawn again and again, the first never


@pytest.mark.parametrize(
    ("data", "alone", "expected"),
    [
        (TensorTable(id=torch.arange(COUNT)), True, range(COUNT)),
        (Dicts(), False, range(COUNT)),
        (DataLoader(Dicts(), batch_size=4, num_workers=1, **LAST), False, range(COUNT)),
        (DataLoader(Dicts(), batch_size=4, sampler=Backwards(), **LAST), True, range(COUNT - 1, -1, -1)),
        (DataLoader(Dicts(), batch_sampler=[[3, 1, 2, 0], [4, 5, 3, 6]]), True, [3, 1, 2, 0, 4, 5, 6]),
        (DataLoader(Dicts(), batch_size=4, sampler=WeightedRandomSampler(RARE, 40), **LAST), True, range(1, COUNT)),
        (DataLoader(Dicts(), batch_size=4, sampler=RandomSampler(Dicts(), num_samples=8), **LAST), True, range(COUNT)),
        (DataLoader(Dicts(), batch_size=4, sampler=SubsetRandomSampler([3, 3, 3, 5]), **LAST), True, {3, 5}),
    ],
    ids=["table", "data set", "loader with others", "loader alone", "batches", "weighted", "random", "subset"],
)
def test_a_pass_over_every_sample_leaves_out_none_and_disturbs_no_epoch(data, alone: bool, expected):
    source = batches(data, order(drop_last=True), alone=alone)
    first = source.load(lane=0, epoch=1, index=0, size=4)
    found = ids(list(source.every()))
    assert sorted(found) == sorted(expected) if isinstance(expected, set) else found == list(expected)
    rest = [source.load(lane=0, epoch=1, index=1, size=4)] if len(data) > 1 else []
    other = batches(data, order(drop_last=True), alone=alone)
    assert same([first, *rest], [other.load(lane=0, epoch=1, index=place, size=4) for place in range(1 + len(rest))])


# --- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_gives_samples_and_batches():
    table = TensorTable(x=torch.arange(12.0).reshape(6, 2), y=torch.arange(6))
    assert len(table) == 6
    assert torch.equal(table[4]["x"], torch.tensor([8.0, 9.0]))
    batch = table.batch([5, 0])
    assert torch.equal(batch["y"], torch.tensor([5, 0]))
    batch["x"].zero_()
    assert table[5]["x"].sum() == 21  # a batch is a copy


@pytest.mark.provokes("E254")
@pytest.mark.parametrize("fields", [{}, {"x": torch.zeros(3), "y": torch.zeros(4)}])
def test_a_table_has_one_number_of_samples(fields):
    with pytest.raises(DataError, match=r"different numbers of samples.*give each field one row a sample") as caught:
        TensorTable(**fields)
    assert caught.value.code == "E254"


class Listed(Dataset):
    """Gives the samples of a list."""

    def __init__(self, samples: list[object]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> object:
        return self.samples[index]


def sized(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.provokes("E253")
@pytest.mark.parametrize(
    ("samples", "got"),
    [
        (
            [{"image": sized(3, 8, 8), "y": 0}] * 6 + [{"image": sized(3, 8, 9), "y": 1}] * 5,
            "sizes [3, 8, 8] of sample 4 and [3, 8, 9] of sample 6 in image, counted from 0",
        ),
        ([(sized(2), sized(5))] * 5 + [(sized(2), sized(4))] * 6, "sizes [5] of sample 4 and [4] of sample 5 in [1],"),
        ([sized(2)] * 7 + [sized(2, 1)] * 4, "sizes [2] of sample 4 and [2, 1] of sample 7, counted from 0"),
        ([np.zeros(2)] * 7 + [np.zeros(3)] * 4, "sizes [2] of sample 4 and [3] of sample 7, counted from 0"),
        ([{"a": {"b": [1, 2]}}] * 7 + [{"a": {"b": [1]}}] * 4, "sizes [2] of sample 4 and [1] of sample 7 in a['b'],"),
    ],
    ids=["images", "tuples", "tensors", "arrays", "nested"],
)
def test_samples_of_two_sizes_are_named(samples: list[object], got: str):
    fields = ("x", "y") if isinstance(samples[0], tuple) else ("x",)
    source = OrderedBatches(Listed(samples), order(shuffle=False, fields=fields))
    with pytest.raises(DataError, match=r"E253.*cannot be put together.*bring them to one size") as caught:
        source.load(lane=0, epoch=0, index=1, size=4)  # samples 4 to 7
    assert got in str(caught.value)


@pytest.mark.provokes("E253")
def test_samples_of_two_sizes_are_named_by_their_places_in_a_shuffled_epoch():
    rows = permutation(0, 2, 0, COUNT)
    samples = [sized(3 if row == rows[6] else 2) for row in range(COUNT)]
    source = OrderedBatches(Listed(samples), order(fields=("x",)))
    with pytest.raises(DataError, match=rf"\[2\] of sample {rows[4]} and \[3\] of sample {rows[6]}, counted"):
        source.load(lane=0, epoch=2, index=1, size=4)


ODD = Listed([{"x": sized(3 if row == 5 else 2)} for row in range(COUNT)])


def of_odd(**more: object) -> DataLoader:
    return DataLoader(ODD, **{"batch_size": 4, **more})


@pytest.mark.provokes("E253")
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    "loader",
    [
        of_odd(),
        of_odd(num_workers=1),
        of_odd(shuffle=True),
        of_odd(shuffle=True, generator=torch.Generator(), num_workers=1),
        of_odd(sampler=Backwards()),
        of_odd(sampler=WeightedRandomSampler([1.0] * COUNT, COUNT, replacement=False)),
        DataLoader(ODD, batch_sampler=[[0, 1, 2, 3], [7, 5, 4, 9], [6, 8, 10]]),
    ],
    ids=["plain", "worker", "shuffled", "generator", "backwards", "weighted", "batch sampler"],
)
def test_of_a_loader_too_the_samples_of_two_sizes_are_named(loader: DataLoader, alone: bool):
    """Torch's own function names a place in the batch. The other sample is one of the same batch."""
    source = batches(loader, order(fields=("x",)), alone=alone)
    with pytest.raises(DataError, match=r"E253.*cannot be put together.*in x, counted from 0") as caught:
        epoch_of(source)
    rows = [int(word) for word in re.findall(r"sample (\d+)", caught.value.got)]
    assert 5 in rows
    assert len(rows) == 2
    source = batches(again(loader, batch_size=4), order(fields=("x",), shuffle=False), alone=alone)
    with pytest.raises(DataError, match=r"\[2\] of sample 4 and \[3\] of sample 5 in x"):
        list(source.every())


def test_the_samples_that_are_named_are_those_of_the_batch():
    """Drawn again as they were: of each batch, all samples but the first differ from each other."""
    samples = [{"x": sized(row + 1)} for row in range(COUNT)]
    drawn = []

    class Noted(Listed):
        def __getitem__(self, index: int) -> object:
            drawn.append(index)
            return super().__getitem__(index)

    for epoch in range(3):
        drawn.clear()
        loader = DataLoader(Noted(samples), batch_size=4, shuffle=True)
        with pytest.raises(DataError, match=r"E253") as caught:
            LoaderBatches(loader, order(fields=("x",))).load(lane=0, epoch=epoch, index=0, size=4)
        assert drawn[:4] == drawn[4:]
        assert f"of sample {drawn[0]} and [{drawn[1] + 1}] of sample {drawn[1]} in x" in caught.value.got


def test_samples_that_are_of_one_size_when_they_are_read_again_leave_torchs_own_error():
    class Changing(Dicts):
        reads = 0

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            Changing.reads += 1
            return {"x": sized(3 if Changing.reads == 2 else 2)}

    with pytest.raises(RuntimeError, match=r"equal size, but got \[2\] at entry 0 and \[3\] at entry 1") as caught:
        batches(DataLoader(Changing(), batch_size=4), order(), alone=True).load(lane=0, epoch=0, index=0, size=4)
    assert "what differs is in the shapes of data[index]" in unread(caught.value, "").remedy
