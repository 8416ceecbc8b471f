"""Weight files and variants, and what a whole model folder is."""

from __future__ import annotations

import shutil

import pytest

from sana_tune.errors import UserError
from sana_tune.model.layout import (
    Weights,
    check_folder,
    choose_weights,
    component_weights,
    find_weights,
    list_files,
    whole_safetensors,
)
from tests.fixtures import cached_sana

PLAIN = {
    "transformer": "transformer/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
    "text_encoder": "text_encoder/model",
}


def names(*variants: str) -> list[str]:
    """Single-file weights of every component in the plain form and in variants."""
    return [f"{stem}{f'.{variant}' if variant else ''}.safetensors" for stem in PLAIN.values() for variant in variants]


def chosen(files: list[str], **wish: str) -> dict[str, str | None]:
    return {component: weights.variant for component, weights in choose_weights(files, "it", **wish).items()}


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(cached_sana(), tmp_path / "model")


def test_weights_are_found_in_one_file_and_in_shards():
    files = [
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder/model.bf16-00002-of-00002.safetensors",
        "text_encoder/model.bf16-00001-of-00002.safetensors",
        "text_encoder/model.safetensors.index.bf16.json",
        "text_encoder/model-00001-of-00002.fp16.safetensors",  # the older spelling
        "text_encoder/model-00002-of-00002.fp16.safetensors",
        "text_encoder/model.safetensors.index.fp16.json",
        "text_encoder/model.q8-00001-of-00002.safetensors",  # one shard and the index are missing
        "text_encoder/pytorch_model.bin",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    found = find_weights(files, "text_encoder")
    assert set(found) == {None, "bf16", "fp16"}
    assert found[None] == Weights("text_encoder", None, ("text_encoder/model.safetensors",))
    assert [file[-27:] for file in found["bf16"].files] == [
        "bf16-00001-of-00002.safetensors"[-27:],
        "bf16-00002-of-00002.safetensors"[-27:],
    ]
    assert found["bf16"].plain_names == {
        "text_encoder/model.bf16-00001-of-00002.safetensors": "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model.bf16-00002-of-00002.safetensors": "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.bf16.json": "text_encoder/model.safetensors.index.json",
    }
    assert found["fp16"].index == "text_encoder/model.safetensors.index.fp16.json"


def test_one_variant_of_each_component_is_chosen():
    both = names("", "bf16")
    assert chosen(both) == {"transformer": None, "vae": None, "text_encoder": "bf16"}
    assert chosen(both, dtype="bf16") == {"transformer": "bf16", "vae": None, "text_encoder": "bf16"}
    assert set(chosen(both, variant="bf16").values()) == {"bf16"}
    assert set(chosen(names("")).values()) == {None}
    assert set(chosen(names("fp16"), dtype="bf16").values()) == {"fp16"}, "what there is"
    some = [*names(""), "transformer/diffusion_pytorch_model.fp16.safetensors"]
    assert chosen(some, variant="fp16") == {"transformer": "fp16", "vae": None, "text_encoder": None}


def test_what_cannot_be_chosen():
    with pytest.raises(UserError, match="no weights in the variant 'fp8'; it has bf16 and the plain ones"):
        chosen(names("", "bf16"), variant="fp8")
    with pytest.raises(UserError, match="the plain ones alone"):
        chosen(names(""), variant="bf16")
    with pytest.raises(UserError) as caught:
        chosen(["transformer/diffusion_pytorch_model.bin", "vae/config.json"])
    assert len(caught.value.problems) == 3, "all at once"
    assert "pickled weights are not loaded" in str(caught.value.problems[0])


def test_a_whole_folder_passes(model):
    assert set(check_folder(model)) == {"transformer", "vae", "text_encoder"}
    assert component_weights(model, "vae").files == ("vae/diffusion_pytorch_model.safetensors",)
    assert "model_index.json" in list_files(model) and "tokenizer/tokenizer.json" in list_files(model)


@pytest.mark.parametrize(
    ("remove", "said"),
    [
        ("model_index.json", "model_index.json missing"),
        ("scheduler", "scheduler/scheduler_config.json missing"),
        ("tokenizer", "tokenizer/ missing"),
        ("vae/config.json", "vae/config.json missing"),
        ("transformer/diffusion_pytorch_model.safetensors", "no complete safetensors weights in transformer/"),
    ],
)
def test_what_is_missing_is_named(model, remove, said):
    path = model / remove
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=said):
        check_folder(model)


def test_a_folder_of_something_else(tmp_path, model):
    with pytest.raises(UserError, match="none of them is there"):
        check_folder(tmp_path / "nothing here")
    (model / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="this model is a FluxPipeline"):
        check_folder(model)
    (model / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        check_folder(model)


def test_torn_weights_are_seen_before_anything_is_loaded(model):
    path = model / "vae/diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    assert whole_safetensors(path)
    for torn in (whole[:-1], whole[:100], whole[:5], b"", b"<html>not found</html>", whole + b"x"):
        path.write_bytes(torn)
        assert not whole_safetensors(path)
    with pytest.raises(UserError, match="cut short or not safetensors: vae/diffusion_pytorch_model"):
        check_folder(model)
