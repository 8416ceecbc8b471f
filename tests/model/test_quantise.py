"""Quantised networks: near the unquantised ones, gradients through them, nothing dense on the card, adapters on top."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana_tune.memory import base_weights_bytes
from sana_tune.model import attention
from sana_tune.model.attention import install, published
from sana_tune.model.blocks import arrange
from sana_tune.model.facts import from_folder
from sana_tune.model.fetch import locate
from sana_tune.model.packing import encoder_bytes
from sana_tune.model.quantise import (
    QuantisedLinear,
    QuantisedPointwise,
    footprint,
    is_packed,
    matrices_of,
    pack,
    quantise,
    rounded,
)
from sana_tune.model.sana import load_text_encoder, load_transformer

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
# Precision → the most that a prediction and its gradient may be off, in fp32 and with all the rest in bf16.
BOUNDS = {"nf4-bnb": (0.10, 0.12), "int8-bnb": (0.01, 0.03), "int8-torchao": (0.01, 0.03), "fp8-torchao": (0.04, 0.05)}
PRECISIONS = [pytest.param(each, marks=needs_torchao if "torchao" in each else ()) for each in BOUNDS]
CPU = torch.device("cpu")


def nano() -> Any:
    model = load_transformer(locate("nano"))
    install(model)
    return model


def answer(model: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The prediction for fixed noise, and the gradient of its square in the noise."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 8, 6, 4, generator=generator).to(dtype).requires_grad_()
    text = torch.randn(2, 7, 64, generator=generator).to(dtype)
    found = model(latents, encoder_hidden_states=text, timestep=torch.tensor([300.0, 800.0]), return_dict=False)[0]
    found.float().square().mean().backward()
    assert latents.grad is not None
    return found.detach().float(), latents.grad.float()


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, Tensor]:
    return answer(nano())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_predictions_and_gradients_are_near_the_unquantised_ones(truth, precision, dtype):
    model = nano()
    quantise(model, precision, device=CPU, default_dtype=dtype, measure=False)
    found = answer(model, dtype)
    assert 1e-4 < error(found[0], truth[0]) < BOUNDS[precision][dtype == torch.bfloat16]
    assert torch.cosine_similarity(found[1].flatten(), truth[1].flatten(), 0) > 0.9
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_computes_what_a_model_with_the_rounded_weights_does(precision):
    """So that the whole difference is that of the weights; the gradient in the input comes from the same ones."""
    model, dense = nano(), nano()
    for name in matrices_of(dense):
        weight = dense.get_submodule(name).weight
        weight.data = rounded(weight.data.flatten(1), precision).view_as(weight)
    quantise(model, precision, device=CPU, measure=False)
    found, exact = answer(model), answer(dense)
    assert error(found[0], exact[0]) < 1e-5 and error(found[1], exact[1]) < 1e-4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_blocks_matrices_are_replaced_and_what_is_sensitive_is_not(precision):
    model, whole = nano(), nano()
    done = quantise(model, precision, device=CPU, measure=False)
    assert len(done.replaced) == 6 * 10, "8 projections and 2 convolutions of each block"
    for name in done.replaced:
        kind = QuantisedPointwise if name.endswith(("conv_inverted", "conv_point")) else QuantisedLinear
        assert type(model.get_submodule(name)) is kind
    kept = {name for name, _ in whole.named_parameters()} - {f"{name}.weight" for name in done.replaced}
    ours = dict(model.named_parameters())
    assert all(torch.equal(ours[name], dict(whole.named_parameters())[name]) for name in kept)
    assert {"time_embed.linear.weight", "proj_out.weight", "caption_projection.linear_1.weight"} <= kept
    assert {"transformer_blocks.0.ff.conv_depth.weight", "patch_embed.proj.weight"} <= kept
    parameters = sum(each.numel() for each in whole.parameters())
    assert sum(done.kept.values()) == parameters - sum(
        whole.get_parameter(f"{n}.weight").numel() for n in done.replaced
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_layer_computes_as_the_one_it_replaces_with_the_rounded_weight(precision, autocast):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(64, 96), nn.Conv2d(64, 96, 1, bias=False)])})
    plain = [layer.requires_grad_(False) for layer in model["layers"]]  # type: ignore[union-attr]
    quantise(model, precision, device=CPU)
    inputs = torch.randn(2, 5, 64), torch.randn(2, 64, 3, 4).to(memory_format=torch.channels_last)
    for layer, before, given in zip(model["layers"], plain, inputs, strict=True):  # type: ignore[arg-type]
        before.weight.data = rounded(before.weight.data.flatten(1), precision).view_as(before.weight)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, truth = layer(given), before(given)
        assert found.dtype == truth.dtype and found.shape == truth.shape
        assert error(found.float(), truth.float()) < (1e-2 if autocast else 1e-5)


def test_a_pass_without_gradients_does_not_take_them_from_the_next():
    """bitsandbytes' own layer repacks its weight for some CPUs then, and has no gradient any more."""
    model = nano()
    quantise(model, "nf4-bnb", device=CPU, measure=False)
    before = answer(model)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 8, 4, 4), torch.zeros(1, 4, 64), torch.tensor([1.0]), return_dict=False)
    after = answer(model.train())
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("precision", ["nf4-bnb", "int8-bnb"])
def test_our_ways_through_the_blocks_yield_to_packed_layers(monkeypatch, precision, large):
    monkeypatch.setattr(attention, "LARGE", 0 if large else 2**40)
    model = nano()
    quantise(model, precision, device=CPU, measure=False)
    ours = answer(model)
    with published(model):
        theirs = answer(model)
    assert error(ours[0], theirs[0]) < 1e-5 and error(ours[1], theirs[1]) < 1e-4


