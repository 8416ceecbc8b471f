"""What must be known of a Sana model before a weight is loaded: sizes, factors, shift, licence. Torch-free.

Read from the JSON configs of a model folder, or, for the published repositories, from a table, so that a plan
can be made before anything is downloaded. Sizes after Sana (arXiv 2410.10629) and SANA-1.5 (2501.18427).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sana_tune.errors import Problem, UserError
from sana_tune.model.layout import CONFIGS, read_json
from sana_tune.model.packing import Matrix

WEIGHTS_LICENCE = (
    "code Apache-2.0; weights: NVIDIA's non-commercial licence, text encoder: Google's Gemma terms. "
    "What you train from them falls under both"
)
NANO_LICENCE = "Apache-2.0 (trained from nothing by sana_tune itself)"
UNKNOWN_LICENCE = "unknown to sana_tune: look at the model's own page; Sana's published weights are non-commercial"
DEFAULT_SHIFT = 3.0
SIDE_MULTIPLE_PX = 32  # of pictures that diffusers' pipeline draws
# Files of the published models: Gemma-2-2B in bf16, DC-AE f32c32 in fp32, Gemma's tokenizer.
TEXT_ENCODER_BYTES, VAE_BYTES, TOKENIZER_BYTES = 5_230_000_000, 1_250_000_000, 39_000_000


@dataclass(frozen=True)
class ModelFacts:
    """A Sana model in numbers.

    name: as the user named it. folder: where it lies, None before the download.
    vae_factor: px per latent position, each side. latent_channels: C of a latent [C, h, w].
    caption_dim: D of a caption's embedding [T, D]. sample_size: native latent positions per side.
    flow_shift and where it was found. width: channels of a token. parameters: of the transformer.
    matrices: rows × columns of those of one block that a quantised base packs.
    bf16_safe: False for weights known to break in bf16. notes: what the user should be told.
    scheduler: the scheduler's config as stored. transformer: the transformer's.
    """

    name: str
    folder: Path | None
    vae_factor: int
    latent_channels: int
    caption_dim: int
    sample_size: int
    flow_shift: float
    flow_shift_origin: str
    parameters: int
    qk_norm: str | None
    layers: int
    width: int
    interpolation_scale: float | None
    scaling_factor: float
    licence: str
    bf16_safe: bool = True
    notes: tuple[str, ...] = ()
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    transformer: Mapping[str, Any] = field(default_factory=dict)
    matrices: tuple[Matrix, ...] = ()

    @property
    def native_px(self) -> int:
        """The side of the square picture the model was made for, px."""
        return self.sample_size * self.vae_factor

    @property
    def native_tokens(self) -> int:
        """Latent positions of that picture; `shift.auto_shift` keeps the recipe's shift there."""
        return self.sample_size**2


def from_folder(folder: Path, name: str | None = None) -> ModelFacts:
    """Facts of a model in diffusers layout. Raises UserError for missing files and for a model that is not Sana."""
    transformer = read_json(folder / CONFIGS["transformer"])
    vae = read_json(folder / CONFIGS["vae"])
    scheduler = read_json(folder / CONFIGS["scheduler"])
    _check_kinds(folder, transformer, vae)
    where = name or str(folder)
    listed = KNOWN.get(where)
    return _facts(where, folder, transformer, vae, scheduler, listed)


def known(name: str) -> ModelFacts | None:
    """Facts of a published repository by its hub id, without reading anything; None for others."""
    entry = KNOWN.get(name)
    if entry is None:
        return None
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", "flow_shift": entry.flow_shift}
    return _facts(name, None, entry.transformer, _VAE, scheduler, entry)


def known_transformer(name: str) -> dict[str, Any]:
    """The transformer's config of a published repository. Raises KeyError for others."""
    return {**_TRANSFORMER_DEFAULTS, **KNOWN[name].transformer}


def assumed(name: str) -> ModelFacts:
    """Stand-in facts of a hub model that is neither here nor published by NVIDIA: the 1.6B model's, and says so."""
    note = f"{name} is not known before it is downloaded: planned as if it were the 1.6B model for 1024 px"
    facts = _facts(name, None, {}, _VAE, {"flow_shift": DEFAULT_SHIFT}, None)
    return replace(facts, flow_shift_origin="assumed", notes=(note,))


def estimated_bytes(facts: ModelFacts, dtype: str = "fp32") -> dict[str, int]:
    """About how large the files of a published model are, by component: what is downloaded to train it in a dtype.

    The transformer by its parameters, in the dtype of the trained weights; Gemma-2-2B in bf16, DC-AE in fp32.
    """
    return {
        "transformer": facts.parameters * (2 if dtype == "bf16" else 4),
        "text_encoder": TEXT_ENCODER_BYTES,
        "vae": VAE_BYTES,
        "tokenizer": TOKENIZER_BYTES,
    }


