"""Property tests here try the same cases every time, and have no deadline: a busy machine fails nothing."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")
