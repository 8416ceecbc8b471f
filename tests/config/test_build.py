"""Types and ranges in the house's words."""

from __future__ import annotations

import pytest

from sana_tune.config.build import build_section
from sana_tune.config.datasets import ImageDataset
from sana_tune.config.findings import Findings
from sana_tune.config.schema import OptimizerConfig, Section, TrainConfig


def said(kind: type[Section], **values: object) -> str:
    found = Findings()
    assert build_section(kind, values, lambda key: f"config.json: {key}", found) is None
    assert len(found.problems) == len(values), "one problem a value"
    return str(found.problems[0])


@pytest.mark.parametrize(
    ("kind", "key", "value", "expected"),
    [
        (TrainConfig, "seed", -1, "must be greater than or equal to 0; found -1"),
        (TrainConfig, "seed", [1], "must be a valid integer; found [1]"),
        (TrainConfig, "seed", 1.5, "found 1.5"),
        (TrainConfig, "seed", True, "must be no switch; found true"),
        (TrainConfig, "device", "gpu", "must be auto or cpu or cuda or mps; found 'gpu'"),
        (OptimizerConfig, "learning_rate", "1e-5 ", ""),
        (OptimizerConfig, "learning_rate", "nan", "finite number"),
        (OptimizerConfig, "lr_scheduler", "cosin", "did you mean 'cosine'?"),
    ],
)
def test_a_wrong_value_is_told_with_what_must_hold(kind: type[Section], key: str, value: object, expected: str) -> None:
    if not expected:
        assert build_section(kind, {key: value}, str, Findings()) is not None, "blanks around a number are nothing"
        return
    text = said(kind, **{key: value})
    assert text.startswith(f"config.json: {key}: ") and expected in text


def test_choices_of_a_setting_that_may_be_unset() -> None:
    found = Findings()
    values = {"id": "a", "instance_data_dir": "x", "crop_style": "centr"}
    assert build_section(ImageDataset, values, str, found) is None
    assert "must be center or corner or random" in str(found.problems[0])
    assert "did you mean 'center'?" in str(found.problems[0])


def test_other_spellings_of_a_value() -> None:
    values = {"id": "a", "instance_data_dir": "x", "crop_style": "centre", "caption_strategy": "instance_prompt"}
    section = build_section(ImageDataset, values, str, Findings())
    assert isinstance(section, ImageDataset)
    assert (section.crop_style, section.caption_strategy) == ("center", "instanceprompt")
