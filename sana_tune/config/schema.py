"""Every setting of config.json: name, type, default, range and help in one line each, in frozen sections.

Adding a key is adding a line here. Flat names are unique over all sections, so a file needs no nesting.
Defaults are those of the contracts (§3); None means "decided later, from the model or another setting".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from sana_tune.config.choices import (
    CAPTION_STRATEGIES,
    CHECKPOINTING_BACKENDS,
    DRAWING_METHODS,
    DYNAMO_BACKENDS,
    HUBER_SCHEDULES,
    LOSS_TYPES,
    LOSS_WEIGHTINGS,
    LR_SCHEDULERS,
    NOISE_DISTRIBUTIONS,
    OPTIMIZERS,
    PRECISIONS,
    REFUSED_CHECKPOINTING_BACKENDS,
    REFUSED_LOSS_WEIGHTINGS,
    REFUSED_LR_SCHEDULERS,
    REFUSED_PRECISIONS,
    REFUSED_SAMPLERS,
    ROLLOUT_SAMPLERS,
    ROLLOUT_STRATEGIES,
    SAMPLERS,
)
from sana_tune.config.optimizers import REFUSED_OPTIMIZERS
from sana_tune.config.values import (
    WHITE,
    Resolution,
    named,
    parse_colour,
    parse_disk_size,
    parse_ids,
    parse_instruction,
    parse_levels,
    parse_optimizer_config,
    parse_resolutions,
    whole_or_share,
)
from sana_tune.config.watching import (
    Webhook,
    parse_comment,
    parse_hub_id,
    parse_script,
    parse_trackers,
    parse_webhooks,
)


class Section(BaseModel):
    """Frozen group of settings. Unknown keys are told by the loader, with the nearest name."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def setting(default: Any, help: str, *, unit: str | None = None, **limits: Any) -> Any:
    """One setting: its default, its help line, its unit, and pydantic limits (ge, le, gt, lt, min_length)."""
    return Field(default, description=help, json_schema_extra={"unit": unit} if unit else None, **limits)


OptimizerName = Annotated[str, AfterValidator(named(OPTIMIZERS, "optimizer", REFUSED_OPTIMIZERS))]
SchedulerName = Annotated[str, AfterValidator(named(LR_SCHEDULERS, "learning-rate schedule", REFUSED_LR_SCHEDULERS))]
CheckpointingBackend = Annotated[
    str, AfterValidator(named(CHECKPOINTING_BACKENDS, "way of gradient checkpointing", REFUSED_CHECKPOINTING_BACKENDS))
]
Precision = Annotated[str, AfterValidator(named(PRECISIONS, "precision", REFUSED_PRECISIONS))]
DynamoBackend = Annotated[str, AfterValidator(named(DYNAMO_BACKENDS, "compiler"))]
CaptionStrategy = Annotated[str, AfterValidator(named(CAPTION_STRATEGIES, "caption strategy"))]
Distribution = Annotated[str | None, AfterValidator(named(NOISE_DISTRIBUTIONS, "distribution of noise levels"))]
LossType = Annotated[str, AfterValidator(named(LOSS_TYPES, "loss"))]
HuberSchedule = Annotated[str, AfterValidator(named(HUBER_SCHEDULES, "schedule of huber_c"))]
LossWeighting = Annotated[str, AfterValidator(named(LOSS_WEIGHTINGS, "weighting of the loss", REFUSED_LOSS_WEIGHTINGS))]
Sampler = Annotated[str, AfterValidator(named(SAMPLERS, "sampler", REFUSED_SAMPLERS))]
DrawingMethod = Annotated[str, AfterValidator(named(DRAWING_METHODS, "way to draw"))]
RolloutStrategy = Annotated[str, AfterValidator(named(ROLLOUT_STRATEGIES, "strategy of rollouts"))]
RolloutSampler = Annotated[str, AfterValidator(named(ROLLOUT_SAMPLERS, "sampler of rollouts"))]
NoiseLevels = Annotated[tuple[float, ...], BeforeValidator(parse_levels)]
Resolutions = Annotated[tuple[Resolution, ...], BeforeValidator(parse_resolutions)]
OptimizerOptions = Annotated[str, BeforeValidator(parse_optimizer_config)]
Ids = Annotated[str, BeforeValidator(parse_ids)]
Split = Annotated[float, AfterValidator(whole_or_share)]
Instruction = Annotated[str, BeforeValidator(parse_instruction)]
Colour = Annotated[str, BeforeValidator(parse_colour)]
DiskSize = Annotated[str, BeforeValidator(parse_disk_size)]


