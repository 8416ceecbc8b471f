"""CLIP scores: the formula by hand, the real classes on a tiny random model, and what is told of broken folders."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana_tune.errors import UserError
from sana_tune.model.score import BATCH, ClipScorer, score_of
from tests.clip import LETTERS, LONGEST, SIDE, tiny_clip
from tests.data.pictures import noise


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def scorer(folder: Path) -> ClipScorer:
    return ClipScorer.load(folder)


def pictures(count: int, side: int = SIDE) -> list[Image.Image]:
    return [Image.fromarray(noise(side, side, seed)) for seed in range(count)]


def test_the_formula_by_hand():
    one = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    other = torch.tensor([[4.0, 3.0], [0.0, 5.0], [-7.0, 0.0], [1.0, 0.0]])
    assert score_of(one, other).tolist() == pytest.approx([96.0, 0.0, 0.0, 100 / math.sqrt(2)])


def test_a_score_is_the_cosine_of_the_models_own_embeddings(scorer: ClipScorer):
    """Each step done by hand: pixels normalised, tokens counted, both towers, both projections, the cosine."""
    (picture,), prompt = pictures(1), "cat"
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor((np.asarray(picture) / 255 - mean) / std).permute(2, 0, 1)[None].float()
    vocab = scorer.tokenizer.get_vocab()
    tokens = [vocab[name] for name in ("<|startoftext|>", "c", "a", "t</w>", "<|endoftext|>")]
    model = scorer.model
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0].tolist()
        read = model.text_projection(model.text_model(input_ids=torch.tensor([tokens])).pooler_output)[0].tolist()
    cosine = math.fsum(a * b for a, b in zip(seen, read, strict=True)) / math.hypot(*seen) / math.hypot(*read)
    assert abs(cosine) > 0.01
    assert scorer.score([picture], [prompt]) == pytest.approx([max(0.0, 100 * cosine)], abs=1e-3)


def test_many_pictures_each_with_its_own_prompt(scorer: ClipScorer):
    scorer.model.visual_projection.weight.data.neg_()  # these random ones have cosines below 0
    shown, prompts = pictures(BATCH + 3, side=24), [LETTERS[number : 2 * number + 2] for number in range(BATCH + 3)]
    alone = [scorer.score([picture], [prompt])[0] for picture, prompt in zip(shown, prompts, strict=True)]
    assert scorer.score(shown, prompts) == pytest.approx(alone, abs=1e-3)
    assert len({round(score, 3) for score in alone if score}) > 3


def test_long_prompts_are_cut_and_that_is_known(scorer: ClipScorer):
    assert scorer.longest == LONGEST
    long = "abc" * LONGEST
    assert scorer.is_cut(long) and not scorer.is_cut("cat")
    (picture,) = pictures(1)
    assert scorer.score([picture], [long]) == scorer.score([picture], [long + "xyz"])


def test_what_is_no_clip_model_is_told(folder: Path, tmp_path: Path):
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn)
    (torn / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="CLIP cannot be loaded"):
        ClipScorer.load(torn)
    with pytest.raises(UserError, match="CLIP cannot be loaded"):
        ClipScorer.load(tmp_path / "absent")


def test_weights_that_lack_a_part_are_refused(folder: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    lacking = tmp_path / "lacking"
    shutil.copytree(folder, lacking)
    weights = load_file(lacking / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 parts, such as visual_projection\.weight"):
        ClipScorer.load(lacking)


def test_freed_it_holds_nothing(scorer: ClipScorer):
    scorer.free()
    assert vars(scorer) == {}