@pytest.mark.parametrize("selective", [False, True], ids=["torch", "selective"])
@pytest.mark.parametrize("precision", ["nf4-bnb", "int8-bnb"])
def test_recomputed_blocks_have_the_same_gradient(precision, selective):
    model = nano()
    quantise(model, precision, device=CPU, measure=False)
    before = answer(model)
    arrange(model, (True,) * 6, selective=selective, compiler=None, sizes=1)
    after = answer(model)
    assert torch.equal(before[0], after[0]) and error(after[1], before[1]) < 1e-6


# ---- what it saves, and what is told ----


@pytest.mark.parametrize("precision", ["no_change", *PRECISIONS])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_plan_knows_the_bytes(precision, dtype):
    folder = locate("nano")
    model = load_transformer(folder)
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    done = quantise(model, precision, device=CPU, default_dtype=torch_dtype, measure=False)
    planned = base_weights_bytes(from_folder(folder, "nano"), precision, dtype)
    assert planned == pytest.approx(done.bytes_after, rel=0.02)
    assert done.bytes_after == footprint(model)
    assert done.bytes_after < done.bytes_before or precision == "no_change"


@pytest.mark.parametrize("precision", ["nf4-bnb", "int8-bnb"])
def test_the_error_that_sparing_them_saves_is_measured_and_told(precision):
    model = nano()
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    done = quantise(model, precision, device=CPU, default_dtype=torch.float32)
    assert done.error is not None and done.error_if_all is not None
    assert 0 < done.error < done.error_if_all < 0.5
    assert torch.equal(model.proj_out.weight, whole["proj_out.weight"]), "what was tried is taken back"
    line = done.told()
    assert "\n" not in line and f"60 layers in {precision}" in line
    assert all(word in line for word in ("time embedding", "caption projection", "output projection", "depthwise"))
    assert f"{100 * done.error:.2g} %" in line and f"{100 * done.error_if_all:.2g} %" in line


def test_no_change_freezes_casts_and_measures_nothing():
    model = nano()
    done = quantise(model, "no_change", device=CPU, default_dtype=torch.bfloat16)
    assert not done.replaced and done.error is None
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# ---- what is on the card at once ----


