"""The prompts of a run's validation pictures, by nickname, each with how it is drawn. Torch-free."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sana_tune.config.built_in_prompts import BUILT_IN
from sana_tune.config.prompt_library import PromptEntry, read_library
from sana_tune.config.schema import Config, ValidationConfig

Value = TypeVar("Value")
MAIN = "validation"  # file name of the main prompt's pictures
UNCONDITIONAL = "unconditional"  # of the empty prompt's


@dataclass(frozen=True)
class Prompt:
    """One prompt and how it is drawn. text and negative are final: cleaned as captions are.

    sizes: (width, height) in px; () = the model's own. seed: of the first picture, counted up; None = the run's.
    """

    name: str
    text: str
    negative: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    steps: int = 20
    guidance: float = 4.5
    rescale: float = 0.0
    sampler: str = "dpm++"
    images: int = 1
    seed: int | None = None


def prompts_of(settings: ValidationConfig, clean: Callable[[str], str]) -> dict[str, Prompt]:
    """Nickname → prompt: the user library's in its order, the main prompt, the built-in library's, the empty one.

    clean: what is done to captions (case, blanks), so that prompts are treated exactly as captions were. The empty
    prompt comes beside others alone: it is no wish of its own. Raises UserError for a library that is missing or wrong.
    """
    entries: dict[str, PromptEntry] = {}
    if settings.user_prompt_library:
        entries |= read_library(settings.user_prompt_library, MAIN)
    if settings.validation_prompt:
        entries[MAIN] = PromptEntry(prompt=settings.validation_prompt)
    if settings.validation_prompt_library:
        entries |= {name: PromptEntry(prompt=text) for name, text in BUILT_IN.items() if name not in entries}
    if entries and not settings.validation_disable_unconditional and UNCONDITIONAL not in entries:
        entries[UNCONDITIONAL] = PromptEntry.model_construct(prompt="")
    return {name: prompt_of(name, entry, settings, clean) for name, entry in entries.items()}


def prompt_of(name: str, entry: PromptEntry, settings: ValidationConfig, clean: Callable[[str], str]) -> Prompt:
    """A prompt as its entry asks, and where that says nothing as config.json does."""
    sizes = _or(entry.resolution, settings.validation_resolution)
    return Prompt(
        name=name,
        text=clean(entry.prompt),
        negative=clean(_or(entry.negative_prompt, settings.validation_negative_prompt)),
        sizes=tuple((size.width, size.height) for size in sizes),
        steps=_or(entry.steps, settings.validation_num_inference_steps),
        guidance=_or(entry.guidance, settings.validation_guidance),
        rescale=_or(entry.guidance_rescale, settings.validation_guidance_rescale),
        sampler=_or(entry.noise_scheduler, settings.validation_noise_scheduler),
        images=_or(entry.images, settings.num_validation_images),
        seed=entry.seed,
    )


def _or(own: Value | None, general: Value) -> Value:
    return general if own is None else own


def drawing_lines(
    config: Config, prompts: Mapping[str, Prompt], model_sizes: Sequence[tuple[int, int]]
) -> tuple[str, ...]:
    """What is drawn and when, in words. model_sizes: those of prompts that name none."""
    if not prompts:
        return ()
    wanted = config.validation
    if wanted.validation_method == "external-script":
        return (f"drawn by validation_external_script {_when(config)}",)
    drawn = [(prompt, prompt.sizes or tuple(model_sizes)) for prompt in prompts.values()]
    count = sum(prompt.images * len(sizes) for prompt, sizes in drawn)
    names = list(prompts)
    listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    how = (
        f"{_several(len(names), 'prompt')} ({listed}): {_several(count, 'picture')} of "
        f"{_all(f'{width}x{height}' for _, sizes in drawn for width, height in sizes)} by "
        f"{_all(prompt.sampler for prompt, _ in drawn)} in {_all(prompt.steps for prompt, _ in drawn)} steps, guidance "
        f"{_all(f'{prompt.guidance:g}' for prompt, _ in drawn)}"
    )
    lines = [how, f"drawn {_when(config)}"]
    if config.ema.use_ema:
        shown = {"comparison": "the raw weights and the averaged ones", "ema_only": "the averaged weights"}
        lines[1] += f"; with {shown.get(config.ema.ema_validation, 'the raw weights')}"
    if wanted.validation_preview:
        steps = preview_steps(max(prompt.steps for prompt, _ in drawn), wanted.validation_preview_steps)
        lines.append(f"previews after sampler steps {', '.join(map(str, steps))}")
    return tuple(lines)


def preview_steps(steps: int, every: int) -> tuple[int, ...]:
    """The sampler steps (from 1) after which a preview is shown: each `every`-th, and the last."""
    return tuple(dict.fromkeys((*range(every, steps + 1, every), steps)))


_LISTED = 6


def _when(config: Config) -> str:
    """When pictures are drawn."""
    wanted = config.validation
    parts = [] if wanted.disable_benchmark else ["of the base model first"]
    parts += ["whenever the run starts"] * wanted.validation_on_startup
    every = []
    if wanted.validation_step_interval:
        every.append(f"every {_several(wanted.validation_step_interval, 'step')}")
    if wanted.validation_epoch_interval:
        every.append(f"at the end of every {_several(wanted.validation_epoch_interval, 'epoch')}")
    if every:
        since = [f"step {wanted.validate_after_step}"] if wanted.validate_after_step else []
        since += [f"epoch {wanted.validate_after_epoch:g}"] if wanted.validate_after_epoch else []
        parts.append(" and ".join(every) + (f" from {' and '.join(since)} on" if since else ""))
    return ", ".join((*parts, "and at the end")) if parts else "at the end"


def _several(count: float, noun: str) -> str:
    return f"{count:g} {noun}{'s' * (count != 1)}"


def _all(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


# ---- names of files ----

_SLUG_LENGTH = 60


def slug(name: str) -> str:
    """A short name that every file system takes: lower-case ASCII letters, digits and hyphens.

    Where that loses something (accents, other scripts, length) a hash of the name keeps it apart from others.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii").lower()
    short = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if short and short == re.sub(r"[ _]", "-", name) and len(short) <= _SLUG_LENGTH:
        return short
    mark = hashlib.blake2b(name.encode("utf-8"), digest_size=4).hexdigest()
    return f"{short[: _SLUG_LENGTH - 9].strip('-')}-{mark}".lstrip("-")


def slugs(names: Sequence[str]) -> dict[str, str]:
    """A slug for each name, all different."""
    found: dict[str, str] = {}
    for name in names:
        wanted, number = slug(name), 1
        while wanted in found.values():
            number += 1
            wanted = f"{slug(name)}-{number}"
        found[name] = wanted
    return found
