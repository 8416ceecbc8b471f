"""The model card: README.md of an exported pipeline and of its repository, with front matter and a snippet that works.

Front matter: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_tune.config.lycoris import ADAPTER
from sana_tune.watch.events import Event, Measured, Validated
from sana_tune.watch.snippets import Sample

_ALGORITHMS = {"lokr": "LoKr", "loha": "LoHa", "locon": "LoRA (LoCon)"}
IMAGES = "images"  # folder of the gallery beside README.md
MOST_PICTURES = 12
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
GEMMA_POLICY = "https://ai.google.dev/gemma/prohibited_use_policy"


@dataclass(frozen=True)
class Licence:
    """Under which terms the weights are. name: as the hub knows it; link: to its text; text: in words."""

    text: str
    name: str = "other"
    own_name: str | None = None
    link: str | None = None
    is_gemma: bool = False

    def front_matter(self) -> dict[str, Any]:
        """license, and for one that the hub has no name for license_name and license_link."""
        own = {"license_name": self.own_name, "license_link": self.link}
        return {"license": self.name, **{key: value for key, value in own.items() if value}}


@dataclass(frozen=True)
class About:
    """What a card says that is the same all through a run.

    model: what it was trained from, as people call it; base_model: its id on the hub, None for a folder.
    sample: what the snippet draws. settings: name → value, without secrets
    and paths. adapter: its algorithm, such as lokr; "" = whole weights. multiplier: it was trained with. datasets: a
    line each. note: the user's own words. safe: whether all audiences may see what it draws.
    """

    title: str
    model: str
    licence: Licence
    sample: Sample
    settings: Mapping[str, Any] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    base_model: str | None = None
    note: str | None = None
    safe: bool = False
    has_ema: bool = False
    adapter: str = ""
    multiplier: float = 1.0


@dataclass(frozen=True)
class Shown:
    """One picture of the gallery: its file, and the prompt it was drawn from."""

    file: Path
    prompt: str


class Seen:
    """A sink that remembers what a card shows of a run: the last pictures and the last numbers."""

    def __init__(self) -> None:
        self.pictures: tuple[Path, ...] = ()
        self.numbers: dict[str, float] = {}

    def emit(self, event: Event) -> None:
        match event:
            case Validated(files=files) if files:
                self.pictures = tuple(Path(file) for file in files)
            case Measured(values=values):
                self.numbers |= values

    def close(self) -> None:
        pass


def model_card(
    about: About,
    *,
    place: str,
    training: Mapping[str, Any],
    checkpoint: str | None = None,
    pictures: Sequence[Shown] = (),
    numbers: Mapping[str, float] | None = None,
) -> str:
    """Text of README.md.

    place: where the weights are loaded from, a folder or a repository. checkpoint: the folder in it, when there is no
    whole pipeline yet. training: name → value lines. pictures: of the gallery, which lie in `IMAGES` beside the text.
    """
    shown = list(pictures)[:MOST_PICTURES]
    what = f"{_ALGORITHMS.get(about.adapter, about.adapter)} adapter" if about.adapter else "full-rank fine-tune"
    kind = f"A checkpoint of a {what}" if checkpoint else f"A {what}"
    parts = [
        _front_matter(about, shown),
        f"# {about.title}\n",
        f"{kind} of Sana, trained from {_model_link(about)} with sana_tune.\n",
        f"{about.note.strip()}\n" if about.note else "",
        "## Use\n",
        _snippet(about, place, checkpoint) + "\n",
        _ema(about, checkpoint) if about.has_ema else "",
        _gallery(shown),
        "## Training\n",
        "\n".join(f"- {name}: {value}" for name, value in training.items()) + "\n",
        _settings(about.settings),
        _list("## Data", about.datasets),
        _numbers(numbers or {}),
        _licence(about.licence),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(about: About, pictures: Sequence[Shown]) -> str:
    import yaml

    tags = ["text-to-image", "diffusers", "sana", "sana_tune", *(("lora", "lycoris") if about.adapter else ("full",))]
    relation = "adapter" if about.adapter else "finetune"
    values: dict[str, Any] = {
        **about.licence.front_matter(),
        **({"base_model": about.base_model, "base_model_relation": relation} if about.base_model else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": tags if about.safe else [*tags, "not-for-all-audiences"],
        "inference": False,
    }
    if pictures:
        values["widget"] = [
            {"text": shown.prompt or "(empty prompt)", "output": {"url": f"{IMAGES}/{shown.file.name}"}}
            for shown in pictures
        ]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n"


def _model_link(about: About) -> str:
    return f"[{about.base_model}](https://huggingface.co/{about.base_model})" if about.base_model else about.model


def _snippet(about: About, place: str, checkpoint: str | None) -> str:
    base = about.base_model or about.model
    if about.adapter:
        file = f"{checkpoint}/{ADAPTER.weights}" if checkpoint else ADAPTER.weights
        return about.sample.of_adapter(place, file, base, about.multiplier)
    if checkpoint is None:
        return about.sample.of_pipeline(place)
    return about.sample.of_checkpoint(place, f"{checkpoint}/transformer", base)


def _ema(about: About, checkpoint: str | None) -> str:
    if about.adapter:
        file = f"{checkpoint}/{ADAPTER.average}" if checkpoint else ADAPTER.average
        return f"`{file}` is the moving average of the adapter's weights; to draw with it, load it instead.\n"
    folder = f"{checkpoint}/transformer_ema" if checkpoint else "transformer_ema"
    return (
        f"`{folder}/` holds the moving average of the weights; to draw with it, load it with "
        f'`SanaTransformer2DModel.from_pretrained(…, subfolder="{folder}")` and hand it to the pipeline as '
        "`transformer=`.\n"
    )


def _gallery(pictures: Sequence[Shown]) -> str:
    lines = [f"![{_plain(shown.prompt)}]({IMAGES}/{shown.file.name})\n*{_plain(shown.prompt)}*\n" for shown in pictures]
    return "\n".join(["## Pictures\n", *lines]) if lines else ""


def _plain(text: str) -> str:
    """Text in which Markdown and HTML find nothing to do."""
    return re.sub(r"([\\`*_{}\[\]<>()#|!])", r"\\\1", " ".join(text.split())) or "(empty prompt)"


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in settings.items())
    return f"Settings that differ from sana_tune's defaults:\n\n| setting | value |\n|---|---|\n{rows}\n"


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _plain(text) if text else '""'


def _list(title: str, lines: Sequence[str]) -> str:
    return f"{title}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n" if lines else ""


def _numbers(numbers: Mapping[str, float]) -> str:
    """The measured values: CLIP scores, held-out loss. Their parts, such as each noise level's, are left out."""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in numbers.items() if name.count("/") < 2)
    return f"## Measured\n\n| | |\n|---|---|\n{rows}\n" if rows else ""


def _licence(licence: Licence) -> str:
    link = f" ({licence.link})" if licence.link else ""
    gemma = (
        f"\n\nThe text encoder is Gemma 2: its [terms of use]({GEMMA_TERMS}) and [prohibited uses]({GEMMA_POLICY}) "
        "hold for it."
        if licence.is_gemma
        else ""
    )
    return f"## Licence\n\n{licence.text}{link}.{gemma}\n"
