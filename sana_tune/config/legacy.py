"""Keys of SimpleTuner's files that sana_tune does not have as settings of its own, and what becomes of each.

Nothing here is silent: a renamed key is read under its new name, a key without effect gets a note with the reason,
one that is not built yet is refused when it changes what is trained and noted when it only adds output
(contracts §2), and a refused one says what to use. A value that means "off" passes without a word.
"""

from __future__ import annotations

from typing import Any

from sana_tune.config.choices import REFUSED_LR_SCHEDULERS, REFUSED_PRECISIONS
from sana_tune.config.optimizers import REFUSED_OPTIMIZERS, SAME_OPTIMIZER

RENAMED: dict[str, str] = {
    "validation_steps": "validation_step_interval",
    "checkpointing_steps": "checkpoint_step_interval",
    "save_total_limit": "checkpoints_total_limit",
    "adam_beta1": "optimizer_beta1",
    "adam_beta2": "optimizer_beta2",
    "adam_weight_decay": "optimizer_weight_decay",
    "adam_epsilon": "optimizer_epsilon",
    "is_regularization_data": "is_regularisation_data",
    "disable": "disabled",
}

# Off values that everyone means alike; LATER adds each key's own.
OFF: tuple[Any, ...] = (None, "", False, "false", "False", "none", "None", "no", "no_change", 0, "0", 0.0)

# Not built yet, and it changes what is trained: refused unless off. The values beside a key also mean "off".
LATER_TRAINING: dict[str, tuple[Any, ...]] = {
    "fuse_optimizer": (),
    "gradient_precision": ("unmodified",),
    "layer_freeze_strategy": (),
    "mixflow_enabled": (),
    "optimizer_cpu_offload_method": (),
    "optimizer_offload_gradients": (),
    "pretrained_gemma_model_name_or_path": (),
    "pretrained_transformer_model_name_or_path": (),
    "gradient_checkpointing_offload_attention": (),
    "pretrained_transformer_subfolder": ("transformer",),
    "slider_strength": (),
    "vae_cache_preprocess": (
        True,
        "true",
    ),
}

# Not built yet, and it only adds output or saves memory while caching: accepted with a loud note.
LATER_OUTPUT: dict[str, tuple[Any, ...]] = {
    "save_text_encoder": (),
    "strict_epoch_limit": (),
    "vae_enable_slicing": (),
    "enable_watermark": (),
}

