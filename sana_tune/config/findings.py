"""What reading the files finds on its way: problems to be told all at once, and notes to be said at start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sana_tune.config import legacy
from sana_tune.config.secrets import masked
from sana_tune.config.values import nearest
from sana_tune.errors import Problem

# Keys of files that are about the file, not about the run.
OF_THE_FILE = ("$schema", "$comment", "__origins__", "__active_tab__")


@dataclass
class Findings:
    """Problems and notes on their way to the user."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def wrong(self, where: str, what: str, fix: str = "") -> None:
        """One more problem."""
        self.problems.append(Problem(where, what, fix))

    def own_key(self, key: str, value: Any, where: str, ours: Sequence[str], others: Sequence[str]) -> str | None:
        """Our name of `key`, or None when it is foreign; what is to be said of it is found.

        ours: the settings of this file. others: those of the other file (config.json or multidatabackend.json).
        """
        if key in ours:
            return key
        new = legacy.RENAMED.get(key)
        if new in ours:
            return new
        off = legacy.is_off(key, value)
        if key in legacy.REFUSED:
            if not off:
                self.wrong(where, "cannot be used", legacy.REFUSED[key])
        elif key in legacy.NO_EFFECT:
            if not off:
                self.notes.append(f"{key} has no effect here: {legacy.NO_EFFECT[key]}")
        elif key in legacy.LATER_TRAINING:
            if not off:
                what = f"changes what is trained and is not built yet; found {short(value, key)}"
                self.wrong(where, what, "remove the key, or keep to what `sana_tune train` does without it")
        elif key in legacy.LATER_OUTPUT:
            if not off:
                self.notes.append(f"{key} is not built yet: no effect in this version")
        elif (new or key) in others:
            dataset = "id" in ours
            what = "is a setting of config.json, not of a dataset" if dataset else "is a setting of a dataset"
            self.wrong(where, what, "move it there" if dataset else "move it to the dataset in multidatabackend.json")
        else:
            guess = nearest(key, [*ours, *legacy.known_foreign_keys()])
            fix = f"did you mean {guess}?" if guess else "`sana_tune options` lists the settings there are"
            self.wrong(where, "there is no such setting", fix)
        return None


def is_of_the_file(key: str) -> bool:
    """Whether a key is about the file itself: a schema, a comment, marks of an editor."""
    return key in OF_THE_FILE or key.endswith("disabled_fields__")


def short(value: Any, key: str = "") -> str:
    """A value for a message: short, and without secrets."""
    text = repr(masked(key, value))
    return text if len(text) <= 60 else text[:57] + "…"
