"""Pictures drawn in a run are those of the exported pipeline, to the pixel, with the published sampler."""

from __future__ import annotations

import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0

from sana_tune.errors import UserError
from sana_tune.model import generate
from sana_tune.model.attention import LinearAttention, install
from sana_tune.model.fetch import locate
from sana_tune.model.sana import load_text_encoder, load_transformer
from tests.fixtures import cached_sana


def pipelines_own(folder, prompt: str, negative: str, seed: int, **options) -> np.ndarray:
    from diffusers import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = pipeline(prompt, negative_prompt=negative, generator=generator, use_resolution_binning=False, **options)
    return np.asarray(drawn.images[0])


@pytest.mark.parametrize(
    ("folder", "width", "height", "guidance", "negative"),
    [
        (cached_sana, 64, 64, 4.5, ""),
        (lambda: cached_sana(qk_norm=True), 96, 64, 3.0, "blurry, " * 150),
        (lambda: cached_sana(pos_embed=True), 64, 128, 4.5, "blurry"),
        (cached_sana, 64, 64, 1.0, ""),
        (lambda: locate("nano"), 64, 96, 4.5, ""),
    ],
    ids=["plain", "qk_norm", "pos_embed", "no guidance", "nano"],
)
def test_equals_the_pipeline_to_the_pixel(folder, width, height, guidance, negative):
    folder = folder()
    encoder = load_text_encoder(folder)
    text, opposite = encoder.encode(["a red star"])[0], encoder.encode([negative.strip()], with_instruction=False)[0]
    transformer = load_transformer(folder)
    install(transformer)
    painter = generate.Painter(folder)
    options = {"width": width, "height": height}
    ours = painter.draw(transformer, text, opposite, steps=5, guidance=guidance, seed=7, **options)
    assert ours.shape == (height, width, 3) and ours.dtype == np.uint8 and ours.std() > 1
    theirs = pipelines_own(folder, "a red star", negative, 7, num_inference_steps=5, guidance_scale=guidance, **options)
    assert np.array_equal(ours, theirs)
    other = painter.draw(transformer, text, opposite, steps=5, guidance=guidance, seed=8, **options)
    assert not np.array_equal(ours, other)


def test_the_published_schedule():
    scheduler = generate.load_scheduler(cached_sana())
    scheduler.set_timesteps(20)
    expected = "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136"
    assert scheduler.timesteps.tolist() == [int(step) for step in expected.split()]
    assert scheduler.config.flow_shift == 3.0


def test_eulers_last_level_is_shifted_once():
    scheduler = generate.load_scheduler(cached_sana(), "euler")
    generate.set_steps(scheduler, 20)
    assert scheduler.timesteps[0] == 1000 and scheduler.timesteps[-1] == pytest.approx(2.994, abs=1e-3)
    assert scheduler.sigmas[-1] == 0 and len(scheduler.timesteps) == 20
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[-1] == pytest.approx(8.93, abs=0.01), "what diffusers makes of it by itself"


def test_unipc_has_the_models_shift():
    scheduler = generate.load_scheduler(cached_sana(), "unipc")
    generate.set_steps(scheduler, 20)
    assert scheduler.timesteps[:3].tolist() == [999, 982, 964] and scheduler.config.flow_shift == 3.0
    assert scheduler.config.prediction_type == "flow_prediction" and scheduler.config.use_flow_sigmas


@pytest.fixture(scope="module")
def nano():
    folder = locate("nano")
    encoder = load_text_encoder(folder)
    texts = encoder.encode(["a red star on a blue background"])[0], encoder.encode([""])[0]
    return generate.Painter(folder), load_transformer(folder), texts


def test_every_sampler_comes_to_the_same_picture(nano):
    """They solve the same equation: with many steps they agree, and each is on its way there with few."""
    painter, transformer, texts = nano
    options = {"width": 64, "height": 64, "seed": 3}
    exact = painter.draw(transformer, *texts, steps=24, **options).astype(int)
    for sampler, steps, most in (("unipc", 14, 8), ("euler", 36, 12)):
        found = painter.draw(transformer, *texts, steps=steps, sampler=sampler, **options).astype(int)
        assert np.abs(found - exact).mean() < most, sampler


def test_guidance_is_rescaled_to_the_prompts_own_spread(nano):
    painter, transformer, texts = nano
    options = {"width": 64, "height": 64, "seed": 3, "steps": 8}
    strong = painter.draw(transformer, *texts, guidance=12.0, **options)
    calmer = painter.draw(transformer, *texts, guidance=12.0, rescale=0.7, **options)
    assert not np.array_equal(strong, calmer)
    assert np.array_equal(calmer, painter.draw(transformer, *texts, guidance=12.0, rescale=0.7, **options))


def test_watched_steps_point_to_the_picture_and_change_nothing(nano):
    painter, transformer, texts = nano
    options = {"width": 64, "height": 64, "seed": 3, "steps": 8}
    seen: list[tuple[int, torch.Tensor]] = []
    watched = painter.draw(transformer, *texts, watch=lambda step, estimate: seen.append((step, estimate())), **options)
    assert np.array_equal(watched, painter.draw(transformer, *texts, **options))
    assert [step for step, _ in seen] == list(range(1, 9)) and seen[0][1].shape == (1, 8, 8, 8)
    shown = [painter.coder.decode(latents)[0].astype(int) for _, latents in seen]
    errors = [np.abs(one - watched.astype(int)).mean() for one in shown]
    assert errors[-1] < 1 and errors[0] > errors[3] > errors[-1], "the last step's estimate is the picture itself"


