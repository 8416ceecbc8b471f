from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps

from sana_tune.data import images
from sana_tune.data.geometry import Box, Placement, Rules, Size, place
from sana_tune.data.images import (
    BrokenImage,
    contact_sheet,
    decode,
    encode_picture,
    encode_png,
    measure,
    prepare,
    read_header,
)
from sana_tune.data.sources import PICTURE_ENDINGS
from tests.data.pictures import encoded, noise
from tests.data.profiles import (
    ADOBE_GAMMA,
    ADOBE_RGB,
    D50,
    SRGB,
    grey_profile,
    ink_profile,
    matrix_profile,
    srgb_of_xyz,
    swapped_profile,
    xyz_of_lab,
)

ROOT = Path(__file__).resolve().parents[2]
LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}


def with_orientation(format: str, orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(noise(40, 24), format, exif=exif.tobytes(), **options)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_as_pillow_does_it(format: str, orientation: int):
    data = with_orientation(format, orientation, **LOSSLESS.get(format, {}))
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert expected.size == ((24, 40) if orientation >= 5 else (40, 24))
    assert measure(data) == expected.size
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(expected))


def test_orientation_behind_the_pixels_of_a_png_counts():
    plain = encoded(noise(40, 24))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    end = plain.rindex(b"IEND") - 4
    data = plain[:end] + chunk(b"eXIf", exif.tobytes()[6:]) + plain[end:]
    assert measure(data) == decode(data).size == (24, 40)


def test_measuring_reads_no_pixels(monkeypatch: pytest.MonkeyPatch):
    plain, turned = encoded(noise(24, 40)), [with_orientation(format, 6) for format in ("JPEG", "PNG", "WEBP")]
    for kind in (Image.Image, ImageFile.ImageFile):
        monkeypatch.setattr(kind, "load", lambda self: pytest.fail("pixels were decoded"))
    assert {measure(one) for one in (plain, *turned)} == {(24, 40)}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_an_open_file_is_measured_like_its_bytes(format: str, tmp_path: Path):
    exif = {} if format == "GIF" else {"orientation": 6}
    data = with_orientation(format, **exif) if exif else encoded(noise(24, 40), format)
    path = tmp_path / "picture"
    path.write_bytes(data)
    with open(path, "rb") as file:
        assert measure(file) == measure(data) == (24, 40)


def test_measuring_an_open_file_reads_its_header_alone():
    """Noise that fills 300 kB. (Pillow reads a WebP whole, but decodes nothing of it.)"""
    picture = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for format, options in (("JPEG", {"quality": 100}), ("PNG", {}), ("TIFF", {})):
        file = Counting(encoded(picture, format, **options))
        assert measure(file) == (400, 300)
        whole = len(file.getvalue())
        assert whole > 100_000 and file.count < whole / 5, format


