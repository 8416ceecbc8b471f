"""Previews: the linear map is the best there is, TAESANA's published names fit, and a wrong decoder is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sana_tune.errors import UserError
from sana_tune.model import preview
from sana_tune.model.fetch import locate
from sana_tune.model.sana import load_vae


def pairs_of_a_map(count: int = 4, channels: int = 6, cell: int = 4) -> tuple[torch.Tensor, list[preview.Pair]]:
    """Pictures that are a linear map of their latents, but for rounding; not square."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.cat(
        [torch.randn(channels, cell * cell * 3, generator=generator) * 0.05, torch.full((1, cell * cell * 3), 0.5)]
    )
    made = []
    for _ in range(count):
        latent = torch.randn(channels, 5, 7, generator=generator)
        levels = preview.Linear(weight)(latent[None])
        made.append((latent, (levels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()))
    return weight, made


def test_the_map_that_made_the_pictures_is_found():
    weight, made = pairs_of_a_map()
    found = preview.Linear.fit(made)
    assert torch.allclose(found.weight, weight, atol=0.01)
    assert preview.mean_error(found, made) < 1e-5
    assert found(made[0][0][None]).shape == (3, 20, 28)


def test_one_plain_picture_gives_a_map_too():
    plain = np.full((32, 32, 3), (200, 100, 50), np.uint8)
    found = preview.Linear.fit([(torch.zeros(8, 4, 4), plain)])
    shown = preview.pixels(found(torch.zeros(1, 8, 4, 4)))
    assert shown.shape == (32, 32, 3) and (shown[0, 0] - torch.tensor([200, 100, 50])).abs().max() <= 1
    with pytest.raises(ValueError, match="at least one"):
        preview.Linear.fit([])


def test_nanos_own_latents_are_seen():
    """Coloured halves: the map of nano's VAE shows which half is which."""
    coder = load_vae(locate("nano"))
    rng = np.random.default_rng(0)
    pictures = [np.kron(rng.integers(0, 256, (2, 2, 3)), np.ones((32, 32, 1))).astype(np.uint8) for _ in range(8)]
    made = [(coder.encode(picture[None])[0], picture) for picture in pictures]
    shown = preview.pixels(preview.Linear.fit(made[:6])(made[7][0][None])).numpy().astype(int)
    for rows in (slice(8, 24), slice(40, 56)):
        for columns in (slice(8, 24), slice(40, 56)):
            assert np.abs(shown[rows, columns].mean((0, 1)) - pictures[7][rows, columns].mean((0, 1))).max() < 60


def test_pictures_are_made_small():
    assert preview.pixels(torch.zeros(3, 1024, 512)).shape == (256, 128, 3)
    assert preview.pixels(torch.ones(3, 64, 96)).unique().tolist() == [255]


# ---- TAESANA ----


def published(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of taesana_decoder.pth (its module list, counted by hand)."""
    widths = {1: (256, 32), 7: (128, 256), 12: (64, 128), 17: (64, 64), 22: (64, 64), 27: (64, 64), 29: (3, 64)}
    blocks = {
        3: 256,
        4: 256,
        5: 256,
        8: 128,
        9: 128,
        10: 128,
        **dict.fromkeys((13, 14, 15, 18, 19, 20, 23, 24, 25, 28), 64),
    }
    names = {f"{place}.weight": (out, width, 3, 3) for place, (out, width) in widths.items()}
    names |= {f"{place}.bias": (widths[place][0],) for place in (1, 29)}
    for place, width in blocks.items():
        for inner in (0, 2, 4):
            names |= {f"{place}.conv.{inner}.weight": (width, width, 3, 3), f"{place}.conv.{inner}.bias": (width,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.03 for name, shape in names.items()}


def test_the_published_names_fit(tmp_path: Path):
    state = published()
    torch.save(state, tmp_path / "taesana_decoder.pth")
    save_file({f"decoder.{name}": tensor for name, tensor in state.items()}, tmp_path / "decoder.safetensors")
    latents = torch.randn(1, 32, 1, 2)
    with torch.no_grad():
        one, other = (preview.load_tiny(tmp_path / name) for name in ("taesana_decoder.pth", "decoder.safetensors"))
    assert one(latents).shape == (3, 32, 64) and torch.equal(one(latents), other(latents))
    assert sum(weight.numel() for weight in one.network.parameters()) == sum(
        weight.numel() for weight in state.values()
    )
    assert not any(weight.requires_grad for weight in one.network.parameters())


class Evil:
    def __reduce__(self):
        return (print, ("run!",))


def test_other_files_are_told_and_nothing_in_them_is_run(tmp_path: Path, capsys):
    bad = {
        "code.pth": lambda path: path.write_bytes(pickle.dumps(Evil())),
        "zip.pth": lambda path: torch.save({"x": Evil()}, path),
        "text.pth": lambda path: path.write_text("no weights", encoding="utf-8"),
        "empty.pth": lambda path: path.write_bytes(b""),
        "other.pth": lambda path: torch.save({"1.weight": torch.zeros(3)}, path),
        "list.pth": lambda path: torch.save([torch.zeros(3)], path),
        "torn.safetensors": lambda path: path.write_bytes(b"\xff" * 9),
    }
    for name, write in bad.items():
        write(tmp_path / name)
        with pytest.raises(UserError, match="validation_preview_decoder.*" + name) as caught:
            preview.load_tiny(tmp_path / name)
        assert "\n" not in caught.value.problems[0].what
    with pytest.raises(UserError):
        preview.load_tiny(tmp_path / "nowhere.pth")
    assert "run!" not in capsys.readouterr().out


class Exact(torch.nn.Module):
    """Decodes latents of the kind it knows: each channel of the first three is a colour."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(torch.sigmoid(latents[:, :3]), scale_factor=32)


@pytest.mark.parametrize("scale", [1.0, 1 / 0.41407])
def test_the_scale_of_the_latents_is_found(scale: float):
    """Scaled latents as they are, or divided by the VAE's factor: whichever gives the pictures back."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(3):
        latent = torch.randn(32, 2, 2, generator=generator) * 2
        levels = Exact()(latent[None] * scale)[0]
        made.append((latent, (levels * 255).to(torch.uint8).permute(1, 2, 0).numpy()))
    assert preview.fitted(preview.Tiny(Exact()), made, 0.41407).scale == pytest.approx(scale)


class Blind(torch.nn.Module):
    """Sees nothing in its latents."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.new_full((len(latents), 3, latents.shape[2] * 32, latents.shape[3] * 32), 0.5)


def test_a_decoder_of_another_model_is_refused():
    _, made = pairs_of_a_map(channels=32, cell=8)
    with pytest.raises(UserError, match=r"not for this model's latents: its mean squared error is .* on scaled ones"):
        preview.fitted(preview.Tiny(Blind()), made, 0.41407)
