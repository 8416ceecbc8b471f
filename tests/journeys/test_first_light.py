"""From nothing to a pipeline that diffusers loads: a fresh clone, the built wheel, a model of the hub; no network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import SanaPipeline, SanaTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from sana_tune.config.load import load
from sana_tune.model.fetch import locate
from sana_tune.prompts import MAIN, prompts_of
from scripts.nano import score
from tests.fake_hub import FakeHub
from tests.journeys.kit import differences, metrics_of, pictures, small_run, state_of

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = ROOT / "tests" / "offline"
WEIGHTS = "diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.timeout(1200)  # the whole example, with --full on a busy machine


def flags(settings: Mapping[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


# ---- places to run in ----


@dataclass(frozen=True)
class Place:
    """A working directory and an environment, in which programs run without a network and without a GPU."""

    folder: Path
    environment: Path | None = None  # a virtual environment; None = the one of the tests

    def run(self, *command: object, code: int = 0, **environ: str | None) -> str:
        """What the program prints; AssertionError with it when the exit code is another one."""
        words = [str(word) for word in command]
        variables = {**os.environ, "PYTHONPATH": str(OFFLINE), "CUDA_VISIBLE_DEVICES": ""}
        if self.environment is not None:
            path = os.pathsep.join((str(self.environment / "bin"), os.environ["PATH"]))
            variables |= {"PATH": path, "VIRTUAL_ENV": str(self.environment)}
        for name, value in environ.items():
            variables.pop(name, None)
            if value is not None:
                variables[name] = value
        ran = subprocess.run(
            words, cwd=self.folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert ran.returncode == code, f"{words} ended with {ran.returncode}:\n{ran.stdout}"
        return ran.stdout


def new_environment(folder: Path) -> Path:
    """A virtual environment without anything in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder


def lend_dependencies(environment: Path) -> None:
    """Let an environment see what is installed for the tests, but no checkout: .pth files there do not count here."""
    (site,) = environment.glob("lib/python*/site-packages")
    installed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    assert installed
    (site / "dependencies.pth").write_text("\n".join(installed) + "\n", encoding="utf-8")


def package_of(place: Place) -> Path:
    """The folder of the sana_tune that a place's Python imports, with the network blocked."""
    code = "import socket, sana_tune; assert socket._sana_tune_blocked; print(sana_tune.__file__)"
    return Path(place.run("python", "-c", code).strip()).parent


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, less what Python compiles."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def copy_of_the_tree(folder: Path) -> None:
    """The checkout as git would commit it now."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    git = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


# ---- the fresh clone ----


@dataclass(frozen=True)
class Clone:
    """A clone in which the example was run: before, what train.sh said, and the run's folder."""

    place: Place
    before: Mapping[str, bytes]
    said: str

    @property
    def output(self) -> Path:
        return self.place.folder / "output" / "nano"


# pip as on a machine that has everything: nothing is fetched, and the package is built with the hatchling here.
PIP = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """`./train.sh --example nano` in a fresh clone, with an environment active that has all but sana_tune."""
    home = tmp_path_factory.mktemp("fresh")
    folder, environment = home / "a clone", new_environment(home / "env")
    copy_of_the_tree(folder)
    lend_dependencies(environment)
    place, before = Place(folder, environment), contents(folder)
    said = place.run("./train.sh", "--example", "nano", **PIP)
    return Clone(place, before, said)


def test_the_clone_sets_itself_up_and_runs_its_own_code(clone):
    assert "set-up: installing into" in clone.said and "set-up: done" in clone.said
    assert package_of(clone.place) == clone.place.folder / "sana_tune"


def test_a_second_run_installs_nothing_and_says_that_all_is_done(clone):
    said = clone.place.run("./train.sh", "--example", "nano", **PIP)
    assert "set-up" not in said and "This run is finished" in said and "--restart" in said


