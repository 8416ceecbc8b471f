"""What the engine's parts are worth: each rewrite beside diffusers' own code, and a step of 30 million parameters.

python scripts/benchmark_engine.py rewrites           time on the CPU at 40 M parameters, pairwise
python scripts/benchmark_engine.py counts             1.6B: kernels, bytes moved and kept, without computing anything
python scripts/benchmark_engine.py strata             stratified noise levels: how steady a step's loss is, on nano
python scripts/benchmark_engine.py previews           what previews cost beside the sampling, at the default interval
python scripts/benchmark_engine.py step [ARGUMENTS]   scripts/benchmark.py over a model of 30 M parameters
sana_tune bench                                       whole steps of any model, on a GPU too
"""

from __future__ import annotations

import argparse
import copy
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# About 40 M parameters for the rewrites; 30 M with nano's VAE and text encoder around it for whole steps.
SMALL: dict[str, Any] = {
    "num_attention_heads": 14,
    "num_layers": 12,
    "num_cross_attention_heads": 7,
    "cross_attention_head_dim": 64,
    "cross_attention_dim": 448,
    "caption_channels": 256,
}
MIDDLE: dict[str, Any] = {
    "num_attention_heads": 12,
    "attention_head_dim": 32,
    "num_layers": 12,
    "num_cross_attention_heads": 6,
    "cross_attention_head_dim": 64,
    "cross_attention_dim": 384,
}
SETTLING = 2


def rewrites() -> dict[str, Callable[[Any], None]]:
    """Name → what is done to a block of diffusers' model."""
    from sana_tune.model.attention import CrossAttention, LinearAttention, feed_forward

    def feed(block: Any) -> None:
        block.ff.forward = MethodType(feed_forward, block.ff)

    single: dict[str, Callable[[Any], None]] = {
        "linear attention": lambda block: block.attn1.set_processor(LinearAttention()),
        "cross-attention": lambda block: block.attn2.set_processor(CrossAttention()),
        "feed-forward": feed,
    }

    def all_three(block: Any) -> None:
        for change in single.values():
            change(block)

    return {**single, "all three": all_three}


def models(base: Any) -> dict[str, Any]:
    """Copies of a model: diffusers' own, and each rewrite."""
    found = {"diffusers": base}
    for name, change in rewrites().items():
        found[name] = copy.deepcopy(base)
        for block in found[name].transformer_blocks:
            change(block)
    return found


