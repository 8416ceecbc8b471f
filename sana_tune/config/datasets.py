"""Every setting of multidatabackend.json: one frozen model per dataset_type, with what a dataset inherits.

A dataset's key wins over the same key of config.json; what neither names takes the default here (contracts §3).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer

from sana_tune.config.schema import DataConfig, PictureSettings, Section, setting
from sana_tune.config.values import AspectBucket, parse_aspect_buckets


def _written(buckets: tuple[AspectBucket, ...]) -> list[dict[str, float]]:
    return [bucket._asdict() for bucket in buckets]


AspectBuckets = Annotated[tuple[AspectBucket, ...], BeforeValidator(parse_aspect_buckets), PlainSerializer(_written)]


class ImageDataset(PictureSettings):
    """A folder of captioned pictures."""

    id: str = setting(..., "unique name of the dataset, used in caches and logs", min_length=1)
    type: Literal["local"] = setting("local", "where the pictures are")
    dataset_type: Literal["image"] = setting("image", "what the dataset is for")
    disabled: bool = setting(False, "skip this dataset")
    instance_data_dir: str = setting(..., "folder of the pictures, read recursively", min_length=1)
    cache_dir_vae: str | None = setting(None, "folder of the latents; unset = <cache_dir>/vae/<id>")
    metadata_backend: Literal["discovery"] = setting("discovery", "how sizes are found: by reading the pictures")
    crop: bool = setting(False, "crop to crop_aspect; false keeps the picture's own aspect")
    crop_style: Literal["center", "corner", "random"] | None = setting(
        None, "which part is kept: the center, the top left corner, or a random part; unset = random with crop, "
        "else center"
    )  # fmt: skip
    crop_aspect: Literal["square", "preserve", "closest", "random"] = setting(
        "square", "aspect of the crop: square, the picture's own, the nearest of crop_aspect_buckets, or a draw of them"
    )
    crop_aspect_buckets: AspectBuckets = setting(
        (),
        "aspect ratios (width / height) of crop_aspect closest and random: numbers, or {aspect, weight} for random; "
        "weights are shares of their sum",
    )
    minimum_aspect_ratio: float | None = setting(
        None, "pictures narrower than this (width / height) are left out", gt=0
    )
    maximum_aspect_ratio: float | None = setting(None, "pictures wider than this (width / height) are left out", gt=0)
    repeats: int = setting(0, "extra passes per epoch: each picture is seen repeats + 1 times", unit="passes", ge=0)
    probability: float = setting(1.0, "weight in the choice of the next dataset", gt=0)
    is_regularisation_data: bool = setting(
        False, "prior-preservation data; not yet: trained as ordinary data, and said"
    )


# Keys that a picture dataset takes from config.json when it does not name them itself.
INHERITED: tuple[str, ...] = tuple(PictureSettings.model_fields)


class TextDataset(Section):
    """A cache of text embeddings."""

    id: str = setting(..., "unique name of the cache", min_length=1)
    type: Literal["local"] = setting("local", "where the cache is")
    dataset_type: Literal["text_embeds"] = setting("text_embeds", "what the entry is for")
    disabled: bool = setting(False, "skip this cache")
    default: bool = setting(False, "the cache of every dataset that names none")
    cache_dir: str | None = setting(None, "folder of the embeddings; unset = <cache_dir>/text")
    write_batch_size: int = setting(128, "items per cache shard", ge=1)


DATASET_KINDS: dict[str, type[Section]] = {"image": ImageDataset, "text_embeds": TextDataset}


def inherit(entry: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    """A picture dataset's raw entry with what it inherits from config.json filled in."""
    settings = data.model_dump()
    inherited = {key: settings[key] for key in INHERITED if settings[key] is not None}
    return {**inherited, **entry}
