"""Variants of a caption: its parts in other orders, the same at every start and on every machine. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import permutations
from math import factorial

from sana_tune.config.caption_edits import SPLITS, CaptionShuffle

_BYTES_A_DRAW = 8


def shuffled(caption: str, rules: CaptionShuffle) -> tuple[str, ...]:
    """The caption's variants: itself (`include_original`) and up to `count` other orders of its parts, no two alike.

    Which orders is a function of the seed and the caption alone. A caption that has no more orders than that has them
    all; one that cannot be shuffled is its only variant.
    """
    parts = [part.strip() for part in caption.split(SPLITS[rules.split_on])]
    parts = [part for part in parts if part]
    first, rest = parts[: rules.position_start], parts[rules.position_start :]
    mark = f"{SPLITS[rules.split_on].strip()} "
    end = "." if rules.split_on == "period" and caption.rstrip().endswith(".") else ""
    found: dict[str, None] = {}
    for order in _orders(rest, caption, rules):
        if order != rest:
            found[mark.join([*first, *order]) + end] = None
        if len(found) == rules.count:
            break
    return (caption, *found) if rules.include_original or not found else tuple(found)


def _orders(parts: list[str], caption: str, rules: CaptionShuffle) -> Iterator[list[str]]:
    """Orders of the parts: all of them where they are few, else drawn ones, some of them twice."""
    if len(set(parts)) < 2:
        return iter(())
    if len(parts) < 8 and factorial(len(parts)) - 1 <= rules.count:
        return map(list, permutations(parts))
    return (_drawn(parts, f"{rules.seed} {number} {caption}") for number in range(100 + 20 * rules.count))


def _drawn(parts: Sequence[str], seed: str) -> list[str]:
    """Fisher and Yates' shuffle by the bytes of SHAKE-256, which no version of Python changes."""
    found, bits = (
        list(parts),
        hashlib.shake_256(seed.encode("utf-8", "surrogatepass")).digest(_BYTES_A_DRAW * len(parts)),
    )
    for last in range(len(found) - 1, 0, -1):
        draw = int.from_bytes(bits[_BYTES_A_DRAW * last : _BYTES_A_DRAW * (last + 1)], "big") % (last + 1)
        found[last], found[draw] = found[draw], found[last]
    return found
