"""How a run draws: its validator and its previews are built here, from a run's parts and caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_tune.caching import Caches
from sana_tune.config.load import Loaded
from sana_tune.config.schema import Config
from sana_tune.data.records import Role
from sana_tune.log import log
from sana_tune.model.facts import ModelFacts
from sana_tune.prepare import Prepared, drawing_sizes
from sana_tune.progress import Progress
from sana_tune.train.crew import ALONE, Crew
from sana_tune.watch.snippets import Sample

if TYPE_CHECKING:
    import numpy as np
    import torch

    from sana_tune.data.cache import Tensors
    from sana_tune.model.generate import Painter
    from sana_tune.model.preview import Linear, Pair, Tiny
    from sana_tune.train.external import ScriptValidator
    from sana_tune.train.previews import Previews
    from sana_tune.train.signals import Stop
    from sana_tune.train.step import Parts
    from sana_tune.train.validate import NoValidator, Picture, Validator
    from sana_tune.watch.events import Event

PAIRS = 16  # pictures that the previews' map is fitted to


def validator_of(
    prepared: Prepared,
    caches: Caches,
    text: Tensors,
    parts: Parts,
    stop: Stop,
    emit: Callable[[Event], None],
    crew: Crew = ALONE,
) -> Validator | ScriptValidator | NoValidator:
    """The validator of the run. Its VAE is loaded when pictures are drawn and let go of afterwards.

    text: embeddings by key. emit: takes previews. crew: the processes that share the pictures; where the model is split
    over them, they draw each picture together. Raises UserError for a preview decoder that is none of this model.
    """
    from sana_tune.train.sharding import is_sharded
    from sana_tune.train.validate import NoValidator

    if not prepared.drawn:
        return NoValidator()
    if prepared.config.validation.validation_method == "external-script":
        return script_of(prepared, crew)
    device, split = parts.accelerator.device, is_sharded(parts.bare)
    alone = ALONE if split else crew
    painter = painter_of(prepared, device)
    previews = previews_of(prepared, caches, painter, emit) if prepared.config.validation.validation_preview else None

    def draw(picture: Picture, progress: Progress, *, seen: bool) -> np.ndarray:
        embeddings = (
            text.get(prepared.keys.text(picture.prompt)),
            text.get(prepared.plain_keys.text(picture.negative)),
        )
        with at_strength(parts, prepared.config):
            return draw_one(painter, parts.bare, embeddings, picture, previews if seen else None, progress)

    def release() -> None:
        painter.release()
        if previews is not None:
            previews.release()

    return pictures_validator(
        prepared.config, prepared.facts, prepared.output.pictures, prepared.drawn, draw,
        release=release, stopped=lambda: stop.requested and not split, writes=crew.is_main or not split,
        collective=split,
        rank=alone.rank.rank, ranks=alone.ranks, gather=lambda drawn: alone.gather("the validation pictures", drawn),
    )  # fmt: skip


def at_strength(parts: Parts, config: Config) -> AbstractContextManager[None]:
    """In here an adapter's change is as strong as it is to be shown."""
    return (
        nullcontext() if parts.adapter is None else parts.adapter.strength(config.adapter.validation_lycoris_strength)
    )


def painter_of(prepared: Prepared, device: torch.device) -> Painter:
    """What draws the run's pictures on a device."""
    from sana_tune.model.generate import Painter

    autocast = autocast_dtype(prepared.loaded, prepared.plan.weights.dtype) if device.type != "cpu" else None
    tiled, variant = prepared.config.validation.vae_enable_tiling, prepared.config.model.variant
    return Painter(prepared.folder, device, autocast=autocast, variant=variant, tiled=tiled)


def picture_at_worst(prepared: Prepared, parts: Parts) -> Callable[[], None] | None:
    """Draws the largest validation picture with all weights that are shown, in one sampler step, and drops it.

    None where this process draws no pictures.
    """
    import torch

    from sana_tune.train.validate import pictures_of

    if not prepared.drawn or prepared.config.validation.validation_method == "external-script":
        return None
    pictures = pictures_of(prepared.drawn, drawing_sizes(prepared.config, prepared.facts))
    largest = max(pictures, key=lambda each: each.width_px * each.height_px * (2 if each.guidance > 1 else 1))
    painter = painter_of(prepared, parts.accelerator.device)
    text = torch.ones(1, parts.bare.config["caption_channels"])

    def draw() -> None:
        try:
            for _, weights in parts.ema.views():
                with weights:
                    draw_one(painter, parts.bare, (text, text), replace(largest, steps=1))
        finally:
            painter.release()

    return draw


