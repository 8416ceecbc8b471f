"""config.env: variables in a shell's notation, parsed and never run by a shell.

Such a file serves two ends. Its variables join the environment (HF_HOME, MIXED_PRECISION …); and where there is no
config.json beside it, the names that SimpleTuner's old shell configs used are read as settings.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_tune.config.formats import read_text
from sana_tune.errors import Problem, UserError

EXTRA_ARGUMENTS = "TRAINER_EXTRA_ARGS"

# Old names that are not simply the setting in capitals.
OLD_NAMES: dict[str, str] = {
    "RESUME_CHECKPOINT": "resume_from_checkpoint",
    "DATALOADER_CONFIG": "data_backend_config",
    "TRAINING_SEED": "seed",
    "MAX_NUM_STEPS": "max_train_steps",
    "NUM_EPOCHS": "num_train_epochs",
    "CHECKPOINTING_STEPS": "checkpoint_step_interval",
    "CHECKPOINTING_LIMIT": "checkpoints_total_limit",
    "MODEL_NAME": "pretrained_model_name_or_path",
    "LR_SCHEDULE": "lr_scheduler",
    "USE_GRADIENT_CHECKPOINTING": "gradient_checkpointing",
    "VALIDATION_STEPS": "validation_step_interval",
    "MINIMUM_RESOLUTION": "minimum_image_size",
    "HUB_MODEL_NAME": "hub_model_id",
    "PUSH_CHECKPOINTS": "push_checkpoints_to_hub",
    "TRAINING_DYNAMO_BACKEND": "dynamo_backend",
}

_ASSIGNMENT = re.compile(r"(?:export[ \t]+)?([A-Za-z_]\w*)(\+?=)")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")


def read_env(path: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of a config.env. environ: what `$NAME` and `+=` can refer to besides the file's own lines.

    Raises UserError with every line that is no KEY=VALUE; `$(…)` and backticks are refused, not run.
    """
    return parse_env(read_text(path, "config.env"), environ, str(path))


def parse_env(text: str, environ: Mapping[str, str], where: str) -> dict[str, str]:
    """`read_env` of a text; `where` names it in messages."""
    found: dict[str, str] = {}
    problems: list[Problem] = []
    text = text.replace("\r\n", "\n")
    position = 0
    while position < len(text):
        end = text.find("\n", position)
        end = len(text) if end < 0 else end
        begin = position + len(text[position:end]) - len(text[position:end].lstrip())
        if begin >= end or text[begin] == "#":
            position = end + 1
            continue
        place = f"{where}, line {text.count(chr(10), 0, begin) + 1}"
        assignment = _ASSIGNMENT.match(text, begin)
        if assignment is None:
            fix = "this file is read, not run by a shell: one KEY=VALUE a line"
            problems.append(Problem(place, f"must be KEY=VALUE; found {text[begin:end][:60]!r}", fix))
            position = end + 1
            continue
        name, sign = assignment.groups()
        try:
            value, position = _value(text, assignment.end(), {**environ, **found})
        except ValueError as error:
            fix = "put values with blanks in quotes; commands are not run: write their result"
            problems.append(Problem(f"{place}: {name}", str(error), fix))
            position = end + 1
            continue
        before = found.get(name, environ.get(name, "")) if sign == "+=" else ""
        found[name] = before + value
    if problems:
        raise UserError(*problems)
    return found


def settings_of(variables: Mapping[str, str], known: frozenset[str]) -> dict[str, tuple[str, Any]]:
    """Settings among the variables: setting → (variable, value). known: every key of config.json.

    TRAINER_EXTRA_ARGS is not among them: it is a command line. Variables that name no setting are none (HF_HOME).
    """
    found: dict[str, tuple[str, Any]] = {}
    for name, value in variables.items():
        key = OLD_NAMES.get(name) or (name.lower() if name.isupper() else name)
        if key in known:
            found[key] = (name, value)
    return found


def extra_arguments(variables: Mapping[str, str], where: str) -> list[str]:
    """The words of TRAINER_EXTRA_ARGS, as a shell would split them."""
    try:
        return shlex.split(variables.get(EXTRA_ARGUMENTS, ""))
    except ValueError as error:
        fix = "close the quotes"
        raise UserError(Problem(f"{where}: {EXTRA_ARGUMENTS}", f"cannot be split: {error}", fix)) from None


def _value(text: str, position: int, variables: Mapping[str, str]) -> tuple[str, int]:
    """The value that begins at `position`, and where the next line begins. Raises ValueError for what is no value."""
    parts: list[str] = []
    while position < len(text):
        character = text[position]
        if character == "'":
            end = _closing(text, position, "'")
            parts.append(text[position + 1 : end])
            position = end + 1
        elif character == '"':
            end = _closing(text, position, '"')
            parts.append(_expanded(text[position + 1 : end], variables, quoted=True))
            position = end + 1
        elif character in " \t\n":
            break
        elif character == "(":
            raise ValueError("lists in brackets are not read")
        else:
            match = re.compile(r"(?:\\.|\\\n|\$\{[^}]*\}|[^\s'\"\\])+", re.DOTALL).match(text, position)
            if match is None:
                raise ValueError("a backslash stands at the end")
            parts.append(_expanded(match[0], variables, quoted=False))
            position = match.end()
    end = text.find("\n", position)
    end = len(text) if end < 0 else end
    rest = text[position:end].strip()
    if rest and not rest.startswith("#"):
        raise ValueError(f"something stands after the value: {rest[:40]!r}")
    return "".join(parts), end + 1


def _closing(text: str, position: int, quote: str) -> int:
    """Where the quote that opens at `position` closes."""
    pattern = r"'[^']*'" if quote == "'" else r'"(?:[^"\\]|\\.)*"'
    match = re.compile(pattern, re.DOTALL).match(text, position)
    if match is None:
        raise ValueError(f"the quote {quote} is not closed")
    return match.end() - 1


def _expanded(text: str, variables: Mapping[str, str], *, quoted: bool) -> str:
    """A part of a value with `$NAME`, `${NAME}`, `${NAME:-default}` replaced and escapes taken away."""
    if re.search(r"(?<!\\)(\$\(|`)", text):
        raise ValueError(f"a command is not run: {text[:40]!r}")

    def variable(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        return variables.get(name) or (match[3] or "")

    pieces = re.split(r"(\\.)", text, flags=re.DOTALL)
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            pieces[index] = _VARIABLE.sub(variable, piece)
        elif piece == "\\\n":  # a line that goes on
            pieces[index] = ""
        elif not quoted or piece[1] in '$`"\\':
            pieces[index] = piece[1]
    return "".join(pieces)
