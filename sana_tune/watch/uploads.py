"""What was uploaded, as a value: between the hub and the scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Uploaded:
    """A folder that is on the hub now. repository: its id. url: of the folder there. step: of the run."""

    folder: Path
    repository: str
    url: str
    step: int
