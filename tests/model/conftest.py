"""The models of these tests are tiny: one thread is fastest, and stays so when other tests run beside them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.journeys.kit import one_thread


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
