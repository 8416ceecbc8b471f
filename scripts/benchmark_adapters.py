"""A step of LoKr training beside a bare loop with LyCORIS, on nano's size and at 30 M parameters (bar: 1.15 times).

python scripts/benchmark_adapters.py [--rounds 20] [--batch 2] [--side 16] [--threads 2]

Both train the same adapter of the same random model on the same batch, with the same optimizer; the bare loop has
diffusers' forward, LyCORIS's wrapper, a loss, clipping and the optimizer, and nothing else. Pairs take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NANO: dict[str, Any] = {
    "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 6, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 64, "cross_attention_dim": 128,
}  # fmt: skip
FILE = {"algo": "lokr", "full_matrix": True, "linear_dim": 10000, "linear_alpha": 1, "factor": 16}
SETTLING = 2


@dataclass(frozen=True)
class Cost:
    """Median times of a step, s: ours, and that of the bare loop."""

    ours_s: float
    bare_s: float

    @property
    def ratio(self) -> float:
        return self.ours_s / self.bare_s


def cost(config: dict[str, Any], side: int, batch: int, rounds: int) -> Cost:
    """Time both in turns. side: latent positions."""
    import torch

    torch.manual_seed(0)
    latents = torch.randn(batch, 32, side, side)
    text, mask = torch.randn(batch, 40, 256), torch.ones(batch, 40, dtype=torch.int64)
    steps = (_ours(config, latents, text, mask), _bare(config, latents, text, mask))
    times: list[tuple[float, float]] = []
    for turn in range(SETTLING + rounds):
        pair = []
        for step in steps:
            started = time.perf_counter()
            step()
            pair.append(time.perf_counter() - started)
        if turn >= SETTLING:
            times.append((pair[0], pair[1]))
    return Cost(*(statistics.median(column) for column in zip(*times, strict=True)))


def _model(config: dict[str, Any]) -> Any:
    import torch
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(1)
    model = SanaTransformer2DModel(**config, in_channels=32, out_channels=32, caption_channels=256)
    return model.train().requires_grad_(False)


def _ours(config: dict[str, Any], latents: Any, text: Any, mask: Any) -> Callable[[], object]:
    from sana_tune.config.lycoris import lycoris_of
    from sana_tune.data.batch import Batch
    from sana_tune.data.order import MicroBatch
    from sana_tune.data.records import Role
    from sana_tune.model.attention import install
    from sana_tune.progress import Progress
    from sana_tune.train.adapt import Adapter
    from sana_tune.train.step import train_step
    from scripts.benchmark_engine import parts_of

    model = _model(config)
    install(model)
    adapter = Adapter(model, lycoris_of(FILE, "FILE"))
    parts = parts_of(model, adapter, "cpu")
    batch = Batch(latents, text, mask, None, Role.TRAIN, tuple(map(str, range(len(latents)))))
    where = MicroBatch(0, 0, 0, tuple(range(len(latents))))
    state = [Progress()]

    def step() -> None:
        state[0] = state[0].advance(train_step(parts, [(where, batch)], state[0]).images, 0.0)

    return step


def _bare(config: dict[str, Any], latents: Any, text: Any, mask: Any) -> Callable[[], object]:
    import optimi
    import torch
    from lycoris.wrapper import LycorisNetwork

    model = _model(config)
    before = {name: vars(LycorisNetwork)[name] for name in ("TARGET_REPLACE_MODULE", "TARGET_EXCLUDE_NAME")}
    LycorisNetwork.TARGET_REPLACE_MODULE = ["Attention", "GLUMBConv"]
    LycorisNetwork.TARGET_EXCLUDE_NAME = [r".*\.conv_depth$"]
    try:
        network: Any = LycorisNetwork(
            model, lora_dim=10000, conv_lora_dim=10000, alpha=1, conv_alpha=1, network_module="lokr", factor=16,
            full_matrix=True,
        )  # fmt: skip
    finally:
        for name, value in before.items():
            setattr(LycorisNetwork, name, value)
    network.apply_to()
    network.train().requires_grad_(True)
    trained = list(network.parameters())
    optimizer = optimi.AdamW(trained, 1e-5, betas=(0.9, 0.99), eps=1e-6)

    def step() -> None:
        noise = torch.randn_like(latents)
        sigma = torch.sigmoid(torch.randn(len(latents)))
        sigma = 3 * sigma / (1 + 2 * sigma)
        mixed = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
        found = model(mixed, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=1000 * sigma).sample
        loss = (found - (noise - latents)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.1)
        loss.item()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="A step of LoKr training beside a bare loop with LyCORIS.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=16, help="latent positions a side")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    import torch

    from sana_tune import log
    from scripts.benchmark_engine import MIDDLE

    log.quiet_libraries()
    torch.set_num_threads(asked.threads)
    for name, config in (("nano's size", NANO), ("30 M parameters", MIDDLE)):
        found = cost(config, asked.side, asked.batch, asked.rounds)
        print(
            f"{name}, batch {asked.batch}, {asked.side}x{asked.side} positions, {asked.threads} thread(s): "
            f"{found.ours_s:.4f} s a step, bare {found.bare_s:.4f} s, ratio {found.ratio:.2f}"
        )


if __name__ == "__main__":
    main()
