"""What becomes of a foreign key, and what is said of it."""

from __future__ import annotations

import pytest

from sana_tune.config.findings import Findings, is_of_the_file, short

OURS, OTHERS = ("seed", "learning_rate"), ("repeats", "id")


@pytest.mark.parametrize(
    ("key", "value", "problem", "note"),
    [
        ("delete_unwanted_images", True, "cannot be used", ""),
        ("delete_unwanted_images", "false", "", ""),
        ("hash_filenames", True, "", "has no effect here"),
        ("gradient_precision", "fp32", "changes what is trained", ""),
        ("enable_watermark", True, "", "not built yet"),
        ("repeats", 1, "is a setting of a dataset", ""),
        ("sed", 1, "did you mean seed?", ""),
        ("xyzzy", 1, "sana_tune options", ""),
    ],
)
def test_every_foreign_key_is_told_of(key: str, value: object, problem: str, note: str) -> None:
    found = Findings()
    assert found.own_key(key, value, f"config.json: {key}", OURS, OTHERS) is None
    assert [problem in str(one) for one in found.problems] == ([True] if problem else [])
    assert [note in one for one in found.notes] == ([True] if note else [])


def test_our_keys_pass() -> None:
    found = Findings()
    assert found.own_key("seed", 1, "", OURS, OTHERS) == "seed" and not found.problems


def test_keys_about_the_file() -> None:
    assert is_of_the_file("$schema") and is_of_the_file("model_disabled_fields__") and not is_of_the_file("seed")


def test_a_message_shows_no_secret_and_no_long_value() -> None:
    assert "t0k" not in short("t0k", "hub_token") and len(short("x" * 500)) <= 60