class Counting(io.BytesIO):
    """An open file that counts the bytes read."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


def test_an_unknown_orientation_is_none():
    assert measure(with_orientation("JPEG", 9)) == decode(with_orientation("JPEG", 9)).size == (40, 24)


def test_transparency_shows_white_and_hides_the_colour_below():
    rgba = noise(8, 8, channels=4)
    rgba[..., 3] = np.linspace(0, 255, 64).reshape(8, 8)
    alpha = rgba[..., 3:].astype(float) / 255
    shown = np.asarray(decode(encoded(rgba))).astype(float)
    assert np.abs(shown - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    assert (shown[0, 0] == 255).all()


def test_transparency_of_grey_palette_and_colour_key():
    grey = Image.fromarray(np.array([[[0, 0], [0, 255]]], dtype=np.uint8), "LA")
    assert np.asarray(decode(encoded(grey))).tolist() == [[[255] * 3, [0] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    shown = np.asarray(decode(encoded(palette, transparency=0)))
    assert shown.tolist() == [[[255] * 3, [40, 50, 60]]]
    key = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert np.asarray(decode(encoded(key, transparency=(1, 2, 3)))).tolist() == [[[255] * 3, [4, 5, 6]]]


def test_sixteen_bit_grey_is_rounded():
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    shown = np.asarray(decode(encoded(Image.fromarray(values))))[0, :, 0]
    assert shown.tolist() == [0, 0, 1, 1, 128, 255]
    assert shown.tolist() == np.round(values[0] / 257).tolist()


@pytest.mark.parametrize(
    "mode, format", [("1", "PNG"), ("L", "JPEG"), ("P", "GIF"), ("CMYK", "JPEG"), ("YCbCr", "JPEG")]
)
def test_other_modes_become_rgb(mode: str, format: str):
    image = Image.fromarray(noise(16, 8)).convert(mode)
    data = encoded(image, format)
    with Image.open(io.BytesIO(data)) as again:
        expected = np.asarray(again.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(data)), expected)


# ---- colour profiles ----


def with_profile(picture: np.ndarray | Image.Image, profile: bytes, format: str = "PNG", **options) -> np.ndarray:
    """What is shown of a picture that carries a profile, as numbers."""
    return np.asarray(decode(encoded(picture, format, icc_profile=profile, **options))).astype(float)


@pytest.mark.parametrize("format", [*LOSSLESS, "JPEG"])
def test_the_colours_of_an_embedded_profile_are_shown_as_srgb(format: str):
    picture = noise(40, 24)
    options = LOSSLESS.get(format, {"quality": 100, "subsampling": 0})
    numbers = np.asarray(decode(encoded(picture, format, **options))) / 255
    expected = srgb_of_xyz(numbers**ADOBE_GAMMA @ ADOBE_RGB.T)
    shown = with_profile(picture, matrix_profile(ADOBE_RGB, ADOBE_GAMMA), format, **options)
    assert np.abs(shown - expected).max() <= 1.5
    assert np.abs(shown - 255 * numbers).max() > 10, "the profile matters"


def test_swapped_primaries_swap_the_channels():
    picture = noise(40, 24)
    shown = with_profile(picture, swapped_profile())
    assert np.abs(shown - picture[..., ::-1].astype(float)).max() <= 1


def test_an_srgb_picture_is_not_touched():
    picture = noise(40, 24)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(with_profile(picture, srgb), picture)
    nearly = matrix_profile(SRGB, 2.2)
    assert 1 < np.abs(with_profile(picture, nearly) - picture).max() < 10, "a gamma of 2.2 is not sRGB"


@pytest.mark.parametrize("bits", [8, 16])
def test_a_grey_profile(bits: int):
    levels = np.arange(256, dtype=np.uint8)[None]
    picture = levels if bits == 8 else levels.astype(np.uint16) * 257
    shown = with_profile(picture, grey_profile(1.0))
    expected = srgb_of_xyz((levels[..., None] / 255) * D50)
    assert np.abs(shown - expected).max() <= 1.5 and shown[0, 55, 0] == pytest.approx(128, abs=2)


def test_a_grey_picture_may_carry_a_colour_profile():
    levels = np.arange(256, dtype=np.uint8)[None]
    shown = with_profile(levels, matrix_profile(ADOBE_RGB, 1.0))
    assert np.abs(shown - srgb_of_xyz((levels[..., None] / 255) * ADOBE_RGB.sum(axis=1))).max() <= 1.5


def test_palettes_and_transparency_with_a_profile():
    profile = swapped_profile()
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert np.abs(with_profile(palette, profile)[0] - [[30, 20, 10], [60, 50, 40]]).max() <= 1
    assert np.abs(with_profile(palette, profile, transparency=0)[0] - [[255] * 3, [60, 50, 40]]).max() <= 1
    rgba = noise(8, 8, channels=4)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., 2::-1] * alpha + 255 * (1 - alpha)
    assert np.abs(with_profile(rgba, profile) - expected).max() <= 2
    grey = Image.fromarray(np.array([[[100, 0], [55, 255]]], dtype=np.uint8), "LA")
    assert with_profile(grey, grey_profile(1.0))[0, :, 0].tolist() == [255, pytest.approx(128, abs=2)]


def lab_of_inks(seed: int) -> np.ndarray:
    """Colours inside sRGB, [2, 2, 2, 2, 3], as whole lut8 levels."""
    random = np.random.default_rng(seed)
    lightness = np.round(random.uniform(35, 80, (2, 2, 2, 2, 1)) * 2.55) / 2.55
    lab = np.concatenate([lightness, np.round(random.uniform(-18, 18, (2, 2, 2, 2, 2)))], axis=-1)
    lab[0, 0, 0, 0], lab[1, 1, 1, 1] = (100, 0, 0), 0  # bare paper is shown white, and all inks black, in any case
    return lab


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_inks_are_shown_as_their_profile_says_perceptually(format: str):
    """Each of the 16 full inks and their mixtures, in blocks of 8 px, which a JPEG keeps."""
    corners = np.array(list(np.ndindex(2, 2, 2, 2)))
    inks = np.repeat(np.repeat((corners * 255).astype(np.uint8)[None], 8, axis=0), 8, axis=1)
    picture = Image.frombytes("CMYK", (16 * 8, 8), inks.tobytes())
    perceptual, colorimetric = lab_of_inks(1), lab_of_inks(2)
    options = {"quality": 100} if format == "JPEG" else {}
    shown = with_profile(picture, ink_profile(perceptual, colorimetric), format, **options)[4, 4::8]
    expected = srgb_of_xyz(xyz_of_lab(perceptual.reshape(16, 3)))
    assert expected[1:-1].min() > 5 and expected[1:-1].max() < 250, "the colours are inside sRGB"
    assert np.abs(shown - expected).max() <= 3
    without = np.asarray(decode(encoded(picture, format, **options)))[4, 4::8]
    with Image.open(io.BytesIO(encoded(picture, format, **options))) as again:
        np.testing.assert_array_equal(without, np.asarray(again.convert("RGB"))[4, 4::8])


ADOBE = matrix_profile(ADOBE_RGB, ADOBE_GAMMA)


@pytest.mark.parametrize(
    "profile",
    [b"no profile at all", ADOBE[:100], ADOBE[:200], ADOBE[:132] + b"\xff" * 200, grey_profile(1.8),
     ink_profile(lab_of_inks(1), lab_of_inks(2))],
    ids=["text", "half a header", "cut", "garbled", "of grey", "of inks"],
)  # fmt: skip
def test_a_broken_profile_and_one_of_another_kind_are_passed_over(profile: bytes):
    picture = noise(40, 24)
    np.testing.assert_array_equal(with_profile(picture, profile), picture)


def test_inks_with_a_profile_of_colours_are_shown_as_without():
    picture = Image.fromarray(noise(16, 8)).convert("CMYK")
    expected = np.asarray(decode(encoded(picture, "TIFF")))
    np.testing.assert_array_equal(with_profile(picture, swapped_profile(), "TIFF"), expected)


def test_threads_share_a_conversion():
    pictures = [encoded(noise(200, 100, seed), icc_profile=ADOBE) for seed in range(8)]
    alone = [np.asarray(decode(data)) for data in pictures]
    with ThreadPoolExecutor(4) as workers:
        for _ in range(3):
            together = [np.asarray(image) for image in workers.map(decode, pictures)]
            assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_first_frame_of_an_animation():
    frames = [Image.fromarray(noise(8, 8, seed)) for seed in (1, 2)]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(frames[0]))


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_any_cut_off_or_garbled_file_is_broken_or_fine_but_never_a_crash(format: str):
    whole = encoded(noise(64, 64), format)
    random = np.random.default_rng(0)
    told = 0
    for _ in range(60):
        data = bytearray(whole[: random.integers(0, len(whole) + 1)])
        for byte in random.integers(0, max(1, len(data)), 5):
            if data:
                data[byte] = random.integers(0, 256)
        for read in (measure, decode):
            try:
                read(bytes(data))
            except BrokenImage as error:
                assert error.reason
                told += 1
    assert told > 20


def test_a_picture_cut_in_its_body_measures_but_does_not_decode():
    data = encoded(noise(64, 64), "JPEG", quality=95)
    assert measure(data[: len(data) // 2]) == (64, 64)
    with pytest.raises(BrokenImage, match="is damaged"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"not a picture", b"\xff\xd8\xff", b"\0" * 100])
def test_no_picture_at_all(data: bytes):
    with pytest.raises(BrokenImage, match=r"is not a picture|is damaged"):
        measure(data)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "is an empty file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a HEIC picture, which is not read"),
        (b"\xff\x0a\xfa\x7f\x90", "is a JPEG XL picture, which is not read"),
        (b"%PDF-1.7", "is a PDF"),
        (b"<!DOCTYPE html><html>404", "is a web page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not a picture"),
    ],
)
def test_what_people_have_under_the_name_of_a_picture(data: bytes, reason: str):
    for look in (measure, decode):
        with pytest.raises(BrokenImage, match=reason):
            look(data)


def test_float_and_32_bit_pixels_are_refused():
    with pytest.raises(BrokenImage, match="floating-point"):
        decode(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))
    with pytest.raises(BrokenImage, match="32-bit"):
        decode(encoded(Image.fromarray(np.full((2, 2), 1 << 20, np.int32)), "TIFF"))


def test_large_pictures_are_read_and_absurd_ones_are_not(monkeypatch: pytest.MonkeyPatch, recwarn):
    header = encoded(np.zeros((1, 1, 3), np.uint8))
    large = header.replace(struct.pack(">II", 1, 1), struct.pack(">II", 20_000, 12_000))
    large = large[:29] + struct.pack(">I", zlib.crc32(large[12:29])) + large[33:]
    assert measure(large) == (20_000, 12_000)  # 240 megapixels; Pillow's own limit is 179
    assert not recwarn.list
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(BrokenImage, match="at most"):
        measure(encoded(noise(40, 30)))


def test_a_bomb_is_left_out_by_its_header_and_nothing_is_decoded():
    rows = zlib.compress(b"\0" * 100_001)
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    for look in (measure, decode):
        with pytest.raises(BrokenImage, match=r"is 100000x100000 px; at most 537 megapixels are read"):
            look(bomb)


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Four threads, and never two in the decoder; small ones are not held up."""
    monkeypatch.setattr(images, "LARGE_PIXELS", 5000)
    inside, most = [0], {True: 0, False: 0}
    load = ImageFile.ImageFile.load

    def counting(image: ImageFile.ImageFile):
        large = image.size[0] * image.size[1] > 5000
        inside[0] += large
        most[large] = max(most[large], inside[0])
        try:
            return load(image)
        finally:
            inside[0] -= large

    monkeypatch.setattr(ImageFile.ImageFile, "load", counting)
    large, small = encoded(noise(300, 200)), encoded(noise(40, 30))
    with ThreadPoolExecutor(4) as workers:
        sizes = [image.size for image in workers.map(decode, [large, small] * 12)]
    assert sizes == [(300, 200), (40, 30)] * 12 and most[True] == 1