def inputs(config: Any, side: int, batch: int, tokens: int, dtype: Any) -> dict[str, Any]:
    import torch

    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[0, tokens * 3 // 4 :] = 0
    return {
        "hidden_states": torch.randn(batch, config["in_channels"], side, side, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, tokens, config["caption_channels"], dtype=dtype),
        "encoder_attention_mask": mask if batch > 1 else None,
        "timestep": torch.full((batch,), 500.0),
    }


def time_rewrites(asked: argparse.Namespace) -> None:
    """Forward and backward of each in turn, and the median of the ratios of neighbours."""
    import torch
    from diffusers import SanaTransformer2DModel

    bf16 = asked.precision == "bf16"
    for qk_norm in (None, "rms_norm_across_heads"):
        found = models(SanaTransformer2DModel(**SMALL, qk_norm=qk_norm).train())
        values = inputs(found["diffusers"].config, asked.side, asked.batch, 40, torch.float32)
        times: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(SETTLING + asked.rounds):
            for name, model in found.items():
                started = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    out = model(**values, return_dict=False)[0]
                out.float().square().mean().backward()
                times[name].append(time.perf_counter() - started)
                model.zero_grad()
        print(f"{asked.precision}, batch {asked.batch}, {asked.side}x{asked.side} positions, qk_norm {bool(qk_norm)}")
        for name, taken in times.items():
            pairs = zip(taken[SETTLING:], times["diffusers"][SETTLING:], strict=True)
            ratio = statistics.median(mine / theirs for mine, theirs in pairs)
            print(f"  {name:18} {1000 * statistics.median(taken[SETTLING:]):8.1f} ms  ratio {ratio:.3f}")


def count(batch: int, bf16_weights: bool) -> dict[str, tuple[float, float, float]]:
    """Of a block of the 1.6B model at 1024 px: kernels, and GB moved and kept per picture. Nothing is computed."""
    import torch
    from diffusers import SanaTransformer2DModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    dtype = torch.bfloat16 if bf16_weights else torch.float32

    def seen(layers: int, change: Callable[[Any], None]) -> tuple[int, int, int]:
        torch.set_default_dtype(dtype)
        model = SanaTransformer2DModel(num_layers=layers).train()
        torch.set_default_dtype(torch.float32)
        for block in model.transformer_blocks:
            change(block)
        return counted(model, inputs(model.config, 32, batch, 120, dtype), not bf16_weights)

    found = {}
    with FakeTensorMode():
        for name, change in {"diffusers": lambda block: None, **rewrites()}.items():
            one, two = seen(1, change), seen(2, change)
            launches, moved, kept = (after - before for before, after in zip(one, two, strict=True))
            found[name] = (launches, moved / batch / 1e9, kept / batch / 1e9)
    return found


def counted(model: Any, values: dict[str, Any], autocast: bool) -> tuple[int, int, int]:
    """Operations that read or write memory, the bytes they touch, and the bytes kept for the backward pass."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    total = [0, 0]
    views = {torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.empty_like.default}

    def size(tensor: torch.Tensor) -> int:
        places = 1
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            places *= length if stride else 1  # what is only broadcast is read once
        return places * tensor.element_size()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            if isinstance(out, torch.Tensor | tuple | list) and not function.is_view and function not in views:
                total[0] += 1
                total[1] += sum(map(size, tensors))
            return out

    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in weights:
            kept[place] = tensor
        return tensor

    with Watch():
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(**values, return_dict=False)[0]
        out.float().square().mean().backward()
    model.zero_grad()
    return total[0], total[1], sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def tell_counts() -> None:
    """The counts of all rewrites, at batch 1 and 8."""
    for bf16_weights in (True, False):
        for batch in (1, 8):
            print(
                f"{'bf16 weights' if bf16_weights else 'fp32 weights, bf16 autocast'}, batch {batch}, one block of 20"
            )
            for name, (launches, moved, kept) in count(batch, bf16_weights).items():
                print(f"  {name:18} {launches:4} kernels  {moved:6.3f} GB moved  {kept:6.3f} GB kept a picture")


def steadiness(batch: int, steps: int) -> float:
    """Variance of a step's loss with stratified levels over that with plain ones, nano untrained on new figures.

    Pictures and noise are the same for both: only the levels differ.
    """
    import torch

    from sana_tune.model import flow
    from scripts.nano import score

    pipeline = score.load(ROOT / "sana_tune" / "assets" / "nano" / "model")
    latents, texts, masks = [], [], []
    with torch.no_grad():
        for path in sorted((ROOT / "config" / "examples" / "nano" / "known").glob("*.png")):
            latents.append(score.latent(pipeline, path))
            text, mask = score.caption_embeds(pipeline, path.with_suffix(".txt").read_text(encoding="utf-8"))
            texts.append(text[:, :40])
            masks.append(mask[:, :40])
        x0, text, mask = (torch.cat(each) for each in (latents, texts, masks))
        losses: dict[bool, list[float]] = {False: [], True: []}
        for step in range(steps):
            for stratified, found in losses.items():
                generator = torch.Generator().manual_seed(step)
                chosen = torch.randperm(len(x0), generator=generator)[:batch]
                noise = torch.randn(x0[chosen].shape, generator=generator)
                sigma = flow.draw_sigmas(batch, 1.0, generator, flow.Levels(stratified=stratified))
                velocity = pipeline.transformer(
                    flow.noised(x0[chosen], noise, sigma),
                    encoder_hidden_states=text[chosen],
                    encoder_attention_mask=mask[chosen],
                    timestep=flow.timestep(sigma),
                    return_dict=False,
                )[0]
                found.append(float((velocity - flow.target(x0[chosen], noise)).square().mean()))
    return statistics.variance(losses[True]) / statistics.variance(losses[False])


def preview_cost(model: Path, side: int, rounds: int) -> tuple[float, float, float]:
    """Seconds of 20 sampler steps on the CPU without and with previews, and the share that these cost, from pairs.

    model: with nano's VAE and text encoder. side: of the pictures, px. The linear map is random: it costs the same.
    """
    import torch

    from sana_tune.config.schema import ValidationConfig
    from sana_tune.data.images import encode_png
    from sana_tune.model import generate, preview
    from sana_tune.model.sana import load_transformer
    from sana_tune.progress import Progress
    from sana_tune.train.previews import Previews
    from sana_tune.train.validate import Picture

    transformer = load_transformer(model)
    channels, width = transformer.config["in_channels"], transformer.config["caption_channels"]
    linear = preview.Linear(torch.randn(channels + 1, 8 * 8 * 3) * 0.1)
    every = ValidationConfig().validation_preview_steps
    previews = Previews(
        lambda latents: preview.pixels(linear(latents)), lambda array: encode_png(array, fast=True), lambda event: None,
        every,
    )  # fmt: skip
    picture, text = Picture("a", "a", side, side, 0, 0, slug="a"), torch.randn(20, width)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds + SETTLING):
        for seen, taken in times.items():
            showing = previews.of(picture, Progress()) if seen else None
            scheduler = generate.load_scheduler(model)
            started = time.perf_counter()
            grid = (channels, side // 8, side // 8)
            generate.sample(transformer, scheduler, text, text, grid, steps=picture.steps, watch=showing)
            if showing is not None:
                showing.close()
            taken.append(time.perf_counter() - started)
    plain, shown = (times[seen][SETTLING:] for seen in (False, True))
    share = statistics.median(one / other for one, other in zip(shown, plain, strict=True)) - 1
    return statistics.median(plain), statistics.median(shown), share


def tell_previews(rounds: int) -> None:
    """The cost of previews, of nano at 64 px and of 30 M parameters at 256 px."""
    from sana_tune.model.fetch import locate

    with tempfile.TemporaryDirectory(prefix="sana_tune-benchmark-") as place:
        for name, model, side in (("nano", locate("nano"), 64), ("30 M", middle_model(Path(place)), 256)):
            plain, shown, share = preview_cost(model, side, rounds)
            print(f"{name}, {side} px: 20 steps {plain:.3f} s, with previews {shown:.3f} s ({100 * share:+.1f} %)")


def middle_model(folder: Path) -> Path:
    """nano with a transformer of 30 M random parameters. Answers the folder."""
    import torch
    from diffusers import SanaTransformer2DModel

    from sana_tune.model.fetch import locate

    shutil.copytree(locate("nano"), folder / "model")
    shutil.rmtree(folder / "model" / "transformer")
    nano = SanaTransformer2DModel.from_pretrained(locate("nano"), subfolder="transformer")
    known = {key: value for key, value in nano.config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    SanaTransformer2DModel(**{**known, **MIDDLE}).save_pretrained(folder / "model" / "transformer")
    return folder / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description="What the engine's parts are worth.")
    parser.add_argument("what", choices=("rewrites", "counts", "strata", "previews", "step"))
    parser.add_argument("--batch", type=int, default=2, help="for rewrites")
    parser.add_argument("--side", type=int, default=16, help="for rewrites: latent positions a side")
    parser.add_argument("--precision", default="no", choices=("no", "bf16"), help="for rewrites")
    parser.add_argument("--rounds", type=int, default=10, help="for rewrites; for strata 40 steps each")
    if sys.argv[1:2] == ["step"]:
        from scripts import benchmark

        with tempfile.TemporaryDirectory(prefix="sana_tune-benchmark-") as place:
            sys.argv = ["benchmark", "--model", str(middle_model(Path(place))), *sys.argv[2:]]
            return benchmark.main()
    asked = parser.parse_args()
    from sana_tune import log

    log.quiet_libraries()
    if asked.what == "counts":
        return tell_counts()
    if asked.what == "previews":
        return tell_previews(asked.rounds)
    if asked.what == "strata":
        for batch in (1, 2, 4, 8):
            print(f"batch {batch}: variance of the loss {steadiness(batch, 40 * asked.rounds):.2f} times the plain one")
        return None
    time_rewrites(asked)


if __name__ == "__main__":
    main()
