"""Data of training: sources of captioned pictures, examples made from them, and batches that can be resumed."""

from diffuse_jax.training.data.flags import add_data, batches_from, source_from, transform_from
from diffuse_jax.training.data.memory import Pictures, batch_indices, caption_batch, pixel_batch, read_pictures
from diffuse_jax.training.data.sources import FolderSource, Part, Source
from diffuse_jax.training.data.transform import Example, Record, Transform

__all__ = [
    "Example",
    "FolderSource",
    "Part",
    "Pictures",
    "Record",
    "Source",
    "Transform",
    "add_data",
    "batch_indices",
    "batches_from",
    "caption_batch",
    "pixel_batch",
    "read_pictures",
    "source_from",
    "transform_from",
]
