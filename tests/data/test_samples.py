"""Samples that cannot be read or put together are named by their place; columns of tables in memory."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, WeightedRandomSampler

import cutlayer as cl
from cutlayer.core.parts import Training
from cutlayer.data.sources import Order, batches
from cutlayer.errors import DataError

COUNT = 11


def order(**changes: Any) -> Order:
    values = {"training": Training(batch_size=4), "count": COUNT, "seed": 1, "shuffle": False, "drop_last": False}
    return Order(**{**values, **changes})


class Made(Dataset[Any]):
    """Samples that a function makes."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


class Scans(Made):
    """Lists its files; the sixth is damaged."""

    def __init__(self, folder: Path, name: str, listed: Callable[[Path], object]) -> None:
        super().__init__(self._read)
        setattr(self, name, [listed(folder / f"{place}.png") for place in range(COUNT)])

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        if index == 5:
            raise OSError("image file is truncated")
        return {"x": torch.zeros(2)}


def refused(data: Any, *, alone: bool = True, **changes: Any) -> DataError:
    """Return the error of an epoch of these data."""
    source = batches(data, order(**changes), alone=alone)
    with pytest.raises(DataError) as caught:
        [source.load(lane=0, epoch=0, index=index, size=4) for index in range(3)]
    return caught.value


@pytest.mark.provokes("E268")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("name", "listed"), [("samples", lambda path: (str(path), 0)), ("files", lambda path: path), ("paths", str)]
)
def test_a_sample_that_cannot_be_read_is_named_with_its_file(
    tmp_path: Path, name: str, listed: Callable[[Path], object], alone: bool, workers: int
):
    scans = Scans(tmp_path, name, listed)
    where = f"sample 5 of the data set, counted from 0, file {tmp_path / '5.png'}"
    for data in (scans, DataLoader(scans, batch_size=4, num_workers=workers)):
        error = refused(data, alone=alone)
        assert (error.code, error.what) == ("E268", "the data set failed at a sample")
        assert (error.where, error.got) == (where, "OSError: image file is truncated")
        assert "5" not in error.remedy + error.what  # which the other parties are told


@pytest.mark.provokes("E268")
def test_of_a_subset_the_place_in_it_is_named_and_the_file(tmp_path: Path):
    scans = Scans(tmp_path, "files", lambda path: path)
    error = refused(Subset(scans, [0, 1, 2, 3, 4, 6, 7, 8, 5, 9, 10]))
    assert error.where == f"sample 8 of the data set, counted from 0, file {tmp_path / '5.png'}"


@pytest.mark.provokes("E268")
@pytest.mark.parametrize("text", ["a note/of a patient", "no file"])
def test_what_is_listed_and_no_file_is_not_told(tmp_path: Path, text: str):
    assert refused(Scans(tmp_path, "samples", lambda _: text)).where == "sample 5 of the data set, counted from 0"


@pytest.mark.provokes("E268")
def test_a_sample_that_a_sampler_has_drawn_is_named(tmp_path: Path):
    scans = Scans(tmp_path, "files", lambda path: path)
    loader = DataLoader(scans, batch_size=4, sampler=WeightedRandomSampler([1.0] * COUNT, COUNT, replacement=False))
    assert refused(loader).where.startswith("sample 5 of")
    with pytest.raises(DataError, match=r"E268.*sample 5 of"):
        list(batches(loader, order(), alone=True).every())


@pytest.mark.provokes("E268")
def test_of_a_batch_that_the_data_set_makes_itself_all_samples_are_named():
    class Whole(Made):
        def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
            raise OSError(f"{len(indices)}")

    error = refused(Whole(lambda index: index))
    assert (error.where, error.got) == ("samples 0, 1, 2, 3 of the data set, counted from 0", "OSError: 4")


