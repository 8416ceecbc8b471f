"""Names a user can choose from, as plain tables. No torch: what they stand for is built elsewhere."""

from __future__ import annotations

OPTIMIZERS: dict[str, str] = {
    "optimi-adamw": "AdamW of torch-optimi, with Kahan summation for bf16 weights",
    "torch-adamw": "AdamW of torch.optim",
}

LR_SCHEDULERS: dict[str, str] = {
    "constant": "the learning rate throughout (with lr_warmup_steps above 0: constant_with_warmup)",
    "constant_with_warmup": "rises linearly for lr_warmup_steps, then constant",
    "linear": "warm-up, then falls linearly to 0 at the last step",
    "polynomial": "warm-up, then falls as (1 - t)^lr_power to lr_end at the last step",
    "cosine": "warm-up, then falls as half a cosine to lr_end at the last step",
}

# Names of the trainer that users come from, and why they are none here.
REFUSED_LR_SCHEDULERS: dict[str, str] = {
    "sine": "it swings on and on and does not end where the run ends; use cosine",
}

# lr_end of the schedules that use it, where the user names none. The others do not.
LR_END_DEFAULTS: dict[str, float] = {"polynomial": 4e-7, "cosine": 0.0}
LR_POWER_USED_BY: tuple[str, ...] = ("polynomial",)

CAPTION_STRATEGIES: dict[str, str] = {
    "filename": "the file's name without its ending, underscores as spaces",
    "textfile": "the .txt file of the same name; each non-empty line is a variant, one is drawn per visit",
    "instanceprompt": "instance_prompt, the same for every picture (a list: one is drawn per visit)",
    "parquet": "a column of the table that the block parquet names (.parquet, .jsonl, .json or .csv)",
    "csv": "a column of csv_file; for type csv",
    "huggingface": "a column of the dataset; for type huggingface",
}

# Betas, weight decay and eps where the user names none (contracts §3; NVIDIA trains AdamW with these).
OPTIMIZER_DEFAULTS: dict[str, dict[str, float]] = {
    "optimi-adamw": {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-6},
    "torch-adamw": {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8},
}
