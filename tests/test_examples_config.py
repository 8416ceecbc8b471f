"""The example configs: each passes the check with stand-in pictures and fits the card it names; its README says so."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from sana_tune.check import Report, look_over
from sana_tune.cli.examples import copy_example
from sana_tune.cli.fit import Asked, start_of
from sana_tune.cli.main import exit_code
from sana_tune.config.describe import schema_path
from sana_tune.config.files import examples_dir, list_examples
from sana_tune.config.json_schema import json_schema
from sana_tune.config.load import Loaded, load
from sana_tune.fitting import choose, footprint
from sana_tune.prompts import prompts_of
from tests.test_prepare import card

ROOT = Path(__file__).resolve().parent.parent
NANO = ("nano", "nano-masked")
SMALL = ("sana-1.6b-10gb", "sana-1.6b-12gb", "sana-1.6b-16gb", "sana-1.6b-8gb")
OTHER = ("sana-1.5-1.6b-80gb", "sana-1.6b-24gb", "sana-1.6b-dreambooth-512+1024", "sana-4.8b-8gpu",
         "sana-minimum-lokr")  # fmt: skip
REAL = tuple(sorted((*OTHER, *SMALL)))
EXAMPLES = (*NANO, *REAL)
# The card that an example is for, GB.
CARDS = {"sana-1.5-1.6b-80gb": 80, "sana-1.6b-24gb": 24, "sana-1.6b-dreambooth-512+1024": 48, "sana-4.8b-8gpu": 80,
         "sana-minimum-lokr": 10,
         **{name: int(name.removeprefix("sana-1.6b-").removesuffix("gb")) for name in SMALL}}  # fmt: skip
SCHEMAS = {"config": Draft202012Validator(json_schema("config")),
           "multidatabackend": Draft202012Validator(json_schema("multidatabackend"))}  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stand_ins(loaded: Loaded) -> None:
    """Three captioned pictures in every folder that a dataset names and that is not there."""
    for dataset in loaded.datasets:
        folder = Path(dataset.instance_data_dir)
        if folder.exists():
            continue
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (1024, 1024), (80 * number, 90, 200)).save(folder / f"a photo, number {number}.png")
            (folder / f"a photo, number {number}.txt").write_text(f"photo number {number} of a bridge at night")


def looked_over(config: Path) -> tuple[Loaded, Report]:
    loaded = load(config, {}, {})
    stand_ins(loaded)
    return loaded, look_over(loaded)


def problems(report: Report) -> list[str]:
    """What is wrong, but for the room on this machine's disk."""
    return [str(problem) for problem in report.problems if "GB are free" not in problem.what]


def readme(name: str) -> str:
    return (examples_dir() / name / "README.md").read_text(encoding="utf-8")


def row(name: str, label: str) -> str:
    (found,) = re.findall(rf"^\| {label} \| (.+) \|$", readme(name), re.MULTILINE)
    return found


def test_these_are_the_examples():
    assert list_examples() == tuple(sorted(EXAMPLES))
    for name in list_examples():
        files = {path.name for path in (examples_dir() / name).iterdir() if path.is_file()}
        adapter = {"lycoris_config.json"} if name.endswith("-lokr") else set()
        assert files == {"config.json", "multidatabackend.json", "user_prompt_library.json", "README.md"} | adapter


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_passes_the_check(name):
    loaded, report = looked_over(examples_dir() / name / "config.json")
    assert problems(report) == []
    assert report.plan is not None and report.plan.memory is not None
    assert sum(bucket.pictures for bucket in report.plan.buckets) >= 3
    assert loaded.config.train.output_dir == f"output/{name}"
    prompts = prompts_of(loaded.config.validation, str.strip)
    assert len(prompts) >= 4 and "validation" in prompts


@pytest.mark.parametrize("name", REAL)
def test_memory_and_disk_are_those_of_the_readme(name, tmp_path, monkeypatch):
    """Of pictures of 1024x1024 px, to a tenth of a GB; and the card that it is for has the room."""
    card(tmp_path, monkeypatch, CARDS[name] * 1024)
    _, report = looked_over(examples_dir() / name / "config.json")
    assert not any("of memory" in warning or "does not fit" in warning for warning in report.warnings)
    assert report.plan is not None and report.plan.memory is not None and report.model is not None
    need, disk = report.plan.memory.need, report.plan.disk
    assert row(name, "memory").startswith(f"about {need.total_bytes / 1e9:.1f} GB")
    assert f"{need.activations_bytes / 1e9:.1f} GB of activations" in row(name, "memory")
    assert need.total_bytes < 0.9 * CARDS[name] * 2**30  # the GB of cards are GiB
    assert report.plan.memory.caching.total_bytes < 0.9 * CARDS[name] * 1e9
    told = row(name, "disk")
    for amount, what in (
        (disk.checkpoints_bytes, "two checkpoints"),
        (disk.pipeline_bytes, "the finished adapter" if name.endswith("-lokr") else "the exported pipeline"),
        (report.model.fetch_bytes, "the downloaded model"),
    ):
        assert f"{amount / 1e9:.1f} GB for {what}" in told
    assert disk.kept == 2


