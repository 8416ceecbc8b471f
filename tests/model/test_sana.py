"""Prompts and pictures are encoded as diffusers does it; loading, freeing, interval checkpointing."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch

from sana_tune.errors import UserError
from sana_tune.model import sana
from sana_tune.model.fetch import locate
from sana_tune.model.instruction import INSTRUCTION
from tests.fixtures import SCALING_FACTOR, cached_sana

CAPTIONS = ["a red star on a blue background", "x", "é…ß 漢字 <bos> user prompt: ", "word " * 400]


@pytest.fixture(scope="module")
def folder():
    return cached_sana()


@pytest.fixture(scope="module")
def pipeline(folder):
    from diffusers import SanaPipeline

    return SanaPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(folder):
    return sana.load_text_encoder(folder)


@pytest.fixture(scope="module")
def coder(folder):
    return sana.load_vae(folder)


def pipelines_own(pipeline, prompt: str, instruction: str) -> torch.Tensor:
    """The real tokens of what SanaPipeline itself would draw a positive prompt with. [T, D]"""
    lines = instruction.split("\n") if instruction else None
    embeds, mask, _, _ = pipeline.encode_prompt(prompt, False, complex_human_instruction=lines)
    assert embeds.shape[1] == 300 and mask.shape == (1, 300)
    return embeds[0, mask[0].bool()]


@pytest.mark.parametrize("setting", [None, "None", "Describe it better: "])
@pytest.mark.parametrize("number", range(len(CAPTIONS)))
def test_captions_are_encoded_as_the_pipeline_does(folder, pipeline, setting, number):
    encoder = sana.load_text_encoder(folder, instruction=setting)
    caption = CAPTIONS[number].strip()
    ours = encoder.encode([caption])[0]
    theirs = pipelines_own(pipeline, caption, encoder.instruction)
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours, theirs)
    if number == 3:
        assert len(ours) == 300
    else:  # with an instruction its last token is kept too, unless it merges with the caption's first
        assert len(ours) - encoder.count_tokens(caption) in ((0,) if setting == "None" else (0, 1))


def test_on_nano_too(pipeline):
    from diffusers import SanaPipeline

    nano = SanaPipeline.from_pretrained(locate("nano"), transformer=None, vae=None)
    encoder = sana.load_text_encoder(locate("nano"))
    for caption in ("a red star on a blue background", "a zib on a green background"):
        assert torch.equal(encoder.encode([caption])[0], pipelines_own(nano, caption, INSTRUCTION))


def test_the_empty_caption_and_negatives_have_no_instruction(encoder, pipeline):
    empty = encoder.encode([""])[0]
    assert torch.equal(empty, pipelines_own(pipeline, "", "")) and empty.shape[0] == 1
    assert torch.equal(encoder.encode(["", "a cat"])[0], empty)
    _, _, negative, mask = pipeline.encode_prompt(
        "a cat", True, negative_prompt="blurry", complex_human_instruction=INSTRUCTION.split("\n")
    )
    assert torch.equal(encoder.encode(["blurry"], with_instruction=False)[0], negative[0, mask[0].bool()])


def test_an_embedding_depends_on_its_text_alone(encoder):
    alone = [encoder.encode([caption])[0] for caption in CAPTIONS]
    together = encoder.encode([*CAPTIONS, ""])
    assert len(together) == 5
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=False))
    backwards = encoder.encode(CAPTIONS[::-1])[::-1]
    assert all(torch.equal(a, b) for a, b in zip(alone, backwards, strict=True))


def test_stored_embeddings_own_their_memory(encoder):
    embedding = encoder.encode(["a cat"])[0]
    assert embedding.untyped_storage().nbytes() == embedding.numel() * embedding.element_size()
    assert not embedding.requires_grad and embedding.device.type == "cpu"


def test_too_long_captions_are_known(encoder, folder):
    assert encoder.is_cut("word " * 400) and not encoder.is_cut("a cat") and not encoder.is_cut("")
    words = "star " * 280
    tokens = encoder.count_tokens(words.strip())
    bare = sana.load_text_encoder(folder, instruction="None")
    room = "star " * (280 + 300 - tokens)
    assert bare.count_tokens(room.strip()) == 300
    assert not bare.is_cut(room.strip()) and bare.is_cut(room + "star")


def test_the_encoder_keeps_the_dtype_it_is_stored_in(folder, tmp_path):
    from transformers import Gemma2Model

    copy = shutil.copytree(folder, tmp_path / "model")
    Gemma2Model.from_pretrained(copy / "text_encoder").bfloat16().save_pretrained(copy / "text_encoder")
    assert sana.load_text_encoder(copy).encode(["a cat"])[0].dtype == torch.bfloat16
    assert sana.load_text_encoder(copy, dtype=torch.float32).dtype == torch.float32


def pictures(count: int = 3, height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_latents_are_encoded_and_scaled(coder):
    found = coder.encode(pictures())
    assert found.shape == (3, 32, 2, 3) and found.dtype == torch.float32
    assert coder.scaling_factor == SCALING_FACTOR == 0.41407
    for picture, latent in zip(pictures(), found, strict=True):
        scaled = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            expected = coder.vae.encode(scaled).latent * 0.41407
        assert torch.allclose(latent, expected[0], atol=1e-5)
    assert found.std() > 0.01, "the comparison is not of zeros"


def test_a_latent_depends_on_its_picture_alone(coder):
    together = coder.encode(pictures())
    for start, stop in ((0, 1), (1, 3), (0, 2)):
        assert torch.equal(coder.encode(pictures()[start:stop]), together[start:stop])


def test_decoding_is_the_pipelines(coder, pipeline):
    latents = torch.randn(2, 32, 2, 3)
    with torch.no_grad():
        raw = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    expected = [np.asarray(image) for image in pipeline.image_processor.postprocess(raw, output_type="pil")]
    assert np.array_equal(coder.decode(latents), np.stack(expected))


def test_the_networks_compute_the_pipelines_very_bits(coder, encoder, pipeline):
    with torch.no_grad():
        for height, width in ((2, 2), (2, 3), (4, 2)):
            latents, pixels = torch.randn(1, 32, height, width), torch.randn(1, 3, 32 * height, 32 * width)
            assert torch.equal(coder.vae.decode(latents).sample, pipeline.vae.decode(latents).sample)
            assert torch.equal(coder.vae.encode(pixels).latent, pipeline.vae.encode(pixels).latent)


def test_nanos_latents_decode_to_the_picture():
    coder = sana.load_vae(locate("nano"))
    picture = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    picture[:, :, :, 2] = 200
    picture[:, 20:44, 20:44] = (220, 30, 30)
    again = coder.decode(coder.encode(picture))
    assert again.shape == picture.shape and again.dtype == np.uint8
    assert np.abs(again.astype(int) - picture).mean() < 20
    assert 0.3 < coder.encode(picture).std() < 3, "scaled to about one"


def test_tiles_give_other_latents_and_other_pictures_and_only_where_they_are_asked_for():
    """Above 512 px: the attention sees a tile. nano's differences are those of docs/small-cards.md, in kind."""
    whole, tiled = sana.load_vae(locate("nano")), sana.load_vae(locate("nano"), tiled_encoding=True)
    drawn = sana.load_vae(locate("nano"), tiled_decoding=True)
    picture = np.full((1, 576, 64, 3), 200, dtype=np.uint8)
    picture[:, 400:540, 10:40] = (220, 30, 30)
    latents = whole.encode(picture)
    assert torch.equal(drawn.encode(picture), latents), "what is drawn in tiles is encoded whole"
    other = tiled.encode(picture)
    assert other.shape == latents.shape and 1e-7 < ((other - latents) ** 2).mean() / latents.var() < 1e-2
    seen, again = whole.decode(latents), drawn.decode(latents)
    assert np.array_equal(tiled.decode(latents), seen)
    assert again.shape == seen.shape and 0 < np.abs(again.astype(int) - seen).max() < 32
    small = picture[:, 64:]
    assert torch.equal(tiled.encode(small), whole.encode(small)), "512 px are one tile"


