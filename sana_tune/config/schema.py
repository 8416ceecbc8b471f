"""Every setting of config.json: name, type, default, range and help in one line each, in frozen sections.

Adding a key is adding a line here. Flat names are unique over all sections, so a file needs no nesting.
Defaults are those of the contracts (§3); None means "decided later, from the model or another setting".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from sana_tune.config.choices import CAPTION_STRATEGIES, LR_SCHEDULERS, OPTIMIZERS
from sana_tune.config.values import Resolution, named, parse_instruction, parse_resolutions


class Section(BaseModel):
    """Frozen group of settings. Unknown keys are told by the loader, with the nearest name."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def setting(default: Any, help: str, **limits: Any) -> Any:
    """One setting: its default, its help line, and pydantic limits (ge, le, gt, lt, min_length)."""
    return Field(default, description=help, **limits)


OptimizerName = Annotated[str, AfterValidator(named(OPTIMIZERS, "optimizer"))]
SchedulerName = Annotated[str, AfterValidator(named(LR_SCHEDULERS, "learning-rate schedule"))]
CaptionStrategy = Annotated[str, AfterValidator(named(CAPTION_STRATEGIES, "caption strategy"))]
Resolutions = Annotated[tuple[Resolution, ...], BeforeValidator(parse_resolutions)]
Instruction = Annotated[str, BeforeValidator(parse_instruction)]


class ModelConfig(Section):
    model_family: Literal["sana"] = setting("sana", "the architecture; sana_tune trains Sana alone")
    model_type: Literal["full"] = setting("full", "full: every weight is trained")
    pretrained_model_name_or_path: str = setting(..., "hub id or folder in diffusers layout, or `nano`", min_length=1)
    revision: str | None = setting(None, "branch, tag or commit of the hub repository")
    variant: str | None = setting(None, "weight variant of the hub repository, e.g. bf16; unset = chosen by precision")
    mixed_precision: Literal["bf16", "no"] = setting("bf16", "compute in bf16, or in fp32 (no); a CPU computes in fp32")
    weights_dtype: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "dtype of the trained weights; auto = fp32 masters"
    )
    gradient_checkpointing: bool = setting(True, "recompute blocks in the backward pass to save memory")
    gradient_checkpointing_interval: int = setting(1, "checkpoint blocks 0, n, 2n …; 1 = every block", ge=1)
    sana_complex_human_instruction: Instruction | None = setting(
        None, 'text put before every caption; unset = diffusers\' own, "None" = no instruction'
    )
    prompt_case: Literal["lower", "keep"] = setting(
        "lower", "lower-case captions and prompts as diffusers' pipeline does"
    )


class DataConfig(Section):
    data_backend_config: str = setting(..., "path of multidatabackend.json, the list of datasets", min_length=1)
    train_batch_size: int = setting(1, "pictures per micro-batch; a dataset can have its own", ge=1)
    resolution: float = setting(1024, "size of training pictures, px (pixel_area)", gt=0)
    resolution_type: Literal["pixel_area"] = setting("pixel_area", "pixel_area: area of resolution² px")
    minimum_image_size: float | None = setting(None, "smaller pictures are left out; px (pixel_area)", ge=0)
    maximum_image_size: float | None = setting(None, "with crop: larger ones go through target_downsample_size", ge=0)
    target_downsample_size: float | None = setting(None, "with crop: size before the crop of larger pictures", ge=0)
    aspect_bucket_alignment: int | None = setting(
        None, "bucket sides are multiples of this, px; unset = VAE factor", ge=1
    )
    aspect_bucket_rounding: int = setting(2, "decimals of the aspect ratio", ge=1, le=9)
    caption_strategy: CaptionStrategy = setting("filename", "where captions come from")
    instance_prompt: str | tuple[str, ...] | None = setting(None, "the caption of instanceprompt")
    prepend_instance_prompt: bool = setting(False, "put instance_prompt before every caption")
    only_instance_prompt: bool = setting(False, "use instance_prompt in place of every caption")
    disable_multiline_split: bool = setting(False, "a caption file is one caption, not one per line")
    missing_caption: Literal["error", "skip", "empty"] = setting("error", "what to do with a picture without caption")
    small_buckets: Literal["fill"] = setting("fill", "a bucket smaller than a batch is filled from itself")
    caption_dropout_probability: float = setting(0.1, "share of samples trained on the empty caption", ge=0, le=1)
    data_backend_sampling: Literal["auto-weighting", "uniform"] = setting("auto-weighting", "how datasets take turns")
    cache_dir: str | None = setting(None, "root of the caches; unset = <output_dir>/cache")
    cache_dir_text: str | None = setting(None, "text cache; unset = <cache_dir>/text")
    cache_dir_vae: str | None = setting(None, "latent cache root; unset = <cache_dir>/vae/<dataset>")
    vae_batch_size: int = setting(4, "pictures per VAE encode", ge=1)
    text_encoder_batch_size: int = setting(8, "captions per text-encoder forward", ge=1)
    write_batch_size: int = setting(128, "items per cache shard", ge=1)


