"""Names a user can choose from, as plain tables. No torch: what they stand for is built elsewhere."""

from __future__ import annotations

from sana_tune.config.optimizers import OPTIMIZER_FACTS, own_settings

OPTIMIZERS: dict[str, str] = {name: facts.help for name, facts in OPTIMIZER_FACTS.items()}

LR_SCHEDULERS: dict[str, str] = {
    "constant": "the learning rate throughout (with lr_warmup_steps above 0: constant_with_warmup)",
    "constant_with_warmup": "rises linearly for lr_warmup_steps, then constant",
    "linear": "warm-up, then falls linearly to 0 at the last step",
    "polynomial": "warm-up, then falls as (1 - t)^lr_power to lr_end at the last step",
    "cosine": "warm-up, then falls as half a cosine to lr_end at the last step",
    "cosine_with_restarts": "warm-up, then lr_num_cycles times half a cosine, each from the peak to lr_end",
    "inverse_sqrt": "warm-up over w steps, then falls as the square root of w / step (without warm-up, w = 10,000)",
}

# Names of the trainer that users come from, and why they are none here.
REFUSED_LR_SCHEDULERS: dict[str, str] = {
    "sine": "it swings on and on and does not end where the run ends; use cosine",
}

# lr_end of the schedules that use it, where the user names none. The others do not.
LR_END_DEFAULTS: dict[str, float] = {"polynomial": 4e-7, "cosine": 0.0, "cosine_with_restarts": 0.0}
LR_POWER_USED_BY: tuple[str, ...] = ("polynomial",)
LR_CYCLES_USED_BY: tuple[str, ...] = ("cosine_with_restarts",)

NOISE_DISTRIBUTIONS: dict[str, str] = {
    "logit-normal": "sigmoid of a normal (flow_logit_mean, flow_logit_std): the middle most often, as NVIDIA trains",
    "uniform": "every level alike",
    "beta": "Beta(flow_beta_schedule_alpha, flow_beta_schedule_beta)",
    "mode": "SD3's mode sampling with heavy tails (flow_mode_scale)",
    "custom": "the levels of flow_custom_timesteps, each alike, without shift",
}

LOSS_TYPES: dict[str, str] = {
    "l2": "mean squared error",
    "huber": "pseudo-Huber, squared below the width huber_c and straight above: outliers count less",
    "smooth_l1": "the same divided by huber_c: near the absolute error for a small huber_c",
}

HUBER_SCHEDULES: dict[str, str] = {
    "snr": "huber_c at pure noise, rising to 1 at the picture as the square of its share",
    "exponential": "huber_c at pure noise, rising to 1 at the picture as huber_c^sigma",
    "constant": "huber_c at every noise level",
}

ROLLOUT_STRATEGIES: dict[str, str] = {
    "uniform": "every length is as likely",
    "biased_early": "long rollouts, begun early in the drawing, are likelier",
    "biased_late": "short rollouts, begun late, are likelier",
}

ROLLOUT_SAMPLERS: dict[str, str] = {
    "unipc": "UniPC, order 1 to 3",
    "dpm": "DPM-Solver++ (multistep), order 1 to 3: what draws the validation pictures",
    "euler": "Euler's method; the order is 1",
}

LOSS_WEIGHTINGS: dict[str, str] = {
    "none": "every noise level counts alike, as NVIDIA trains",
    "sigma_sqrt": "1 / sigma²: low noise counts most",
    "cosmap": "2 / (π (1 - 2 sigma + 2 sigma²)): the middle counts most",
}

# Names of diffusers' `weighting_scheme` that choose noise levels, and no weights.
REFUSED_LOSS_WEIGHTINGS: dict[str, str] = {
    "logit_normal": "it says which noise levels are drawn: use flow_distribution logit-normal",
    "mode": "it says which noise levels are drawn: use flow_distribution mode",
    "min_snr": "it is set by its gamma: use snr_gamma 5",
}

CHECKPOINTING_BACKENDS: dict[str, str] = {
    "torch": "a recomputed block keeps its input alone",
    "selective": "it keeps its matrix products too, and recomputes norms, gates and the depthwise convolution",
}

