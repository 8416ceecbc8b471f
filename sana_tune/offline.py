"""Pictures of a checkpoint without training: `sana_tune validate` and `sana_tune generate`.

No picture of the datasets is looked at. What a run drew at that checkpoint comes out the same here, to the pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sana_tune import log as logs
from sana_tune.config.load import Loaded
from sana_tune.config.lycoris import ADAPTER, read_lycoris
from sana_tune.config.prompt_library import PromptEntry
from sana_tune.config.schema import Config
from sana_tune.data.captions import clean_caption
from sana_tune.drawing import (
    ENDINGS,
    autocast_dtype,
    draw_one,
    drawing_seed,
    frozen_base,
    pictures_validator,
    precision,
)
from sana_tune.errors import Interrupted, Problem, UserError, gather
from sana_tune.hardware import device_for
from sana_tune.log import log
from sana_tune.model.facts import ModelFacts, from_folder
from sana_tune.output import Output
from sana_tune.prepare import (
    check_drawing_sizes,
    check_library,
    check_precision,
    check_quantisation,
    drawing_sizes,
    keys_of,
    located,
    prompts_wanted,
)
from sana_tune.progress import Progress
from sana_tune.prompts import Prompt, prompt_of
from sana_tune.store import write_atomically
from sana_tune.train.folders import Checkpoint, find, verify
from sana_tune.train.signals import LeaveNow, Stop
from sana_tune.watch.events import Validated

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from sana_tune.train.validate import Picture


@dataclass(frozen=True)
class Asked:
    """What to draw. checkpoint: a path, a name in the output folder, or latest. prompts: none = the config's.

    views: suffixes of file names, "" and "_ema"; None = as ema_validation says.
    """

    checkpoint: str = "latest"
    prompts: tuple[str, ...] = ()
    views: tuple[str, ...] | None = None


@dataclass
class Scene:
    """All that is needed to draw but the weights, which `views` loads one after the other."""

    loaded: Loaded
    output: Output
    facts: ModelFacts
    folder: Path
    checkpoint: Checkpoint
    prompts: Mapping[str, Prompt]
    device: torch.device
    texts: Mapping[tuple[str, bool], Tensor] = field(default_factory=dict)  # (text, is negative) → embedding
    transformer: Any = None

    @property
    def progress(self) -> Progress:
        return self.checkpoint.progress()

    def views(self, asked: tuple[str, ...] | None) -> Iterator[tuple[str, AbstractContextManager[None]]]:
        """(suffix, a context) for each set of weights that is shown, which is loaded when its turn comes."""
        for suffix in self.shown(asked):
            self.transformer = None  # one at a time in memory
            self.transformer = load_weights(self, suffix)
            yield suffix, nullcontext()
        self.transformer = None

    def shown(self, asked: tuple[str, ...] | None) -> tuple[str, ...]:
        """The sets of weights to draw with. Raises UserError when the average is asked for and there is none."""
        has_average = self.checkpoint.layout.average in self.checkpoint.files
        if asked is not None and "_ema" in asked and not has_average:
            what = "this checkpoint has no averaged weights: it was trained without use_ema"
            raise UserError(Problem(str(self.checkpoint.path), what, "draw with the raw ones: leave --ema out"))
        if asked is not None:
            return asked
        kind = self.loaded.config.ema.ema_validation if has_average else "none"
        return {"comparison": ("", "_ema"), "ema_only": ("_ema",), "none": ("",)}[kind]


def validate(loaded: Loaded, asked: Asked) -> Validated:
    """Draw a checkpoint's validation pictures into the run's folder. Raises UserError, Interrupted."""
    with listening() as stop, _scene(loaded, asked) as scene:
        painter = painter_of(scene)

        def draw(picture: Picture, progress: Progress, *, seen: bool) -> np.ndarray:
            return draw_one(painter, scene.transformer, embeddings(scene, picture), picture)

        validator = pictures_validator(
            loaded.config, scene.facts, scene.output.pictures, scene.prompts, draw,
            release=painter.release, stopped=lambda: stop.requested,
            sheets=not asked.prompts,  # the run's own sheet of that step stays
        )  # fmt: skip
        return validator.drawn(scene.progress, scene.views(asked.views))


def generate(loaded: Loaded, asked: Asked, target: Path | None = None) -> tuple[Path, ...]:
    """Draw prompts with a checkpoint's weights; answers the files. Raises UserError, Interrupted.

    target: a folder (unless its name ends like a picture's, then the file of one picture); None = generated/ in the
    run's folder.
    """
    from sana_tune.data.images import encode_picture
    from sana_tune.train.validate import pictures_of

    with listening(), _scene(loaded, asked) as scene:
        config, wanted = scene.loaded.config, scene.loaded.config.validation
        pictures = pictures_of(scene.prompts, drawing_sizes(config, scene.facts), drawing_seed(config))
        suffixes = scene.shown(asked.views)
        names = _names(pictures, suffixes, scene.progress, wanted.validation_image_format)
        folder = target or scene.output.root / "generated"
        if target is not None and target.suffix.lower() in _KINDS:
            if len(names) > 1:
                what = f"one file cannot hold {len(names)} pictures"
                raise UserError(Problem(f"--output {target}", what, "name a folder"))
            names, folder = [target.name], target.parent
        painter, files = painter_of(scene), []
        for suffix, weights in scene.views(suffixes):
            with weights:
                for picture, name in zip(pictures, names[suffixes.index(suffix) * len(pictures) :], strict=False):
                    kind = _KINDS[Path(name).suffix.lower()]
                    drawn = draw_one(painter, scene.transformer, embeddings(scene, picture), picture)
                    write_atomically(folder / name, encode_picture(drawn, kind, wanted.validation_image_quality))
                    files.append(folder / name)
                    log.info("%s", files[-1])
        painter.release()
        return tuple(files)


_KINDS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}


def _names(pictures: Sequence[Picture], suffixes: Sequence[str], progress: Progress, kind: str) -> list[str]:
    """A file name for each picture with each set of weights, the seed in it."""
    end = ENDINGS.get(kind, kind)
    return [
        f"step_{progress.step}_{one.slug}_seed-{one.seed}_{one.width_px}x{one.height_px}{suffix}.{end}"
        for suffix in suffixes
        for one in pictures
    ]


# ---- what is needed ----


@contextmanager
def listening() -> Iterator[Stop]:
    """Logs and signals as in a run."""
    logs.setup()
    logs.quiet_libraries()
    stop = Stop()
    try:
        with stop.listening():
            yield stop
    except LeaveNow as left:
        raise Interrupted(left.signal_number) from None


@contextmanager
def _scene(loaded: Loaded, asked: Asked) -> Iterator[Scene]:
    """Everything but the weights; what is wrong is told before anything heavy is loaded. Texts are encoded here."""
    config, problems = loaded.config, list[Problem]()
    output = Output(Path(config.train.output_dir))
    checkpoint = gather(problems, lambda: checkpoint_of(config, output, asked.checkpoint))
    prompts = gather(problems, lambda: prompts_asked(config, asked.prompts)) or {}
    folder = gather(problems, lambda: located(config))
    facts = folder and gather(problems, lambda: from_folder(folder, config.model.pretrained_model_name_or_path))
    device = device_for(config.train.device)
    gather(problems, lambda: check_quantisation(config, device))
    if checkpoint is not None and checkpoint.layout is ADAPTER:
        gather(problems, check_library)
    if facts is not None:
        gather(problems, lambda: check_drawing_sizes(config, facts, prompts))
        gather(problems, lambda: check_precision(loaded, facts, device))
    if problems or checkpoint is None or folder is None or facts is None:
        raise UserError(*problems)
    import torch

    from sana_tune.train.device import resolve_device

    log.info("Drawing with %s of %s", checkpoint.path, config.model.pretrained_model_name_or_path)
    scene = Scene(loaded, output, facts, folder, checkpoint, prompts, torch.device(resolve_device(config.train.device)))
    scene.shown(asked.views)
    verify(checkpoint)
    scene.texts = encoded(scene)
    yield scene


def checkpoint_of(config: Config, output: Output, wanted: str) -> Checkpoint:
    """The checkpoint to draw with. Raises UserError when there is none, or it is of another model."""
    try:
        found = find(output.root, wanted or "latest")
    except UserError as error:
        there = (each.where.replace("resume_from_checkpoint", "--checkpoint") for each in error.problems)
        raise UserError(
            *(replace(each, where=where) for each, where in zip(error.problems, there, strict=True))
        ) from None
    if found is None:
        what = f"there is no complete checkpoint in {output.root}"
        raise UserError(Problem("--checkpoint latest", what, "train first, or name one with --checkpoint PATH"))
    model, asked = found.header().get("run", {}).get("model"), config.model.pretrained_model_name_or_path
    if model is not None and model != asked:
        what = f"it was trained from {model}; the config names {asked}"
        raise UserError(Problem(str(found.path), what, "use the config of that run: config.json in its output_dir"))
    return found


def prompts_asked(config: Config, texts: Sequence[str]) -> dict[str, Prompt]:
    """The prompts given, else those of the config. Raises UserError when there is none."""
    if texts:
        clean = partial(clean_caption, case=config.model.prompt_case)
        empty = [text for text in texts if not text.strip()]
        if empty:
            raise UserError(Problem("--prompt", "the prompt must be a text that is not empty", "describe the picture"))
        return {text: prompt_of(text, PromptEntry(prompt=text), config.validation, clean) for text in texts}
    found = prompts_wanted(config)
    if not found:
        what = "there is no prompt to draw: the config has none, or validation_disable"
        raise UserError(Problem("validation_prompt", what, 'give one: --prompt "a photo of …"'))
    return found


def encoded(scene: Scene) -> dict[tuple[str, bool], Tensor]:
    """The embedding of every text: from the run's cache, or by the text encoder, which is freed again."""
    from sana_tune.data.cache import LostItem, TensorCache
    from sana_tune.model.sana import load_text_encoder

    config = scene.loaded.config
    wanted = dict.fromkeys(each for one in scene.prompts.values() for each in ((one.text, False), (one.negative, True)))
    with_instruction, plain = keys_of(config, scene.folder, scene.output)
    cache = TensorCache(scene.output.text_folder(config, scene.loaded.text_cache))
    found: dict[tuple[str, bool], Tensor] = {}
    for text, negative in wanted:
        key = (plain if negative else with_instruction).text(text)
        if key in cache:
            try:
                found[text, negative] = cache.get(key)
            except LostItem:  # a run mends it
                continue
    missing = [each for each in wanted if each not in found]
    if missing:
        model = config.model
        encoder = load_text_encoder(
            scene.folder,
            scene.device,
            instruction=model.sana_complex_human_instruction,
            variant=model.variant,
            quantised=model.text_encoder_1_precision,
            via=model.quantize_via,
        )
        try:
            for text, negative in missing:
                found[text, negative] = encoder.encode([text], with_instruction=not negative)[0]
        finally:
            encoder.free()
    return found


def embeddings(scene: Scene, picture: Picture) -> tuple[Tensor, Tensor]:
    """Of a picture's prompt and negative prompt."""
    return scene.texts[picture.prompt, False], scene.texts[picture.negative, True]


def painter_of(scene: Scene) -> Any:
    """What draws, computing as the run did while it trained."""
    from sana_tune.model.generate import Painter

    autocast = autocast_dtype(scene.loaded, stored_dtype(scene.checkpoint)) if scene.device.type != "cpu" else None
    return Painter(scene.folder, scene.device, autocast=autocast, variant=scene.loaded.config.model.variant)


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Dtype of a checkpoint's raw weights: fp32 or bf16."""
    from safetensors import safe_open

    with safe_open(checkpoint.path / checkpoint.layout.weights, framework="pt") as opened:
        dtype = opened.get_slice(next(iter(opened.keys()))).get_dtype()
    return "bf16" if dtype == "BF16" else "fp32"


def load_weights(scene: Scene, suffix: str) -> Any:
    """The transformer with a checkpoint's weights, or their average ("_ema"), in the dtype that the run trains in."""
    import torch

    from sana_tune.model.attention import install
    from sana_tune.model.half import keep_captions_fp32
    from sana_tune.model.sana import load_transformer

    if scene.checkpoint.layout is ADAPTER:
        return _load_adapter(scene, suffix)
    part = str(PurePosixPath(scene.checkpoint.layout.of(suffix)).parent)
    dtype = torch.bfloat16 if stored_dtype(scene.checkpoint) == "bf16" else torch.float32
    transformer = load_transformer(scene.checkpoint.path, dtype, scene.device, subfolder=part)
    install(transformer)
    if precision(scene.loaded) == "fp16":
        keep_captions_fp32(transformer)
    return transformer.requires_grad_(False)


def _load_adapter(scene: Scene, suffix: str) -> Any:
    """The base with the checkpoint's adapter on it, as strong as validation_lycoris_strength says."""
    from sana_tune.train.adapt import Adapter

    config, layout = scene.loaded.config, scene.checkpoint.layout
    base = frozen_base(scene.loaded, scene.folder, scene.device)
    path = scene.checkpoint.path / layout.of(suffix)
    adapter = Adapter(base, read_lycoris(str(path.with_name(layout.config))))
    adapter.load(path)
    adapter.network.set_multiplier(adapter.network.multiplier * config.adapter.validation_lycoris_strength)
    return base.eval().requires_grad_(False)
