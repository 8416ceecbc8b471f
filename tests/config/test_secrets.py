"""Secrets are masked by the name of their key and by their looks; ordinary values are left alone."""

from __future__ import annotations

import pytest

from sana_tune.config.schema import section_of
from sana_tune.config.secrets import MASK, is_masked, is_secret, masked


@pytest.mark.parametrize(
    "key",
    ["HF_TOKEN", "aws_secret_access_key", "aws_access_key_id", "aws_session_token", "WANDB_API_KEY", "webhook_config",
     "publishing_config", "auth_token", "connection_string", "db_password"],
)  # fmt: skip
def test_keys_that_hold_secrets(key: str) -> None:
    assert is_secret(key) and masked(key, "x") == MASK
    assert masked(key, None) is None and masked(key, "") == "", "nothing is no secret"


def test_of_our_settings_only_webhooks_are_taken_for_one() -> None:
    assert [key for key in section_of() if is_secret(key)] == ["webhook_config"]
    assert not is_secret("tokenizer_max_length") and not is_secret("max_tokens")


def test_tokens_in_ordinary_values() -> None:
    assert masked("note", "use hf_abcdefghijklmnopqrst now") == f"use {MASK} now"
    assert masked("url", "https://me:pass@host/x") == f"https://{MASK}@host/x"
    assert masked("x", {"a": ["hf_abcdefghijklmnopqrst"], "token": "t", "n": 1}) == {"a": [MASK], "token": MASK, "n": 1}
    assert masked("learning_rate", 1e-5) == 1e-5 and masked("prompt", "a hf_ cat") == "a hf_ cat"


def test_a_mask_is_known_again() -> None:
    assert is_masked(masked("token", "t")) and not is_masked("t") and not is_masked(3)
