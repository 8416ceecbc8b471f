"""Attention and feed-forward: diffusers' results and gradients, in fp32 where it must be, yielding to adapters."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from types import MethodType

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from torch import Tensor, nn

from sana_tune.model import attention
from sana_tune.model.attention import EPS, CrossAttention, LinearAttention, attend, gated, install, published, trimmed
from sana_tune.model.blocks import TEXT_MULTIPLE
from sana_tune.model.fetch import locate
from tests.fixtures import tiny_transformer

SIZES = ((3, 5), (2, 2))


@pytest.fixture(autouse=True, params=["small", "large"])
def _size(request, monkeypatch):
    """Everything holds for both ways to compute: by hand, as large tensors are, and by autograd."""
    monkeypatch.setattr(attention, "LARGE", 0 if request.param == "large" else 2**40)


def nano() -> SanaTransformer2DModel:
    return SanaTransformer2DModel.from_pretrained(locate("nano"), subfolder="transformer")


MODELS = {
    "nano": nano,
    "plain": tiny_transformer,
    "qk_norm": lambda: tiny_transformer(qk_norm=True),
    "2K, positional embedding": lambda: tiny_transformer(pos_embed=True),
}


def inputs(model, size=(3, 5), batch=2, full=False, dtype=torch.float32) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])[:batch]
    return {
        "hidden_states": torch.randn(batch, model.config.in_channels, *size, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 7, model.config.caption_channels, generator=generator).to(dtype),
        "encoder_attention_mask": None if full else mask,
        "timestep": torch.tensor([300.0, 899.0])[:batch],
    }


def answer(model, values, autocast=False) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's output and the gradients of its weights, less one that is zero in exact arithmetic.

    A softmax does not change when every key moves alike, so the bias of the keys has no gradient but rounding.
    """
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**values, return_dict=False)[0]
    (out.float() - 0.1).square().mean().backward()
    free = {"attn2.to_k.bias"} if model.config.qk_norm is None else set()
    gradients = {
        name: parameter.grad.float().clone()
        for name, parameter in model.named_parameters()
        if not any(name.endswith(end) for end in free)
    }
    return out.detach().float(), gradients


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def whole(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def worst(found, truth) -> float:
    """The relative error of the output, of the whole gradient, and a fifth of that of any one weight's gradient.

    A single small gradient may be the difference of large numbers, and then no two ways round it alike.
    """
    (out, gradients), (true_out, true_gradients) = found, truth
    assert gradients.keys() == true_gradients.keys() and all(
        gradient.norm() > 0 for gradient in true_gradients.values()
    )
    singly = max(error(gradients[name], true_gradients[name]) for name in gradients)
    return max(error(out, true_out), error(whole(gradients), whole(true_gradients)), singly / 5)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["masked", "full"])
@pytest.mark.parametrize("kind", MODELS)
def test_equals_diffusers_in_fp32_forward_and_backward(kind, full, size):
    model = MODELS[kind]()
    values = inputs(model, size, full=full)
    theirs = answer(model, values)
    install(model)
    assert worst(answer(model, values), theirs) <= 1e-5


def _linear(block) -> None:
    block.attn1.set_processor(LinearAttention())


def _cross(block) -> None:
    block.attn2.set_processor(CrossAttention())


def _feed(block) -> None:
    block.ff.forward = MethodType(attention.feed_forward, block.ff)


REWRITES = {"linear attention": _linear, "cross-attention": _cross, "feed-forward": _feed}


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "plain"])
def test_each_rewrite_alone_equals_diffusers(kind, rewrite):
    """In fp32 to 1e-5, and in bf16 as near the truth as diffusers: none hides behind the others."""
    model = MODELS[kind]()
    truth = answer(model, inputs(model))
    low, values = deepcopy(model).to(torch.bfloat16), inputs(model, dtype=torch.bfloat16)
    theirs = answer(low, values)
    for block in (*model.transformer_blocks, *low.transformer_blocks):
        REWRITES[rewrite](block)
    assert worst(answer(model, inputs(model)), truth) <= 1e-5
    ours = answer(low, values)
    assert error(ours[0], truth[0]) <= 1.2 * error(theirs[0], truth[0]) + 1e-3 < 0.05
    ours_off, theirs_off = (error(whole(found[1]), whole(truth[1])) for found in (ours, theirs))
    assert ours_off <= 1.2 * theirs_off + 1e-3 < 0.1


