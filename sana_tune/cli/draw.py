"""`sana_tune validate` and `sana_tune generate`: from the words of a command line to pictures. Torch comes last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sana_tune.cli.loading import load_asked
from sana_tune.errors import Problem, UserError


def sorted_out(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts that stand for themselves, and the settings (--key value, key=value) among the words."""
    texts, settings = list[str](), list[str]()
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if word.startswith("--"):
            settings.append(word)
            if "=" not in word and waiting and not waiting[0].startswith("--"):
                settings.append(waiting.pop(0))
        elif word.partition("=")[1] and word.partition("=")[0].isidentifier():
            settings.append(word)
        else:
            texts.append(word)
    return texts, settings


def as_settings(flags: Mapping[str, str | None]) -> list[str]:
    """Flags of `generate` as the settings that they stand for."""
    return [f"--{key}={value}" for key, value in flags.items() if value is not None]


def validate_asked(
    words: Sequence[str],
    config: str | None,
    env: str | None,
    example: str | None,
    checkpoint: str,
    prompts: Sequence[str],
) -> int:
    """Draw a checkpoint's validation pictures. Answers the exit code: 1 when one could not be drawn."""
    loaded, notes = load_asked(words, config, env, example)
    from sana_tune.log import log
    from sana_tune.offline import Asked, validate
    from sana_tune.watch.sinks import say

    for note in notes:
        log.warning("%s", note)
    done = validate(loaded, Asked(checkpoint, tuple(prompts)))
    say(done)
    if done.sheet:
        log.info("Contact sheet: %s", done.sheet)
    return int(bool(done.failed))


def generate_asked(
    words: Sequence[str],
    config: str | None,
    env: str | None,
    example: str | None,
    checkpoint: str,
    *,
    ema: bool,
    output: str | None,
    flags: Mapping[str, str | None],
) -> None:
    """Draw the prompts among the words."""
    prompts, settings = sorted_out(words)
    if not prompts:
        raise UserError(
            Problem("generate", "there is no prompt to draw", 'name one: sana_tune generate "a photo of …"')
        )
    loaded, _ = load_asked([*as_settings(flags), *settings], config, env, example)
    from sana_tune.offline import Asked, generate

    views = ("_ema",) if ema else ("",)
    generate(loaded, Asked(checkpoint, tuple(prompts), views), Path(output) if output else None)
