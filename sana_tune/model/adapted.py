"""Which layers of a Sana transformer an adapter is put on, and how large it is, before anything is built. Torch-free.

The layers are those of diffusers' SanaTransformer2DModel; they are chosen and counted as LyCORIS does it
(`lycoris/wrapper.py`, `lycoris/modules/lokr.py`, Apache-2.0), which a test compares.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from sana_tune.config.lycoris import LycorisFile, Override
from sana_tune.errors import Problem, UserError

# Depthwise convolutions have a few weights for each channel: there is nothing to factorise.
LEFT_OUT = r".*\.conv_depth$"


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution. around: the modules it is in and itself, (name, class), the outermost first.

    kernel: () for a linear layer.
    """

    name: str
    outputs: int
    inputs: int
    around: tuple[tuple[str, str], ...]
    kernel: tuple[int, ...] = ()
    groups: int = 1


@dataclass(frozen=True)
class Adapted:
    """What an adapter is: layer → parameters, and of how many the model has. classes: class → layers in it."""

    layers: Mapping[str, int]
    classes: Mapping[str, int]
    model_parameters: int

    @property
    def parameters(self) -> int:
        """Parameters that are trained."""
        return sum(self.layers.values())

    def __str__(self) -> str:
        share = 100 * self.parameters / self.model_parameters
        kinds = ", ".join(f"{count} in {name}" for name, count in self.classes.items())
        size = f"{self.parameters / 1e6:,.2f} M parameters = {share:.2g} % of the model"
        return f"{len(self.layers)} layers ({kinds}), {size}"


def adapted(transformer: Mapping[str, Any], file: LycorisFile, where: str = "lycoris_config") -> Adapted:
    """The adapter of a file on a transformer of this config. Raises UserError when it matches no layer."""
    from sana_tune.model.facts import count_parameters

    chosen = {layer.name: _count(layer, file, override) for layer, override in matched(transformer, file)}
    layers = {layer.name: layer for layer in layers_of(transformer)}
    if not chosen:
        classes = dict.fromkeys(kind for layer in layers.values() for _, kind in layer.around)
        asked = ", ".join((*file.target_module, *file.target_name)) or "nothing"
        what = f"no layer of the model is in {asked}: nothing would be trained"
        raise UserError(Problem(f"{where}: target_module", what, f"name some of: {', '.join(classes)}"))
    counted = Counter(_innermost(layers[name], file) for name in chosen)
    return Adapted(chosen, dict(counted), count_parameters(transformer))


def matched(transformer: Mapping[str, Any], file: LycorisFile) -> Iterator[tuple[Layer, Override]]:
    """The layers that are adapted, in the model's order, each with what is different for it."""
    targets = {*file.target_module, *file.module_algo_map}
    excluded = (*file.exclude_name, LEFT_OUT)
    for layer in layers_of(transformer):
        names = [name for name, _ in layer.around]
        if any(re.match(pattern, name) for name in names if name for pattern in excluded):
            continue
        inside = [(name, kind) for name, kind in layer.around if kind in targets]
        by_name = any(layer.name == name or re.match(name, layer.name) for name in file.target_name)
        if inside or by_name:
            own = [file.module_algo_map[kind] for _, kind in inside if kind in file.module_algo_map]
            yield layer, own[-1] if own else Override()


def _innermost(layer: Layer, file: LycorisFile) -> str:
    """The class because of which a layer is adapted."""
    inside = [kind for _, kind in layer.around if kind in {*file.target_module, *file.module_algo_map}]
    return inside[-1] if inside else layer.around[-1][1]


# ---- the model ----