def test_no_mask_is_diffusers_with_a_mask_of_ones():
    """A full batch gets none: what diffusers computes with a mask that hides nothing."""
    model = tiny_transformer()
    values = {**inputs(model, full=True), "encoder_attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    theirs = answer(model, values)
    install(model)
    text, mask = trimmed(values["encoder_hidden_states"], values["encoder_attention_mask"])
    assert mask is None
    ours = answer(model, {**values, "encoder_hidden_states": text, "encoder_attention_mask": mask})
    assert worst(ours, theirs) <= 1e-5


@pytest.mark.parametrize("autocast", [True, False], ids=["fp32 masters", "bf16 weights"])
@pytest.mark.parametrize("kind", MODELS)
def test_in_bf16_it_is_as_near_the_truth_as_diffusers(kind, autocast):
    model = MODELS[kind]()
    truth = answer(model, inputs(model))
    dtype = torch.float32 if autocast else torch.bfloat16
    model.to(dtype)
    values = inputs(model, dtype=dtype)
    theirs = answer(model, values, autocast)
    install(model)
    ours = answer(model, values, autocast)
    assert error(ours[0], truth[0]) <= 1.2 * error(theirs[0], truth[0]) + 1e-3 < 0.05

    ours_off, theirs_off = (error(whole(found[1]), whole(truth[1])) for found in (ours, theirs))
    assert ours_off <= 1.2 * theirs_off + 1e-3 < 0.1


@pytest.mark.parametrize("fused", [True, False])
def test_the_backward_by_hand_is_that_of_the_formula(fused):
    states = [torch.randn(2, 6, 8, dtype=torch.float32, requires_grad=True) for _ in range(3)]
    formula = attention._mixed(*(attention._heads(one, 2) for one in states))
    asked = torch.randn_like(formula)
    expected = torch.autograd.grad(formula, states, asked)
    found = attend(2, torch.cat(states, -1)) if fused else attend(2, *states)
    assert torch.allclose(found, formula, rtol=1e-6, atol=1e-7)
    for mine, theirs in zip(torch.autograd.grad(found, states, asked), expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_gate_and_its_backward_are_those_of_the_formula():
    states = torch.randn(2, 10, 3, 4, requires_grad=True)
    value, gate = states.chunk(2, 1)
    formula = value * torch.nn.functional.silu(gate)
    asked = torch.randn_like(formula)
    (expected,) = torch.autograd.grad(formula, states, asked)
    found = gated(states)
    assert torch.equal(found, formula)
    assert torch.allclose(torch.autograd.grad(found, states, asked)[0], expected, rtol=1e-6, atol=1e-7)


def products(run) -> set[torch.dtype]:
    """Dtypes in which batched matrix products (the linear attention's, no others) are computed."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.bmm.default:
                seen.add(args[0].dtype)
            return function(*args, **(kwargs or {}))

    with Watch():
        run()
    return seen


def operations(model, values) -> tuple[Counter[str], int]:
    """How often each operator runs in a forward pass, and how many masks softmax attention gets."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: Counter[str] = Counter()
    masks: list[Tensor] = []  # they are kept, so that no place in memory is used twice

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function._overloadpacket.__name__
            found[name] += 1
            if name.startswith("_scaled_dot_product"):
                masks.append((kwargs or {})["attn_mask"])
            if name == "convolution" and args[1].shape[2:] == (1, 1):
                found["pointwise convolution"] += 1
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        model(**values, return_dict=False)
    return found, len({mask.untyped_storage().data_ptr() for mask in masks})


def test_the_work_that_each_rewrite_saves_is_saved():
    """One product in place of three, no 1x1 convolution in a block, and one mask for all blocks as it was built."""
    layers = 3
    model = tiny_transformer(layers=layers)
    values = inputs(model)
    theirs, their_masks = operations(model, values)
    install(model)
    ours, our_masks = operations(model, values)
    patch = 1  # of the embedding, which stays a convolution
    assert theirs["pointwise convolution"] == 2 * layers + patch and ours["pointwise convolution"] == patch
    linears = sum(ours[name] - theirs[name] for name in ("mm", "addmm"))
    fused = layers * 2 if attention.LARGE == 0 else 0
    assert linears == 2 * layers - fused, "convolutions became products; of q, k and v two of three are gone"
    assert (our_masks, their_masks) == (1, layers)


def test_stays_in_fp32_under_bf16_autocast():
    block = tiny_transformer().transformer_blocks[0].attn1
    states = torch.randn(2, 15, 64)

    def forward_and_backward():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = block(states)
        out.float().square().mean().backward()

    assert products(forward_and_backward) == {torch.bfloat16}, "what diffusers does"
    block.set_processor(LinearAttention())
    assert products(forward_and_backward) == {torch.float32}


def test_bf16_weights_give_bf16_out_of_fp32_products():
    block = tiny_transformer().transformer_blocks[0].attn1.to(torch.bfloat16)
    block.set_processor(LinearAttention())
    states = torch.randn(2, 15, 64).bfloat16()
    assert block(states).dtype == torch.bfloat16
    assert products(lambda: block(states)) == {torch.float32}


def test_a_tiny_denominator_does_not_explode():
    assert EPS == 1e-8
    query = torch.full((1, 3, 4), 1e-8, requires_grad=True)
    key = torch.full((1, 3, 4), 1e-8, requires_grad=True)
    value = torch.ones(1, 3, 4, requires_grad=True)
    out = attend(1, query, key, value)
    out.sum().backward()
    assert out.isfinite().all() and out.abs().max() < 1e-6, "nearly no similarity: nearly nothing is mixed in"
    assert query.grad is not None and query.grad.abs().max() < 100
    zero = attend(1, torch.zeros(1, 3, 4), key, value)
    assert torch.equal(zero, torch.zeros_like(zero))


def test_much_less_is_kept_for_the_backward_pass(monkeypatch):
    """Bytes that autograd keeps of the blocks, the reason for the backwards by hand: under 0.85 of diffusers'."""
    monkeypatch.setattr(attention, "LARGE", 0)
    model = tiny_transformer(layers=1).bfloat16()
    values = inputs(model, (16, 16), dtype=torch.bfloat16)

    def kept() -> int:
        found = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            alive = model(**values, return_dict=False)  # while it lives, no place is used twice
        assert alive
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        return sum(size for place, size in found.items() if place not in weights)

    theirs = kept()
    install(model)
    assert kept() < 0.85 * theirs


# ---- layers that are no longer diffusers' own ----


class Bent(nn.Module):
    """As LyCORIS does it: takes the place of a layer's forward."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.before = layer.forward
        layer.forward = self.forward

    def forward(self, states: Tensor) -> Tensor:
        return self.before(states).sin() + 0.5


class Packed(nn.Parameter):
    """As quantisation does it: a weight that is no ordinary one."""


LAYERS = ("attn1.to_q", "attn1.to_v", "attn2.to_k", "ff.conv_inverted", "ff.conv_depth", "ff.conv_point")


@pytest.mark.parametrize("layer", LAYERS)
def test_a_patched_forward_is_called(layer):
    model = tiny_transformer(layers=1)
    values = inputs(model)
    before = answer(model, values)
    Bent(model.transformer_blocks[0].get_submodule(layer))
    theirs = answer(model, values)
    install(model)
    assert worst(answer(model, values), theirs) <= 1e-5
    assert error(before[0], theirs[0]) > 1e-4, "the adapter does something"


@pytest.mark.parametrize("layer", ["attn1.norm_q", "attn2.norm_k"])
def test_a_patched_norm_is_called(layer):
    model = tiny_transformer(layers=1, qk_norm=True)
    values = inputs(model)
    Bent(model.transformer_blocks[0].get_submodule(layer))
    theirs = answer(model, values)
    install(model)
    assert worst(answer(model, values), theirs) <= 1e-5


@pytest.mark.parametrize("replaced", ["another class", "a norm without bias"])
@pytest.mark.parametrize("layer", ["attn1.norm_q", "attn2.norm_k"])
def test_a_replaced_norm_is_called(layer, replaced):
    """PEFT puts a class of its own in the place; another kind of norm has the same attributes and another result."""
    model = tiny_transformer(layers=1, qk_norm=True)
    values = inputs(model)
    parent, _, name = layer.rpartition(".")
    holder = model.transformer_blocks[0].get_submodule(parent)
    before = holder.get_submodule(name)
    other = nn.Sequential(before, nn.Tanh()) if replaced == "another class" else nn.LayerNorm(64, bias=False)
    holder.register_module(name, other)
    theirs = answer(model, values)
    install(model)
    assert worst(answer(model, values), theirs) <= 1e-5


def test_a_patched_feed_forward_is_called_and_comes_back():
    """An adapter on the whole of it: neither `install` nor `published` takes it off."""
    model = tiny_transformer(layers=2)
    values = inputs(model)
    before = answer(model, values)
    Bent(model.transformer_blocks[0].ff)
    theirs = answer(model, values)
    assert error(before[0], theirs[0]) > 1e-4
    install(model)
    assert worst(answer(model, values), theirs) <= 1e-5
    with published(model):
        assert worst(answer(model, values), theirs) <= 1e-5
    assert worst(answer(model, values), theirs) <= 1e-5
    assert "forward" in vars(model.transformer_blocks[1].ff), "the other block has ours"


def test_layers_quantised_by_bitsandbytes_are_called():
    """nf4 packs its weight: what would be read of it is no matrix."""
    from bitsandbytes.nn import Linear4bit

    model = tiny_transformer(layers=1).requires_grad_(False)
    for holder in (model.transformer_blocks[0].attn1, model.transformer_blocks[0].attn2):
        for name in ("to_q", "to_k", "to_v"):
            plain = holder.get_submodule(name)
            packed = Linear4bit(64, 64, bias=plain.bias is not None, compute_dtype=torch.float32, quant_type="nf4")
            packed.load_state_dict(plain.state_dict())
            holder.register_module(name, packed.to("cpu"))
    assert model.transformer_blocks[0].attn1.to_q.weight.shape != (64, 64)
    values = inputs(model)
    with torch.no_grad():
        theirs = model(**values, return_dict=False)[0]
        install(model)
        assert error(model(**values, return_dict=False)[0], theirs) <= 1e-5


@pytest.mark.parametrize("layer", LAYERS)
def test_a_replaced_layer_is_called(layer):
    """As PEFT does it: another class in the layer's place."""
    model = tiny_transformer(layers=1)
    values = inputs(model)
    parent, _, name = layer.rpartition(".")
    holder = model.transformer_blocks[0].get_submodule(parent)
    holder.register_module(name, nn.Sequential(holder.get_submodule(name), nn.Tanh()))
    theirs = answer(model, values)
    install(model)
    assert worst(answer(model, values), theirs) <= 1e-5


@pytest.mark.parametrize("layer", LAYERS)
def test_hooks_run_and_packed_weights_are_not_looked_into(layer):
    model = tiny_transformer(layers=1)
    install(model)
    real = model.transformer_blocks[0].get_submodule(layer)
    assert attention.untouched(real)
    calls = []
    handle = real.register_forward_hook(lambda *_: calls.append(layer))
    answer(model, inputs(model))
    assert calls == [layer]
    handle.remove()
    assert attention.untouched(real)
    real.weight = Packed(real.weight.detach())
    assert not attention.untouched(real)


def test_install_changes_no_weight_and_published_is_undone():
    model = tiny_transformer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values = inputs(model)
    theirs = answer(model, values)
    install(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())

    def kinds():
        blocks = model.transformer_blocks
        return {
            (type(block.attn1.processor), type(block.attn2.processor), "forward" in vars(block.ff)) for block in blocks
        }

    with pytest.raises(ZeroDivisionError), published(model):
        assert kinds() == {(SanaLinearAttnProcessor2_0, SanaAttnProcessor2_0, False)}
        inside = answer(model, values)
        assert torch.equal(inside[0], theirs[0]), "to the bit"
        raise ZeroDivisionError
    assert kinds() == {(LinearAttention, CrossAttention, True)}


# ---- the text ----


@pytest.mark.parametrize(
    ("lengths", "length", "shape", "masked"),
    [
        ((5, 3), 9, 8, True),  # cut to 5, rounded up to 8
        ((8, 2), 8, 8, True),
        ((9, 2), 20, 16, True),
        ((5, 5), 9, 5, False),  # all alike: no mask, no rounding
        ((7,), 7, 7, False),
        ((1,), 1, 8, True),  # one token alone would be a form of its own for a compiler
    ],
)
def test_text_is_cut_to_the_longest_caption(lengths, length, shape, masked):
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    text = torch.randn(len(lengths), length, 4) * mask[..., None]
    cut, cut_mask = trimmed(text, mask)
    assert cut.shape == (len(lengths), shape, 4)
    assert (cut_mask is not None) == masked
    if cut_mask is not None:
        assert cut_mask.shape == cut.shape[:2] and cut_mask.sum(1).tolist() == list(lengths)
    assert torch.equal(cut[:, : max(lengths)], text[:, : max(lengths)]) and not cut[:, max(lengths) :].any()


@pytest.mark.parametrize(("lengths", "shape"), [((8, 2), 64), ((64, 64), 64), ((65, 3), 128), ((1,), 64)])
def test_for_compiled_blocks_there_are_few_lengths_and_always_a_mask(lengths, shape):
    mask = (torch.arange(300) < torch.tensor(lengths)[:, None]).long()
    cut, cut_mask = trimmed(torch.ones(len(lengths), 300, 4), mask, TEXT_MULTIPLE, masked=True)
    assert cut_mask is not None and cut.shape[:2] == cut_mask.shape == (len(lengths), shape)
    assert cut_mask.sum(1).tolist() == list(lengths)


def test_cut_text_gives_the_same_answer():
    model = tiny_transformer()
    install(model)
    values = inputs(model)
    long = {
        **values,
        "encoder_hidden_states": torch.nn.functional.pad(values["encoder_hidden_states"], (0, 0, 0, 293)),
        "encoder_attention_mask": torch.nn.functional.pad(values["encoder_attention_mask"], (0, 293)),
    }
    text, mask = trimmed(long["encoder_hidden_states"], long["encoder_attention_mask"])
    assert text.shape[1] == 8
    cut = {**values, "encoder_hidden_states": text, "encoder_attention_mask": mask}
    assert worst(answer(model, cut), answer(model, long)) <= 1e-5
