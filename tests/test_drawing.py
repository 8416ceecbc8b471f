"""How a run draws: training is left as it was, nothing stays in memory, previews and failures are told."""

from __future__ import annotations

import gc
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana_tune.errors import UserError
from sana_tune.run import run
from sana_tune.watch.events import Event, Noticed, Previewed, Stepped, Validated
from tests.journeys.kit import Heard, differences, metrics_of, one_thread, output_of, pictures, small_run, state_of

DRAWING: dict[str, Any] = {
    "validation_disable": False,
    "validation_prompt": "a red star on a blue background",
    "validation_resolution": "32",
    "validation_num_inference_steps": 2,
    "validation_step_interval": 1,
    "validation_disable_unconditional": True,
}


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    """Pictures to train on."""
    return pictures(tmp_path_factory.mktemp("shown") / "pictures", 4)


def trained(folder: Path, shown: Path, heard: Heard | None = None, **settings: Any) -> Path:
    """The output folder of a small run."""
    loaded = small_run(folder, {"instance_data_dir": str(shown)}, **settings)
    with one_thread():
        run(loaded, sinks=[heard] if heard else [])
    return output_of(loaded)


def test_training_is_the_same_to_the_bit_with_and_without_pictures(tmp_path: Path, shown: Path):
    """Weights, average, optimizer, position and numbers; with all that drawing has: previews, other seeds, samplers."""
    settings = {"use_ema": True, "max_train_steps": 2, "caption_dropout_probability": 0.5}
    every = {
        **DRAWING, "validation_num_inference_steps": 1, "validation_preview": True, "validation_randomize": True,
        "validation_on_startup": True,
        "validation_noise_scheduler": "unipc", "validation_disable_unconditional": False,
    }  # fmt: skip
    plain = trained(tmp_path / "plain", shown, **settings)
    drawn = trained(tmp_path / "drawn", shown, **settings, **every)
    assert differences(state_of(plain / "checkpoint-2"), state_of(drawn / "checkpoint-2")) == []
    assert metrics_of(plain) == metrics_of(drawn)
    names = {path.name for path in (drawn / "validation_images").iterdir()}
    assert names == {
        *(f"step_{step}_contact_sheet.png" for step in range(3)),
        *(f"step_{step}_{name}_0_32x32.png" for step in range(3) for name in ("validation", "unconditional")),
        *(f"step_{step}_{name}_0_32x32_ema.png" for step in (1, 2) for name in ("validation", "unconditional")),
    }
    assert not (plain / "validation_images").exists()


def networks() -> Counter[str]:
    """The networks in this process, by class."""
    names = ("AutoencoderDC", "Gemma2Model", "ImageCoder", "TextEncoder", "SanaTransformer2DModel", "Tiny")
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each).__name__ in names)


def test_nothing_stays_in_memory_after_drawing(tmp_path: Path, shown: Path):
    """At every step the transformer alone is there: no VAE, no text encoder, and no second transformer."""
    gc.collect()
    before, found = networks(), []

    def look(event: Event) -> None:
        if isinstance(event, Stepped):
            found.append(networks() - before)

    library = tmp_path / "prompts.json"
    library.write_text(json.dumps({str(number): f"a star, number {number}" for number in range(3)}), encoding="utf-8")
    settings = {**DRAWING, "user_prompt_library": str(library), "validation_preview": True}
    settings["validation_num_inference_steps"] = 1
    heard = Heard(look)
    trained(tmp_path, shown, heard, **settings, max_train_steps=2)
    assert [len(event.files) for event in heard.of(Validated)] == [4, 4, 4]
    assert found == [Counter(SanaTransformer2DModel=1)] * 2


def test_previews_come_while_the_first_weights_are_drawn(tmp_path: Path, shown: Path):
    heard = Heard()
    settings = {**DRAWING, "validation_num_inference_steps": 6, "validation_resolution": "32x64,64", "use_ema": True}
    trained(tmp_path, shown, heard, **settings, validation_preview=True, max_train_steps=1, disable_benchmark=True)
    seen = heard.of(Previewed)
    assert [(event.progress.step, event.prompt, event.sampler_step, event.sampler_steps) for event in seen] == [
        (1, "validation", step, 6) for _ in range(2) for step in (5, 6)
    ]
    shapes = [Image.open(io.BytesIO(event.picture)).size for event in seen]
    assert shapes == [(32, 64), (32, 64), (64, 64), (64, 64)]
    last = np.asarray(Image.open(io.BytesIO(seen[-1].picture)).convert("RGB")).astype(int)
    drawn = np.asarray(Image.open(tmp_path / "output/validation_images/step_1_validation_0_64x64.png")).astype(int)
    blurred = [each.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3)) for each in (last, drawn)]
    assert np.corrcoef(blurred[0].ravel(), blurred[1].ravel())[0, 1] > 0.7, "the last preview looks like the picture"


