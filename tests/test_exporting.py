"""Exporting a checkpoint: what must not be replaced, and a README whose snippet says what it draws."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_tune.config.load import load_settings
from sana_tune.errors import UserError
from sana_tune.exporting import Wanted, check_output, found
from tests.config.helpers import write_files
from tests.train.test_folders import fake


def test_nothing_but_a_pipeline_is_replaced_and_that_only_when_asked(tmp_path: Path):
    out = tmp_path / "out"
    check_output(Wanted("latest", out))
    out.mkdir()
    check_output(Wanted("latest", out))
    (out / "model_index.json").touch()
    check_output(Wanted("latest", out, overwrite=True))
    with pytest.raises(UserError, match="there is a pipeline already"):
        check_output(Wanted("latest", out))
    (out / "model_index.json").rename(out / "notes.txt")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="something else than a pipeline"):
            check_output(Wanted("latest", out, overwrite=overwrite))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="something else"):
        check_output(Wanted("latest", tmp_path / "file", overwrite=True))


def test_the_checkpoint_is_found_by_name_by_path_or_as_the_latest(tmp_path: Path):
    config = load_settings(write_files(tmp_path), {}, {})
    for step in (5, 9):
        fake(tmp_path / "output", step)
    for wanted, step in (("latest", 9), ("checkpoint-5", 5), (str(tmp_path / "output/checkpoint-5"), 5)):
        assert found(config, Wanted(wanted, tmp_path / "out")).step == step
    with pytest.raises(UserError, match="no averaged weights"):
        found(config, Wanted("latest", tmp_path / "out", ema=True))