# Names of the trainer that users come from, and why they are none here.
REFUSED_CHECKPOINTING_BACKENDS: dict[str, str] = {
    "unsloth": "it moves the inputs of recomputed blocks to main memory, for Sana 0.11 GiB a picture of 1024 px: there "
    "is next to nothing to save; use torch",
    "unsloth-ffn": "Sana's feed-forward alone is no block; use torch",
    "torch-ffn": "Sana's feed-forward alone is no block; use torch, or selective to recompute less",
}

PRECISIONS: dict[str, str] = {
    "no_change": "the weights stay as they are",
    "nf4-bnb": "4 bits (NormalFloat4 in blocks of 64, their scales in 8 bits), by bitsandbytes: 0.52 bytes a weight",
    "int8-bnb": "8 bits and a scale for each row, by bitsandbytes: 1 byte a weight",
    "int8-torchao": "8 bits and a scale for each row, by torchao",
    "fp8-torchao": "8-bit floats (e4m3) and a scale for each row, by torchao",
}

_FOUR, _EIGHT, _FP8 = "use nf4-bnb", "use int8-bnb", "use fp8-torchao, or int8-bnb"
# Names of the trainer that users come from → the nearest that there is.
REFUSED_PRECISIONS: dict[str, str] = {
    "int8-quanto": _EIGHT, "int4-quanto": _FOUR, "int2-quanto": _FOUR, "fp8-quanto": _FP8, "fp8uz-quanto": _FP8,
    "int4-torchao": _FOUR, "fp4-bnb": _FOUR, "fp8-native": _FP8, "fp8-transformerengine": _FP8, "nf4-torchao": _FOUR,
    **{f"{kind}-sdnq": _EIGHT for kind in ("int8", "uint8", "int16", "uint16", "fp16", "int7", "int6", "uint6")},
    **{f"{kind}-sdnq": _FP8 for kind in ("fp8", "fp8-e4m3", "fp8-e5m2")},
    **{f"{kind}-sdnq": _FOUR for kind in ("int5", "uint5", "int4", "uint4", "int3", "uint3", "int2", "uint2", "fp4")},
}  # fmt: skip

SAMPLERS: dict[str, str] = {
    "dpm++": "DPM-Solver++ for flows, as the models are published",
    "euler": "Euler's steps along the flow, as NVIDIA samples while training; wants more steps",
    "unipc": "UniPC for flows: a predictor with a corrector",
}

# Samplers of models that predict noise, and why they are none for flows.
REFUSED_SAMPLERS: dict[str, str] = {
    "ddim": "it steps along the noise schedule of models that predict noise, which flows do not have; use dpm++",
    "ddpm": "it steps along the noise schedule of models that predict noise, which flows do not have; use dpm++",
    "euler-a": "it adds noise of a schedule that flows do not have; use euler",
    "perflow": "it needs a model distilled for it; use dpm++",
}

DRAWING_METHODS: dict[str, str] = {
    "simpletuner-local": "the run itself, with the weights as they are at that step",
    "external-script": "the command of validation_external_script, from the newest checkpoint",
}

DYNAMO_BACKENDS: dict[str, str] = {
    "no": "the blocks run as they are",
    "inductor": "torch.compile makes kernels of their own for them: the first steps take minutes, all others less time",
}

CAPTION_STRATEGIES: dict[str, str] = {
    "filename": "the file's name without its ending, underscores as spaces",
    "textfile": "the .txt file of the same name; each non-empty line is a variant, one is drawn per visit",
    "instanceprompt": "instance_prompt, the same for every picture (a list: one is drawn per visit)",
    "parquet": "a column of the table that the block parquet names (.parquet, .jsonl, .json or .csv)",
    "csv": "a column of csv_file; for type csv",
    "huggingface": "a column of the dataset; for type huggingface",
}

# Betas, weight decay and eps where the user names none (contracts §3; NVIDIA trains AdamW with those of optimi-adamw).
OPTIMIZER_DEFAULTS: dict[str, dict[str, float]] = {name: own_settings(name) for name in OPTIMIZERS}
