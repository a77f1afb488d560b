"""The party file: what one site keeps to itself. Its code, its place in the network, where its results go.

| code | error | meaning |
| --- | --- | --- |
| E202 | ConfigError | a value of a wrong type or size |
| E204 | ConfigError | the builder cannot be loaded, fails, or gives something else than this party |
| E206 | ConfigError | the keys of [network] contradict each other |
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec

from cutlayer.core.quota import Serving
from cutlayer.errors import ConfigError, CutlayerError
from cutlayer.run.limits import ServingTable
from cutlayer.run.tables import parse_table, read_text, write_table
from cutlayer.transport.proxy import NO_PROXY, check_proxy

if TYPE_CHECKING:
    from cutlayer.run.party import Party

__all__ = ["PartyFile", "call_function", "load_party_file", "write_party_file"]

_BUILDER = re.compile(r"^(?P<module>[^:]+):(?P<function>[A-Za-z_]\w*)$")
_DIGEST = re.compile(r"^[0-9a-f]{64}$")
ASK = "ask"
_PREFIX = "_cutlayer_site_"


class _CodeTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    builder: str


class _NetworkTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    listen: str = ""
    credentials: str = ""
    insecure: bool = False
    proxy: str = ""
    identity: str = ""


class _RunTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    folder: str = "runs"
    accept: str = ASK


class _LoggingTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    tensorboard: bool = False
    mlflow: str = ""


class _PartyTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    party: str
    code: _CodeTable
    network: _NetworkTable = _NetworkTable()
    run: _RunTable = _RunTable()
    logging: _LoggingTable = _LoggingTable()
    serving: ServingTable = ServingTable()


@dataclass(frozen=True, kw_only=True)
class PartyFile:
    """One site's own settings. Paths in the file count from its folder; here they are complete.

    Attributes:
        path: The party file.
        name: The party.
        builder: "package.module:function" or "file.py:function"; called with the party's name, gives its `Party`.
        listen: "host:port" to listen at, or empty: this party only dials.
        credentials: Folder of its certificate, key and authority, or None.
        insecure: Plaintext instead of TLS; between processes of one machine only.
        proxy: "http://host:port" to dial through, "none", or empty: what this machine is set to. May hold a password.
        folder: Where results go, each run in a folder of its own.
        accept: "ask", or the digest of the contract that this site has accepted.
        tensorboard: Write the run's events as TensorBoard files, into its folder.
        mlflow: Address of an MLflow server or store that gets the run's events, or empty: none.
        identity: Name of its certificate as a client of a served stage, if that is not the party's.
        serving: Limits and quotas of `cutlayer serve`.
    """

    path: Path
    name: str
    builder: str
    listen: str
    credentials: Path | None
    insecure: bool
    folder: Path
    accept: str
    proxy: str = field(default="", repr=False)
    tensorboard: bool = False
    mlflow: str = field(default="", repr=False)  # may hold a password
    identity: str = ""
    serving: Serving = field(default_factory=Serving)

    def party(self) -> Party:
        """Call the builder and return what it gives.

        Local code is loaded and run here, and here only; the file that names it is this site's own.

        Raises:
            ConfigError: E204, the builder cannot be loaded, fails, or gives something else than this party.
        """
        from cutlayer.run.party import Party  # torch is loaded only when a party is built

        where = f"{self.path}, [code] builder = {self.builder!r}"
        match = _BUILDER.match(self.builder)
        if match is None:
            raise _bad_builder(
                "the builder cannot be read", where, "'file.py:function' or 'package.module:function'", self.builder
            )
        source = self.path.parent / match["module"] if match["module"].endswith(".py") else None
        with _importable(source, where):
            function = _function(source or match["module"], match["function"], where, "party_name")
            try:
                party = function(self.name)
            except CutlayerError:
                raise
            except (Exception, SystemExit) as error:
                raise _bad_builder("the builder failed", where, "a Party", _said(error)) from error
        if not isinstance(party, Party):
            raise _bad_builder("the builder gives no Party", where, "cutlayer.Party", type(party).__name__)
        if party.name != self.name:
            raise _bad_builder("the builder gives another party than the file says", where, self.name, party.name)
        return party


def call_function(text: str, home: Path) -> object:
    """Call "file.py:function" (a file counts from `home`) or "package.module:function" without arguments.

    Raises:
        ConfigError: E204, it cannot be loaded, or fails.
    """
    match = _BUILDER.match(text)
    if match is None:
        raise _bad_builder(
            "the function cannot be read", text[:200], "'file.py:function' or 'package.module:function'", text[:80]
        )
    source = home / match["module"] if match["module"].endswith(".py") else None
    with _importable(source, text):
        function: Callable[[], object] = _function(source or match["module"], match["function"], text, "")  # type: ignore[assignment]
        try:
            return function()
        except CutlayerError:
            raise
        except (Exception, SystemExit) as error:
            raise _bad_builder(
                "the function failed", text, "a model from a call without arguments", _said(error)
            ) from error


def load_party_file(path: Path) -> PartyFile:
    """Read a party file; its code is not loaded yet.

    Raises:
        ConfigError: E201 to E203 for the file, E204 for the builder, E206 for keys that contradict each other,
            E214 for the proxy.
    """
    table = parse_table(read_text(path), _PartyTable, where=str(path))
    network, home = table.network, path.absolute().parent
    if network.insecure and network.credentials:
        raise _contradiction(path, "both insecure = true and credentials are given", "one of the two")
    check_proxy(network.proxy)
    if network.insecure and network.proxy not in ("", NO_PROXY):
        raise _contradiction(path, "both insecure = true and a proxy are given", "one of the two")
    if table.run.accept != ASK and not _DIGEST.match(table.run.accept):
        raise ConfigError(
            "the value of 'run.accept' is wrong",
            where=f"{path}: run.accept",
            expected='"ask", or the digest that `cutlayer plan CONTRACT` prints (64 hex digits)',
            got=table.run.accept[:80],
            remedy="copy the whole digest",
            code="E202",
        )
    return PartyFile(
        path=path.absolute(),
        name=table.party,
        builder=table.code.builder,
        listen=network.listen,
        credentials=home / network.credentials if network.credentials else None,
        insecure=network.insecure,
        folder=home / table.run.folder,
        accept=table.run.accept,
        proxy=network.proxy,
        tensorboard=table.logging.tensorboard,
        mlflow=_store(table.logging.mlflow, home),
        identity=network.identity,
        serving=table.serving.limits(),
    )


def write_party_file(file: PartyFile) -> str:
    """Return a party file as TOML text with complete paths, so that it may lie in any folder."""
    match = _BUILDER.match(file.builder)
    builder = file.builder
    if match is not None and match["module"].endswith(".py"):
        builder = f"{file.path.parent / match['module']}:{match['function']}"
    credentials = str(file.credentials) if file.credentials else ""
    return write_table(
        _PartyTable(
            party=file.name,
            code=_CodeTable(builder=builder),
            network=_NetworkTable(
                listen=file.listen,
                credentials=credentials,
                insecure=file.insecure,
                proxy=file.proxy,
                identity=file.identity,
            ),
            run=_RunTable(folder=str(file.folder), accept=file.accept),
            logging=_LoggingTable(tensorboard=file.tensorboard, mlflow=file.mlflow),
            serving=ServingTable.of(file.serving),
        )
    )


def _store(text: str, home: Path) -> str:
    """Return the address of an MLflow store; a path is that of a SQLite file."""
    return f"sqlite:///{home / text}" if text and "://" not in text else text


def _function(source: Path | str, function: str, where: str, arguments: str) -> Callable[[str], object]:
    try:
        loaded = _from_file(source) if isinstance(source, Path) else import_module(source)
    except CutlayerError:
        raise
    except (Exception, SystemExit) as error:
        raise _bad_builder("the builder's module cannot be loaded", where, "Python code", _said(error)) from error
    found = getattr(loaded, function, None)
    if not callable(found):
        raise _bad_builder(
            f"the module has no function {function!r}", where, f"def {function}({arguments})", type(found).__name__
        )
    return found  # type: ignore[no-any-return]


def _from_file(path: Path) -> ModuleType:
    """Load a file under a name of its own, so that sites may each have a `party.py`; load it once."""
    path = path.resolve()
    name = f"{_PREFIX}{path.stem}_{sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = module_from_spec(spec)
    sys.modules[name] = module  # data classes and data loaders' workers look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _importable(source: Path | None, where: str) -> Iterator[None]:
    """Let a builder's file import the files beside it; refuse names that another site's files have taken."""
    if source is None:
        yield
        return
    home = source.parent.resolve()
    for name in sorted(_top_names(home)):
        taken = Path(getattr(sys.modules.get(name), "__file__", None) or home / name).resolve()
        if any(taken.is_relative_to(other) for other in _sites() - {home}) and not taken.is_relative_to(home):
            raise _bad_builder(
                f"another site's module {name!r} is loaded in this process", where, str(home / name), str(taken)
            )
    sys.path.insert(0, str(home))
    try:
        yield
    finally:
        sys.path.remove(str(home))


def _top_names(home: Path) -> set[str]:
    """Return the modules and packages that lie in a folder."""
    return {path.stem for path in home.glob("*.py")} | {path.parent.name for path in home.glob("*/__init__.py")}


def _sites() -> set[Path]:
    """Return the folders of the builders' files that this process has loaded."""
    loaded = [module for name, module in sys.modules.items() if name.startswith(_PREFIX)]
    return {Path(module.__file__).parent for module in loaded if module.__file__}


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:400]


def _bad_builder(what: str, where: str, expected: str, got: str) -> ConfigError:
    remedy = "correct the function, or its name here; -v shows where it failed"
    return ConfigError(what, where=where, expected=expected, got=got, remedy=remedy, code="E204")


def _contradiction(path: Path, what: str, expected: str) -> ConfigError:
    return ConfigError(
        what, where=f"{path}: [network]", expected=expected, remedy="remove one of the keys", code="E206"
    )
