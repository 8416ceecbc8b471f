from __future__ import annotations

from dataclasses import replace

import pytest

from sana_tune.config.caption_edits import CaptionShuffle
from sana_tune.config.choices import CAPTION_STRATEGIES
from sana_tune.data.captions import (
    STRATEGIES,
    CaptionRules,
    Missing,
    caption_key,
    captions_of,
    clean_caption,
    reads_files,
)

FILES = {
    "cats/one.txt": "A red cat\n\n  on a MAT  \n",
    "cats/bom.txt": "\ufeffÜber cat",
    "cats/empty.txt": " \n\n",
    "cats/latin.txt": b"\xfcber",
}


def read(key: str) -> bytes | None:
    content = FILES.get(key)
    return content.encode() if isinstance(content, str) else content


def test_the_config_offers_exactly_these_strategies():
    assert set(STRATEGIES) == set(CAPTION_STRATEGIES)


def test_file_names():
    assert captions_of("cats/A_red__Cat.v2.png", read, CaptionRules("filename")) == ("a red  cat.v2",)


def test_text_files_hold_a_variant_per_line():
    assert captions_of("cats/one.png", read, CaptionRules("textfile")) == ("a red cat", "on a mat")


def test_a_text_file_as_one_caption():
    rules = CaptionRules("textfile", one_per_line=False)
    assert captions_of("cats/one.png", read, rules) == ("a red cat\n\n  on a mat",)


def test_a_byte_order_mark_is_no_text():
    assert captions_of("cats/bom.png", read, CaptionRules("textfile")) == ("über cat",)


def test_case_can_be_kept():
    assert captions_of("cats/one.png", read, CaptionRules("textfile", case="keep")) == ("A red cat", "on a MAT")


@pytest.mark.parametrize(
    "key, reason",
    [
        ("cats/none.png", "there is no caption file cats/none.txt"),
        ("cats/empty.png", "the caption file cats/empty.txt is empty"),
        ("cats/latin.png", "the caption file cats/latin.txt is not UTF-8 text"),
    ],
)
def test_missing_captions_say_why(key: str, reason: str):
    assert captions_of(key, read, CaptionRules("textfile")) == Missing(reason)


def test_a_file_name_of_underscores_is_no_caption():
    assert captions_of("__.png", read, CaptionRules("filename")) == Missing("its caption is empty")


def test_instance_prompts():
    rules = CaptionRules("instanceprompt", instance_prompts=("A Cat", "my cat"))
    assert captions_of("x.png", read, rules) == ("a cat", "my cat")
    assert captions_of("x.png", read, replace(rules, instance_prompts=())) == Missing("instance_prompt is not set")


def test_prepending_combines_prompts_and_captions():
    rules = CaptionRules("textfile", instance_prompts=("Sks", "old"), prepend=True)
    assert captions_of("cats/one.png", read, rules) == (
        "sks a red cat",
        "old a red cat",
        "sks on a mat",
        "old on a mat",
    )
    assert captions_of("x.png", read, replace(rules, strategy="instanceprompt")) == ("sks", "old")
    assert isinstance(captions_of("x.png", read, CaptionRules("filename", prepend=True)), Missing)


def test_only_the_instance_prompt():
    rules = CaptionRules("textfile", instance_prompts=("Sks",), only=True)
    assert captions_of("cats/none.png", read, rules) == ("sks",)


@pytest.mark.parametrize("text, lower", [("  A Cat \n", "a cat"), ("ÄÖ\tx", "äö\tx"), ("\u3000İ ẞ ", "i̇ ß")])
def test_cleaning_is_lower_and_strip(text: str, lower: str):
    assert clean_caption(text, "lower") == lower == text.lower().strip()
    assert clean_caption(text, "keep") == text.strip()


def test_only_text_files_are_read():
    rules = CaptionRules("textfile")
    assert reads_files(rules) and not reads_files(replace(rules, only=True))
    assert not reads_files(CaptionRules("filename")) and not reads_files(CaptionRules("instanceprompt"))


def test_caption_keys():
    assert caption_key("a/b.c/d.e.png") == "a/b.c/d.e.txt"


# ---- filters and shuffles ----


def test_filters_work_on_the_text_as_it_is_written():
    rules = CaptionRules("textfile", filters=("A ", r"s/\bmat$/rug/i"))
    assert captions_of("cats/one.png", read, rules) == ("red cat", "on a rug")


def test_a_caption_of_which_nothing_is_left_is_dropped_and_none_is_missing():
    assert captions_of("cats/one.png", read, CaptionRules("textfile", filters=("A red cat",))) == ("on a mat",)
    rules = CaptionRules("textfile", filters=("s/.*//",))
    assert captions_of("cats/one.png", read, rules) == Missing(
        "its caption is empty once caption_filter_list is applied"
    )


def test_an_instance_prompt_before_a_caption_is_not_filtered_and_stays_in_front():
    shuffle = CaptionShuffle(count=5)
    rules = CaptionRules("filename", ("Sks, cat",), prepend=True, filters=("cat",), shuffle=shuffle)
    found = captions_of("one, cat, two, three.png", read, rules)
    assert found[0] == "sks, cat one, , two, three" and len(found) == 6
    assert all(text.startswith("sks, cat ") and "cat" not in text.removeprefix("sks, cat ") for text in found)
    assert {tuple(sorted(text.removeprefix("sks, cat ").split(", "))) for text in found[1:]} == {
        ("one", "three", "two")
    }


def test_a_caption_that_is_the_instance_prompt_is_filtered_and_shuffled():
    rules = CaptionRules("textfile", ("a cat, on a mat",), only=True, filters=("a ",), shuffle=CaptionShuffle())
    assert captions_of("x.png", read, rules) == ("cat, on mat", "on mat, cat")


def test_every_line_of_a_file_is_shuffled_and_no_variant_comes_twice():
    files = {"a.txt": b"one, two\ntwo, one\nB, b"}
    rules = CaptionRules("textfile", shuffle=CaptionShuffle(count=3))
    assert captions_of("a.png", files.get, rules) == ("one, two", "two, one", "b, b")
    assert captions_of("a.png", files.get, replace(rules, case="keep"))[2:] == ("B, b", "b, B")


def test_a_prepended_prompt_stands_before_the_caption_with_one_blank_between():
    """SimpleTuner's form: "<instance_prompt> <caption>"."""
    rules = CaptionRules("textfile", ("In the style of X:",), prepend=True, case="keep")
    assert captions_of("cats/one.png", read, rules)[0] == "In the style of X: A red cat"
