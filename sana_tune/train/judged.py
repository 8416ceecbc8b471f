"""How good each checkpoint is: held-out losses by step, in a small file beside the checkpoints. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sana_tune.errors import UserError
from sana_tune.log import log
from sana_tune.saving import Stand
from sana_tune.store import write_atomically
from sana_tune.train.folders import Checkpoint

FILE = "checkpoint_scores.json"


class Judged:
    """Reads and writes the file; one that cannot be read is as good as none."""

    def __init__(self, output_dir: Path):
        self.path = output_dir / FILE
        self._losses: dict[int, float] | None = None

    @property
    def losses(self) -> dict[int, float]:
        """Step → held-out loss."""
        if self._losses is None:
            self._losses = _read(self.path)
        return self._losses

    def add(self, step: int, loss: float) -> None:
        """Note the loss of the weights at a step. A disk that takes no more is told; the loss is known till the end."""
        self._replace({**self.losses, step: loss})

    def forget_after(self, step: int) -> None:
        """The run goes on from this step: what was measured later belongs to a course that was left."""
        kept = {each: loss for each, loss in self.losses.items() if each <= step}
        if kept != self.losses:
            self._replace(kept)

    def _replace(self, losses: dict[int, float]) -> None:
        self._losses = losses
        values = {str(step): loss for step, loss in sorted(losses.items())}
        try:
            write_atomically(self.path, (json.dumps({"held_out": values}, indent=1) + "\n").encode("utf-8"))
        except UserError as error:
            log.warning("%s", error)


def stands_of(complete: Sequence[Checkpoint], losses: Mapping[int, float]) -> list[Stand]:
    """What decides which of the checkpoints stay. losses: held-out loss by step."""
    return [Stand(each.step, each.rolling, losses.get(each.step)) for each in complete]


def _read(path: Path) -> dict[int, float]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["held_out"]
        return {int(step): float(loss) for step, loss in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read, so no checkpoint counts as a good one: %s", path, error)
        return {}
