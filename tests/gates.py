"""The gates of the design, as functions from a folder of source to a list of offences. test_gates.py runs them.

They read the syntax tree, so an import inside a function or under TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

LONGEST_FUNCTION_LINES = 60
LARGEST_TREE_BYTES = 10 * 2**20
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes")

# Imports go from a later group to an earlier one. Parts of one group do not import each other, but for the first.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "log", "progress", "hardware", "ranks"),
    ("config",),
    ("store",),
    ("data", "model", "watch"),
    ("memory", "schedule", "saving"),
    ("fitting",),
    ("plan", "prompts", "output"),
    ("roles", "share"),
    ("train",),
    ("prepare",),
    ("check",),
    ("caching",),
    ("drawing",),
    ("rehearsing",),
    ("inventory", "offline", "measuring", "reporting"),
    ("publish",),
    ("exporting",),
    ("run",),
    ("launch",),
    ("bench",),
    ("cli",),
    ("__main__",),
)


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, where it is, and what Python reads in it."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def part(self) -> str:
        """The part of the package that it belongs to: `sana_tune.data.order` is of `data`; the package itself of ''."""
        return [*self.name.split("."), ""][1]

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


def modules(package: Path) -> tuple[Module, ...]:
    """Every module below the folder of a package, by name."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return tuple(found)


def imports(module: Module, names: frozenset[str]) -> set[str]:
    """Which of the modules `names` a module imports, anywhere in it, importlib.import_module("…") included."""
    wanted: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            wanted.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            wanted.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                wanted.add(argument.value)
    return {found for name in wanted if (found := _nearest(name, names)) is not None and found != module.name}


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    """What stands behind `from`, without leading dots."""
    if not node.level:
        return node.module or ""
    levels = node.level - module.is_package
    base = module.name.split(".")
    return ".".join(base[: len(base) - levels] + ([node.module] if node.module else []))


def _nearest(name: str, names: frozenset[str]) -> str | None:
    """The module that a dotted name means: itself, else the module that has it as an attribute."""
    while name and name not in names:
        name = name.rpartition(".")[0]
    return name or None


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def import_graph(found: tuple[Module, ...]) -> dict[str, set[str]]:
    """Module → the modules of the same package that it imports."""
    names = frozenset(module.name for module in found)
    return {module.name: imports(module, names) for module in found}


def layer_offences(found: tuple[Module, ...]) -> list[str]:
    """Imports that go up or across the layers, and parts that have no layer."""
    layer = {part: number for number, group in enumerate(LAYERS) for part in group}
    parts = {module.name: module.part for module in found}
    offences = [f"part {part} stands in no layer" for part in sorted(set(parts.values()) - set(layer) - {"", "assets"})]
    for name, targets in import_graph(found).items():
        for target in sorted(targets):
            here, there = parts[name], parts[target]
            if here == there or not there:  # the package itself holds the version and is everyone's
                continue
            own, other = layer.get(here, -1), layer.get(there, -1)
            if other > own or (other == own > 0):
                offences.append(f"{name} imports {target}: {here or 'the package'} must not import {there}")
    return offences


def circles(found: tuple[Module, ...]) -> list[str]:
    """One import circle, when there is any. Importing a.b runs a/__init__.py, so that is an edge too."""
    graph: dict[str, set[str]] = {}
    for name, targets in import_graph(found).items():
        parents = {parent for target in targets for parent in _parents(target)} - set(_parents(name)) - {name}
        graph[name] = targets | (parents & {module.name for module in found})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" → ".join(reversed(error.args[1]))]
    return []


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def long_functions(found: tuple[Module, ...], limit: int = LONGEST_FUNCTION_LINES) -> list[str]:
    """Functions of more than `limit` lines, decorators not counted."""
    return [
        f"{module.name}.{node.name}: {lines} lines"
        for module in found
        for node in _functions(module.tree)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > limit
    ]


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


SETTINGS = re.compile(r"(^|_)(config|conf|cfg|settings?|args|arguments|options|opts)$")


def scattered_defaults(found: tuple[Module, ...]) -> list[str]:
    """getattr(settings, "name", default): the schema is the one home of defaults.

    Settings are what is named like them, or annotated with a type that is named like them.
    """
    offences = []
    for module in found:
        annotated = _names_of_settings(module.tree)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and _called(node) == "getattr" and len(node.args) == 3:
                words = {part.id for part in ast.walk(node.args[0]) if isinstance(part, ast.Name)}
                words |= {part.attr for part in ast.walk(node.args[0]) if isinstance(part, ast.Attribute)}
                if words & annotated or any(SETTINGS.search(word.lower()) for word in words):
                    offences.append(f"{module.name}:{node.lineno}: {ast.unparse(node)}")
    return offences


def _names_of_settings(tree: ast.AST) -> set[str]:
    typed: list[tuple[str, ast.expr | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            typed.append((node.arg, node.annotation))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            typed.append((node.target.id, node.annotation))
    return {name for name, kind in typed if kind is not None and re.search(r"(Config|Settings)\b", ast.unparse(kind))}


def broad_excepts(found: tuple[Module, ...], allowed: frozenset[str]) -> list[str]:
    """`except:`, `except Exception` and `except BaseException` that do not raise again, outside the modules allowed."""
    offences = []
    for module in found:
        if module.name in allowed:
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and not _raises(node):
                offences.append(f"{module.name}:{node.lineno}")
    return offences


def _is_broad(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(_is_broad(element) for element in kind.elts)
    return kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException"))


def _raises(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.body[-1], ast.Raise)


def without_test(package: Path, tests: Path) -> list[str]:
    """Modules without tests/<the same path>/test_<name>.py that tests something.

    An __init__.py needs one only when it holds more than names.
    """
    offences = []
    for module in modules(package):
        relative = module.path.relative_to(package)
        if module.is_package and not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in module.tree.body):
            continue
        mirror = tests / relative.parent / f"test_{relative.stem.strip('_')}.py"
        if not mirror.is_file():
            offences.append(f"{module.name} has no {mirror.relative_to(tests.parent)}")
        elif not any(node.name.startswith("test_") for node in _functions(ast.parse(mirror.read_text("utf-8")))):
            offences.append(f"{mirror.relative_to(tests.parent)} tests nothing")
    return offences


IMPORT_EACH = """
import importlib, json, sys
heavy = set(json.loads(sys.argv[1]))
for name in sys.argv[2:]:
    importlib.import_module(name)
    if found := sorted(heavy & set(sys.modules)):
        print(f"{name} imports {', '.join(found)}")
        break
"""


def heavy_imports(names: list[str], root: Path, heavy: tuple[str, ...] = HEAVY) -> list[str]:
    """The first of the modules that brings one of the heavy libraries with it, found by importing them one by one."""
    command = [sys.executable, "-c", IMPORT_EACH, json.dumps(heavy), *names]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    if ran.returncode:
        return [f"importing failed: {ran.stderr[-2000:]}"]
    return ran.stdout.splitlines()


def tree_bytes(root: Path) -> tuple[int, int]:
    """(files, bytes) of what git tracks, or would with `git add .`. Raises CalledProcessError outside a checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode()
    paths = [root / name for name in set(listed.split("\0")) - {""}]
    sizes = [path.lstat().st_size for path in paths if path.exists() or path.is_symlink()]
    return len(sizes), sum(sizes)
