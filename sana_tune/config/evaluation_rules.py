"""Rules of the held-out loss and the scores: which datasets are measured, and settings that do nothing."""

from __future__ import annotations

from collections.abc import Sequence

from sana_tune.config.datasets import EvalDataset, ImageDataset
from sana_tune.config.schema import Config, EvaluationConfig
from sana_tune.config.values import nearest
from sana_tune.errors import Problem


def holds_out(dataset: ImageDataset) -> bool:
    """Whether pictures of a dataset are held out: all of them, or some (eval_split)."""
    if isinstance(dataset, EvalDataset):
        return True
    return dataset.eval_split > 0 and not dataset.is_regularisation_data


def asked_ids(config: Config) -> tuple[str, ...]:
    """The datasets that eval_dataset_id names; () = all are measured."""
    return tuple((config.evaluation.eval_dataset_id or "").split(",")) if config.evaluation.eval_dataset_id else ()


def known_eval_datasets(config: Config, datasets: Sequence[ImageDataset]) -> list[Problem]:
    """eval_dataset_id names datasets of which pictures are held out."""
    there = [dataset.id for dataset in datasets if holds_out(dataset)]
    problems = []
    for name in asked_ids(config):
        if name in there:
            continue
        guess = nearest(name, there)
        listed = f"these do: {', '.join(there)}" if there else "none does"
        what = f"must name datasets that hold pictures out; {name} holds none out, {listed}"
        fix = (
            f"did you mean {guess}?"
            if guess
            else "give the dataset dataset_type eval or an eval_split, or drop the key"
        )
        problems.append(Problem("eval_dataset_id", what, fix))
    return problems


def unused_evaluation_settings(config: Config, datasets: Sequence[ImageDataset]) -> list[str]:
    """Notes on settings that have nothing to measure."""
    wanted, notes = config.evaluation, []
    given = [
        key
        for key in _OF_HELD_OUT
        if key in wanted.model_fields_set
        and vars(wanted)[key] not in (None, 0, False, EvaluationConfig.model_fields[key].default)
    ]
    if given and (wanted.eval_loss_disable or not any(map(holds_out, datasets))):
        why = "eval_loss_disable is on" if wanted.eval_loss_disable else "no pictures are held out"
        verb = "has" if len(given) == 1 else "have"
        fix = "" if wanted.eval_loss_disable else "; a dataset with dataset_type eval or an eval_split holds some out"
        notes.append(f"{', '.join(given)} {verb} no effect: {why}{fix}")
    general = config.data.eval_split
    for dataset in datasets:
        if dataset.is_regularisation_data and not isinstance(dataset, EvalDataset) and dataset.eval_split != general:
            notes.append(f"dataset {dataset.id}: eval_split has no effect on regularisation data")
    if wanted.evaluation_type == "clip" and config.validation.validation_disable:
        notes.append("evaluation_type clip has no effect: validation_disable is on, so there are no pictures to score")
    return notes


_OF_HELD_OUT = (
    "eval_steps_interval", "eval_epoch_interval", "num_eval_images", "eval_timesteps", "eval_dataset_pooling",
)  # fmt: skip
