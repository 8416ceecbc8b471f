"""The LoKr adapter that the wizard offers: its file, the settings that fit a device, what is said of it. Pure.

The larger Kronecker factor of each layer is whole; attention and feed-forward are adapted, as in the published recipes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from sana_tune import memory
from sana_tune.config.lycoris import lycoris_of
from sana_tune.errors import Problem, UserError
from sana_tune.memory import Load
from sana_tune.model.adapted import adapted
from sana_tune.model.facts import ModelFacts, estimated_bytes

# As config/lycoris_config.json.example.
CONTENT: dict[str, Any] = {
    "algo": "lokr",
    "multiplier": 1.0,
    "full_matrix": True,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 16,
    "bypass_mode": False,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
    },
}
FILE = lycoris_of(CONTENT, "lycoris_config.json")
LEARNING_RATE = 1e-4  # for AdamW
TINY_LEARNING_RATE = 4e-3  # nano learns a new figure in 300 steps with it, and with 1e-4 nothing that is seen


def recommend(facts: ModelFacts, device_bytes: int, side_px: int, *, on_cpu: bool) -> dict[str, Any]:
    """Settings of a LoKr that fit a device with a little to spare: the base unquantised for as long as anything fits.

    Raises UserError when nothing fits, with the smallest need.
    """
    room, smallest = device_bytes * (1 - memory.SPARE), None
    for settings in _candidates(facts, on_cpu):
        load = Load(side_px, side_px, settings["train_batch_size"])
        config = memory.changed(memory.default_config(), settings)
        need = memory.memory_needed(config, facts, [load], on_cpu=on_cpu, adapter=FILE).total_bytes
        if need <= room:
            return settings
        smallest = need if smallest is None else min(smallest, need)
    base = "" if on_cpu else ", its base in nf4,"
    what = (
        f"a LoKr on {facts.name}{base} with pictures of {side_px}x{side_px} px needs about "
        f"{(smallest or 0) / 1e9:.1f} GB; the device has {device_bytes / 1e9:.1f} GB, of which "
        f"{100 * memory.SPARE:.0f} % are left free"
    )
    raise UserError(Problem("memory", what, "take a smaller model or smaller pictures, or a device with more memory"))


def while_caching(facts: ModelFacts, device_bytes: int, side_px: int) -> dict[str, Any]:
    """What makes the caches' filling fit: fewer pictures at a time, then a text encoder in 4 bits."""
    room = device_bytes * (1 - memory.SPARE)
    sizes, usual = estimated_bytes(facts, "bf16"), memory.default_config().data.vae_batch_size
    found: dict[str, Any] = {}
    batches = [size for size in range(usual, 0, -1) if usual % size == 0]
    needs = {size: memory.caching_needed(0, sizes["vae"], [Load(side_px, side_px, size)]) for size in batches}
    batch = next((size for size in batches if needs[size].pictures_bytes <= room), 1)
    if batch != usual:
        found["vae_batch_size"] = batch
    if memory.caching_needed(sizes["text_encoder"], 0, []).text_bytes > room:
        found["text_encoder_1_precision"] = "nf4-bnb"
    return found


def _candidates(facts: ModelFacts, on_cpu: bool) -> Iterator[dict[str, Any]]:
    """All settings that could be recommended, the best first."""
    in_bf16 = facts.bf16_safe and not on_cpu
    batches = [size for size in range(memory.TARGET_BATCH, 0, -1) if memory.TARGET_BATCH % size == 0]
    for precision in ("no_change",) if on_cpu else ("no_change", "nf4-bnb"):
        exact = {} if in_bf16 or precision == "no_change" else {"base_model_default_dtype": "fp32"}
        for average in (True, False):
            for batch in batches:
                for interval in (0, *(n for n in (4, 3, 2, 1) if n <= facts.layers)):
                    yield {
                        "model_type": "lora",
                        "base_model_precision": precision,
                        **exact,
                        "train_batch_size": batch,
                        "gradient_accumulation_steps": memory.TARGET_BATCH // batch,
                        "gradient_checkpointing": interval > 0,
                        "gradient_checkpointing_interval": max(1, interval),
                        "mixed_precision": "bf16" if in_bf16 else "no",
                        "optimizer": "optimi-adamw",
                        "use_ema": average,
                    }


# ---- in words ----


def told(facts: ModelFacts) -> list[str]:
    """How large the adapter is."""
    return [f"LoKr on {adapted(facts.transformer, FILE)}."]


def missing_library() -> list[str]:
    """What must be installed first."""
    if importlib.util.find_spec("lycoris") is not None:
        return []
    return ["It needs a library that is not installed: pip install 'sana_tune[lokr]', or pip install lycoris-lora."]


def precision_in_words(settings: Mapping[str, Any]) -> str:
    """How the frozen base is held and what is computed in."""
    computed = "bf16" if settings["mixed_precision"] == "bf16" else "fp32"
    if settings["base_model_precision"] == "no_change":
        return f"the frozen model in {computed}, the LoKr in fp32"
    held = "the frozen model packed in 4 bits (nf4), since it does not fit otherwise"
    return f"{held}; computed in {computed}, the LoKr in fp32"


def caching_in_words(settings: Mapping[str, Any]) -> list[str]:
    """What is changed so that the caches' filling fits."""
    changes = []
    if "text_encoder_1_precision" in settings:
        changes.append("the text encoder packed in 4 bits (nf4)")
    if (count := settings.get("vae_batch_size")) is not None:
        changes.append(f"{count} {'picture' if count == 1 else 'pictures'} at a time")
    return [f"caching: {', '.join(changes)}: more does not fit"] if changes else []