class Card(TorchDispatchMode):
    """Counts the bytes that live on the device "meta", which stands for a card: tensors there have sizes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        return sum(size for ref, size in self.seen.values() if not ref.expired())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now)
        return out


@pytest.mark.parametrize("via", ["cpu", "accelerator"])
@pytest.mark.parametrize("precision", ["nf4-bnb", "int8-bnb"])
def test_the_dense_weights_are_never_on_the_card_at_once(precision, via):
    """By the real steps on a card that only counts; what the allocator and the kernels add is for a GPU to say."""
    model: Any = SanaTransformer2DModel(
        num_layers=4, num_attention_heads=8, num_cross_attention_heads=8,
        cross_attention_head_dim=32, cross_attention_dim=256, caption_channels=64,
    )  # fmt: skip
    largest = 4 * max(model.get_submodule(name).weight.numel() for name in matrices_of(model))
    dense = sum(4 * parameter.numel() for parameter in model.parameters())
    pack(torch.ones(64, 64), precision)  # its tables are made once
    with Card() as card:
        quantise(model, precision, device="meta", via=via, default_dtype=torch.bfloat16, measure=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert card.now < 0.45 * dense
    beside = largest if via == "cpu" else 3 * largest  # accelerator: a matrix with what packing it takes
    assert card.peak <= card.now + (0 if via == "cpu" else beside)
    assert card.now + beside < 0.8 * dense, "or nothing would be shown"


# ---- adapters on top ----


@pytest.mark.parametrize("precision", ["nf4-bnb", "int8-bnb"])
def test_lycoris_finds_the_same_layers_and_every_adapter_learns(precision):
    pytest.importorskip("lycoris")
    from lycoris import LycorisNetwork, create_lycoris

    def adapter(model: Any) -> Any:
        torch.manual_seed(0)
        network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=1, algo="lokr", factor=4)
        for each in network.loras:
            each.bypass_mode = is_packed(each.org_module[0])
        network.apply_to()
        return network.requires_grad_(True)

    before = dict(vars(LycorisNetwork))
    try:
        LycorisNetwork.apply_preset({"target_module": ["Attention", "GLUMBConv"]})
        quantised, whole = nano(), nano()
        quantise(quantised, precision, device=CPU, measure=False)
        ours, theirs = adapter(quantised), adapter(whole.requires_grad_(False))
    finally:
        for name in ("TARGET_REPLACE_MODULE", "TARGET_REPLACE_NAME", "MODULE_ALGO_MAP", "NAME_ALGO_MAP"):
            setattr(LycorisNetwork, name, before[name])
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (ours, theirs)]
    assert shapes[0] == shapes[1] and len(ours.loras) > 60, "its files fit both"
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lokr_w2" in name:
                parameter.normal_(std=0.02)
    answer(quantised)
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in ours.parameters())


# ---- the text encoder ----


@pytest.mark.parametrize(("precision", "bound"), [("nf4-bnb", 0.35), ("int8-bnb", 0.05)])
def test_a_quantised_gemma_is_near_and_smaller(precision, bound):
    folder = locate("nano")
    plain, packed = load_text_encoder(folder), load_text_encoder(folder, quantised=precision, via="accelerator")
    texts = ["a red square", ""]
    for found, truth in zip(packed.encode(texts), plain.encode(texts), strict=True):
        assert found.shape == truth.shape and found.dtype == truth.dtype
        assert 1e-4 < error(found, truth) < bound
    assert torch.equal(packed.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    dense = sum(parameter.nbytes for parameter in plain.model.parameters())
    planned = encoder_bytes(dense, precision, plain.model.config.to_dict())
    buffers = sum(buffer.nbytes for buffer in plain.model.buffers())
    assert planned == pytest.approx(footprint(packed.model) - buffers, rel=0.02)
    assert planned < 0.8 * dense