def kinds_of_pictures() -> dict[str, bytes]:
    """Every way in which a picture becomes RGB."""
    palette = Image.fromarray(noise(61, 47)).quantize(30)
    return {
        "rgb": encoded(noise(61, 47)),
        "rgba": encoded(noise(61, 47, channels=4)),
        "grey with alpha": encoded(Image.fromarray(noise(61, 47)).convert("LA")),
        "palette": encoded(palette, transparency=bytes(range(0, 240, 8))),
        "hidden colour": encoded(Image.fromarray(noise(61, 47)), transparency=(1, 2, 3)),
        "16 bits": encoded(Image.fromarray(noise(61, 47)[..., 0].astype(np.uint16) * 250), transparency=500),
        "profile": encoded(noise(61, 47), icc_profile=matrix_profile(ADOBE_RGB, ADOBE_GAMMA)),
        "cmyk": encoded(Image.fromarray(noise(61, 47)).convert("CMYK"), "TIFF"),
    }


def test_a_large_picture_is_converted_in_strips_to_the_same(monkeypatch: pytest.MonkeyPatch):
    pictures = kinds_of_pictures()
    whole = {name: np.asarray(decode(data, "#336699")) for name, data in pictures.items()}
    monkeypatch.setattr(images, "LARGE_PIXELS", 100)
    for strip in (61 * 10, 1):
        monkeypatch.setattr(images, "_STRIP_PIXELS", strip)
        for name, data in pictures.items():
            np.testing.assert_array_equal(np.asarray(decode(data, "#336699")), whole[name], err_msg=name)


