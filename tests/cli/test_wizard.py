"""`configure` as people use it: by Enter, with corrections, leaving at any question, by flags, in a real terminal."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pexpect
import pytest
from rich.cells import cell_len

from sana_tune.cli.main import exit_code
from sana_tune.cli.questions import QUESTIONS, Machine
from sana_tune.cli.wizard import Wishes, _uninterrupted, configure
from sana_tune.config.load import Loaded, load
from sana_tune.errors import UserError
from tests.cli.script import CPU, RTX, SANA, Script
from tests.data.pictures import put

CONFIG, DATASETS = Path("config/config.json"), Path("config/multidatabackend.json")
ROOT = Path(__file__).resolve().parents[2]
QUESTIONS_ASKED = 10  # and one more before writing


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a folder of four captioned pictures."""
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        put(
            tmp_path / "pictures",
            f"IMG_{number}.png",
            80,
            60,
            seed=number,
            caption=f"a pattern of colours, the {number}",
        )


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*.json")}


def loaded(path: Path = CONFIG) -> Loaded:
    return load(path, {}, {})


def run(*answers: str | BaseException, machine: Machine = CPU, code: int = 0, **wishes: Any) -> Script:
    """Run the wizard; AssertionError with what was said when it ends otherwise."""
    script = Script(*answers)
    assert configure(Wishes(**{"given": {}, **wishes}), script, machine) == code, script.text
    return script


def unattended(machine: Machine = CPU, code: int = 0, **given: str) -> Script:
    wishes = {key: given.pop(key) for key in ("config", "overwrite") if key in given}
    return run(machine=machine, code=code, given=given, yes=True, **wishes)


# ---- in words ----


def test_enter_alone(capsys):
    said = run().text
    assert loaded().config.model.pretrained_model_name_or_path == "nano"
    (dataset,) = loaded().datasets
    assert (dataset.instance_data_dir, dataset.caption_strategy, dataset.resolution) == ("pictures", "textfile", 64)
    assert set(files()) == {str(CONFIG), str(DATASETS), "config/user_prompt_library.json"}
    assert next(iter(json.loads(CONFIG.read_bytes()))) == "$schema"
    assert said.count("/10 ") == QUESTIONS_ASKED and said.endswith("Next: sana_tune train")
    assert "4 pictures: all 80x60 px" in said and "Recommended for a CPU" in said
    assert "nothing is wrong" in capsys.readouterr().out  # the check's own words


def test_a_gpu_is_detected_and_the_model_fits_it():
    said = run(machine=RTX).text
    config = loaded().config
    assert "RTX 4090, 25.8 GB" in said and "of which about" in said
    assert config.model.pretrained_model_name_or_path == SANA and config.model.weights_dtype == "bf16"


def test_lokr_writes_its_file_beside_the_others():
    said = run(*[""] * 4, "lokr").text
    assert set(files()) >= {str(CONFIG), str(DATASETS), "config/lycoris_config.json"} and len(files()) == 4
    assert "the frozen model in fp32, the LoKr in fp32" in said
    example = json.loads((ROOT / "config" / "lycoris_config.json.example").read_bytes())
    assert json.loads(Path("config/lycoris_config.json").read_bytes()) == example
    written, config = json.loads(CONFIG.read_bytes()), loaded().config
    assert written["lycoris_config"] == "config/lycoris_config.json" and "weights_dtype" not in written
    assert (written["model_type"], written["lora_type"], written["learning_rate"]) == ("lora", "lycoris", 4e-3)
    assert (config.optimizer.optimizer, config.model.base_model_precision) == ("optimi-adamw", "no_change")


def test_an_adapter_stays_an_adapter_and_its_file_as_it_is():
    unattended(model="nano", pictures="pictures", adapter="lokr")
    own = {**json.loads(CONFIG.read_bytes()), "init_lokr_norm": 1e-3, "learning_rate": 3e-4}
    CONFIG.write_text(json.dumps(own))
    lycoris = Path("config/lycoris_config.json")
    lycoris.write_text(json.dumps({"algo": "lokr", "linear_dim": 4, "linear_alpha": 1}))
    before = lycoris.read_bytes()
    said = unattended(length="7", overwrite=True).text
    assert json.loads(CONFIG.read_bytes()) == {**own, "max_train_steps": 7} and lycoris.read_bytes() == before
    assert "config/lycoris_config.json: is there already and is used as it is" in said