class ModelConfig(Section):
    model_family: Literal["sana"] = setting("sana", "the architecture; sana_tune trains Sana alone")
    model_type: Literal["full", "lora"] = setting(
        "full", "full: every weight is trained; lora: an adapter on a frozen base"
    )
    pretrained_model_name_or_path: str = setting(..., "hub id or folder in diffusers layout, or `nano`", min_length=1)
    revision: str | None = setting(None, "branch, tag or commit of the hub repository")
    variant: str | None = setting(None, "weight variant of the hub repository, e.g. bf16; unset = chosen by precision")
    mixed_precision: Literal["bf16", "fp16", "no"] = setting(
        "bf16", "compute in bf16, in fp16 with a scaled loss, or in fp32 (no); a CPU computes in fp32"
    )
    weights_dtype: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "dtype of the trained weights; auto = fp32 masters where they fit the memory, else bf16"
    )
    base_model_precision: Precision = setting("no_change", "quantise the frozen base that an adapter is trained on")
    base_model_default_dtype: Literal["bf16", "fp32"] = setting(
        "bf16", "dtype of what of a quantised base is not quantised"
    )
    text_encoder_1_precision: Precision = setting(
        "no_change", "quantise the text encoder, which fills the text caches; embeddings change with it"
    )
    quantize_via: Literal["cpu", "accelerator"] = setting(
        "cpu", "where weights are quantised: cpu: in main memory, and only packed ones go to the device; accelerator: "
        "on the device, one layer at a time: faster"
    )  # fmt: skip
    gradient_checkpointing: bool = setting(True, "recompute blocks in the backward pass to save memory")
    gradient_checkpointing_interval: int = setting(
        1, "checkpoint blocks 0, n, 2n …; 1 = every block", unit="blocks", ge=1
    )
    gradient_checkpointing_segment_stride: int | None = setting(
        None, "checkpoint the first `gradient_checkpointing_interval` of so many blocks instead", unit="blocks", ge=1
    )
    gradient_checkpointing_backend: CheckpointingBackend = setting("torch", "what a checkpointed block keeps")
    dynamo_backend: DynamoBackend = setting("no", "compile the blocks for speed, anew for each size")
    sana_complex_human_instruction: Instruction | None = setting(
        None, 'text put before every caption; unset = diffusers\' own; "None" = no instruction'
    )
    prompt_case: Literal["lower", "keep"] = setting(
        "lower", "lower-case captions and prompts as diffusers' pipeline does"
    )


class AdapterConfig(Section):
    lora_type: str = setting("lycoris", "library of the adapter of model_type lora: lycoris")
    lycoris_config: str = setting(
        "config/lycoris_config.json", "file that describes the adapter: algorithm, size, layers", min_length=1
    )
    init_lokr_norm: float | None = setting(
        None, "begin with a random change of so large a share of each weight, e.g. 0.001, instead of none", gt=0, le=1
    )
    init_lora: str | None = setting(None, "begin with the adapter of this safetensors file")
    init_lora_step: int | None = setting(
        None, "count steps on from here, with a fresh optimizer; with init_lora", unit="steps", ge=0
    )
    init_lora_ema: str | None = setting(None, "begin with the average of this file; with init_lora and use_ema")
    validation_lycoris_strength: float = setting(
        1.0, "validation pictures show the adapter's change multiplied by this", ge=0
    )


