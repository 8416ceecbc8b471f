"""Masked loss from files to weights: what is outside a mask teaches nothing, by its gradient and by what is learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_tune.cli.examples import copy_example
from sana_tune.config.files import examples_dir
from sana_tune.config.load import load
from sana_tune.data.cache import TensorCache
from sana_tune.data.order import names_of
from sana_tune.exporting import merged_state
from sana_tune.model import flow
from sana_tune.model.fetch import locate
from sana_tune.model.sana import load_transformer
from sana_tune.output import Output
from sana_tune.prepare import Prepared, prepare
from sana_tune.run import run
from tests.journeys.kit import one_thread

SIGMAS = (0.6,)
SHORT = {
    "max_train_steps": 16, "train_batch_size": 8, "lr_warmup_steps": 4, "validation_disable": True, "report": False,
    "checkpoint_step_interval": 0, "device": "cpu",
}  # fmt: skip


@dataclass
class Home:
    """Two short runs of the example, with its masks and without, and what they trained on."""

    masked: Path
    plain: Path
    prepared: Prepared
    latents: Tensor  # [16, C, h, w]
    masks: Tensor  # [16, 1, h, w]
    texts: list[Tensor]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("masked")
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.chdir(root)
        copied = copy_example("nano-masked", Path("mine"))
        entries = json.loads((copied / "multidatabackend.json").read_text())
        bare = [{key: value for key, value in entry.items() if key != "conditioning_data"} for entry in entries]
        (copied / "plain.json").write_text(json.dumps([entry for entry in bare if entry["id"] != "tib-masks"]))
        both: dict[str, Path] = {}
        for name, data in (("masked", "multidatabackend.json"), ("plain", "plain.json")):
            both[name] = root / name
            own = {"output_dir": name, "data_backend_config": f"mine/{data}", "cache_dir": "cache"}
            loaded = load(copied / "config.json", {**SHORT, **own}, {})
            run(loaded)
        prepared = prepare(load(copied / "config.json", {**SHORT, "output_dir": "masked", "cache_dir": "cache"}, {}),
                           Output.open(Path("masked")))  # fmt: skip
        records = [record for record in prepared.survey.records if record.dataset == "tib"]
        latents, text = TensorCache(Path("cache/vae/tib")), TensorCache(Path("cache/text"))
        return Home(
            both["masked"],
            both["plain"],
            prepared,
            torch.stack([latents.get(prepared.keys.latent(record)) for record in records]),
            torch.stack([latents.get(prepared.keys.mask(record)) for record in records]),
            [text.get(prepared.keys.text(record.captions[0])) for record in records],
        )


def predicted(weights: Path | dict[str, Tensor], home: Home, sigma: float) -> Tensor:
    """What weights predict of the example's pictures at a noise level, the noise always the same: [16, C, h, w]."""
    noise = torch.randn(home.latents.shape, generator=torch.Generator().manual_seed(5))
    text = torch.nn.utils.rnn.pad_sequence(home.texts, batch_first=True).float()
    real = torch.nn.utils.rnn.pad_sequence([torch.ones(len(one), dtype=torch.long) for one in home.texts], True)
    model = load_transformer(weights if isinstance(weights, Path) else locate("nano")).eval()
    if not isinstance(weights, Path):
        model.load_state_dict(weights)
    with torch.no_grad():
        noised = flow.noised(home.latents, noise, torch.full((len(noise),), sigma))
        level = torch.full((len(noise),), 1000 * sigma)
        return model(noised, text, level, encoder_attention_mask=real, return_dict=False)[0] - (noise - home.latents)


def test_the_gradient_outside_a_mask_is_exactly_zero(home: Home):
    """Of the loss by the prediction, with the masks as a run reduces them to latent positions."""
    assert home.masks.shape == (16, 1, 8, 8)
    share = home.masks.mean()
    assert 0.1 < share < 0.5 and ((home.masks > 0) & (home.masks < 1)).any(), "the edge of a mask counts in part"
    prediction = torch.randn(home.latents.shape, requires_grad=True)
    flow.loss(prediction, home.latents, home.masks).mean.backward()
    grad, outside = prediction.grad, (home.masks == 0).expand_as(home.latents)
    assert grad is not None and outside.float().mean() > 0.4
    assert torch.count_nonzero(grad[outside]) == 0
    assert (grad[~outside] != 0).float().mean() > 0.99


