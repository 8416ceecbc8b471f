"""Pictures from bytes: measure, decode, orient, resize, crop. The only user of Pillow. No torch.

Everything becomes 8-bit sRGB: EXIF orientation is applied, embedded colour profiles are (a broken one is passed
over), transparency is laid on a ground (white unless asked otherwise), palettes, 16-bit grey, CMYK and LAB are
converted, of an animation the first frame is taken. records.DECODING counts the changes of this.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from math import ceil
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, UnidentifiedImageError

from sana_tune.config.values import WHITE
from sana_tune.data.geometry import Placement, Size

# Pillow warns from 89 and refuses from 179 megapixels on. Large photographs and scans are no attack here, so
# its limit is off and this one, in pixels, stands in its place: 512 megapixels, 1.5 GB once decoded.
# Above the second number, pictures are decoded one at a time: several of them at once could take all memory.
MAX_PIXELS = 1 << 29
LARGE_PIXELS = 1 << 26
_STRIP_PIXELS = 1 << 22
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL(\.|$)")  # what matters of a file is said by its reason

# A JPEG is decoded at an eighth, a quarter or half of its size where that leaves this times the size it is resized
# to: the difference is below what is seen, and decoding takes a third of the time.
DRAFT = 1.5

# What is read, the usual first. Not all that Pillow knows: EPS files are programs, others are no pictures.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "PSD", "SGI", "PCX", "TGA")
Image.init()
_OPENED = tuple(name for name in _FORMATS if name in Image.OPEN)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What Pillow's many decoders raise on damaged files, besides OSError.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
)
# EXIF orientation → what makes the picture upright (CIPA DC-008, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_METADATA = {"exif", "xmp"}  # where a JPEG may have it
# Orientations that turn the stored picture's right edge to the left, or its lower edge to the top, once it lies right.
_MIRRORED_X = (2, 3, 6, 7)
_MIRRORED_Y = (3, 4, 7, 8)
# How files begin that people have and Pillow cannot open: what to look for and where, and what it is.
_FOREIGN = (
    (4, (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc", b"ftypmsf1"), "a HEIC picture"),
    (0, (b"\xff\x0a", b"\x00\x00\x00\x0cJXL "), "a JPEG XL picture"),
    (0, (b"%PDF",), "a PDF"),
    (0, (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML", b"<?xml", b"<svg"), "a web page or an SVG drawing"),
)
_one_large = Lock()


class BrokenImage(Exception):
    """A file that is no usable picture; `reason` completes "left out because it …"."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


class Header(NamedTuple):
    """What stands at the front of a picture's file: its upright size, and whether parts of it may be transparent."""

    size: Size
    alpha: bool


def read_header(source: bytes | BinaryIO) -> Header:
    """A picture's header: of an open file no more is read. Raises BrokenImage."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        image = _opened(file)
        alpha = image.format != "JPEG" and bool(image.has_transparency_data)
        sideways = _orientation(image, file) in _SIDEWAYS
    except _DAMAGE as error:
        raise _broken(error, file) from error
    width, height = image.size
    return Header(Size(height, width) if sideways else Size(width, height), alpha)


def measure(source: bytes | BinaryIO) -> Size:
    """The upright size of a picture, from its header alone. Raises BrokenImage."""
    return read_header(source).size


def decode(data: bytes, ground: str | None = None) -> Image.Image:
    """The upright picture as 8-bit RGB, fully decoded. ground: colour below its transparent parts, white unless set.

    Raises BrokenImage.
    """
    file = io.BytesIO(data)
    with _told(file), _opened(file) as image, _alone(image.size):
        return _decoded(image, file, ground, None)[0]


def prepare(data: bytes, placement: Placement, ground: str | None = None) -> np.ndarray:
    """The training picture: decoded, resized once by Lanczos, cropped. uint8 [H, W, 3]. Raises BrokenImage.

    ground: colour below its transparent parts, white unless set.
    """
    file = io.BytesIO(data)
    with _told(file), _opened(file) as image, _alone(image.size):
        rgb, box = _decoded(image, file, ground, placement.resize)
        if box is not None or rgb.size != placement.resize:
            rgb = rgb.resize(placement.resize, Image.Resampling.LANCZOS, box)
        return np.array(rgb.crop(placement.crop_box), dtype=np.uint8)


def mask_grid(data: bytes, placement: Placement, kind: str, factor: int) -> np.ndarray:
    """A mask where its picture is trained: 0 to 1 on the grid of the latent, float32 [H / factor, W / factor].

    kind: "mask": red 0 … 255 as 0 … 1; "segmentation": 1 where the mean of the channels is above one half. It is turned
    upright by its own EXIF, resized as its picture is whatever its size (by areas; the nearest pixel where it grows),
    cropped by the picture's box, and each place of the grid is the mean over its pixels. Numbers are taken as they
    are: no colour profile is applied; transparent parts are black. Raises BrokenImage.
    """
    file = io.BytesIO(data)
    with _told(file), _opened(file) as image, _alone(image.size):
        turn = _UPRIGHT.get(_orientation(image, file))
        image.load()
        levels = _plain_rgb(image)
        upright = np.asarray(levels if turn is None else levels.transpose(turn), dtype=np.float32) / 255
        marked = upright[..., 0] if kind == "mask" else (upright.mean(axis=-1) > 0.5).astype(np.float32)
        resized = Image.fromarray(np.ascontiguousarray(marked)).resize(placement.resize, Image.Resampling.BOX)
        part = np.asarray(resized.crop(placement.crop_box), dtype=np.float32)
    height, width = part.shape
    grid = part.reshape(height // factor, factor, width // factor, factor).mean(axis=(1, 3), dtype=np.float64)
    return grid.clip(0, 1).astype(np.float32)


def _plain_rgb(image: Image.Image) -> Image.Image:
    """The numbers of a mask as 8-bit RGB; transparent parts are black."""
    if image.mode.startswith("I;16") or image.mode == "I":
        image = _eight_bits(image)
    if image.mode == "F":
        raise BrokenImage("has floating-point pixels, whose range is unknown; save it as 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    visible = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", visible.size, (0, 0, 0, 255)), visible).convert("RGB")


def encode_png(picture: np.ndarray, *, fast: bool = False) -> bytes:
    """A uint8 picture [H, W, 3] as the bytes of a PNG file. fast: less packed, in a fraction of the time."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1 if fast else 6)
    return buffer.getvalue()


