"""Memory that runs out is known by what allocators really say, and nothing else is taken for it."""

from __future__ import annotations

import pytest
import torch

from sana_tune.errors import Problem, UserError
from sana_tune.train.shortage import in_use, is_shortage, told

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.2 GiB is free."
)


def test_the_cpu_allocator_is_understood():
    with pytest.raises(UserError) as caught, told(lambda error: Problem("memory", error)):
        torch.empty(2**60, dtype=torch.uint8)
    assert caught.value.problems[0].what == f"tried to allocate {2**60} bytes"
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError(CUDA), "tried to allocate 2.00 GiB"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"), "CUDA error: out of memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "CUDA error: CUBL",
        ),
        (MemoryError(), "MemoryError"),
    ],
)
def test_each_is_told_in_a_sentence(error: Exception, said: str):
    with pytest.raises(UserError) as caught, told(lambda error: Problem("memory", error)):
        raise error
    assert caught.value.problems[0].what.startswith(said) and "\n" not in caught.value.problems[0].what


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError("a")])
def test_others_are_let_through(error: Exception):
    assert not is_shortage(error)
    with pytest.raises(type(error)), told(lambda error: Problem("memory", error)):
        raise error


def test_a_cpu_counts_nothing():
    assert in_use(torch.device("cpu")) is None
