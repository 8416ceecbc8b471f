"""Rules between settings. Each is a function of what was asked and answers a Problem or None; notes go to `notes`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sana_tune.config.choices import LR_END_DEFAULTS, LR_POWER_USED_BY
from sana_tune.config.datasets import ConditioningDataset, EvalDataset, ImageDataset
from sana_tune.config.schema import Config
from sana_tune.config.source_rules import SOURCE_RULES, unused_source_settings
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


def sizes_are_in_their_unit(config: Config, dataset: ImageDataset) -> Problem | None:
    """A size that nobody can mean is in the wrong unit: px where megapixels are due, or the other way round."""
    kind = dataset.resolution_type
    for key, most_megapixels in _SIZES.items():
        value = vars(dataset)[key]
        if not value:
            continue
        if kind == "area" and value > most_megapixels:
            what = f"resolution_type area is in megapixels, and {key} is {value:g}"
            fix = f"use resolution_type pixel_area for px, or give megapixels (1024x1024 px are {1024**2 / 1e6:.3g})"
            return Problem(f"dataset {dataset.id}: {key}", what, fix)
        if kind != "area" and value < _LEAST_PX:
            what = f"resolution_type {kind} is in px, and {key} is {value:g}"
            fix = "use resolution_type area for megapixels, or give px, such as 1024"
            return Problem(f"dataset {dataset.id}: {key}", what, fix)
    return None


# Size → the most megapixels that anybody can mean; above it are edges in px. A maximum may be that of a scanner.
_SIZES = {"resolution": 64, "minimum_image_size": 64, "maximum_image_size": 512, "target_downsample_size": 64}
_LEAST_PX = 8  # the least VAE factor; below it are megapixels


def aspects_need_buckets(config: Config, dataset: ImageDataset) -> Problem | None:
    """crop_aspect closest and random choose among crop_aspect_buckets."""
    if dataset.crop and dataset.crop_aspect in ("closest", "random") and not dataset.crop_aspect_buckets:
        return Problem(
            f"dataset {dataset.id}",
            f"crop_aspect {dataset.crop_aspect} needs crop_aspect_buckets, the aspect ratios to choose from",
            'add "crop_aspect_buckets": [0.75, 1.0, 1.33], or use crop_aspect preserve or square',
        )
    return None


def aspects_in_order(config: Config, dataset: ImageDataset) -> Problem | None:
    """minimum_aspect_ratio must not be above maximum_aspect_ratio: no picture is between them."""
    least, most = dataset.minimum_aspect_ratio, dataset.maximum_aspect_ratio
    if least is not None and most is not None and least > most:
        return Problem(
            f"dataset {dataset.id}",
            f"minimum_aspect_ratio must not be above maximum_aspect_ratio; found {least:g} and {most:g}",
            "aspect ratios are width / height: portraits are below 1, landscapes above; swap the two or drop one",
        )
    return None


def sizes_in_order(config: Config, dataset: ImageDataset) -> Problem | None:
    """minimum ≤ maximum, and with crop: resolution ≤ target_downsample_size ≤ maximum_image_size."""
    least, most, wanted = dataset.minimum_image_size, dataset.maximum_image_size, dataset.target_downsample_size
    where = f"dataset {dataset.id}"
    if least and most and least > most:
        what = f"minimum_image_size must not be above maximum_image_size; found {least:g} and {most:g}"
        fix = "maximum_image_size leaves nothing out: above it, pictures are resized before the crop; raise or drop it"
        return Problem(where, what, fix)
    if not dataset.crop or not wanted:
        return None
    if wanted < dataset.resolution:
        what = f"target_downsample_size must not be below resolution; found {wanted:g} and {dataset.resolution:g}"
        return Problem(where, what, "a crop of the resolution must fit in: raise it, or drop it and maximum_image_size")
    if most and wanted > most:
        what = f"target_downsample_size must not be above maximum_image_size; found {wanted:g} and {most:g}"
        return Problem(where, what, "pictures between the two would be enlarged: lower it, or raise maximum_image_size")
    return None


def schedule_in_order(config: Config, dataset: ImageDataset) -> Problem | None:
    """A dataset must not end before it starts."""
    for unit in ("epoch", "step"):
        start, end = vars(dataset)[f"start_{unit}"], vars(dataset)[f"end_{unit}"]
        if end and end < start:
            what = f"end_{unit} must not be below start_{unit}; found {end} and {start}"
            return Problem(f"dataset {dataset.id}", what, f"both {unit}s are shown themselves: swap or drop one")
    return None


DATASET_RULES: tuple[Rule, ...] = (
    *SOURCE_RULES,
    needs_instance_prompt,
    sizes_are_in_their_unit,
    downsample_needs_both,
    sizes_in_order,
    aspects_need_buckets,
    aspects_in_order,
    schedule_in_order,
)


def end_below_start(config: Config) -> Problem | None:
    """A schedule that falls must end below where it starts."""
    wanted = config.optimizer
    if wanted.lr_scheduler not in LR_END_DEFAULTS:
        return None
    end = LR_END_DEFAULTS[wanted.lr_scheduler] if wanted.lr_end is None else wanted.lr_end
    if end < wanted.learning_rate:
        return None
    found = f"{end:g}" if wanted.lr_end is not None else f"{end:g} (the default of {wanted.lr_scheduler})"
    return Problem(
        "lr_end",
        f"must be below learning_rate {wanted.learning_rate:g}; found {found}",
        "set a lower lr_end, such as 0, or a higher learning_rate",
    )


def unused_schedule_settings(config: Config) -> list[str]:
    """Notes on settings of a learning-rate schedule that is not the chosen one."""
    wanted, notes = config.optimizer, []
    if wanted.lr_end is not None and wanted.lr_scheduler not in LR_END_DEFAULTS:
        notes.append(
            f"lr_end has no effect with lr_scheduler {wanted.lr_scheduler}: {' and '.join(LR_END_DEFAULTS)} use it"
        )
    if "lr_power" in wanted.model_fields_set and wanted.lr_scheduler not in LR_POWER_USED_BY:
        notes.append(f"lr_power has no effect with lr_scheduler {wanted.lr_scheduler}: it is for polynomial")
    return notes


def unused_crop_settings(dataset: ImageDataset) -> list[str]:
    """Notes on crop settings that do nothing beside the others."""
    if not dataset.crop:
        if dataset.crop_aspect != "square" or dataset.crop_aspect_buckets:
            asked = "crop_aspect" if dataset.crop_aspect != "square" else "crop_aspect_buckets"
            return [f"dataset {dataset.id}: {asked} has no effect with crop: false; pictures keep their own aspect"]
    elif dataset.crop_aspect_buckets and dataset.crop_aspect not in ("closest", "random"):
        aspect = dataset.crop_aspect
        return [f"dataset {dataset.id}: crop_aspect_buckets has no effect with crop_aspect {aspect}"]
    return []


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


def someone_starts(datasets: Sequence[ImageDataset]) -> Problem | None:
    """At least one dataset must be there from the first step on."""
    trained = [dataset for dataset in datasets if not isinstance(dataset, EvalDataset)]
    if not trained or any(dataset.start_epoch <= 1 and dataset.start_step <= 1 for dataset in trained):
        return None
    starts = "; ".join(f"{each.id}: start_epoch {each.start_epoch}, start_step {each.start_step}" for each in trained)
    what = f"at least one dataset must be shown from the start (start_epoch 1, start_step 0); found {starts}"
    return Problem("datasets", what, "lower the start of one of them")


TRAINED_ALONE = (
    "repeats", "probability", "start_epoch", "start_step", "end_epoch", "end_step", "is_regularisation_data",
    "conditioning_data", "small_buckets",
)  # fmt: skip


def unused_roles(
    config: Config, datasets: Sequence[ImageDataset], masks: Sequence[ConditioningDataset] = ()
) -> list[str]:
    """Notes on settings of datasets that their role, or the want of one, leaves without effect."""
    notes = []
    for dataset in datasets:
        if isinstance(dataset, EvalDataset):
            general = {**type(dataset).model_fields}
            given = [
                key
                for key in TRAINED_ALONE
                if key in dataset.model_fields_set
                and vars(dataset)[key] not in (general[key].default, dict(config.data).get(key))
            ]
            if given:
                verb = "has" if len(given) == 1 else "have"
                notes.append(f"dataset {dataset.id}: {', '.join(given)} {verb} no effect: it is never trained on")
    regularised = any(each.is_regularisation_data for each in datasets if not isinstance(each, EvalDataset))
    if config.train.regularisation_target == "base" and not regularised:
        notes.append("regularisation_target base has no effect: no dataset has is_regularisation_data")
    if config.train.masked_loss_probability < 1 and not any(m.conditioning_type == "segmentation" for m in masks):
        notes.append("masked_loss_probability has no effect: no dataset has masks with conditioning_type segmentation")
    return notes


CONFIG_RULES: tuple[Callable[[Config], Problem | None], ...] = (bf16_needs_kahan, end_below_start)


def check_rules(
    config: Config, datasets: Sequence[ImageDataset], notes: list[str], masks: Sequence[ConditioningDataset] = ()
) -> list[Problem]:
    """All problems between settings; what only needs saying is appended to `notes`. masks: those that are used."""
    problems = [problem for dataset in datasets for rule in DATASET_RULES if (problem := rule(config, dataset))]
    problems += [problem for rule in CONFIG_RULES if (problem := rule(config))]
    problems += [problem] if (problem := someone_starts(datasets)) else []
    notes += unused_schedule_settings(config)
    for dataset in datasets:
        notes += unused_crop_settings(dataset)
        notes += unused_source_settings(dataset)
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
    notes += unused_roles(config, datasets, masks)
    return problems