def test_nothing_of_the_clone_is_changed(clone):
    """The example's pictures above all; what is new lies in output/."""
    after = contents(clone.place.folder)
    data = [name for name in clone.before if name.startswith("config/examples/nano/")]
    assert len(data) >= 50
    assert {name for name in clone.before if after.get(name) != clone.before[name]} == set()
    assert {name.split("/")[0] for name in after.keys() - clone.before.keys()} == {"output"}


def test_the_run_leaves_every_file_of_the_contract(clone, monkeypatch):
    monkeypatch.chdir(clone.place.folder)
    config = load(clone.output / "config.json", {}, {}).config
    total, every = config.train.max_train_steps, config.train.checkpoint_step_interval
    assert total and every
    names = {path.name for path in clone.output.iterdir()}
    kept = {f"checkpoint-{step}" for step in sorted({*range(every, total, every), total})[-2:]}
    files = {"config.json", "plan.json", "ledger.json", "log.txt", "metrics.jsonl", "pipeline.json", "events.jsonl"}
    files |= {"report.html", "environment.json", "prompts.json", "run_id.json"}
    assert names == {*files, *kept, "validation_images", "first_batches", "pipeline", "cache"}
    models = {f"{part}/{name}" for part in ("transformer", "transformer_ema") for name in ("config.json", WEIGHTS)}
    for name in kept:
        held = set(contents(clone.output / name))
        assert held == {*models, "optimizer.pt", "progress.json", "manifest.json"}

    lines = metrics_of(clone.output)
    assert [line["step"] for line in lines] == list(range(1, total + 1))
    assert (
        lines[0].keys() == {"step", "epoch", "loss", "lr", "grad_norm", "by_sigma"}
        and len(clone.said.splitlines()) > 30
    )

    interval = config.validation.validation_step_interval
    drawn = {0: ("",), **dict.fromkeys((*range(interval, total, interval), total), ("", "_ema"))}
    prompts = prompts_of(config.validation, str.strip)
    wanted = {f"step_{step}_{name}_0_64x64{kind}.png" for step in drawn for name in prompts for kind in drawn[step]}
    wanted |= {f"step_{step}_contact_sheet.png" for step in drawn}
    assert len(prompts) >= 4 and MAIN in prompts
    assert {path.name for path in (clone.output / "validation_images").iterdir()} == wanted


def test_plan_and_ledger_tell_what_was_trained(clone):
    plan, ledger = (json.loads((clone.output / name).read_text("utf-8")) for name in ("plan.json", "ledger.json"))
    lines = metrics_of(clone.output)
    assert plan["total_steps"] == len(lines) and plan["first_step"] == 0
    assert len({(bucket["dataset"], bucket["width_px"], bucket["height_px"]) for bucket in plan["buckets"]}) >= 2
    assert plan["images_seen"] == 16 * len(lines)
    assert [cache["hits"] for cache in plan["caches"]] == [0, 0, 0, 0]
    counts = {"zib-64": 24, "zib-aspects": 24, "known": 36}
    assert [entry["dataset"] for entry in ledger["datasets"]] == list(counts)
    for entry in ledger["datasets"]:
        count = counts[entry["dataset"]]
        assert (entry["found"], entry["trained"], entry["left_out"]) == (count, count, [])
        assert entry["caption_files"] == count


def test_its_config_can_be_run_again(clone, monkeypatch):
    """Loading config.json asks for the same again; what was nobody's wish still is a default."""
    monkeypatch.chdir(clone.place.folder)
    asked = load(Path("config/examples/nano/config.json"), {}, {})
    again = load(clone.output / "config.json", {}, {})
    assert (again.config, again.datasets, again.text_cache) == (asked.config, asked.datasets, asked.text_cache)
    defaults = {key for key, origin in asked.origins.items() if origin == "default"}
    assert len(defaults) >= 20 and {again.origins[key] for key in defaults} == {"default"}


