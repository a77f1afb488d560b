"""What the code of cutlayer must look like: who may import whom, how big things may be, what is never used.

Each rule is a function from parsed modules to complaints, and each is first shown a bad snippet that it must complain
about: a rule that finds nothing anywhere proves nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = "cutlayer"
SOURCE = Path(__file__).resolve().parents[1] / "src" / ROOT

# A module imports only what has a lower number; what has the same number (`privacy`, `transport`, `data`, `models`)
# does not know of each other. The command line starts the dashboard, never the reverse.
LEVELS = {
    "errors": 0,
    "core": 1,
    "engine": 2,
    "privacy": 3,
    "transport": 3,
    "data": 3,
    "models": 3,
    "run": 4,
    "report": 5,
    "dashboard": 6,
    "cli": 7,
    "testing": 8,
    "fitting": 8,
    "__main__": 9,
}

# All that the pure core may import from outside: no tensors, no files, no sockets, no clock, no threads.
CORE_MAY_IMPORT = frozenset(
    """__future__ abc bisect collections copy dataclasses difflib enum fractions functools graphlib hashlib heapq
    itertools json keyword math msgspec operator random re statistics string struct textwrap types typing
    unicodedata zlib""".split()
)
ENGINE_MAY_NOT_IMPORT = frozenset(
    """asyncio concurrent ctypes datetime fcntl ftplib glob grpc http logging mmap multiprocessing os pathlib queue
    requests sched select selectors shutil signal socket socketserver ssl subprocess tempfile threading time urllib
    _thread""".split()
)
PURE = ("core", "engine")
IMPURE_CALLS = frozenset({"open", "print", "input", "breakpoint"})

MAX_FILE, MAX_FUNCTION, MAX_CLASS = 400, 60, 200
MAX_ARGUMENTS, MAX_METHODS = 7, 14
TOPOLOGIES = ("vanilla", "ushaped", "vertical", "multitask", "multihop")

BANNED_MODULES = frozenset({"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"})
BANNED_NAMES = frozenset({"eval", "exec", "__import__"})
BANNED_ATTRIBUTES = frozenset(
    """torch.load torch.save torch.serialization.load torch.serialization.save torch.jit.load torch.hub.load
    torch.package builtins.eval builtins.exec yaml.load yaml.load_all yaml.unsafe_load yaml.unsafe_load_all
    yaml.full_load yaml.full_load_all""".split()
)
# Collectives that pickle what they are given, and their kin in pandas.
BANNED_METHODS = frozenset(
    """all_gather_object gather_object broadcast_object_list scatter_object_list send_object_list recv_object_list
    read_pickle to_pickle""".split()
)
NEVER_LOADS_BY_NAME = ("core", "engine", "transport")
GRPC_SILENCED = (
    "os.environ.setdefault('GRPC_VERBOSITY', 'NONE')"  # gRPC takes it from nowhere else, and no setting of ours
)
ENVIRONMENT = frozenset({"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A parsed source file; `package` says that it is an `__init__.py`."""

    name: str
    text: str
    tree: ast.Module
    package: bool = False

    @property
    def layer(self) -> str:
        """The part below the root: "core" for cutlayer.core.plan, "" for the root itself."""
        return self.name.split(".")[1] if "." in self.name else ""


@dataclass(frozen=True)
class Import:
    """One imported dotted name: `guarded` when only type checkers run the statement."""

    target: str
    line: int
    guarded: bool


Rule = Callable[[dict[str, Module]], Iterator[str]]


def parse(name: str, text: str, *, package: bool = False) -> Module:
    return Module(name, text, ast.parse(text), package)


def load_tree() -> dict[str, Module]:
    modules = {}
    for path in sorted(SOURCE.rglob("*.py")):
        if "templates" in path.parts:
            continue  # files of users' projects
        parts = (ROOT, *path.relative_to(SOURCE).with_suffix("").parts)
        package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if package else parts)
        modules[name] = parse(name, path.read_text(encoding="utf-8"), package=package)
    return modules


# --- reading imports -------------------------------------------------------------------------------------------------


