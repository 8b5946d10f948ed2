"""The shape of the package, read from its source by the standard library's `ast`.

No circle of imports, no private name used outside its file, no long file, no module hidden by a function's name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import nn

import fiun_fast as ff

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fiun_fast"
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "bench").glob("*.py"))
LONGEST, MOST_FILES = 450, 188
EXTENSIONS = {"_cpu", "_cuda"}  # compiled modules: private to users, the package's own to its kernels
DOCUMENTED = {"_asdict", "_fields", "_make", "_replace", "_getframe"}  # of named tuples and sys; public in all but name
BY_STRING = {"getattr", "setattr", "hasattr", "delattr"}


def module_name(path: Path) -> str:
    """fiun_fast/kernels/cpu.py -> fiun_fast.kernels.cpu; a package's __init__.py has the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, those of functions too, but not what only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from statements(other)
            continue
        yield child
        yield from statements(child)


def source_of(node: ast.ImportFrom, path: Path) -> str:
    """The module that a `from … import` names, without dots at its beginning."""
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).parent.parts
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def imported(path: Path) -> set[str]:
    """Modules of the package that the file imports, wherever in it; a parent package alone does not count."""
    found = set()
    for node in statements(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = source_of(node, path)
            inside = {f"{source}.{alias.name}" for alias in node.names}
            found |= inside & MODULES.keys()
            if inside - MODULES.keys():  # a name, not a module
                found.add(source)
    return found & MODULES.keys()


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module, or of one that imports itself (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            at = stack.index(name)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1 or name in edges[name]:
                found.append(sorted(component))

    for name in sorted(edges):
        if name not in index:
            visit(name)
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name.strip("_") != ""


def defined(tree: ast.Module) -> set[str]:
    """Private names that the file itself makes: functions, classes, variables, attributes of self or cls."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            found.add(node.attr)
    return found


def is_own(base: ast.expr) -> bool:
    """Whether an expression is self, cls or super()."""
    if isinstance(base, ast.Call):
        return isinstance(base.func, ast.Name) and base.func.id == "super"
    return isinstance(base, ast.Name) and base.id in ("self", "cls")


def is_torchs(base: ast.expr, name: str) -> bool:
    """torch._C and its like, and what torch itself keeps in tensors and modules."""
    root = base
    while isinstance(root, ast.Attribute):
        root = root.value
    known = hasattr(torch.Tensor, name) or hasattr(nn.Module(), name)
    return known or (isinstance(root, ast.Name) and root.id == "torch")


def private_uses(tree: ast.Module, path: Path) -> Iterator[str]:
    """Each use of a private name that some other file made: an import, an attribute, or one named by a string."""
    own = defined(tree) | DOCUMENTED | EXTENSIONS
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            source = source_of(node, path)
            if source.split(".")[0] == PACKAGE.name:
                names = [*source.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [] if is_own(node.value) or is_torchs(node.value, node.attr) else [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_STRING:
            base, name = (*node.args[:2], None, None)[:2]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and base is not None:
                names = [] if is_own(base) or is_torchs(base, name.value) else [name.value]
        if any(is_private(name) and name not in own for name in names):
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"


def test_no_circle_of_imports() -> None:
    """Imports inside functions count: a circle that is only put off is a circle."""
    assert circles({name: imported(path) for name, path in MODULES.items()}) == []


def test_no_private_name_is_used_outside_its_file() -> None:
    uses = [use for path in [*FILES, *SCRIPTS] for use in private_uses(parse(path), path)]
    assert uses == [], "\n".join(uses)


def test_files_are_few_and_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}
    assert len(lengths) < MOST_FILES


def test_no_module_has_the_name_of_something_exported() -> None:
    """`import fiun_fast.plan` would give the function, not the module."""
    assert sorted(name for name in MODULES if name.rpartition(".")[2] in ff.__all__) == []
    own = {f"{ff.checkpoints.__name__}.{name}" for name in ff.checkpoints.__all__}
    assert sorted(own & MODULES.keys()) == []


def test_the_checks_see_what_they_look_for() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]
    text = """
from .plan import _find
from . import _cpu
import torch
class Own:
    def __init__(self, other):
        self._kept = other._hidden
        self._kept = other._kept, torch._C, other.__dict__, other._replace(a=1), self._base, super()._base
        getattr(other, "_buried"), getattr(self, "_base"), getattr(other, "_version")
"""
    assert [use.partition(": ")[2] for use in private_uses(ast.parse(text), PACKAGE / "some.py")] == [
        "from .plan import _find",
        "other._hidden",
        "getattr(other, '_buried')",
    ]


def floors() -> dict[str, float]:
    """File or folder -> floor, as docs/architecture.md has them."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+|½) \| (.*?) \|", page, re.MULTILINE)
    return {
        name: 0.5 if floor == "½" else float(floor) for floor, names in rows for name in re.findall("`(.+?)`", names)
    }


def test_a_file_imports_from_its_own_floor_and_lower_ones_only():
    found = floors()

    def floor_of(path: Path) -> float:
        inside = path.relative_to(PACKAGE)
        return found[f"{inside.parts[0]}/" if len(inside.parts) > 1 else inside.name]

    for path in FILES:
        if path.parent == PACKAGE and path.name in ("__init__.py", "version.py"):
            continue
        for name in imported(path) - {"fiun_fast", "fiun_fast.version"}:
            assert floor_of(MODULES[name]) <= floor_of(path), f"{path.name} imports {name}, which is above it"


def test_no_two_test_files_have_one_name() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert {name for name in names if names.count(name) > 1} == set()  # pytest imports them by that name
