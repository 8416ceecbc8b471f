"""Where the previews' decoder is: a file, or one of the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sana_tune.errors import UserError
from sana_tune.model.facts import known
from sana_tune.model.preview_file import check, locate

FACTS = known("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers")


def test_a_file_or_one_of_the_hub(tmp_path: Path, monkeypatch):
    assert FACTS is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.pth").touch()
    check("d.pth", FACTS)
    check("owner/name/taesana_decoder.pth", FACTS)
    assert locate("d.pth") == Path("d.pth")
    for name in ("e.pth", "owner/name", "./x/y/z.pth", "/x/y/z.pth"):
        with pytest.raises(UserError, match="no owner/repository/file"):
            check(name, FACTS)


def test_a_model_of_other_latents_is_told():
    assert FACTS is not None
    with pytest.raises(UserError, match=r"of 32 channels and 1/32 of the size; those of .* have 8 channels and 1/8"):
        check("owner/name/file.pth", replace(FACTS, latent_channels=8, vae_factor=8))
