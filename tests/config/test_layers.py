"""File, environment and flags in layers: who wins, whose word it was, and what must not be shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.findings import Findings
from sana_tune.config.layers import Flat, flatten
from sana_tune.config.secrets import MASK
from sana_tune.errors import UserError


def flat(folder: Path, content: Any, flags: dict | None = None, environ: dict | None = None) -> tuple[Flat, Findings]:
    path = folder / "config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    found = Findings()
    return flatten(path, flags or {}, environ or {}, found), found


def test_flags_win_over_the_file_and_the_file_over_the_environment(tmp_path: Path) -> None:
    asked, _ = flat(tmp_path, {"seed": 1, "--max_train_steps": 5}, {"seed": "2"}, {"MIXED_PRECISION": "no"})
    assert asked.raw == {"seed": "2", "max_train_steps": 5, "mixed_precision": "no"}
    assert asked.origins["seed"] == "command line: seed"
    assert asked.origins["max_train_steps"].endswith("config.json: --max_train_steps")
    assert asked.origins["mixed_precision"] == "environment: MIXED_PRECISION"
    asked, _ = flat(tmp_path, {"mixed_precision": "bf16"}, {}, {"MIXED_PRECISION": "no"})
    assert asked.raw["mixed_precision"] == "bf16"


def test_a_flag_may_repeat_what_the_file_spells_otherwise(tmp_path: Path) -> None:
    asked, found = flat(tmp_path, {"validation_steps": 5}, {"validation_step_interval": "6"})
    assert asked.raw["validation_step_interval"] == "6" and found.problems == []


def test_what_a_secret_variable_gave_is_a_secret(tmp_path: Path) -> None:
    asked, _ = flat(
        tmp_path, {"output_dir": "{env:ROOT}/x", "revision": "{env:HF_TOKEN}"}, {}, {"ROOT": "/r", "HF_TOKEN": "t"}
    )
    assert asked.raw["output_dir"] == "/r/x" and asked.origins["output_dir"].endswith("output_dir ({env:ROOT})")
    assert asked.secret == {"revision"}
    asked, _ = flat(tmp_path, {"revision": "{env:HF_TOKEN}"}, {"revision": "main"}, {"HF_TOKEN": "t"})
    assert asked.secret == set(), "the flag's value is none"


def test_a_mask_in_the_place_of_a_value_is_told(tmp_path: Path) -> None:
    _, found = flat(tmp_path, {"revision": MASK})
    assert "the mask that a run put in the place of a secret" in str(found.problems[0])


def test_defaults_of_an_earlier_runs_file_stay_defaults(tmp_path: Path) -> None:
    asked, _ = flat(
        tmp_path, {"seed": 0, "max_grad_norm": 5, "__origins__": {"seed": "default", "max_grad_norm": "default"}}
    )
    assert "seed" not in asked.raw and asked.raw["max_grad_norm"] == 5 and asked.is_ours


@pytest.mark.parametrize(("content", "expected"), [([], "data_backend_config"), ("x", "must be one JSON object")])
def test_what_is_no_object_is_told(content: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        flat(tmp_path, content)


def test_names_of_settings_must_be_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("1: 2\n")
    with pytest.raises(UserError, match="names of settings must be text; found 1"):
        flatten(path, {}, {}, Findings())