def test_the_pipeline_holds_the_last_checkpoints_weights(clone):
    last = clone.output / f"checkpoint-{len(metrics_of(clone.output))}"
    base = load_file(locate("nano") / "transformer" / WEIGHTS)
    raw, average = (
        load_file(clone.output / "pipeline" / part / WEIGHTS) for part in ("transformer", "transformer_ema")
    )
    assert differences(raw, load_file(last / "transformer" / WEIGHTS)) == []
    assert differences(average, load_file(last / "transformer_ema" / WEIGHTS)) == []
    moved, apart = differences(raw, base), differences(raw, average)
    assert raw.keys() == base.keys() and len(moved) == len(apart) == len(raw) > 100


def test_no_config_names_a_path_of_this_machine(clone):
    """Checkpoints and pipelines are published; diffusers would note where the model was loaded from."""
    folders = [locate("nano"), *clone.output.glob("checkpoint-*"), clone.output / "pipeline"]
    configs = [path for folder in folders for path in folder.rglob("config.json")]
    assert len(configs) >= 10
    assert [path for path in configs if json.loads(path.read_text("utf-8")).get("_name_or_path")] == []


@pytest.fixture
def pipe(clone, monkeypatch) -> Iterator[tuple[SanaPipeline, Image.Image]]:
    """The pipeline as the README in its folder loads it, and the picture that the README draws."""
    monkeypatch.chdir(clone.place.folder)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # the run had none either
    card = (clone.output / "pipeline" / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    made: dict[str, Any] = {}
    exec(code[1].replace('image.save("picture.png")', ""), made)
    yield made["pipe"], made["image"]


def test_the_pipeline_draws_the_runs_own_pictures(clone, pipe):
    """Pixel for pixel: the README's snippet, and the main prompt with the raw weights and with the average."""
    pipeline, by_readme = pipe
    config = load(clone.output / "config.json", {}, {}).config
    settings, step = config.validation, len(metrics_of(clone.output))

    def own(name: str, kind: str = "") -> np.ndarray:
        path = clone.output / "validation_images" / f"step_{step}_{name}_0_64x64{kind}.png"
        with Image.open(path) as picture:
            return np.asarray(picture)

    def drawn() -> np.ndarray:
        import torch

        pipeline.set_progress_bar_config(disable=True)
        picture = pipeline(
            settings.validation_prompt,
            negative_prompt=settings.validation_negative_prompt,
            width=64,
            height=64,
            num_inference_steps=settings.validation_num_inference_steps,
            guidance_scale=settings.validation_guidance,
            generator=torch.Generator("cpu").manual_seed(config.train.seed),
            use_resolution_binning=False,
        ).images[0]
        return np.asarray(picture)

    first = next(iter(prompts_of(settings, str.strip)))
    assert np.array_equal(np.asarray(by_readme), own(first))
    raw = drawn()
    assert raw.shape == (64, 64, 3) and raw.std() > 1
    assert np.array_equal(raw, own(MAIN)) and not np.array_equal(raw, own(MAIN, "_ema"))
    folder = clone.output / "pipeline"
    pipeline.transformer = SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer_ema")
    assert np.array_equal(drawn(), own(MAIN, "_ema"))


def test_nano_and_its_example_reach_their_bars(clone):
    """Drawn by plain diffusers at guidance 4.5 and 20 steps, judged by rules (tests/judge.py)."""
    found = score.compare(locate("nano"), clone.output / "pipeline", seeds=16)
    old, kept = found["base: old prompts"], found["tuned: old prompts"]
    assert old["ground"] >= 0.98 and old["colour"] >= 0.95 and old["figure"] >= 0.90, old
    assert kept["all"] >= old["all"] - 0.10, (old, kept)

    loss, distance = found["held-out loss"], found["low-pass RMSE, mean reference"]
    assert loss["change"] <= -0.30 and loss["p"] < 0.01, loss
    assert distance["change"] < 0 and distance["p"] < 0.01, distance
    assert found["tuned: new figure"]["figure"] >= 0.60, found["tuned: new figure"]
    assert found["base: new figure"]["figure"] <= 0.10, "the base model must not know the figure"


# ---- the wheel ----


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel_path: Path) -> Place:
    """The wheel in an environment of its own, and an empty folder far from any checkout."""
    home = tmp_path_factory.mktemp("installed")
    environment = new_environment(home / "env")
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel_path)], check=True)
    lend_dependencies(environment)
    (home / "elsewhere").mkdir()
    return Place(home / "elsewhere", environment)


