"""Every setting of multidatabackend.json: one frozen model per dataset_type, with what a dataset inherits.

A dataset's key wins over the same key of config.json; what neither names takes the default here (contracts §3).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer

from sana_tune.config.caption_edits import CaptionShuffle, parse_caption_filters, parse_caption_shuffle
from sana_tune.config.schema import DataConfig, PictureSettings, Section, setting
from sana_tune.config.sources import SourceSettings
from sana_tune.config.values import AspectBucket, parse_aspect_buckets


def _written(buckets: tuple[AspectBucket, ...]) -> list[dict[str, float]]:
    return [bucket._asdict() for bucket in buckets]


AspectBuckets = Annotated[tuple[AspectBucket, ...], BeforeValidator(parse_aspect_buckets), PlainSerializer(_written)]


def _written_shuffle(shuffle: CaptionShuffle | None) -> dict[str, Any] | None:
    return None if shuffle is None else {"enable": True, **asdict(shuffle)}


Shuffle = Annotated[CaptionShuffle | None, BeforeValidator(parse_caption_shuffle), PlainSerializer(_written_shuffle)]
Filters = Annotated[tuple[str, ...], BeforeValidator(parse_caption_filters)]


class ImageDataset(PictureSettings, SourceSettings):
    """Captioned pictures: in a folder, in a bucket, behind addresses, or in a Hugging Face dataset."""

    id: str = setting(..., "unique name of the dataset, used in caches and logs", min_length=1)
    type: Literal["local", "aws", "csv", "huggingface"] = setting(
        "local", "where the pictures are: a folder, a bucket of S3, a table of addresses, a Hugging Face dataset"
    )
    dataset_type: Literal["image"] = setting("image", "what the dataset is for")
    disabled: bool = setting(False, "skip this dataset")
    instance_data_dir: str = setting("", "folder of the pictures, read recursively; type local needs it")
    cache_dir_vae: str | None = setting(None, "folder of the latents; unset = <cache_dir>/vae/<id>")
    metadata_backend: Literal["discovery", "parquet", "huggingface"] = setting(
        "discovery", "what is known of pictures: read from them alone (discovery), or a table or dataset beside them"
    )
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
    probability: float = setting(1.0, "weight in the choice of the next dataset; 0 = the dataset is left out", ge=0)
    max_num_samples: int | None = setting(
        None, "take so many pictures at most, always the same by seed and id; 0 or unset = all", unit="pictures", ge=0
    )
    start_epoch: int = setting(1, "the first epoch that shows it", unit="epochs", ge=0)
    start_step: int = setting(0, "the first optimizer step that shows it; 0 = from the start", unit="steps", ge=0)
    end_epoch: int | None = setting(None, "the last epoch that shows it; 0 or unset = no end", unit="epochs", ge=0)
    end_step: int | None = setting(
        None, "the last optimizer step that shows it; 0 or unset = no end", unit="steps", ge=0
    )
    caption_shuffle: Shuffle = setting(
        None, "more variants of each caption, its parts in other orders: {enable, count, seed, split_on, "
        "position_start, include_original}; one variant is drawn per visit"
    )  # fmt: skip
    is_regularisation_data: bool = setting(
        False, "prior-preservation data: its loss is told apart, and regularisation_target says what it learns"
    )
    text_embeds: str | None = setting(None, "id of the text cache of its captions; unset = the default one")
    conditioning_data: str | None = setting(
        None, "id of its masks, an entry with dataset_type conditioning; unset = every place of a picture counts"
    )

    @property
    def source(self) -> str:
        """Where its pictures are, for messages; without secrets."""
        if self.type == "aws":
            return f"s3://{self.aws_bucket_name}/{self.aws_data_prefix or self.instance_data_dir}"
        named = {"csv": self.csv_file, "huggingface": f"{self.dataset_name} ({self.split})"}
        return named.get(self.type) or self.instance_data_dir


class EvalDataset(ImageDataset):
    """Pictures that are held out: cached like the others, never trained on."""

    dataset_type: Literal["eval"] = setting("eval", "what the dataset is for")  # pyright: ignore[reportIncompatibleVariableOverride]


class ConditioningDataset(Section):
    """Masks of the pictures of another dataset, under the same names. Sizes and crops are those of the pictures."""

    id: str = setting(..., "unique name of the masks, which conditioning_data names", min_length=1)
    type: Literal["local"] = setting("local", "where the masks are: a folder on this machine")
    dataset_type: Literal["conditioning"] = setting("conditioning", "what the entry is for")
    conditioning_type: Literal["mask", "segmentation"] = setting(
        "mask", "mask: red 0 to 255 weighs the loss from 0 to 1; segmentation: what is brighter than half counts"
    )
    disabled: bool = setting(False, "skip these masks")
    instance_data_dir: str = setting(..., "folder of the masks, named like their pictures", min_length=1)


# Keys that a picture dataset takes from config.json when it does not name them itself.
INHERITED: tuple[str, ...] = tuple(PictureSettings.model_fields)


class TextDataset(Section):
    """A cache of text embeddings."""

    id: str = setting(..., "unique name of the cache", min_length=1)
    type: Literal["local"] = setting("local", "where the cache is: a folder on this machine")
    dataset_type: Literal["text_embeds"] = setting("text_embeds", "what the entry is for")
    disabled: bool = setting(False, "skip this cache")
    default: bool = setting(False, "the cache of every dataset that names none")
    cache_dir: str | None = setting(None, "folder of the embeddings; unset = <cache_dir>/text")
    write_batch_size: int = setting(128, "items per cache shard", ge=1)
    compress_disk_cache: bool | None = setting(None, "pack them on disk, without loss; unset = as config.json says")
    text_cache_disable: bool | None = setting(None, "keep nothing: encode at every visit; unset = as config.json says")
    text_cache_ondemand: bool | None = setting(None, "encode when first needed; unset = as config.json says")
    caption_filter_list: Filters = setting(
        (), "what is taken out of captions before they are encoded: filters, or a .txt or .json file of them; "
        "s/pattern/replacement/ replaces, other text is removed; prompts are not filtered"
    )  # fmt: skip


DATASET_KINDS: dict[str, type[Section]] = {
    "image": ImageDataset,
    "eval": EvalDataset,
    "conditioning": ConditioningDataset,
    "text_embeds": TextDataset,
}


def inherit(entry: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    """A picture dataset's raw entry with what it inherits from config.json filled in."""
    settings = data.model_dump()
    inherited = {key: settings[key] for key in INHERITED if settings[key] is not None}
    return {**inherited, **entry}
