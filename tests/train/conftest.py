"""The models of these tests are so small that a second thread costs more than it brings; one gives sums one order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.journeys.kit import one_thread


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
