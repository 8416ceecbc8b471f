"""Rules about adapters: what cannot be combined with them, and settings that do nothing without one."""

from __future__ import annotations

from collections.abc import Callable

from sana_tune.config.lycoris import read_lycoris
from sana_tune.config.schema import Config
from sana_tune.errors import Problem, UserError


def lycoris_alone(config: Config) -> Problem | None:
    """Adapters are LyCORIS's."""
    kind = config.adapter.lora_type
    if config.model.model_type != "lora" or kind == "lycoris":
        return None
    what = f"adapters of Sana are made by LyCORIS; found {kind}"
    if kind == "standard":
        what = "a standard LoRA does not fit Sana: half of its weights are convolutions; found standard"
    return Problem("lora_type", what, 'use lora_type lycoris with a LoKr: {"algo": "lokr", …} in lycoris_config')


def adapter_is_fp32(config: Config) -> Problem | None:
    """An adapter is small: there is nothing to save by storing it in bf16."""
    if config.model.model_type != "lora" or config.model.weights_dtype != "bf16":
        return None
    what = "an adapter's own weights are always fp32; found bf16"
    return Problem("weights_dtype", what, "leave it out; base_model_precision makes the base smaller")


def adapter_is_not_compiled(config: Config) -> Problem | None:
    """LyCORIS changes the layers' forward."""
    if config.model.model_type != "lora" or config.model.dynamo_backend == "no":
        return None
    what = f"layers with an adapter are not compiled; found {config.model.dynamo_backend}"
    return Problem("dynamo_backend", what, "use dynamo_backend no")


def beginnings_fit(config: Config) -> Problem | None:
    """What a fresh adapter begins with must be told whole."""
    wanted = config.adapter
    if config.model.model_type != "lora":
        return None
    for key in ("init_lora_step", "init_lora_ema"):
        if vars(wanted)[key] is not None and wanted.init_lora is None:
            return Problem(key, "needs init_lora, the adapter to begin with", "add it, or leave this out")
    if wanted.init_lora_ema is not None and not config.ema.use_ema:
        return Problem("init_lora_ema", "needs use_ema: it is the average to begin with", "add use_ema true")
    if wanted.init_lora is not None and wanted.init_lokr_norm is not None:
        what = "an adapter begins with a file or with random numbers; found init_lora and init_lokr_norm"
        return Problem("init_lokr_norm", what, "keep one of them")
    steps, last = wanted.init_lora_step, config.train.max_train_steps
    if steps is not None and last is not None and 0 < last <= steps:
        what = f"must be below max_train_steps; found {steps} and {last}"
        return Problem("init_lora_step", what, "raise max_train_steps: it counts all steps, those before too")
    return None


def norm_is_of_lokr(config: Config) -> Problem | None:
    """Only LoKr and LoHa have factors that the norm of their product can be set by; DoRA needs whole weights."""
    if config.model.model_type != "lora":
        return None
    try:
        file = read_lycoris(config.adapter.lycoris_config)
    except UserError:  # told where the adapter is looked at
        return None
    where = config.adapter.lycoris_config
    algorithms = {file.algo, *(own.algo for own in file.module_algo_map.values() if own.algo)}
    if config.adapter.init_lokr_norm is not None and algorithms != {"lokr"}:
        what = f"is for LoKr; {where} has {', '.join(sorted(algorithms))}"
        return Problem("init_lokr_norm", what, "leave it out, or use algo lokr")
    if file.dora_wd and (config.model.base_model_precision != "no_change" or file.bypass_mode):
        what = "DoRA needs the base's weights as they are; found a quantised base, or bypass_mode"
        return Problem(f"{where}: dora_wd", what, "set it to false, or use base_model_precision no_change")
    if file.dora_wd and config.model.mixed_precision != "no":
        what = f"DoRA needs fp32 weights to add to; found mixed_precision {config.model.mixed_precision}"
        return Problem(f"{where}: dora_wd", what, "set it to false, or mixed_precision no")
    return None


ADAPTER_RULES: tuple[Callable[[Config], Problem | None], ...] = (
    lycoris_alone,
    adapter_is_fp32,
    adapter_is_not_compiled,
    beginnings_fit,
    norm_is_of_lokr,
)


def unused_adapter_settings(config: Config) -> list[str]:
    """Notes on settings of adapters in full-rank training."""
    if config.model.model_type == "lora":
        return []
    fields = type(config.adapter).model_fields
    given = [key for key, info in fields.items() if vars(config.adapter)[key] not in (info.default, "standard")]
    return [f"{key} has no effect: model_type full trains every weight" for key in given]
