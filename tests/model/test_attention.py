"""Linear attention: diffusers' result in fp32, and still in fp32 under autocast and in bf16."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0

from sana_tune.model.attention import EPS, LinearAttention, install, mix, published
from tests.fixtures import tiny_transformer


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 32, 3, 5, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator).to(dtype),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "timestep": torch.tensor([300.0, 899.0]),
    }


@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_diffusers_in_fp32_with_gradients(qk_norm):
    torch.manual_seed(0)
    model = tiny_transformer(qk_norm=qk_norm)
    results = []
    for _ in range(2):
        model.zero_grad()
        out = model(**inputs(), return_dict=False)[0]
        out.square().mean().backward()
        results.append((out.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        install(model)
    (theirs, their_gradients), (ours, our_gradients) = results
    assert not torch.equal(theirs, torch.zeros_like(theirs))
    assert (theirs - ours).abs().max() <= 1e-5
    for a, b in zip(their_gradients, our_gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)


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
    query = torch.full((1, 1, 4, 3), 1e-8, requires_grad=True)
    key = torch.full((1, 1, 4, 3), 1e-8, requires_grad=True)
    value = torch.ones(1, 1, 4, 3, requires_grad=True)
    out = mix(query, key, value)
    out.sum().backward()
    assert out.isfinite().all() and out.abs().max() < 1e-6, "nearly no similarity: nearly nothing is mixed in"
    assert query.grad is not None and query.grad.abs().max() < 100
    zero = mix(torch.zeros(1, 1, 4, 3), key, value)
    assert torch.equal(zero, torch.zeros_like(zero))


def test_install_changes_no_weight_and_published_is_undone():
    model = tiny_transformer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    install(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(ZeroDivisionError), published(model):
        kinds = {type(block.attn1.processor) for block in model.transformer_blocks}
        assert kinds == {SanaLinearAttnProcessor2_0}
        raise ZeroDivisionError
    assert {type(block.attn1.processor) for block in model.transformer_blocks} == {LinearAttention}
