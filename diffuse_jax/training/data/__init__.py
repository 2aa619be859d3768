"""Data of training: sources of captioned pictures, examples made from them, and batches that can be resumed."""

from diffuse_jax.training.data.cache import Stored, cache_captions, cache_pictures, cached, fingerprint_params
from diffuse_jax.training.data.flags import (
    add_data,
    batches_from,
    buckets_from,
    cache_dir_from,
    check_data,
    check_sides,
    source_from,
    transform_from,
)
from diffuse_jax.training.data.hub import Stream, TableSource
from diffuse_jax.training.data.shards import ArrayRecordSource, TarSource, write_array_record, write_tar
from diffuse_jax.training.data.sources import FolderSource, Part, Source
from diffuse_jax.training.data.transform import Example, Record, Transform

__all__ = [
    "ArrayRecordSource",
    "Example",
    "FolderSource",
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
    "cache_dir_from",
    "cache_pictures",
    "cached",
    "check_data",
    "check_sides",
    "fingerprint_params",
    "source_from",
    "transform_from",
    "write_array_record",
    "write_tar",
]
