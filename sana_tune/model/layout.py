"""The files of a Sana model in diffusers' folder layout: components, weight files, variants. Torch-free.

A repository can hold its weights in several variants ("diffusion_pytorch_model.safetensors" beside
"diffusion_pytorch_model.bf16.safetensors"), each in one file or in shards with an index. One variant per
component is ever wanted; downloading, hashing, loading and exporting all choose it here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sana_tune.errors import Problem, UserError

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
STEMS: Mapping[str, str] = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
CONFIGS: Mapping[str, str] = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
INDEX = "model_index.json"


@dataclass(frozen=True)
class Weights:
    """The weight files of one component in one variant.

    variant: None for the plain files. files: their paths inside the model folder, in shard order.
    index:   the index of sharded files, else None.
    """

    component: str
    variant: str | None
    files: tuple[str, ...]
    index: str | None = None

    @property
    def plain_names(self) -> dict[str, str]:
        """Each file's path → the path it has once it is the only variant."""
        stem = f"{self.component}/{STEMS[self.component]}"
        if self.index is None:
            return {self.files[0]: f"{stem}.safetensors"}
        count = len(self.files)
        names = {file: f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n, file in enumerate(self.files, 1)}
        return {**names, self.index: f"{stem}.safetensors.index.json"}


def find_weights(names: Iterable[str], component: str) -> dict[str | None, Weights]:
    """Every complete variant of a component's safetensors weights among file paths, by variant (None = plain)."""
    stem = re.escape(f"{component}/{STEMS[component]}")
    part = re.compile(stem + r"(?:\.(\w+))?(?:-(\d{5})-of-(\d{5}))?(?:\.(\w+))?\.safetensors")
    index = re.compile(stem + r"\.safetensors\.index(?:\.(\w+))?\.json")
    single: dict[str | None, str] = {}
    shards: dict[str | None, dict[int, str]] = {}
    counts: dict[str | None, int] = {}
    indexes: dict[str | None, str] = {}
    for name in names:
        if match := part.fullmatch(name):
            variant = match[1] or match[4]
            if match[2] is None:
                single[variant] = name
            else:
                shards.setdefault(variant, {})[int(match[2])] = name
                counts[variant] = int(match[3])
        elif match := index.fullmatch(name):
            indexes[match[1]] = name
    found = {variant: Weights(component, variant, (name,)) for variant, name in single.items()}
    for variant, pieces in shards.items():
        whole = len(pieces) == counts[variant] and variant in indexes
        if whole and variant not in found:
            ordered = tuple(pieces[n] for n in sorted(pieces))
            found[variant] = Weights(component, variant, ordered, indexes[variant])
    return found


def choose_weights(
    names: Iterable[str], where: str, *, variant: str | None = None, dtype: str = "fp32"
) -> dict[str, Weights]:
    """The one variant of each component that is downloaded, hashed and loaded.

    names: file paths inside the model. where: the model in the user's words.
    variant: the user's wish; components without it use their plain files, but one must have it.
    dtype: precision of the trained weights ("fp32" or "bf16"). Without a wish the transformer's files match it,
    the VAE's are the plain ones (it encodes in fp32) and the text encoder's the bf16 ones (it runs in bf16).
    Raises UserError for missing weights and an unknown variant.
    """
    names = list(names)
    wishes = {"transformer": "bf16" if dtype == "bf16" else None, "vae": None, "text_encoder": "bf16"}
    found = {component: find_weights(names, component) for component in STEMS}
    problems = [_no_weights(where, component, names) for component, variants in found.items() if not variants]
    if variant and not problems and not any(variant in variants for variants in found.values()):
        known = sorted({v for variants in found.values() for v in variants if v})
        problems.append(
            Problem(
                "variant",
                f"{where} has no weights in the variant {variant!r}; it has "
                + (f"{', '.join(known)} and the plain ones" if known else "the plain ones alone"),
                "leave `variant` out, or name one of these",
            )
        )
    if problems:
        raise UserError(*problems)
    return {component: _pick(variants, variant or wishes[component]) for component, variants in found.items()}


