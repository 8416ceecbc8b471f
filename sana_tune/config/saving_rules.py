"""Rules between the settings of checkpoints, and what is said of those that do nothing."""

from __future__ import annotations

from collections.abc import Sequence

from sana_tune.config.datasets import EvalDataset, ImageDataset
from sana_tune.config.schema import Config
from sana_tune.errors import Problem


def script_is_named(config: Config) -> Problem | None:
    """disk_low_action script needs one."""
    if config.train.disk_low_action != "script" or config.train.disk_low_script:
        return None
    what = "script needs disk_low_script, the command that makes room; found none"
    return Problem("disk_low_action", what, 'add "disk_low_script": "…", or use wait')


def kept_ones_are_saved(config: Config) -> Problem | None:
    """checkpoints_keep_every holds what is saved, and saves nothing itself."""
    train = config.train
    every, interval = train.checkpoints_keep_every, train.checkpoint_step_interval
    if not every or train.checkpoint_epoch_interval or (interval and every % interval == 0):
        return None
    what = f"must be a multiple of checkpoint_step_interval ({interval}), since others are not saved; found {every}"
    fix = f"use {max(1, round(every / interval)) * interval}" if interval else "set checkpoint_step_interval"
    return Problem("checkpoints_keep_every", what, fix)


def unused_saving_settings(config: Config, datasets: Sequence[ImageDataset]) -> list[str]:
    """Notes on settings of checkpoints that do nothing beside the others."""
    train, notes = config.train, []
    if train.disk_low_script and train.disk_low_action != "script":
        notes.append("disk_low_script has no effect without disk_low_action script")
    if not train.checkpoints_total_limit:
        kept = ("checkpoints_keep_every", "checkpoints_keep_best")
        notes += [f"{key} has no effect: checkpoints_total_limit 0 keeps all" for key in kept if vars(train)[key]]
    elif train.checkpoints_keep_best and not any(isinstance(dataset, EvalDataset) for dataset in datasets):
        notes.append("checkpoints_keep_best has no effect: no dataset is held out (dataset_type eval)")
    rolling, interval = train.checkpointing_rolling_steps, train.checkpoint_step_interval
    if "checkpoints_rolling_total_limit" in train.model_fields_set and not rolling:
        notes.append("checkpoints_rolling_total_limit has no effect without checkpointing_rolling_steps")
    if rolling and interval and rolling % interval == 0:
        saved = f"checkpoint_step_interval {interval} saves there anyway"
        notes.append(f"checkpointing_rolling_steps {rolling} has no effect: {saved}")
    return notes