def read_shift(scheduler: Mapping[str, Any]) -> tuple[float, str, str | None]:
    """Flow shift of a scheduler config: value, the key it stood under, and a warning or None.

    `flow_shift` is DPM-Solver's key, `shift` FlowMatchEuler's; a trainer that reads one alone trains at 1.0.
    """
    for key in ("flow_shift", "shift"):
        value = scheduler.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            return float(value), f"scheduler_config.json: {key}", None
    warning = (
        f"the model's scheduler config names no flow shift (neither flow_shift nor shift): {DEFAULT_SHIFT:g} is "
        "used, what NVIDIA trained with up to 2K; set flow_schedule_shift if your model differs"
    )
    return DEFAULT_SHIFT, "default", warning


def check_bf16(facts: ModelFacts) -> Problem | None:
    """What is wrong with computing in bf16 with a model: the 1.0 weights without BF16 in their name break in it."""
    if facts.bf16_safe:
        return None
    replacement = facts.name.replace("px_diffusers", "px_BF16_diffusers")
    if replacement not in KNOWN:
        replacement = next((name for name in KNOWN if "_1600M_1024px_BF16" in name and "_1600M_" in facts.name), None)
    use = f"use {replacement}, or " if replacement else "NVIDIA published no BF16 weights of this size: "
    what = f"the weights of {facts.name} break in bf16 (black or noisy pictures)"
    return Problem("pretrained_model_name_or_path", what, f"{use}set mixed_precision no, or fp16 on a GPU")


def check_size(width: int, height: int, vae_factor: int, where: str = "validation_resolution") -> Problem | None:
    """What is wrong with a picture's size: diffusers' pipeline draws multiples of 32 px, the VAE of its factor."""
    multiple = max(SIDE_MULTIPLE_PX, vae_factor)
    if width % multiple == 0 and height % multiple == 0:
        return None
    nearest = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
    return Problem(
        where,
        f"pictures are drawn in multiples of {multiple} px; found {width}x{height}",
        f"use {nearest[0]}x{nearest[1]}",
    )


def count_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a SanaTransformer2DModel by its config, without building it."""
    full = {**_TRANSFORMER_DEFAULTS, **config}
    width = full["num_attention_heads"] * full["attention_head_dim"]
    patch = full["patch_size"] ** 2
    out_channels = full["out_channels"] or full["in_channels"]
    embed = _linear(full["in_channels"] * patch, width)
    time = _linear(256, width) + _linear(width, width) + _linear(width, 6 * width)
    if full["guidance_embeds"]:
        time += _linear(256, width) + _linear(width, width)
    caption = _linear(full["caption_channels"], width) + _linear(width, width) + width
    end = 2 * width + _linear(width, patch * out_channels)
    return embed + time + caption + full["num_layers"] * _block_parameters(full, width) + end


def with_defaults(transformer: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer's config with diffusers' defaults for what it leaves out."""
    return {**_TRANSFORMER_DEFAULTS, **transformer}


def _block_parameters(full: Mapping[str, Any], width: int) -> int:
    cross = full["num_cross_attention_heads"] * full["cross_attention_head_dim"]
    hidden = int(full["mlp_ratio"] * width)
    self_attention = 3 * _linear(width, width, bias=full["attention_bias"]) + _linear(width, width)
    cross_attention = _linear(width, cross) + 2 * _linear(full["cross_attention_dim"], cross) + _linear(cross, width)
    norms = 2 * width + 2 * cross if full["qk_norm"] else 0
    norms += 2 * width if full["norm_elementwise_affine"] else 0
    mix = _linear(width, 2 * hidden) + _linear(9, 2 * hidden) + _linear(hidden, width, bias=False)
    return self_attention + cross_attention + norms + mix + 6 * width


