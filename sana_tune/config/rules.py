"""Rules between settings. Each is a function of what was asked and answers a Problem or None; notes go to `notes`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from sana_tune.config.adapter_rules import ADAPTER_RULES, unused_adapter_settings
from sana_tune.config.choices import LR_CYCLES_USED_BY, LR_END_DEFAULTS, LR_POWER_USED_BY
from sana_tune.config.datasets import ConditioningDataset, EvalDataset, ImageDataset
from sana_tune.config.evaluation_rules import known_eval_datasets, unused_evaluation_settings
from sana_tune.config.launch_rules import LAUNCH_RULES
from sana_tune.config.optimizers import keeps_bf16, options_of, stuck_share
from sana_tune.config.quantisation_rules import (
    QUANTISATION_RULES,
    Prices,
    base_is_frozen,
    unused_quantisation_settings,
)
from sana_tune.config.saving_rules import kept_ones_are_saved, script_is_named, unused_saving_settings
from sana_tune.config.schema import Config
from sana_tune.config.source_rules import SOURCE_RULES, unused_source_settings
from sana_tune.config.validation_rules import VALIDATION_RULES, preview_notes, unused_validation_settings
from sana_tune.config.values import nearest, optimizer_options
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
        *first, last = LR_END_DEFAULTS
        users = f"{', '.join(first)} and {last}"
        notes.append(f"lr_end has no effect with lr_scheduler {wanted.lr_scheduler}: {users} use it")
    if "lr_power" in wanted.model_fields_set and wanted.lr_scheduler not in LR_POWER_USED_BY:
        notes.append(f"lr_power has no effect with lr_scheduler {wanted.lr_scheduler}: it is for polynomial")
    if wanted.lr_num_cycles > 1 and wanted.lr_scheduler not in LR_CYCLES_USED_BY:
        notes.append(
            f"lr_num_cycles has no effect with lr_scheduler {wanted.lr_scheduler}: it is for cosine_with_restarts"
        )
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


def bf16_keeps_its_rest(config: Config) -> Problem | None:
    """bf16 weights lose small updates unless something keeps what rounding loses: Kahan, or stochastic rounding."""
    wanted = config.optimizer
    if config.model.weights_dtype != "bf16" or keeps_bf16(wanted.optimizer, optimizer_options(wanted.optimizer_config)):
        return None
    share = 100 * stuck_share(wanted.learning_rate)
    what = (
        "bf16 weights need what rounding to the nearest loses to be kept; without Kahan summation about "
        f"{share:.0f} % of the weights would not move in a step at a learning rate of {wanted.learning_rate:g}"
    )
    return Problem("weights_dtype", what, "leave kahan_sum out of optimizer_config, or use weights_dtype fp32")


def fp16_needs_masters(config: Config) -> Problem | None:
    """fp16 gradients are scaled for fp32 weights; bf16 weights would be computed with in bf16."""
    if config.model.mixed_precision == "fp16" and config.model.weights_dtype == "bf16":
        what = "fp16 needs fp32 weights; found weights_dtype bf16"
        return Problem("mixed_precision", what, "use mixed_precision bf16, or weights_dtype fp32")
    return None


def known_options(config: Config) -> Problem | None:
    """optimizer_config holds options that the optimizer has, of the right kind."""
    name = config.optimizer.optimizer
    known = options_of(name)
    for key, value in optimizer_options(config.optimizer.optimizer_config).items():
        if key not in known:
            guess = nearest(key, known)
            hint = f"did you mean {guess}? " if guess else ""
            return Problem("optimizer_config", f"{name} has no option {key}", f"{hint}it has: {', '.join(known)}")
        if (must := _kind_asked(key, known[key], value)) is not None:
            such = str(known[key]).lower()
            what = f"an option is not of its kind: {key} must be {must}; found {value}"
            return Problem("optimizer_config", what, f'such as "{key}={such}"')
    return None


def nesterov_needs_momentum(config: Config) -> Problem | None:
    """Nesterov's step is a form of momentum without dampening."""
    given = optimizer_options(config.optimizer.optimizer_config)
    if given.get("nesterov") and (not given.get("momentum") or given.get("dampening")):
        what = "nesterov needs a momentum above 0 and no dampening"
        return Problem("optimizer_config", what, 'such as "momentum=0.9,nesterov=true"')
    return None


