"""What must never be shown: values of keys that hold secrets, and tokens that stand in ordinary values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "•••"

# Keys whose value is a secret, by what is in their name; `tokenizer_…` and `max_tokens` are none.
_SECRET_NAME = re.compile(
    r"(^|_)(token|secret|password|passwd|credential|credentials|webhook|webhook_config|webhook_url|callback_url)($|_)"
    r"|api_?key|access_?key|secret_?key|connection_string|publishing_config|auth_token",
    re.IGNORECASE,
)
# Tokens that can be told by their looks: Hugging Face, wandb, AWS, GitHub, and a password in an address.
_SECRET_TEXT = re.compile(
    r"hf_[A-Za-z0-9]{16,}|wandb_v1_\w{16,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|https://discord(?:app)?\.com/api/webhooks/\S+"
)


def is_secret(key: str) -> bool:
    """Whether the value of a key (or of an environment variable) must not be shown."""
    return _SECRET_NAME.search(key) is not None


def masked(key: str, value: Any) -> Any:
    """`value` as it may be shown: a mask for a secret key, and text without what looks like a token."""
    if value in (None, "", (), [], {}):
        return value
    if is_secret(key):
        return MASK
    if isinstance(value, str):
        return _SECRET_TEXT.sub(MASK, value)
    if isinstance(value, Mapping):
        return {name: masked(str(name), part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(masked(key, part) for part in value) if type(value) in (list, tuple) else value
    return value


def is_masked(value: Any) -> bool:
    """Whether a value was masked when its file was written."""
    return isinstance(value, str) and MASK in value