class PictureSettings(Section):
    """Settings of a picture dataset that config.json can give for all of them; a dataset's own win."""

    train_batch_size: int = setting(1, "pictures per micro-batch", unit="pictures", ge=1)
    resolution: float = setting(1024, "size of training pictures, in the unit of resolution_type", gt=0)
    resolution_type: Literal["pixel_area", "area", "pixel"] = setting(
        "pixel_area", "pixel_area: area of resolution² px; area: megapixels; pixel: the shorter side in px"
    )
    minimum_image_size: float | None = setting(
        None, "smaller pictures are left out; in the unit of resolution_type", ge=0
    )
    maximum_image_size: float | None = setting(
        None, "with crop: larger pictures are resized to target_downsample_size before the crop", ge=0
    )
    target_downsample_size: float | None = setting(
        None, "with crop: size of pictures above maximum_image_size before the crop", ge=0
    )
    max_upscale_threshold: float | None = setting(
        None, "leave out pictures that would be enlarged by more than this share of their side; 0.2 = 20 %", ge=0
    )
    caption_strategy: CaptionStrategy = setting("filename", "where captions come from")
    instance_prompt: str | tuple[str, ...] | None = setting(None, "the caption of instanceprompt")
    prepend_instance_prompt: bool = setting(False, "put instance_prompt before every caption")
    only_instance_prompt: bool = setting(False, "use instance_prompt in place of every caption")
    disable_multiline_split: bool = setting(False, "a caption file is one caption, not one per line")
    parquet_caption_column: str | None = setting(None, "column of captions where the parquet block names none")
    parquet_filename_column: str | None = setting(None, "column of file names where the parquet block names none")
    aws_max_pool_connections: int = setting(16, "type aws: connections at once", unit="connections", ge=1, le=1000)
    alpha_ground: Colour = setting(
        WHITE, "colour that transparent parts of pictures show: #rrggbb, or a name such as white"
    )
    missing_caption: Literal["error", "skip", "empty"] = setting("error", "what to do with a picture without caption")
    small_buckets: Literal["fill", "merge", "drop", "error"] = setting(
        "fill", "a bucket smaller than a batch is filled from itself, merged into the one of the nearest aspect, "
        "dropped, or an error"
    )  # fmt: skip
    eval_split: Split = setting(
        0.0, "hold out so many pictures of each dataset, or below 1 such a share of them: always the same by seed and "
        "id, and never trained on; 0 = none", ge=0
    )  # fmt: skip
    vae_batch_size: int = setting(4, "pictures per VAE encode", unit="pictures", ge=1)
    write_batch_size: int = setting(128, "items per cache shard", unit="items", ge=1)
    compress_disk_cache: bool = setting(
        False, "pack latents and embeddings on disk, without loss: a seventh to a quarter smaller, slower to read"
    )
    vae_cache_disable: bool = setting(
        False, "keep no latents: pictures are encoded at every visit, and the VAE stays in memory"
    )
    vae_cache_ondemand: bool = setting(
        False, "encode a picture when training first needs it, then keep its latent; the VAE stays in memory"
    )
    vae_cache_clear_each_epoch: bool = setting(
        False, "draw random crops and aspects anew for each epoch: it encodes them first and drops those before"
    )


class DataConfig(PictureSettings):
    data_backend_config: str = setting(..., "path of multidatabackend.json, the list of datasets", min_length=1)
    aspect_bucket_alignment: int | None = setting(
        None, "bucket sides are multiples of this; unset = the VAE's factor (32 for Sana)", unit="px", ge=1
    )
    aspect_bucket_rounding: int = setting(2, "decimals of the aspect ratio", ge=1, le=9)
    strict: bool = setting(False, "a damaged picture or a missing caption ends the run before training, with the list")
    caption_dropout_probability: float = setting(0.1, "share of samples trained on the empty caption", ge=0, le=1)
    data_backend_sampling: Literal["auto-weighting", "uniform"] = setting(
        "auto-weighting", "how datasets take turns: by probability × size, or by probability alone"
    )
    cache_dir: str | None = setting(None, "root of the caches; unset = <output_dir>/cache")
    cache_dir_text: str | None = setting(None, "text cache; unset = <cache_dir>/text")
    cache_dir_vae: str | None = setting(None, "latent cache root; unset = <cache_dir>/vae/<dataset>")
    text_cache_disable: bool = setting(
        False, "keep no text embeddings: captions are encoded at every visit, and the text encoder stays in memory"
    )
    text_cache_ondemand: bool = setting(
        False, "encode a caption when training first needs it, then keep it; the text encoder stays in memory"
    )
    text_embed_full_cache: bool = setting(False, "keep in main memory every text embedding that was read")
    text_encoder_batch_size: int = setting(8, "captions per text-encoder forward", unit="captions", ge=1)
    vae_tiled_encoding: bool = setting(
        False, "last resort: encode pictures above 512 px in tiles, which gives other latents than whole pictures do"
    )


