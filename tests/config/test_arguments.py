"""Settings on a command line."""

from __future__ import annotations

import pytest

from sana_tune.config.arguments import parse_overrides, plain
from sana_tune.errors import UserError


def test_all_forms() -> None:
    found = parse_overrides(["--seed", "3", "--learning-rate=1e-4", "use_ema=true", "--gradient_checkpointing"])
    assert found == {"seed": "3", "learning_rate": "1e-4", "use_ema": "true", "gradient_checkpointing": True}
    assert parse_overrides(["--flow_schedule_shift", "-1"]) == {"flow_schedule_shift": "-1"}
    assert parse_overrides(["--validation_prompt=a=b"]) == {"validation_prompt": "a=b"}


def test_every_stray_word_is_told() -> None:
    with pytest.raises(UserError) as told:
        parse_overrides(["stray", "--seed", "3", "words"])
    assert len(told.value.problems) == 2


def test_keys_without_dashes() -> None:
    assert plain(" --learning-rate ") == "learning_rate" and plain("seed") == "seed"
