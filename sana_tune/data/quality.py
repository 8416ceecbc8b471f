"""What is doubtful about pictures and captions that can be trained: told by a check, decided by the user. Pure.

Nothing here is a mistake: a caption may be empty, and a picture may be enlarged. But each is worth a look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sana_tune.data.records import Record
from sana_tune.data.survey import DatasetLedger

# What the quickstart tells people to replace, in a prompt or as an instance_prompt.
PLACEHOLDERS = ("<token>", "the name of your subject goes here")
SHORT_WORDS, SHORT_LETTERS = 4, 25  # a prompt below both looks bad with Sana, whose encoder expects sentences
EXTREME_ASPECT = 4.0  # Sana's own buckets end at 4:1 and 1:4
ENLARGED = 1.001  # less is rounding
NAMES_SHOWN = 3


@dataclass(frozen=True)
class Captions:
    """The captions of one dataset.

    variants: captions in all. empty: pictures trained without one. missing: pictures left out for want of one.
    repeated: pictures one of whose captions is another picture's too, where captions are meant to differ.
    too_long: pictures with a caption whose end is cut off; None when no tokenizer was there to count.
    placeholder: pictures whose caption still holds the example's words for the subject. Names: the first few.
    """

    variants: int
    empty: int
    missing: int
    repeated: int
    too_long: int | None
    placeholder: int
    names_too_long: tuple[str, ...] = ()
    names_placeholder: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shapes:
    """The sizes of one dataset's pictures beside those they are trained at.

    enlarged: pictures made larger, the one most of all by the factor `largest_factor` (per side; 1 = none).
    extreme: pictures wider than 4:1 or narrower than 1:4. cropped: pictures that lose more than half of their area.
    """

    enlarged: int
    largest_factor: float
    names_enlarged: tuple[str, ...]
    extreme: int
    names_extreme: tuple[str, ...]
    cropped: int


def look_at_captions(
    records: Sequence[Record], ledger: DatasetLedger, too_long: Collection[str] | None, *, differ: bool
) -> Captions:
    """What can be said of a dataset's captions.

    too_long: the texts that are cut, None when nobody counted. differ: whether pictures have captions of their own.
    """
    counts = Counter(text for record in records for text in set(record.captions)) if differ else Counter[str]()
    long = [record.key for record in records if too_long and any(text in too_long for text in record.captions)]
    marked = [record.key for record in records if any(map(has_placeholder, record.captions))]
    return Captions(
        variants=sum(len(record.captions) for record in records),
        empty=sum("" in record.captions for record in records),
        missing=sum("caption" in reason or "instance_prompt" in reason for _, reason in ledger.left_out),
        repeated=sum(any(counts[text] > 1 for text in record.captions if text) for record in records),
        too_long=None if too_long is None else len(long),
        placeholder=len(marked),
        names_too_long=tuple(long[:NAMES_SHOWN]),
        names_placeholder=tuple(marked[:NAMES_SHOWN]),
    )


def look_at_shapes(records: Sequence[Record]) -> Shapes:
    """What can be said of the sizes of a dataset's pictures."""
    factors = {record.key: enlargement(record) for record in records}
    enlarged = sorted((key for key in factors if factors[key] > ENLARGED), key=lambda key: -factors[key])
    extreme = [
        record.key
        for record in records
        if max(record.width_px, record.height_px) > EXTREME_ASPECT * min(record.width_px, record.height_px)
    ]
    return Shapes(
        enlarged=len(enlarged),
        largest_factor=round(factors[enlarged[0]], 3) if enlarged else 1.0,
        names_enlarged=tuple(enlarged[:NAMES_SHOWN]),
        extreme=len(extreme),
        names_extreme=tuple(extreme[:NAMES_SHOWN]),
        cropped=sum(2 * record.placement.target.area < record.placement.resize.area for record in records),
    )


def enlargement(record: Record) -> float:
    """How many times its own side a picture's side is after the resize; below 1 it is made smaller."""
    resize = record.placement.resize
    return max(resize.width / record.width_px, resize.height / record.height_px)


def has_placeholder(text: str) -> bool:
    """Whether the words that stand for the subject in the examples are still there."""
    lowered = text.lower()
    return any(words in lowered for words in PLACEHOLDERS)


def is_short(prompt: str) -> bool:
    """Whether a prompt is too short for Sana to draw well."""
    return len(prompt.split()) < SHORT_WORDS and len(prompt) < SHORT_LETTERS
