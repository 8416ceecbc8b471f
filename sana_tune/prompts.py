"""The prompts of a run's validation pictures, by nickname. Torch-free."""

from __future__ import annotations

from collections.abc import Callable

from sana_tune.config.files import resolve
from sana_tune.config.formats import read
from sana_tune.config.schema import ValidationConfig
from sana_tune.errors import Problem, UserError

MAIN = "validation"  # file name of the main prompt's pictures


def prompts_of(settings: ValidationConfig, clean: Callable[[str], str]) -> dict[str, str]:
    """Nickname → final prompt text: the library's in its order, then the main prompt.

    clean: what is done to captions (case, blanks), so that prompts are treated exactly as captions were.
    Raises UserError for a library that is missing or no {nickname: prompt}.
    """
    found: dict[str, str] = {}
    if settings.user_prompt_library:
        found |= {name: clean(text) for name, text in _library(settings.user_prompt_library).items()}
    if settings.validation_prompt:
        found[MAIN] = clean(settings.validation_prompt)
    return found


def _library(path: str) -> dict[str, str]:
    content = read(resolve(path), "prompt library (user_prompt_library)")
    if not isinstance(content, dict):
        raise UserError(Problem(path, 'a prompt library is {"nickname": "prompt", …}', "put { } around the prompts"))
    problems = []
    for name, text in content.items():
        if not isinstance(text, str) or not text.strip():
            problems.append(Problem(f"{path}: {name}", "the prompt must be a text that is not empty", "write one"))
        elif name == MAIN:
            problems.append(Problem(f"{path}: {name}", "this nickname is the main prompt's", "choose another one"))
    if problems:
        raise UserError(*problems)
    return dict(content)
