"""Facts of models: from folders, from the table, and the numbers of the published architectures."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from sana_tune.errors import UserError
from sana_tune.model import facts
from sana_tune.model.fetch import locate
from tests.fixtures import cached_sana

OWNER = "Efficient-Large-Model"
PUBLISHED = {  # sana.md, section 2: parameters, sample_size, native px, shift
    f"{OWNER}/Sana_600M_512px_diffusers": (591_747_872, 16, 512, 3.0),
    f"{OWNER}/Sana_600M_1024px_diffusers": (591_747_872, 32, 1024, 3.0),
    f"{OWNER}/Sana_1600M_1024px_BF16_diffusers": (1_604_462_752, 32, 1024, 3.0),
    f"{OWNER}/Sana_1600M_2Kpx_BF16_diffusers": (1_604_462_752, 64, 2048, 3.0),
    f"{OWNER}/Sana_1600M_4Kpx_BF16_diffusers": (1_604_462_752, 128, 4096, 6.0),
    f"{OWNER}/SANA1.5_1.6B_1024px_diffusers": (1_604_641_952, 32, 1024, 3.0),
    f"{OWNER}/SANA1.5_4.8B_1024px_diffusers": (4_721_825_952, 32, 1024, 3.0),
    "terminusresearch/sana-1.6b-1024px": (1_604_462_752, 32, 1024, 3.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    found = facts.known(name)
    assert found is not None and found.folder is None and found.name == name
    assert (found.parameters, found.sample_size, found.native_px, found.flow_shift) == PUBLISHED[name]
    assert (found.vae_factor, found.latent_channels, found.caption_dim) == (32, 32, 2304)
    assert found.scaling_factor == 0.41407
    assert "non-commercial" in found.licence and "Gemma" in found.licence
    breaks = "BF16" not in name and name.startswith(f"{OWNER}/Sana_")
    assert found.bf16_safe is not breaks
    problem = facts.check_bf16(found)
    assert (problem is not None) is breaks
    if problem is not None:
        assert "break in bf16" in problem.what and "published no BF16 weights" in problem.fix


def test_every_known_model_is_pinned_here_or_one_of_its_siblings():
    siblings = {f"{OWNER}/Sana_1600M_512px_diffusers", f"{OWNER}/Sana_1600M_1024px_diffusers"}
    assert set(facts.KNOWN) == set(PUBLISHED) | siblings
    for name in siblings:
        found = facts.known(name)
        assert found is not None and found.parameters == 1_604_462_752 and not found.bf16_safe
        problem = facts.check_bf16(found)
        assert problem is not None and problem.fix.startswith(f"use {OWNER}/Sana_1600M_1024px_BF16_diffusers, or set")
    assert facts.known("someone/else") is None


@pytest.mark.parametrize(
    "name",
    [f"{OWNER}/Sana_600M_1024px_diffusers", f"{OWNER}/SANA1.5_1.6B_1024px_diffusers",
     f"{OWNER}/SANA1.5_4.8B_1024px_diffusers", f"{OWNER}/Sana_1600M_2Kpx_BF16_diffusers"],
)  # fmt: skip
def test_the_table_builds_a_model_of_that_many_parameters(name):
    from diffusers import SanaTransformer2DModel

    with torch.device("meta"):
        model = SanaTransformer2DModel(**facts.KNOWN[name].transformer)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name][0]


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": "rms_norm_across_heads"}, {"attention_bias": True, "norm_elementwise_affine": True},
     {"patch_size": 2, "out_channels": None, "in_channels": 8}, {"guidance_embeds": True}],
)  # fmt: skip
def test_parameters_are_counted_without_building(changes):
    from diffusers import SanaTransformer2DModel

    small = {"num_attention_heads": 4, "num_layers": 2, "num_cross_attention_heads": 3, "cross_attention_head_dim": 40}
    config = {**small, "cross_attention_dim": 128, "caption_channels": 64, **changes}
    with torch.device("meta"):
        model = SanaTransformer2DModel(**config)
    assert facts.count_parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())


def test_a_folder_is_read():
    folder = cached_sana(qk_norm=True, pos_embed=False)
    found = facts.from_folder(folder)
    assert found.folder == folder and found.name == str(folder)
    assert (found.vae_factor, found.latent_channels, found.caption_dim, found.sample_size) == (32, 32, 32, 2)
    assert (found.native_px, found.native_tokens, found.layers, found.width) == (64, 4, 3, 64)
    assert found.qk_norm == "rms_norm_across_heads" and found.interpolation_scale is None
    assert (found.flow_shift, found.flow_shift_origin) == (3.0, "scheduler_config.json: flow_shift")
    assert "unknown" in found.licence and found.notes == ()
    assert facts.from_folder(cached_sana(pos_embed=True)).interpolation_scale == 1.0


def test_a_downloaded_model_keeps_what_the_table_knows():
    name = f"{OWNER}/Sana_1600M_1024px_diffusers"
    found = facts.from_folder(cached_sana(), name)
    assert not found.bf16_safe and "non-commercial" in found.licence and found.sample_size == 2


def test_nano_is_read_and_counted():
    found = facts.from_folder(locate("nano"), "nano")
    assert (found.vae_factor, found.latent_channels, found.native_px) == (8, 8, 64)
    assert "Apache-2.0" in found.licence
    from safetensors import safe_open

    with safe_open(locate("nano") / "transformer/diffusion_pytorch_model.safetensors", "pt") as file:
        sizes = [file.get_slice(key).get_shape() for key in file.keys()]
    assert found.parameters == sum(torch.Size(size).numel() for size in sizes)


def test_the_shift_stands_under_either_key():
    assert facts.read_shift({"flow_shift": 6.0, "shift": 1.0}) == (6.0, "scheduler_config.json: flow_shift", None)
    assert facts.read_shift({"shift": 4}) == (4.0, "scheduler_config.json: shift", None)
    for nothing in ({}, {"flow_shift": None}, {"shift": "3"}, {"flow_shift": True}):
        shift, origin, warning = facts.read_shift(nothing)
        assert (shift, origin) == (3.0, "default") and "names no flow shift" in str(warning)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "SanaTransformer2DModel; found Flux"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "AutoencoderDC; found AutoencoderKL"),
        ("vae/config.json", {"scaling_factor": None}, "scaling_factor"),
        ("transformer/config.json", {"guidance_embeds": True}, "distilled"),
        ("transformer/config.json", {"timestep_scale": 0.001}, "distilled"),
    ],
)
def test_other_models_are_refused(tmp_path, file, changes, said):
    shutil.copytree(cached_sana(), tmp_path / "model")
    path = tmp_path / "model" / file
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(UserError, match=said) as caught:
        facts.from_folder(tmp_path / "model")
    assert file in str(caught.value).replace("\\", "/")


def test_a_model_nobody_knows_is_planned_as_the_common_one():
    common, found = facts.known(f"{OWNER}/Sana_1600M_1024px_BF16_diffusers"), facts.assumed("maker/sana")
    assert common is not None and found.name == "maker/sana" and found.parameters == common.parameters
    assert (found.native_px, found.vae_factor, found.flow_shift) == (1024, 32, 3.0)
    assert "as if it were the 1.6B model" in found.notes[0] and found.licence != common.licence


def test_what_a_download_takes_is_estimated():
    common = facts.assumed("maker/sana")
    sizes = facts.estimated_bytes(common)
    assert sizes["transformer"] == 4 * common.parameters
    assert facts.estimated_bytes(common, "bf16")["transformer"] == 2 * common.parameters
    assert 5.1e9 < sizes["text_encoder"] < 5.4e9 and sizes["vae"] == 1.25e9
    assert 12e9 < sum(sizes.values()) < 14e9


def test_the_transformer_of_a_published_repository_is_known():
    config = facts.known_transformer("Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers")
    assert (config["num_layers"], config["qk_norm"], config["num_attention_heads"]) == (60, "rms_norm_across_heads", 70)
    with pytest.raises(KeyError):
        facts.known_transformer("somebody/else")


@pytest.mark.parametrize(
    ("interval", "stride", "found"),
    [(1, None, "11111"), (2, None, "10101"), (9, None, "10000"), (1, 2, "10101"), (2, 3, "11011"), (2, 2, "11111")],
)
def test_which_blocks_are_recomputed(interval, stride, found):
    assert "".join("01"[again] for again in facts.recomputed_blocks(5, interval, stride)) == found