def test_no_memory_is_told_and_not_a_crash(monkeypatch: pytest.MonkeyPatch):
    def no_memory(image: Image.Image):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", no_memory)
    with pytest.raises(BrokenImage, match="takes more memory than there is"):
        decode(encoded(noise(40, 30)))


NOISY = """
import io, struct, sys, zlib
import numpy as np
from PIL import Image
from sana_tune.data.images import BrokenImage, decode, measure
rng = np.random.default_rng(0)
def saved(image, format, **options):
    file = io.BytesIO(); image.save(file, format, **options); return file.getvalue()
picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
palette = picture.quantize(16)
whole = [saved(picture, format) for format in ("TIFF", "JPEG", "PNG", "GIF", "WEBP", "BMP", "TGA", "PPM")]
whole += [saved(picture, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_deflate")]
whole += [saved(palette, "PNG", transparency=bytes(range(16)))]
exif = Image.Exif(); exif[0x0112] = 6
whole.append(saved(picture, "JPEG", exif=exif.tobytes()[:-6] + b"\\xff" * 6))
for data in whole:
    for cut in [len(data), *rng.integers(8, len(data), 30)]:
        torn = bytearray(data[:cut])
        for place in rng.integers(8, len(torn), 3) if cut < len(data) else ():
            torn[place] ^= 0xff
        for look in (measure, decode):
            try:
                look(bytes(torn))
            except BrokenImage:
                pass
"""


