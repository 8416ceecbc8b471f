"""Where the pictures of a dataset are, and tables of captions: the keys of each `type`, and how their blocks are read.

A dataset has the keys of every type and uses those of its own; the rules tell of the others. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from sana_tune.config.schema import Section, setting
from sana_tune.config.values import nearest


@dataclass(frozen=True)
class CaptionTable:
    """A table with one row per picture: .parquet, .jsonl, .json or .csv.

    path: the file. filename_column: names pictures, with their ending when identifier_includes_extension.
    caption_columns: each that is not empty is a variant of the caption; fallback_caption_column: when none is.
    width_column, height_column: sizes, so that `check` need not open pictures that are far away.
    """

    path: str
    filename_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    fallback_caption_column: str | None = None
    width_column: str | None = None
    height_column: str | None = None
    identifier_includes_extension: bool = False

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class HubOptions:
    """How a Hugging Face dataset is loaded. cache_dir: unset = the library's own. min_…: smaller ones are left out.

    subset: which of a repository's several datasets.
    """

    subset: str | None = None
    cache_dir: str | None = None
    num_proc: int | None = None
    min_width: int = 0
    min_height: int = 0

    def __str__(self) -> str:
        given = {key: value for key, value in asdict(self).items() if value}
        return ", ".join(f"{key} {value}" for key, value in given.items()) or "defaults"


TABLE_KEYS = (
    *("path", "filename_column", "caption_column", "fallback_caption_column", "width_column", "height_column"),
    "identifier_includes_extension",
)
HUB_KEYS = ("subset", "cache_dir", "num_proc", "filter_func", "streaming", "composite_image_config", "auto_load")
FILTER_KEYS = ("min_width", "min_height", "collection", "quality_thresholds")
_OFF = (None, "", False, "false", "False", (), [], {})
# Keys of the reference's block that cannot be had here, and what to do instead.
_NOT_HERE = {
    "streaming": "pictures are counted and hashed before training, so the dataset is downloaded once; leave it out",
    "composite_image_config": "cut composite pictures into their parts before training",
    "collection": "select the rows before training, with the datasets library's filter()",
    "quality_thresholds": "select the rows before training, with the datasets library's filter()",
}


def parse_table(value: Any) -> CaptionTable | None:
    """Read the block "parquet": {path, filename_column, caption_column …}. Raises ValueError with all that is wrong."""
    if isinstance(value, CaptionTable) or value is None or value == "":
        return value or None
    found = _block("parquet", value, TABLE_KEYS, '{"path": "captions.parquet", "caption_column": "caption"}')
    wrong: list[str] = []
    text = {key: _text(key, found.get(key), wrong) for key in TABLE_KEYS if key.endswith("_column") or key == "path"
            if key != "caption_column"}  # fmt: skip
    if not text["path"]:
        wrong.append("path must name the table")
    captions = found.get("caption_column")
    columns = [captions] if isinstance(captions, str) else captions or []
    if not isinstance(columns, (list, tuple)) or not all(isinstance(column, str) and column for column in columns):
        wrong.append(f"caption_column must be a text or a list of texts; found {_shown(captions)}")
        columns = []
    if bool(text["width_column"]) != bool(text["height_column"]):
        wrong.append("width_column and height_column must be given together")
    whole = _switch("identifier_includes_extension", found.get("identifier_includes_extension"), wrong)
    if wrong:
        raise ValueError("; ".join(wrong))
    path = text.pop("path") or ""
    return CaptionTable(path=path, caption_columns=tuple(columns), identifier_includes_extension=whole, **text)


def parse_hub(value: Any) -> HubOptions | None:
    """Read the block "huggingface": {cache_dir, num_proc, filter_func}. Raises ValueError with all that is wrong."""
    if isinstance(value, HubOptions) or value is None or value == "":
        return value or None
    found = _block("huggingface", value, HUB_KEYS, '{"filter_func": {"min_width": 512, "min_height": 512}}')
    wrong: list[str] = []
    chosen = _block("filter_func", found.get("filter_func") or {}, FILTER_KEYS, '{"min_width": 512}')
    for key, reason in _NOT_HERE.items():
        asked = {**found, **chosen}.get(key)
        off = isinstance(asked, Mapping) and asked.get("enabled") in (False, "false")
        if asked not in _OFF and not off:
            wrong.append(f"{key} cannot be used: {reason}")
    numbers = {key: _whole(key, chosen.get(key), 0, wrong) for key in ("min_width", "min_height")}
    processes = _whole("num_proc", found.get("num_proc"), 1, wrong)
    subset, cache = (_text(key, found.get(key), wrong) for key in ("subset", "cache_dir"))
    if wrong:
        raise ValueError("; ".join(wrong))
    return HubOptions(subset, cache, processes, numbers["min_width"] or 0, numbers["min_height"] or 0)


def _block(name: str, value: Any, known: Sequence[str], example: str) -> Mapping[str, Any]:
    """The block as a mapping of known keys. Raises ValueError."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is a block such as {example}; found {_shown(value)}")
    strange = [str(key) for key in value if key not in known and not str(key).startswith("$")]
    if strange:
        guess = nearest(strange[0], known)
        hint = f"did you mean {guess}? " if guess else ""
        raise ValueError(f"{name} has no {strange[0]}; {hint}known: {', '.join(known)}")
    return value


