"""A script of the user's in the place of the run's own drawing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sana_tune.progress import Progress
from sana_tune.train.external import ScriptValidator
from sana_tune.train.step import Parts
from tests.train.toys import make_parts

CODE = "import sys; open(sys.argv[1] + '/step_' + sys.argv[2] + '_mine.png', 'w').write(sys.argv[3])"


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts()


def script(folder: Path, code: str = CODE, **more) -> ScriptValidator:
    def values(progress: Progress) -> dict[str, str]:
        return {"validation_images": str(folder), "global_step": str(progress.step), "what": "two words; $(x)"}

    command = f'{sys.executable} -c "{code}" {{validation_images}} {{global_step}} {{what}}'
    return ScriptValidator(command, values, folder, **more)


def test_its_pictures_are_told(tmp_path: Path, parts: Parts):
    (tmp_path / "old.png").touch()
    drawing = script(tmp_path)
    done = drawing.run(parts, Progress(3))
    assert done.files == (str(tmp_path / "step_3_mine.png"),) and done.failed == ()
    assert (tmp_path / "step_3_mine.png").read_text() == "two words; $(x)", "a value is one word, and no shell reads it"
    assert drawing.finish(parts, Progress(3)).files == () and len(drawing.finish(parts, Progress(4)).files) == 1
    assert drawing.lost() == ()


def test_a_failure_is_told_and_counted(tmp_path: Path, parts: Parts):
    drawing = script(tmp_path, "import sys; sys.exit(3)")
    assert drawing.run(parts, Progress(3)).failed == (
        "validation_external_script of step 3: it ended with exit code 3",
    )
    drawing.run(parts, Progress(4))
    assert "2 validation pictures could not be drawn" in drawing.lost()[0].message
    missing = ScriptValidator("no-such-program", lambda progress: {}, tmp_path)
    assert "No such file" in missing.run(parts, Progress(1)).failed[0]


def test_in_the_background_the_run_goes_on_and_is_told_later(tmp_path: Path, parts: Parts):
    code = "import os, sys, time; [time.sleep(0.01) for _ in iter(lambda: os.path.exists(sys.argv[1] + '/go'), True)]"
    code += "; sys.exit(2)"
    drawing = script(tmp_path, code, background=True)
    assert drawing.run(parts, Progress(1)).failed == (), "it still runs"
    (tmp_path / "go").touch()
    (notice,) = drawing.lost()
    assert "exit code 2" in notice.message


def test_start_and_other_processes(tmp_path: Path, parts: Parts):
    assert script(tmp_path, base=False).start(parts, Progress()).files == ()
    assert len(script(tmp_path, base=False, startup=True).start(parts, Progress(2)).files) == 1
    assert script(tmp_path, first=False).run(parts, Progress(5)).files == ()
    assert not (tmp_path / "step_5_mine.png").exists()


def test_all_processes_wait_for_it_unless_it_is_in_the_background(tmp_path: Path, parts: Parts):
    waited: list[str] = []
    for first in (True, False):
        script(tmp_path, first=first, together=waited.append).run(parts, Progress(3))
    assert waited == ["validation_external_script"] * 2
    assert [path.name for path in tmp_path.glob("*.png")] == ["step_3_mine.png"], "one of them ran it"
    drawing = script(tmp_path, background=True, together=waited.append)
    drawing.run(parts, Progress(4))
    drawing.lost()
    assert len(waited) == 2