def test_from_full_to_lokr_and_back():
    """What could not be trained goes, and the learning rate follows."""
    unattended(model="nano", pictures="pictures")
    written = json.loads(CONFIG.read_bytes())
    CONFIG.write_text(json.dumps({**written, "weights_dtype": "bf16", "dynamo_backend": "inductor", "seed": 7}))
    unattended(adapter="lokr", overwrite=True)
    changed, config = json.loads(CONFIG.read_bytes()), loaded().config
    assert (changed["model_type"], changed["learning_rate"], changed["seed"]) == ("lora", 4e-3, 7)
    assert not {"weights_dtype", "dynamo_backend"} & changed.keys() and config.adapter.lora_type == "lycoris"
    assert Path(changed["lycoris_config"]).is_file()
    CONFIG.write_text(json.dumps({**changed, "init_lokr_norm": 1e-3, "base_model_precision": "nf4-bnb"}))
    unattended(adapter="full", overwrite=True)
    back = json.loads(CONFIG.read_bytes())
    assert back["model_type"] == "full" and back["learning_rate"] == written["learning_rate"]
    assert not {"lora_type", "lycoris_config", "init_lokr_norm", "base_model_precision"} & back.keys()


def test_corrections_help_and_the_way_back():
    answers = ["b", "?", "nano", "nowhere", "?", "'pictures/'", "3", "b", "parquet", "3", "a photo of Rex, a brown dog",
               "", "lokr", "b", "lora", "full", "big", "64,32", "b", "", "20 epochs", "", "wandbb,x", "wandb", "",
               "y"]  # fmt: skip
    said = run(*answers).text
    for part in (
        "This is the first question.", "Larger models draw better", "does not exist", "Nothing in the folder is ever",
        "must be one of textfile", "LoKr on 60 layers (48 in Attention, 12 in GLUMBConv)", "must be one of full, lokr",
        "whole number of px", "there is no tracker 'wandbb'; did you mean wandb?",
    ):  # fmt: skip
        assert part in said, part
    first, second = loaded().datasets
    assert (first.resolution, second.resolution) == (64, 32) and first.instance_prompt == "a photo of Rex, a brown dog"
    assert loaded().config.train.num_train_epochs == 20 and loaded().config.watch.report_to == "wandb"


def test_what_was_typed_is_the_default_on_the_way_back_and_later_answers_are_forgotten():
    script = run("nano", "pictures", "2", "", "", "32", "7", "b", "b", "", "b", "64")
    asked = [prompt.strip() for prompt in script.prompts]
    assert asked.count("[32] >") == 2  # it was typed, and stays through Enter
    assert asked[asked.index("[32] >") + 1] == "[7] >"
    assert loaded().config.train.max_train_steps == 600  # another resolution: the length is asked anew
    assert loaded().datasets[0].resolution == 64


def test_answers_that_are_no_text_and_no_answer_are_asked_again():
    Path("pictures").rename("幼い 犬")
    said = run("", ValueError("the answer has control characters in it"), "", "'幼い 犬/'", "").text
    assert "control characters" in said and "There is no default" in said
    assert loaded().datasets[0].instance_data_dir == "幼い 犬" and loaded().config.train.output_dir == "output/幼い-犬"


@pytest.mark.parametrize("leaving", [KeyboardInterrupt(), EOFError()], ids=["Ctrl-C", "Ctrl-D"])
@pytest.mark.parametrize("after", range(QUESTIONS_ASKED + 1))
def test_leaving_at_any_question_writes_nothing(after, leaving):
    script = run(*[""] * after, leaving, code=130)
    assert script.said[-1] == "nothing was written" and len(script.prompts) == after + 1
    assert not files() and not Path("config").exists()


