"""Python that draws with what was trained, for a README: each is a Markdown code block that runs as it stands."""

from __future__ import annotations

import json
from dataclasses import dataclass

_PIPELINE = """```python
import torch
from diffusers import SanaPipeline

pipe = SanaPipeline.from_pretrained({place}, torch_dtype=torch.{dtype})
{draw}```"""
_CHECKPOINT = """```python
import torch
from diffusers import SanaPipeline, SanaTransformer2DModel

transformer = SanaTransformer2DModel.from_pretrained(
    {place}, subfolder={subfolder}, torch_dtype=torch.{dtype}
)
pipe = SanaPipeline.from_pretrained({base}, transformer=transformer, torch_dtype=torch.{dtype})
{draw}```"""
_ADAPTER = """```python
import os

import torch
from diffusers import SanaPipeline
from huggingface_hub import hf_hub_download
from lycoris import create_lycoris_from_weights  # pip install lycoris-lora

place, file = {place}, {file}
path = os.path.join(place, file) if os.path.isdir(place) else hf_hub_download(place, file)
pipe = SanaPipeline.from_pretrained({base}, torch_dtype=torch.{dtype})
with torch.no_grad():
    adapter, _ = create_lycoris_from_weights({multiplier}, path, pipe.transformer)
for module in adapter.loras:
    module.bypass_mode = not module.wd  # added to bf16 weights, small changes would be rounded away
adapter.apply_to()
adapter.to(pipe.transformer.device, pipe.transformer.dtype)
pipe.transformer.add_module("lycoris", adapter)  # so that it moves with the model
{draw}```"""
_DRAW = """pipe.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipe(
    {prompt!r},
    height={height}, width={width}, num_inference_steps={steps}, guidance_scale={guidance},
    generator=torch.Generator("cpu").manual_seed({seed}),
    use_resolution_binning=False,  # draw exactly this size
).images[0]
image.save("picture.png")
"""


@dataclass(frozen=True)
class Sample:
    """The picture that a snippet draws. width and height: pixels; dtype: torch's name of what is computed in."""

    prompt: str
    width: int
    height: int
    steps: int
    guidance: float
    seed: int
    dtype: str = "float32"

    @property
    def _drawn(self) -> str:
        return _DRAW.format(**vars(self))

    def of_pipeline(self, place: str) -> str:
        """Of a whole pipeline. place: a folder or a repository, as in the others."""
        return _PIPELINE.format(place=_quoted(place), dtype=self.dtype, draw=self._drawn)

    def of_checkpoint(self, place: str, subfolder: str, base: str) -> str:
        """Of the model's weights alone; the rest is of the base model."""
        return _CHECKPOINT.format(
            place=_quoted(place), subfolder=_quoted(subfolder), base=_quoted(base), dtype=self.dtype, draw=self._drawn
        )

    def of_adapter(self, place: str, file: str, base: str, multiplier: float) -> str:
        """Of an adapter in LyCORIS's form. multiplier: it was trained with."""
        return _ADAPTER.format(
            place=_quoted(place), file=_quoted(file), base=_quoted(base), multiplier=multiplier, dtype=self.dtype,
            draw=self._drawn,
        )  # fmt: skip


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
