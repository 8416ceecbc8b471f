"""user_prompt_library: a file of {nickname: prompt}, where a prompt is a text or an object with settings of its own."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator

from sana_tune.config.build import build_section
from sana_tune.config.files import resolve
from sana_tune.config.findings import Findings
from sana_tune.config.formats import read
from sana_tune.config.schema import Resolutions, Sampler, Section, setting
from sana_tune.config.values import nearest
from sana_tune.errors import Problem, UserError

WHAT = "prompt library (user_prompt_library)"


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the prompt must be a text that is not empty")
    return text


class PromptEntry(Section):
    """One prompt of a library. What is None is as config.json says for all prompts."""

    prompt: Annotated[str, AfterValidator(_not_blank)] = setting(..., "the text to draw")
    negative_prompt: str | None = setting(None, "its negative prompt")
    seed: int | None = setting(None, "its seed")
    guidance: float | None = setting(None, "its guidance scale", ge=0)
    guidance_rescale: float | None = setting(None, "its guidance rescale", ge=0, le=1)
    steps: int | None = setting(None, "its steps of the sampler", ge=1)
    resolution: Resolutions | None = setting(None, "its sizes, N or WxH px, comma separated")
    images: int | None = setting(None, "its pictures per size", ge=1)
    noise_scheduler: Sampler | None = setting(None, "its sampler")


# Other names of these fields, once a leading validation_ is taken off.
_NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "num_validation_images": "images",
    "num_images": "images",
    "scheduler": "noise_scheduler",
}


def read_library(path: str, taken: str) -> dict[str, PromptEntry]:
    """The prompts of a library by nickname, in the file's order. taken: the nickname of validation_prompt.

    Raises UserError with all that is wrong in it.
    """
    content = read(resolve(path), WHAT)
    if not isinstance(content, dict):
        raise UserError(Problem(path, 'a prompt library is {"nickname": "prompt", …}', "put { } around the prompts"))
    findings, found = Findings(), dict[str, PromptEntry]()
    for name, value in content.items():
        where = f"{path}: {name}"
        if name == taken:
            findings.wrong(where, "this nickname is the main prompt's", "choose another one")
        elif (entry := _entry(value, where, findings)) is not None:
            found[str(name)] = entry
    if findings.problems:
        raise UserError(*findings.problems)
    return found


def _entry(value: Any, where: str, findings: Findings) -> PromptEntry | None:
    """One value of the file as an entry; None with what is wrong told."""
    if isinstance(value, str) and value.strip():
        return PromptEntry(prompt=value)
    if not isinstance(value, dict):
        what = 'the prompt must be a text that is not empty, or {"prompt": "…", "seed": 1, …}'
        findings.wrong(where, what, "write one")
        return None
    values: dict[str, Any] = {}
    for key, given in value.items():
        plain = str(key).removeprefix("validation_")
        name = _NAMES.get(plain, plain)
        if name not in PromptEntry.model_fields:
            guess = nearest(name, PromptEntry.model_fields)
            fix = f"did you mean {guess}?" if guess else f"a prompt has: {', '.join(PromptEntry.model_fields)}"
            findings.wrong(f"{where}: {key}", "a prompt has no such setting", fix)
        elif name in values:
            findings.wrong(f"{where}: {key}", f"means the same as another of its settings: {name}", "keep one of them")
        elif given is not None:
            values[name] = given
    section = build_section(PromptEntry, values, lambda key: f"{where}: {key}", findings)
    return section if isinstance(section, PromptEntry) else None
