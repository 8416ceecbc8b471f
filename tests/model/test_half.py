"""Under fp16 the caption path is fp32, forward and backward; everything else is as autocast has it."""

from __future__ import annotations

import torch

from sana_tune.model.half import CAPTION_PATH, keep_captions_fp32
from tests.fixtures import CAPTION_DIM, tiny_transformer


def seen(guarded: bool) -> dict[str, torch.dtype]:
    """The dtypes in which parts of the model answer under fp16 autocast."""
    torch.manual_seed(0)
    model, found = tiny_transformer(), {}
    if guarded:
        keep_captions_fp32(model)
    for name in (*CAPTION_PATH, "caption_projection.linear_1", "patch_embed.proj"):

        def tell(module, args, output, name: str = name) -> None:
            found[name] = output.dtype

        model.get_submodule(name).register_forward_hook(tell)
    with torch.autocast("cpu", torch.float16):
        output = model(
            hidden_states=torch.randn(1, 32, 2, 2),
            encoder_hidden_states=torch.randn(1, 4, CAPTION_DIM),
            encoder_attention_mask=torch.ones(1, 4),
            timestep=torch.tensor([500.0]),
            return_dict=False,
        )[0]
        assert torch.is_autocast_enabled("cpu")
    output.float().sum().backward()
    assert all(each.grad is None or each.grad.dtype == torch.float32 for each in model.parameters())
    return found


def test_the_caption_path_is_fp32():
    plain, guarded = seen(False), seen(True)
    assert plain["caption_projection.linear_1"] == torch.float16, "what is guarded against"
    assert [guarded[name] for name in (*CAPTION_PATH, "caption_projection.linear_1")] == [torch.float32] * 3
    assert guarded["patch_embed.proj"] == torch.float16


def test_large_embeddings_do_not_overflow():
    model = tiny_transformer()
    model.caption_projection.linear_1.weight.data.fill_(3.0)  # type: ignore[union-attr]
    text = torch.full((1, 4, CAPTION_DIM), 3000.0)
    with torch.autocast("cpu", torch.float16):
        assert not torch.isfinite(model.caption_projection(text)).all()
        keep_captions_fp32(model)
        assert torch.isfinite(model.caption_projection(text)).all()