def pictures_validator(
    config: Config, facts: ModelFacts, folder: Path, prompts: Any, draw: Any, *, sheets: bool = True, **options: Any
) -> Validator:
    """A validator that draws what the config asks. sheets: contact sheets too. options: further ones of Validator."""
    from sana_tune.data.images import contact_sheet, encode_picture, encode_png
    from sana_tune.train.validate import Validator, pictures_of

    wanted, seed = config.validation, drawing_seed(config)
    return Validator(
        folder,
        pictures_of(prompts, drawing_sizes(config, facts), seed),
        draw,
        partial(encode_picture, kind=wanted.validation_image_format, quality=wanted.validation_image_quality),
        sheet=(lambda columns, rows: encode_png(contact_sheet(columns, rows))) if sheets else None,
        base=not wanted.disable_benchmark,
        startup=wanted.validation_on_startup,
        randomised=seed if wanted.validation_randomize else None,
        extension=ENDINGS.get(wanted.validation_image_format, wanted.validation_image_format),
        **options,
    )


ENDINGS = {"jpeg": "jpg"}


def draw_one(
    painter: Painter,
    transformer: Any,
    embeddings: tuple[torch.Tensor, torch.Tensor],
    picture: Picture,
    previews: Previews | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """One picture with a transformer's weights as they are. embeddings: of its prompt and its negative prompt."""
    showing = previews.of(picture, progress or Progress()) if previews is not None else None
    try:
        return painter.draw(
            transformer,
            *embeddings,
            width=picture.width_px,
            height=picture.height_px,
            steps=picture.steps,
            guidance=picture.guidance,
            rescale=picture.rescale,
            sampler=picture.sampler,
            seed=picture.seed,
            watch=showing,
        )
    finally:
        if showing is not None:
            showing.close()


def script_of(prepared: Prepared, crew: Crew = ALONE) -> ScriptValidator:
    """The validator of validation_method external-script. crew: the processes that wait for it."""
    from sana_tune.train.external import ScriptValidator
    from sana_tune.train.folders import list_complete

    wanted, output = prepared.config.validation, prepared.output
    general = {
        "output_dir": str(output.root),
        "validation_images": str(output.pictures),
        "model": prepared.config.model.pretrained_model_name_or_path,
        "validation_prompt": wanted.validation_prompt or "",
        "validation_negative_prompt": wanted.validation_negative_prompt,
        "validation_seed": str(drawing_seed(prepared.config)),
        "validation_resolution": ",".join(f"{w}x{h}" for w, h in drawing_sizes(prepared.config, prepared.facts)),
        "validation_guidance": f"{wanted.validation_guidance:g}",
        "validation_num_inference_steps": str(wanted.validation_num_inference_steps),
    }

    def values(progress: Progress) -> dict[str, str]:
        newest = list_complete(output.root)[-1:]
        place = {"local_checkpoint_path": str(newest[0].path) if newest else ""}
        return {**general, **place, "global_step": str(progress.step), "epoch": f"{progress.epoch:g}"}

    return ScriptValidator(
        wanted.validation_external_script or "",
        values,
        output.pictures,
        background=wanted.validation_external_background,
        first=crew.is_main,
        together=crew.gather,
        base=False,  # the base model is no checkpoint
        startup=wanted.validation_on_startup,
    )


# ---- previews ----


def previews_of(prepared: Prepared, caches: Caches, painter: Painter, emit: Callable[[Event], None]) -> Previews | None:
    """The previews of a run, fitted to its own latents and pictures; None, with a warning, when there are none.

    Raises UserError for a decoder that is none of this model.
    """
    from sana_tune.data.images import encode_png
    from sana_tune.model import preview, preview_file
    from sana_tune.train.previews import Previews

    pairs = list(pairs_of(prepared, caches, painter))
    painter.release()
    if not pairs:
        log.warning("there are no previews: not one picture could be read to fit them to")
        return None
    decoder: Linear | Tiny
    wanted = prepared.config.validation
    if wanted.validation_preview_decoder:
        path = preview_file.locate(wanted.validation_preview_decoder)
        decoder = preview.fitted(preview.load_tiny(path), pairs, prepared.facts.scaling_factor)
        how = f"by {path.name}, its latents scaled by {decoder.scale:.4g}"
    else:
        decoder = preview.Linear.fit(pairs)
        how = f"by a linear map fitted to {len(pairs)} picture{'s' * (len(pairs) != 1)}"
    log.info("Previews %s (mean squared error %.2g)", how, preview.mean_error(decoder, pairs))
    return Previews(
        lambda latents: preview.pixels(decoder(latents)),
        partial(encode_png, fast=True),
        emit,
        wanted.validation_preview_steps,
        decoder.release,
    )


def pairs_of(prepared: Prepared, caches: Caches, painter: Painter) -> Iterator[Pair]:
    """Latents of some of the run's pictures, cached ones where there are any, with the pictures."""
    from sana_tune.data.cache import LostItem
    from sana_tune.data.images import BrokenImage, prepare

    records = [record for record in prepared.survey.records if record.role is not Role.EVAL] or prepared.survey.records
    for record in records[:: -(-len(records) // PAIRS)]:
        key, cache = prepared.keys.latent(record), caches.latents[record.dataset]
        try:
            data = prepared.stores[record.dataset].read(record.key)
            picture = prepare(data, record.placement, record.ground)
            latent = cache.get(key) if key in cache else painter.latent(picture)
        except (BrokenImage, LostItem):  # training tells of it, and mends what it can
            continue
        yield latent.float(), picture


def sample_of(prepared: Prepared, dtype: str) -> Sample:
    """What the exported pipeline's snippet draws: the run's first prompt, as the run draws it."""
    from sana_tune.prompts import Prompt

    wanted, sizes = prepared.config.validation, drawing_sizes(prepared.config, prepared.facts)
    steps, guidance = wanted.validation_num_inference_steps, wanted.validation_guidance
    nothing = Prompt("", "a photo", steps=steps, guidance=guidance)
    first = next(iter(prepared.drawn.values()), nothing)
    width, height = (first.sizes or sizes)[0]
    seed = drawing_seed(prepared.config) if first.seed is None else first.seed
    return Sample(first.text, width, height, first.steps, first.guidance, seed, dtype)


# ---- precision ----


def drawing_seed(config: Config) -> int:
    """Seed of validation pictures."""
    asked = config.validation.validation_seed
    return config.train.seed if asked is None else asked


def precision(loaded: Loaded) -> str:
    """Accelerate's mixed_precision: what was asked for; where nobody asked, bf16 on an accelerator and no on a CPU."""
    asked = loaded.config.model.mixed_precision
    if loaded.origins["mixed_precision"] != "default":
        return asked
    from sana_tune.train.device import resolve_device

    return "no" if resolve_device(loaded.config.train.device) == "cpu" else asked


def autocast_dtype(loaded: Loaded, weights: str) -> torch.dtype | None:
    """What drawing computes in beside fp32 masters; None = the weights' own dtype, which is `weights`."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return dtypes.get(precision(loaded)) if weights == "fp32" else None


def frozen_base(loaded: Loaded, folder: Path, device: torch.device, weights: str = "fp32") -> Any:
    """The untrained model, frozen: what an adapter is put on, or what regularisation data learns from.

    weights: dtype of the trained weights beside it.
    """
    import torch

    from sana_tune.model.attention import install
    from sana_tune.model.half import keep_captions_fp32
    from sana_tune.model.quantise import quantise
    from sana_tune.model.sana import freeze, load_transformer

    model = loaded.config.model
    # In main memory first: the device has no room for it in fp32.
    base: Any = load_transformer(folder, torch.float32, "cpu", variant=model.variant)
    install(base)
    if precision(loaded) == "fp16":
        keep_captions_fp32(base)
    if model.base_model_precision != "no_change":
        rest = torch.bfloat16 if model.base_model_default_dtype == "bf16" else torch.float32
        done = quantise(base, model.base_model_precision, device=device, via=model.quantize_via, default_dtype=rest)
        log.info("Base: %s", done.told())
        return base.eval()
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    return freeze(base, dtype, autocast=autocast_dtype(loaded, weights)).to(device)