class FlowConfig(Section):
    flow_schedule_shift: float | None = setting(
        None, "flow shift s of training; unset = the model's scheduler config", gt=0
    )
    flow_schedule_auto_shift: bool = setting(
        False, "grow the shift with the resolution: s·sqrt(tokens / native tokens)"
    )
    flow_distribution: Distribution = setting(
        None, "what noise levels are drawn from, before the shift; unset = logit-normal"
    )
    flow_logit_mean: float = setting(0.0, "logit-normal: mean of the normal; above 0 = more noise", ge=-10, le=10)
    flow_logit_std: float = setting(1.0, "logit-normal: standard deviation of the normal", gt=0, le=10)
    flow_sigmoid_scale: float = setting(
        1.0, "logit-normal: factor on the normal before the sigmoid; below 1 = closer to the middle", gt=0, le=10
    )
    flow_use_uniform_schedule: bool = setting(False, "the same as flow_distribution uniform")
    flow_use_beta_schedule: bool = setting(False, "the same as flow_distribution beta")
    flow_beta_schedule_alpha: float = setting(2.0, "beta: alpha; above beta = more noise", ge=0.1, le=100)
    flow_beta_schedule_beta: float = setting(2.0, "beta: beta; above alpha = less noise", ge=0.1, le=100)
    flow_mode_scale: float = setting(1.29, "mode: above 0 = the middle more often, below 0 = the ends", ge=-1, le=1.75)
    flow_custom_timesteps: NoiseLevels | None = setting(
        None, "custom: the noise levels, 0 to 1, or timesteps up to 1000; comma separated or a list"
    )
    flow_stratified: bool = setting(
        False, "spread the noise levels of each optimizer step evenly over their distribution: a steadier loss"
    )


class LossConfig(Section):
    loss_type: LossType = setting("l2", "what is minimised")
    huber_c: float = setting(0.1, "huber and smooth_l1: width of the squared part at pure noise", gt=0, le=10)
    huber_schedule: HuberSchedule = setting("snr", "huber and smooth_l1: width by noise level")
    loss_weighting: LossWeighting = setting("none", "weight of a sample's loss by its noise level")
    snr_gamma: float | None = setting(
        None, "min-SNR weighting: min(SNR, gamma) on the error of the picture; 5 is usual, 0 = off; unset = off", ge=0
    )
    use_soft_min_snr: bool = setting(False, "snr_gamma: the smooth form SNR·gamma / (SNR + gamma)")
    input_perturbation: float = setting(
        0.0, "mix the picture with so much more noise than the target knows of; 0.1 is usual", ge=0, le=1
    )
    input_perturbation_steps: int = setting(
        0, "input_perturbation falls to 0 over so many steps; 0 = it stays", unit="steps", ge=0
    )