def test_the_wheel_trains_its_example_to_the_same_bytes(installed, clone):
    """Two equal runs are equal, though one is a clone's and draws pictures on the way and the other does not."""
    assert installed.environment in package_of(installed).parents
    listed = [line.split()[0] for line in installed.run("sana_tune", "examples", "list").splitlines()]
    assert listed == sorted(path.parent.name for path in (ROOT / "config/examples").glob("*/config.json"))
    first = min((path for path in clone.output.glob("checkpoint-*")), key=lambda path: int(path.name[11:]))
    until = first.name.removeprefix("checkpoint-")
    settings = {"max_train_steps": until, "validation_disable": "true"}
    installed.run("sana-tune", "train", "--example", "nano", *flags(settings))
    output = installed.folder / "output" / "nano"
    assert int(until) >= 6
    assert differences(state_of(output / first.name), state_of(first)) == []
    assert metrics_of(output) == metrics_of(clone.output)[: int(until)]


def test_a_copied_example_is_ones_own(installed):
    """It trains from the copy's own files, here with the caches of the example that was run before."""
    said = installed.run("sana_tune", "examples", "copy", "nano", "--dest", "mine")
    command = re.search(r"run it with: (.*)", said)
    assert command is not None and command[1] == "sana_tune train --config mine/config.json"
    settings = {
        "max_train_steps": 1,
        "validation_disable": "true",
        "output_dir": "out",
        "cache_dir": "output/nano/cache",
    }
    said = installed.run(*command[1].split(), *flags(settings))
    assert "0 to make" in said and "Finished: 1 steps" in said
    plan = json.loads((installed.folder / "out" / "plan.json").read_text("utf-8"))
    assert plan["total_steps"] == 1
    origins = json.loads((installed.folder / "out" / "config.json").read_text("utf-8"))
    assert origins["data_backend_config"] == "mine/multidatabackend.json"
    datasets = json.loads((installed.folder / "mine" / "multidatabackend.json").read_text("utf-8"))
    assert datasets[0]["instance_data_dir"] == "mine/pictures"


# ---- the hub ----


def test_a_model_of_the_hub_is_downloaded_once(tmp_path):
    """The real huggingface_hub client, once through the network of a hub on this machine and once offline."""
    pictures(tmp_path / "pictures", 2)
    small_run(tmp_path, pretrained_model_name_or_path="maker/nano", max_train_steps=1)
    path = os.pathsep.join((str(OFFLINE), str(ROOT)))
    place, here = Place(tmp_path), {"HF_HOME": str(tmp_path / "huggingface"), "PYTHONPATH": path}
    train = (sys.executable, "-m", "sana_tune", "train", "--config", "config.json")
    with FakeHub({"maker/nano": locate("nano")}) as hub:
        said = place.run(*train, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE=None, **here)
        assert "Model: maker/nano" in said and "Finished: 1 steps" in said and "Licence: " in said
        weights = {f"{part}/{WEIGHTS}" for part in ("transformer", "vae")} | {"text_encoder/model.safetensors"}
        assert weights <= hub.downloaded()
        asked = len(hub.requests)
        again = (*train, "--output_dir", "again", "--cache_dir", str(tmp_path / "output" / "cache"))
        said = place.run(*again, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1", **here)
        assert "0 to make" in said and "Finished: 1 steps" in said and len(hub.requests) == asked
    states = [state_of(tmp_path / name / "checkpoint-1") for name in ("output", "again")]
    assert differences(*states) == []
    assert (
        load_file(tmp_path / "again/pipeline/vae" / WEIGHTS).keys()
        == load_file(locate("nano") / "vae" / WEIGHTS).keys()
    )