class Crowded(torch.nn.Module):
    """A VAE on a device that has no room to decode, until it is moved to main memory."""

    def __init__(self, vae):
        super().__init__()
        self.vae, self.device, self.moved = vae, torch.device("meta"), []

    def decode(self, *arguments, **options):
        if not self.moved:
            raise torch.OutOfMemoryError("no room")
        return self.vae.decode(*arguments, **options)

    def to(self, place):
        self.moved.append(place)
        self.device = torch.device(place)
        return self

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("vae", "device", "moved") else getattr(self.vae, name)


def test_without_room_pictures_are_decoded_in_main_memory(nano, caplog):
    painter, transformer, texts = nano
    options = {"width": 64, "height": 64, "seed": 3, "steps": 2}
    expected = painter.draw(transformer, *texts, **options)
    crowded = generate.Painter(painter.folder)
    assert painter.coder is not None
    crowded.coder = generate.ImageCoder(Crowded(painter.coder.vae))
    latents = generate.sample(transformer, generate.load_scheduler(painter.folder), *texts, (8, 8, 8), steps=2, seed=3)
    assert np.array_equal(crowded._decoded(crowded.coder, latents), expected)
    assert crowded.coder.vae.moved == ["cpu"] and "no room to decode pictures" in caplog.text


def test_another_stored_sampler_is_replaced_by_sanas_with_its_shift(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    copy = shutil.copytree(cached_sana(), tmp_path / "model")
    FlowMatchEulerDiscreteScheduler(shift=4.0).save_pretrained(copy / "scheduler")
    scheduler = generate.load_scheduler(copy)
    assert type(scheduler).__name__ == "DPMSolverMultistepScheduler" and scheduler.config.flow_shift == 4.0
    assert scheduler.config.prediction_type == "flow_prediction" and scheduler.config.use_flow_sigmas
    config = json.loads((copy / "scheduler/scheduler_config.json").read_text())
    assert "flow_shift" not in config


def test_the_model_is_left_as_it_was():
    folder = cached_sana()
    encoder = load_text_encoder(folder)
    text = encoder.encode(["a cat"])[0]
    transformer = load_transformer(folder)
    install(transformer)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    painter = generate.Painter(folder)

    def check():
        assert transformer.training
        assert {type(block.attn1.processor) for block in transformer.transformer_blocks} == {LinearAttention}
        assert all(parameter.requires_grad and parameter.grad is None for parameter in transformer.parameters())
        assert all(torch.equal(before[name], tensor) for name, tensor in transformer.state_dict().items())

    state = torch.random.get_rng_state()
    painter.draw(transformer, text, text, width=64, height=64, steps=2)
    assert torch.equal(state, torch.random.get_rng_state()), "drawing takes no random numbers from the run"
    check()
    with pytest.raises(RuntimeError):
        painter.draw(transformer, text[:, :5], text[:, :5], width=64, height=64, steps=2)
    check()
    transformer.eval()
    painter.draw(transformer, text, text, width=64, height=64, steps=2)
    assert not transformer.training


def test_autocast_draws_nearly_the_same_with_the_fp32_attention():
    folder = cached_sana()
    text = load_text_encoder(folder).encode(["a cat"])[0]
    transformer = load_transformer(folder)
    install(transformer)
    used = []
    transformer.transformer_blocks[0].attn1.register_forward_pre_hook(lambda attn, _: used.append(type(attn.processor)))
    pictures = []
    for autocast, attention in ((None, SanaLinearAttnProcessor2_0), (torch.bfloat16, LinearAttention)):
        used.clear()
        painter = generate.Painter(folder, autocast=autocast)
        pictures.append(painter.draw(transformer, text, text, width=64, height=64, steps=3).astype(int))
        assert set(used) == {attention}
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 8


def test_the_vae_is_loaded_at_the_first_picture_and_released():
    folder = cached_sana()
    text = load_text_encoder(folder).encode(["a cat"])[0]
    transformer = load_transformer(folder)
    painter = generate.Painter(folder)
    assert painter.coder is None
    first = painter.draw(transformer, text, text, width=64, height=64, steps=2)
    assert painter.coder is not None
    gone = weakref.ref(painter.coder.vae)
    painter.release()
    assert gone() is None and painter.coder is None
    painter.release()
    assert np.array_equal(first, painter.draw(transformer, text, text, width=64, height=64, steps=2))


def test_sizes_that_cannot_be_drawn_are_told():
    assert generate.check_size(1024, 768, 32) is None and generate.check_size(64, 96, 8) is None
    problem = generate.check_size(1000, 40, 32)
    assert problem is not None and "1000x40" in problem.what and problem.fix == "use 992x32"
    with pytest.raises(UserError, match="multiples of 32 px; found 72x64"):
        generate.Painter(cached_sana()).draw(
            load_transformer(cached_sana()), torch.zeros(1, 32), torch.zeros(1, 32), width=72, height=64
        )


def test_padding_as_the_pipeline_has_it():
    text = torch.randn(7, 32)
    padded, mask = generate.pad(text)
    assert padded.shape == (1, 300, 32) and mask.shape == (1, 300) and mask.sum() == 7
    assert torch.equal(padded[0, :7], text) and not padded[0, 7:].any()
