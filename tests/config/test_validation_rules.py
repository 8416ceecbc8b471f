"""Rules between the settings of validation pictures, as a user meets them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.helpers import load_with, problems_of


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"validation_method": "external-script"}, "external-script needs validation_external_script"),
        ({"validation_external_script": "draw {stp}"}, "there is no placeholder {stp}"),
        ({"validation_external_script": "draw '"}, "its quotes do not match"),
        ({"validation_noise_scheduler": "ddim"}, "models that predict noise, which flows do not have; use dpm++"),
        ({"validation_noise_scheduler": "euler-a"}, "use euler"),
        ({"validation_noise_scheduler": "dpm+++"}, "did you mean 'dpm++'?"),
        ({"validation_input": "x.png"}, "Sana draws from text alone"),
        ({"validation_using_datasets": True}, "Sana draws from text alone"),
        ({"validation_adapter_path": "x"}, "pictures show the weights that are trained"),
        ({"validation_image_format": "gif"}, "png or webp or jpeg"),
        ({"validation_guidance_rescale": 2}, "less than or equal to 1"),
        ({"validation_preview_steps": 0}, "validation_preview_steps"),
    ],
)
def test_what_cannot_be_is_refused(settings, expected, tmp_path: Path):
    assert expected in problems_of(tmp_path, settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"validation_preview_steps": 2}, "validation_preview_steps has no effect: validation_preview is off"),
        ({"validation_image_quality": 50}, "validation_image_quality has no effect: PNG files lose nothing"),
        ({"validation_external_script": "draw"}, "no effect: validation_method is simpletuner-local"),
        ({"validate_after_step": 5, "validation_step_interval": 0}, "validate_after_step has no effect: there is no"),
        ({"validation_preview": True}, "previews go to the report of the run alone"),
        ({"validation_seed_source": "gpu"}, "noise is always drawn on the CPU"),
    ],
)
def test_what_has_no_effect_is_said(settings, expected, tmp_path: Path):
    assert any(expected in note for note in load_with(tmp_path, settings).notes)


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        ({"validation_noise_scheduler": "flow-match-euler"}, "validation_noise_scheduler", "euler"),
        ({"validation_image_format": "jpg", "validation_image_quality": "80"}, "validation_image_format", "jpeg"),
        ({"validation_using_datasets": False, "validation_randomize": "true"}, "validation_randomize", True),
        ({"validation_epoch_interval": "0.5"}, "validation_epoch_interval", 0.5),
    ],
)
def test_what_is_right_is_read(settings, key, value, tmp_path: Path):
    loaded = load_with(tmp_path, settings)
    assert vars(loaded.config.validation)[key] == value
    assert not [
        note for note in loaded.notes if "validation_" in note and "unlike" not in note and "defaults" not in note
    ]
