"""Trained weights → a complete pipeline folder that `diffusers.SanaPipeline.from_pretrained` loads; or an adapter's."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError
from torch import Tensor

from sana_tune.config.lycoris import ADAPTER, LycorisFile
from sana_tune.errors import Problem, UserError
from sana_tune.model.layout import CONFIGS, INDEX, Weights, choose_weights, list_files, read_json

STEM = "diffusion_pytorch_model"
MAX_SHARD_BYTES = 10_000_000_000


def export_pipeline(
    source: Path,
    transformer_state: Mapping[str, Tensor],
    ema_state: Mapping[str, Tensor] | None,
    out: Path,
    readme: str,
    *,
    variant: str | None = None,
    dtype: str = "fp32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    beside: Mapping[str, Path] = MappingProxyType({}),
    comment: str | None = None,
) -> None:
    """Write a pipeline folder at `out`, replacing an older one: raw weights in transformer/, EMA in transformer_ema/.

    The VAE, text encoder, tokenizer and scheduler are copied from the source model, one variant under plain file
    names. Written beside `out`, synced and renamed, so that `out` is whole or not there; what killed exports left
    beside it is removed. States keep their dtype.
    beside: more files, path inside → source. comment: for the metadata of the trained weights.
    Raises UserError when the place cannot be written.
    """
    with _staged(out, "pipeline") as staged:
        _write(source, transformer_state, ema_state, staged, readme, variant, dtype, max_shard_bytes, comment)
        _copy_beside(beside, staged)


def export_adapter(
    file: LycorisFile,
    state: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None,
    out: Path,
    readme: str,
    *,
    beside: Mapping[str, Path] = MappingProxyType({}),
    comment: str | None = None,
) -> None:
    """Write an adapter's folder at `out` as `export_pipeline` writes a pipeline's: what LyCORIS's loader reads.

    average: likewise in ema/.
    """
    from safetensors.torch import save_file

    metadata = {"format": "pt", **({"modelspec.comment": comment} if comment else {})}
    with _staged(out, "adapter") as staged:
        for name, tensors in ((ADAPTER.weights, state), (ADAPTER.average, average)):
            if tensors:
                path = staged / name
                path.parent.mkdir(exist_ok=True)
                config = path.with_name(ADAPTER.config)
                config.write_text(json.dumps(file.to_json(), indent=2) + "\n", encoding="utf-8")
                save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path, metadata)
                path.chmod(config.stat().st_mode)  # safetensors writes for the owner alone
        (staged / "README.md").write_text(readme, encoding="utf-8")
        _copy_beside(beside, staged)


@contextmanager
def _staged(out: Path, what: str) -> Iterator[Path]:
    """A folder that takes the place of `out` at the end, unless something fails. Raises UserError."""
    staged = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".{out.name}.tmp-*"):  # by a run that was killed
            shutil.rmtree(left)
        staged.mkdir()
        try:
            yield staged
            _replace(staged, out)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        raise UserError(
            Problem(str(out), f"the {what} cannot be written: {error}", "make room there or name another folder")
        ) from error


def write_transformer(
    config: Mapping[str, object],
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    comment: str | None = None,
) -> None:
    """A transformer/ folder as diffusers stores it: config.json and safetensors, in shards above the limit.

    comment: kept as modelspec.comment in the metadata of the files (https://github.com/Stability-AI/ModelSpec).
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: value for key, value in config.items() if key != "_name_or_path"}  # a path of some machine
    (folder / "config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    metadata = {"format": "pt", **({"modelspec.comment": comment} if comment else {})}
    split = split_torch_state_dict_into_shards(
        dict(state), filename_pattern=STEM + "{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    for name, keys in split.filename_to_tensors.items():
        tensors = {key: state[key].detach().cpu().contiguous() for key in keys}
        save_file(tensors, folder / name, metadata=metadata)
        (folder / name).chmod((folder / "config.json").stat().st_mode)  # safetensors writes for the owner alone
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{STEM}.safetensors.index.json").write_text(text, encoding="utf-8")


def _write(
    source: Path,
    transformer_state: Mapping[str, Tensor],
    ema_state: Mapping[str, Tensor] | None,
    staged: Path,
    readme: str,
    variant: str | None,
    dtype: str,
    max_shard_bytes: int,
    comment: str | None,
) -> None:
    chosen = choose_weights(list_files(source), str(source), variant=variant, dtype=dtype)
    config = read_json(source / CONFIGS["transformer"])
    write_transformer(
        config, transformer_state, staged / "transformer", max_shard_bytes=max_shard_bytes, comment=comment
    )
    if ema_state is not None:
        write_transformer(
            config, ema_state, staged / "transformer_ema", max_shard_bytes=max_shard_bytes, comment=comment
        )
    for component in ("vae", "text_encoder"):
        _copy_weights(source, chosen[component], staged)
    for component in ("tokenizer", "scheduler"):
        shutil.copytree(source / component, staged / component)
    shutil.copyfile(source / INDEX, staged / INDEX)
    (staged / "README.md").write_text(readme, encoding="utf-8")


def _copy_beside(files: Mapping[str, Path], staged: Path) -> None:
    """Copy what goes beside the pipeline, and sync all that is staged."""
    for name, path in files.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, staged / name)
    for path in [*staged.rglob("*"), staged]:
        _sync(path)


def _copy_weights(source: Path, weights: Weights, staged: Path) -> None:
    """One component's configs and its chosen weights, renamed to plain names, an index rewritten to them."""
    component = weights.component
    (staged / component).mkdir()
    for path in (source / component).iterdir():
        if path.is_file() and path.suffix == ".json" and ".index." not in path.name:
            shutil.copyfile(path, staged / component / path.name)
    names = weights.plain_names
    for file in weights.files:
        shutil.copyfile(source / file, staged / names[file])
    if weights.index is not None:
        index = read_json(source / weights.index)
        short = {Path(old).name: Path(new).name for old, new in names.items()}
        index["weight_map"] = {key: short[file] for key, file in index["weight_map"].items()}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (staged / names[weights.index]).write_text(text, encoding="utf-8")


def _replace(staged: Path, out: Path) -> None:
    """Put the staged folder in the place of `out`; an older one goes only when the new one stands."""
    old = out.with_name(f"{staged.name}.old")
    if out.exists():
        out.rename(old)
    staged.rename(out)
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
