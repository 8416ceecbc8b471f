"""What was uploaded is a value."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from sana_tune.watch.uploads import Uploaded


def test_an_upload_does_not_change():
    upload = Uploaded(Path("o/checkpoint-2"), "me/rex", "https://huggingface.co/me/rex/tree/main/checkpoint-2", 2)
    with pytest.raises(FrozenInstanceError):
        upload.step = 3  # type: ignore[misc]
