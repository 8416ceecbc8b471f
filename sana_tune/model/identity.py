"""Who encoded it: hashes of a model's components, for the keys of the caches. Torch-free.

A latent depends on the VAE's weights and precision; an embedding on tokenizer, text encoder, precision,
instruction and length. Hashing gigabytes is remembered by path, size and modification time.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sana_tune.model.layout import STEMS, component_weights

MAX_TOKENS = 300
_CHUNK = 1 << 22


def component_identity(folder: Path, component: str, memory: Path | None = None, *, variant: str | None = None) -> str:
    """Hex hash of what a component computes: its config and the chosen weights, or all the tokenizer's files.

    memory: JSON file that remembers the hashes of files (created when absent). File names of variants do not count:
    an exported copy has the same identity.
    """
    remembered = _recall(memory)
    names = _files(folder, component, variant)
    with ThreadPoolExecutor(max_workers=2) as pool:
        hashes = list(pool.map(lambda path: _hash(path, remembered), names.values()))
    _remember(memory, remembered, names.values(), hashes)
    parts = [component, *sorted(zip(names, hashes, strict=True))]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def is_remembered(folder: Path, component: str, memory: Path | None, *, variant: str | None = None) -> bool:
    """Whether `component_identity` has nothing to hash: all is remembered, and no file changed since."""
    remembered = _recall(memory)
    files = _files(folder, component, variant).values()
    return all((known := remembered.get(str(path.resolve()))) and known[:2] == _stamp(path) for path in files)


def latent_identity(
    folder: Path, *, dtype: str = "fp32", memory: Path | None = None, variant: str | None = None, tiled: bool = False
) -> str:
    """Identity of the scaled latents that a folder's VAE makes in a precision ("fp32", "bf16"), whole or in tiles."""
    vae = component_identity(folder, "vae", memory, variant=variant)
    return _digest(f"latents scaled, {'tiled' if tiled else 'untiled'}", vae, dtype)


def text_identity(
    folder: Path,
    *,
    instruction: str,
    dtype: str,
    memory: Path | None = None,
    variant: str | None = None,
    max_tokens: int = MAX_TOKENS,
) -> str:
    """Identity of the embeddings of texts under an instruction ("" = none; negative prompts have none).

    dtype: the encoder's precision, that of quantised weights among them. The empty caption never has the instruction,
    under either identity.
    """
    encoder = component_identity(folder, "text_encoder", memory, variant=variant)
    tokenizer = component_identity(folder, "tokenizer", memory)
    return _digest("text, valid tokens", encoder, tokenizer, instruction, dtype, max_tokens)


def _digest(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _files(folder: Path, component: str, variant: str | None) -> dict[str, Path]:
    """Canonical name → file."""
    if component not in STEMS:
        return {path.name: path for path in sorted((folder / component).iterdir()) if path.is_file()}
    weights = component_weights(folder, component, variant=variant)
    plain = weights.plain_names
    found = {plain[file]: folder / file for file in weights.files}
    return {**found, "config.json": folder / component / "config.json"}


def _hash(path: Path, remembered: dict[str, list]) -> str:
    known = remembered.get(str(path.resolve()))
    if known is not None and known[:2] == _stamp(path):
        return known[2]
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]


def _recall(memory: Path | None) -> dict[str, list]:
    """The remembered hashes; a memory that is absent or broken is an empty one, it only costs time."""
    if memory is None or not memory.is_file():
        return {}
    try:
        value = json.loads(memory.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _remember(memory: Path | None, remembered: dict[str, list], paths, hashes: list[str]) -> None:
    fresh = {str(path.resolve()): [*_stamp(path), hash] for path, hash in zip(paths, hashes, strict=True)}
    if memory is None or all(remembered.get(path) == entry for path, entry in fresh.items()):
        return
    memory.parent.mkdir(parents=True, exist_ok=True)
    staged = memory.with_name(f".{memory.name}.{uuid.uuid4().hex[:8]}")
    staged.write_text(json.dumps({**remembered, **fresh}), encoding="utf-8")
    os.replace(staged, memory)