def component_weights(folder: Path, component: str, *, variant: str | None = None, dtype: str = "fp32") -> Weights:
    """`choose_weights` for one component of a folder on disk."""
    names = list_files(folder)
    return choose_weights(names, str(folder), variant=variant, dtype=dtype)[component]


def list_files(folder: Path) -> list[str]:
    """Paths of all files below a model folder's components, with forward slashes, sorted."""
    found = [INDEX] if (folder / INDEX).is_file() else []
    for component in COMPONENTS:
        if (folder / component).is_dir():
            found += [f"{component}/{path.name}" for path in (folder / component).iterdir() if path.is_file()]
    return sorted(found)


def read_json(path: Path) -> dict:
    """A JSON object from a file of a model. Raises UserError when it is absent or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            Problem(str(path), f"this file of the model cannot be read: {error.strerror}", "complete the model")
        ) from error
    except ValueError as error:
        raise UserError(
            Problem(str(path), f"this file of the model is not JSON: {error}", "download the model again")
        ) from error
    if not isinstance(value, dict):
        raise UserError(Problem(str(path), "this file of the model must hold a JSON object", "complete the model"))
    return value


def check_folder(folder: Path, *, variant: str | None = None, dtype: str = "fp32") -> dict[str, Weights]:
    """Check that a folder is a whole Sana model: every component, configs, and weights of the right length.

    Reads JSON and the headers of safetensors, no weights. Returns the chosen weights by component.
    Raises UserError with everything that is missing or torn.
    """
    if not (folder / INDEX).is_file() and not any((folder / name).is_dir() for name in COMPONENTS):
        raise UserError(
            Problem(
                str(folder),
                f"a model folder in diffusers layout holds {INDEX} and the folders {', '.join(COMPONENTS)}; "
                "none of them is there",
                "name the folder that SanaPipeline.save_pretrained wrote, or a hub id",
            )
        )
    missing = [name for name in (INDEX, *CONFIGS.values()) if not (folder / name).is_file()]
    if not (folder / "tokenizer").is_dir() or not any((folder / "tokenizer").iterdir()):
        missing.append("tokenizer/")
    if missing:
        raise UserError(
            Problem(str(folder), f"the model folder is not whole: {', '.join(missing)} missing", "copy it again")
        )
    _check_class(folder)
    chosen = choose_weights(list_files(folder), str(folder), variant=variant, dtype=dtype)
    torn = [file for weights in chosen.values() for file in weights.files if not whole_safetensors(folder / file)]
    if torn:
        raise UserError(
            Problem(str(folder), f"cut short or not safetensors: {', '.join(torn)}", "download or copy it again")
        )
    return chosen


def whole_safetensors(path: Path) -> bool:
    """Whether a safetensors file has a readable header and the length that the header tells."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    if not isinstance(header, dict):
        return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def _check_class(folder: Path) -> None:
    kind = read_json(folder / INDEX).get("_class_name")
    if kind not in ("SanaPipeline", "SanaPAGPipeline"):
        raise UserError(
            Problem(
                str(folder / INDEX),
                f"sana_tune trains Sana (SanaPipeline); this model is a {kind}",
                "name a Sana model, e.g. Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
            )
        )


def _pick(variants: Mapping[str | None, Weights], wish: str | None) -> Weights:
    order = [wish, None, "bf16", *sorted(name for name in variants if name)]
    return next(variants[name] for name in order if name in variants)


def _no_weights(where: str, component: str, names: Iterable[str]) -> Problem:
    others = [name for name in names if name.startswith(f"{component}/") and name.endswith((".bin", ".pt", ".pth"))]
    hint = f" (only {', '.join(others)}: pickled weights are not loaded)" if others else ""
    return Problem(
        where,
        f"no complete safetensors weights in {component}/{hint}",
        "use a model in diffusers layout with safetensors; if it was being copied, copy it again",
    )
