"""Rules between the settings of where pictures and captions come from: what a `type` needs, what it leaves unused."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from sana_tune.config.datasets import INHERITED, ImageDataset
from sana_tune.config.files import resolve
from sana_tune.config.schema import Config
from sana_tune.config.secrets import is_masked
from sana_tune.config.sources import KEYS_OF_TYPE
from sana_tune.errors import Problem

# What each type cannot do without, and a line that shows how it is written.
NEEDED: dict[str, dict[str, str]] = {
    "local": {"instance_data_dir": '"instance_data_dir": "pictures"'},
    "aws": {"aws_bucket_name": '"aws_bucket_name": "my-bucket"'},
    "csv": {
        "csv_file": '"csv_file": "pictures.csv"',
        "csv_cache_dir": '"csv_cache_dir": "cache/downloads", where the pictures are kept',
    },
    "huggingface": {"dataset_name": '"dataset_name": "owner/name", or a folder on disk'},
}
# The key that shows which type is meant where none is named.
SIGNS = {"aws": "aws_bucket_name", "csv": "csv_file", "huggingface": "dataset_name"}
STRATEGIES: dict[str, tuple[str, ...]] = {
    "local": ("filename", "textfile", "instanceprompt", "parquet"),
    "aws": ("filename", "textfile", "instanceprompt", "parquet"),
    "csv": ("csv", "filename", "instanceprompt"),
    "huggingface": ("huggingface", "instanceprompt"),
}
DOWNLOAD_SCHEMES = ("http", "https")


def source_is_whole(config: Config, dataset: ImageDataset) -> Problem | None:
    """Every type needs the keys that say where its pictures are."""
    for key, example in NEEDED[dataset.type].items():
        if not vars(dataset)[key]:
            meant = next((kind for kind, sign in SIGNS.items() if kind != dataset.type and vars(dataset)[sign]), None)
            fix = f'{SIGNS[meant]} is there: did you mean "type": "{meant}"?' if meant else f"add {example}"
            return Problem(f"dataset {dataset.id}: {key}", f"type {dataset.type} needs {key}, which is not set", fix)
    return None


def credentials_are_whole(config: Config, dataset: ImageDataset) -> Problem | None:
    """An access key and its secret key belong together, and neither may be the mask that stands for a secret."""
    if dataset.type != "aws":
        return None
    pair = ("aws_access_key_id", "aws_secret_access_key")
    where = f"dataset {dataset.id}"
    for key in (*pair, "aws_session_token"):
        if is_masked(vars(dataset)[key]):
            what = "the value is the mask that stands in the place of a secret"
            return Problem(f"{where}: {key}", what, "write the value itself, or {env:VAR}")
    given = [key for key in pair if vars(dataset)[key]]
    if len(given) == 1:
        what = f"{pair[0]} and {pair[1]} must be given together; found only {given[0]}"
        return Problem(where, what, "give both, or neither: the environment's credentials are used then")
    if dataset.aws_session_token and not given:
        return Problem(
            where, "aws_session_token needs the two keys that it belongs to", f"give {pair[0]} and {pair[1]}"
        )
    return None


def endpoint_is_an_address(config: Config, dataset: ImageDataset) -> Problem | None:
    """aws_endpoint_url is the address of a store: http(s)://host, without the bucket."""
    address = dataset.aws_endpoint_url
    if dataset.type != "aws" or not address:
        return None
    parts = urlsplit(address)
    if parts.scheme in DOWNLOAD_SCHEMES and parts.hostname:
        return None
    what = "aws_endpoint_url must be an address such as https://s3.example.com"
    return Problem(f"dataset {dataset.id}: aws_endpoint_url", what, "begin with https://, or leave it out for Amazon's")


def one_prefix(config: Config, dataset: ImageDataset) -> Problem | None:
    """aws_data_prefix and instance_data_dir say the same."""
    one, other = dataset.aws_data_prefix, dataset.instance_data_dir
    if dataset.type == "aws" and one and other and one.strip("/") != other.strip("/"):
        what = f"aws_data_prefix and instance_data_dir name the same folder; found {one!r} and {other!r}"
        return Problem(f"dataset {dataset.id}", what, "keep one of the two")
    return None


