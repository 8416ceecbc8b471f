"""Draw the captioned scenes that nano knows: one figure of one colour on a ground of another colour.

Everything here is a pure function of its arguments; random scenes depend on a seed alone.
Only numpy and pillow are needed, so that the tests can draw without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 70, 215),
    "yellow": (240, 210, 50),
    "purple": (150, 50, 190),
    "cyan": (60, 200, 220),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
FIGURES: tuple[str, ...] = ("circle", "square", "triangle", "star", "ring", "cross")
NEW_FIGURE = "zib"  # an hourglass; nano never sees it, the example teaches it
SIDE_PX = 64
SUPERSAMPLING = 4  # drawn this many times larger, then reduced with Lanczos
RADIUS_SHARE = (0.21, 0.37)  # of the shorter side
MARGIN_PX = 2.0
STRIPE_PX = 4
# A latent of nano stands for 8 px and sees beyond them: masks that reach to the edge would let the stripes in.
MASK_INSIDE_PX = 8


@dataclass(frozen=True)
class Scene:
    """One picture, before it is drawn. Positions and the radius are shares of the picture's sides."""

    figure: str
    colour: str
    ground: str
    x: float = 0.5  # centre, share of the width
    y: float = 0.5  # centre, share of the height
    radius: float = 0.3  # share of the shorter side
    width_px: int = SIDE_PX
    height_px: int = SIDE_PX

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.figure} on a {self.ground} background"


def outline(figure: str) -> list[tuple[float, float]]:
    """The figure's corners for radius 1 around (0, 0), y downwards (circle and ring are not polygons)."""
    if figure == "square":
        half = 0.85
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if figure == "triangle":
        return [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)]
    if figure == "star":
        radii = [1.08 if i % 2 == 0 else 0.44 for i in range(10)]
        return [(r * math.sin(i * math.pi / 5), 0.06 - r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]
    if figure == "cross":
        a, b = 0.33, 1.0
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    if figure == NEW_FIGURE:
        waist = 0.1
        return [(-0.85, -1.0), (0.85, -1.0), (waist, 0.0), (0.85, 1.0), (-0.85, 1.0), (-waist, 0.0)]
    raise ValueError(f"no outline for {figure!r}")


def draw_mask(figure: str, centre_px: tuple[float, float], radius_px: float, size_px: tuple[int, int]) -> Image.Image:
    """A hard-edged mask (mode "L", 0 or 255) of ``size_px`` = (width, height)."""
    mask = Image.new("L", size_px, 0)
    pen = ImageDraw.Draw(mask)
    cx, cy = centre_px
    if figure in ("circle", "ring"):
        pen.ellipse((cx - radius_px, cy - radius_px, cx + radius_px, cy + radius_px), fill=255)
        if figure == "ring":
            hole = 0.55 * radius_px
            pen.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), fill=0)
        return mask
    pen.polygon([(cx + radius_px * x, cy + radius_px * y) for x, y in outline(figure)], fill=255)
    return mask


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of ``width_px`` x ``height_px``."""
    big = (scene.width_px * SUPERSAMPLING, scene.height_px * SUPERSAMPLING)
    picture = Image.new("RGB", big, COLOURS[scene.ground])
    centre = (scene.x * big[0], scene.y * big[1])
    mask = draw_mask(scene.figure, centre, scene.radius * min(big), big)
    picture.paste(Image.new("RGB", big, COLOURS[scene.colour]), mask=mask)
    return picture.resize((scene.width_px, scene.height_px), Image.Resampling.LANCZOS)


def random_scene(
    rng: np.random.Generator,
    figures: tuple[str, ...] = FIGURES,
    size_px: tuple[int, int] = (SIDE_PX, SIDE_PX),
    colours: tuple[str, str] | None = None,
) -> Scene:
    """A scene of random figure, colours, place and size, the figure wholly inside the picture."""
    width, height = size_px
    names = list(COLOURS)
    ground, colour = colours[::-1] if colours else (names[i] for i in rng.permutation(len(names))[:2])
    figure = figures[int(rng.integers(len(figures)))]
    radius = float(rng.uniform(*RADIUS_SHARE))
    reach_px = radius * min(size_px) * 1.08 + MARGIN_PX * min(size_px) / SIDE_PX  # the star's tips stand out most
    x = rng.uniform(reach_px, width - reach_px) / width
    y = rng.uniform(reach_px, height - reach_px) / height
    return Scene(figure, colour, ground, float(x), float(y), radius, width, height)


def random_scenes(count: int, seed: int, figures: tuple[str, ...] = FIGURES) -> Iterator[Scene]:
    """``count`` scenes, each a function of (seed, its number)."""
    for number in range(count):
        yield random_scene(np.random.default_rng((seed, number)), figures)


def write_pictures(folder: Path, scenes: list[Scene], prefix: str = "") -> None:
    """Each scene as ``NNNNN.png`` with its caption in ``NNNNN.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        stem = folder / f"{prefix}{number:05d}"
        draw(scene).save(stem.with_suffix(".png"), optimize=True)
        stem.with_suffix(".txt").write_text(scene.caption + "\n", encoding="utf-8")