def test_nothing_leaks_to_the_console():
    """Pillow's warnings and the decoders' own words, of whole files, torn files and files above Pillow's limit."""
    ran = subprocess.run([sys.executable, "-c", NOISY], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


# ---- formats and modes ----


@pytest.mark.parametrize(
    "format, options",
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True}),
     ("JPEG2000", {"irreversible": False}), ("PPM", {}), ("TGA", {}), ("TGA", {"compression": "tga_rle"}),
     ("QOI", {}), ("PCX", {}), ("SGI", {}), ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
     ("JPEG", {"quality": 100, "subsampling": 0}), ("GIF", {})],
)  # fmt: skip
def test_every_format_is_read(format: str, options: dict):
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {format}")
    picture = np.array(Image.fromarray(noise(40, 24)).quantize(60).convert("RGB")) if format == "GIF" else noise(40, 24)
    data = encoded(picture, format, **options)
    assert measure(data) == (40, 24)
    shown = np.asarray(decode(data)).astype(int)
    near = {"JPEG": 6, "AVIF": 6}.get(format, 0)
    assert np.abs(shown - picture).max() <= near


def test_every_ending_of_what_is_read_is_a_picture():
    read = {ending for ending, format in Image.registered_extensions().items() if format in images._OPENED}
    unusual = {".avifs", ".bw", ".rgb", ".rgba", ".sgi", ".icb", ".vda", ".vst", ".pfm", ".pcx"}
    assert read - unusual <= PICTURE_ENDINGS


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_sixteen_bits_a_colour(mode: str):
    """A PNG of 16 bits a channel, written by hand: Pillow has no such mode, and takes the upper eight bits."""
    channels = len(mode)
    values = np.random.default_rng(0).integers(0, 65536, (6, 5, channels), dtype=np.uint16)
    values[..., 3:] = 65535
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 5, 6, 16, {"RGB": 2, "RGBA": 6}[mode], 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    shown = np.asarray(decode(png)).astype(float)
    assert np.abs(shown - values[..., :3] / 257).max() <= 1


def test_lab_pictures():
    """L*a*b* of D50 as a TIFF holds it: greys, and colours inside sRGB."""
    lab = np.array([[[0, 0, 0], [50, 0, 0], [100, 0, 0], [60, 30, 20], [40, -20, 10], [70, 5, -25]]], dtype=float)
    stored = np.stack([lab[..., 0] * 2.55, lab[..., 1] + 128, lab[..., 2] + 128], axis=-1).round().astype(np.uint8)
    image = Image.merge("LAB", [Image.fromarray(stored[..., channel]) for channel in range(3)])
    shown = np.asarray(decode(encoded(image, "TIFF"))).astype(float)
    assert np.abs(shown - srgb_of_xyz(xyz_of_lab(lab))).max() <= 2.5


def test_one_bit_pictures_are_black_and_white():
    bits = np.random.default_rng(0).integers(0, 2, (9, 13)).astype(bool)
    shown = np.asarray(decode(encoded(Image.fromarray(bits))))
    np.testing.assert_array_equal(shown, np.repeat(255 * bits[..., None], 3, axis=-1).astype(np.uint8))


# ---- the ground below transparent parts ----


