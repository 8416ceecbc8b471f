"""The user's programs: what they get, that nothing in a value is read as a command, and that the run goes on."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from sana_tune.config.schema import WatchConfig
from sana_tune.progress import Progress
from sana_tune.watch.events import Finished, Saved
from sana_tune.watch.scripts import Scripts, script_problems
from sana_tune.watch.uploads import Uploaded

KEEP = "import json, sys; print(json.dumps(sys.argv[2:]), file=open(sys.argv[1], 'a'))"
HOSTILE = (
    "$(touch {folder}/owned)", "`touch {folder}/owned`", "; touch {folder}/owned", "a' b\" c", "--help", "*", "~",
    "{global_step}", "two\nlines", "ünï", "",
)  # fmt: skip


@pytest.fixture
def keeper(tmp_path: Path) -> str:
    """The beginning of a command whose program writes down its arguments, a line each time."""
    program = tmp_path / "keep it.py"
    program.write_text(KEEP)
    return f"{sys.executable} '{program}' '{tmp_path}/kept.jsonl'"


def kept(folder: Path) -> list[list[str]]:
    path = folder / "kept.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def scripts(values: dict[str, str] | None = None, *, uploads: bool = False, finish_s: float = 20.0, **keys: str):
    return Scripts(WatchConfig(**keys), values or {}, uploads=uploads, finish_s=finish_s)  # type: ignore[arg-type]


def saved(step: int = 2, path: str = "output/checkpoint-2") -> Saved:
    return Saved(Progress(step), path, 1.0)


def test_a_script_gets_what_the_placeholders_stand_for(tmp_path: Path, keeper: str):
    command = f"{keeper} {{local_checkpoint_path}} step={{global_step}} {{tracker_run_name}} {{huggingface_path}}"
    sink = scripts({"tracker_run_name": "my run"}, post_checkpoint_script=command)
    sink.emit(saved())
    sink.close()
    assert kept(tmp_path) == [[os.path.abspath("output/checkpoint-2"), "step=2", "my run", ""]]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_value_is_never_read_as_a_command(tmp_path: Path, keeper: str, name: str):
    name = name.replace("{folder}", str(tmp_path))
    folder = str(tmp_path / f"x{name}" / "checkpoint-2")
    sink = scripts(
        {"validation_prompt": name},
        post_checkpoint_script=f'{keeper} {{validation_prompt}} "{{local_checkpoint_path}}"',
    )
    sink.emit(saved(path=folder))
    sink.close()
    assert kept(tmp_path) == [[name, folder]], "one word each, as it is"
    assert not (tmp_path / "owned").exists()


def test_after_an_upload_and_at_the_end_of_a_run_without_any(tmp_path: Path, keeper: str):
    command = f"{keeper} {{remote_checkpoint_path}} {{huggingface_path}} {{local_checkpoint_path}} {{global_step}}"
    sink = scripts(uploads=True, post_upload_script=command)
    sink.emit(Finished(Progress(4), "output/pipeline"))
    sink.uploaded(Uploaded(tmp_path / "checkpoint-2", "me/rex", "https://hub/me/rex/tree/main/checkpoint-2", 2))
    sink.close()
    path = str(tmp_path / "checkpoint-2")
    assert kept(tmp_path) == [["https://hub/me/rex/tree/main/checkpoint-2", "me/rex", path, "2"]]
    sink = scripts(post_upload_script=command)
    sink.emit(saved())
    sink.emit(Finished(Progress(4), "output/pipeline"))
    sink.close()
    assert kept(tmp_path)[1:] == [["", "", os.path.abspath("output/pipeline"), "4"]]


def test_its_output_goes_to_the_log_and_its_failure_is_told(caplog):
    caplog.set_level("DEBUG", "sana_tune")
    code = "import sys; print('copying'); print('no room', file=sys.stderr); sys.exit(3)"
    sink = scripts(post_checkpoint_script=f'{sys.executable} -u -c "{code}"')
    sink.emit(saved())
    sink.close()
    said = [(record.levelname, record.message) for record in caplog.records]
    assert ("DEBUG", "post_checkpoint_script: copying") in said
    assert said[-1] == ("WARNING", "post_checkpoint_script ended with 3; the run goes on: copying | no room")


def test_a_program_that_is_gone_is_told(tmp_path: Path, caplog):
    sink = scripts(post_checkpoint_script=f"{tmp_path}/gone.sh {{global_step}}")
    sink.emit(saved())
    sink.close()
    assert "a script cannot be run; the run goes on" in caplog.records[-1].message


def test_the_run_does_not_wait_for_it_and_at_the_end_a_while_alone(caplog):
    sink = scripts(post_checkpoint_script="sleep 20", finish_s=0.2)
    begin = time.monotonic()
    for _ in range(30):
        sink.emit(saved())
    assert time.monotonic() - begin < 5
    sink.close()
    assert time.monotonic() - begin < 10
    said = [record.message for record in caplog.records]
    assert "a script still runs after 0 s and is left to itself" in said[-1]
    assert sum("too many still wait" in text for text in said) >= 10, "the queue is bounded"


def test_programs_that_are_not_there_are_told_before_the_run(tmp_path: Path):
    program = tmp_path / "hook.sh"
    program.write_text("#!/bin/sh\n")
    asked = WatchConfig(post_checkpoint_script=f"{program} x", post_upload_script="no-such-program-anywhere")  # type: ignore[arg-type]
    first, second = script_problems(asked)
    assert "may not be executed" in first.what and f"chmod +x {program}" in first.fix
    assert second.where == "post_upload_script" and "must exist and does not" in second.what
    program.chmod(0o755)
    assert script_problems(WatchConfig(post_checkpoint_script=f"{program} x")) == script_problems(WatchConfig()) == []
