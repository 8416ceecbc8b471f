"""Golden pictures: every crop mode and EXIF orientation beside a plain reference of Pillow and NumPy.

The reference is written from contracts §4, in floating point, and uses nothing of data/geometry.py; of chance alone it
takes the drawn numbers (records.chance_of), as they are the data of the test and not what is tested.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from sana_tune.data.images import prepare
from sana_tune.data.memory import FileMemory
from sana_tune.data.records import chance_of
from sana_tune.data.survey import survey
from tests.data.pictures import dataset, encoded, noise

SEED, ALIGNMENT, RESOLUTION = 5, 16, 96
ASPECTS = [0.5, {"aspect": 1.0, "weight": 2}, {"aspect": 1.6, "weight": 3}]
SIZES = ((211, 130), (97, 260), (150, 150))  # as stored; a turned one has its sides the other way round
NO_CROP = [{"crop": False}, {"crop": False, "crop_style": "corner"}, {"crop": False, "crop_style": "random"}]
CROPS = [
    {"crop": True, "crop_aspect": aspect, "crop_style": style}
    for aspect in ("square", "preserve", "closest", "random")
    for style in ("center", "corner", "random")
]


def rounded(x: float) -> int:
    """The nearest multiple of the alignment, at least one."""
    return ALIGNMENT * max(1, math.floor(x / ALIGNMENT + 0.5))


def aspect_of(width: int, height: int, settings: dict, drawn: float) -> float:
    """Width / height of the target."""
    own = round(width / height, 2)
    if not settings["crop"] or settings["crop_aspect"] == "preserve":
        return own
    if settings["crop_aspect"] == "square":
        return 1.0
    pairs = [(each, 1) if isinstance(each, float) else (each["aspect"], each["weight"]) for each in ASPECTS]
    if settings["crop_aspect"] == "closest":
        return min((aspect for aspect, _ in pairs), key=lambda aspect: abs(aspect - own))
    place = drawn * sum(weight for _, weight in pairs)
    for aspect, weight in pairs:
        if place < weight:
            return aspect
        place -= weight
    raise AssertionError("the draw lies below 1")


def upright(path: Path) -> Image.Image:
    """A picture as it is meant to be seen."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def target_of(aspect: float, settings: dict) -> tuple[int, int]:
    """Width and height in px that are trained of an aspect ratio."""
    kind = settings.get("resolution_type", "pixel_area")
    if kind == "pixel":  # the shorter side
        return rounded(RESOLUTION * max(aspect, 1)), rounded(RESOLUTION * max(1 / aspect, 1))
    area = settings["resolution"] * 10**6 if kind == "area" else RESOLUTION**2
    return rounded(math.sqrt(area * aspect)), rounded(math.sqrt(area / aspect))