def test_leaving_while_it_is_checked_says_that_the_files_are_there():
    class Leaves(Script):
        def say(self, text: str = "", **how: Any) -> None:
            super().say(text)
            if text == "Checking them:":
                raise KeyboardInterrupt

    script = Leaves()
    assert configure(Wishes({}), script, CPU) == 130
    assert "the check was interrupted" in script.said[-1] and str(CONFIG) in script.said[-1] and len(files()) == 3


def test_ctrl_c_waits_while_the_files_are_written():
    with _uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()


def test_a_no_writes_nothing():
    assert run(*[""] * QUESTIONS_ASKED, "n").said[-1] == "nothing was written" and not files()


def test_another_place():
    said = run(*[""] * QUESTIONS_ASKED, "mine/dog.json", "y").text
    assert set(files()) == {"mine/dog.json", "mine/dog-multidatabackend.json", "mine/dog-user_prompt_library.json"}
    assert loaded(Path("mine/dog.json")).datasets and said.endswith("Next: sana_tune train --config mine/dog.json")


def test_files_that_nobody_read_are_left_alone_by_enter():
    DATASETS.parent.mkdir()
    DATASETS.write_text('[{"id": "precious"}]')
    said = run().text
    assert DATASETS.read_text() == '[{"id": "precious"}]' and "would be lost" in said
    assert said.endswith("Next: sana_tune train --config config/pictures/config.json")
    assert loaded(Path("config/pictures/config.json")).datasets


def test_flags_answer_their_questions():
    script = run(given={"model": "nano", "resolutions": "32"})
    assert len(script.prompts) == QUESTIONS_ASKED - 2 + 1 and loaded().datasets[0].resolution == 32


def test_files_with_mistakes_are_written_and_the_mistakes_told(capsys):
    (Path("pictures") / "IMG_0.txt").write_bytes(b"\xff\xfe")
    said = run(given={"captions": "textfile"}, code=1).text
    assert "Mend what is wrong, then: sana_tune check" in said and CONFIG.is_file()
    assert "not UTF-8" in capsys.readouterr().out


# ---- a config that is there ----

THEIRS = {
    "--model_type": "full", "pretrained_model_name_or_path": "nano", "data_backend_config": "sets.json",
    "output_dir": "out", "max_train_steps": 30, "learning_rate": 2e-5, "train_batch_size": 3,
    "validation_prompt": "a dog",
    "gradient_checkpointing": False, "mixed_precision": "no", "use_ema": True, "report_to": "tensorboard",
}  # fmt: skip
SETS = [
    {"id": "known", "instance_data_dir": "pictures", "is_regularisation_data": True, "caption_strategy": "textfile"},
    {"id": "dog", "instance_data_dir": "pictures", "resolution": 64, "caption_strategy": "textfile", "repeats": 9},
]  # fmt: skip


def theirs(config: Mapping[str, Any] | None = None, name: str = "config.json") -> None:
    Path("sets.json").write_text(json.dumps(SETS), encoding="utf-8")
    Path(name).write_text(json.dumps({**THEIRS, **(config or {})}), encoding="utf-8")


def test_enter_alone_changes_nothing():
    theirs()
    before = files()
    said = run().text
    assert files() == before and said.count("nothing to change") == 2
    assert "its values are the answers in [ ]" in said and "Your file has otherwise: train_batch_size 3." in said
    assert "[out]" in said and "[tensorboard]" in said and "[30]" in said and said.endswith("Next: sana_tune train")


def test_what_is_not_asked_is_kept():
    theirs()
    run("", "", "2", "", "", "", "50", "")
    config, sets = json.loads(Path("config.json").read_text()), json.loads(Path("sets.json").read_text())
    assert config == {**THEIRS, "max_train_steps": 50}
    assert [entry["caption_strategy"] for entry in sets] == ["filename", "filename"] and sets[1]["repeats"] == 9
    assert set(files()) == {"config.json", "sets.json"}


