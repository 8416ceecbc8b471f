"""caplog hears the package's log, whatever a run before a test did to its logger."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from sana_tune.log import log


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    propagate, level = log.propagate, log.level
    log.propagate = True
    log.setLevel(logging.NOTSET)
    yield
    log.propagate = propagate
    log.setLevel(level)
