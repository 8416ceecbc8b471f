"""What the wheel carries and asks for, and that constraints.txt pins what the tests run with."""

from __future__ import annotations

import re
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import sana_tune

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# contracts §1: these releases must be let in by the lower bounds.
ADMITTED = {
    "torch": "2.11",
    "diffusers": "0.42",
    "transformers": "5.17",
    "accelerate": "1.15",
    "huggingface-hub": "1.33",
}


@pytest.fixture(scope="module")
def wheel(wheel_path: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheel_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def files_below(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in paths}


def test_the_wheel_holds_the_package_its_assets_and_the_examples(wheel):
    names = set(wheel.namelist())
    sources = {f"sana_tune/{name}" for name in files_below(ROOT / "sana_tune")}
    examples = {f"sana_tune/examples/{name}" for name in files_below(ROOT / "config" / "examples")}
    assert len(sources) >= 50 and len(examples) >= 3
    assert sources | examples <= names
    assert {"sana_tune/examples/nano/config.json", "sana_tune/assets/nano/model/model_index.json"} <= names
    others = {name for name in names - sources - examples if ".dist-info/" not in name}
    assert others == set()
    for name in ("sana_tune/assets/nano/model/model_index.json", "sana_tune/cli/main.py"):
        assert wheel.read(name) == (ROOT / name).read_bytes()


def test_the_wheel_says_what_it_is(metadata, wheel):
    assert metadata["Name"] == "sana_tune" and metadata["Version"] == sana_tune.__version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert {part.strip() for part in metadata["Requires-Python"].split(",")} == {">=3.11", "<3.14"}
    (licence,) = (name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
    assert "Apache License" in wheel.read(licence).decode()
    extras = {"cuda", "cuda13", "lokr", "s3", "datasets", "tensorboard", "test", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_the_core_asks_for_lower_bounds_alone():
    core = {canonicalize_name(found.name): found for found in map(Requirement, PROJECT["dependencies"])}
    assert len(core) >= 10
    for name, requirement in core.items():
        assert [bound.operator for bound in requirement.specifier] == [">="], f"{name}: {requirement}"
    for name, version in ADMITTED.items():
        assert core[name].specifier.contains(version), f"{core[name]} must let {version} in"


def pins() -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines())
    found = dict(line.split("==") for line in lines if line)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) and Version(version) for name, version in found.items())
    return found


def test_the_constraints_pin_all_that_is_asked_for():
    """The core, test and dev requirements, and theirs: nothing that CI installs is left to the day."""
    pinned = pins()
    assert pinned["torch"] == "2.13.0"
    extras = PROJECT["optional-dependencies"]
    pending = [Requirement(text) for text in PROJECT["dependencies"] + extras["test"] + extras["dev"]]
    seen: set[str] = {"sana-tune"}
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        if name.startswith(("nvidia-", "cuda-")) or name == "triton":  # of torch's CUDA build, which pins them itself
            continue
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} and the pin {pinned[name]} contradict"
        try:
            pending += [Requirement(text) for text in distribution(name).requires or []]
        except PackageNotFoundError:
            continue  # of the dev extra, where only the test extra is installed
    assert len(seen) >= 40
