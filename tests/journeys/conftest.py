"""Whole runs in small: one thread is fastest, stays so beside other tests, and gives sums one order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.journeys.kit import one_thread


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
