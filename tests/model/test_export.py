"""The exported folder is a complete pipeline that holds exactly the given weights."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sana_tune.errors import UserError
from sana_tune.model.export import export_pipeline, write_transformer
from sana_tune.model.identity import component_identity
from sana_tune.model.layout import check_folder
from sana_tune.model.sana import load_transformer
from tests.fixtures import cached_sana


def trained(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    state = load_transformer(cached_sana()).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in state.items()}


def pipeline_weights(folder, **options) -> dict[str, torch.Tensor]:
    from diffusers import SanaPipeline

    return SanaPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, **options).transformer.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_a_complete_pipeline_with_the_given_weights(tmp_path):
    raw, ema = trained(1), trained(2)
    out = tmp_path / "run" / "pipeline"
    export_pipeline(cached_sana(), raw, ema, out, "# How to use it")
    check_folder(out)
    assert same(pipeline_weights(out), raw)
    assert same(load_transformer(out, subfolder="transformer_ema").state_dict(), ema)
    assert (out / "README.md").read_text() == "# How to use it"
    assert [path.name for path in out.parent.iterdir()] == ["pipeline"], "nothing is left beside it"
    for component in ("vae", "text_encoder", "tokenizer"):
        assert component_identity(out, component) == component_identity(cached_sana(), component)
    modes = {path.stat().st_mode & 0o444 for path in out.rglob("*") if path.is_file()}
    assert modes == {(out / "README.md").stat().st_mode & 0o444}, "others may read all of it or none"


def test_without_ema_and_in_bf16(tmp_path):
    raw = trained(3, torch.bfloat16)
    export_pipeline(cached_sana(), raw, None, tmp_path / "pipeline", "")
    assert not (tmp_path / "pipeline/transformer_ema").exists()
    assert same(pipeline_weights(tmp_path / "pipeline", dtype=torch.bfloat16), raw)
    assert same(load_file(tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors"), raw)


def test_an_older_export_is_replaced_only_by_a_whole_one(tmp_path):
    out = tmp_path / "pipeline"
    export_pipeline(cached_sana(), trained(1), trained(2), out, "old")
    broken = shutil.copytree(cached_sana(), tmp_path / "broken")
    (broken / "scheduler/scheduler_config.json").unlink()
    (broken / "scheduler").rmdir()
    with pytest.raises(UserError, match="cannot be written"):
        export_pipeline(broken, trained(3), None, out, "new")
    assert (out / "README.md").read_text() == "old" and same(pipeline_weights(out), trained(1))
    export_pipeline(cached_sana(), trained(3), None, out, "new")
    assert (out / "README.md").read_text() == "new" and same(pipeline_weights(out), trained(3))
    assert not (out / "transformer_ema").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "pipeline"]


def test_what_killed_exports_left_is_removed(tmp_path):
    for name in (".pipeline.tmp-0123abcd/transformer", ".pipeline.tmp-4567cdef.old/vae", ".other.tmp-0123abcd"):
        (tmp_path / name).mkdir(parents=True)
    export_pipeline(cached_sana(), trained(1), None, tmp_path / "pipeline", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.tmp-0123abcd", "pipeline"]


def test_large_transformers_are_written_in_shards(tmp_path):
    raw = trained(4)
    export_pipeline(cached_sana(), raw, None, tmp_path / "pipeline", "", max_shard_bytes=400_000)
    names = sorted(path.name for path in (tmp_path / "pipeline/transformer").iterdir())
    assert len(names) > 3 and "diffusion_pytorch_model.safetensors.index.json" in names
    check_folder(tmp_path / "pipeline")
    assert same(pipeline_weights(tmp_path / "pipeline"), raw)


def test_one_variant_is_copied_under_plain_names(tmp_path):
    from transformers import Gemma2Model

    source = shutil.copytree(cached_sana(), tmp_path / "source")
    encoder = Gemma2Model.from_pretrained(source / "text_encoder").bfloat16()
    encoder.save_pretrained(source / "text_encoder", variant="bf16", max_shard_size="50KB")
    shards = [path.name for path in (source / "text_encoder").iterdir() if "bf16" in path.name]
    assert len(shards) > 2
    export_pipeline(source, trained(1), None, tmp_path / "pipeline", "")
    names = {path.name for path in (tmp_path / "pipeline/text_encoder").iterdir()}
    assert not any("bf16" in name for name in names) and "model.safetensors" not in names
    assert len(names) == len(shards) + 1, "the shards, their index and config.json"
    again, info = Gemma2Model.from_pretrained(
        tmp_path / "pipeline/text_encoder", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and same(again.state_dict(), encoder.state_dict())
    check_folder(tmp_path / "pipeline")


def test_a_downloaded_model_is_copied_not_linked(tmp_path):
    source = shutil.copytree(cached_sana(), tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"  # the hub's cache holds links
    for path in source.rglob("*"):
        if path.is_file():
            link = snapshot / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path, link)
    export_pipeline(snapshot, trained(1), None, tmp_path / "pipeline", "")
    assert not any(path.is_symlink() for path in (tmp_path / "pipeline").rglob("*"))


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the pipeline cannot be written"):
        export_pipeline(cached_sana(), trained(1), None, tmp_path / "file" / "pipeline", "")


def test_a_transformer_folder_alone(tmp_path):
    config = json.loads((cached_sana() / "transformer/config.json").read_text())
    state = trained(5)
    state["proj_out.weight"] = state["proj_out.weight"].t().contiguous().t()  # not contiguous, as training may leave it
    write_transformer(config, state, tmp_path / "transformer")
    assert json.loads((tmp_path / "transformer/config.json").read_text()) == config
    assert same(load_file(tmp_path / "transformer/diffusion_pytorch_model.safetensors"), state)