def test_the_header_tells_whether_there_may_be_transparent_parts():
    palette = Image.fromarray(noise(9, 8)).quantize(8)
    with_alpha = [
        *(encoded(noise(9, 8, channels=4), format) for format in ("PNG", "WEBP", "TIFF", "TGA")),
        encoded(palette, transparency=3),
        encoded(palette, "GIF", transparency=3),
        encoded(Image.fromarray(noise(9, 8)), transparency=(1, 2, 3)),
        encoded(Image.fromarray(np.zeros((8, 9), np.uint16)), transparency=5),
    ]
    without = [encoded(noise(9, 8), format) for format in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")]
    assert [read_header(data).alpha for data in with_alpha] == [True] * len(with_alpha)
    assert [read_header(data).alpha for data in without] == [False] * len(without)
    assert {read_header(data).size for data in (*with_alpha, *without)} == {(9, 8)}


def test_transparent_parts_show_the_ground():
    rgba = noise(8, 8, channels=4)
    rgba[..., 3] = np.linspace(0, 255, 64).reshape(8, 8)
    alpha, ground = rgba[..., 3:].astype(float) / 255, np.array([16, 96, 224])
    for format in ("PNG", "TIFF", "TGA"):
        shown = np.asarray(decode(encoded(rgba, format), "#1060e0")).astype(float)
        assert np.abs(shown - (rgba[..., :3] * alpha + ground * (1 - alpha))).max() <= 1, format
    opaque = encoded(noise(8, 8))
    np.testing.assert_array_equal(np.asarray(decode(opaque, "#1060e0")), np.asarray(decode(opaque)))
    placement = Placement(Size(8, 8), Box(0, 0, 8, 8))
    np.testing.assert_array_equal(prepare(encoded(rgba), placement, "#1060e0"), decode(encoded(rgba), "#1060e0"))


def test_a_hidden_grey_of_sixteen_bits_shows_the_ground():
    values = np.array([[0, 300, 65535]], dtype=np.uint16)
    shown = np.asarray(decode(encoded(Image.fromarray(values), transparency=300), "#ff0000"))
    assert shown.tolist() == [[[0, 0, 0], [255, 0, 0], [255, 255, 255]]]


# ---- JPEGs decoded at a part of their size ----


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Like a photograph: broad gradients, detail of every size, and the noise of a sensor."""
    chosen = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    shades = [127 + 90 * np.sin(5 * x / width + turn) * np.cos(4 * y / height - turn) for turn in range(3)]
    picture = np.stack(shades, axis=-1)
    for size, strength in ((64, 25), (16, 12), (4, 6)):
        small = chosen.integers(0, 256, (height // size + 1, width // size + 1, 3), dtype=np.uint8)
        layer = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), np.float32)
        picture += (layer - 127) / 127 * strength
    return np.clip(picture + chosen.normal(0, 3, picture.shape), 0, 255).astype(np.uint8)


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures, dB; infinite for equal ones."""
    error = np.mean((one.astype(float) - other) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sizes at which pictures are decoded from here on."""
    sizes, load = [], ImageFile.ImageFile.load

    def noting(image: ImageFile.ImageFile):
        sizes.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noting)
    return sizes


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size, part", [((1600, 1200), 4), ((1203, 1601), 4), ((1117, 745), 2)])
def test_a_large_jpeg_is_decoded_small_and_nobody_sees_it(
    size: tuple[int, int], part: int, orientation: int, monkeypatch: pytest.MonkeyPatch
):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(photo(*size), "JPEG", quality=92, exif=exif.tobytes())
    placement = place(measure(data), Rules(resolution=224))
    sizes = decoded_sizes(monkeypatch)
    small = prepare(data, placement)
    assert set(sizes) == {(-(-size[0] // part), -(-size[1] // part))}
    stored = placement.resize if orientation < 5 else placement.resize[::-1]
    assert all(have >= images.DRAFT * need for have, need in zip(sizes[0], stored, strict=True))
    with Image.open(io.BytesIO(data)) as image:
        whole = ImageOps.exif_transpose(image).resize(placement.resize, Image.Resampling.LANCZOS)
    assert psnr_db(small, np.asarray(whole.crop(placement.crop_box))) > 45


def test_a_jpeg_is_decoded_whole_where_a_part_is_too_little(monkeypatch: pytest.MonkeyPatch):
    """Equal to the plain way to the last bit, just below the limit; above it at half its size."""
    sizes = decoded_sizes(monkeypatch)
    target = Placement(Size(160, 120), Box(0, 0, 160, 120))
    below, above = photo(479, 359), photo(480, 360)
    data = encoded(below, "JPEG", quality=92)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.resize((160, 120), Image.Resampling.LANCZOS))
    sizes.clear()
    np.testing.assert_array_equal(prepare(data, target), expected)
    assert set(sizes) == {(479, 359)}
    sizes.clear()
    prepare(encoded(above, "JPEG", quality=92), target)
    assert set(sizes) == {(240, 180)}


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"mode": "L"}, {"mode": "CMYK"}])
def test_every_kind_of_jpeg_can_be_decoded_small(options: dict, monkeypatch: pytest.MonkeyPatch):
    mode = options.pop("mode", "RGB")
    data = encoded(Image.fromarray(photo(801, 643)).convert(mode), "JPEG", quality=92, **options)
    placement = Placement(Size(100, 80), Box(0, 0, 100, 80))
    small = prepare(data, placement)
    monkeypatch.setattr(images, "DRAFT", 1000)
    assert psnr_db(small, prepare(data, placement)) > 45


def test_other_formats_are_always_decoded_whole(monkeypatch: pytest.MonkeyPatch):
    sizes = decoded_sizes(monkeypatch)
    placement = Placement(Size(40, 30), Box(0, 0, 40, 30))
    for format in ("PNG", "TIFF", "WEBP", "JPEG2000"):
        prepare(encoded(photo(400, 300), format), placement)
    assert set(sizes) == {(400, 300)}


def test_preparing_is_one_lanczos_resize_and_a_crop():
    data = encoded(noise(300, 150))
    placement = place(Size(300, 150), Rules(resolution=64, crop=True))
    with Image.open(io.BytesIO(data)) as image:
        expected = image.resize((128, 64), Image.Resampling.LANCZOS).crop((32, 0, 96, 64))
    prepared = prepare(data, placement)
    assert prepared.dtype == np.uint8 and prepared.shape == (64, 64, 3) and prepared.flags.c_contiguous
    np.testing.assert_array_equal(prepared, np.asarray(expected))


def test_a_picture_of_the_right_size_is_not_resampled():
    picture = noise(64, 96)
    prepared = prepare(encoded(picture), Placement(Size(64, 96), Box(0, 0, 64, 96)))
    np.testing.assert_array_equal(prepared, picture)


def test_png_keeps_every_pixel():
    picture = noise(20, 30)
    np.testing.assert_array_equal(np.asarray(decode(encode_png(picture))), picture)


@pytest.mark.parametrize(("kind", "begins"), [("png", b"\x89PNG"), ("webp", b"RIFF"), ("jpeg", b"\xff\xd8")])
def test_pictures_are_written_in_each_kind(kind, begins):
    rows, columns = np.mgrid[0:32, 0:48]
    picture = np.stack([rows * 7, columns * 5, rows + columns], axis=-1).astype(np.uint8)
    data = encode_picture(picture, kind, 90)
    assert data.startswith(begins)
    found = np.asarray(decode(data)).astype(int)
    assert found.shape == picture.shape and np.abs(found - picture).mean() < (0.1 if kind == "png" else 6)
    if kind != "png":
        assert len(encode_picture(picture, kind, 10)) < len(data)
    assert np.array_equal(np.asarray(decode(encode_png(picture, fast=True))), picture)


def test_a_contact_sheet_has_every_picture_in_its_place():
    colours = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
    files = {name: encode_png(np.full((64, 32, 3), colour, np.uint8)) for name, colour in colours.items()}
    large = encode_png(np.full((1024, 512, 3), (9, 9, 9), np.uint8))
    rows = [
        ("one", "text", [files["red"], None]),
        ("zwei " * 99, "星", [files["green"], files["blue"]]),
        ("x", "", [None, large]),
    ]
    sheet = contact_sheet(["base", "now"], rows, 128)
    assert sheet.shape[1] == 8 + 2 * (128 + 8) and sheet.dtype == np.uint8
    for name, colour in colours.items():
        places = np.argwhere(np.abs(sheet.astype(int) - colour).max(axis=-1) < 3)
        (top, left), (bottom, right) = places.min(axis=0), places.max(axis=0)
        assert (bottom - top + 1, right - left + 1) == (128, 64), f"{name}: as much larger as there is room"
        assert left == (8 if name != "blue" else 144)
    dark = np.argwhere(np.abs(sheet.astype(int) - 9).max(axis=-1) < 3)
    assert dark[:, 1].max() - dark[:, 1].min() + 1 == 64 and (sheet[-8:] == 255).all()
    assert (sheet[:24] < 128).any(), "the columns have names"
