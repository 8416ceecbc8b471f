"""`sana_tune export`: any checkpoint as a complete pipeline. The datasets need not be there, and nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_tune.config.schema import Config
from sana_tune.drawing import drawing_seed
from sana_tune.errors import Problem, UserError, gather
from sana_tune.log import log
from sana_tune.model.facts import ModelFacts, from_folder
from sana_tune.model.layout import INDEX
from sana_tune.offline import WEIGHTS, checkpoint_of, listening, stored_dtype
from sana_tune.output import Output
from sana_tune.prepare import drawing_sizes, located
from sana_tune.train.folders import Checkpoint, damage


@dataclass(frozen=True)
class Wanted:
    """What to export. checkpoint: a path, a name in the output folder, or latest. ema: the averaged weights.

    overwrite: an exported pipeline that stands there is replaced.
    """

    checkpoint: str
    output: Path
    ema: bool = False
    overwrite: bool = False

    @property
    def part(self) -> str:
        """The folder of a checkpoint that the weights come from."""
        return WEIGHTS["_ema" if self.ema else ""]


def export(config: Config, wanted: Wanted) -> Path:
    """Write the pipeline: the checkpoint's weights as transformer/, the rest of the model it was trained from.

    The folder is whole or not there. Raises UserError with all that is wrong before anything is read; Interrupted.
    """
    with listening():
        problems: list[Problem] = []
        gather(problems, lambda: check_output(wanted))
        checkpoint = gather(problems, lambda: found(config, wanted))
        if problems or checkpoint is None:
            raise UserError(*problems)
        folder = located(config)
        facts = from_folder(folder, config.model.pretrained_model_name_or_path)
        if damaged := damage(checkpoint, f"{wanted.part}/"):
            what = f"damaged: {', '.join(damaged)} {'is' if len(damaged) == 1 else 'are'} not as it was saved"
            raise UserError(Problem(str(checkpoint.path), what, "export another checkpoint"))
        write(config, wanted, checkpoint, folder, facts)
        log.info("Exported step %d of %s to %s", checkpoint.step, checkpoint.path, wanted.output)
        return wanted.output


def check_output(wanted: Wanted) -> None:
    """Raise UserError when something stands in the way that must not be replaced."""
    out = wanted.output
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    where = f"--output {out}"
    if not (out / INDEX).is_file():
        raise UserError(Problem(where, "there is something else than a pipeline", "name a folder that is not there"))
    if not wanted.overwrite:
        raise UserError(Problem(where, "there is a pipeline already", "name another folder, or add --overwrite"))


def found(config: Config, wanted: Wanted) -> Checkpoint:
    """The checkpoint. Raises UserError when it is not there, not complete, of another model, or has no average."""
    checkpoint = checkpoint_of(config, Output(Path(config.train.output_dir)), wanted.checkpoint)
    if not any(name.startswith(f"{wanted.part}/") for name in checkpoint.files):
        what = "this checkpoint has no averaged weights: it was trained without use_ema"
        raise UserError(Problem(str(checkpoint.path), what, "export the raw ones: leave --ema out"))
    return checkpoint


def write(config: Config, wanted: Wanted, checkpoint: Checkpoint, folder: Path, facts: ModelFacts) -> None:
    """The pipeline itself. folder: of the model that was trained."""
    from safetensors.torch import load_file

    from sana_tune.model.export import export_pipeline

    state: dict[str, Any] = {}
    for name in sorted(checkpoint.files):
        if name.startswith(f"{wanted.part}/") and name.endswith(".safetensors"):
            state |= load_file(checkpoint.path / name)
    text = readme(config, wanted, checkpoint, facts)
    export_pipeline(folder, state, None, wanted.output, text, variant=config.model.variant)


def readme(config: Config, wanted: Wanted, checkpoint: Checkpoint, facts: ModelFacts) -> str:
    """Text of the README: what it is, and a snippet that draws."""
    progress, validation = checkpoint.progress(), config.validation
    width, height = drawing_sizes(config, facts)[0]
    kind = "the moving average of the weights (EMA)" if wanted.ema else "the weights"
    dtype = "float32" if wanted.ema or stored_dtype(checkpoint) == "fp32" else "bfloat16"
    return f"""# Fine-tuned from {facts.name}

A full-rank fine-tune of Sana, made with sana_tune: {kind} after {progress.step} steps, {progress.epoch:.4g} epochs and
{progress.images} images.

```python
import torch
from diffusers import SanaPipeline

pipe = SanaPipeline.from_pretrained({str(wanted.output)!r}, torch_dtype=torch.{dtype})
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipe(
    {(validation.validation_prompt or "a photo")!r},
    height={height}, width={width}, num_inference_steps={validation.validation_num_inference_steps}, \
guidance_scale={validation.validation_guidance},
    generator=torch.Generator("cpu").manual_seed({drawing_seed(config)}),
    use_resolution_binning=False,  # draw exactly this size
).images[0]
image.save("picture.png")
```

## Licence

{facts.licence}
"""
