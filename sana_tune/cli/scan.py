"""A quick look at a folder of pictures for the wizard: how many, how large, with which captions. No torch.

It lists every file, but reads the heads of at most MEASURED pictures, so that an answer comes at once; the full
account is `check`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sana_tune.data.captions import CaptionRules, Missing, caption_key, captions_of
from sana_tune.data.geometry import Size
from sana_tune.data.sources import PICTURE_ENDINGS, Listing, sort_out
from sana_tune.errors import Problem, UserError
from sana_tune.store import FolderStore

MEASURED = 400  # pictures whose size is looked at, spread evenly over the folder
READ_CAPTIONS = 50  # caption files that are read, in order, to find examples
EXAMPLES = 2
CAPTION_WORDS = 3  # a name with fewer words is a name

# How cameras, phones, browsers and datasets name files: such a name says nothing about the picture.
_NAMING = re.compile(
    r"(img|image|dsc[nf]?|dscn|pxl|mvimg|gopr|screen ?shot|screenshot|whatsapp|photo|picture|scan|untitled|download|"
    r"snapchat|capture|frame|signal|received|fb img|vlcsnap)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]+")
_WITHOUT_BLANKS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]")  # scripts that write no blanks
_CAPTION_LETTERS = 6  # of such a script


@dataclass(frozen=True)
class Scan:
    """What a folder holds.

    folder: as it is to be written in the file. pictures: files that are pictures by their ending.
    sizes: upright sizes, px, of those that were measured, in order. broken: (key, reason) of those that cannot be read.
    with_text: pictures with a .txt file beside them. with_name: pictures whose file name reads like a caption.
    texts, names: up to two captions found in files and in names.
    """

    folder: str
    pictures: int
    sizes: tuple[Size, ...] = ()
    broken: tuple[tuple[str, str], ...] = ()
    with_text: int = 0
    with_name: int = 0
    texts: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def median(self) -> Size:
        """The picture in the middle by area."""
        return sorted(self.sizes, key=lambda size: size.area)[len(self.sizes) // 2]

    def lines(self) -> list[str]:
        """What was found, for the screen."""
        by_area = sorted(self.sizes, key=lambda size: size.area)
        some = f", {len(self.sizes)} of them measured" if len(self.sizes) + len(self.broken) < self.pictures else ""
        spread = f"{by_area[0]} to {by_area[-1]} px, most about {self.median}"
        found = [
            f"{self.pictures} {'picture' if self.pictures == 1 else 'pictures'}{some}: "
            + (f"all {by_area[0]} px" if by_area[0] == by_area[-1] else spread),
            f"captions: {self.with_text} have a .txt file, {self.with_name} a file name that reads like one",
        ]
        if self.broken:
            shown = "; ".join(f"{key} {reason}" for key, reason in self.broken[:3])
            more = f"; and {len(self.broken) - 3} more" if len(self.broken) > 3 else ""
            found.append(f"cannot be read and will be left out: {shown}{more}")
        return found


def scan(folder: str, root: Path | None = None, *, measured: int = MEASURED) -> Scan:
    """Look at a folder. Raises UserError when it is not there, cannot be read, or holds no usable picture.

    root: where it is, when `folder` is written with placeholders.
    """
    store = FolderStore(root or folder)
    listing = sort_out(store.list())
    if not listing.pictures:
        raise UserError(_no_pictures(folder, listing))
    sizes, broken = _measure(store, [entry.key for entry in _spread(listing.pictures, measured)])
    if not sizes:
        shown = "; ".join(f"{key} {reason}" for key, reason in broken[:3])
        what = f"none of the {len(broken)} pictures looked at can be read: {shown}"
        raise UserError(Problem(folder, what, "see the reasons above, or name another folder"))
    keys = [entry.key for entry in listing.pictures]
    there = {entry.key: entry for entry in listing.captions}
    captioned = [key for key in keys if caption_key(key) in there]
    named = names_that_read_like_captions(keys)
    return Scan(
        folder=folder,
        pictures=len(keys),
        sizes=tuple(sizes),
        broken=tuple(broken),
        with_text=len(captioned),
        with_name=len(named),
        texts=tuple(_texts(store, captioned[:READ_CAPTIONS]))[:EXAMPLES],
        names=tuple(named.values())[:EXAMPLES],
    )


def names_that_read_like_captions(keys: Sequence[str]) -> Mapping[str, str]:
    """Key → caption of the pictures whose file name is one. Names that differ in a number alone are a numbering."""
    found: dict[str, str] = {}
    shapes: set[str] = set()
    for key in keys:
        text = PurePosixPath(key).stem.replace("_", " ").strip()
        if reads_like_a_caption(text):
            found[key] = text
            shapes.add(re.sub(r"[\d\W]+", " ", text).strip().lower())
    return found if len(shapes) * 2 >= len(found) else {}


def reads_like_a_caption(text: str) -> bool:
    """Whether a file name, underscores as blanks, says what is in the picture."""
    if _NAMING.match(text):
        return False
    letters = sum(character.isalpha() or character.isspace() for character in text)
    if letters * 3 < len(text) * 2:  # dates and hashes
        return False
    return len(_WORD.findall(text)) >= CAPTION_WORDS or len(_WITHOUT_BLANKS.findall(text)) >= _CAPTION_LETTERS


def _no_pictures(folder: str, listing: Listing) -> Problem:
    others = len(listing.captions) + len(listing.others)
    what = f"holds no pictures ({others} other files)" if others else "is empty"
    endings = " ".join(sorted(PICTURE_ENDINGS))
    return Problem(folder, f"the folder {what}", f"put pictures there ({endings}), or name another folder")


def _spread(entries: Sequence, count: int) -> Sequence:
    """At most `count` of the entries, evenly over all."""
    if len(entries) <= count:
        return entries
    return [entries[number * len(entries) // count] for number in range(count)]


def _measure(store: FolderStore, keys: Sequence[str]) -> tuple[list[Size], list[tuple[str, str]]]:
    """Sizes of the pictures that can be read, and (key, reason) of the others."""
    from sana_tune.data.images import BrokenImage, measure  # Pillow and numpy: not before they are needed

    sizes: list[Size] = []
    broken: list[tuple[str, str]] = []
    for key in keys:
        try:
            with store.open(key) as file:
                sizes.append(measure(file))
        except BrokenImage as error:
            broken.append((key, error.reason))
        except UserError as error:
            broken.append((key, error.problems[0].what))
    return sizes, broken


def _texts(store: FolderStore, keys: Sequence[str]) -> Iterator[str]:
    """One caption of each picture that has a usable caption file; each text once."""
    seen: set[str] = set()
    rules = CaptionRules(strategy="textfile", case="keep")
    for key in keys:
        found = captions_of(key, store.read, rules)
        if not isinstance(found, Missing) and found[0] not in seen:
            seen.add(found[0])
            yield found[0]


def find_pictures(cwd: Path) -> str | None:
    """A folder below the working directory that is likely meant: one with a usual name that holds pictures."""
    for name in ("pictures", "images", "photos", "dataset", "data", "train", "datasets"):
        folder = cwd / name
        if not folder.is_dir():
            continue
        if _holds_pictures(folder):
            return name
        for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
            if _holds_pictures(inner):
                return f"{name}/{inner.name}"
    return None


def _holds_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in PICTURE_ENDINGS and path.is_file() for path in folder.iterdir())