def _text(key: str, value: Any, wrong: list[str]) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    wrong.append(f"{key} must be a text; found {_shown(value)}")
    return None


def _whole(key: str, value: Any, least: int, wrong: list[str]) -> int | None:
    if value is None or value == "":
        return None
    text = str(value).strip()
    if not isinstance(value, bool) and text.isdecimal() and int(text) >= least:
        return int(text)
    wrong.append(f"{key} must be a whole number of {least} or more; found {_shown(value)}")
    return None


def _switch(key: str, value: Any, wrong: list[str]) -> bool:
    text = str(value).lower()
    if value in (None, "") or text in ("true", "false", "1", "0"):
        return text in ("true", "1")
    wrong.append(f"{key} must be true or false; found {_shown(value)}")
    return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _written_table(table: CaptionTable | None) -> dict[str, Any] | None:
    if table is None:
        return None
    values = asdict(table)
    values["caption_column"] = list(values.pop("caption_columns"))
    return values


def _written_hub(options: HubOptions | None) -> dict[str, Any] | None:
    if options is None:
        return None
    sizes = {"min_width": options.min_width, "min_height": options.min_height}
    return {
        "subset": options.subset,
        "cache_dir": options.cache_dir,
        "num_proc": options.num_proc,
        "filter_func": sizes,
    }


Table = Annotated[CaptionTable | None, BeforeValidator(parse_table), PlainSerializer(_written_table)]
Hub = Annotated[HubOptions | None, BeforeValidator(parse_hub), PlainSerializer(_written_hub)]
# The functions that read a block, and the words for what they take.
READERS: dict[Callable[[Any], Any], str] = {
    parse_table: "block {path, filename_column, caption_column …}",
    parse_hub: "block {subset, cache_dir, num_proc, filter_func}",
}


class AwsSettings(Section):
    """Pictures in a bucket of S3, or of any store that speaks its protocol."""

    aws_bucket_name: str | None = setting(None, "type aws: the bucket")
    aws_data_prefix: str | None = setting(
        None, "type aws: the folder in the bucket; unset = instance_data_dir, else the whole bucket"
    )
    aws_endpoint_url: str | None = setting(None, "type aws: address of the store; unset = Amazon's own")
    aws_region_name: str | None = setting(None, "type aws: region of the bucket; unset = the environment's")
    aws_access_key_id: str | None = setting(None, "type aws: access key; unset = the environment's credentials")
    aws_secret_access_key: str | None = setting(None, "type aws: secret key; unset = the environment's credentials")
    aws_session_token: str | None = setting(None, "type aws: token of temporary credentials")


class CsvSettings(Section):
    """Pictures behind addresses that a table lists."""

    csv_file: str | None = setting(None, "type csv: the table of addresses, a .csv or .tsv file with a header line")
    csv_cache_dir: str | None = setting(None, "type csv: folder where the downloaded pictures are kept")
    csv_url_column: str = setting("url", "type csv: column of the addresses, http or https")
    csv_caption_column: str = setting("caption", "type csv: column of the captions, for caption_strategy csv")


class HubSettings(Section):
    """Pictures in a dataset of the Hugging Face `datasets` library."""

    dataset_name: str | None = setting(None, "type huggingface: hub id, or a folder on disk")
    split: str = setting("train", "type huggingface: the split", min_length=1)
    image_column: str = setting("image", "type huggingface: column of the pictures", min_length=1)
    caption_column: str = setting(
        "caption", "type huggingface: column of the captions, texts or lists of texts", min_length=1
    )
    revision: str | None = setting(None, "type huggingface: branch, tag or commit of the hub repository")
    huggingface: Hub = setting(
        None,
        "type huggingface: {subset, cache_dir, num_proc, filter_func: {min_width, min_height}}; smaller ones are "
        "left out",
    )


class SourceSettings(AwsSettings, CsvSettings, HubSettings):
    """The keys of every type, and the table of captions that local and aws datasets may have."""

    parquet: Table = setting(
        None, "caption_strategy parquet: the table {path, filename_column, caption_column, fallback_caption_column, "
        "width_column, height_column, identifier_includes_extension}; .parquet, .jsonl, .json or .csv"
    )  # fmt: skip


KEYS_OF_TYPE: dict[str, tuple[str, ...]] = {
    "aws": tuple(AwsSettings.model_fields),
    "csv": tuple(CsvSettings.model_fields),
    "huggingface": tuple(HubSettings.model_fields),
}
