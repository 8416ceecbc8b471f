"""The README of an exported pipeline: what it is, what it was trained on, and a snippet that works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SNIPPET = """```python
import torch
from diffusers import SanaPipeline

pipe = SanaPipeline.from_pretrained("{folder}", torch_dtype=torch.{dtype})
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipe(
    {prompt!r},
    height={height}, width={width}, num_inference_steps={steps}, guidance_scale={guidance},
    generator=torch.Generator("cpu").manual_seed({seed}),
    use_resolution_binning=False,  # draw exactly this size
).images[0]
image.save("picture.png")
```"""


def model_card(
    *,
    model: str,
    licence: str,
    folder: str,
    sample: Mapping[str, Any],
    training: Mapping[str, Any],
    has_ema: bool,
) -> str:
    """Text of the README.

    sample: prompt, width, height, steps, guidance, seed, dtype of the snippet. training: name → value lines.
    """
    ema = (
        "\n`transformer_ema/` holds the moving average of the weights; to draw with it, load it with "
        '`SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer_ema")` and hand it to the '
        "pipeline as `transformer=`.\n"
        if has_ema
        else ""
    )
    lines = "\n".join(f"- {name}: {value}" for name, value in training.items())
    return (
        f"# Fine-tuned from {model}\n\n"
        f"A full-rank fine-tune of Sana, made with sana_tune.\n\n{SNIPPET.format(folder=folder, **sample)}\n{ema}\n"
        f"## Training\n\n{lines}\n\n## Licence\n\n{licence}\n"
    )
