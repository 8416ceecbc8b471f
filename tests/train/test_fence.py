"""The fence: nothing moves until what is copied is there."""

from __future__ import annotations

import threading
import time

from sana_tune.train.fence import Fence


def test_it_is_open_until_it_is_raised_and_again_after_the_copy():
    fence, copied = Fence(), threading.Event()
    fence.wait()
    fence.raise_until(copied)
    threading.Timer(0.1, copied.set).start()
    begun_s = time.perf_counter()
    fence.wait()
    assert copied.is_set() and time.perf_counter() - begun_s > 0.05
    fence.wait()
