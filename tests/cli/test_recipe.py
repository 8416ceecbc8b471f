"""From answers to settings: defaults, what is recommended for which device, the two files."""

from __future__ import annotations

import pytest

from sana_tune.cli import recipe
from sana_tune.cli.recipe import Length, Target
from sana_tune.config.schema import section_of
from sana_tune.errors import UserError
from tests.cli.script import GB, SANA, answers, model, scan_of

UNSAFE = "Efficient-Large-Model/Sana_600M_512px_diffusers"
LARGE = "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers"


def test_the_models_offered():
    names = recipe.offered_models()
    assert names[0] == SANA and names[-1] == "nano" and len(names) == len(set(names)) >= 8
    assert "Efficient-Large-Model/Sana_1600M_1024px_diffusers" not in names  # its BF16 twin is
    assert UNSAFE in names  # it has none


@pytest.mark.parametrize("target, name", [(24, SANA), (80, SANA), (10, SANA), (8, "nano"), (None, "nano")])
def test_the_default_model_fits_the_device(target, name):
    device = Target(64 * GB, on_cpu=True) if target is None else Target(target * GB)
    assert name in recipe.default_model(device)


def test_the_least_memory_is_what_trains():
    for name in (SANA, LARGE, UNSAFE):
        choice = model(name)
        least = recipe.least_bytes(choice.facts)
        size = (choice.facts.native_px,)
        assert recipe.recommended(choice, Target(least), size, 20)
        with pytest.raises(UserError, match="needs about"):
            recipe.recommended(choice, Target(least * 97 // 100), size, 20)


@pytest.mark.parametrize(
    "found, strategy",
    [
        ({"with_text": 20}, "textfile"),
        ({"with_text": 10, "with_name": 20}, "textfile"),
        ({"with_text": 3, "with_name": 20}, "filename"),
        ({"with_text": 3, "with_name": 10}, "instanceprompt"),
        ({}, "instanceprompt"),
    ],
)
def test_captions_follow_from_the_scan(found, strategy):
    assert recipe.default_captions(scan_of(20, **found)) == strategy


@pytest.mark.parametrize(
    "folder, subject",
    [("a/my-dog_rex", "my dog rex"), ("a/Images", "my subject"), ("写真/うちの犬", "うちの犬"), ("/", "my subject")],
)
def test_the_subject_is_the_folders_name_where_that_says_something(folder, subject):
    assert recipe.default_subject(scan_of(folder=folder)) == f"a photo of {subject}"


@pytest.mark.parametrize(
    "name, sizes, resolution",
    [
        (SANA, [(1600, 1200)], 1024),
        (SANA, [(1000, 1000)], 1024),  # a few per cent are no matter
        (SANA, [(800, 800)], 768),
        (SANA, [(640, 480)], 512),
        (SANA, [(100, 100)], 512),
        (UNSAFE, [(1600, 1200)], 512),
        ("nano", [(1600, 1200)], 64),
    ],
)
def test_the_resolution_follows_from_model_and_pictures(name, sizes, resolution):
    assert recipe.default_resolution(model(name).facts, scan_of(sizes=sizes)) == resolution


@pytest.mark.parametrize(
    "name, count, batch, steps",
    [
        (SANA, 20, 4, 500),
        (SANA, 100, 4, 2500),
        (SANA, 3000, 4, 10_000),
        (SANA, 100_000, 4, 25_000),
        ("nano", 20, 8, 300),
    ],
)
def test_the_length_follows_from_the_number_of_pictures(name, count, batch, steps):
    settings = {"train_batch_size": batch, "gradient_accumulation_steps": 1}
    assert recipe.default_length(count, model(name), settings) == Length(steps=steps)


def test_what_will_be_trained():
    found = scan_of(20, with_text=15, broken=(("a.png", "is damaged"),))
    assert (recipe.usable(found, "textfile"), recipe.usable(found, "filename")) == (14, 19)


def test_the_prompt_is_of_the_subject_else_a_caption():
    found = scan_of(with_text=20, texts=("a brown dog",), names=("dog",))
    known = {"model": model(), "pictures": found}
    assert recipe.default_prompt({**known, "captions": "textfile"}) == "a brown dog"
    assert recipe.default_prompt({**known, "captions": "filename"}) == "dog"
    prompt = recipe.default_prompt({**known, "captions": "instanceprompt", "subject": ("rex", "max")})
    assert prompt.startswith("rex, ") and not recipe.is_short(prompt)
    without = {**known, "pictures": scan_of(), "captions": "textfile"}
    assert recipe.default_prompt(without).startswith("a photo of my subject, ")
    assert recipe.default_prompt({**without, "model": model("nano")}) == "a photo of my subject"  # it knows no places


@pytest.mark.parametrize(
    "name, safe", [("My Dog!", "my-dog"), ("うちの犬", "うちの犬"), ("…", "pictures"), ("..", "pictures")]
)
def test_a_slug_is_safe(name, safe):
    assert recipe.slug(name) == safe


@pytest.mark.parametrize(
    "text, sizes", [("1024", (1024,)), ("1024, 512px", (1024, 512)), ("1024、512，512", (1024, 512))]
)
def test_resolutions_are_read(text, sizes):
    assert recipe.parse_resolutions(text, model().facts) == sizes


@pytest.mark.parametrize("text", ["", "big", "1024x768", "-5", "1024,", "32", "100000", "10.5"])
def test_what_is_no_resolution(text):
    with pytest.raises(UserError, match="whole number of px from 64 to 8192"):
        recipe.parse_resolutions(text, model().facts)


@pytest.mark.parametrize(
    "text, length",
    [
        ("500", Length(steps=500)),
        (" 1,500 steps", Length(steps=1500)),
        ("20 epochs", Length(epochs=20)),
        ("1.5e", Length(epochs=1.5)),
        (str(Length(epochs=1)), Length(epochs=1)),
        (str(Length(epochs=2.5)), Length(epochs=2.5)),
        (str(Length(steps=7)), Length(steps=7)),
    ],
)
def test_lengths_are_read(text, length):
    assert recipe.parse_length(text) == length


@pytest.mark.parametrize("text", ["", "0", "long", "-3", "1.5", "1.5 steps", "ten epochs"])
def test_what_is_no_length(text):
    with pytest.raises(UserError, match="steps, or of epochs"):
        recipe.parse_length(text)


@pytest.mark.parametrize("text, gigabytes", [("24", 24), ("80 GB", 80), ("11.5g", 11.5)])
def test_memory_is_read(text, gigabytes):
    assert recipe.parse_memory(text) == Target(round(gigabytes * GB))
    assert recipe.parse_memory(" CPU ") is None


@pytest.mark.parametrize("text", ["", "0", "lots", "24 MB", "24000", "-1"])
def test_what_is_no_memory(text):
    with pytest.raises(UserError, match="number of GB"):
        recipe.parse_memory(text)


def test_short_prompts():
    assert recipe.is_short("a dog") and recipe.is_short("犬の写真")
    assert not recipe.is_short("a brown dog on a beach") and not recipe.is_short("夕方の海辺を走る茶色い犬の写真")


# ---- recommended ----


@pytest.mark.parametrize(
    "name, gigabytes, expected",
    [
        (SANA, 80, {"weights_dtype": "fp32", "mixed_precision": "bf16", "train_batch_size": 4, "use_ema": True}),
        (SANA, 24, {"weights_dtype": "bf16", "mixed_precision": "bf16"}),
        (UNSAFE, 24, {"weights_dtype": "fp32", "mixed_precision": "no"}),
        ("nano", 24, {"train_batch_size": 8, "gradient_checkpointing": False, "mixed_precision": "no"}),
    ],
)
def test_settings_for_a_device(name, gigabytes, expected):
    choice, target = model(name), Target(gigabytes * GB)
    size = (choice.facts.native_px,)
    settings = recipe.recommended(choice, target, size, 20)
    assert expected.items() <= settings.items() and set(settings) <= set(section_of())
    assert 0 < recipe.estimated_bytes(settings, choice.facts, size) <= target.total_bytes
    assert len(recipe.reasons(settings)) == 4


def test_few_pictures_make_a_small_batch():
    assert recipe.recommended(model(), Target(80 * GB), (1024,), 3)["train_batch_size"] <= 2
    assert recipe.recommended(model("nano"), Target(8 * GB, on_cpu=True), (64,), 5)["train_batch_size"] == 4


def test_the_largest_resolution_decides():
    small = recipe.recommended(model(), Target(40 * GB), (512,), 20)
    both = recipe.recommended(model(), Target(40 * GB), (512, 2048), 20)
    assert small != both
    assert recipe.estimated_bytes(both, model().facts, (512, 2048)) > recipe.estimated_bytes(
        both, model().facts, (512,)
    )


def test_the_reasons_name_what_is_recommended():
    settings = {
        "train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
        "gradient_checkpointing_interval": 3, "weights_dtype": "bf16", "mixed_precision": "bf16",
        "optimizer": "optimi-adamw", "use_ema": False,
    }  # fmt: skip
    told = "\n".join(recipe.reasons(settings))
    for part in ("2 pictures at a time, 2 times before", "every 3. block", "Kahan", "optimi-adamw", "no average"):
        assert part in told


def test_steps_and_epochs():
    settings = {"train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert recipe.steps_per_epoch(10, (1024, 512), settings) == 3
    assert recipe.steps_of(Length(epochs=10), 3) == 30 and recipe.steps_of(Length(steps=7), 3) == 7
    assert recipe.steps_of(Length(epochs=0.01), 3) == 1


# ---- the files ----

PLACES = {"data_backend_config": "config/multidatabackend.json", "user_prompt_library": "p.json", "$schema": "s.json"}


def config_of(given):
    return recipe.new_config(given, recipe.recommended(given.model, given.target, given.resolutions, 20), PLACES)


def test_a_new_config_has_everything_that_was_asked():
    config = config_of(answers())
    assert next(iter(config)) == "$schema" and config["$schema"] == "s.json"
    asked = {
        "pretrained_model_name_or_path": SANA, "output_dir": "output/dog", "max_train_steps": 500, "report_to": "none",
        "validation_prompt": "a brown dog on a beach at sunset, wide angle", "model_type": "full",
        "validation_resolution": "1024x1024", "learning_rate": 1e-5, "lr_warmup_steps": 50,
        "checkpoint_step_interval": 120, "validation_step_interval": 120,
        "data_backend_config": "config/multidatabackend.json",
    }  # fmt: skip
    assert asked.items() <= config.items() and "num_train_epochs" not in config and "device" not in config
    assert set(config) - {"$schema"} <= {*section_of(), "report_to"}


def test_epochs_stay_epochs():
    config = config_of(answers(length=Length(epochs=20)))
    assert config["num_train_epochs"] == 20 and isinstance(config["num_train_epochs"], int)
    assert "max_train_steps" not in config
    assert config_of(answers(length=Length(epochs=2.5)))["num_train_epochs"] == 2.5


def test_a_cpu_is_named_only_where_there_is_a_gpu_too():
    small = {"model": model("nano"), "resolutions": (60,)}
    assert "device" not in config_of(answers(target=Target(8 * GB, on_cpu=True), **small))
    config = config_of(answers(target=Target(8 * GB, on_cpu=True, beside_gpu=True), **small))
    assert (
        config["device"] == "cpu" and config["mixed_precision"] == "no" and config["validation_resolution"] == "64x64"
    )


def test_one_folder_at_two_resolutions():
    first, second, texts = recipe.new_datasets(answers(resolutions=(1024, 512)))
    assert (first["id"], first["resolution"], second["id"], second["resolution"]) == (
        "photos-1024",
        1024,
        "photos-512",
        512,
    )
    assert first["instance_data_dir"] == second["instance_data_dir"] == "photos"
    assert texts["dataset_type"] == "text_embeds" and texts["default"] is True


def test_captions_in_the_datasets():
    assert recipe.new_datasets(answers())[0]["caption_strategy"] == "textfile"
    assert "missing_caption" not in recipe.caption_settings(answers())
    some = recipe.caption_settings(answers(pictures=scan_of(20, with_text=17)))
    assert some == {"caption_strategy": "textfile", "missing_caption": "skip"}
    assert recipe.caption_settings(answers(captions="instanceprompt", subject="rex"))["instance_prompt"] == "rex"
    several = recipe.caption_settings(answers(captions="instanceprompt", subject=("rex", "max")))
    assert several["instance_prompt"] == ["rex", "max"]
    assert "instance_prompt" not in recipe.caption_settings(answers(subject="rex"))


def test_other_prompts_worth_a_look():
    library = recipe.prompt_library(answers())
    assert next(iter(library.values())) == "a brown dog in the snow" and list(library) == ["another", "control"]
    only = recipe.prompt_library(answers(model=model("nano"), captions="instanceprompt"))
    assert only == {"control": "a red star on a blue background"}


def test_rounding_keeps_two_digits():
    assert [recipe.rounded(number) for number in (0.2, 7.4, 99, 123, 1250, 98765)] == [1, 7, 99, 120, 1200, 99000]
