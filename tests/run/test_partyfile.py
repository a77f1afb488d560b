"""The party file, and the local code that it names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cutlayer.errors import ConfigError, DataError
from cutlayer.run.partyfile import PartyFile, load_party_file, write_party_file

BUILDER = """
from cutlayer import Party

def build(name):
    return Party(name, seed=3)

def other(name):
    return Party("somebody")

def nothing(name):
    return None

def broken(name):
    raise ValueError("no such table")

def empty(name):
    from cutlayer.errors import DataError
    raise DataError("no samples")

number = 3
"""


def site(folder: Path, text: str = 'builder = "code.py:build"', more: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "code.py").write_text(BUILDER)
    path = folder / "party.toml"
    path.write_text(f'party = "hospital"\n[code]\n{text}\n{more}')
    return path


@pytest.fixture(autouse=True)
def _forget_modules():
    before, path = set(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def error_of(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_party_file(path).party()
    return caught.value


def test_defaults(tmp_path: Path):
    path = site(tmp_path)
    assert load_party_file(path) == PartyFile(
        path=path, name="hospital", builder="code.py:build", listen="", credentials=None, insecure=False,
        folder=tmp_path / "runs", accept="ask",
    )  # fmt: skip


def test_paths_count_from_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = site(tmp_path / "site", more='[network]\ncredentials = "kit"\n[run]\nfolder = "../out"\n')
    monkeypatch.chdir(tmp_path)
    file = load_party_file(Path("site/party.toml"))
    assert (file.path, file.credentials) == (path, tmp_path / "site" / "kit")
    assert file.folder.resolve() == tmp_path / "out"


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("", ""),
        ("runs.db", "sqlite:///{home}/runs.db"),
        ("/srv/mlflow.db", "sqlite:////srv/mlflow.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_trackers(tmp_path: Path, text: str, stored: str):
    file = load_party_file(site(tmp_path, more=f'[logging]\ntensorboard = true\nmlflow = "{text}"\n'))
    assert (file.tensorboard, file.mlflow) == (True, stored.format(home=tmp_path))
    (tmp_path / "copy.toml").write_text(write_party_file(file))
    copy = load_party_file(tmp_path / "copy.toml")
    assert (copy.tensorboard, copy.mlflow) == (file.tensorboard, file.mlflow)


def test_a_password_in_an_address_is_not_shown(tmp_path: Path):
    file = load_party_file(site(tmp_path, more='[logging]\nmlflow = "https://me:secret@tracker.example"\n'))
    assert "secret" not in repr(file)


def test_builder_makes_the_party(tmp_path: Path):
    party = load_party_file(site(tmp_path)).party()
    assert (party.name, party.seed) == ("hospital", 3)


def test_builder_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "installed"
    package.mkdir()
    (package / "my_site_code.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(str(package))
    assert load_party_file(site(tmp_path / "x", 'builder = "my_site_code:build"')).party().seed == 3


def test_builder_may_import_files_beside_it(tmp_path: Path):
    path = site(tmp_path, 'builder = "main.py:build"')
    (tmp_path / "my_models.py").write_text("SEED = 5\n")
    (tmp_path / "main.py").write_text(
        "from cutlayer import Party\nfrom my_models import SEED\ndef build(name):\n    return Party(name, seed=SEED)\n"
    )
    assert load_party_file(path).party().seed == 5


def test_two_sites_may_use_one_file_name(tmp_path: Path):
    first, second = site(tmp_path / "one"), site(tmp_path / "two")
    (tmp_path / "two" / "code.py").write_text(BUILDER.replace("seed=3", "seed=4"))
    assert [load_party_file(path).party().seed for path in (first, second)] == [3, 4]


def test_two_sites_files_of_one_name_beside_the_builder_are_refused(tmp_path: Path):
    """Python would hand the second site the first one's module; that must not happen silently."""
    paths = [site(tmp_path / name, 'builder = "main.py:build"') for name in ("one", "two")]
    for path in paths:
        (path.parent / "my_models.py").write_text("SEED = 5\n")
        (path.parent / "main.py").write_text("import my_models\n" + BUILDER)
    load_party_file(paths[0]).party()
    error = error_of(paths[1])
    assert error.code == "E204"
    assert "another site's module 'my_models' is loaded" in error.what


@pytest.mark.provokes("E204")
@pytest.mark.parametrize(
    ("builder", "message"),
    [
        ("code.py", "cannot be read"),
        ("code.py:", "cannot be read"),
        ("code.py:a b", "cannot be read"),
        ("missing.py:build", "module cannot be loaded.*FileNotFoundError"),
        ("no_such_package_here:build", "module cannot be loaded.*ModuleNotFoundError"),
        ("code.py:missing", "has no function 'missing'"),
        ("code.py:number", "has no function 'number'.*got int"),
        ("code.py:nothing", "gives no Party.*got NoneType"),
        ("code.py:broken", "the builder failed.*ValueError: no such table"),
        ("code.py:other", "another party.*expected hospital, got somebody"),
    ],
)
def test_builder_errors(tmp_path: Path, builder: str, message: str):
    path = site(tmp_path, f'builder = "{builder}"')
    with pytest.raises(ConfigError, match=message) as caught:
        load_party_file(path).party()
    assert caught.value.code == "E204"
    assert str(path) in caught.value.where


def test_file_with_a_mistake_is_loaded_anew_after_it_is_corrected(tmp_path: Path):
    path = site(tmp_path)
    (tmp_path / "code.py").write_text("import no_such_module_at_all")
    assert error_of(path).code == "E204"
    (tmp_path / "code.py").write_text(BUILDER)
    assert load_party_file(path).party().seed == 3


def test_builders_own_cutlayer_errors_pass(tmp_path: Path):
    with pytest.raises(DataError, match="no samples"):
        load_party_file(site(tmp_path, 'builder = "code.py:empty"')).party()


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        ("[netwerk]\n", "E201", "did you mean 'network'"),
        ("[network]\nlissen = 'x'", "E201", "did you mean 'listen'"),
        ("[network]\ninsecure = 'no'", "E202", "network.insecure.*expected bool, got text"),
        ("[network]\ninsecure = true\ncredentials = 'kit'", "E206", "both insecure = true and credentials"),
        ("[run]\naccept = 'always'", "E202", "run.accept"),
        ("[run]\naccept = 'abcd'", "E202", "run.accept"),
    ],
)
def test_wrong_party_file_is_refused(tmp_path: Path, more: str, code: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        load_party_file(site(tmp_path, more=more))
    assert caught.value.code == code


def test_missing_party_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="E203"):
        load_party_file(tmp_path / "none.toml")


def test_written_party_file_means_the_same_from_another_folder(tmp_path: Path):
    more = '[network]\nlisten = "0.0.0.0:1"\ncredentials = "kit"\n[run]\nfolder = "out"\naccept = "' + "a" * 64 + '"\n'
    file = load_party_file(site(tmp_path / "site", more=more))
    moved = tmp_path / "moved.toml"
    moved.write_text(write_party_file(file))
    again = load_party_file(moved)
    fields = ("name", "listen", "credentials", "insecure", "folder", "accept")
    assert [getattr(again, name) for name in fields] == [getattr(file, name) for name in fields]
    assert again.party().seed == 3
