"""How large quantised weights are and what they need to be installed. Torch-free: plans count with it.

Bytes follow from the formats: nf4 holds a weight in 4 bits, with a scale for each 64 of them; the scales are held in 8
bits, with a scale of theirs for each 256 (Dettmers et al., arXiv 2305.14314). 8-bit formats have a scale for each row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from sana_tune.errors import Problem

Matrix = tuple[int, int]  # rows (outputs) × columns (inputs)
BLOCK, BLOCKS = 64, 256  # weights of one scale, and scales of one scale of scales, of nf4
LIBRARIES: Mapping[str, str] = {"bnb": "bitsandbytes", "torchao": "torchao"}  # end of a precision's name → package
# Gemma-2-2B, the text encoder of every published Sana model.
GEMMA: Mapping[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}


def packed_bytes(matrix: Matrix, precision: str) -> int:
    """Bytes of one quantised matrix with its scales."""
    rows, columns = matrix
    if precision == "nf4-bnb":
        blocks = -(-rows * columns // BLOCK)
        return -(-rows * columns // 2) + blocks + 4 * -(-blocks // BLOCKS) + 4
    return rows * columns + 4 * rows


def network_bytes(parameters: int, layers: int, matrices: Sequence[Matrix], precision: str, each: int) -> int:
    """Bytes of a network of so many parameters, of whose layers the `matrices` are quantised.

    each: bytes of a parameter that is not.
    """
    if precision == "no_change":
        return each * parameters
    inside = sum(rows * columns for rows, columns in matrices)
    packed = sum(packed_bytes(matrix, precision) for matrix in matrices)
    return layers * packed + each * (parameters - layers * inside)


def encoder_bytes(file_bytes: int, precision: str, config: Mapping[str, Any] = GEMMA) -> int:
    """Bytes of a Gemma in memory. file_bytes: of its weights' files, which are as large as it is unquantised."""
    if precision == "no_change":
        return file_bytes
    matrices, layers = gemma_matrices(config), config["num_hidden_layers"]
    inside = layers * sum(rows * columns for rows, columns in matrices)
    each = 4 if file_bytes > 3 * (inside + _vocabulary(config)) else 2
    return network_bytes(file_bytes // each, layers, matrices, precision, each)


def gemma_matrices(config: Mapping[str, Any]) -> tuple[Matrix, ...]:
    """The matrices of one layer of a Gemma-2: attention and the gated feed-forward."""
    width, wide = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    return (queries, width), (keys, width), (keys, width), (width, queries), (wide, width), (wide, width), (width, wide)


def _vocabulary(config: Mapping[str, Any]) -> int:
    return config.get("vocab_size", 256_000) * config["hidden_size"]


def cannot(key: str, precision: str, device: str | None) -> Problem | None:
    """What stands in the way of a precision here. key: the setting that asks. device: cuda, mps or cpu, if known."""
    if precision == "no_change":
        return None
    package = LIBRARIES[precision.rpartition("-")[2]]
    if importlib.util.find_spec(package) is None:
        what = f"{precision} needs the package {package}, which is not installed"
        other = "" if package == "bitsandbytes" else ", or use int8-bnb or nf4-bnb"
        return Problem(key, what, f"pip install {package}{other}")
    if precision.startswith("fp8") and device == "mps":
        return Problem(key, f"{precision} needs 8-bit floats, which Apple's GPUs do not have", "use int8-bnb")
    return None
