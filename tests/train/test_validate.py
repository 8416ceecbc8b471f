"""Previews: names of files, both sets of weights, failures that stop nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sana_tune.progress import Progress
from sana_tune.train.step import Parts, train_step
from sana_tune.train.validate import NoValidator, Picture, Validator, slug, slugs
from tests.train.toys import ToyBatches, make_parts

PROMPTS = {"zib": "a zib on a hill", "validation": "a red star"}


class Painter:
    """Draws one grey that tells the weights, and breaks on the prompts it is told to."""

    def __init__(self, parts: Parts, fails: str = ""):
        self.parts, self.fails = parts, fails
        self.drawn: list[Picture] = []

    def __call__(self, picture: Picture) -> np.ndarray:
        if picture.name == self.fails:
            raise RuntimeError("out of memory\nand a page of statistics")
        self.drawn.append(picture)
        grey = int(abs(float(self.parts.bare.proj_out.weight.detach()[0, 0])) * 1e6) % 251
        return np.full((picture.height_px, picture.width_px, 3), grey, np.uint8)


def encode(pixels: np.ndarray) -> bytes:
    return bytes(pixels[0, 0])


def validator(folder: Path, painter: Painter, **more) -> Validator:
    return Validator(folder / "validation_images", PROMPTS, [(64, 96)], painter, encode, **more)


@pytest.fixture
def parts() -> Parts:
    made = make_parts()
    train_step(made, next(ToyBatches().steps(0, 1)), Progress())
    return made


def test_files_have_the_names_of_the_contract(tmp_path: Path, parts: Parts):
    done = validator(tmp_path, Painter(parts), images_per_prompt=2, seed=5).run(parts, Progress(20))
    folder = tmp_path / "validation_images"
    expected = [
        f"step_20_{name}_{index}_64x96{suffix}.png" for suffix in ("", "_ema") for name in PROMPTS for index in (0, 1)
    ]
    assert [Path(file).name for file in done.files] == expected
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
    assert done.failed == () and done.progress == Progress(20)


def test_seeds_are_counted_up_and_the_same_for_both_weights(tmp_path: Path, parts: Parts):
    painter = Painter(parts)
    validator(tmp_path, painter, images_per_prompt=2, seed=5).run(parts, Progress(1))
    assert [picture.seed for picture in painter.drawn] == [5, 6] * 4
    assert painter.drawn[0] == Picture("zib", "a zib on a hill", 64, 96, 5, 0)


def test_raw_and_average_are_drawn_and_the_weights_given_back(tmp_path: Path, parts: Parts):
    before = parts.bare.proj_out.weight.detach().clone()
    done = validator(tmp_path, Painter(parts)).run(parts, Progress(1))
    raw, average = (Path(file).read_bytes() for file in (done.files[0], done.files[2]))
    assert raw != average
    assert parts.bare.proj_out.weight.equal(before)


def test_a_prompt_that_fails_is_counted_and_the_rest_drawn(tmp_path: Path, parts: Parts):
    painter = Painter(parts, fails="zib")
    done = validator(tmp_path, painter).run(parts, Progress(3))
    assert [Path(file).name for file in done.files] == [
        "step_3_validation_0_64x96.png",
        "step_3_validation_0_64x96_ema.png",
    ]
    assert done.failed == (
        "step_3_zib_0_64x96.png: RuntimeError: out of memory",
        "step_3_zib_0_64x96_ema.png: RuntimeError: out of memory",
    )


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, parts: Parts):
    (tmp_path / "validation_images").write_text("", encoding="utf-8")
    done = validator(tmp_path, Painter(parts)).run(parts, Progress(3))
    assert done.files == () and len(done.failed) == 4


def test_a_stop_ends_the_drawing(tmp_path: Path, parts: Parts):
    painter = Painter(parts)
    done = validator(tmp_path, painter, stopped=lambda: len(painter.drawn) == 1).run(parts, Progress(3))
    assert len(done.files) == len(painter.drawn) == 1


def test_the_start_draws_the_base_model_once(tmp_path: Path, parts: Parts):
    drawing = validator(tmp_path, Painter(parts))
    assert [Path(file).name for file in drawing.start(parts, Progress()).files] == [
        "step_0_zib_0_64x96.png",
        "step_0_validation_0_64x96.png",
    ]
    assert drawing.start(parts, Progress(4)).files == ()
    assert validator(tmp_path, Painter(parts), base=False).start(parts, Progress()).files == ()


@pytest.mark.parametrize(("shown", "count"), [("comparison", 4), ("ema_only", 2), ("none", 2)])
def test_ema_validation_chooses_the_weights(tmp_path: Path, shown: str, count: int):
    made = make_parts(ema_options={"shown": shown})
    train_step(made, next(ToyBatches().steps(0, 1)), Progress())
    drawing = validator(tmp_path, Painter(made))
    assert [Path(file).stem for file in drawing.start(made, Progress()).files] == [
        "step_0_zib_0_64x96", "step_0_validation_0_64x96"
    ], "the base model is drawn whatever is chosen"  # fmt: skip
    files = [Path(file).stem for file in drawing.run(made, Progress(1)).files]
    assert len(files) == count
    assert any(name.endswith("_ema") for name in files) is (shown != "none")
    assert all(name.endswith("_ema") for name in files) is (shown == "ema_only")


def test_the_finish_does_not_repeat_a_step(tmp_path: Path, parts: Parts):
    drawing = validator(tmp_path, Painter(parts))
    assert len(drawing.finish(parts, Progress(4)).files) == 4
    assert drawing.finish(parts, Progress(4)).files == ()
    drawing.run(parts, Progress(5))
    assert drawing.finish(parts, Progress(5)).files == ()


def test_what_drawing_holds_is_let_go(tmp_path: Path, parts: Parts):
    released = []
    drawing = validator(tmp_path, Painter(parts, fails="zib"), release=lambda: released.append(1))
    drawing.run(parts, Progress(1))
    assert released == [1]


def test_no_validator_draws_nothing(parts: Parts):
    drawing = NoValidator()
    for method in (drawing.start, drawing.run, drawing.finish):
        assert method(parts, Progress(2)).files == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("zib", "zib"), ("zib_on_hill", "zib-on-hill"), ("two words", "two-words"), ("a2-b", "a2-b")],
)
def test_plain_names_stay_readable(name: str, expected: str):
    assert slug(name) == expected


def test_other_names_are_safe_and_apart():
    names = [
        "Zib",
        "ZIB",
        "é",
        "ü",
        "星",
        "a/b",
        "a\\b",
        "../x",
        "con",
        "",
        "a" * 300,
        "a" * 299 + "b",
        "a?b",
        ".",
        "a__b",
    ]
    made = [slug(name) for name in names]
    assert len({each.lower() for each in made}) == len(made)
    for each in made:
        assert each and len(each) <= 60 and set(each) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert not each.startswith("-") and not each.endswith("-")


def test_two_names_never_share_a_slug():
    made = slugs(["a b", "a_b", "a-b"])
    assert list(made.values()) == ["a-b", "a-b-2", "a-b-3"]