class RolloutConfig(Section):
    scheduled_sampling_max_step_offset: int = setting(
        0, "train samples at states the model itself led to, over at most so many sampler steps; 0 = off",
        unit="steps", ge=0,
    )  # fmt: skip
    scheduled_sampling_probability: float = setting(0.0, "share of the samples that are rolled in", ge=0, le=1)
    scheduled_sampling_prob_start: float = setting(0.0, "the same where a ramp begins", ge=0, le=1)
    scheduled_sampling_prob_end: float = setting(0.5, "the same where the ramp ends, and after it", ge=0, le=1)
    scheduled_sampling_ramp_steps: int = setting(
        0, "length of the ramp, which takes the place of scheduled_sampling_probability; 0 = none", unit="steps", ge=0
    )
    scheduled_sampling_start_step: int = setting(0, "nothing is rolled in before this step", unit="steps", ge=0)
    scheduled_sampling_ramp_shape: Literal["linear", "cosine"] = setting("linear", "shape of the ramp")
    scheduled_sampling_strategy: RolloutStrategy = setting("uniform", "how long rollouts are")
    scheduled_sampling_sampler: RolloutSampler = setting("unipc", "the sampler that leads there")
    scheduled_sampling_order: int = setting(2, "order of the sampler", ge=1, le=3)
    scheduled_sampling_reflexflow: bool | None = setting(
        None, "ReflexFlow's terms in the loss of such samples; unset = on (one more forward of them)"
    )
    scheduled_sampling_reflexflow_alpha: float = setting(
        1.0, "how much more positions count whose prediction drifts", ge=0
    )
    scheduled_sampling_reflexflow_beta1: float = setting(10.0, "factor of the anti-drift term", ge=0)
    scheduled_sampling_reflexflow_beta2: float = setting(1.0, "factor of the velocity's own loss", ge=0)


class OptimizerConfig(Section):
    optimizer: OptimizerName = setting("optimi-adamw", "name of the optimizer")
    learning_rate: float = setting(1e-5, "peak learning rate", gt=0)
    optimizer_beta1: float | None = setting(None, "first beta; unset = the optimizer's default", ge=0, lt=1)
    optimizer_beta2: float | None = setting(None, "second beta; unset = the optimizer's default", ge=0, lt=1)
    optimizer_weight_decay: float | None = setting(None, "weight decay; unset = the optimizer's default", ge=0)
    optimizer_epsilon: float | None = setting(None, "epsilon; unset = the optimizer's default", gt=0)
    optimizer_config: OptimizerOptions | None = setting(
        None, 'further options of the optimizer, "name=value,name=value"; unset = its defaults'
    )
    optimizer_release_gradients: bool = setting(
        False,
        "update each weight inside the backward pass and free its gradient at once; with max_grad_norm in two passes",
    )
    lr_scheduler: SchedulerName = setting("constant_with_warmup", "shape of the learning rate over the run")
    lr_end: float | None = setting(
        None,
        "learning rate at the last step of polynomial, cosine and cosine_with_restarts; unset = 4e-7 for polynomial, "
        "0 for the others",
        ge=0,
    )
    lr_power: float = setting(0.8, "power of polynomial; 1 = a straight line", gt=0)
    lr_num_cycles: int = setting(1, "cycles of cosine_with_restarts", unit="cycles", ge=1)
    lr_scale: bool = setting(False, "multiply learning_rate and lr_end by the pictures of an optimizer step")
    lr_scale_sqrt: bool = setting(False, "multiply them by the square root of that number instead")
    lr_warmup_steps: int = setting(0, "optimizer steps of linear warm-up", unit="steps", ge=0)
    max_grad_norm: float = setting(0.1, "clip the gradient's norm to this; 0 = no clipping", ge=0)
    grad_clip_method: Literal["norm", "value"] = setting("norm", "clip the whole gradient's norm, or each element")


