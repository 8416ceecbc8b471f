"""Colour profiles made by hand, and what they mean in plain formulas (ICC.1:2001-04; IEC 61966-2-1)."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
from PIL import ImageCms

D50 = np.array([0.9642, 1.0, 0.8249])
# RGB → XYZ under D50, columns red, green, blue (Bradford; Lindbloom).
SRGB = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
ADOBE_RGB = np.array(
    [[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197], [0.0194811, 0.0608902, 0.7448387]]
)
ADOBE_GAMMA = 563 / 256


def matrix_profile(matrix: np.ndarray, gamma: float) -> bytes:
    """A display profile of three primaries (columns, XYZ under D50) and one gamma."""
    tags = {f"{name}XYZ": _xyz(matrix[:, column]) for column, name in enumerate("rgb")}
    tags.update({f"{name}TRC": _gamma(gamma) for name in "rgb"})
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    """A profile of grey pictures."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {"kTRC": _gamma(gamma)})


def ink_profile(perceptual: np.ndarray, colorimetric: np.ndarray) -> bytes:
    """A CMYK profile from the Lab colours [2, 2, 2, 2, 3] of no and all of each ink, by rendering intent."""
    return _profile(b"prtr", b"CMYK", b"Lab ", {"A2B0": _inks(perceptual), "A2B1": _inks(colorimetric)})


def swapped_profile() -> bytes:
    """sRGB with the primaries of red and blue changed over."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    table, rest = data[: 128 + 4 + 12 * struct.unpack(">I", data[128:132])[0]], len(data)
    changed = table.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")
    assert changed != table and rest > len(table)
    return changed + data[len(table) :]


def srgb_of_xyz(xyz: np.ndarray) -> np.ndarray:
    """XYZ under D50 [..., 3] as sRGB levels, unrounded and cut to 0..255."""
    linear = np.clip(xyz @ np.linalg.inv(SRGB).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def xyz_of_lab(lab: np.ndarray) -> np.ndarray:
    """CIE Lab [..., 3] as XYZ under D50."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    return D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))


def _profile(kind: bytes, space: bytes, connection: bytes, tags: Mapping[str, bytes]) -> bytes:
    all_tags = {"wtpt": _xyz(D50), **tags}
    place = 128 + 4 + 12 * len(all_tags)
    table, bodies = struct.pack(">I", len(all_tags)), b""
    for name, body in all_tags.items():
        table += struct.pack(">4sII", name.encode(), place + len(bodies), len(body))
        bodies += body + b"\0" * (-len(body) % 4)
    header = struct.pack(">I4sI4s4s4s", place + len(bodies), b"none", 0x02100000, kind, space, connection)
    header += struct.pack(">6H4s", 2000, 1, 1, 0, 0, 0, b"acsp") + b"\0" * 28 + _xyz(D50)[8:]
    return header.ljust(128, b"\0") + table + bodies


def _fixed(numbers: np.ndarray) -> bytes:
    return b"".join(struct.pack(">i", round(float(number) * 65536)) for number in numbers.reshape(-1))


def _xyz(numbers: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(numbers)


def _gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def _inks(lab: np.ndarray) -> bytes:
    """A lut8 table: four inks in, Lab out, two points an axis."""
    straight = bytes(range(256))
    levels = np.stack([lab[..., 0] * 255 / 100, lab[..., 1] + 128, lab[..., 2] + 128], axis=-1)
    head = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _fixed(np.eye(3))
    return head + straight * 4 + np.round(levels).astype(np.uint8).tobytes() + straight * 3
