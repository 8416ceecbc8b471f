"""Validation pictures: names of files, both sets of weights, contact sheets, ranks, failures that stop nothing."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from sana_tune.progress import Progress
from sana_tune.prompts import Prompt
from sana_tune.train.step import Parts, train_step
from sana_tune.train.validate import NoValidator, Picture, Validator, pictures_of
from tests.train.toys import ToyBatches, make_parts

PROMPTS = {"zib": Prompt("zib", "a zib on a hill"), "validation": Prompt("validation", "a red star")}


class Painter:
    """Draws one grey that tells the weights, and breaks on the prompts it is told to."""

    def __init__(self, parts: Parts, fails: str = ""):
        self.parts, self.fails = parts, fails
        self.drawn: list[Picture] = []
        self.seen: list[bool] = []

    def __call__(self, picture: Picture, progress: Progress, *, seen: bool) -> np.ndarray:
        if picture.name == self.fails:
            raise RuntimeError("out of memory\nand a page of statistics")
        self.drawn.append(picture)
        self.seen.append(seen)
        grey = int(abs(float(self.parts.bare.proj_out.weight.detach()[0, 0])) * 1e6) % 251
        return np.full((picture.height_px, picture.width_px, 3), grey, np.uint8)


def encode(pixels: np.ndarray) -> bytes:
    return bytes(pixels[0, 0])


def validator(folder: Path, painter: Painter, *, images: int = 1, seed: int = 0, **more) -> Validator:
    prompts = {name: Prompt(name, prompt.text, images=images) for name, prompt in PROMPTS.items()}
    return Validator(folder / "validation_images", pictures_of(prompts, [(64, 96)], seed), painter, encode, **more)


@pytest.fixture
def parts() -> Parts:
    made = make_parts()
    train_step(made, next(ToyBatches().steps(0, 1)), Progress())
    return made


def test_each_prompt_is_drawn_as_it_asks():
    own = Prompt("b", "text", "blurry", ((32, 64), (64, 32)), 8, 3.0, 0.5, "euler", 2, 7)
    drawn = pictures_of({"a": Prompt("a", "one"), "b": own}, [(96, 96)], 5)
    assert drawn[0] == Picture("a", "one", 96, 96, 5, 0, slug="a")
    assert drawn[1] == Picture("b", "text", 32, 64, 7, 0, "b", "blurry", 8, 3.0, 0.5, "euler")
    assert [(one.width_px, one.seed, one.index) for one in drawn[1:]] == [
        (32, 7, 0),
        (32, 8, 1),
        (64, 7, 0),
        (64, 8, 1),
    ]


def test_files_have_the_names_of_the_contract(tmp_path: Path, parts: Parts):
    done = validator(tmp_path, Painter(parts), images=2, seed=5).run(parts, Progress(20))
    folder = tmp_path / "validation_images"
    expected = [
        f"step_20_{name}_{index}_64x96{suffix}.png" for suffix in ("", "_ema") for name in PROMPTS for index in (0, 1)
    ]
    assert [Path(file).name for file in done.files] == expected
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
    assert done.failed == () and done.progress == Progress(20)


def test_seeds_are_counted_up_and_the_same_for_both_weights(tmp_path: Path, parts: Parts):
    painter = Painter(parts)
    validator(tmp_path, painter, images=2, seed=5).run(parts, Progress(1))
    assert [picture.seed for picture in painter.drawn] == [5, 6] * 4
    assert painter.seen == [True] * 4 + [False] * 4, "half-finished pictures are shown of the first weights alone"
    assert painter.drawn[0] == Picture("zib", "a zib on a hill", 64, 96, 5, 0, slug="zib")


def test_raw_and_average_are_drawn_and_the_weights_given_back(tmp_path: Path, parts: Parts):
    before = parts.bare.proj_out.weight.detach().clone()
    done = validator(tmp_path, Painter(parts)).run(parts, Progress(1))
    raw, average = (Path(file).read_bytes() for file in (done.files[0], done.files[2]))
    assert raw != average
    assert parts.bare.proj_out.weight.equal(before)


def test_a_prompt_that_fails_is_counted_and_the_rest_drawn(tmp_path: Path, parts: Parts):
    painter = Painter(parts, fails="zib")
    drawing = validator(tmp_path, painter)
    done = drawing.run(parts, Progress(3))
    assert [Path(file).name for file in done.files] == [
        "step_3_validation_0_64x96.png",
        "step_3_validation_0_64x96_ema.png",
    ]
    assert done.failed == (
        "step_3_zib_0_64x96.png: RuntimeError: out of memory",
        "step_3_zib_0_64x96_ema.png: RuntimeError: out of memory",
    )
    drawing.run(parts, Progress(6))
    (notice,) = drawing.lost()
    assert notice.message == "4 validation pictures could not be drawn: zib (4: RuntimeError: out of memory)"
    assert notice.severity == "warning" and notice.progress == Progress(6)


def test_where_nothing_fails_nothing_is_told_at_the_end(tmp_path: Path, parts: Parts):
    drawing = validator(tmp_path, Painter(parts))
    drawing.run(parts, Progress(3))
    assert drawing.lost() == ()


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


def test_on_startup_a_resumed_run_draws_too(tmp_path: Path, parts: Parts):
    drawing = validator(tmp_path, Painter(parts), startup=True, base=False)
    assert len(drawing.start(parts, Progress(4)).files) == 4
    assert drawing.finish(parts, Progress(4)).files == (), "these are the last step's already"
    assert len(validator(tmp_path, Painter(parts), startup=True, base=False).start(parts, Progress()).files) == 2


def test_randomised_seeds_are_others_each_time_and_the_same_again(tmp_path: Path, parts: Parts):
    def seeds(seed: int, step: int) -> list[int]:
        painter = Painter(parts)
        validator(tmp_path, painter, images=2, randomised=seed).run(parts, Progress(step))
        return [picture.seed for picture in painter.drawn]

    assert seeds(1, 5) == seeds(1, 5) and len({*seeds(1, 5), *seeds(1, 6), *seeds(2, 5)}) == 6
    assert seeds(1, 5)[:4] == seeds(1, 5)[4:], "the average is drawn with the seeds of the raw weights"


def test_the_work_is_shared_out_and_told_as_one(tmp_path: Path, parts: Parts):
    """Three ranks, one after the other; the first gathers last, so that it sees what the others did."""
    alone = validator(tmp_path / "alone", Painter(parts), images=2).run(parts, Progress(2))
    shared: list[list] = []
    for rank in (2, 1, 0):
        painter = Painter(parts, fails="zib" if rank == 1 else "")

        def gather(value: list) -> list[list]:
            shared.append(value)
            return shared

        drawing = validator(tmp_path / "shared", painter, images=2, rank=rank, ranks=3, gather=gather)
        done = drawing.run(parts, Progress(2))
    names = [Path(file).name for file in alone.files]
    lost = ["step_2_zib_1_64x96.png", "step_2_zib_1_64x96_ema.png"]
    assert [Path(file).name for file in done.files] == [name for name in names if name not in lost]
    assert [line.partition(":")[0] for line in done.failed] == lost
    assert "zib (2: RuntimeError" in drawing.lost()[0].message


def test_a_sheet_shows_base_before_now_and_average(tmp_path: Path, parts: Parts):
    sheets: list[tuple] = []

    def sheet(columns, rows) -> bytes:
        sheets.append((list(columns), [(name, about, list(cells)) for name, about, cells in rows]))
        return b"sheet"

    drawing = validator(tmp_path, Painter(parts), sheet=sheet)
    paths = [drawing.run(parts, Progress(step)).sheet for step in (0, 4, 7)]
    folder = tmp_path / "validation_images"
    assert paths == [str(folder / f"step_{step}_contact_sheet.png") for step in (0, 4, 7)]
    assert all(Path(path).read_bytes() == b"sheet" for path in paths)
    assert [columns for columns, _ in sheets] == [
        ["base model"],
        ["base model", "step 4", "step 4 EMA"],
        ["base model", "before: step 4", "step 7", "step 7 EMA"],
    ]
    name, about, cells = sheets[2][1][0]
    assert (name, about) == ("zib  64x96  seed 0", "a zib on a hill")
    files = [f"step_{n}_zib_0_64x96{end}.png" for n, end in ((0, ""), (4, ""), (7, ""), (7, "_ema"))]
    assert cells == [(folder / file).read_bytes() for file in files]


def test_a_sheet_that_fails_is_told_and_stops_nothing(tmp_path: Path, parts: Parts):
    def sheet(columns, rows) -> bytes:
        raise ValueError("too tall")

    done = validator(tmp_path, Painter(parts), sheet=sheet).run(parts, Progress(4))
    assert len(done.files) == 4 and done.sheet == ""
    assert done.failed == ("step_4_contact_sheet.png: ValueError: too tall",)


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
    assert drawing.lost() == ()


def test_where_all_draw_together_one_that_fails_ends_the_run(tmp_path: Path, parts: Parts):
    """The others are in the middle of the same picture. Where it cannot be written, nobody waits: that is told."""

    def full(pixels: np.ndarray) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    unwritten = Validator(tmp_path, pictures_of(PROMPTS, [(64, 96)], 0), Painter(parts), full, collective=True)
    assert "No space left on device" in unwritten.run(parts, Progress(2)).failed[0]
    drawing = validator(tmp_path, Painter(parts, fails="zib"), collective=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        drawing.run(parts, Progress(3))
