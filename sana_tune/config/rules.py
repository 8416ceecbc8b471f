"""Rules between settings. Each is a function of what was asked and answers a Problem or None; notes go to `notes`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sana_tune.config.datasets import ImageDataset
from sana_tune.config.schema import Config
from sana_tune.errors import Problem

Rule = Callable[[Config, ImageDataset], Problem | None]


def needs_instance_prompt(config: Config, dataset: ImageDataset) -> Problem | None:
    """instanceprompt, prepend_ and only_instance_prompt all need an instance_prompt."""
    asks = [
        key
        for key, asked in (
            ("caption_strategy: instanceprompt", dataset.caption_strategy == "instanceprompt"),
            ("prepend_instance_prompt", dataset.prepend_instance_prompt),
            ("only_instance_prompt", dataset.only_instance_prompt),
        )
        if asked
    ]
    if asks and not dataset.instance_prompt:
        return Problem(
            f"dataset {dataset.id}", f"{asks[0]} needs an instance_prompt", 'add "instance_prompt": "a photo of …"'
        )
    return None


def downsample_needs_both(config: Config, dataset: ImageDataset) -> Problem | None:
    """maximum_image_size and target_downsample_size only mean something together."""
    if dataset.crop and bool(dataset.maximum_image_size) != bool(dataset.target_downsample_size):
        found = "maximum_image_size" if dataset.maximum_image_size else "target_downsample_size"
        return Problem(
            f"dataset {dataset.id}",
            f"maximum_image_size and target_downsample_size must be given together; found only {found}",
            "give both or neither",
        )
    return None


DATASET_RULES: tuple[Rule, ...] = (needs_instance_prompt, downsample_needs_both)


def bf16_needs_kahan(config: Config) -> Problem | None:
    """bf16 weights lose small updates unless the optimizer keeps what rounding loses (Kahan)."""
    if config.model.weights_dtype == "bf16" and config.optimizer.optimizer != "optimi-adamw":
        return Problem(
            "weights_dtype",
            f"bf16 weights need an optimizer that keeps what rounding loses; found {config.optimizer.optimizer}, "
            "with which about 85 % of the weights would not move at a learning rate of 1e-5",
            'use "optimizer": "optimi-adamw", or weights_dtype fp32',
        )
    return None


def check_rules(config: Config, datasets: Sequence[ImageDataset], notes: list[str]) -> list[Problem]:
    """All problems between settings; what only needs saying is appended to `notes`."""
    problems = [problem for dataset in datasets for rule in DATASET_RULES if (problem := rule(config, dataset))]
    if (problem := bf16_needs_kahan(config)) is not None:
        problems.append(problem)
    inert = [
        dataset.id
        for dataset in datasets
        if not dataset.crop and (dataset.maximum_image_size or dataset.target_downsample_size)
    ]
    if inert:
        notes.append(
            "maximum_image_size and target_downsample_size do nothing with crop: false "
            f"(datasets {', '.join(inert)}): pictures are resized once to their bucket"
        )
    for dataset in datasets:
        if dataset.is_regularisation_data:
            notes.append(
                f"dataset {dataset.id}: is_regularisation_data is not built yet: no effect in this version, "
                "its pictures are trained like any other's"
            )
    return problems