def encode_picture(picture: np.ndarray, kind: str = "png", quality: int = 90) -> bytes:
    """A uint8 picture [H, W, 3] as the bytes of a file. kind: png, webp or jpeg. quality: of the last two, 1 to 100."""
    if kind == "png":
        return encode_png(picture)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind.upper(), quality=quality)
    return buffer.getvalue()


_GAP, _INK, _FAINT, _PAPER = 8, "#222222", "#777777", "#ffffff"


def contact_sheet(
    columns: Sequence[str], rows: Sequence[tuple[str, str, Sequence[bytes | None]]], cell_px: int = 256
) -> np.ndarray:
    """Pictures side by side with their names: uint8 [H, W, 3].

    rows: the name of each, a line about it, and for each column the bytes of a picture file or None for an empty place.
    Pictures are made small to fit into cell_px; none is enlarged but by whole steps.
    """
    shown = [[None if data is None else _fitted(data, cell_px) for data in cells] for _, _, cells in rows]
    big, small = ImageFont.load_default(15), ImageFont.load_default(12)
    heights = [max((cell.height for cell in cells if cell is not None), default=0) for cells in shown]
    width = _GAP + len(columns) * (cell_px + _GAP)
    title_px, words_px = 28, 40
    sheet = Image.new("RGB", (width, title_px + sum(words_px + height + _GAP for height in heights)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    places = [_GAP + number * (cell_px + _GAP) for number in range(len(columns))]
    for place, column in zip(places, columns, strict=True):
        pen.text((place, 6), column, _INK, big)
    top = title_px
    for (name, about, _), cells, height in zip(rows, shown, heights, strict=True):
        pen.text((_GAP, top), _within(name, width - 2 * _GAP, big), _INK, big)
        pen.text((_GAP, top + 20), _within(about, width - 2 * _GAP, small), _FAINT, small)
        for place, cell in zip(places, cells, strict=True):
            if cell is not None:
                sheet.paste(cell, (place, top + words_px))
        top += words_px + height + _GAP
    return np.asarray(sheet)


def _fitted(data: bytes, cell_px: int) -> Image.Image:
    """A picture that fits into a square of cell_px: smaller, or as many whole times larger as there is room for."""
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGB")
    longest = max(picture.size)
    if longest > cell_px:
        size = tuple(max(1, round(side * cell_px / longest)) for side in picture.size)
        return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    times = cell_px // longest
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def _within(text: str, width_px: int, font: Any) -> str:
    """The text, or so much of its beginning as there is room for; letters that the font lacks as a question mark."""
    text = " ".join(text.encode("latin-1", "replace").decode("latin-1").split())
    if font.getlength(text) <= width_px:
        return text
    fits = bisect(range(len(text)), width_px, key=lambda count: font.getlength(text[:count] + "..."))
    return text[: max(0, fits - 1)].rstrip() + "..."


_Box = tuple[float, float, float, float]


def _decoded(
    image: Image.Image, file: BinaryIO, ground: str | None, wanted: Size | None
) -> tuple[Image.Image, _Box | None]:
    """The upright picture, and which part of it is the picture if not all. wanted: size that it will be resized to.

    A JPEG whose sides are no multiples of 8 has a fraction of a pixel too much at its right and lower edges when it is
    decoded at a part of its size.
    """
    orientation = _orientation(image, file)
    stored = wanted and (Size(wanted.height, wanted.width) if orientation in _SIDEWAYS else wanted)
    box = _draft(image, stored) if stored else None
    image.load()
    rgb = _converted(image, ground or WHITE)
    if box is not None:
        box = _upright_box(box, rgb.size, orientation)
    turn = _UPRIGHT.get(orientation)
    return rgb if turn is None else rgb.transpose(turn), box


def _draft(image: Image.Image, wanted: Size) -> _Box | None:
    """Have a JPEG decoded at a part of its size, if so much is not needed. Answers where the picture is in it."""
    if image.format not in ("JPEG", "MPO"):
        return None
    before = image.size
    drafted = image.draft(None, (ceil(DRAFT * wanted.width), ceil(DRAFT * wanted.height)))  # type: ignore[arg-type]
    return None if drafted is None or image.size == before else drafted[1]


def _upright_box(box: _Box, size: tuple[int, int], orientation: int) -> _Box:
    """A box (0, 0, right, lower) in a stored picture of this size, in the upright one."""
    right, lower = box[2:]
    spare_x, spare_y = size[0] - right, size[1] - lower
    if orientation in _SIDEWAYS:
        right, lower, spare_x, spare_y = lower, right, spare_y, spare_x
    left = spare_x if orientation in _MIRRORED_X else 0.0
    top = spare_y if orientation in _MIRRORED_Y else 0.0
    return (left, top, left + right, top + lower)


@contextmanager
def _alone(size: tuple[int, int]) -> Iterator[None]:
    """A large picture is decoded and made small in here while no other large one is."""
    if size[0] * size[1] <= LARGE_PIXELS:
        yield
    else:
        with _one_large:
            yield


def _opened(file: BinaryIO) -> Image.Image:
    """The picture with its header read. Raises BrokenImage for an oversized one, else what Pillow raises."""
    image = Image.open(file, formats=_OPENED)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"is {width}x{height} px; at most {MAX_PIXELS / 1e6:.0f} megapixels are read")
    if width * height == 0:
        raise BrokenImage("has no pixels")
    return image


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    """EXIF orientation 1..8; 1 when there is none or it cannot be read.

    Pillow's TIFF reader turns pictures by itself. Its PNG reader decodes the whole picture to look for metadata
    behind the pixels: only when there is some may it do so; else what stands before the pixels is all there is.
    """
    if image.format == "TIFF" or (image.format == "JPEG" and not _METADATA & image.info.keys()):
        return 1
    late = image.format == "PNG" and _metadata_behind_pixels(file)
    try:
        exif = image.getexif() if late else Image.Image.getexif(image)
        return int(exif.get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:
        return 1


def _metadata_behind_pixels(png: BinaryIO) -> bool:
    """Whether a PNG has a text or EXIF chunk after its first IDAT. Walks the chunk headers only."""
    back, place, seen_pixels = png.tell(), len(_PNG_SIGNATURE), False
    try:
        while True:
            png.seek(place)
            header = png.read(8)
            if len(header) < 8:
                return False
            length, kind = struct.unpack(">I4s", header)
            if kind == b"IDAT":
                seen_pixels = True
            elif seen_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            place += length + 12
    finally:
        png.seek(back)


def _converted(image: Image.Image, ground: str) -> Image.Image:
    """As `_as_rgb`; a large picture strip by strip, because the conversion makes several copies of what it gets."""
    width, height = image.size
    if width * height <= LARGE_PIXELS:
        return _as_rgb(image, ground)
    rows = max(1, _STRIP_PIXELS // width)
    found = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        found.paste(_as_rgb(strip, ground), (0, top))
    return found


def _as_rgb(image: Image.Image, ground: str) -> Image.Image:
    """Any Pillow mode as sRGB; transparent parts show the ground."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or image.mode == "I":
        image = _eight_bits(image)
    if image.mode == "F":
        raise BrokenImage("has floating-point pixels, whose range is unknown; save it as 8 or 16 bits")
    if not image.has_transparency_data:
        return _in_srgb(image, profile)
    visible = image.convert("RGBA")
    shown = _in_srgb(image.convert("L") if image.mode in ("L", "LA", "La") else visible.convert("RGB"), profile)
    shown.putalpha(visible.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", shown.size, ground), shown).convert("RGB")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture without transparency as sRGB; its numbers are taken for sRGB's where its profile is of no use."""
    if image.mode == "LAB":
        return _from_lab()(image)
    found = _conversion(profile) if profile else None
    usable = {"1": ("L", "RGB"), "L": ("L", "RGB"), "CMYK": ("CMYK",)}.get(image.mode, ("RGB",))
    if found is None or found[0] not in usable:
        return image.convert("RGB")
    mode, converted = found
    return converted(image.convert(mode))


@lru_cache(maxsize=16)  # of a camera or a program there is one
def _conversion(profile: bytes) -> tuple[str, Callable[[Image.Image], Image.Image]] | None:
    """What takes pictures of a profile to sRGB and the mode it starts from; None: broken, of no use, or sRGB itself.

    Perceptual intent. A profile is sRGB when no colour of a grid changes by more than one level, which is the noise
    of the conversion: such pictures are better left alone.
    """
    try:
        source = ImageCms.core.profile_frombytes(profile)
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.xcolor_space.strip())
        if mode is None:
            return None
        flags = ImageCms.Flags.NOCACHE  # a cache is not for several threads
        if mode == "L":  # lcms would interpolate between 33 greys
            flags |= ImageCms.Flags.NOOPTIMIZE
        ends = (ImageCms.ImageCmsProfile(source), ImageCms.createProfile("sRGB"))
        intent = ImageCms.Intent.PERCEPTUAL
        conversion = ImageCms.buildTransform(*ends, mode, "RGB", renderingIntent=intent, flags=flags)
        if mode == "CMYK":
            return mode, conversion.apply
        colours = _grid(mode)
        changed = conversion.apply(colours)
        before, after = (np.asarray(each).astype(int) for each in (colours.convert("RGB"), changed))
        if np.abs(before - after).max() <= 1:
            return None
        return mode, conversion.apply if mode == "RGB" else partial(_looked_up, [*changed.split()])
    except (ImageCms.PyCMSError, *_DAMAGE):
        return None


@lru_cache(maxsize=1)
def _from_lab() -> Callable[[Image.Image], Image.Image]:
    """What takes CIE L*a*b* (D50) to sRGB, perceptually."""
    ends = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
    return ImageCms.buildTransform(*ends, "LAB", "RGB", ImageCms.Intent.PERCEPTUAL, ImageCms.Flags.NOCACHE).apply


def _grid(mode: str) -> Image.Image:
    """Colours from everywhere in RGB, or all greys."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 18, dtype=np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 18, 3))


def _looked_up(table: Sequence[Image.Image], grey: Image.Image) -> Image.Image:
    """A grey picture as RGB by a table of red, green and blue, each 256 px wide."""
    return Image.merge("RGB", [grey.point(list(channel.tobytes())) for channel in table])


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, rounded: 0 → 0, 65535 → 255. With transparency where one grey is declared to be it."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise BrokenImage("has 32-bit pixels, whose range is unknown; save it as 8 or 16 bits")
    levels = ((grey + 128) // 257).astype(np.uint8)
    hidden = image.info.get("transparency")
    if not isinstance(hidden, int):
        return Image.fromarray(levels)
    return Image.fromarray(np.stack([levels, np.where(grey == hidden, 0, 255).astype(np.uint8)], axis=-1), "LA")


@contextmanager
def _told(file: BinaryIO) -> Iterator[None]:
    """Whatever Pillow raises in here about a file becomes a BrokenImage."""
    try:
        yield
    except _DAMAGE as error:
        raise _broken(error, file) from error


def _broken(error: Exception, file: BinaryIO) -> BrokenImage:
    """What went wrong in Pillow, in words that need no knowledge of it."""
    if isinstance(error, UnidentifiedImageError):
        file.seek(0)
        head = file.read(32)
        if not head:
            return BrokenImage("is an empty file")
        found = next((kind for at, marks, kind in _FOREIGN if head[at:].startswith(marks)), None)
        if found is not None:
            return BrokenImage(f"is {found}, which is not read; save it as JPEG or PNG")
        return BrokenImage("is not a picture that can be read (damaged, or an unknown format)")
    if isinstance(error, MemoryError):
        return BrokenImage("takes more memory than there is")
    return BrokenImage(f"is damaged ({error or type(error).__name__})")