def _kind_asked(key: str, default: Any, value: Any) -> str | None:
    """What a value of `optimizer_config` must be, when it is not."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(value, bool) or not isinstance(value, int if isinstance(default, int) else (int, float)):
        return "a whole number" if isinstance(default, int) else "a number"
    if key.startswith("beta") and key[4:].isdigit():
        return None if 0 <= value < 1 else "at least 0 and below 1"
    low, high = _LIMITS.get(key, (0, math.inf))
    if low <= value <= high:
        return None
    return f"{low:g} or more" if high == math.inf else f"{high:g} or less"


# Options of `optimizer_config` whose range is not 0 or more.
_LIMITS = {"d": (1, math.inf), "k": (1, math.inf), "beta2_decay": (-math.inf, 0)}


# Setting of its own → the same in `optimizer_config`.
_OPTIMIZER_KEYS = {
    "optimizer_beta1": "beta1",
    "optimizer_beta2": "beta2",
    "optimizer_weight_decay": "weight_decay",
    "optimizer_epsilon": "eps",
}


def options_told_once(config: Config) -> Problem | None:
    """A setting of its own and the same in optimizer_config are one too many."""
    given = optimizer_options(config.optimizer.optimizer_config)
    for key, option in _OPTIMIZER_KEYS.items():
        if vars(config.optimizer)[key] is not None and option in given:
            return Problem(key, f"{option} stands in optimizer_config too", "keep one of them")
    return None


def unused_optimizer_settings(config: Config) -> list[str]:
    """Notes on settings that the optimizer does not have."""
    wanted = config.optimizer
    return [
        f"{key} has no effect with {wanted.optimizer}: it has no {option}"
        for key, option in _OPTIMIZER_KEYS.items()
        if vars(wanted)[key] is not None and option not in options_of(wanted.optimizer)
    ]


def one_scale(config: Config) -> Problem | None:
    """lr_scale and lr_scale_sqrt are two answers to one question."""
    if config.optimizer.lr_scale and config.optimizer.lr_scale_sqrt:
        return Problem("lr_scale", "multiplies the learning rate; found lr_scale_sqrt beside it", "keep one of them")
    return None


def release_goes_alone(config: Config) -> Problem | None:
    """A gradient that is freed at once can be neither added to the next nor scaled back."""
    if not config.optimizer.optimizer_release_gradients:
        return None
    where, accumulation = "optimizer_release_gradients", config.train.gradient_accumulation_steps
    if accumulation > 1:
        what = f"needs gradient_accumulation_steps 1: a gradient that is freed cannot be added to; found {accumulation}"
        return Problem(where, what, "use gradient_accumulation_steps 1, with a larger train_batch_size if it fits")
    if config.model.mixed_precision == "fp16":
        what = "cannot be used with mixed_precision fp16: whether the scaled loss overflowed is known too late"
        return Problem(where, what, "use mixed_precision bf16")
    return None


def release_notes(config: Config) -> list[str]:
    """What gradient release costs."""
    wanted = config.optimizer
    if not wanted.optimizer_release_gradients or not wanted.max_grad_norm or wanted.grad_clip_method == "value":
        return []
    return [
        "optimizer_release_gradients with max_grad_norm takes two forward and backward passes a step, about twice the "
        "time: the first measures the norm. max_grad_norm 0 or grad_clip_method value takes one"
    ]


def tiling_notes(config: Config) -> list[str]:
    """What tiled encoding does to what is trained."""
    if not config.data.vae_tiled_encoding:
        return []
    return [
        "vae_tiled_encoding: pictures above 512 px are encoded tile by tile, and the VAE's attention sees a tile "
        "instead of the picture: the latents that are trained differ from those of whole pictures, at the seams most. "
        "Take it only where vae_batch_size 1 does not fit"
    ]


# Setting that is a distribution of noise levels by itself → which.
_DISTRIBUTION_KEYS = {
    "flow_use_uniform_schedule": "uniform",
    "flow_use_beta_schedule": "beta",
    "flow_custom_timesteps": "custom",
}


def distributions_asked(config: Config) -> dict[str, str]:
    """The distributions of noise levels that the settings name: name → the setting that does."""
    chosen = config.flow.flow_distribution
    asked = {} if chosen is None else {chosen: "flow_distribution"}
    for key, kind in _DISTRIBUTION_KEYS.items():
        if vars(config.flow)[key]:
            asked.setdefault(kind, key)
    return asked


def distribution_of(config: Config) -> str:
    """The distribution that noise levels are drawn from; NVIDIA's where none is asked for."""
    return next(iter(distributions_asked(config)), "logit-normal")


def one_distribution(config: Config) -> Problem | None:
    """Noise levels come from one distribution, and a table must be there when it is chosen."""
    asked = distributions_asked(config)
    if len(asked) > 1:
        found = " and ".join(f"{key} ({name})" for name, key in asked.items())
        what = f"noise levels are drawn from one distribution; found {found}"
        return Problem("flow_distribution", what, "keep one of them")
    if "custom" in asked and not config.flow.flow_custom_timesteps:
        what = "custom needs flow_custom_timesteps, the noise levels to draw from"
        return Problem("flow_distribution", what, 'add "flow_custom_timesteps": [0.25, 0.5, 0.75]')
    return None


