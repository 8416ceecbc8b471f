"""Every setting of multidatabackend.json: one frozen model per dataset_type, with what a dataset inherits.

A dataset's key wins over the same key of config.json; what neither names takes the default here (contracts §3).
"""

from __future__ import annotations

from typing import Any, Literal

from sana_tune.config.schema import CaptionStrategy, DataConfig, Section, setting

# Keys that a picture dataset takes from config.json when it does not name them itself.
INHERITED: tuple[str, ...] = (
    "train_batch_size",
    "resolution",
    "resolution_type",
    "minimum_image_size",
    "maximum_image_size",
    "target_downsample_size",
    "caption_strategy",
    "instance_prompt",
    "prepend_instance_prompt",
    "only_instance_prompt",
    "disable_multiline_split",
    "missing_caption",
    "small_buckets",
    "vae_batch_size",
    "write_batch_size",
)


class ImageDataset(Section):
    """A folder of captioned pictures."""

    id: str = setting(..., "unique name of the dataset, used in caches and logs", min_length=1)
    type: Literal["local"] = setting("local", "where the pictures are")
    dataset_type: Literal["image"] = setting("image", "what the dataset is for")
    disabled: bool = setting(False, "skip this dataset")
    instance_data_dir: str = setting(..., "folder of the pictures, read recursively", min_length=1)
    cache_dir_vae: str | None = setting(None, "folder of the latents; unset = <cache_dir>/vae/<id>")
    metadata_backend: Literal["discovery"] = setting("discovery", "how sizes are found: by reading the pictures")
    train_batch_size: int = setting(1, "pictures per micro-batch", ge=1)
    resolution: float = setting(1024, "size of training pictures, px (pixel_area)", gt=0)
    resolution_type: Literal["pixel_area"] = setting("pixel_area", "pixel_area: area of resolution² px")
    minimum_image_size: float | None = setting(None, "smaller pictures are left out; px (pixel_area)", ge=0)
    maximum_image_size: float | None = setting(None, "with crop: larger ones go through target_downsample_size", ge=0)
    target_downsample_size: float | None = setting(None, "with crop: size before the crop of larger pictures", ge=0)
    crop: bool = setting(False, "crop to crop_aspect; false keeps the picture's own aspect")
    crop_style: Literal["center"] = setting("center", "which part is kept")
    crop_aspect: Literal["square"] = setting("square", "aspect of the crop")
    repeats: int = setting(0, "extra passes per epoch: each picture is seen repeats + 1 times", ge=0)
    probability: float = setting(1.0, "weight in the choice of the next dataset", gt=0)
    caption_strategy: CaptionStrategy = setting("filename", "where captions come from")
    instance_prompt: str | tuple[str, ...] | None = setting(None, "the caption of instanceprompt")
    prepend_instance_prompt: bool = setting(False, "put instance_prompt before every caption")
    only_instance_prompt: bool = setting(False, "use instance_prompt in place of every caption")
    disable_multiline_split: bool = setting(False, "a caption file is one caption, not one per line")
    missing_caption: Literal["error", "skip", "empty"] = setting("error", "what to do with a picture without caption")
    small_buckets: Literal["fill"] = setting("fill", "a bucket smaller than a batch is filled from itself")
    vae_batch_size: int = setting(4, "pictures per VAE encode", ge=1)
    write_batch_size: int = setting(128, "items per cache shard", ge=1)
    is_regularisation_data: bool = setting(
        False, "prior-preservation data; not yet: trained as ordinary data, and said"
    )


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