def test_previews_without_a_cache_of_latents(tmp_path: Path, shown: Path):
    heard = Heard()
    trained(tmp_path, shown, heard, **DRAWING, validation_preview=True, max_train_steps=1, vae_cache_disable=True)
    assert len(heard.of(Previewed)) == 2


def test_a_decoder_of_another_model_is_told_at_once(tmp_path: Path, shown: Path):
    (tmp_path / "taesana.pth").touch()
    with pytest.raises(UserError, match=r"TAESANA decodes latents of 32 channels .* those of nano have 8"):
        decoder = str(tmp_path / "taesana.pth")
        trained(tmp_path, shown, **DRAWING, validation_preview=True, validation_preview_decoder=decoder)


def test_a_prompt_that_fails_is_told_at_the_end(tmp_path: Path, shown: Path):
    """A file where the pictures are to go: none can be written; the run ends well, and that is its last word."""
    heard = Heard()
    (tmp_path / "output").mkdir(parents=True)
    (tmp_path / "output" / "validation_images").write_text("in the way", encoding="utf-8")
    trained(tmp_path, shown, heard, **DRAWING, max_train_steps=2)
    assert [len(event.failed) for event in heard.of(Validated)] == [1, 1, 1]
    last = heard.events[-1]
    assert isinstance(last, Noticed) and last.message.startswith(
        "3 validation pictures could not be drawn: validation (3:"
    )
    log = (tmp_path / "output/log.txt").read_text(encoding="utf-8")
    assert "3 validation pictures could not be drawn" in log.splitlines()[-1]
    assert (tmp_path / "output/pipeline/model_index.json").is_file()


def test_kinds_of_files_and_a_prompts_own_settings(tmp_path: Path, shown: Path):
    library = tmp_path / "prompts.json"
    own = {"prompt": "a ring", "resolution": "64x32", "seed": 9, "images": 2, "negative_prompt": "Grey", "steps": 1}
    library.write_text(json.dumps({"ring": own}), encoding="utf-8")
    settings = {
        **DRAWING,
        "user_prompt_library": str(library),
        "validation_image_format": "jpeg",
        "disable_benchmark": True,
    }
    output = trained(tmp_path, shown, **settings, max_train_steps=1)
    assert {path.name for path in (output / "validation_images").iterdir()} == {
        "step_1_ring_0_64x32.jpg", "step_1_ring_1_64x32.jpg", "step_1_validation_0_32x32.jpg",
        "step_1_contact_sheet.png",
    }  # fmt: skip
    assert (output / "validation_images/step_1_ring_0_64x32.jpg").read_bytes().startswith(b"\xff\xd8")
    plan = json.loads((output / "plan.json").read_text(encoding="utf-8"))
    assert plan["pictures"][0].startswith(
        "2 prompts (ring, validation): 3 pictures of 64x32, 32x32 by dpm++ in 1, 2 steps"
    )


def test_a_script_draws_in_place_of_the_run(tmp_path: Path, shown: Path):
    heard = Heard()
    command = 'sh -c \'mkdir -p "$0"; echo "$1 $2" > "$0/step_$2.png"\''
    command += " {validation_images} {local_checkpoint_path} {global_step}"
    settings = {**DRAWING, "validation_method": "external-script", "validation_external_script": command}
    output = trained(tmp_path, shown, heard, **settings, max_train_steps=2, checkpoint_step_interval=1)
    drawn = {path.name: path.read_text() for path in (output / "validation_images").iterdir()}
    assert drawn == {f"step_{step}.png": f"{output}/checkpoint-{step} {step}\n" for step in (1, 2)}
    assert [len(event.files) for event in heard.of(Validated)] == [0, 1, 1]