def test_the_recommended_settings_are_taken_on_request():
    theirs()
    run(*[""] * QUESTIONS_ASKED, "maybe", "y", "")
    config = json.loads(Path("config.json").read_text())
    assert config == {**THEIRS, "train_batch_size": 4}


def test_toml_is_read_and_json_written_beside():
    lines = [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in THEIRS.items()]
    Path("config.toml").write_text("\n".join(lines), encoding="utf-8")
    Path("sets.json").write_text(json.dumps(SETS), encoding="utf-8")
    before = Path("config.toml").read_bytes()
    said = run(*[""] * 6, "40").text
    assert "The result is written as JSON: config.json" in said and Path("config.toml").read_bytes() == before
    assert loaded(Path("config.json")).config.train.max_train_steps == 40


def test_a_config_that_cannot_be_read_is_not_touched():
    Path("config.json").write_text("{ no json")
    with pytest.raises(UserError, match="must be JSON"):
        configure(Wishes({}), Script(), CPU)
    assert Path("config.json").read_text() == "{ no json"


# ---- without a terminal ----


def test_all_that_is_missing_is_told_at_once(capsys):
    assert exit_code(["configure", "--yes"]) == 1
    said = capsys.readouterr().err
    assert (
        said.startswith("2 things are wrong") and "--model: must be given" in said and "--images: must be given" in said
    )
    assert exit_code(["configure", "--yes", "--images", "nowhere", "--model", "./none", "--steps", "soon"]) == 1
    assert "--images: the folder does not exist" in (said := capsys.readouterr().err) and "--model: " in said
    assert not files()


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--adapter", "lora"], "--adapter: must be one of full, lokr"),
        (["--model", SANA, "--vram", "6", "--adapter", "full"], "--adapter: full-rank training"),
        (["--resolution", "big"], "--resolution: a resolution is a whole number"),
        (["--steps", "-3"], "--steps: a length is"),
        (["--vram", "lots"], "--vram: the memory of a GPU is"),
        (["--captions", "parquet"], "--captions: must be one of"),
        (["--tracking", "mlflow"], "--tracking: must be one of"),
        (["--model", SANA, "--vram", "1"], "--vram: a LoKr on"),
        (["--model", SANA, "--vram", "cpu"], "--vram: a CPU would take months"),
    ],
)
def test_a_wrong_flag_is_told_by_its_name(flags, told, capsys):
    assert exit_code(["configure", "--yes", "--images", "pictures", "--model", "nano", *flags]) == 1
    assert told in capsys.readouterr().err and not files()


