"""The flags of a training script that concern its data."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from diffuse_jax.training.data.settings import CacheSettings, DataSettings, ImageSettings
from diffuse_jax.training.data.transform import INTERPOLATIONS
from diffuse_jax.training.flags import Parser, settings_from


def add_data(parser: Parser, *, captions: bool = True, caches: bool = False, **defaults: Any) -> None:
    """The flag groups "data" and "pictures".

    Args:
      parser: where they are added.
      captions: False leaves out what concerns captions.
      caches: True adds ``--cache_latents`` and ``--cache_text_embeddings``.
      defaults: instead of those of the settings.
    """
    add = parser.group("data", DataSettings, CacheSettings)
    add("--train_data_dir", type=os.path.expanduser, help="image folder; captions in metadata.jsonl")
    add("--dataset_name", help="data set of the Hub, or a local folder that `datasets` reads")
    add("--dataset_config_name", help="configuration of that data set")
    add("--train_shards", nargs="+", help='.tar (WebDataset) or .array_record files: "a-{000..127}.tar"')
    add("--load_from_disk", action="store_true", help="--train_data_dir was written by save_to_disk of `datasets`")
    add("--streaming", action="store_true", help="read --dataset_name while training instead of downloading it first")
    add("--shuffle_buffer_size", help="rows that are shuffled with each other when streaming")
    add("--image_column", help="column of the pictures (not of image folders and shards)")
    if captions:
        add("--caption_column", help="column of the caption, or of a list of captions to draw from")
        add("--proportion_empty_prompts", help="share of captions replaced by the empty text")
    add("--max_train_samples", help="use so many pictures, drawn by --seed")
    add("--dataloader_num_workers", help="processes that make batches; 0: threads of this one")
    if caches:
        add("--cache_latents", action="store_true", help="encode every picture once, its middle, and train from that")
        add("--cache_text_embeddings", action="store_true", help="encode every caption once and train from that")
    what = "where such caches and the sizes of pictures are kept; OUTPUT/cache if left out"
    add("--data_cache_dir", default=None, help=what)
    add = parser.group("pictures", ImageSettings)
    add("--resolution", help="width and height of the training pictures, in pixels")
    add("--center_crop", action="store_true", help="cut the square out of the middle instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the pictures")
    add("--image_interpolation_mode", choices=INTERPOLATIONS, help="how pictures are resized")
    add("--aspect_ratio_buckets", action="store_true", help="batches of like proportions and about resolution^2 pixels")
    add("--bucket_step", help="sides of the buckets are multiples of this")
    add("--bucket_max_aspect", help="longer side over shorter side of the longest bucket")
    parser.set_defaults(**defaults)


def data_from(args: argparse.Namespace) -> DataSettings:
    """The settings that those flags describe.

    A script without captions has no column for them, and caches lie in ``OUTPUT/cache`` where no flag says otherwise.

    Raises:
      ValueError: flags that cannot be, or exclude each other.
    """
    cache = args.data_cache_dir or Path(args.output_dir) / "cache"
    values = {"caption_column": None, **vars(args), "data_cache_dir": cache}
    return settings_from(argparse.Namespace(**values), DataSettings)