def test_the_background_is_not_learnt(home: Home):
    """Inside, the masked run learns; outside it stays nearer to the base model than the run that was shown all."""
    runs = {"masked": home.masked / "pipeline", "plain": home.plain / "pipeline"}
    inside, moved = errors(home, runs)
    assert inside["masked"] < 0.8 * inside["base"]
    assert moved["masked"] < 0.5 * moved["plain"]


def test_nor_is_it_by_an_adapter(home: Home, tmp_path: Path):
    """The same with a LoKr in place of the whole weights."""
    folder = home.masked.parent / "mine"
    (folder / "lycoris.json").write_text('{"algo": "lokr", "full_matrix": true, "factor": 4}')
    states: dict[str, dict[str, Tensor]] = {}
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.chdir(home.masked.parent)
        for name, data in (("masked", "multidatabackend.json"), ("plain", "plain.json")):
            own = {"output_dir": f"lokr {name}", "data_backend_config": f"mine/{data}", "cache_dir": "cache"}
            own |= {"model_type": "lora", "lycoris_config": "mine/lycoris.json", "learning_rate": 2e-2}
            loaded = load(folder / "config.json", {**SHORT, **own}, {})
            run(loaded)
            saved = Path(f"lokr {name}/adapter/pytorch_lora_weights.safetensors")
            states[name] = merged_state(loaded.config, saved, locate("nano"))
    inside, moved = errors(home, states)
    assert inside["masked"] < 0.8 * inside["base"], inside
    assert moved["masked"] < 0.7 * moved["plain"], moved


def errors(home: Home, runs: Mapping[str, Path | dict[str, Tensor]]) -> tuple[dict[str, float], dict[str, float]]:
    """By run: squared error inside the masks, that of the base too, and how far predictions outside have moved."""
    inside: dict[str, float] = dict.fromkeys(("base", "masked", "plain"), 0.0)
    moved: dict[str, float] = dict.fromkeys(("masked", "plain"), 0.0)
    weight, outside = home.masks, (home.masks == 0).float()
    for sigma in SIGMAS:
        base = predicted(locate("nano"), home, sigma)
        inside["base"] += float((base**2 * weight).sum() / weight.sum())
        for name, weights in runs.items():
            error = predicted(weights, home, sigma)
            inside[name] += float((error**2 * weight).sum() / weight.sum())
            moved[name] += float(((error - base) ** 2 * outside).sum() / outside.sum())
    return inside, moved


def test_the_regularisation_data_is_told_apart(home: Home):
    assert set(names_of(home.prepared.buckets)) == {"tib", "known"}
    lines = [json.loads(line) for line in (home.masked / "metrics.jsonl").read_text().splitlines()]
    assert any("loss_regularisation" in line for line in lines) and any("loss_train" in line for line in lines)


def test_the_pictures_are_those_of_the_script(tmp_path: Path):
    """The example's files are drawn again, byte for byte as pixels."""
    import numpy as np
    from PIL import Image

    from scripts.nano import draw

    draw.write_masked(tmp_path / "pictures", tmp_path / "masks", draw.masked_scenes())
    kept = examples_dir() / "nano-masked"

    def pixels(path: Path) -> Any:
        return np.asarray(Image.open(path).convert("RGB"))

    for part in ("pictures", "masks"):
        names = sorted(path.name for path in (kept / part).iterdir())
        assert names == sorted(path.name for path in (tmp_path / part).iterdir()) and len(names) in (16, 32)
        for name in (name for name in names if name.endswith(".png")):
            assert np.array_equal(pixels(kept / part / name), pixels(tmp_path / part / name)), name
    for text in (tmp_path / "pictures").glob("*.txt"):
        assert text.read_text() == (kept / "pictures" / text.name).read_text()