def block_matrices(config: Mapping[str, Any]) -> tuple[Matrix, ...]:
    """Rows × columns of the matrices of a block: both attentions, and the 1×1 convolutions of the feed-forward."""
    full = {**_TRANSFORMER_DEFAULTS, **config}
    width, text = full["num_attention_heads"] * full["attention_head_dim"], full["cross_attention_dim"]
    cross = full["num_cross_attention_heads"] * full["cross_attention_head_dim"]
    hidden = int(full["mlp_ratio"] * width)
    attention = (*[(width, width)] * 4, (cross, width), (cross, text), (cross, text), (width, cross))
    return *attention, (2 * hidden, width), (width, hidden)


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _facts(
    name: str,
    folder: Path | None,
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    listed: Known | None,
) -> ModelFacts:
    full = {**_TRANSFORMER_DEFAULTS, **transformer}
    shift, origin, warning = read_shift(scheduler)
    if folder is None:
        origin = "as published"
    bf16_safe = listed is None or listed.bf16_safe
    notes = [warning] if warning else []
    default_licence = NANO_LICENCE if name == "nano" else UNKNOWN_LICENCE
    return ModelFacts(
        name=name,
        folder=folder,
        vae_factor=2 ** (len(vae["encoder_block_out_channels"]) - 1),
        latent_channels=full["in_channels"],
        caption_dim=full["caption_channels"],
        sample_size=full["sample_size"],
        flow_shift=shift,
        flow_shift_origin=origin,
        parameters=count_parameters(full),
        qk_norm=full["qk_norm"],
        layers=full["num_layers"],
        width=full["num_attention_heads"] * full["attention_head_dim"],
        interpolation_scale=full["interpolation_scale"],
        scaling_factor=vae["scaling_factor"],
        licence=WEIGHTS_LICENCE if listed else default_licence,
        bf16_safe=bf16_safe,
        notes=tuple(notes),
        scheduler=dict(scheduler),
        transformer=dict(transformer),
        matrices=block_matrices(full),
    )


def _check_kinds(folder: Path, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    problems = []
    for part, config, kind in (
        ("transformer", transformer, "SanaTransformer2DModel"),
        ("vae", vae, "AutoencoderDC"),
    ):
        if config.get("_class_name") != kind:
            where, found = str(folder / CONFIGS[part]), config.get("_class_name")
            problems.append(Problem(where, f"a Sana model's {part} is a {kind}; found {found}", "name a Sana model"))
    for key in ("encoder_block_out_channels", "scaling_factor"):
        if not problems and key not in vae:
            problems.append(Problem(str(folder / CONFIGS["vae"]), f"the key {key} is missing", "copy the model again"))
    if transformer.get("guidance_embeds") or transformer.get("timestep_scale", 1.0) != 1.0:
        problems.append(
            Problem(
                str(folder / CONFIGS["transformer"]),
                "this is a distilled model (Sana-Sprint: guidance embedding or timestep_scale), which this recipe "
                "would undo",
                "fine-tune the model it was distilled from",
            )
        )
    if problems:
        raise UserError(*problems)


def recomputed_blocks(layers: int, interval: int, stride: int | None = None) -> tuple[bool, ...]:
    """For each block, whether the backward pass recomputes it: every interval-th, or the first of every stride."""
    if stride is None:
        return tuple(place % interval == 0 for place in range(layers))
    return tuple(place % stride < interval for place in range(layers))


@dataclass(frozen=True)
class Known:
    """A published repository: the transformer's config where it differs from the 1.6B model's, and its shift."""

    transformer: Mapping[str, Any]
    flow_shift: float = 3.0
    bf16_safe: bool = True


_TRANSFORMER_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "attention_bias": False,
    "sample_size": 32,
    "patch_size": 1,
    "norm_elementwise_affine": False,
    "interpolation_scale": None,
    "guidance_embeds": False,
    "qk_norm": None,
}
_VAE: Mapping[str, Any] = {
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "scaling_factor": 0.41407,
}
_600M: Mapping[str, Any] = {
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
_RMS = {"qk_norm": "rms_norm_across_heads"}
_OWNER = "Efficient-Large-Model"

KNOWN: Mapping[str, Known] = {
    f"{_OWNER}/Sana_600M_512px_diffusers": Known({**_600M, "sample_size": 16}, bf16_safe=False),
    f"{_OWNER}/Sana_600M_1024px_diffusers": Known(_600M, bf16_safe=False),
    f"{_OWNER}/Sana_1600M_512px_diffusers": Known({"sample_size": 16}, bf16_safe=False),
    f"{_OWNER}/Sana_1600M_1024px_diffusers": Known({}, bf16_safe=False),
    f"{_OWNER}/Sana_1600M_1024px_BF16_diffusers": Known({}),
    f"{_OWNER}/Sana_1600M_2Kpx_BF16_diffusers": Known({"sample_size": 64, "interpolation_scale": 1.0}),
    f"{_OWNER}/Sana_1600M_4Kpx_BF16_diffusers": Known({"sample_size": 128, "interpolation_scale": 2.0}, 6.0),
    f"{_OWNER}/SANA1.5_1.6B_1024px_diffusers": Known(_RMS),
    f"{_OWNER}/SANA1.5_4.8B_1024px_diffusers": Known({**_RMS, "num_layers": 60}),
    "terminusresearch/sana-1.6b-1024px": Known({}),
}