class TrainConfig(Section):
    output_dir: str = setting("output", "folder for checkpoints, pictures and logs", min_length=1)
    max_train_steps: int | None = setting(None, "optimizer steps; 0 or unset = by epochs", unit="steps", ge=0)
    num_train_epochs: float | None = setting(
        None, "passes over the data; both given: the first reached stops", unit="epochs", ge=0
    )
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimizer step", unit="micro-batches", ge=1)
    seed: int = setting(0, "seed of everything random", ge=0)
    checkpoint_step_interval: int = setting(500, "steps between checkpoints; 0 = only the last", unit="steps", ge=0)
    checkpoint_epoch_interval: int = setting(
        0, "save at the end of every so many epochs, too; 0 = not", unit="epochs", ge=0
    )
    checkpoints_total_limit: int = setting(5, "newest checkpoints kept; 0 = all", unit="checkpoints", ge=0)
    checkpoints_keep_every: int = setting(
        0, "checkpoints at multiples of so many steps are never removed; 0 = none", unit="steps", ge=0
    )
    checkpoints_keep_best: int = setting(
        0, "so many checkpoints of the lowest held-out loss are not removed; 0 = none", unit="checkpoints", ge=0
    )
    checkpointing_rolling_steps: int = setting(
        0, "steps between further checkpoints, against crashes, that soon go again; 0 = none", unit="steps", ge=0
    )
    checkpoints_rolling_total_limit: int = setting(1, "rolling checkpoints kept", unit="checkpoints", ge=1)
    checkpoint_writing: Literal["auto", "background", "wait"] = setting(
        "auto", "background: written from a copy in main memory while training goes on; wait: training waits; "
        "auto: in the background where the copy fits"
    )  # fmt: skip
    disk_low_threshold: DiskSize | None = setting(
        None, "disk space to be free before a checkpoint is written: bytes, 20 GB or 5%; unset = its size"
    )
    disk_low_action: Literal["wait", "stop", "script"] = setting(
        "wait", "when less is free: wait until there is room, stop, or call disk_low_script and wait"
    )
    disk_low_script: str | None = setting(None, "disk_low_action script: the command that makes room")
    resume_from_checkpoint: str | None = setting("latest", 'checkpoint to go on from: latest, a path, or "" for none')
    report: bool = setting(
        True, "write report.html into output_dir while training, and show in it the first pictures that are trained"
    )
    max_bad_steps: int = setting(10, "stop after this many non-finite steps in a row", unit="steps", ge=1)
    rehearsal: Literal["auto", "on", "off"] = setting(
        "auto", "try the largest micro-batch and one validation picture before step 1; auto = on an accelerator"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to train")
    regularisation_target: Literal["data", "base"] = setting(
        "data", "what regularisation data teaches: its pictures, or (base) what the untrained model makes of them"
    )
    masked_loss_probability: float = setting(
        1.0, "share of samples whose segmentation mask is applied; other masks always are", ge=0, le=1
    )


class LaunchConfig(Section):
    num_processes: int | None = setting(
        None, "processes over all machines, one a GPU; unset = accelerate's file, else 1", unit="processes", ge=1
    )
    num_machines: int | None = setting(
        None, "machines that train together; unset = accelerate's file, else 1", unit="machines", ge=1
    )
    machine_rank: int | None = setting(None, "number of this machine, 0 = the first one", ge=0)
    main_process_ip: str | None = setting(None, "address of the first machine", min_length=1)
    main_process_port: int | None = setting(
        None, "port that the first machine listens at; unset = a free one, for one machine", ge=1, le=65535
    )
    accelerate_config: str | None = setting(
        None, "accelerate's config file; unset = its default, where that asks for several processes"
    )
    accelerate_extra_args: str | None = setting(None, 'further words for `accelerate launch`, such as "--gpu_ids 0,1"')

    @property
    def processes(self) -> int:
        """Processes over all machines."""
        return self.num_processes or 1


class EmaConfig(Section):
    use_ema: bool = setting(False, "keep an fp32 exponential moving average of the weights")
    ema_decay: float = setting(0.995, "decay, ramped as min(decay, (1+s)/(10+s))", ge=0, lt=1)
    ema_update_interval: int = setting(
        1, "optimizer steps between updates; the decay is compensated", unit="steps", ge=1
    )
    ema_warmup_steps: int = setting(
        0, "steps through which the average is the weights; then ema_decay at once, not ramped", unit="steps", ge=0
    )
    ema_device: Literal["accelerator", "cpu"] = setting(
        "accelerator", "where the average is kept and updated; cpu: in main memory, while the next step computes"
    )
    ema_cpu_only: bool = setting(False, "the same as ema_device cpu")
    ema_validation: Literal["comparison", "ema_only", "none"] = setting(
        "comparison", "weights that draw validation pictures: both, the average, or the raw ones (none)"
    )

    @property
    def is_on_cpu(self) -> bool:
        """Whether the average is kept in main memory."""
        return self.ema_device == "cpu" or self.ema_cpu_only


class ValidationConfig(Section):
    validation_prompt: str | None = setting(None, "main prompt drawn at each validation")
    user_prompt_library: str | None = setting(
        None, "path of a JSON file {nickname: prompt}; a prompt is a text, or an object with settings of its own"
    )
    validation_prompt_library: bool = setting(False, "draw the prompts of the built-in library too")
    validation_disable_unconditional: bool = setting(
        False, "do not draw the empty prompt, which is else drawn beside the others as `unconditional`"
    )
    validation_negative_prompt: str = setting("", "negative prompt of the guidance")
    validation_resolution: Resolutions = setting(
        (), "N or WxH px, comma separated; unset = the model's size", unit="px"
    )
    validation_guidance: float = setting(4.5, "classifier-free guidance scale", ge=0)
    validation_guidance_rescale: float = setting(
        0.0, "share by which guided predictions are brought back to the spread of unguided ones; 0 = off", ge=0, le=1
    )
    validation_num_inference_steps: int = setting(20, "steps of the sampler", unit="steps", ge=1)
    validation_noise_scheduler: Sampler = setting("dpm++", "the sampler")
    validation_seed: int | None = setting(None, "seed of the pictures; unset = seed")
    validation_randomize: bool = setting(
        False, "draw other seeds at each validation, from validation_seed and the step"
    )
    validation_step_interval: int = setting(
        500, "optimizer steps between validations; 0 = only start and end", unit="steps", ge=0
    )
    validation_epoch_interval: float | None = setting(
        None, "validate at the end of every so many epochs too; 0.5 = twice in each", unit="epochs", ge=0
    )
    validate_after_step: int = setting(0, "no validation on the way before this step", unit="steps", ge=0)
    validate_after_epoch: float = setting(
        0, "no validation on the way before so many epochs are done", unit="epochs", ge=0
    )
    validation_on_startup: bool = setting(False, "draw when a run starts or goes on, too")
    num_validation_images: int = setting(
        1, "pictures per prompt and resolution, seeds counted up", unit="pictures", ge=1
    )
    validation_image_format: Literal["png", "webp", "jpeg"] = setting("png", "kind of the pictures' files")
    validation_image_quality: int = setting(90, "quality of webp and jpeg files", ge=1, le=100)
    validation_preview: bool = setting(False, "show half-finished pictures while they are drawn")
    validation_preview_steps: int = setting(5, "sampler steps from one preview to the next", unit="steps", ge=1)
    validation_preview_decoder: str | None = setting(
        None, "weights of the TAESANA decoder: a file, or owner/repository/file of the hub; unset = a linear map "
        "fitted to the run's pictures"
    )  # fmt: skip
    validation_method: DrawingMethod = setting("simpletuner-local", "who draws")
    validation_external_script: str | None = setting(
        None, "command of validation_method external-script, with {placeholders}; no shell reads it"
    )
    validation_external_background: bool = setting(False, "do not wait for validation_external_script")
    vae_enable_tiling: bool = setting(
        False, "decode pictures above 512 px in tiles: drawing takes less memory; seams may show, training is the same"
    )
    validation_disable: bool = setting(False, "draw no validation pictures at all")
    disable_benchmark: bool = setting(False, "draw no pictures of the base model before step 1")


class EvaluationConfig(Section):
    eval_steps_interval: int | None = setting(
        None, "optimizer steps between measurements of the held-out loss; 0 = only start and end; unset = as "
        "validation_step_interval; none with eval_epoch_interval", unit="steps", ge=0
    )  # fmt: skip
    eval_epoch_interval: float | None = setting(
        None, "epochs between them, fractions too; unset = none, by steps alone", unit="epochs", ge=0
    )
    num_eval_images: int = setting(
        16, "held-out pictures that are measured of each dataset, always the same ones; 0 = all", unit="pictures", ge=0
    )
    eval_timesteps: int = setting(
        8, "noise levels at which each is measured, spread evenly over those that the run trains", unit="levels", ge=1
    )
    eval_dataset_pooling: bool = setting(False, "tell one number for all held-out pictures, not also one per dataset")
    eval_dataset_id: Ids | None = setting(
        None, "measure the held-out pictures of these datasets alone: ids, comma separated or a list; unset = of all"
    )
    eval_loss_disable: bool = setting(False, "measure no held-out loss; held-out pictures are still not trained on")
    alarms: bool = setting(
        True, "measure with it the gap to training pictures and the drift from the base model, and warn of them"
    )
    evaluation_type: Literal["none", "clip"] = setting(
        "none", "clip: score each validation picture by how well it fits its prompt"
    )
    pretrained_evaluation_model_name_or_path: str = setting(
        "openai/clip-vit-large-patch14-336", "hub id or folder of the CLIP model of evaluation_type clip", min_length=1
    )


Script = Annotated[str | None, BeforeValidator(parse_script)]


class WatchConfig(Section):
    report_to: Annotated[str, BeforeValidator(parse_trackers)] = setting(
        "none", "trackers of curves and pictures: wandb, tensorboard, all or none; several with commas"
    )
    tracker_project_name: str = setting("sana_tune", "project of the run in trackers", min_length=1)
    tracker_run_name: str | None = setting(
        None, "name of the run in trackers and messages; unset = the name of output_dir"
    )
    logging_dir: str | None = setting(None, "folder of the trackers' files; unset = logs in output_dir")
    webhook_config: Annotated[tuple[Webhook, ...] | None, BeforeValidator(parse_webhooks)] = setting(
        None, "where messages are sent: an object, a list of them, or the path of a JSON file"
    )
    push_to_hub: bool = setting(False, "upload the finished pipeline to the Hugging Face Hub")
    push_checkpoints_to_hub: bool = setting(False, "upload every checkpoint, to its folder checkpoint-<step>")
    push_to_hub_background: bool = setting(
        True, "upload checkpoints while training goes on; false: it waits for each of them"
    )
    push_optimizer_to_hub: bool = setting(False, "upload the optimizer's state with checkpoints: to resume elsewhere")
    hub_model_id: Annotated[str | None, BeforeValidator(parse_hub_id)] = setting(
        None, "repository: owner/name, or a name of your own; unset = tracker_project_name, else the run's name"
    )
    model_card_private: bool = setting(True, "make a new repository private")
    model_card_safe_for_work: bool = setting(False, "leave out the model card's tag not-for-all-audiences")
    model_card_note: str | None = setting(None, "text that stands first in the model card")
    modelspec_comment: Annotated[str | None, BeforeValidator(parse_comment)] = setting(
        None,
        "comment in the exported weights' metadata; may hold {current_step}, {current_epoch} and {timestamp}",
    )
    post_checkpoint_script: Script = setting(
        None, "command run after each checkpoint, without a shell; may hold {local_checkpoint_path}, {global_step} …"
    )
    post_upload_script: Script = setting(
        None, "command run after each upload, and at the end of a run that uploads nothing"
    )


class Config(Section):
    """What was asked, whole, in groups; the descriptions are their titles. multidatabackend.json stands beside it."""

    model: ModelConfig = Field(description="Model and precision")
    data: DataConfig = Field(description="Data")
    flow: FlowConfig = Field(description="Noise schedule")
    loss: LossConfig = Field(description="Loss")
    adapter: AdapterConfig = Field(description="Adapter (model_type lora)")
    rollout: RolloutConfig = Field(description="Scheduled sampling (rollouts)")
    optimizer: OptimizerConfig = Field(description="Optimizer and learning rate")
    train: TrainConfig = Field(description="Run, length and checkpoints")
    launch: LaunchConfig = Field(description="Processes and machines")
    ema: EmaConfig = Field(description="Average of the weights (EMA)")
    validation: ValidationConfig = Field(description="Validation pictures")
    evaluation: EvaluationConfig = Field(description="Held-out loss, alarms and CLIP score")
    watch: WatchConfig = Field(description="Trackers, webhooks and publishing")


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
