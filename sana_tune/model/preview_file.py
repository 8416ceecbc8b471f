"""Where the weights of the previews' decoder are: a file, or one of a hub repository. Torch-free."""

from __future__ import annotations

from pathlib import Path

from sana_tune.config.files import resolve
from sana_tune.errors import Problem, UserError
from sana_tune.model.facts import ModelFacts
from sana_tune.model.fetch import one_file

KEY = "validation_preview_decoder"
CHANNELS, FACTOR = 32, 32  # of the latents that TAESANA decodes
_LEAVE_OUT = "leave it out: a linear map is fitted to the run's pictures then"


def check(name: str, facts: ModelFacts) -> None:
    """Raise UserError for a decoder that is not there, or cannot be this model's. Nothing is downloaded."""
    if (facts.latent_channels, facts.vae_factor) != (CHANNELS, FACTOR):
        what = (
            f"TAESANA decodes latents of {CHANNELS} channels and 1/{FACTOR} of the size; those of {facts.name} have "
            f"{facts.latent_channels} channels and 1/{facts.vae_factor} of the size"
        )
        raise UserError(Problem(KEY, what, _LEAVE_OUT))
    if not resolve(name).is_file() and _on_hub(name) is None:
        what = f"there is no file {name}, and it is no owner/repository/file of the hub"
        raise UserError(Problem(KEY, what, f"name the file of TAESANA's decoder, or {_LEAVE_OUT}"))


def locate(name: str) -> Path:
    """The file on this machine, downloaded if it is on the hub. Raises UserError when it cannot be had."""
    path, hub = resolve(name), _on_hub(name)
    return path if path.is_file() or hub is None else one_file(*hub, key=KEY)


def _on_hub(name: str) -> tuple[str, str] | None:
    """Repository and file of owner/repository/file; None for another form."""
    parts = name.split("/", 2)
    if len(parts) < 3 or not all(parts) or parts[0] in (".", "..", "~") or Path(parts[0]).is_dir():
        return None
    return f"{parts[0]}/{parts[1]}", parts[2]