def layers_of(transformer: Mapping[str, Any]) -> Iterator[Layer]:
    """Every linear layer and convolution, in the order of `named_modules`."""
    from sana_tune.model.facts import with_defaults

    full = with_defaults(transformer)
    width = full["num_attention_heads"] * full["attention_head_dim"]
    cross = full["num_cross_attention_heads"] * full["cross_attention_head_dim"]
    hidden, patch = int(full["mlp_ratio"] * width), full["patch_size"]
    outputs = full["out_channels"] or full["in_channels"]
    top = (("", "SanaTransformer2DModel"),)

    def layer(path: str, out: int, inn: int, classes: str, kernel: tuple[int, ...] = (), groups: int = 1) -> Layer:
        """classes: those of the modules on the way to the layer."""
        parts, around, kinds = path.split("."), list(top), classes.split()
        for depth, kind in zip(range(len(parts) - len(kinds), len(parts)), kinds, strict=True):
            around.append((".".join(parts[: depth + 1]), kind))
        return Layer(path, out, inn, tuple(around), kernel, groups)

    yield layer("patch_embed.proj", width, full["in_channels"], "PatchEmbed Conv2d", (patch, patch))
    embeddings = "TimestepEmbedding Linear"
    if full["guidance_embeds"]:
        time = "SanaCombinedTimestepGuidanceEmbeddings " + embeddings
        for part in ("timestep_embedder", "guidance_embedder"):
            yield layer(f"time_embed.{part}.linear_1", width, 256, time)
            yield layer(f"time_embed.{part}.linear_2", width, width, time)
        yield layer("time_embed.linear", 6 * width, width, "SanaCombinedTimestepGuidanceEmbeddings Linear")
    else:
        time = "AdaLayerNormSingle PixArtAlphaCombinedTimestepSizeEmbeddings " + embeddings
        yield layer("time_embed.emb.timestep_embedder.linear_1", width, 256, time)
        yield layer("time_embed.emb.timestep_embedder.linear_2", width, width, time)
        yield layer("time_embed.linear", 6 * width, width, "AdaLayerNormSingle Linear")
    caption = "PixArtAlphaTextProjection Linear"
    yield layer("caption_projection.linear_1", width, full["caption_channels"], caption)
    yield layer("caption_projection.linear_2", width, width, caption)
    for number in range(full["num_layers"]):
        block = f"transformer_blocks.{number}"
        attention = "SanaTransformerBlock Attention Linear"
        for part, inner, source in (("attn1", width, width), ("attn2", cross, full["cross_attention_dim"])):
            yield layer(f"{block}.{part}.to_q", inner, width, attention)
            yield layer(f"{block}.{part}.to_k", inner, source, attention)
            yield layer(f"{block}.{part}.to_v", inner, source, attention)
            yield layer(f"{block}.{part}.to_out.0", width, inner, "SanaTransformerBlock Attention ModuleList Linear")
        ff = "SanaTransformerBlock GLUMBConv Conv2d"
        yield layer(f"{block}.ff.conv_inverted", 2 * hidden, width, ff, (1, 1))
        yield layer(f"{block}.ff.conv_depth", 2 * hidden, 2 * hidden, ff, (3, 3), groups=2 * hidden)
        yield layer(f"{block}.ff.conv_point", width, hidden, ff, (1, 1))
    yield layer("proj_out", patch * patch * outputs, width, "Linear")


# ---- the size of an adapter ----


def _count(layer: Layer, file: LycorisFile, own: Override) -> int:
    """Parameters of the adapter of one layer."""
    algo, rank = own.algo or file.algo, own.dim or file.rank
    inputs, outputs, area = layer.inputs // layer.groups, layer.outputs, prod(layer.kernel)
    tucker = file.use_tucker and area > 1
    dora = file.dora_wd * outputs
    if algo == "locon":
        return dora + rank * (inputs + outputs + (rank * area if tucker else inputs * (area - 1)))
    if algo == "loha":
        return dora + 2 * (rank * (inputs + outputs) + (rank**2 * area if tucker else rank * inputs * (area - 1)))
    factor = file.factor if own.factor is None else own.factor
    whole = file.full_matrix if own.full_matrix is None else own.full_matrix
    (rows, long_rows), (columns, long_columns) = factorization(outputs, factor), factorization(inputs, factor)
    if file.unbalanced_factorization:
        rows, long_rows = long_rows, rows
    low = file.decompose_both and rank < max(rows, columns) / 2 and not whole
    small = rank * (rows + columns) if low else rows * columns
    if whole or rank >= max(long_rows, long_columns) / 2:
        return dora + small + long_rows * long_columns * area
    if tucker:
        return dora + small + rank * (long_rows + long_columns + rank * area)
    return dora + small + rank * (long_rows + long_columns * area)


def factorization(size: int, factor: int) -> tuple[int, int]:
    """The two numbers that LyCORIS splits a size into, the smaller first: by the factor, else as even as possible."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = size if factor < 0 else factor
    best = (1, size)
    for small in range(2, int(size**0.5) + 1):
        if size % small == 0 and small <= most:
            best = (small, size // small)
    return best
