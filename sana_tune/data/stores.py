"""Which store a dataset's pictures are in, and what its tables say. No torch; libraries are loaded when needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from sana_tune.config.datasets import ImageDataset
from sana_tune.data.sources import Listing, sort_out
from sana_tune.data.tables import TableCaptions, captions_of_table
from sana_tune.store import FolderStore, Store

TABLES = ("parquet", "csv", "huggingface")  # caption strategies whose captions are in a table


@runtime_checkable
class Captioned(Protocol):
    """A store whose table has captions beside its pictures."""

    def captions(self) -> TableCaptions:
        """The captions of every picture. UserError when the table has no such column."""
        ...


def open_store(dataset: ImageDataset) -> Store:
    """Where the pictures of a dataset are. Nothing is read or asked yet."""
    if dataset.type == "aws":
        from sana_tune.data.remote_s3 import Place, S3Store

        place = Place(
            bucket=dataset.aws_bucket_name or "",
            prefix=dataset.aws_data_prefix or dataset.instance_data_dir,
            endpoint=dataset.aws_endpoint_url,
            region=dataset.aws_region_name,
            key=dataset.aws_access_key_id,
            secret=dataset.aws_secret_access_key,
            token=dataset.aws_session_token,
            connections=dataset.aws_max_pool_connections,
        )
        return S3Store(place)
    if dataset.type == "csv":
        from sana_tune.data.remote_http import AddressStore

        return AddressStore(
            dataset.csv_file or "", dataset.csv_cache_dir or "", dataset.csv_url_column, dataset.csv_caption_column
        )
    if dataset.type == "huggingface":
        from sana_tune.data.remote_hub import HubStore

        return HubStore(
            dataset.dataset_name or "",
            dataset.split,
            dataset.image_column,
            dataset.caption_column,
            dataset.revision,
            dataset.huggingface,
        )
    return FolderStore(dataset.instance_data_dir)


def open_stores(datasets: Iterable[ImageDataset]) -> dict[str, Store]:
    """The store of each dataset, by id."""
    return {dataset.id: open_store(dataset) for dataset in datasets}


def listing_of(store: Store) -> Listing:
    """The files of a store. Where a table says what the pictures are, endings say nothing."""
    if store.all_pictures:
        return Listing(tuple(store.list()), (), ())
    return sort_out(store.list())


def table_of(dataset: ImageDataset, store: Store, keys: Sequence[str]) -> TableCaptions | None:
    """The table of captions and sizes that a dataset asks for; None when it asks for none.

    keys: of its pictures. UserError when the table cannot be read or lacks a column.
    """
    captions = dataset.caption_strategy in TABLES and not dataset.only_instance_prompt
    if captions and isinstance(store, Captioned):
        return store.captions()
    table = dataset.parquet
    if table is None or dataset.type not in ("local", "aws"):
        return None
    if not captions and dataset.metadata_backend != "parquet":
        return None
    return captions_of_table(
        table,
        keys,
        caption_column=dataset.parquet_caption_column,
        filename_column=dataset.parquet_filename_column,
        captions=captions,
    )