# Setting → the distribution that it belongs to.
_OF_DISTRIBUTION = {
    "flow_logit_mean": "logit-normal",
    "flow_logit_std": "logit-normal",
    "flow_sigmoid_scale": "logit-normal",
    "flow_beta_schedule_alpha": "beta",
    "flow_beta_schedule_beta": "beta",
    "flow_mode_scale": "mode",
}


def unused_flow_settings(config: Config) -> list[str]:
    """Notes on settings of noise levels that do nothing beside the others. Values that are the defaults are no wish."""
    values, fields = vars(config.flow), type(config.flow).model_fields
    chosen = distribution_of(config)
    notes = [
        f"{key} has no effect with noise levels of the distribution {chosen}: it is for {kind}"
        for key, kind in _OF_DISTRIBUTION.items()
        if kind != chosen and values[key] != fields[key].default
    ]
    if chosen == "custom" and (config.flow.flow_schedule_shift is not None or config.flow.flow_schedule_auto_shift):
        notes.append("flow_custom_timesteps are taken as they are: flow_schedule_shift and auto shift have no effect")
    return notes


def one_weighting(config: Config) -> Problem | None:
    """snr_gamma is a weighting of its own."""
    wanted = config.loss
    if wanted.snr_gamma and wanted.loss_weighting != "none":
        what = f"snr_gamma is a weighting itself; found loss_weighting {wanted.loss_weighting} beside it"
        return Problem("snr_gamma", what, "keep one of them")
    return None


def unused_loss_settings(config: Config) -> list[str]:
    """Notes on settings of the loss that do nothing beside the others."""
    wanted, notes = config.loss, []
    if wanted.loss_type == "l2":
        fields = type(wanted).model_fields
        given = [key for key in ("huber_c", "huber_schedule") if vars(wanted)[key] != fields[key].default]
        notes += [f"{key} has no effect with loss_type l2: it is for huber and smooth_l1" for key in given]
    if wanted.use_soft_min_snr and not wanted.snr_gamma:
        notes.append("use_soft_min_snr has no effect without snr_gamma")
    if wanted.input_perturbation_steps and not wanted.input_perturbation:
        notes.append("input_perturbation_steps has no effect without input_perturbation")
    return notes


def rollouts_fit(config: Config) -> Problem | None:
    """A rollout is a part of the way from noise to picture."""
    longest, steps = config.rollout.scheduled_sampling_max_step_offset, config.validation.validation_num_inference_steps
    if longest <= steps:
        return None
    return Problem(
        "scheduled_sampling_max_step_offset",
        f"a rollout must not be longer than the whole way from noise to picture, which is "
        f"validation_num_inference_steps ({steps}) steps; found {longest}",
        "lower it (2 to 5 is usual), or raise validation_num_inference_steps",
    )


def unused_rollout_settings(config: Config) -> list[str]:
    """Notes on settings of scheduled sampling that have no effect."""
    asked, given = config.rollout, config.rollout.model_fields_set
    keys = sorted(key for key in given if vars(asked)[key] != type(asked).model_fields[key].default)
    if not asked.scheduled_sampling_max_step_offset:
        return [f"{', '.join(keys)}: no effect, since scheduled_sampling_max_step_offset is 0"] if keys else []
    ramp = asked.scheduled_sampling_ramp_steps
    unused = ["scheduled_sampling_prob_start", "scheduled_sampling_prob_end", "scheduled_sampling_ramp_shape"]
    notes = []
    if not ramp and not asked.scheduled_sampling_probability:
        notes.append("scheduled sampling rolls nothing in: set scheduled_sampling_probability, or _ramp_steps")
    if inert := [key for key in keys if key in (["scheduled_sampling_probability"] if ramp else unused)]:
        why = "the ramp takes its place" if ramp else "scheduled_sampling_ramp_steps is 0"
        notes.append(f"{', '.join(inert)}: no effect, since {why}")
    if asked.scheduled_sampling_sampler == "euler" and asked.scheduled_sampling_order > 1:
        if "scheduled_sampling_order" in given:
            notes.append("scheduled_sampling_order: no effect, since Euler's method has order 1")
    return notes


def stride_holds_interval(config: Config) -> Problem | None:
    """The blocks recomputed in each segment must fit into it."""
    interval = config.model.gradient_checkpointing_interval
    stride = config.model.gradient_checkpointing_segment_stride
    if stride is None or stride >= interval:
        return None
    return Problem(
        "gradient_checkpointing_segment_stride",
        f"the first gradient_checkpointing_interval ({interval}) blocks of every segment are recomputed, so a segment "
        f"must not be shorter; found {stride}",
        f"set it to {interval} or more, or leave it out",
    )


