"""fp16: the caption path stays fp32. Gemma's embeddings are large, and what is made of them overflows fp16's 65,504."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CAPTION_PATH = ("caption_projection", "caption_norm")


def keep_captions_fp32(transformer: nn.Module) -> None:
    """Have a Sana transformer's caption projection and norm compute in fp32 under any autocast. Once is enough."""
    for name in CAPTION_PATH:
        module = transformer.get_submodule(name)
        module.register_forward_pre_hook(_enter, with_kwargs=True)
        module.register_forward_hook(_leave, always_call=True)


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    tensor = args[0]
    context = torch.autocast(tensor.device.type, enabled=False)
    context.__enter__()
    vars(module).setdefault("_contexts", []).append(context)
    return (tensor.float(), *args[1:]), kwargs


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    vars(module)["_contexts"].pop().__exit__(None, None, None)
