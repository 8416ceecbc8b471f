"""The gates of the design hold for the code, and each of them fails on a small bad sample."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import gates

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sana_tune"
SOURCE = gates.modules(PACKAGE)
SCRIPTS = gates.modules(ROOT / "scripts")

# The side left of the plan (contracts §10): plain Python, so that the command line answers at once.
TORCH_FREE_PARTS = (
    *("errors", "log", "progress", "hardware", "config", "store"),
    *("memory", "fitting", "saving", "plan", "prompts", "output", "roles", "prepare", "check", "cli"),
)
TORCH_FREE_MODULES = (
    *(
        f"sana_tune.data.{name}"
        for name in ("batch", "buckets", "captions", "geometry", "masks", "order", "position", "timeline")
    ),
    *(f"sana_tune.data.{name}" for name in ("records", "shards", "sources", "survey", "duplicates", "quality")),
    *(f"sana_tune.model.{name}" for name in ("facts", "fetch", "identity", "tokens")),
    "sana_tune.watch.events",
)
# A sink must not stop a run.
BROAD_EXCEPTS = frozenset({"sana_tune.watch.sinks", "sana_tune.watch.background"})


def write(folder: Path, files: dict[str, str]) -> Path:
    """A small package `sana_tune` under folder, of {"data/order": source}; every folder in it is a package."""
    package = folder / "sana_tune"
    for name, text in files.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in (package, path.parent):
            (parent / "__init__.py").touch()
        path.write_text(text, encoding="utf-8")
    return package


def sample(folder: Path, files: dict[str, str]) -> tuple[gates.Module, ...]:
    return gates.modules(write(folder, files))


def test_the_gates_see_the_code():
    assert len(SOURCE) >= 50 and len(SCRIPTS) >= 3
    assert {module.part for module in SOURCE} >= {part for group in gates.LAYERS for part in group}
    graph = gates.import_graph(SOURCE)
    assert sum(len(targets) for targets in graph.values()) >= 100
    assert sum(len(list(gates._functions(module.tree))) for module in SOURCE) >= 300


# --- layers -----------------------------------------------------------------------------------------------------------


def test_imports_go_one_way():
    assert gates.layer_offences(SOURCE) == []


GOOD = {
    "errors": "",
    "log": "from sana_tune.errors import x",
    "config/load": "",
    "data/order": "",
    "data/survey": "from . import order",
    "model/flow": "",
    "watch/events": "from sana_tune import errors",
    "plan": "from sana_tune.config.load import load",
    "train/loop": "from ..data import order",
    "run": "from . import plan, train",
}


@pytest.mark.parametrize(
    "importer, line",
    [
        ("config/load", "from sana_tune.data import order"),
        ("config/load", "from ..data.order import anything"),
        ("data/survey", "def f():\n    from sana_tune.model import flow"),
        ("model/flow", "import sana_tune.watch.events"),
        ("watch/events", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sana_tune.data.order import x"),
        ("plan", "from sana_tune import train"),
        ("train/loop", "import importlib\nimportlib.import_module('sana_tune.run')"),
        ("errors", "from .config import load"),
        ("__init__", "from .config import load"),
    ],
)
def test_an_import_up_or_across_is_seen(tmp_path, importer, line):
    assert gates.layer_offences(sample(tmp_path / "good", GOOD)) == []
    offences = gates.layer_offences(sample(tmp_path / "bad", {**GOOD, importer: line}))
    name = f"sana_tune/{importer}".replace("/__init__", "").replace("/", ".")
    assert len(offences) == 1 and offences[0].startswith(f"{name} imports sana_tune.")


def test_a_part_without_a_layer_is_seen(tmp_path):
    assert gates.layer_offences(sample(tmp_path, {"utils": ""})) == ["part utils stands in no layer"]


# --- circles ----------------------------------------------------------------------------------------------------------


def test_no_import_circle():
    assert gates.circles(SOURCE) == []
    assert gates.circles(SCRIPTS) == []


@pytest.mark.parametrize(
    "files",
    [
        {"data/a": "from sana_tune.data.b import x", "data/b": "def f():\n    from sana_tune.data import a"},
        {"data/a": "from . import b", "data/b": "from .c import x", "data/c": "import sana_tune.data.a"},
        {"config/__init__": "from sana_tune.data import a", "data/a": "import sana_tune.config.b", "config/b": ""},
    ],
)
def test_a_circle_is_seen(tmp_path, files):
    (circle,) = gates.circles(sample(tmp_path, files))
    assert "sana_tune.data.a" in circle and circle.count("→") >= 2


def test_a_package_that_gathers_its_modules_is_no_circle(tmp_path):
    files = {"data/a": "", "data/b": "from sana_tune.data.a import x", "data/__init__": "from .b import x"}
    assert gates.circles(sample(tmp_path, files)) == []


# --- functions, defaults, excepts -------------------------------------------------------------------------------------


def test_no_function_is_long():
    assert gates.long_functions(SOURCE) == []
    assert gates.long_functions(SCRIPTS) == []


def test_a_long_function_is_seen(tmp_path):
    just = "@cached\ndef f():\n" + "    x = 1\n" * 59
    assert gates.long_functions(sample(tmp_path / "just", {"data/a": just})) == []
    long = "class A:\n    async def f(self):\n" + "        x = 1\n" * 60
    assert gates.long_functions(sample(tmp_path / "long", {"data/a": long})) == ["sana_tune.data.a.f: 61 lines"]


def test_defaults_stand_in_the_schema_alone():
    assert gates.scattered_defaults(SOURCE) == []


@pytest.mark.parametrize(
    "code",
    [
        "getattr(config, 'seed', 0)",
        "getattr(self.config.flow, 'shift', None)",
        "getattr(args, name, None)",
        "getattr(train_settings, 'x', 1)",
        "builtins.getattr(cfg(), 'x', 1)",
        "def f(flow: FlowConfig | None): return getattr(flow, 'shift', 3.0)",
    ],
)
def test_a_default_elsewhere_is_seen(tmp_path, code):
    assert len(gates.scattered_defaults(sample(tmp_path, {"data/a": code}))) == 1


def test_other_getattrs_are_nobodys_business(tmp_path):
    code = "getattr(config, 'seed')\ngetattr(module, 'weight', None)\ngetattr(sys.stdout, 'encoding', None)"
    assert gates.scattered_defaults(sample(tmp_path, {"data/a": code})) == []


def test_no_broad_except_outside_the_sinks():
    assert gates.broad_excepts(SOURCE, BROAD_EXCEPTS) == []
    assert frozenset(module.name for module in SOURCE) >= BROAD_EXCEPTS


@pytest.mark.parametrize("kind", ["", " Exception", " BaseException as error", " (ValueError, Exception)"])
def test_a_broad_except_is_seen(tmp_path, kind):
    def source(name: str, kind: str, answer: str) -> tuple[gates.Module, ...]:
        return sample(tmp_path / name, {"data/a": f"try:\n    f()\nexcept{kind}:\n    {answer}\n"})

    bad = source("bad", kind, "pass")
    assert gates.broad_excepts(bad, frozenset()) == ["sana_tune.data.a:3"]
    assert gates.broad_excepts(bad, frozenset({"sana_tune.data.a"})) == []
    assert gates.broad_excepts(source("raised", kind, "raise"), frozenset()) == []
    assert gates.broad_excepts(source("narrow", " ValueError", "pass"), frozenset()) == []


# --- mirrored tests ---------------------------------------------------------------------------------------------------


def test_every_module_has_its_mirrored_test():
    assert gates.without_test(PACKAGE, ROOT / "tests") == []


def test_a_module_without_test_is_seen(tmp_path):
    package = write(tmp_path, {"data/order": "", "errors": "", "plan": ""})
    (package / "data" / "__init__.py").write_text('"""Only words."""', encoding="utf-8")
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_errors.py").write_text("def test_it(): ...", encoding="utf-8")
    (tests / "test_plan.py").write_text("def helper(): ...", encoding="utf-8")
    offences = gates.without_test(package, tests)
    assert sorted(offences) == [
        "sana_tune.data.order has no tests/data/test_order.py",
        "tests/test_plan.py tests nothing",
    ]


# --- torch stays where it belongs -------------------------------------------------------------------------------------


def torch_free() -> list[str]:
    of_parts = [module.name for module in SOURCE if module.part in TORCH_FREE_PARTS]
    return sorted({"sana_tune", *of_parts, *TORCH_FREE_MODULES})


def test_the_side_left_of_the_plan_imports_no_torch():
    names = torch_free()
    assert len(names) >= 25 and set(names) <= {module.name for module in SOURCE}
    assert gates.heavy_imports(names, ROOT) == []


def test_torch_on_the_wrong_side_is_seen(tmp_path):
    write(tmp_path, {"config/a": "x = 1", "config/b": "import torch", "config/c": "import torch"})
    (tmp_path / "torch.py").write_text("", encoding="utf-8")  # a stand-in that is found first
    names = ["sana_tune.config.a", "sana_tune.config.b", "sana_tune.config.c"]
    assert gates.heavy_imports(names[:1], tmp_path) == []
    assert gates.heavy_imports(names, tmp_path) == ["sana_tune.config.b imports torch"]
    (offence,) = gates.heavy_imports(["sana_tune.config.absent"], tmp_path)
    assert "importing failed" in offence and "sana_tune.config.absent" in offence


def test_help_answers_at_once():
    """`sana_tune --help` within half a second: the best of a few tries, since the machine may be busy with others."""
    best_s = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        ran = subprocess.run([sys.executable, "-m", "sana_tune", "--help"], cwd=ROOT, capture_output=True, text=True)
        best_s = min(best_s, time.perf_counter() - begin)
        assert ran.returncode == 0 and "train" in ran.stdout
        if best_s < 0.5:
            return
    pytest.fail(f"sana_tune --help took {best_s:.2f} s at best")


# --- the size of the tree ---------------------------------------------------------------------------------------------


def test_the_tree_is_small():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files, size = gates.tree_bytes(ROOT)
    assert files >= 100
    assert size <= gates.LARGEST_TREE_BYTES, f"{size / 2**20:.1f} MiB"


def test_a_large_tree_is_seen(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("cache/\n", encoding="utf-8")
    (tmp_path / "cache").mkdir()
    for name, size in (("weights.bin", 11 * 2**20), ("cache/latents.bin", 2**30)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)  # takes no room on the disk
    files, size = gates.tree_bytes(tmp_path)
    assert files == 2 and gates.LARGEST_TREE_BYTES < size < 2**30