def test_an_error_of_a_collate_function_is_blamed_on_no_sample():
    def collate(_samples: list[Any]) -> Any:
        raise RuntimeError("not these")

    def read(index: int) -> int:
        reads.append(index)
        if len(reads) > 6:
            raise KeyError("another error, and only when it is read again")
        return index

    reads = list[int]()
    loader = DataLoader(Made(read), batch_size=4, collate_fn=collate)
    with pytest.raises(RuntimeError, match="not these"):
        batches(loader, order(), alone=True).load(lane=0, epoch=0, index=0, size=4)
    assert reads == [0, 1, 2, 3, 0, 1, 2]


class Streamed(Dataset[dict[str, torch.Tensor]]):
    """Reads from a stream that is over at sample 6: for Python that is StopIteration, as at the end of a loop."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([next(iter(range(index, 6)))])}


@pytest.mark.provokes("E268")
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "ordered"])
@pytest.mark.parametrize(
    "data",
    [
        Streamed(),
        DataLoader(Streamed(), batch_size=4),
        DataLoader(Streamed(), batch_size=4, num_workers=1),
        DataLoader(Streamed(), batch_sampler=[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]),
    ],
    ids=["data set", "loader", "worker", "batches"],
)
def test_a_data_set_that_raises_stop_iteration_is_no_end_of_the_data(data: Any, alone: bool):
    errors = [refused(data, alone=alone)]
    with pytest.raises(DataError, match="E268") as caught:
        list(batches(data, order(), alone=alone).every())
    source = batches(data, order(), alone=alone)
    with pytest.raises(DataError, match="E268") as skipped:
        source.load(lane=0, epoch=0, index=2, size=3)  # past it, as after a restart
    for error in (*errors, caught.value, skipped.value):
        assert (error.code, error.where) == ("E268", "sample 6 of the data set, counted from 0")
        assert error.got.startswith("StopIteration")
        assert "next(" in error.remedy


@pytest.mark.provokes("E268")
def test_a_collate_function_that_raises_stop_iteration_is_no_end_of_the_data():
    def collate(samples: list[int]) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([next(iter(range(samples[0], 4)))])}

    loader = DataLoader(Made(lambda index: index), batch_size=4, collate_fn=collate)
    error = refused(loader)
    assert (error.code, error.where) == ("E268", "samples 4, 5, 6, 7 of the data set, counted from 0")
    with pytest.raises(DataError, match=r"E268.*samples 4, 5, 6, 7"):
        list(batches(loader, order(), alone=True).every())


@pytest.mark.provokes("E268")
def test_a_party_whose_data_raise_stop_iteration_is_named():
    plan = cl.Plan(
        [
            cl.Stage("head", at="a", inputs=["data.x"], output="float32[batch, 2]"),
            cl.Loss("loss", at="a", inputs=["head", "data.y"]),
        ],
        training=Training(batch_size=4),
    )
    data = Made(lambda index: {"x": torch.ones(2) * next(iter(range(index, 6))), "y": 0})
    modules = {"head": torch.nn.Linear(2, 2), "loss": torch.nn.CrossEntropyLoss()}
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    for one in (data, DataLoader(data, batch_size=4)):
        with pytest.raises(DataError, match=r"E268.*party a, train round 1, batch 1.*sample \d+ of.*StopIteration"):
            cl.simulate(plan, [cl.Party("a", data=one, modules=modules, optimizer=sgd)])


PICTURE = Image.new("L", (2, 2))


@pytest.mark.provokes("E253")
@pytest.mark.parametrize("wrapped", [False, True], ids=["data set", "loader"])
@pytest.mark.parametrize(
    ("usual", "odd", "got", "do"),
    [
        (1, None, "None in the field y of sample 6, counted from 0", "fill in a value"),
        (torch.zeros(2), None, "None in the field y of sample 6,", "fill in a value"),
        ("flu", None, "None in the field y of sample 6,", "fill in a value"),
        ("flu", float("nan"), "texts and others: a float in the field y of sample 6", "give texts alone"),
        (PICTURE, PICTURE, "PIL.Image.Image in the field y of sample 0", "ToTensor"),
        (np.datetime64("2020-01-01"), np.datetime64("2020-01-01"), "datetime64 of datetime64[D] in", "days since"),
        (datetime.date(2020, 1, 1), 1, "datetime.date in the field y of sample 0", "tensors, arrays of numbers"),
        (np.array([1, None]), np.array([1, None]), "numpy.ndarray of object in", "astype"),
        (np.array(["a"]), np.array(["a"]), "numpy.ndarray of <U1 in", "give texts as str"),
        (np.zeros(2), np.zeros(2, ">f4"), "numpy.ndarray of >f4 in the field y of sample 6", "copy it"),
        (np.zeros(2), np.zeros(2)[::-1], "numpy.ndarray of float64 in the field y of sample 6", "copy it"),
    ],
)
def test_a_value_that_no_batch_can_hold_is_named(usual: object, odd: object, got: str, do: str, wrapped: bool):
    data: Any = Made(lambda index: {"x": torch.zeros(2), "y": odd if index == 6 else usual})
    error = refused(DataLoader(data, batch_size=4) if wrapped else data)
    assert (error.code, error.what) == ("E253", "the samples of a batch cannot be put together")
    assert got in error.got
    assert do in error.remedy
    assert "collate_fn" not in error.remedy


@pytest.mark.provokes("E253")
def test_a_sample_that_is_none():
    assert refused(Made(lambda _: None), fields=("x",)).got == "None as sample 0, counted from 0"


@pytest.mark.provokes("E253")
@pytest.mark.parametrize(("place", "wrapped"), [(4, False), (6, False), (6, True)])
def test_a_sample_that_lacks_a_field_is_named(place: int, wrapped: bool):
    """Also the first of a batch, whose fields torch takes for those of all: a loader then says nothing of it."""
    data: Any = Made(lambda index: {"x": torch.zeros(2), **({} if index == place else {"y": 1})})
    error = refused(DataLoader(data, batch_size=4) if wrapped else data)
    assert (error.code, error.what) == ("E253", "the samples of a batch cannot be put together")
    assert error.got == f"no field y in sample {place}, counted from 0; sample 7 has it"
    assert error.remedy == "give all samples the same fields; or leave such samples out"


# --- columns of a table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (np.arange(3, dtype=np.uint16), torch.tensor([0, 1, 2], dtype=torch.uint16)),
        (np.arange(3, dtype=">f4")[::-1], torch.tensor([2.0, 1.0, 0.0])),
        ([0, 1, 2], torch.arange(3)),
        ([[0.5], [1], [2]], torch.tensor([[0.5], [1.0], [2.0]])),
        ([True, False, True], torch.tensor([True, False, True])),
        ([np.zeros(2), np.ones(2), np.ones(2)], torch.tensor([[0.0, 0], [1, 1], [1, 1]], dtype=torch.float64)),
        ([torch.zeros(2), torch.ones(2), torch.ones(2)], torch.tensor([[0.0, 0], [1, 1], [1, 1]])),
    ],
)
def test_arrays_and_lists_of_numbers_are_tensors(given: Any, wanted: torch.Tensor):
    table = cl.TensorTable(x=given)
    torch.testing.assert_close(table.batch([0, 1, 2])["x"], wanted, rtol=0, atol=0)
    torch.testing.assert_close(table[1]["x"], wanted[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "texts", [["a", "b", "c"], ("a", "b", "c"), np.array(["a", "b", "c"]), np.array(["a", "b", "c"], dtype=object)]
)
def test_texts_are_lists_of_texts(texts: Any):
    table = cl.TensorTable(ward=texts, x=torch.zeros(3))
    assert table.batch(torch.tensor([2, 0]))["ward"] == ["c", "a"]
    assert (table[1]["ward"], len(table)) == ("b", 3)


@pytest.mark.parametrize("kind", ["categories", "classes"])
@pytest.mark.parametrize("make", [list, np.array], ids=["list", "array"])
def test_texts_of_a_table_are_made_numbers_by_preprocessing(kind: str, make: Callable[[list[str]], Any]):
    wards = make(["heart", "lung"] * 10)
    y = torch.arange(20) % 2
    used = {"ward": y, "y": wards} if kind == "classes" else {"ward": wards, "y": y}
    shared = cl.Shared("y", at="loss", kind=kind) if kind == "classes" else cl.Shared("ward", at="head", kind=kind)
    plan = cl.Plan(
        [
            cl.Stage("head", at="a", inputs=["data.ward"], output="float32[batch, 2]"),
            cl.Loss("loss", at="a", inputs=["head", "data.y"]),
        ],
        preprocessing=[shared],
        training=Training(batch_size=10, epochs=60),
    )
    modules = {"head": torch.nn.Embedding(3, 2), "loss": torch.nn.CrossEntropyLoss()}
    adam = lambda parameters: torch.optim.Adam(parameters, lr=0.1)  # noqa: E731
    table = cl.TensorTable(**used)
    result = cl.simulate(plan, [cl.Party("a", data=table, evaluation=table, modules=modules, optimizer=adam)])
    assert result.metrics()["loss"]["loss"] < 0.1


@pytest.mark.provokes("E253")
@pytest.mark.parametrize(
    ("given", "got"),
    [
        (["a", None, "b"], "got None at sample 1"),
        (["a", 2, "b"], "got int at sample 1"),
        ([1, 2, None], "got None at sample 2"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "got an array of datetime64[D]"),
        ([[1], [1, 2]], "got ValueError: "),
        ({"a": 1}, "got a dict"),
        ("abc", "got a str"),
    ],
)
def test_other_columns_are_refused_at_once(given: Any, got: str):
    with pytest.raises(DataError, match=re.escape(got)) as caught:
        cl.TensorTable(y=given)
    assert caught.value.code == "E253"
    assert caught.value.what == "the field 'y' of a table is neither numbers nor texts"


@pytest.mark.provokes("E253")
@pytest.mark.parametrize(
    ("given", "what", "got", "do"),
    [
        (
            np.ma.array([1.0, 2.0], mask=[0, 1]),
            "masked values",
            "masked values from sample 1 on",
            "array.filled(...): with numpy.nan",
        ),
        (
            np.ma.array([[1, 2], [3, 4]], mask=[[0, 1], [1, 1]]),
            "masked values",
            "from sample 0 on",
            "the mask as a further field",
        ),
        (np.ma.array(["a", "b"], mask=[0, 1]), "masked values", "from sample 1 on", "array.filled("),
        ([np.ma.array([1.0], mask=[0]), np.ma.array([1.0], mask=[1])], "masked values", "from sample 1 on", "filled"),
        ([1.0, np.ma.masked], "masked values", "from sample 1 on", "filled"),
        (np.zeros(2, np.clongdouble), "a dtype that no tensor has", f"{np.dtype(np.clongdouble)}", "numpy.float32"),
        (torch.tensor(1.0), "no rows", "a single value: shape []", "one row a sample"),
        (np.array(1.0), "no rows", "a single value: shape []", "one row a sample"),
        (np.float32(1.0), "no rows", "a single value: shape []", "one row a sample"),
        (1, "no rows", "a single value: shape []", "one row a sample"),
        (np.array("a"), "no rows", "a single value: shape []", "one row a sample"),
        (np.ma.array(1.0, mask=True), "no rows", "a single value: shape []", "one row a sample"),
    ],
    ids=[
        "masked",
        "rows",
        "texts",
        "list",
        "constant",
        "dtype",
        "tensor",
        "array",
        "scalar",
        "number",
        "text",
        "masked scalar",
    ],
)
def test_columns_without_values_rows_or_a_dtype_are_refused(given: Any, what: str, got: str, do: str):
    with pytest.raises(DataError, match="E253") as caught:
        cl.TensorTable(x=given)
    assert what in caught.value.what
    assert got in caught.value.got
    assert "x" in caught.value.where
    assert do in caught.value.remedy


def test_a_masked_array_without_masked_values_is_a_column():
    given = [np.ma.array([1.0, 2.0]), np.ma.array([1.0, 2.0], mask=[0, 0])]
    for one in given:
        assert cl.TensorTable(x=one).batch([1])["x"].tolist() == [2.0]
    assert len(cl.TensorTable(x=np.ma.zeros((0, 3)))) == 0
