"""What `sana_tune fit` says: the card, memory before and after, what was changed and why, or what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sana_tune.config.schema import section_of
from sana_tune.errors import Problem
from sana_tune.fitting import COSTS, Candidate, Footprint, Found, Missing, Tried, Wanted, footprint
from sana_tune.memory import SPARE
from sana_tune.plan import changes_told, human_bytes

# Settings → what of COSTS they are; the others say it themselves.
_WORDS = {
    "weights_dtype": "bf16", "mixed_precision": "bf16", "optimizer_release_gradients": "release",
    "ema_device": "ema_cpu", "gradient_checkpointing": "recompute", "gradient_checkpointing_interval": "recompute",
}  # fmt: skip
_OWN = {
    "learning_rate": "Lion takes about a fifth of AdamW's learning rate",
    "optimizer_config": "its options are not those of the optimizer that was",
    "vae_batch_size": "fewer pictures encoded at once while the caches are filled: the same latents",
    "vae_enable_tiling": "validation pictures are decoded in tiles, which may show seams: training is the same",
}
_AT_ONCE = "the pictures of a step at once: released gradients cannot be accumulated"


def told(wanted: Wanted) -> Iterator[str]:
    """The card and the model."""
    free = f"{100 * SPARE:.0f} % are left free, since all of this is estimated"
    yield f"Card: {human_bytes(wanted.card_bytes)}; {free}: {human_bytes(wanted.room_bytes)} to use"
    load = max(wanted.loads, key=lambda load: load.width_px * load.height_px * load.batch_size)
    yield (
        f"Model: {wanted.facts.name}, {wanted.facts.parameters / 1e6:,.1f} M parameters; {wanted.per_step} pictures a "
        f"step, the largest {load.width_px}x{load.height_px} px"
    )


def table(wanted: Wanted, chosen: Candidate) -> Iterator[str]:
    """Memory by part, before and after, in columns."""
    before, after = _parts(footprint(wanted, wanted.config, wanted.loads)), _parts(chosen.footprint)
    yield f"{'memory, estimated':<22}{'before':>10}{'after':>10}"
    for name in before:
        if before[name] or after[name]:
            yield f"{name:<22}{human_bytes(before[name]):>10}{human_bytes(after[name]):>10}"


def _parts(one: Footprint) -> dict[str, int]:
    need = one.training
    return {
        "weights": need.weights_bytes, "gradients": need.gradients_bytes, "optimizer": need.optimizer_bytes,
        "EMA": need.ema_bytes, "bf16 copies": need.copies_bytes, "base model": need.base_bytes,
        "activations": need.activations_bytes, "encoders": need.resident_bytes, "CUDA and spare": need.overhead_bytes,
        "training": need.total_bytes, "caching: captions": one.caching.text_bytes,
        "caching: pictures": one.caching.pictures_bytes, "drawing": one.drawing_bytes,
    }  # fmt: skip


def costs_told(wanted: Wanted, found: Found) -> Iterator[str]:
    """Each setting that is changed, from what to what, and what that costs."""
    chosen = found.chosen
    if chosen is None or not chosen.changes:
        return
    homes = section_of()
    yield "Changed, and what it costs:"
    for key, value in chosen.changes.items():
        before = changes_told({key: vars(vars(wanted.config)[homes[key]])[key]}).removeprefix(f"{key} ")
        now = changes_told({key: value}).removeprefix(f"{key} ")
        if now != before:  # else only written down
            yield f"  {key} {before} → {now}: {_why(key, chosen)}"
    if found.tried is None:
        yield "These are the plan's estimates: nothing was tried on a GPU."


def _why(key: str, chosen: Candidate) -> str:
    if key in _OWN:
        return _OWN[key]
    if key == "optimizer":
        return COSTS["lion" if "lion" in chosen.given_up else "eight"][1]
    if key in ("train_batch_size", "gradient_accumulation_steps"):
        return next((COSTS[word][1] for word in ("fewer", "smaller") if word in chosen.given_up), _AT_ONCE)
    return COSTS[_WORDS[key]][1]


def nothing_fits(wanted: Wanted, lacks: Missing, failed: Sequence[tuple[Candidate, Tried]] = ()) -> Problem:
    """That no settings fit, how much is missing, and what would fit; or that all that should fit failed when tried."""
    would = f"what fits: {'; or '.join(lacks.instead)}" if lacks.instead else "take a card with more memory"
    if failed:
        last, tried = failed[-1]
        what = (
            f"{len(failed)} settings that should fit were tried, and none does; the last, estimated at "
            f"{human_bytes(last.footprint.training.total_bytes)}: {tried.problem}"
        )
        return Problem("fit", what, f"end other programs that use the GPU, or lower --vram; {would}")
    one = lacks.least.footprint
    parts = {
        "training": one.training.total_bytes, "filling the text cache": one.caching.text_bytes,
        "filling the latent cache": one.caching.pictures_bytes, "drawing a picture": one.drawing_bytes,
    }  # fmt: skip
    largest = max(parts, key=lambda name: parts[name])
    what = (
        f"no settings make full-rank training of {wanted.facts.name} fit {human_bytes(wanted.card_bytes)}: with the "
        f"most frugal ones {largest} takes about {human_bytes(parts[largest])}, and {human_bytes(wanted.room_bytes)} "
        f"may be used: {human_bytes(lacks.missing_bytes)} are missing"
    )
    return Problem("fit", what, would)