@pytest.mark.parametrize("name", SMALL)
def test_a_small_cards_memory_by_part_is_the_readmes(name):
    """All parts as the plan has them; it fits the card as it is, with a margin, and nothing cheaper does."""
    looked_over(examples_dir() / name / "config.json")
    start = start_of(Asked(config=str(examples_dir() / name / "config.json")), CARDS[name] * 10**9)
    found = choose(start.wanted).chosen
    assert found is not None and not found.changes
    need, caching = found.footprint.training, found.footprint.caching
    parts = {"weights": need.weights_bytes, "gradients": need.gradients_bytes, "optimizer states": need.optimizer_bytes,
             "activations": need.activations_bytes}  # fmt: skip
    listed = ", ".join(f"{size / 1e9:.1f} GB of {part}" for part, size in parts.items())
    total = f"about {need.total_bytes / 1e9:.1f} GB"
    assert row(name, "memory") == f"{total}: {listed}, {need.overhead_bytes / 1e9:.1f} GB for CUDA itself"
    assert f"{caching.text_bytes / 1e9:.1f} GB with the text encoder" in row(name, "caching")
    assert f"{caching.pictures_bytes / 1e9:.1f} GB with the VAE" in row(name, "caching")
    assert row(name, "drawing").startswith(f"{found.footprint.drawing_bytes / 1e9:.1f} GB")
    assert f"`sana_tune fit --vram {CARDS[name]}`" in readme(name)


@pytest.mark.parametrize("name", (*SMALL, "sana-1.6b-24gb"))
def test_the_table_of_small_cards_is_the_plans(name):
    looked_over(examples_dir() / name / "config.json")
    start = start_of(Asked(config=str(examples_dir() / name / "config.json")), CARDS[name] * 10**9)
    found = footprint(start.wanted, start.wanted.config, start.wanted.loads)
    need = found.training
    sizes = (need.weights_bytes, need.gradients_bytes, need.optimizer_bytes, need.activations_bytes,
             need.overhead_bytes, need.total_bytes, found.drawing_bytes)  # fmt: skip
    table = (ROOT / "docs" / "small-cards.md").read_text(encoding="utf-8")
    assert f"| `{name}` | {' | '.join(f'{size / 1e9:.1f}' for size in sizes)} |" in table.splitlines()


def test_ten_gigabytes_are_enough_for_the_ten_gigabyte_card():
    """The bar: full rank, 1.6B, 1024 px, under 10 GB; with one picture a step, and with the four of the example."""
    for batch, told in ((1, "8.2 GB"), (4, "9.1 GB")):  # as docs/small-cards.md says
        looked_over(examples_dir() / "sana-1.6b-10gb/config.json")
        start = start_of(Asked(config=str(examples_dir() / "sana-1.6b-10gb/config.json")), 10**10)
        loads = tuple(replace(load, batch_size=batch) for load in start.wanted.loads)
        found = footprint(start.wanted, start.wanted.config, loads)
        assert f"{found.training.total_bytes / 1e9:.1f} GB" == told and found.most_bytes < 10**10


def test_the_least_memory_is_the_guides_recipe():
    """What SimpleTuner's quickstart says under "lowest VRAM", on a LoKr of both halves of a block."""
    loaded, report = looked_over(examples_dir() / "sana-minimum-lokr/config.json")
    asked = {"base_model_precision": "nf4-bnb", "optimizer": "bnb-lion8bit-paged", "quantize_via": "cpu",
             "train_batch_size": 1, "model_type": "lora", "lora_type": "lycoris"}  # fmt: skip
    assert asked.items() <= content(loaded.path).items()
    assert report.plan is not None and "200 layers (160 in Attention, 40 in GLUMBConv)" in report.plan.adapter[0]
    assert "; the base in nf4-bnb" in report.plan.adapter[0]


