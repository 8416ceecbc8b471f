"""Where the CLIP model that scores pictures is: in a folder, or on the Hugging Face Hub. Torch-free."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from sana_tune.errors import Problem, UserError
from sana_tune.model import fetch

KEY = "pretrained_evaluation_model_name_or_path"
CONFIG, PICTURES = "config.json", "preprocessor_config.json"
WEIGHTS = (("model.safetensors",), ("model.safetensors.index.json",), ("pytorch_model.bin",))
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
SMALL = (
    CONFIG,
    PICTURES,
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)
log = logging.getLogger(__name__)


def locate_scorer(name: str) -> Path:
    """The local folder of a CLIP model, downloaded first if need be.

    name: a folder as transformers saves it, or a hub id. Raises UserError with what is wrong and what to do, as
    `fetch.locate` does.
    """
    folder = scorer_on_disk(name)
    return _download(name) if folder is None else folder


def scorer_on_disk(name: str) -> Path | None:
    """The folder of a CLIP model on this machine, or None for one that must be downloaded first. Asks no network.

    Raises UserError as `locate_scorer` for a folder, and for a model that is not here in offline mode.
    """
    if name == fetch.NANO:
        raise UserError(Problem(KEY, "nano is no CLIP model", "name a hub id, or a folder"))
    try:
        folder = fetch.local_folder(name)
    except UserError as error:
        raise UserError(*(replace(problem, where=KEY) for problem in error.problems)) from error
    if folder is not None:
        _check(folder, os.listdir(folder))
        return folder
    cached = _cached(name)
    if cached is None and fetch.is_offline():
        what = f"offline mode is on (HF_HUB_OFFLINE), and {name} has not been downloaded whole from the hub"
        fix = "download it once with the network, name a local folder, or set evaluation_type none"
        raise UserError(Problem(KEY, what, fix))
    return cached


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        with fetch.told(name, None):
            info = HfApi().model_info(name, files_metadata=True)
            sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
            _check(name, sizes)
            wanted = needed(sizes)
            log.info("downloading %s: %.2f GB to score pictures with", name, sum(sizes[file] for file in wanted) / 1e9)
            return Path(snapshot_download(name, allow_patterns=wanted))
    except fetch.NoNetwork as error:
        raise UserError(replace(error.problem, where=KEY)) from error
    except UserError as error:
        raise UserError(*(replace(problem, where=KEY) for problem in error.problems)) from error


def needed(names: Collection[str]) -> list[str]:
    """Of a repository's files: settings, tokenizer, and one kind of weights, safetensors before others."""
    weights = next(files for files in WEIGHTS if set(files) <= set(names))
    parts = [file for file in names if file.startswith("model-") and file.endswith(".safetensors")]
    shards = parts if weights == WEIGHTS[1] else []
    return sorted({*weights, *shards, *(file for file in SMALL if file in names)})


def _cached(name: str) -> Path | None:
    """The folder of a model that was downloaded whole."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, CONFIG)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    return folder if not _lacking(os.listdir(folder)) else None


def _check(where: Path | str, names: Collection[str]) -> None:
    """Raise UserError when a model's files are not all there."""
    if lacking := _lacking(names):
        what = f"{where} lacks {', '.join(lacking)}: it is no CLIP model as transformers saves them"
        raise UserError(Problem(KEY, what, "name a CLIP model, such as openai/clip-vit-large-patch14-336"))


def _lacking(names: Collection[str]) -> list[str]:
    there = set(names)
    lacking = [file for file in (CONFIG, PICTURES) if file not in there]
    for choices in (TOKENIZERS, WEIGHTS):
        if not any(set(files) <= there for files in choices):
            lacking.append(" or ".join(" and ".join(files) for files in choices))
    return lacking