def test_latents_that_are_not_finite_are_refused_by_number(folder):
    coder = sana.load_vae(folder)
    layer = coder.vae.encoder.conv_out
    count = 0

    def spoil(module, inputs, output):
        nonlocal count
        count += 1
        return output * float("nan") if count in (2, 3) else output

    layer.register_forward_hook(spoil)
    with pytest.raises(sana.NotFinite) as caught:
        coder.encode(pictures(4))
    assert caught.value.indices == (1, 2)


def test_freed_networks_are_gone(folder):
    encoder, coder = sana.load_text_encoder(folder), sana.load_vae(folder)
    encoder.encode(["a cat"])
    coder.encode(pictures(1))
    gone = [weakref.ref(thing) for thing in (encoder.model, encoder.tokenizer, coder.vae)]
    gone += [weakref.ref(next(iter(model.parameters()))) for model in (encoder.model, coder.vae)]
    encoder.free()
    coder.free()
    assert [reference() for reference in gone] == [None] * 5


@pytest.mark.parametrize("kind", [{"qk_norm": True}, {"pos_embed": True}])
def test_transformers_load_whole_in_the_asked_dtype(kind):
    model = sana.load_transformer(cached_sana(**kind), torch.bfloat16)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    masters = sana.load_transformer(cached_sana(**kind))
    assert {tensor.dtype for tensor in masters.state_dict().values()} == {torch.float32}
    pairs = zip(masters.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a.bfloat16(), b) for a, b in pairs)


