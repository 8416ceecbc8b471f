"""Pictures from bytes: measure, decode, orient, resize, crop. The only user of Pillow. No torch.

Everything becomes 8-bit sRGB: EXIF orientation is applied, embedded colour profiles are (a broken one is passed
over), transparency is laid on white, palettes, 16-bit grey and CMYK are converted, of an animation the first frame is
taken. records.DECODING counts the changes of this.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from sana_tune.data.geometry import Placement, Size

# Pillow warns from 89 and refuses from 179 megapixels on. Large photographs and scans are no attack here, so
# its limit is off and this one, in pixels, stands in its place: 512 megapixels, 1.5 GB once decoded.
MAX_PIXELS = 1 << 29
Image.MAX_IMAGE_PIXELS = None

_WHITE = (255, 255, 255, 255)
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


class BrokenImage(Exception):
    """A file that is no usable picture; `reason` completes "left out because it …"."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


def measure(source: bytes | BinaryIO) -> Size:
    """The upright size of a picture, from its header alone: of an open file no more is read. Raises BrokenImage."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with _opened(file) as image:
            width, height = image.size
            return Size(height, width) if _orientation(image, file) in _SIDEWAYS else Size(width, height)
    except _DAMAGE as error:
        raise _broken(error) from error


def decode(data: bytes) -> Image.Image:
    """The upright picture as 8-bit RGB, fully decoded. Raises BrokenImage."""
    file = io.BytesIO(data)
    try:
        with _opened(file) as image:
            turn = _UPRIGHT.get(_orientation(image, file))
            image.load()
            rgb = _as_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)
    except _DAMAGE as error:
        raise _broken(error) from error


def prepare(data: bytes, placement: Placement) -> np.ndarray:
    """The training picture: decoded, resized once by Lanczos, cropped. uint8 [H, W, 3]. Raises BrokenImage."""
    image = decode(data)
    if image.size != placement.resize:
        image = image.resize(placement.resize, Image.Resampling.LANCZOS)
    return np.array(image.crop(placement.crop_box), dtype=np.uint8)


def encode_png(picture: np.ndarray) -> bytes:
    """A uint8 picture [H, W, 3] as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _opened(file: BinaryIO) -> Image.Image:
    """The picture with its header read. Raises BrokenImage for an oversized one, else what Pillow raises."""
    image = Image.open(file)
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
    if image.format == "TIFF":
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


def _as_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as sRGB; transparent parts show white."""
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
    return Image.alpha_composite(Image.new("RGBA", shown.size, _WHITE), shown).convert("RGB")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture without transparency as sRGB; its numbers are taken for sRGB's where its profile is of no use."""
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
    """16-bit grey as 8-bit grey, rounded: 0 → 0, 65535 → 255."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise BrokenImage("has 32-bit pixels, whose range is unknown; save it as 8 or 16 bits")
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8))


def _broken(error: Exception) -> BrokenImage:
    """What went wrong in Pillow, in words that need no knowledge of it."""
    if isinstance(error, UnidentifiedImageError):
        return BrokenImage("is not a picture that can be read (damaged, empty, or an unknown format)")
    return BrokenImage(f"is damaged ({error or type(error).__name__})")
