"""`sana_tune export`: any checkpoint as a complete pipeline. The datasets need not be there, and nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sana_tune.config.lycoris import ADAPTER, read_lycoris
from sana_tune.config.schema import Config
from sana_tune.drawing import drawing_seed
from sana_tune.errors import Problem, UserError, gather
from sana_tune.log import log
from sana_tune.model.facts import ModelFacts, from_folder
from sana_tune.model.layout import INDEX
from sana_tune.offline import checkpoint_of, listening, stored_dtype
from sana_tune.output import Output
from sana_tune.prepare import check_library, drawing_sizes, located
from sana_tune.train.folders import PROGRESS, Checkpoint, damage
from sana_tune.watch.snippets import Sample


@dataclass(frozen=True)
class Wanted:
    """What to export. checkpoint: a path, a name in the output folder, or latest. ema: the averaged weights.

    overwrite: an exported pipeline that stands there is replaced. merge: an adapter becomes part of the weights.
    """

    checkpoint: str
    output: Path
    ema: bool = False
    overwrite: bool = False
    merge: bool = False

    def file(self, checkpoint: Checkpoint) -> str:
        """The file of a checkpoint that the weights come from."""
        return checkpoint.layout.of("_ema" if self.ema else "")


def export(config: Config, wanted: Wanted) -> Path:
    """Write the pipeline: the checkpoint's weights as transformer/, the rest of the model it was trained from.

    Of an adapter: the pipeline with it merged in, or the adapter alone in a folder of its own.
    The folder is whole or not there. Raises UserError with all that is wrong before anything is read; Interrupted.
    """
    with listening():
        problems: list[Problem] = []
        gather(problems, lambda: check_output(wanted))
        checkpoint = gather(problems, lambda: found(config, wanted))
        if problems or checkpoint is None:
            raise UserError(*problems)
        if wanted.merge:
            check_library()
        folder = located(config)
        facts = from_folder(folder, config.model.pretrained_model_name_or_path)
        part = wanted.file(checkpoint)
        if damaged := damage(checkpoint, part if checkpoint.layout is ADAPTER else f"{PurePosixPath(part).parent}/"):
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
    kind = "pipeline" if (out / INDEX).is_file() else "adapter" if (out / ADAPTER.weights).is_file() else ""
    if not kind or (out / PROGRESS).is_file():
        raise UserError(Problem(where, "there is something else than a pipeline", "name a folder that is not there"))
    if not wanted.overwrite:
        article = "an" if kind == "adapter" else "a"
        raise UserError(Problem(where, f"there is {article} {kind} already", "name another folder, or add --overwrite"))


def found(config: Config, wanted: Wanted) -> Checkpoint:
    """The checkpoint. Raises UserError when it is not there, not complete, of another model, or has no average."""
    checkpoint = checkpoint_of(config, Output(Path(config.train.output_dir)), wanted.checkpoint)
    if wanted.merge and checkpoint.layout is not ADAPTER:
        what = "merging is for adapters; this checkpoint holds whole weights"
        raise UserError(Problem("--merge", what, "leave it out: what is exported is whole"))
    if wanted.file(checkpoint) not in checkpoint.files:
        what = "this checkpoint has no averaged weights: it was trained without use_ema"
        raise UserError(Problem(str(checkpoint.path), what, "export the raw ones: leave --ema out"))
    return checkpoint


def write(config: Config, wanted: Wanted, checkpoint: Checkpoint, folder: Path, facts: ModelFacts) -> None:
    """The pipeline itself. folder: of the model that was trained."""
    from safetensors.torch import load_file

    from sana_tune.model.export import export_adapter, export_pipeline

    path = checkpoint.path / wanted.file(checkpoint)
    text = readme(config, wanted, checkpoint, facts)
    if checkpoint.layout is not ADAPTER:
        state: dict[str, Any] = load_file(path)
    elif not wanted.merge:
        file = read_lycoris(str(path.with_name(ADAPTER.config)))
        export_adapter(file, load_file(path), None, wanted.output, text)
        return
    else:
        state = merged_state(config, path, folder)
    export_pipeline(folder, state, None, wanted.output, text, variant=config.model.variant)


def merged_state(config: Config, path: Path, folder: Path) -> dict[str, Any]:
    """The model's weights in fp32 with an adapter's file in them, at its own multiplier."""
    import torch

    from sana_tune.model.sana import load_transformer
    from sana_tune.train.adapt import Adapter, merged

    base = load_transformer(folder, torch.float32, "cpu", variant=config.model.variant).requires_grad_(False)
    adapter = Adapter(base, read_lycoris(str(path.with_name(ADAPTER.config))))
    adapter.load(path)
    adapter.network.eval()
    return merged(adapter)


def readme(config: Config, wanted: Wanted, checkpoint: Checkpoint, facts: ModelFacts) -> str:
    """Text of the README: what it is, and a snippet that draws."""
    progress = checkpoint.progress()
    width, height = drawing_sizes(config, facts)[0]
    kind = "the moving average of the weights (EMA)" if wanted.ema else "the weights"
    dtype = "float32" if wanted.ema or stored_dtype(checkpoint) == "fp32" else "bfloat16"
    validation = config.validation
    sample = Sample(
        validation.validation_prompt or "a photo", width, height, validation.validation_num_inference_steps,
        validation.validation_guidance, drawing_seed(config), dtype,
    )  # fmt: skip
    made, snippet = "A full-rank fine-tune", sample.of_pipeline(str(wanted.output))
    if checkpoint.layout is ADAPTER and wanted.merge:
        made = "An adapter, merged into the weights,"
    elif checkpoint.layout is ADAPTER:
        file = read_lycoris(str(checkpoint.path / ADAPTER.config))
        made = "A LyCORIS adapter"
        snippet = sample.of_adapter(str(wanted.output), ADAPTER.weights, facts.name, file.multiplier)
    return f"""# Fine-tuned from {facts.name}

{made} of Sana, made with sana_tune: {kind} after {progress.step} steps, {progress.epoch:.4g} epochs and
{progress.images} images.

{snippet}

## Licence

{facts.licence}
"""