def test_nano_is_loaded_into_fp32_masters():
    model = sana.load_transformer(locate("nano"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_variant_is_read_from_its_own_files(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    plain = copy / "transformer/diffusion_pytorch_model.safetensors"
    model = sana.load_transformer(copy, torch.bfloat16)
    model.save_pretrained(copy / "transformer", variant="bf16")
    plain.write_bytes(b"must not be read")
    again = sana.load_transformer(copy, torch.bfloat16)
    assert torch.equal(again.proj_out.weight, model.proj_out.weight)
    with pytest.raises(UserError, match="cannot be loaded"):
        sana.load_transformer(copy, torch.float32)


def test_weights_that_do_not_fit_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "model")
    for component, stem, load in (
        ("transformer", "diffusion_pytorch_model", sana.load_transformer),
        ("vae", "diffusion_pytorch_model", sana.load_vae),
        ("text_encoder", "model", sana.load_text_encoder),
    ):
        path = copy / component / f"{stem}.safetensors"
        state = load_file(path)
        lost = sorted(state)[0]
        save_file({name: tensor for name, tensor in state.items() if name != lost}, path, {"format": "pt"})
        with pytest.raises(UserError, match=rf"missing keys: .*{lost}"):
            load(copy)


def test_a_foreign_text_side_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "text_encoder": ["somewhere", "Else"]}))
    with pytest.raises(UserError, match="must be a class of transformers such as Gemma2Model; found somewhere"):
        sana.load_text_encoder(copy)


def test_a_tokenizer_without_a_beginning_is_refused(folder, tmp_path):
    from transformers import GemmaTokenizer

    copy = shutil.copytree(folder, tmp_path / "model")
    GemmaTokenizer.from_pretrained(copy / "tokenizer", add_bos_token=False).save_pretrained(copy / "tokenizer")
    with pytest.raises(UserError, match="an empty caption would be nothing"):
        sana.load_text_encoder(copy)


def test_nothing_is_left_on_the_screen(folder, capfd):
    sana.load_text_encoder(folder)
    sana.load_vae(folder)
    sana.load_transformer(folder, torch.bfloat16)
    gc.collect()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