OTHERS = {
    "sana-1.6b-24gb": ({"use_ema": True}, "24.5 GB"),
    "sana-1.6b-dreambooth-512+1024": ({"weights_dtype": "bf16", "use_ema": False}, "18.7 GB"),
    "sana-1.5-1.6b-80gb": (
        {"gradient_checkpointing": True, "gradient_checkpointing_interval": 2, "train_batch_size": 16}, "69.1 GB"
    ),
    "sana-4.8b-8gpu": ({"use_ema": True}, "71.2 GB"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_readme_says_of_other_settings(name):
    changes, told = OTHERS[name]
    loaded = load(examples_dir() / name / "config.json", changes, {})
    stand_ins(loaded)
    plan = look_over(loaded).plan
    assert plan is not None and plan.memory is not None
    assert f"{plan.memory.need.total_bytes / 1e9:.1f} GB" == told and told in readme(name)


def test_fp32_weights_of_the_largest_do_not_fit():
    """4.7 billion parameters at 16 bytes, and the bf16 copies: more than the card has, as its README says."""
    loaded = load(examples_dir() / "sana-4.8b-8gpu/config.json", {"weights_dtype": "fp32", "train_batch_size": 1}, {})
    stand_ins(loaded)
    plan = look_over(loaded).plan
    assert plan is not None and plan.memory is not None
    need = plan.memory.need
    held = need.weights_bytes + need.gradients_bytes + need.optimizer_bytes
    assert (round(held / 1e9, 1), round(need.copies_bytes / 1e9, 1)) == (75.5, 9.4)
    assert need.total_bytes > CARDS["sana-4.8b-8gpu"] * 1e9


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_readme_tells_what_it_must(name):
    text = readme(name)
    assert text.startswith(f"# {name}: ") and f"sana_tune {'train' if name in NANO else 'check'}" in text
    for label in ("memory", "time", "expected"):
        assert len(row(name, label)) >= 10
    if name not in NANO:
        assert "not measured" in row(name, "time") and "Nobody has run this example on a GPU yet" in text


def test_eight_processes_share_a_step():
    assert "Eight processes, one a card, each with 8 pictures a step: 64 in all" in readme("sana-4.8b-8gpu")
    _, report = looked_over(examples_dir() / "sana-4.8b-8gpu/config.json")
    assert report.plan is not None and (report.plan.ranks, report.plan.micro_batches_per_step) == (8, 8)
    assert report.plan.images_per_step == 64


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_copy_passes_the_check_too(name):
    copied = copy_example(name, Path("mine"))
    loaded, report = looked_over(copied / "config.json")
    assert problems(report) == []
    assert loaded.config.train.output_dir == "output/mine"
    assert loaded.config.data.data_backend_config == "mine/multidatabackend.json"


def test_the_command_finds_an_example_right(capsys):
    assert exit_code(["check", "--example", "nano", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


# ---- files of settings ----

FILES = [*sorted(ROOT.glob("config/*.json.example")), *sorted(ROOT.glob("config/examples/*/*.json"))]


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def kind(path: Path) -> str:
    return path.name.partition(".")[0]


def test_how_many_files_there_are():
    kinds = [kind(path) for path in FILES]
    counts = {name: kinds.count(name) for name in set(kinds)}
    assert counts == {"config": 12, "multidatabackend": 12, "user_prompt_library": 12, "lycoris_config": 2}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_is_valid_and_names_its_schema(path):
    found = content(path)
    if kind(path) in SCHEMAS:
        assert [error.message for error in SCHEMAS[kind(path)].iter_errors(found)] == []
        if isinstance(found, dict):
            assert (path.parent / found["$schema"]).resolve() == schema_path(kind(path))
    elif kind(path) == "user_prompt_library":
        assert len(found) >= 3 and all(isinstance(prompt, str) and len(prompt) > 20 for prompt in found.values())


def test_the_files_at_the_root_load_and_pass_the_check():
    for name in ("config.json", "multidatabackend.json", "user_prompt_library.json"):
        Path("config").mkdir(exist_ok=True)
        Path("config", name).write_bytes((ROOT / "config" / f"{name}.example").read_bytes())
    _, report = looked_over(Path("config/config.json"))
    assert problems(report) == []
    assert not any("unlike SimpleTuner" in note for note in report.notes), "it names our schema"


def test_the_adapters_file_adapts_both_halves_of_a_block():
    """With the fields that SimpleTuner's users know."""
    found = content(ROOT / "config" / "lycoris_config.json.example")
    assert found["algo"] == "lokr" and {"multiplier", "linear_dim", "linear_alpha", "factor"} <= set(found)
    preset = found["apply_preset"]
    assert preset["target_module"] == ["Attention", "FeedForward"]
    assert set(preset["module_algo_map"]) == {"Attention", "FeedForward"}