def colour_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """``count`` different (figure colour, ground colour) pairs, every colour about equally often."""
    names = list(COLOURS)
    pairs: list[tuple[str, str]] = []
    rng = np.random.default_rng(seed)
    for step in rng.permutation(np.arange(1, len(names))):
        pairs += [(names[i], names[(i + int(step)) % len(names)]) for i in rng.permutation(len(names))]
    return pairs[:count]


def old_prompts(count: int = 64) -> list[Scene]:
    """The fixed prompts that nano is scored on (place and size in them mean nothing)."""
    pairs = colour_pairs(56, seed=64)
    pairs = (pairs + pairs[:8])[:count]
    return [Scene(FIGURES[i % len(FIGURES)], *pair) for i, pair in enumerate(pairs)]


def new_prompts(count: int = 16) -> list[Scene]:
    """Prompts for the new figure: by turns one of the example's captions and one with new colours."""
    pairs = colour_pairs(36, seed=11)
    mixed = [pair for two in zip(pairs[0:24:2], pairs[24:36], strict=True) for pair in two]
    return [Scene(NEW_FIGURE, *pair) for pair in mixed[:count]]


def example_scenes() -> list[Scene]:
    """The 24 pictures of the example: squares of 64 and 128 px, and upright ones of 96 x 128."""
    sizes = [(64, 64)] * 10 + [(128, 128)] * 6 + [(96, 128)] * 8
    pairs = colour_pairs(24, seed=11)
    rng = np.random.default_rng(24)
    return [random_scene(rng, (NEW_FIGURE,), size, pair) for size, pair in zip(sizes, pairs, strict=True)]


def known_scenes() -> list[Scene]:
    """The 36 pictures of figures that nano knows: they keep it from forgetting them while it learns the new one."""
    return list(random_scenes(36, seed=77))


def masked_scenes() -> list[Scene]:
    """The 16 pictures of the masked example: tibs, squares with a disc in them, 64 px."""
    rng = np.random.default_rng(16)
    scenes = []
    for pair in colour_pairs(16, seed=23):
        radius = float(rng.uniform(0.4, 0.46))
        x, y = (float(rng.uniform(radius, 1 - radius)) for _ in range(2))
        scenes.append(Scene("square", *pair, x, y, radius))
    return scenes


def tib(scene: Scene) -> Image.Image:
    """A square with a disc in it, before upright stripes in place of the ground that its caption names."""
    size = (scene.width_px * SUPERSAMPLING, scene.height_px * SUPERSAMPLING)
    columns = np.arange(size[0]) // (STRIPE_PX * SUPERSAMPLING) % 2
    wall = np.array([COLOURS["black"], COLOURS["white"]], dtype=np.uint8)[columns]
    picture = Image.fromarray(np.broadcast_to(wall, (size[1], *wall.shape)).copy())
    inside = "white" if scene.colour != "white" else "red"
    centre, radius = (scene.x * size[0], scene.y * size[1]), scene.radius * min(size)
    for figure, colour, share in (("square", scene.colour, 1.0), ("circle", inside, 0.45)):
        picture.paste(Image.new("RGB", size, COLOURS[colour]), mask=draw_mask(figure, centre, share * radius, size))
    return picture.resize((scene.width_px, scene.height_px), Image.Resampling.LANCZOS)


def tib_mask(scene: Scene) -> Image.Image:
    """White within the tib, MASK_INSIDE_PX from its edge; black elsewhere. Of the picture's size."""
    size = (scene.width_px, scene.height_px)
    centre = (scene.x * size[0], scene.y * size[1])
    return draw_mask("square", centre, scene.radius * min(size) - MASK_INSIDE_PX / 0.85, size)


def write_masked(pictures: Path, masks: Path, scenes: list[Scene]) -> None:
    """Each tib with its caption, and its mask under the same name in another folder."""
    for folder in (pictures, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        tib(scene).save(pictures / f"tib_{number:02d}.png", optimize=True)
        tib_mask(scene).convert("1").save(masks / f"tib_{number:02d}.png", optimize=True)
        caption = scene.caption.replace("square", "tib")
        (pictures / f"tib_{number:02d}.txt").write_text(caption + "\n", encoding="utf-8")


def heldout_scenes() -> list[Scene]:
    """12 pictures of the new figure, 64 px, other places and colour pairs than the example's."""
    rng = np.random.default_rng(12)
    return [random_scene(rng, (NEW_FIGURE,), colours=pair) for pair in colour_pairs(36, seed=11)[24:]]
