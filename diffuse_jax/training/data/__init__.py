"""Training data: sources of captioned images, examples made from them, and batches whose position can be restored."""

from diffuse_jax.training.data.cache import Stored, cache_captions, cache_images, cached, fingerprint_params
from diffuse_jax.training.data.flags import add_data, data_from
from diffuse_jax.training.data.hub import Stream, TableSource
from diffuse_jax.training.data.opening import (
    batches_from,
    buckets_from,
    check_batch,
    check_first,
    check_sides,
    counts_from,
    source_from,
    stream_from,
    transform_from,
    warn_of_size,
)
from diffuse_jax.training.data.settings import CacheSettings, DataSettings, ImageSettings
from diffuse_jax.training.data.shards import ArrayRecordSource, TarSource, write_array_record, write_tar
from diffuse_jax.training.data.sources import FolderSource, Part, Source
from diffuse_jax.training.data.transform import Example, Record, Transform

__all__ = [
    "ArrayRecordSource",
    "CacheSettings",
    "DataSettings",
    "Example",
    "FolderSource",
    "ImageSettings",
    "Part",
    "Record",
    "Source",
    "Stored",
    "Stream",
    "TableSource",
    "TarSource",
    "Transform",
    "add_data",
    "batches_from",
    "buckets_from",
    "cache_captions",
    "cache_images",
    "cached",
    "check_batch",
    "check_first",
    "check_sides",
    "counts_from",
    "data_from",
    "fingerprint_params",
    "source_from",
    "stream_from",
    "transform_from",
    "warn_of_size",
    "write_array_record",
    "write_tar",
]
