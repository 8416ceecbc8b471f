"""Keys of SimpleTuner's files that sana_tune does not have as settings of its own, and what becomes of each.

Nothing here is silent: a renamed key is read under its new name, a key without effect gets a note with the reason,
one that is not built yet is refused when it changes what is trained and noted when it only adds output
(contracts §2), and a refused one says what to use. A value that means "off" passes without a word.
"""

from __future__ import annotations

from typing import Any

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
    "base_model_precision": (),
    "caption_filter_list": (),
    "caption_shuffle": (),
    "checkpoint_epoch_interval": (),
    "conditioning_data": (),
    "disable_after_epoch_step": (),
    "dynamo_backend": (),
    "end_epoch": (),
    "end_step": (),
    "ema_cpu_only": (),
    "ema_device": ("cpu", "accelerator"),
    "ema_warmup_steps": (),
    "eval_dataset_id": (),
    "flow_beta_schedule_alpha": (2, 2.0),
    "flow_beta_schedule_beta": (2, 2.0),
    "flow_cubic_schedule_weights": (),
    "flow_custom_timesteps": (),
    "flow_sigmoid_scale": (1, 1.0, "1.0"),
    "flow_timesteps_mode": (),
    "flow_use_beta_schedule": (),
    "flow_use_uniform_schedule": (),
    "fuse_optimizer": (),
    "gradient_checkpointing_backend": ("torch",),
    "gradient_checkpointing_segment_stride": (),
    "gradient_precision": ("unmodified",),
    "huber_c": (),
    "huber_schedule": (),
    "init_lokr_norm": (),
    "init_lora": (),
    "init_lora_ema": (),
    "init_lora_step": (),
    "input_perturbation": (),
    "input_perturbation_steps": (),
    "layer_freeze_strategy": (),
    "loss_type": ("l2",),
    "lr_end": (),
    "lr_num_cycles": (1, "1"),
    "lr_power": (),
    "lr_scale": (),
    "lr_scale_sqrt": (),
    "masked_loss_probability": (1, 1.0),
    "max_num_samples": (),
    "max_upscale_threshold": (),
    "maximum_aspect_ratio": (),
    "minimum_aspect_ratio": (),
    "mixflow_enabled": (),
    "num_machines": (1, "1"),
    "num_processes": (1, "1"),
    "optimizer_config": (),
    "optimizer_cpu_offload_method": (),
    "optimizer_offload_gradients": (),
    "optimizer_release_gradients": (),
    "pretrained_gemma_model_name_or_path": (),
    "pretrained_transformer_model_name_or_path": (),
    "scheduled_sampling_max_step_offset": (),
    "start_epoch": (1, "1"),
    "start_step": (),
    "text_cache_disable": (),
    "text_embeds": (),
    "vae_cache_clear_each_epoch": (),
    "vae_cache_disable": (),
}

# Not built yet, and it only adds output or saves memory while caching: accepted with a loud note.
LATER_OUTPUT: dict[str, tuple[Any, ...]] = {
    "disk_low_threshold": (),
    "eval_epoch_interval": (),
    "eval_steps_interval": (),
    "evaluation_type": (),
    "post_checkpoint_script": (),
    "post_upload_script": (),
    "publishing_config": (),
    "push_checkpoints_to_hub": (),
    "push_to_hub": (),
    "report_to": (),
    "save_text_encoder": (),
    "strict_epoch_limit": (),
    "text_cache_ondemand": (),
    "text_encoder_1_precision": (),
    "tracker_project_name": (),
    "tracker_run_name": (),
    "vae_cache_ondemand": (),
    "vae_enable_slicing": (),
    "vae_enable_tiling": (),
    "validate_after_epoch": (),
    "validate_after_step": (),
    "validation_epoch_interval": (),
    "validation_guidance_rescale": (),
    "validation_image_format": ("png",),
    "validation_noise_scheduler": (),
    "validation_on_startup": (),
    "validation_preview": (),
    "validation_prompt_library": (),
    "validation_randomize": (),
    "webhook_config": (),
}

NO_EFFECT: dict[str, str] = {
    "allow_dataset_oversubscription": "small buckets are always filled, and the plan says which",
    "aspect_bucket_disable_rebuild": "buckets are computed from the plan and never rebuilt",
    "attention_mechanism": "Sana's attention is linear; the backends chosen here do not apply to it",
    "compress_disk_cache": "latents and embeddings are noise to a compressor; they are stored as plain safetensors",
    "dataloader_prefetch": "batches are always prefetched",
    "dataloader_prefetch_qlen": "batches are always prefetched, a few ahead",
    "disable_bucket_pruning": "no bucket is ever pruned",
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
    "metadata_backend": "",
    "timestep_sampling_offset": "Sana's recipe draws from the shifted logit-normal",
    "lora_type": "model_type full trains every weight",
    "lycoris_config": "model_type full trains every weight",
    "quantize_via": "nothing is quantised with model_type full",
    "base_model_default_dtype": "nothing is quantised with model_type full",
    "disable_validation": "it concerns no local picture dataset here",
    "validation_torch_compile": "validation draws with the model as it is trained",
    "webhook_reporting_interval": "it had no effect in the trainer either",
    "aspect_ratio_bucketing": "buckets follow from the pictures",
}

REFUSED: dict[str, str] = {
    "delete_unwanted_images": "nothing is ever deleted from your folders; the ledger lists what was left out",
    "delete_problematic_images": "nothing is ever deleted from your folders; the ledger lists what could not be read",
    "delete_nsfw_images": "nothing is ever deleted from your folders",
    "pretrained_vae_model_name_or_path": "Sana's VAE comes with the model",
}

# Values of our own keys that users have and that come in a later version.
LATER_VALUES: dict[str, dict[str, str]] = {
    "model_type": {"lora": "LoKr (lora_type lycoris) is not built yet; use full"},
    "mixed_precision": {"fp16": "use bf16", "fp8": "use bf16"},
    "crop_style": {"random": "use center", "corner": "use center", "face": "use center"},
    "crop_aspect": {"preserve": "use crop: false or square", "closest": "use square", "random": "use square"},
    "resolution_type": {"pixel": "use pixel_area", "area": "use pixel_area with the side in px"},
    "type": {"aws": "use local", "csv": "use local", "huggingface": "use local", "webshart": "use local"},
    "metadata_backend": {"parquet": "use discovery", "huggingface": "use discovery"},
    "caption_strategy": {"parquet": "use textfile", "csv": "use textfile", "huggingface": "use textfile"},
    "small_buckets": {"merge": "use fill", "drop": "use fill", "error": "use fill"},
    "dataset_type": {"conditioning": "masks are not built yet", "eval": "held-out loss is not built yet"},
}

# Spellings that mean the same value.
SAME_VALUE: dict[str, dict[str, str]] = {
    "crop_style": {"centre": "center"},
    "caption_strategy": {"instance_prompt": "instanceprompt"},
    "metadata_backend": {"json": "discovery"},
    "lr_scheduler": {"cosine_with_warmup": "cosine"},
}


def known_foreign_keys() -> frozenset[str]:
    """Every key that is not ours and yet not unknown."""
    return frozenset({*RENAMED, *LATER_TRAINING, *LATER_OUTPUT, *NO_EFFECT, *REFUSED})


def is_off(key: str, value: Any) -> bool:
    """Whether `value` of a foreign key asks for nothing."""
    own = LATER_TRAINING.get(key, ()) + LATER_OUTPUT.get(key, ())
    return any(type(value) is type(off) and value == off for off in (*OFF, *own)) or value in ([], {})
