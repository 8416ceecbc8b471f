"""What an adapter is put on and how large it is, worked out without torch: as LyCORIS itself finds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel

from sana_tune.config.lycoris import lycoris_of
from sana_tune.errors import UserError
from sana_tune.model.adapted import adapted, factorization, layers_of
from sana_tune.model.facts import KNOWN, count_parameters, known_transformer
from sana_tune.train.adapt import Adapter

SMALL = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 16,
    "sample_size": 4,
}  # fmt: skip


@pytest.mark.parametrize("config", [SMALL, {**SMALL, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}, {}])
def test_the_layers_are_those_of_the_model(config: dict[str, Any]):
    with torch.device("meta"):
        model = SanaTransformer2DModel(**config)
    real = [
        (name, tuple(module.weight.shape))
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    mine = list(layers_of(config))
    assert real == [(layer.name, (layer.outputs, layer.inputs // layer.groups, *layer.kernel)) for layer in mine]
    for layer in mine:
        for name, kind in layer.around:
            assert type(model.get_submodule(name)).__name__ == kind, name


FILES: dict[str, dict[str, Any]] = {
    "whole": {"full_matrix": True, "factor": 4},
    "ranked": {"linear_dim": 2, "factor": 8},
    "even": {"linear_dim": 1},
    "both": {"linear_dim": 1, "decompose_both": True, "factor": 16},
    "unbalanced": {"linear_dim": 2, "unbalanced_factorization": True, "factor": 4},
    "loha": {"algo": "loha", "linear_dim": 3},
    "locon": {"algo": "locon", "linear_dim": 3},
    "mapped": {"apply_preset": {
        "module_algo_map": {"FeedForward": {"factor": 2}, "Attention": {"algo": "locon", "dim": 2}}}},
    "blocks": {"apply_preset": {
        "target_module": ["SanaTransformerBlock"], "module_algo_map": {"GLUMBConv": {"factor": 2}}}},
    "named": {"apply_preset": {
        "target_module": [], "target_name": ["proj_out", r"transformer_blocks\.1\.attn1\.to_q"]}},
    "excluded": {"apply_preset": {"exclude_name": [r"transformer_blocks\.0\."]}},
    "everything": {"apply_preset": {"target_module": ["Linear", "Conv2d"]}, "use_tucker": True, "linear_dim": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_layers_and_sizes_are_those_of_lycoris(name: str):
    file = lycoris_of({"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, **FILES[name]}, "f")
    found = adapted(SMALL, file)
    model = SanaTransformer2DModel(**SMALL).requires_grad_(False)
    adapter = Adapter(model, file)
    names = {id(module): name for name, module in model.named_modules()}
    real = {
        names[id(module.org_module[0])]: sum(parameter.numel() for parameter in module.parameters())
        for module in adapter.modules
    }
    assert dict(found.layers) == real
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(found.classes.values()) == len(found.layers) and found.model_parameters == count_parameters(SMALL)


def test_of_the_published_model():
    file = lycoris_of({"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 16}, "f")
    name = next(name for name in KNOWN if "1600M_1024px_BF16" in name)
    told = str(adapted(known_transformer(name), file))
    assert told.startswith("200 layers (160 in Attention, 40 in GLUMBConv), 6.13 M parameters = 0.38 %")


def test_what_matches_nothing_is_an_error_that_lists_the_classes():
    file = lycoris_of(
        {"algo": "lokr", "linear_dim": 4, "linear_alpha": 1, "apply_preset": {"target_module": ["Mlp"]}}, "f"
    )
    with pytest.raises(UserError, match=r"no layer of the model is in Mlp.*(?s:.)*name some of: .*GLUMBConv"):
        adapted(SMALL, file)


@pytest.mark.parametrize("size", [1, 7, 127, 250, 360, 1024, 2240, 5600, 11200])
def test_sizes_are_split_as_lycoris_splits_them(size: int):
    from lycoris.functional import factorization as theirs

    for factor in (-1, 1, 2, 4, 8, 12, 16, 64, 10000):
        assert factorization(size, factor) == theirs(size, factor), factor
