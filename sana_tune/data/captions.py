"""A picture's captions: one function per strategy. Pure; files are read through a function handed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from posixpath import basename, splitext

from sana_tune.config.caption_edits import CaptionShuffle, filtered
from sana_tune.data.sources import CAPTION_ENDING
from sana_tune.data.tables import TableCaptions
from sana_tune.data.variants import shuffled

# The bytes of a file by key, or None when there is no such file.
ReadFile = Callable[[str], bytes | None]


@dataclass(frozen=True)
class CaptionRules:
    """A dataset's settings that decide its captions.

    instance_prompts: the values of instance_prompt, none when it is unset.
    prepend, only:    put an instance prompt before every caption, or in place of it.
    one_per_line:     each non-empty line of a caption file is a variant; else the file is one caption.
    case:             "lower" as diffusers' pipeline does with prompts, or "keep".
    filters:          what is removed from captions or replaced (config.caption_edits), before anything else is done.
    shuffle:          how more variants are made of each caption; None = none are.
    table:            the captions of the strategies parquet, csv and huggingface.
    """

    strategy: str = "filename"
    instance_prompts: tuple[str, ...] = ()
    prepend: bool = False
    only: bool = False
    one_per_line: bool = True
    case: str = "lower"
    filters: tuple[str, ...] = ()
    shuffle: CaptionShuffle | None = None
    table: TableCaptions | None = None


@dataclass(frozen=True)
class Missing:
    """There is no caption, and why."""

    reason: str


def captions_of(key: str, read: ReadFile, rules: CaptionRules) -> tuple[str, ...] | Missing:
    """The final caption variants of a picture, at least one and none of them empty, or why there is none.

    Captions are read, filtered and shuffled; then an instance prompt is put before them, which stays as it is.
    """
    strategy = STRATEGIES["instanceprompt" if rules.only else rules.strategy]
    found = strategy(key, read, rules)
    if isinstance(found, Missing):
        return found
    found = _edited(found, rules)
    if isinstance(found, Missing):
        return found
    if rules.prepend and strategy is not from_instance_prompt:
        if not rules.instance_prompts:
            return Missing("prepend_instance_prompt is on, but instance_prompt is not set")
        found = tuple(f"{prompt} {text.strip()}" for text in found for prompt in rules.instance_prompts)
    cleaned = (clean_caption(caption, rules.case) for caption in found)
    final = tuple(caption for caption in cleaned if caption)
    return (final if rules.shuffle is None else tuple(dict.fromkeys(final))) or Missing("its caption is empty")


def _edited(captions: tuple[str, ...], rules: CaptionRules) -> tuple[str, ...] | Missing:
    """The captions filtered, and their variants; those of which nothing is left are dropped."""
    if rules.filters:
        captions = tuple(text for caption in captions if (text := filtered(caption.strip(), rules.filters)).strip())
        if not captions:
            return Missing("its caption is empty once caption_filter_list is applied")
    if rules.shuffle is None:
        return captions
    return tuple(text for caption in captions for text in shuffled(caption.strip(), rules.shuffle))


def reads_files(rules: CaptionRules) -> bool:
    """Whether captions are in files beside the pictures."""
    return rules.strategy == "textfile" and not rules.only


def clean_caption(text: str, case: str) -> str:
    """The text as the encoder gets it: stripped, and lower-cased unless case is "keep".

    Source: diffusers' SanaPipeline._text_preprocessing with clean_caption off.
    """
    return (text.lower() if case == "lower" else text).strip()


def from_file_name(key: str, read: ReadFile, rules: CaptionRules) -> tuple[str, ...] | Missing:
    """The file's name without its ending, underscores as spaces."""
    return (splitext(basename(key))[0].replace("_", " "),)


def from_text_file(key: str, read: ReadFile, rules: CaptionRules) -> tuple[str, ...] | Missing:
    """The caption file of the same name beside the picture, UTF-8 with or without a byte-order mark."""
    name = caption_key(key)
    data = read(name)
    if data is None:
        return Missing(f"there is no caption file {name}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Missing(f"the caption file {name} is not UTF-8 text")
    variants = text.splitlines() if rules.one_per_line else [text]
    found = tuple(variant for variant in variants if variant.strip())
    return found or Missing(f"the caption file {name} is empty")


def from_instance_prompt(key: str, read: ReadFile, rules: CaptionRules) -> tuple[str, ...] | Missing:
    """The instance prompt, or each of several as a variant."""
    return rules.instance_prompts or Missing("instance_prompt is not set")


def from_table(key: str, read: ReadFile, rules: CaptionRules) -> tuple[str, ...] | Missing:
    """The captions of the picture's row."""
    if rules.table is None:
        return Missing(f"caption_strategy {rules.strategy} has no table")
    found = rules.table.texts.get(key)
    if found is None:
        return Missing(f"{rules.table.table} has no row for it")
    return found or Missing(f"its row in {rules.table.table} has no caption")


def caption_key(key: str) -> str:
    """The key of a picture's caption file: "cats/01.png" → "cats/01.txt"."""
    return splitext(key)[0] + CAPTION_ENDING


STRATEGIES: dict[str, Callable[[str, ReadFile, CaptionRules], tuple[str, ...] | Missing]] = {
    "filename": from_file_name,
    "textfile": from_text_file,
    "instanceprompt": from_instance_prompt,
    "parquet": from_table,
    "csv": from_table,
    "huggingface": from_table,
}