def selective_is_not_compiled(config: Config) -> Problem | None:
    """torch 2.13 gives selectively recomputed blocks the sizes of another bucket when it compiles them."""
    model = config.model
    if model.dynamo_backend == "no" or not model.gradient_checkpointing:
        return None
    if model.gradient_checkpointing_backend != "selective":
        return None
    return Problem(
        "dynamo_backend",
        f"blocks must not be recomputed selectively when they are compiled, which torch gets wrong; found "
        f"{model.dynamo_backend} with gradient_checkpointing_backend selective",
        "use gradient_checkpointing_backend torch, and a larger gradient_checkpointing_interval if memory allows",
    )


def unused_checkpointing_settings(config: Config) -> list[str]:
    """Notes on settings of gradient checkpointing while it is off."""
    if config.model.gradient_checkpointing:
        return []
    keys = ("interval", "segment_stride", "backend")
    asked = [key for key in (f"gradient_checkpointing_{key}" for key in keys) if key in config.model.model_fields_set]
    return [f"{key} has no effect: gradient_checkpointing is off" for key in asked]


def scripts_name_settings(config: Config) -> Problem | None:
    """A placeholder {validation_…} of a script is a setting of the validation."""
    known = type(config.validation).model_fields
    for key in ("post_checkpoint_script", "post_upload_script"):
        for name in re.findall(r"\{(validation_\w+)\}", vars(config.watch)[key] or ""):
            if name not in known:
                guess = nearest(name, known)
                hint = f"did you mean {{{guess}}}?" if guess else "`sana_tune options` lists the settings there are"
                return Problem(key, f"there is no placeholder {{{name}}}", hint)
    return None


def unused_hub_settings(config: Config) -> list[str]:
    """Notes on settings of uploads while nothing is uploaded."""
    wanted, fields = config.watch, type(config.watch).model_fields
    if wanted.push_checkpoints_to_hub:
        return []
    for_checkpoints = ("push_to_hub_background", "push_optimizer_to_hub")
    keys = for_checkpoints if wanted.push_to_hub else (*for_checkpoints, "hub_model_id", "model_card_private")
    given = [key for key in keys if vars(wanted)[key] != fields[key].default]
    missing = "push_checkpoints_to_hub" if wanted.push_to_hub else "push_to_hub and push_checkpoints_to_hub"
    verb = "is" if wanted.push_to_hub else "are"
    return [f"{key} has no effect: {missing} {verb} off" for key in given]


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
    "small_buckets", "eval_split",
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


CONFIG_RULES: tuple[Callable[[Config], Problem | None], ...] = (
    bf16_keeps_its_rest,
    rollouts_fit,
    stride_holds_interval,
    selective_is_not_compiled,
    fp16_needs_masters,
    known_options,
    nesterov_needs_momentum,
    options_told_once,
    release_goes_alone,
    one_scale,
    end_below_start,
    one_distribution,
    one_weighting,
    script_is_named,
    kept_ones_are_saved,
    *QUANTISATION_RULES,
    *VALIDATION_RULES,
    scripts_name_settings,
    *LAUNCH_RULES,
    *ADAPTER_RULES,
)


def check_rules(
    config: Config,
    datasets: Sequence[ImageDataset],
    notes: list[str],
    masks: Sequence[ConditioningDataset] = (),
    prices: Prices | None = None,
) -> list[Problem]:
    """All problems between settings; what only needs saying is appended to `notes`. masks: those that are used.

    prices: what the ways to train on a small card take, which is for who knows the models.
    """
    problems = [problem for dataset in datasets for rule in DATASET_RULES if (problem := rule(config, dataset))]
    problems += [problem for rule in CONFIG_RULES if (problem := rule(config))]
    problems += [problem] if (problem := base_is_frozen(config, datasets, prices)) else []
    problems += [problem] if (problem := someone_starts(datasets)) else []
    problems += known_eval_datasets(config, datasets)
    notes += unused_schedule_settings(config) + unused_flow_settings(config) + unused_loss_settings(config)
    notes += unused_rollout_settings(config)
    notes += unused_optimizer_settings(config) + release_notes(config) + unused_checkpointing_settings(config)
    notes += unused_quantisation_settings(config)
    notes += unused_validation_settings(config) + preview_notes(config)
    notes += unused_hub_settings(config) + tiling_notes(config) + unused_adapter_settings(config)
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
    notes += unused_roles(config, datasets, masks) + unused_evaluation_settings(config, datasets)
    notes += unused_saving_settings(config, datasets)
    return problems