NO_EFFECT: dict[str, str] = {
    "allow_dataset_oversubscription": "small_buckets says what becomes of small buckets, and they never stop a run",
    "aspect_bucket_disable_rebuild": "buckets are computed from the plan and never rebuilt",
    "attention_mechanism": "Sana's attention is linear; the backends chosen here do not apply to it",
    "dataloader_prefetch": "batches are always prefetched",
    "dataloader_prefetch_qlen": "batches are always prefetched, a few ahead",
    "disable_bucket_pruning": "no bucket is pruned unless small_buckets says drop",
    "disable_tf32": "the model computes in bf16 or fp32 as mixed_precision says",
    "enable_multiprocessing": "pictures are read by threads",
    "hash_filenames": "caches are keyed by content, not by name",
    "i_know_what_i_am_doing": "nothing here needs it",
    "ignore_final_epochs": "max_train_steps and num_train_epochs decide; the first reached stops",
    "image_processing_batch_size": "pictures are read by threads",
    "keep_vae_loaded": "the VAE is freed before training and loaded for each validation",
    "max_workers": "pictures are read by as many threads as there are cores",
    "metadata_update_interval": "sizes are remembered as soon as they are read",
    "override_dataset_config": "the config file always wins here",
    "preserve_data_backend_cache": "what was read is remembered by path, size and time of change",
    "read_batch_size": "pictures are read by threads",
    "scan_for_errors": "every picture is checked when it is read",
    "seed_for_each_device": "randomness comes from the position in the run, not from a device",
    "set_grads_to_none": "gradients are always set to none",
    "skip_file_discovery": "nothing is read twice as it is; changed files are found by size and time",
    "tokenizer_max_length": "Sana reads 300 tokens",
    "vae_dtype": "the VAE encodes in fp32",
    "aspect_bucket_worker_count": "pictures are read by threads",
    "torch_num_threads": "set OMP_NUM_THREADS for this",
    "timestep_sampling_offset": "Sana's recipe draws from the shifted logit-normal",
    "disable_validation": "it concerns no local picture dataset here",
    "validation_torch_compile": "validation draws with the model as it is trained",
    "webhook_reporting_interval": "it had no effect in the trainer either",
    "aspect_ratio_bucketing": "buckets follow from the pictures",
    "accelerator_cache_clear_interval": "memory is handed back after caching and after drawing",
    "aspect_ratio_bucket_max": "buckets follow from the pictures",
    "aspect_ratio_bucket_min": "buckets follow from the pictures",
    "checkpointing_use_tempdir": "checkpoints are always written aside and renamed",
    "conditioning_multidataset_sampling": "there is one conditioning set at most",
    "debug_aspect_buckets": "the plan shows the buckets, log.txt the details",
    "debug_dataset_loader": "log.txt holds the details",
    "delete_model_after_load": "only the needed variant is downloaded, and kept",
    "dynamo_mode": "blocks are compiled in the default mode: the others record CUDA graphs of one size each",
    "ema_foreach_disable": "the average is always updated in one go",
    "ez_model_type": "it had no effect either",
    "find_unused_parameters": "every weight of Sana gets a gradient",
    "ignore_epochs": "the plan decides",
    "ignore_missing_files": "the folder is listed afresh at each start",
    "lora_alpha": "it is for lora_type standard; lycoris_config describes the adapter",
    "lora_dropout": "it is for lora_type standard; lycoris_config describes the adapter",
    "lora_format": "it is for lora_type standard; lycoris_config describes the adapter",
    "lora_init_type": "it is for lora_type standard; lycoris_config describes the adapter",
    "lora_rank": "it is for lora_type standard; lycoris_config describes the adapter",
    "peft_lora_target_modules": "it is for lora_type standard; lycoris_config describes the adapter",
    "use_dora": "it is for lora_type standard; lycoris_config describes the adapter",
    "mixflow_gamma": "it belongs to mixflow_enabled, which is off",
    "offload_during_save": "checkpoints are written from the CPU",
    "offload_during_startup": "encoders are freed before the transformer is loaded",
    "prediction_type": "Sana is trained by flow matching",
    "print_filenames": "ledger.json lists the pictures that are left out",
    "print_sampler_statistics": "the order is a function of the seed; there is no sampler",
    "tracker_image_layout": "trackers get each picture under the name of its prompt",
    "trust_remote_code": "no code of a repository is ever run",
    "vae_cache_scan_behaviour": "caches are keyed by content",
    "snr_weight": "a constant factor on the loss, which AdamW divides out again: change learning_rate",
    "noise_offset": "it belongs to offset_noise, which is off",
    "timestep_bias_begin": "it belongs to timestep_bias_strategy, which is off",
    "timestep_bias_end": "it belongs to timestep_bias_strategy, which is off",
    "timestep_bias_multiplier": "it belongs to timestep_bias_strategy, which is off",
    "timestep_bias_portion": "it belongs to timestep_bias_strategy, which is off",
    "validation_adapter_mode": "it belongs to validation_adapter_path, which cannot be used",
    "validation_adapter_name": "it belongs to validation_adapter_path, which cannot be used",
    "validation_adapter_strength": "it belongs to validation_adapter_path, which cannot be used",
    "validation_multigpu": "pictures are shared out over the processes there are",
    "validation_stitch_input_location": "it belongs to validation_input, which cannot be used",
    "validation_seed_source": "noise is always drawn on the CPU, so that pictures are the same on every machine",
}

_NO_IMG2IMG = "Sana draws from text alone, and there is nothing to put a picture in; an eval dataset compares pictures"
_NO_ADAPTERS = "pictures show the weights that are trained; draw with other adapters from the exported pipeline"

REFUSED: dict[str, str] = {
    "validation_using_datasets": _NO_IMG2IMG,
    "validation_input": _NO_IMG2IMG,
    "validation_adapter_path": _NO_ADAPTERS,
    "validation_adapter_config": _NO_ADAPTERS,
    "deepspeed_config": "there is no DeepSpeed here: FSDP2 shards weights, gradients and optimizer states alike; write "
    "`distributed_type: FSDP` and `fsdp_version: 2` into accelerate's file (docs/multi-gpu.md)",
    "disable_after_epoch_step": "use end_step, which ends a dataset at a step; weights do not fade here",
    "delete_unwanted_images": "nothing is ever deleted from your folders; `sana_tune check --left-out` lists the files "
    "that are left out, one path a line",
    "delete_problematic_images": "nothing is ever deleted from your folders; `sana_tune check --left-out --images` "
    "reads every picture and lists the files that are left out, one path a line",
    "delete_nsfw_images": "nothing is ever deleted from your folders, and there is no such classifier here; "
    "`sana_tune check --left-out` lists the files that are left out for other reasons",
    "pretrained_vae_model_name_or_path": "Sana's VAE comes with the model",
    "delete_invalid_checkpoints": "nothing is deleted for being incomplete: such checkpoints are passed over, and said",
    "publishing_config": "push_to_hub publishes to the Hugging Face Hub; for a bucket name a program that copies in "
    "post_checkpoint_script, such as: aws s3 sync {local_checkpoint_path} s3://bucket/run/{global_step}",
    "quantization_config": "base_model_precision says how the base is quantised, and quantize_via where",
    "enable_nsfw_check": "there is no such classifier here; filter the pictures before training",
    "model_flavour": "name the repository: pretrained_model_name_or_path",
    "flow_cubic_schedule_weights": "use flow_distribution beta, or flow_custom_timesteps with levels that repeat",
    "flow_timesteps_mode": "use flow_distribution",
    "offset_noise": "flows begin drawing at pure noise without an offset, so it would train what is never drawn; "
    "a raised flow_schedule_shift trains the composition more",
    "timestep_bias_strategy": "use flow_distribution and flow_schedule_shift: they say which noise levels are drawn",
}

