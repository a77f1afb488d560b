"""Reading TOML: every mistake is said with its place, and the nearest right key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from cutlayer.errors import ConfigError
from cutlayer.run.tables import SIZE_LIMIT, parse_table, read_text, write_table


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    at: str | tuple[str, ...] = ""
    weight: float = 1.0


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    epochs: int = 1
    limit: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    clip: float | None = None


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    row: tuple[Row, ...] = ()
    options: Options = Options()
    places: dict[str, str] = {}


def error_of(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_table(text, File, where="a.toml")
    return caught.value


def test_right_file_is_read():
    text = '[options]\nepochs = 2\n[[row]]\nname = "a"\nat = ["p", "q"]\nweight = 2\n[places]\nx = "y"\n'
    table = parse_table(text, File, where="a.toml")
    assert table == File(row=(Row(name="a", at=("p", "q"), weight=2.0),), options=Options(epochs=2), places={"x": "y"})


@pytest.mark.parametrize(
    ("text", "where", "remedy"),
    [
        ("[options]\nepoch = 1", "a.toml: options", "did you mean 'epochs'?"),
        ("[[row]]\nname='a'\n[[row]]\nnam='a'", "a.toml: row[1]", "did you mean 'name'?"),
        ("option = 1", "a.toml", "did you mean 'options'?"),
        ("epochs = 1", "a.toml", "did you mean 'options.epochs'? It belongs there"),
        ("[options]\nzzz = 1", "a.toml: options", "remove it"),
    ],
)
def test_unknown_key_names_its_place_and_the_nearest_key(text: str, where: str, remedy: str):
    error = error_of(text)
    assert (error.code, error.where) == ("E201", where)
    assert error.remedy.startswith(remedy)


def test_unknown_key_lists_the_keys_of_its_table():
    assert error_of("[options]\nepoch = 1").expected == "one of epochs, limit, clip"


@pytest.mark.parametrize(
    ("text", "where", "expected", "got"),
    [
        ("[options]\nepochs = 'x'", "a.toml: options.epochs", "int", "text"),
        ("[options]\nepochs = true", "a.toml: options.epochs", "int", "bool"),
        ("[options]\nlimit = 0", "a.toml: options.limit", "float > 0.0", "0"),
        ("options = 3", "a.toml: options", "table", "int"),
        ("[[row]]\nname = 'a'\nat = 3", "a.toml: row[0].at", "text | array", "int"),
        ("[[row]]\nname = 'a'\nat = ['b', 3]", "a.toml: row[0].at[1]", "text", "int"),
        ("[places]\nx = 'a'\ny = 3", "a.toml: places.y", "text", "int"),
        ("[options]\nclip = nan", "a.toml: options.clip", "a finite number", "nan"),
        ("[[row]]\nname = 'a'\nweight = inf", "a.toml: row[0].weight", "a finite number", "inf"),
    ],
)
def test_wrong_type_names_path_expected_and_got(text: str, where: str, expected: str, got: str):
    error = error_of(text)
    assert (error.code, error.where, error.expected, error.got) == ("E202", where, expected, got)


def test_missing_key_is_named():
    error = error_of("[[row]]\nweight = 1.0")
    assert (error.code, error.where, error.what) == ("E202", "a.toml: row[0]", "the key 'name' is missing")


def test_text_that_is_no_toml_names_the_line():
    error = error_of("[options]\nepochs = \n")
    assert error.code == "E202"
    assert "line 2" in error.got


def test_written_table_reads_back_equal_and_leaves_none_out():
    table = File(
        row=(Row(name="a", at=("p",)), Row(name='quote " and é')), options=Options(limit=0.1), places={"k": "v"}
    )
    text = write_table(table)
    assert "clip" not in text
    assert parse_table(text, File, where="") == table


def test_missing_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=re.escape("[E203] the file no.toml cannot be read")):
        read_text(tmp_path / "no.toml")


@pytest.mark.provokes("E203")
def test_file_too_long(tmp_path: Path):
    path = tmp_path / "long.toml"
    path.write_bytes(b"#" * (SIZE_LIMIT + 1))
    with pytest.raises(ConfigError, match=r"E203.*too long"):
        read_text(path)
    path.write_bytes(b"#" * SIZE_LIMIT)
    assert len(read_text(path)) == SIZE_LIMIT


def test_file_that_is_not_text(tmp_path: Path):
    path = tmp_path / "bytes.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"E202.*not text"):
        read_text(path)


def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_it(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbf[options]\nepochs = 2\n")
    assert parse_table(read_text(path), File, where="a.toml").options.epochs == 2
