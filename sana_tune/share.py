"""How the micro-batches of a step are shared among processes when a run goes on with another number of them.

Pure, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sana_tune.config.load import Loaded
from sana_tune.config.rules import release_goes_alone
from sana_tune.errors import Problem, UserError
from sana_tune.memory import changed


def kept_batch(loaded: Loaded, before: Mapping[str, Any]) -> Loaded:
    """The settings with the accumulation that keeps a step what it was, on another number of processes.

    before: plan.json of the run that is gone on with; empty = there is none. Raises UserError when the micro-batches of
    a step cannot be shared evenly.
    """
    config, ranks = loaded.config, loaded.config.launch.processes
    together, accumulation = before.get("micro_batches_per_step"), config.train.gradient_accumulation_steps
    if not together or ranks == before.get("ranks", 1) or accumulation * ranks == together:
        return loaded
    if together % ranks:
        fitting = ", ".join(str(number) for number in range(1, together + 1) if together % number == 0)
        what = f"the run takes {together} micro-batches a step, which {ranks} processes cannot share evenly"
        raise UserError(Problem("num_processes", what, f"go on with {fitting} processes, or begin anew with --restart"))
    derived = together // ranks
    config = changed(config, {"gradient_accumulation_steps": derived})
    if (problem := release_goes_alone(config)) is not None:
        raise UserError(problem)
    note = (
        f"gradient_accumulation_steps is {derived} instead of {accumulation}: a step stays {together} micro-batches, "
        f"on {ranks} process{'es' * (ranks > 1)} now and {before.get('ranks', 1)} before"
    )
    origins = {**loaded.origins, "gradient_accumulation_steps": "derived: the run goes on as it began"}
    return replace(loaded, config=config, origins=origins, notes=(*loaded.notes, note))