def imports_of(module: Module, known: Iterable[str] = ()) -> list[Import]:
    """Every import in the file, also inside functions. `from a import b` is `a.b` if that is a module, else `a`."""
    known, found = frozenset(known), []
    guarded = {id(inner) for node in ast.walk(module.tree) if is_type_checking(node) for inner in walk_all(node.body)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(module, node)
            whole = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in known or base == ROOT else base for name in whole]
        else:
            continue
        found += [Import(target, node.lineno, id(node) in guarded) for target in dict.fromkeys(targets)]
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def walk_all(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    return (inner for node in nodes for inner in ast.walk(node))


def absolute_base(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + (1 if module.package else 0)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def qualified_names(module: Module) -> dict[str, str]:
    """Local name -> dotted name, for everything that the file imports."""
    names = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(module, node)
            names |= {alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`t.load` -> "torch.load" after `import torch as t`; "" for anything that is not a dotted name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        head = dotted(node.value, names)
        return f"{head}.{node.attr}" if head else ""
    return ""


def calls(module: Module) -> Iterator[tuple[ast.Call, str]]:
    names = qualified_names(module)
    return ((node, dotted(node.func, names)) for node in ast.walk(module.tree) if isinstance(node, ast.Call))


def classes(module: Module) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef))


# --- the rules -------------------------------------------------------------------------------------------------------


def layer_rule(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if not module.layer:
            continue  # the root may offer anything
        if module.layer not in LEVELS:
            yield f"{module.name}: has no level; give {module.layer!r} a place in LEVELS"
            continue
        for found in imports_of(module, modules):
            parts = found.target.split(".")
            if parts[0] != ROOT or parts[1:2] == [module.layer]:
                continue
            if len(parts) == 1 or parts[1] not in LEVELS:
                yield f"{module.name}:{found.line}: imports {found.target}; name the module that defines it"
            elif LEVELS[parts[1]] >= LEVELS[module.layer]:
                yield f"{module.name}:{found.line}: {module.layer} may not import {parts[1]}"


def purity_rule(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        for found in imports_of(module, modules):
            top = found.target.split(".")[0]
            if module.layer == "core" and top != ROOT and top not in CORE_MAY_IMPORT:
                yield f"{module.name}:{found.line}: core is pure and may not import {top}"
            if module.layer == "engine" and top in ENGINE_MAY_NOT_IMPORT:
                yield f"{module.name}:{found.line}: engine does no I/O and may not import {top}"
            if module.layer != "transport" and top.split("_")[0] == "grpc":
                yield f"{module.name}:{found.line}: only transport may import {top}"
        if module.layer not in PURE:
            continue
        for call, name in calls(module):
            shared_dice = name.startswith("random.") and name != "random.Random"
            if name in IMPURE_CALLS or shared_dice:
                yield f"{module.name}:{call.lineno}: {module.layer} is without side effects and may not call {name}()"


def cycle_rule(modules: dict[str, Module]) -> Iterator[str]:
    """Imports inside functions count: they hide a cycle, they do not end it. Those for type checkers do not."""
    graph = {
        name: {found.target for found in imports_of(module, modules) if not found.guarded and found.target in modules}
        for name, module in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "import cycle: " + " <- ".join(error.args[1])


def size_rule(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        lines = len(module.text.splitlines())
        if lines > MAX_FILE:
            yield f"{module.name}: file has {lines} lines, at most {MAX_FILE}"
        methods = {id(method) for owner in classes(module) for method in owner.body}
        for node in ast.walk(module.tree):
            where = f"{module.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, Function):
                yield from function_size(node, where, method=id(node) in methods)
            elif isinstance(node, ast.ClassDef):
                yield from class_size(node, where)


def function_size(node: Function, where: str, *, method: bool) -> Iterator[str]:
    lines = length(node)
    if lines > MAX_FUNCTION:
        yield f"{where}: {node.name} has {lines} lines, at most {MAX_FUNCTION}"
    spec = node.args
    count = (
        len([*spec.posonlyargs, *spec.args, *spec.kwonlyargs]) + (spec.vararg is not None) + (spec.kwarg is not None)
    )
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    count -= method and not static
    if count > MAX_ARGUMENTS:
        yield f"{where}: {node.name} takes {count} arguments, at most {MAX_ARGUMENTS}"


def class_size(node: ast.ClassDef, where: str) -> Iterator[str]:
    lines = length(node)
    if lines > MAX_CLASS:
        yield f"{where}: class {node.name} has {lines} lines, at most {MAX_CLASS}"
    methods = {child.name for child in node.body if isinstance(child, Function)}
    if len(methods) > MAX_METHODS:
        yield f"{where}: class {node.name} has {len(methods)} methods, at most {MAX_METHODS}"


def length(node: Function | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def inheritance_rule(modules: dict[str, Module]) -> Iterator[str]:
    """No class of ours inherits from another of ours. The one tree is that of errors, one level below its root."""
    ours = {node.name for module in modules.values() for node in classes(module)}
    for module in modules.values():
        names, local = qualified_names(module), {node.name for node in classes(module)}
        for node in classes(module):
            for base in node.bases:
                plain = base.value if isinstance(base, ast.Subscript) else base
                full = dotted(plain, names)
                last = full.rpartition(".")[2]
                if last not in ours or not (full in local or full.startswith(f"{ROOT}.")):
                    continue
                if module.name == f"{ROOT}.errors" and last == "CutlayerError":
                    continue
                yield f"{module.name}:{node.lineno}: {node.name} inherits from {last}; compose instead"


def ban_rule(modules: dict[str, Module]) -> Iterator[str]:
    """Nothing that can name code is decoded or run."""
    for module in modules.values():
        names = qualified_names(module)
        for found in imports_of(module, modules):
            if found.target.split(".")[0] in BANNED_MODULES or found.target in BANNED_ATTRIBUTES:
                yield f"{module.name}:{found.line}: {found.target} is banned"
        for name in names.values():
            if name in BANNED_ATTRIBUTES or name.rpartition(".")[2] in BANNED_METHODS:
                yield f"{module.name}: {name} is banned"
        for call, name in calls(module):
            if name == "importlib.import_module" and module.layer in NEVER_LOADS_BY_NAME:
                yield f"{module.name}:{call.lineno}: {module.layer} handles what others sent and loads no code by name"
        for node in ast.walk(module.tree):
            where = f"{module.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in BANNED_NAMES:
                yield f"{where}: {node.id} is banned"
            if isinstance(node, ast.Name | ast.Attribute) and dotted(node, names) in BANNED_ATTRIBUTES:
                yield f"{where}: {dotted(node, names)} is banned"
            if isinstance(node, ast.Attribute) and node.attr in BANNED_METHODS:
                yield f"{where}: {node.attr} pickles and is banned"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                yield f"{where}: allow_pickle is banned"


def environment_rule(modules: dict[str, Module]) -> Iterator[str]:
    """One place for configuration: the contract and the party file, never the environment."""
    for module in modules.values():
        names = qualified_names(module)
        grpc = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
        grpc = [node for node in grpc if module.name.endswith("transport") and ast.unparse(node) == GRPC_SILENCED]
        silenced = {id(inner) for node in grpc for inner in ast.walk(node)}
        for node in ast.walk(module.tree):
            if id(node) in silenced:
                continue
            if isinstance(node, ast.Name | ast.Attribute) and dotted(node, names) in ENVIRONMENT:
                yield f"{module.name}:{node.lineno}: reads or sets the environment; use the party file"


def docstring_rule(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        public = not any(part.startswith("_") and part != "__main__" for part in module.name.split("."))
        if public and not (ast.get_docstring(module.tree) or "").strip():
            yield f"{module.name}: has no docstring"


def topology_rule(modules: dict[str, Module]) -> Iterator[str]:
    """A topology is a value: a function that returns a plan, never a class."""
    for module in modules.values():
        for node in classes(module):
            for topology in TOPOLOGIES:
                if topology in node.name.replace("_", "").lower():
                    yield f"{module.name}:{node.lineno}: class {node.name} is named after a topology"


RULES: list[Rule] = [
    layer_rule,
    purity_rule,
    cycle_rule,
    size_rule,
    inheritance_rule,
    ban_rule,
    environment_rule,
    docstring_rule,
    topology_rule,
]


# --- the source keeps the rules --------------------------------------------------------------------------------------


def test_source_is_found():
    modules = load_tree()
    assert f"{ROOT}.errors" in modules
    assert len(modules) > 2


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps(rule: Rule):
    complaints = list(rule(load_tree()))
    assert not complaints, "\n" + "\n".join(complaints)


# --- the rules can complain ------------------------------------------------------------------------------------------


def modules_of(sources: dict[str, str]) -> dict[str, Module]:
    """Parse snippets; a name without a dot is a package (or `cli.py`), "" is the root."""
    named = {f"{ROOT}.{name}".rstrip("."): text for name, text in sources.items()}
    return {name: parse(name, text, package=name.count(".") < 2) for name, text in named.items()}


def long_function(lines: int) -> str:
    return "def f():\n" + "    x = 1\n" * (lines - 1)


def long_class(lines: int) -> str:
    return "class C:\n" + "    x = 1\n" * (lines - 1)


def wide_class(methods: int) -> str:
    return "class C:\n" + "".join(f"    def m{number}(self): ...\n" for number in range(methods))


BANNED_SNIPPETS = [
    "import pickle",
    "import _pickle as p",
    "from cloudpickle import dumps",
    "def f():\n    import dill",
    "import marshal",
    "import shelve",
    "import torch\ntorch.load(x)",
    "import torch as t\nload = t.load",
    "from torch import load",
    "from torch.serialization import load as safe",
    "eval('1')",
    "run = exec",
    "import builtins\nbuiltins.eval('1')",
    "__import__('pickle')",
    "import numpy\nnumpy.load(x, allow_pickle=True)",
    "import numpy\nnumpy.load(x, allow_pickle=flag)",
    "import yaml\nyaml.load(x)",
    "from torch.distributed import broadcast_object_list",
    "dist.all_gather_object(x, y)",
]
BAD: list[tuple[Rule, dict[str, str], str]] = [
    (layer_rule, {"core.plan": "from cutlayer.engine.stage import Stage"}, "core may not import engine"),
    (layer_rule, {"core.plan": "def f():\n    import cutlayer.run.session"}, "core may not import run"),
    (layer_rule, {"core.plan": "if TYPE_CHECKING:\n    from cutlayer.run import x"}, "core may not import run"),
    (layer_rule, {"engine.party": "from .. import run"}, "engine may not import run"),
    (layer_rule, {"engine.party": "from ..transport import base"}, "engine may not import transport"),
    (layer_rule, {"privacy.noise": "from cutlayer.transport import base"}, "privacy may not import transport"),
    (layer_rule, {"data.sources": "import cutlayer.models.cut"}, "data may not import models"),
    (layer_rule, {"dashboard.app": "from cutlayer import cli"}, "dashboard may not import cli"),
    (layer_rule, {"errors": "from cutlayer.core import plan"}, "errors may not import core"),
    (layer_rule, {"run.session": "from cutlayer import Plan"}, "name the module that defines it"),
    (layer_rule, {"run.session": "import cutlayer"}, "name the module that defines it"),
    (layer_rule, {"utils.misc": "x = 1"}, "has no level"),
    *(
        (purity_rule, {"core.plan": f"import {name}"}, f"may not import {name}")
        for name in ("torch", "numpy", "grpc", "socket", "os", "pathlib", "time", "asyncio", "threading", "logging")
    ),
    *(
        (purity_rule, {"engine.party": f"from {name} import x"}, f"may not import {name}")
        for name in ("grpc", "socket", "os", "pathlib", "time", "threading", "subprocess", "asyncio")
    ),
    (purity_rule, {"run.session": "import grpc.aio"}, "only transport may import grpc"),
    (purity_rule, {"core.plan": "open('x')"}, "may not call open()"),
    (purity_rule, {"engine.party": "from random import shuffle\nshuffle(x)"}, "may not call random.shuffle()"),
    (cycle_rule, {"core.a": "from cutlayer.core import b", "core.b": "import cutlayer.core.a"}, "import cycle"),
    (cycle_rule, {"core.a": "from .b import x", "core.b": "def f():\n    from .a import y"}, "import cycle"),
    (cycle_rule, {"core": "from cutlayer.core.a import x", "core.a": "from cutlayer.core import x"}, "import cycle"),
    (size_rule, {"core.a": "x = 1\n" * (MAX_FILE + 1)}, "file has 401 lines"),
    (size_rule, {"core.a": long_function(MAX_FUNCTION + 1)}, "f has 61 lines"),
    (size_rule, {"core.a": long_class(MAX_CLASS + 1)}, "class C has 201 lines"),
    (size_rule, {"core.a": wide_class(MAX_METHODS + 1)}, "class C has 15 methods"),
    (size_rule, {"core.a": "def f(a, b, /, c, d, *e, g, h, i): ..."}, "f takes 8 arguments"),
    (size_rule, {"core.a": "class C:\n    @staticmethod\n    def f(a, b, c, d, e, g, h, i): ..."}, "f takes 8"),
    (inheritance_rule, {"core.a": "class A: ...\nclass B(A): ..."}, "B inherits from A"),
    (inheritance_rule, {"core.a": "class A: ...", "core.b": "from .a import A as Z\nclass B(Z): ..."}, "from A"),
    (inheritance_rule, {"core.a": "class A: ...", "core.b": "from . import a\nclass B(a.A[int]): ..."}, "from A"),
    (inheritance_rule, {"errors": "class PlanError(Exception): ...\nclass Sub(PlanError): ..."}, "from PlanError"),
    *((ban_rule, {"run.a": text}, "banned") for text in BANNED_SNIPPETS),
    (ban_rule, {"transport.a": "from importlib import import_module\nimport_module(x)"}, "loads no code by name"),
    (environment_rule, {"run.a": "import os\nif os.environ.get('X'): ..."}, "environment"),
    (environment_rule, {"run.a": f"import os\n{GRPC_SILENCED}"}, "environment"),
    (environment_rule, {"transport": "import os\nos.environ.setdefault('HOME', 'NONE')"}, "environment"),
    (environment_rule, {"run.a": "from os import getenv\ngetenv('X')"}, "environment"),
    (docstring_rule, {"core.a": "x = 1"}, "has no docstring"),
    (docstring_rule, {"core": ""}, "has no docstring"),
    (topology_rule, {"core.a": "class UShapedTrainer: ..."}, "named after a topology"),
    (topology_rule, {"core.a": "class Multi_Hop: ..."}, "named after a topology"),
]
GOOD: list[tuple[Rule, dict[str, str]]] = [
    (layer_rule, {"": "from cutlayer.run import session", "run.a": "from cutlayer.core import plan\nimport torch"}),
    (layer_rule, {"core.plan": "from cutlayer.core.spec import x\nfrom . import spec\nfrom ..errors import PlanError"}),
    (layer_rule, {"cli": "from cutlayer.dashboard import app"}),
    (
        purity_rule,
        {"core.a": "import random\nd = random.Random(1)", "transport.a": "import grpc", "run.a": "import os"},
    ),
    (cycle_rule, {"core.a": "if TYPE_CHECKING:\n    from .b import x", "core.b": "from .a import y"}),
    (size_rule, {"core.a": "class C:\n    def f(self, a, b, c, d, e, g, h): ..."}),
    (size_rule, {"a": long_function(MAX_FUNCTION), "b": long_class(MAX_CLASS), "c": wide_class(MAX_METHODS)}),
    (inheritance_rule, {"errors": "class CutlayerError(Exception): ...\nclass PlanError(CutlayerError): ..."}),
    (inheritance_rule, {"a.x": "class Module: ...", "b.x": "from torch.nn import Module\nclass M(Module): ..."}),
    (ban_rule, {"engine.a": "model.eval()\nimport numpy\nnumpy.load(x, allow_pickle=False)\nconfig.load(x)"}),
    (environment_rule, {"run.a": "import os\nos.replace('a', 'b')"}),
    (environment_rule, {"transport": f"import os\n{GRPC_SILENCED}"}),
    (docstring_rule, {"core.a": "'What it is.'", "core._private": "x = 1"}),
    (topology_rule, {"core.a": "def vanilla(): ...\nclass Plan: ..."}),
]


@pytest.mark.parametrize(("rule", "sources", "complaint"), BAD)
def test_rule_complains(rule: Rule, sources: dict[str, str], complaint: str):
    assert any(complaint in line for line in rule(modules_of(sources)))


@pytest.mark.parametrize(("rule", "sources"), GOOD)
def test_rule_accepts(rule: Rule, sources: dict[str, str]):
    assert list(rule(modules_of(sources))) == []


def test_every_rule_is_shown_to_complain():
    assert {rule for rule, _, _ in BAD} == set(RULES)
