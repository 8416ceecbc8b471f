from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.evaluation_rules import asked_ids
from sana_tune.config.load import Loaded
from sana_tune.errors import UserError
from tests.journeys.kit import small_run

HELD = {"id": "held", "dataset_type": "eval", "instance_data_dir": "pictures"}
CATS = {"id": "cats", "instance_data_dir": "pictures"}


def asked(folder: Path, *entries: dict[str, Any], **settings: Any) -> Loaded:
    return small_run(folder, *(entries or (CATS,)), **settings)


def problems(folder: Path, *entries: dict[str, Any], **settings: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        asked(folder, *entries, **settings)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("value", ["held,cats", ["held", "cats"], " held , cats "])
def test_ids_are_a_list_or_comma_separated(tmp_path: Path, value: Any):
    loaded = asked(tmp_path, HELD, {**CATS, "eval_split": 2}, eval_dataset_id=value)
    assert asked_ids(loaded.config) == ("held", "cats")


def test_ids_must_hold_something_out(tmp_path: Path):
    (told,) = problems(tmp_path, HELD, CATS, eval_dataset_id="hled")
    assert "eval_dataset_id" in told and "did you mean held?" in told
    (told,) = problems(tmp_path, CATS, eval_dataset_id="cats")
    assert "holds none out, none does" in told and "eval_split" in told


def test_a_split_is_whole_or_a_share(tmp_path: Path):
    (told,) = problems(tmp_path, eval_split=2.5)
    assert "must be a share below 1, such as 0.1, or a whole number of pictures; found 2.5" in told
    loaded = asked(tmp_path, CATS, {**CATS, "id": "dogs", "eval_split": 3}, eval_split=0.25)
    assert [dataset.eval_split for dataset in loaded.datasets] == [0.25, 3]


def test_settings_with_nothing_to_measure_are_told(tmp_path: Path):
    loaded = asked(tmp_path / "none", eval_steps_interval=10, num_eval_images=4)
    assert any(
        note.startswith("eval_steps_interval, num_eval_images have no effect: no pictures are held out")
        for note in loaded.notes
    )
    loaded = asked(tmp_path / "off", HELD, CATS, eval_timesteps=4, eval_loss_disable=True)
    assert "eval_timesteps has no effect: eval_loss_disable is on" in loaded.notes
    loaded = asked(tmp_path / "on", HELD, CATS, eval_steps_interval=10, evaluation_type="none")
    assert not any("no effect" in note for note in loaded.notes)


def test_a_split_of_what_is_not_split_is_told(tmp_path: Path):
    prior = {**CATS, "id": "prior", "is_regularisation_data": True, "eval_split": 2}
    loaded = asked(tmp_path, CATS, prior, {**HELD, "eval_split": 2})
    assert "dataset prior: eval_split has no effect on regularisation data" in loaded.notes
    assert "dataset held: eval_split has no effect: it is never trained on" in loaded.notes


def test_scores_need_pictures(tmp_path: Path):
    loaded = asked(tmp_path, evaluation_type="clip")  # small runs draw nothing
    assert any(note.startswith("evaluation_type clip has no effect: validation_disable") for note in loaded.notes)