class FlowConfig(Section):
    flow_schedule_shift: float | None = setting(
        None, "flow shift s of training; unset = the model's scheduler config", gt=0
    )
    flow_schedule_auto_shift: bool = setting(
        False, "grow the shift with the resolution: s·sqrt(tokens / native tokens)"
    )


class OptimizerConfig(Section):
    optimizer: OptimizerName = setting("optimi-adamw", "name of the optimizer")
    learning_rate: float = setting(1e-5, "peak learning rate", gt=0)
    optimizer_beta1: float | None = setting(None, "first beta; unset = the optimizer's default", ge=0, lt=1)
    optimizer_beta2: float | None = setting(None, "second beta; unset = the optimizer's default", ge=0, lt=1)
    optimizer_weight_decay: float | None = setting(None, "weight decay; unset = the optimizer's default", ge=0)
    optimizer_epsilon: float | None = setting(None, "epsilon; unset = the optimizer's default", gt=0)
    lr_scheduler: SchedulerName = setting("constant_with_warmup", "shape of the learning rate over the run")
    lr_warmup_steps: int = setting(0, "optimizer steps of linear warm-up", ge=0)
    max_grad_norm: float = setting(0.1, "clip the gradient's norm to this; 0 = no clipping", ge=0)
    grad_clip_method: Literal["norm", "value"] = setting("norm", "clip the whole gradient's norm, or each element")


class TrainConfig(Section):
    output_dir: str = setting("output", "folder for checkpoints, pictures and logs", min_length=1)
    max_train_steps: int | None = setting(None, "optimizer steps; 0 or unset = by epochs", ge=0)
    num_train_epochs: float | None = setting(None, "passes over the data; both given: the first reached stops", ge=0)
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimizer step", ge=1)
    seed: int = setting(0, "seed of everything random", ge=0)
    checkpoint_step_interval: int = setting(500, "steps between checkpoints; 0 = only the last", ge=0)
    checkpoints_total_limit: int = setting(5, "checkpoints kept; 0 = all", ge=0)
    resume_from_checkpoint: str | None = setting("latest", 'checkpoint to go on from: latest, a path, or "" for none')
    max_bad_steps: int = setting(10, "stop after this many non-finite steps in a row", ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to train")


class EmaConfig(Section):
    use_ema: bool = setting(False, "keep an fp32 exponential moving average of the weights")
    ema_decay: float = setting(0.995, "decay, ramped as min(decay, (1+s)/(10+s))", ge=0, lt=1)
    ema_update_interval: int = setting(1, "optimizer steps between updates; the decay is compensated", ge=1)


class ValidationConfig(Section):
    validation_prompt: str | None = setting(None, "main prompt drawn at each validation")
    user_prompt_library: str | None = setting(None, "path of a JSON file {nickname: prompt}")
    validation_negative_prompt: str = setting("", "negative prompt of the guidance")
    validation_resolution: Resolutions = setting((), "N or WxH px, comma separated; unset = the model's size")
    validation_guidance: float = setting(4.5, "classifier-free guidance scale", ge=0)
    validation_num_inference_steps: int = setting(20, "steps of the sampler", ge=1)
    validation_seed: int | None = setting(None, "seed of the pictures; unset = seed")
    validation_step_interval: int = setting(500, "optimizer steps between validations; 0 = only start and end", ge=0)
    num_validation_images: int = setting(1, "pictures per prompt and resolution, seeds counted up", ge=1)
    validation_disable: bool = setting(False, "draw no validation pictures at all")
    disable_benchmark: bool = setting(False, "draw no pictures of the base model before step 1")


class Config(Section):
    """What was asked, whole. `sections` by name; `datasets` from multidatabackend.json stands beside it."""

    model: ModelConfig
    data: DataConfig
    flow: FlowConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    ema: EmaConfig
    validation: ValidationConfig


SECTIONS: dict[str, type[Section]] = {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def section_of() -> dict[str, str]:
    """Flat key → name of its section. Raises if two sections share a key."""
    homes: dict[str, str] = {}
    for section, kind in SECTIONS.items():
        for key in kind.model_fields:
            if key in homes:
                raise ValueError(f"the key {key} stands in two sections: {homes[key]} and {section}")
            homes[key] = section
    return homes