def captions_fit_the_source(config: Config, dataset: ImageDataset) -> Problem | None:
    """A caption strategy must be one that the type of the dataset can have."""
    where, asked = f"dataset {dataset.id}: caption_strategy", dataset.caption_strategy
    if dataset.only_instance_prompt:
        return None
    if asked not in STRATEGIES[dataset.type]:
        of_a_type = asked if asked in ("csv", "huggingface") else None
        fix = f'use "type": "{of_a_type}", or one of these' if of_a_type else "use one of these"
        what = f"type {dataset.type} takes {', '.join(STRATEGIES[dataset.type])}; found {asked}"
        return Problem(where, what, fix)
    if asked == "parquet" and dataset.parquet is None:
        return Problem(where, "parquet needs the block parquet", 'add "parquet": {"path": "captions.parquet"}')
    return None


def table_fits_the_source(config: Config, dataset: ImageDataset) -> Problem | None:
    """metadata_backend needs what it names."""
    where, backend = f"dataset {dataset.id}: metadata_backend", dataset.metadata_backend
    if backend == "huggingface" and dataset.type != "huggingface":
        return Problem(where, f"huggingface is for type huggingface; found type {dataset.type}", "use discovery")
    if backend == "parquet" and dataset.type not in ("local", "aws"):
        what = f"parquet is for types local and aws; found type {dataset.type}"
        return Problem(where, what, "remove it: this type brings its own table")
    if backend == "parquet" and dataset.parquet is None:
        return Problem(where, "parquet needs the block parquet", 'add "parquet": {"path": "captions.parquet"}')
    return None


def caches_are_folders(config: Config, dataset: ImageDataset) -> Problem | None:
    """Latents and downloads are kept in folders of this machine, or mounted there; nothing is written to a bucket."""
    data = config.data
    places = {
        f"dataset {dataset.id}: cache_dir_vae": dataset.cache_dir_vae,
        f"dataset {dataset.id}: csv_cache_dir": dataset.csv_cache_dir if dataset.type == "csv" else None,
        **{key: vars(data)[key] for key in ("cache_dir", "cache_dir_vae", "cache_dir_text")},
    }
    for where, place in places.items():
        if place and "://" in place:
            what = f"must be a folder of this machine; found the address {place}"
            return Problem(where, what, "name a folder, one on a mounted store if you like; unset = in output_dir")
    return None


SOURCE_RULES: tuple[Callable[[Config, ImageDataset], Problem | None], ...] = (
    source_is_whole,
    credentials_are_whole,
    endpoint_is_an_address,
    one_prefix,
    captions_fit_the_source,
    table_fits_the_source,
    caches_are_folders,
)


def unused_source_settings(dataset: ImageDataset) -> list[str]:
    """Notes on keys that belong to another type, and on a table that nothing asks for."""
    given = dataset.model_fields_set - set(INHERITED)
    notes = []
    for kind, keys in KEYS_OF_TYPE.items():
        found = [key for key in keys if kind != dataset.type and key in given and vars(dataset)[key] is not None]
        if found:
            verb = "has" if len(found) == 1 else "have"
            named = f"{', '.join(found)} {verb} no effect"
            notes.append(f"dataset {dataset.id}: {named}: type {dataset.type} does not use what belongs to type {kind}")
    if dataset.instance_data_dir and dataset.type in ("csv", "huggingface"):
        notes.append(f"dataset {dataset.id}: instance_data_dir has no effect with type {dataset.type}")
    if dataset.revision and dataset.type == "huggingface" and resolve(dataset.dataset_name or "").is_dir():
        notes.append(f"dataset {dataset.id}: revision has no effect: {dataset.dataset_name} is a folder here")
    uses = dataset.metadata_backend == "parquet" or dataset.caption_strategy == "parquet"
    if dataset.parquet is not None and (not uses or dataset.type not in ("local", "aws")):
        notes.append(f"dataset {dataset.id}: the block parquet has no effect: caption_strategy parquet asks for it")
    return notes
