"""`sana_tune fit` from the command line: what it writes, what it says, what it refuses, and a trial on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sana_tune.cli.fit import Asked, fit_asked, start_of, trial_on
from sana_tune.cli.main import exit_code
from sana_tune.fitting import choose
from sana_tune.hardware import gpus
from sana_tune.memory import changed
from sana_tune.model.facts import KNOWN
from tests.data.pictures import put

MODEL = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
GB = 10**9


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with six pictures, and no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for number in range(6):
        put(
            Path("datasets/pictures"),
            f"p{number}.png",
            256,
            256,
            seed=number,
            caption=f"picture number {number} of six",
        )
    return tmp_path


def config_file(name: str = "config.json", *, entry: dict[str, Any] | None = None, **settings: Any) -> Path:
    dataset = {"id": "a", "instance_data_dir": "datasets/pictures", "caption_strategy": "textfile", **(entry or {})}
    Path("datasets.json").write_text(json.dumps([dataset]))
    settings = {
        "--pretrained_model_name_or_path": "nano", "data_backend_config": "datasets.json", "resolution": 256,
        "train_batch_size": 64, "mixed_precision": "no", "gradient_checkpointing": False, "max_train_steps": 3,
        "validation_disable": True, **settings,
    }  # fmt: skip
    Path(name).write_text(json.dumps(settings))
    return Path(name)


def read(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def test_a_config_is_made_to_fit_beside_it(home, capsys):
    before = config_file().read_bytes()
    assert exit_code(["fit", "--vram", "3"]) == 0
    said, written = capsys.readouterr().out, read("config-3gb.json")
    assert Path("config.json").read_bytes() == before
    assert written.pop("gradient_checkpointing") is True and written.pop("gradient_checkpointing_interval") == 1
    assert {**written, "gradient_checkpointing": False} == json.loads(before), "spelling and all else stay"
    for words in ("2.9 GB to use", "before     after", "gradient_checkpointing false → true: more blocks recomputed",
                  "nothing was tried on a GPU", "sana_tune check accepts it"):  # fmt: skip
        assert words in said
    assert exit_code(["check", "--config", "config-3gb.json"]) == 0


def test_what_fits_is_left_as_it_is_unless_a_file_is_asked_for(home, capsys):
    config_file()
    assert exit_code(["fit", "--vram", "24"]) == 0
    assert "nothing is changed, and nothing was written" in capsys.readouterr().out and not list(home.glob("*gb.json"))
    assert exit_code(["fit", "--vram", "24", "--output", "same.json"]) == 0
    assert read("same.json") == read("config.json")


def test_a_file_is_never_replaced_unasked(home, capsys):
    config_file()
    Path("config-3gb.json").write_text("mine")
    for flags in ([], ["--output", "config.json"]):
        assert exit_code(["fit", "--vram", "3", *flags]) == 1
        assert "the file is there already\n  → replace it with --overwrite" in capsys.readouterr().err
    assert Path("config-3gb.json").read_text() == "mine"
    assert exit_code(["fit", "--vram", "3", "--output", "config.json", "--overwrite"]) == 0
    assert read("config.json")["gradient_checkpointing"] is True


def test_a_place_that_cannot_be_written_is_told(home, capsys):
    config_file()
    Path("folder").mkdir()
    for place in ("folder", "config.json/inside.json"):
        assert exit_code(["fit", "--vram", "3", "--output", place, "--overwrite"]) == 1
        assert "cannot be written" in capsys.readouterr().err


def test_a_model_of_which_nothing_is_known_is_not_tried(home, capsys):
    config_file(**{"--pretrained_model_name_or_path": "somebody/their-sana", "resolution": 256})
    assert exit_code(["fit", "--vram", "80", "--try"]) == 0
    said = capsys.readouterr().out
    assert "Nothing is tried: what somebody/their-sana is made of is not known" in said and "tried: optimi" not in said


def test_batches_of_a_dataset_are_left_alone_and_said(home, capsys):
    config_file(entry={"train_batch_size": 48})
    assert exit_code(["fit", "--vram", "3"]) == 0
    assert "train_batch_size is left alone: a dataset has one of its own" in capsys.readouterr().out
    assert read("config-3gb.json")["train_batch_size"] == 64


def test_other_files_are_read_and_json_is_written(home):
    settings = read(str(config_file("c.json")))
    lines = [f"{key.lstrip('-')} = {json.dumps(value)}" for key, value in settings.items()]
    Path("mine.toml").write_text("\n".join(lines))
    assert exit_code(["fit", "--vram", "3", "--config", "mine.toml"]) == 0
    assert read("mine-3gb.json")["gradient_checkpointing"] is True


@pytest.mark.parametrize("gigabytes", [8, 10, 24])
def test_a_published_model_gets_a_whole_config_that_check_accepts(home, capsys, gigabytes):
    for picture in Path("datasets/pictures").glob("*.png"):
        put(picture.parent, picture.name, 1024, 1024, seed=len(picture.name))
    assert exit_code(["fit", "--vram", str(gigabytes), "--model", MODEL, "--output", "new/config.json"]) == 0
    said = capsys.readouterr().out
    assert "sana_tune check --config new/config.json" in said
    assert exit_code(["check", "--config", "new/config.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    start = start_of(Asked(config="new/config.json", vram=str(gigabytes)), gigabytes * GB)
    again = choose(start.wanted).chosen
    assert again is not None and not again.changes, "what it wrote fits as it is, pictures counted"
    assert again.footprint.most_bytes < gigabytes * GB


def test_nothing_fits(home, capsys):
    assert exit_code(["fit", "--vram", "10", "--model", "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers"]) == 1
    said = capsys.readouterr().err
    assert "no settings make full-rank training of" in said and "GB are missing" in said
    assert "what fits: " in said and "the smaller model Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers" in said
    assert not Path("config").exists()


MISTAKES = {
    "no card": (["--model", "nano"], "--vram: no GPU is seen here"),
    "no number": (["--vram", "lots", "--model", "nano"], "the memory of a GPU is a number of GB"),
    "a CPU": (["--vram", "cpu", "--model", "nano"], "fit is for the memory of GPUs"),
    "no config": (["--vram", "10"], "no config file was found"),
    "both": (["--vram", "10", "--model", "nano", "--config", "x"], "--model makes a new config"),
    "size": (["--vram", "10", "--model", "nano", "--resolution", "100"], "multiples of 32 px; found 100x100"),
    "size without model": (["--vram", "10", "--resolution", "64"], "--resolution belongs to --model"),
    "no model": (["--vram", "10", "--model", "Sana_9B"], "there is no folder Sana_9B"),
    "unknown model": (["--vram", "10", "--model", "me/sana-9b"], "nothing is known of 'me/sana-9b'"),
    "all at once": (["--vram", "lots", "--resolution", "64"], "2 things are wrong"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told(home, capsys, name):
    words, said = MISTAKES[name]
    assert exit_code(["fit", *words]) == 1
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in home.iterdir()) == ["datasets"]


def test_pictures_that_are_not_there_are_told(home, capsys):
    config_file(entry={"instance_data_dir": "elsewhere"})
    assert exit_code(["fit", "--vram", "3"]) == 1
    assert "elsewhere" in capsys.readouterr().err and not Path("config-3gb.json").exists()


def test_a_trial_does_a_step_on_the_cpu(home):
    """A real step with random weights of nano's sizes; a CPU counts no memory, and that is said."""
    said: list[str] = []
    asked = Asked("10", model="nano", output="n.json", resolution=64, tries=True, device="cpu")
    assert fit_asked(asked, said.append) == 0
    (line,) = [line for line in said if line.startswith("tried: ")]
    assert line.startswith("tried: optimi-adamw:ema, 4 of 64x64 px: it goes, its memory is not counted here")
    assert "nothing was tried" not in "\n".join(said) and Path("n.json").is_file()


def test_a_trial_measures_what_was_chosen(home):
    start = start_of(Asked(model="nano", resolution=64), 10 * GB)
    changes = {"optimizer": "optimi-lion", "optimizer_release_gradients": True, "gradient_checkpointing": True}
    changes |= {"ema_device": "cpu", "gradient_checkpointing_interval": 2}
    first = choose(start.wanted).chosen
    assert first is not None
    said: list[str] = []
    wanted = start.wanted
    one = type(first)(changes, first.given_up, first.cost, first.footprint, first.largest)
    assert trial_on("cpu", wanted, said.append)(one).problem == ""
    assert said[0].startswith("tried: optimi-lion:release:clip:ema_cpu, 4 of 64x64 px")
    assert changed(wanted.config, changes).optimizer.optimizer == "optimi-lion"


def test_no_torch_without_a_trial(home):
    config_file()
    code = (
        "import sys\nfrom sana_tune.cli.main import exit_code\n"
        "assert exit_code(['fit', '--vram', '3']) == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_machine_of_these_tests_shows_no_gpu(home):
    assert gpus() == () and MODEL in KNOWN
