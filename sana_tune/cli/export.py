"""`sana_tune export`: from the words of a command line to a pipeline folder. Torch comes last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sana_tune.cli.loading import settings_asked
from sana_tune.config.load import load_settings, parse_overrides
from sana_tune.config.schema import Config
from sana_tune.errors import Problem, UserError


def export_asked(
    words: Sequence[str],
    config: str | None,
    env: str | None,
    example: str | None,
    checkpoint: str,
    output: str | None,
    *,
    ema: bool,
    merge: bool,
    overwrite: bool,
) -> None:
    """Export a checkpoint. Raises UserError with what is wrong."""
    if not output:
        raise UserError(Problem("--output", "must name the folder of the pipeline", "add --output DIR"))
    settings = _settings(words, config, env, example, checkpoint)
    from sana_tune.exporting import Wanted, export

    export(settings, Wanted(checkpoint, Path(output), ema, overwrite, merge))


def _settings(
    words: Sequence[str], config: str | None, env: str | None, example: str | None, checkpoint: str
) -> Config:
    """The settings that are named; where none are, those that the checkpoint's run wrote down beside it."""
    own = Path(checkpoint).absolute().parent / "config.json"
    if config is None and env is None and example is None and Path(checkpoint).is_dir() and own.is_file():
        return load_settings(own, parse_overrides(words))
    return settings_asked(words, config, env, example)