def reference(path: Path, settings: dict, resized_area: int | None = None) -> np.ndarray:
    """Open, turn upright, resize once by Lanczos to cover the target, cut out. uint8 [H, W, 3]."""
    picture = upright(path)
    width, height = picture.size
    by_aspect, by_left, by_top = (number / 2**32 for number in chance_of(SEED, "gold", path.name))
    aspect = aspect_of(width, height, settings, by_aspect)
    across, down = target_of(aspect, settings)
    scale = max(across / width, down / height)
    if resized_area is not None:
        scale = math.sqrt(resized_area / (width * height))
    size = math.floor(width * scale + 0.5), math.floor(height * scale + 0.5)
    pixels = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
    spare_x, spare_y = size[0] - across, size[1] - down
    style = settings.get("crop_style", "center")
    left = {"center": spare_x // 2, "corner": 0, "random": int(by_left * (spare_x + 1))}[style]
    top = {"center": spare_y // 2, "corner": 0, "random": int(by_top * (spare_y + 1))}[style]
    return pixels[top : top + down, left : left + across]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three shapes in all eight orientations; no two alike, none with a symmetry."""
    place = tmp_path_factory.mktemp("gold")
    for number, (width, height) in enumerate(SIZES):
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            data = encoded(noise(width, height, 10 * number + orientation), exif=exif.tobytes())
            (place / f"{number}_turned_{orientation}.png").write_bytes(data)
    return place


def prepared(folder: Path, **settings) -> dict[str, np.ndarray]:
    """What is trained of each picture of the folder."""
    buckets = ASPECTS if settings.get("crop_aspect") in ("closest", "random") else ()
    entry = dataset(folder, "gold", **{"resolution": RESOLUTION, "crop_aspect_buckets": buckets, **settings})
    found = survey([entry], alignment=ALIGNMENT, rounding=2, prompt_case="lower", memory=FileMemory(), seed=SEED)
    assert not found.problems and len(found.records) == len(SIZES) * 8
    return {record.key: prepare((folder / record.key).read_bytes(), record.placement) for record in found.records}


@pytest.mark.parametrize(
    "settings", [*NO_CROP, *CROPS], ids=lambda each: "-".join(str(value) for value in each.values())
)
def test_every_crop_and_orientation_is_the_references(folder: Path, settings: dict):
    shapes = set()
    for key, picture in prepared(folder, **settings).items():
        expected = reference(folder / key, settings)
        assert picture.shape == expected.shape, key
        np.testing.assert_array_equal(picture, expected, err_msg=key)
        shapes.add(picture.shape)
    assert (len(shapes) == 1) == (settings.get("crop_aspect") == "square")


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("kind, resolution", [("pixel", RESOLUTION), ("area", 0.0123)])
def test_every_unit_of_size_is_the_references(folder: Path, kind: str, resolution: float, crop: bool):
    settings = {"crop": crop, "crop_aspect": "preserve", "crop_style": "random", "resolution_type": kind}
    settings["resolution"] = resolution
    for key, picture in prepared(folder, **settings).items():
        np.testing.assert_array_equal(picture, reference(folder / key, settings), err_msg=key)


@pytest.mark.parametrize("style", ["center", "corner", "random"])
def test_a_crop_of_a_downsampled_picture_is_the_references(folder: Path, style: str):
    """Pictures above 120 px² are resized to the area of 110 px² before the crop; the long ones still have to cover."""
    settings = {"crop": True, "crop_aspect": "square", "crop_style": style}
    found = prepared(folder, **settings, maximum_image_size=120, target_downsample_size=110)
    downsampled = 0
    for key, picture in found.items():
        width, height = upright(folder / key).size
        scale = 110 / math.sqrt(width * height)
        covers = min(width * scale, height * scale) >= RESOLUTION
        expected = reference(folder / key, settings, 110**2 if covers else None)
        np.testing.assert_array_equal(picture, expected, err_msg=key)
        downsampled += covers
    assert downsampled == 8


def test_orientations_show_the_same_picture(folder: Path, tmp_path: Path):
    """What a camera stores in eight ways is one picture: upright, cropped and resized alike."""
    upright = Image.fromarray(noise(190, 120, 77))
    turns = [None, *(Image.Transpose(turn) for turn in (0, 3, 1, 5, 2, 6, 4))]  # stored so that 1 … 8 set it right
    for orientation, turn in enumerate(turns, start=1):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        stored = upright if turn is None else upright.transpose(turn)
        (tmp_path / f"{orientation}.png").write_bytes(encoded(stored, exif=exif.tobytes()))
    entry = dataset(tmp_path, "gold", resolution=RESOLUTION, crop=True, crop_style="corner")
    found = survey([entry], alignment=ALIGNMENT, rounding=2, prompt_case="lower", memory=FileMemory(), seed=SEED)
    pictures = [prepare((tmp_path / record.key).read_bytes(), record.placement) for record in found.records]
    assert len(pictures) == 8
    for picture in pictures[1:]:
        np.testing.assert_array_equal(picture, pictures[0])
