"""The catalogue of error codes is whole: it names what the source raises, and a test provokes each of its codes."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from cutlayer import errors
from cutlayer.cli.catalogue import Entry, catalogue
from cutlayer.errors import CutlayerError, WireError
from tests import provoking

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"E\d{3}")
ROW = re.compile(r"(?m)^\| (E\d{3}) \| (\w+) \|")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("errors_page", ROOT / "scripts" / "errors_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()
ENTRIES = catalogue().items()
# Numbered by where they arise, not by their class:
OTHERS = ("E330", "E331", "E332", "E333", "E334", "E335", "E390", "E403")
GENERAL = {kind.default_code: kind for name in errors.__all__ if (kind := getattr(errors, name))}


# --- the catalogue and the source ------------------------------------------------------------------------------------


def test_the_catalogue_has_the_codes_of_the_source_and_no_others():
    source = script.source_codes()
    assert {code: source[code] for code in set(source) - set(catalogue())} == {}, "describe them in cli/errors.toml"
    assert set(catalogue()) - set(source) == set(), "nothing raises these: remove them from cli/errors.toml"
    assert list(catalogue()) == sorted(catalogue())


def test_classes_are_those_of_the_source():
    wrong = {(one.code, one.kind) for one in script.messages() if catalogue()[one.code].kind != one.kind}
    assert wrong == set()
    assert {code: catalogue()[code].kind for code in GENERAL} == {code: kind.__name__ for code, kind in GENERAL.items()}


def test_every_error_says_what_to_do():
    assert [one for one in script.messages() if not one.do] == []


def test_a_number_is_left_out_by_code_outside_only():
    """The codes of classes (E100, E200, ...) say so of themselves: tests/cli/test_own_errors.py raises them there."""
    without = [
        f"{path.name}:{node.lineno} {ast.unparse(node.func)}"
        for path in sorted((ROOT / "src").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in set(errors.__all__)
        if ast.unparse(node.func) != "CutlayerError" and "code" not in {word.arg for word in node.keywords}
    ]
    assert without == []
    told = {code: catalogue()[code].what for code in GENERAL if code != "E000"}
    assert [code for code, what in told.items() if not what.startswith("Code outside cutlayer")] == []


PLACED = {  # what makes them knows no place: who calls it says where, by `within` or by `handshake.typed`
    "engine/wire.py",
    "run/meeting.py",
    "transport/addresses.py",
    "transport/control.py",
    "transport/frames.py",
    "transport/grpc_server.py",
    "transport/link.py",
    "transport/reception.py",
}


def test_every_error_says_where():
    """The text of what nobody foresaw (E000) has a place only in the traceback."""
    kinds = set(errors.__all__) - {"CutlayerError"}
    without = {
        f"{path.relative_to(ROOT / 'src' / 'cutlayer')}:{node.lineno}"
        for path in sorted((ROOT / "src").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in kinds
        if node.args and not {"where", None} & {word.arg for word in node.keywords}
    }
    assert {place for place in without if place.rpartition(":")[0] not in PLACED} == set()
    assert {place.rpartition(":")[0] for place in without} == PLACED


def test_no_message_is_said_with_two_codes():
    seen: dict[tuple[str, str], str] = {}
    twice = [one for one in script.messages() if one.what != "..." and seen.setdefault(one[1:3], one.code) != one.code]
    assert twice == []


def test_tables_in_modules_agree():
    """A module that lists its codes lists all that it raises, each with its class; what it calls may raise others."""
    source = script.source_codes()
    for path in sorted((ROOT / "src").rglob("*.py")):
        rows = dict(ROW.findall(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""))
        name = str(path.relative_to(ROOT / "src" / "cutlayer"))
        assert {code: kind for code, kind in rows.items() if catalogue()[code].kind != kind} == {}, name
        own = {code for code, modules in source.items() if name in modules}
        if rows:
            assert own - set(rows) == set(), f"{name}: list these codes in the module's table"


# --- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "entry"), ENTRIES, ids=[code for code, _ in ENTRIES])
def test_an_entry_is_whole(code: str, entry: Entry):
    assert entry.title[0].islower() or entry.title[:2].isupper() or entry.title.startswith("NaN")
    assert not entry.title.endswith(".")
    assert len(entry.title) <= 90
    assert entry.what.endswith(".")
    assert entry.causes
    assert entry.do
    assert entry.who
    assert not [point for point in (*entry.causes, *entry.do) if point.endswith(".") or not point.strip()]
    kind = getattr(errors, entry.kind)
    assert code[:2] == kind.default_code[:2] or code in OTHERS


@pytest.mark.parametrize(("code", "entry"), ENTRIES, ids=[code for code, _ in ENTRIES])
def test_an_example_is_what_the_source_says(code: str, entry: Entry):
    """Its first and last line are those of one place in the source, with names and numbers filled in."""
    what, where, why, do = entry.example.strip().splitlines()
    assert where.startswith("  where: ")
    assert why.startswith("  why:   ")
    told = [one for one in script.messages() if one.code == code]
    sentence = what.removeprefix(f"{code} ")
    remedy = re.sub(rf" ?\(?(more: )?cutlayer explain {code}\)?$", "", do.removeprefix("  do:    "))
    assert do == CutlayerError(sentence, remedy=remedy, code=code).lines()[3]
    if told and not catalogue()[code].kind.endswith(("PeerError",)):
        assert any(fits(one.what, sentence) and fits(one.do, remedy) for one in told), (sentence, remedy, told)


def fits(template: str, text: str) -> bool:
    choices = template.split(" / ") if " / " in template else [template]
    patterns = [re.escape(choice).replace(r"\.\.\.\.", r"\..*").replace(r"\.\.\.", ".*") for choice in choices]
    return any(re.fullmatch(pattern, text) for pattern in patterns)


def test_the_pages_are_current():
    made, folder = script.pages(), ROOT / "docs" / "reference" / "errors"
    assert set(folder.glob("*.md")) == {path for path in made if path.parent == folder}
    stale = [path.name for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run python scripts/errors_page.py"


# --- every code is provoked ------------------------------------------------------------------------------------------


def claims(tree: ast.Module) -> Iterator[str]:
    """Yield the codes that the marks in a file claim; for `by=`, those in the parameters beside the mark."""
    given = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None]
    tables = {
        ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target): node.value for node in given
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "provokes":
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))
    for test in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        marks = [mark for mark in test.decorator_list if isinstance(mark, ast.Call)]
        by = {word.arg for mark in marks if ast.unparse(mark.func).endswith("provokes") for word in mark.keywords}
        if "by" in by:
            inner = [node for mark in marks for node in ast.walk(mark)]
            named = [tables[node.id] for node in inner if isinstance(node, ast.Name) and node.id in tables]
            inner += [node for table in named for node in ast.walk(table)]
            yield from (str(n.value) for n in inner if isinstance(n, ast.Constant) and CODE.fullmatch(str(n.value)))


def test_every_code_is_provoked_by_a_test():
    """Marks are held to the truth while their tests run; here each code must have one."""
    claimed = {
        code
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for code in claims(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert set(catalogue()) - claimed == set(), "mark the tests that provoke them: tests/provoking.py"
    assert claimed - set(catalogue()) == set()


def test_claims_are_found():
    text = (
        "CASES = {'x': ('E101', 1)}\n"
        "@pytest.mark.provokes('E102')\n@pytest.mark.parametrize('c', [pytest.param(1, marks=mark.provokes('E103'))])\n"
        "def test_a(): ...\n"
        "@pytest.mark.provokes(by='code')\n@pytest.mark.parametrize(('code', 'n'), [*CASES.values(), ('E104', 2)])\n"
        "def test_b(): 'E105'\n"
    )
    assert sorted(claims(ast.parse(text))) == ["E101", "E102", "E103", "E104"]


def refused(code: str = "") -> WireError:
    """Return an error that the source makes."""
    from cutlayer.engine.wire import parse_header

    with pytest.raises(WireError) as caught:
        parse_header(b"")
    return caught.value


def test_a_mark_that_does_not_tell_the_truth_is_found():
    def complaints(*codes: str) -> list[str]:
        return watch.complaints(list(codes))

    with provoking.watching() as watch:
        error = refused()
        assert complaints("E501") == ["the text of E501 was not read"]
        assert error.code == "E501"  # its number is not its text
        assert complaints("E501") == ["the text of E501 was not read"]
        assert "header bytes" in error.expected
        assert complaints("E501") == []
        assert complaints("E502") == ["no E502 was made; but ['E501']"]
        WireError("made by the test itself", code="E502").what  # noqa: B018 - read
        assert complaints("E502") == ["no E502 was made; but ['E501']"]
        assert complaints("E999") == ["E999 is not in the catalogue"]
    assert str(error) == str(error)
    assert not watch.complaints(["E501"])


@pytest.mark.parametrize("look", [str, lambda error: error.what, lambda error: provoking.saw(error.lines()[0])])
def test_reading_is_noticed(look):
    with provoking.watching() as watch:
        look(refused())
    assert watch.complaints(["E501"]) == []


def test_a_class_that_is_not_the_catalogues_is_found(monkeypatch: pytest.MonkeyPatch):
    with provoking.watching() as watch:
        assert refused().what
    known = dict(catalogue())
    monkeypatch.setattr(provoking, "catalogue", lambda: {**known, "E501": known["E201"]})
    assert watch.complaints(["E501"]) == ["E501 was of class {'WireError'}, in the catalogue it is ConfigError"]
