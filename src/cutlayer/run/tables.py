"""TOML files as typed, frozen tables. What is wrong with a file is said with its place and the nearest right key.

| code | error | meaning |
| --- | --- | --- |
| E201 | ConfigError | a key that does not exist |
| E202 | ConfigError | a value of a wrong type or size, a key that is missing, or text that is not TOML |
| E203 | ConfigError | the file is missing, cannot be read, or is too long |
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec

from cutlayer.errors import ConfigError

__all__ = ["parse_table", "read_text", "write_table"]

SIZE_LIMIT = 2**20  # bytes of a contract or party file

_Table = TypeVar("_Table", bound=msgspec.Struct)
_AT = re.compile(r"^(?P<text>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"unknown field `(?P<key>.*)`$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<key>.*)`$", re.DOTALL)
_TYPES = re.compile(r"^Expected (?P<expected>.*?)(?:, got (?P<got>.*))?$", re.DOTALL)
_PART = re.compile(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_TOML_WORDS = {"object": "table", "null": "nothing", "str": "text"}


def read_text(path: Path) -> str:
    """Return the text of a configuration file. Raises `ConfigError` E203, or E202 if it is not UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(
            f"the file {path.name} cannot be read",
            where=str(path),
            got=error.strerror or type(error).__name__,
            remedy="give the path of a TOML file that this user may read",
            code="E203",
        ) from error
    if len(data) > SIZE_LIMIT:
        raise ConfigError(
            f"the file {path.name} is too long for a configuration",
            where=str(path),
            expected=f"at most {SIZE_LIMIT:,} bytes",
            remedy="give the path of a TOML file",
            code="E203",
        )
    try:
        return data.decode("utf-8-sig")  # editors on Windows may begin a file with a mark
    except UnicodeDecodeError as error:
        raise _wrong("the file is not text", str(path), "UTF-8", error.reason) from error


def parse_table(text: str, table: type[_Table], *, where: str) -> _Table:
    """Return TOML `text` as a `table`, all of whose keys are known. `where` names the file in errors.

    Raises:
        ConfigError: E201 for an unknown key; E202 for what is no TOML, a wrong type, a missing key, a number that is
            not finite.
    """
    try:
        document: dict[str, Any] = msgspec.toml.decode(text)
    except msgspec.DecodeError as error:
        raise _wrong("the file is not TOML", where, "TOML 1.0", str(error)) from error
    for path, value in _leaves(document, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise _wrong(f"the value of {path!r} is not finite", f"{where}: {path}", "a finite number", str(value))
    try:
        return msgspec.convert(document, table)
    except msgspec.ValidationError as error:
        raise _explain(str(error), document, table, where) from error


def write_table(table: msgspec.Struct) -> str:
    """Return a table as TOML text, every key written out; keys that are None are left out."""
    return msgspec.toml.encode(_without_none(msgspec.to_builtins(table))).decode()


def _explain(message: str, document: Mapping[str, Any], table: type[msgspec.Struct], where: str) -> ConfigError:
    """Turn msgspec's message, such as "Expected `int`, got `str` - at `$.training.epochs`", into an error with help."""
    found = _AT.match(message)
    text, path = (found["text"], found["path"] or "") if found else (message, "")
    place = f"{where}: {path}" if path else where
    if unknown := _UNKNOWN.search(text):
        return _unknown_key(unknown["key"], path, table, place)
    if missing := _MISSING.search(text):
        return _wrong(f"the key {missing['key']!r} is missing", place, f"{missing['key']} = ...", "nothing")
    path = _resolve(path, document)
    types = _TYPES.match(text)
    expected, got = (types["expected"], types["got"] or _shown(path, document)) if types else ("", text)
    return _wrong(f"the value of {path!r} is wrong", f"{where}: {path}", _plain(expected), _plain(got))


def _unknown_key(key: str, path: str, table: type[msgspec.Struct], place: str) -> ConfigError:
    own = _keys(table, path)
    near = difflib.get_close_matches(key, own, n=1)
    others = [f"{other}.{key}" if other else key for other, names in _tables(table, "") if key in names]
    if near:
        remedy = f"did you mean {near[0]!r}?"
    elif others:
        remedy = f"did you mean {others[0]!r}? It belongs there"
    else:
        remedy = "remove it, or correct its name; docs/reference lists every key"
    return ConfigError(
        f"unknown key {key!r}", where=place, expected=f"one of {', '.join(own)}", got=key, remedy=remedy, code="E201"
    )


def _wrong(what: str, where: str, expected: str, got: str) -> ConfigError:
    return ConfigError(
        what,
        where=where,
        expected=expected,
        got=got,
        remedy="correct the file; docs/reference has examples",
        code="E202",
    )


def _plain(text: str) -> str:
    """Return msgspec's "`str | array`" as "text | array"."""
    return " ".join(_TOML_WORDS.get(word, word) for word in text.replace("`", "").split(" "))


def _tables(table: type[msgspec.Struct], path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every table of the file with its keys: its own name in dots, "" for the top."""
    yield path, tuple(info.name for info in msgspec.structs.fields(table))
    for info in msgspec.structs.fields(table):
        inner = _struct_in(info.type)
        if inner is not None:
            yield from _tables(inner, f"{path}.{info.name}".lstrip("."))


def _keys(table: type[msgspec.Struct], path: str) -> tuple[str, ...]:
    plain = ".".join(name for name, _ in _PART.findall(path) if name)
    return dict(_tables(table, "")).get(plain, ())


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:  # noqa: ANN401 - any annotation
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind
    return next((inner for inner in map(_struct_in, get_args(kind)) if inner is not None), None)


def _resolve(path: str, document: Mapping[str, Any]) -> str:
    """Put the key into a path such as "addresses[...]", where msgspec leaves it out: that of the first odd value."""
    if not path.endswith("[...]"):
        return path
    head = path.removesuffix("[...]")
    held = _at(head, document)
    odd = [key for key, value in held.items() if not isinstance(value, str)] if isinstance(held, dict) else []
    return f"{head}.{odd[0]}" if odd else head


def _at(path: str, document: Any) -> Any:  # noqa: ANN401 - whatever the file holds there
    for name, index in _PART.findall(path):
        document = document[name] if name else document[int(index)]
    return document


def _shown(path: str, document: Mapping[str, Any]) -> str:
    return repr(_at(path, document))[:80]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - a TOML document
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def _without_none(value: Any) -> Any:  # noqa: ANN401 - plain values
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_none(inner) for inner in value]
    return value