def test_without_a_terminal_the_flags_are_named(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    assert exit_code(["configure", "--model", "nano"]) == 1
    said = capsys.readouterr().err
    assert "no terminal" in said and "sana_tune configure --yes --images …" in said and not files()


def test_every_question_has_a_flag():
    flags = {
        "--images": "pictures", "--model": SANA, "--captions": "instanceprompt", "--subject": "a photo of Rex",
        "--vram": "24", "--adapter": "full", "--resolution": "1024,512", "--steps": "700", "--tracking": "none",
        "--prompt": "a photo of Rex on a beach at sunset", "--output": "out/rex", "--config": "mine/config.json",
    }  # fmt: skip
    assert {question.flag for question in QUESTIONS} <= set(flags)
    assert exit_code(["configure", "--yes", *(word for pair in flags.items() for word in pair)]) == 0
    found = loaded(Path("mine/config.json"))
    assert [dataset.resolution for dataset in found.datasets] == [1024, 512]
    assert {dataset.instance_prompt for dataset in found.datasets} == {"a photo of Rex"}
    config = found.config
    assert (config.train.max_train_steps, config.train.output_dir) == (700, "out/rex")
    assert config.validation.validation_prompt == "a photo of Rex on a beach at sunset"
    assert config.model.pretrained_model_name_or_path == SANA and config.model.weights_dtype == "bf16"


def test_files_that_are_there_need_a_word():
    unattended(model="nano", pictures="pictures")
    before = files()
    unattended()  # nothing to change: nothing to say
    with pytest.raises(UserError, match="--overwrite") as told:
        unattended(length="7", resolutions="32")
    assert {problem.where for problem in told.value.problems} == {str(CONFIG), str(DATASETS)} and files() == before
    unattended(length="7", overwrite=True)
    assert loaded().config.train.max_train_steps == 7


def test_another_model_takes_its_own_settings():
    unattended(model="nano", pictures="pictures")
    unattended(machine=RTX, model=SANA, resolutions="1024", overwrite=True)
    config = loaded().config.model
    assert (config.pretrained_model_name_or_path, config.weights_dtype, config.mixed_precision) == (
        SANA,
        "bf16",
        "bf16",
    )


def test_settings_that_nobody_asked_about_stay():
    theirs()
    unattended(resolutions="32", overwrite=True)
    assert json.loads(Path("config.json").read_text()) == THEIRS  # the resolution stands in the other file
    unattended(target="24", overwrite=True)  # to be planned for another device: that is about them
    assert json.loads(Path("config.json").read_text())["train_batch_size"] == 4


def test_a_named_environment():
    assert exit_code(["configure", "--yes", "--env", "dog", "--model", "nano", "--images", "pictures"]) == 0
    assert loaded(Path("config/dog/config.json")).datasets


def test_the_page_about_a_first_run_shows_these_questions():
    page = (ROOT / "docs" / "first-run.md").read_text(encoding="utf-8")
    shown = [question for question in QUESTIONS if f"{question.title}\n  {question.why}\n" in page]
    assert len(shown) == len(QUESTIONS) == 11
    command = page.rpartition("$ sana_tune ")[2].partition("\n")[0].replace("mug-photos", "pictures")
    assert exit_code(shlex.split(command)) == 0 and loaded().datasets[0].instance_prompt is None  # they have captions


# ---- in a real terminal ----


class Session:
    """`sana_tune configure` in a terminal of 80 columns."""

    def __init__(self, *flags: str):
        path = os.pathsep.join((str(ROOT), os.environ["PYTHONPATH"]))
        variables = {**os.environ, "PYTHONPATH": path, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        variables.pop("COLUMNS", None)
        command = ["-m", "sana_tune", "configure", *flags]
        self.child = pexpect.spawn(
            sys.executable, command, env=variables, dimensions=(50, 80), encoding="utf-8", timeout=30, echo=True
        )  # fmt: skip
        self.child.delaybeforesend = None
        self.text = ""

    def prompt(self) -> None:
        self.child.expect(r"(?<=[\] ]) ?> (\x1b\[\?2004h)?$")
        self.text += self.child.before + self.child.after

    def answer(self, text: str = "") -> None:
        self.prompt()
        self.child.sendline(text)

    def end(self) -> int | None:
        self.child.expect(pexpect.EOF)
        self.text += self.child.before
        self.child.close()
        return self.child.exitstatus

    @property
    def lines(self) -> list[str]:
        """What stood on the screen, without colours."""
        return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in self.text.replace("\r", "").split("\n")]


def test_a_terminal_answered_by_enter():
    Path("pictures").rename("写真")
    session = Session()
    session.answer("nano")
    session.prompt()
    session.child.send("写\t")  # completed by Tab, where readline is there
    session.child.sendline("" if sys.platform == "linux" else "真")
    for _ in range(QUESTIONS_ASKED - 1):
        session.answer()
    assert session.end() == 0, session.text
    asked = session.lines[: session.lines.index("Checking them:")]
    assert len(asked) > 50 and [line for line in asked if cell_len(line) > 80] == []
    assert "Traceback" not in session.text
    assert "Next: sana_tune train" in session.lines
    assert loaded().datasets[0].instance_data_dir == "写真"


@pytest.mark.parametrize("leave", ["intr", "eof"])
def test_a_terminal_that_is_left(leave):
    session = Session("--model", "nano")
    session.answer()
    session.prompt()
    session.child.sendintr() if leave == "intr" else session.child.sendeof()
    assert session.end() == 130
    assert [line for line in session.lines if line][-1] == "nothing was written" and not files()