# Values of our own keys that users have and that come in a later version.
LATER_VALUES: dict[str, dict[str, str]] = {
    "mixed_precision": {"fp8": "use bf16"},
    "crop_style": {"face": "use center, or random"},
    "conditioning_type": dict.fromkeys(
        ("controlnet", "reference_strict", "reference_loose"), "use mask, or segmentation"
    ),
}

# Values of our own keys that users have and that are no plan of ours, with what to use instead.
REFUSED_VALUES: dict[str, dict[str, str]] = {
    "type": {
        "webshart": "its shards are WebDataset tar files; unpack them into a folder (type local) or bucket (type aws)",
        "memory": "it holds nothing that could be read; caches are folders (cache_dir_vae, cache_dir)",
    },
    "caption_strategy": {"webshart": "unpack the shards into a folder, and use textfile or parquet"},
    "metadata_backend": {"webshart": "unpack the shards into a folder, and use discovery or parquet"},
    "dataset_type": {
        "video": "Sana makes still pictures: take frames out of the videos, and use dataset_type image",
        "audio": "Sana makes pictures, and has no use for sound: remove the entry",
        "caption": "a picture's captions are part of its dataset (caption_strategy): remove the entry",
        "conditioning_image_embeds": "Sana takes no pictures as a condition: remove the entry",
        "distillation_cache": "there is no distillation here: remove the entry",
    },
    "lr_scheduler": REFUSED_LR_SCHEDULERS,
    "optimizer": dict(REFUSED_OPTIMIZERS),
    "base_model_precision": dict(REFUSED_PRECISIONS),
    "text_encoder_1_precision": dict(REFUSED_PRECISIONS),
    "quantize_via": {"pipeline": "use cpu, which quantises layer by layer too; the whole is never on the device"},
}

# Entries of multidatabackend.json that are passed over with a note.
IGNORED_DATASET_TYPES: dict[str, str] = {
    "image_embeds": "latents need no entry of their own; each dataset's cache_dir_vae says where they go",
}

# Spellings that mean the same value.
SAME_VALUE: dict[str, dict[str, str]] = {
    "validation_image_format": {"jpg": "jpeg"},
    "validation_noise_scheduler": {
        "flow-match-euler": "euler",
        "flow_match_euler": "euler",
        "flow-euler": "euler",
        "dpm": "dpm++",
        "dpmsolver++": "dpm++",
        "flow_dpm-solver": "dpm++",
    },
    "flow_distribution": {"logit_normal": "logit-normal", "custom_timesteps": "custom"},
    "loss_type": {"mse": "l2"},
    "report_to": {"simpletuner": "none"},  # metrics.jsonl and the pictures are in output_dir anyway
    "crop_style": {"centre": "center"},
    "caption_strategy": {"instance_prompt": "instanceprompt"},
    "metadata_backend": {"json": "discovery"},
    "lr_scheduler": {"cosine_with_warmup": "cosine"},
    "optimizer": dict(SAME_OPTIMIZER),
}


def known_foreign_keys() -> frozenset[str]:
    """Every key that is not ours and yet not unknown."""
    return frozenset({*RENAMED, *LATER_TRAINING, *LATER_OUTPUT, *NO_EFFECT, *REFUSED})


def is_off(key: str, value: Any) -> bool:
    """Whether `value` of a foreign key asks for nothing."""
    own = LATER_TRAINING.get(key, ()) + LATER_OUTPUT.get(key, ())
    return any(type(value) is type(off) and value == off for off in (*OFF, *own)) or value in ([], {})
