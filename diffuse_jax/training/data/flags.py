"""The data flags of training scripts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffuse_jax.training.data.settings import CacheSettings, DataSettings, ImageSettings
from diffuse_jax.training.data.tags import TagSettings
from diffuse_jax.training.data.transform import CONDITIONS, INTERPOLATIONS
from diffuse_jax.training.flags import Parser, settings_from

MASKS = {
    "mask_column": "the loss here has no masks; text_to_image.py and dreambooth.py read them, also those with LoRA",
}
TAGS = dict.fromkeys(
    ("shuffle_tags", "shuffle_caption", "tag_dropout", "caption_tag_dropout_rate", "keep_tags", "keep_tokens",
     "tag_separator", "caption_separator"),
    "prompts are not lists of tags here; leave it out",
)  # fmt: skip
"""Flags of other scripts -> what to do."""


def add_data(
    parser: Parser,
    *,
    captions: bool = True,
    caches: bool = False,
    images: tuple[str, ...] = ("--image_column",),
    masks: bool = False,
    **defaults: Any,
) -> None:
    """Add the flag groups "data" and "images".

    Args:
      parser: the parser to add them to.
      captions: False omits the flags for captions.
      caches: True adds ``--cache_latents`` and ``--cache_text_embeddings``.
      images: what the flag for the column of images is called.
      masks: True adds ``--mask_column``.
      defaults: defaults that differ from those of the settings.
    """
    add = parser.group("data", DataSettings, CacheSettings)
    add("--train_data_dir", nargs="+", metavar="FOLDER", help="image folder, or several; captions in metadata.jsonl")
    what = "how often an epoch has the images of each of these folders"
    add("--data_repeats", nargs="+", help=what)
    what = "shares of these folders among the examples, such as 0.8 0.2; proportional to their images if omitted"
    add("--data_weights", nargs="+", help=what)
    add("--dataset_name", help="data set on the Hub, or a local folder that `datasets` can read")
    add("--dataset_config_name", help="configuration of that data set")
    add("--train_shards", nargs="+", help='.tar (WebDataset) or .array_record files: "a-{000..127}.tar"')
    add("--load_from_disk", action="store_true", help="--train_data_dir was written by `datasets` with save_to_disk")
    add("--streaming", action="store_true", help="read --dataset_name while training instead of downloading it first")
    add("--shuffle_buffer_size", help="size of the shuffle buffer when streaming, in rows")
    what = "column of the images (not used for image folders and shards)"
    add(*images, dest="image_column", default=DataSettings.image_column, help=what)
    if masks:
        what = "column of grey images, the weights of the pixels in the loss; in image folders, the key of their paths"
        add("--mask_column", help=what)
    else:
        parser.refuse(MASKS)
    if captions:
        add("--caption_column", help="column of the caption, or of a list of captions of which one is chosen at random")
        add("--proportion_empty_prompts", help="fraction of captions replaced by the empty string")
        _add_tags(parser)
    else:
        parser.refuse(TAGS)
    add("--max_train_samples", help="use a random subset of this many images, determined by --seed")
    add("--dataloader_num_workers", help="number of processes that prepare batches; 0 uses threads of this process")
    if caches:
        add(
            "--cache_latents",
            action="store_true",
            help="encode the centre crop of every image once and train on the latents",
        )
        add(
            "--cache_text_embeddings",
            action="store_true",
            help="encode every caption once and train on the prompt embeddings",
        )
    what = "folder for these caches and for the sizes of images; OUTPUT/cache if omitted"
    add("--data_cache_dir", default=None, help=what)
    add = parser.group("images", ImageSettings)
    add("--resolution", help="width and height of the training images, in pixels")
    add("--center_crop", action="store_true", help="crop images at the centre instead of at random")
    add("--random_flip", action="store_true", help="mirror each image with probability 1/2")
    add("--image_interpolation_mode", choices=INTERPOLATIONS, help="interpolation for resizing images")
    add(
        "--aspect_ratio_buckets",
        action="store_true",
        help="group images of similar aspect ratio, with about resolution^2 pixels",
    )
    add("--bucket_step", help="sides of the buckets are multiples of this")
    add("--bucket_max_aspect", help="largest ratio of the longer to the shorter side of a bucket")
    parser.set_defaults(**defaults)


def _add_tags(parser: Parser) -> None:
    """Add the flags of captions that are lists of tags; the second names are those of Kohya's scripts."""
    add = parser.group("data", TagSettings)
    what = "captions are lists of tags: put them into another order each time"
    add("--shuffle_tags", "--shuffle_caption", action="store_true", help=what)
    add("--tag_dropout", "--caption_tag_dropout_rate", help="probability of leaving out each tag of a caption")
    what = "number of tags at the beginning that are neither moved nor left out"
    add("--keep_tags", "--keep_tokens", help=what)
    add("--tag_separator", "--caption_separator", help="what stands between two tags")


def add_conditioning(parser: Parser) -> None:
    """Add the flags of control images to the group "data"."""
    add = parser.group("data", DataSettings)
    what = "column of the control images, conditioning_image if omitted; in image folders, the key of their paths"
    add("--conditioning_image_column", help=what)
    add("--conditioning", choices=CONDITIONS, help="make the control images from the training images instead")


def add_edits(parser: Parser) -> None:
    """Add the flag groups "data" and "images" for images before and after an edit, and the instructions."""
    edited = ("--edited_image_column", "--image_column")
    add_data(parser, captions=False, caches=True, images=edited, image_column="edited_image", resolution=256)
    add = parser.group("data", DataSettings)
    what = "column of the images before the edit; in image folders, the key of their paths"
    names = ("--original_image_column", "--conditioning_image_column")
    add(*names, dest="conditioning_image_column", default="input_image", help=what)
    what = "column of the instruction, or of a list of instructions of which one is chosen at random"
    add("--edit_prompt_column", "--caption_column", dest="caption_column", default="edit_prompt", help=what)
    what = "probability of dropping the instruction alone, the original image alone, and both; 0 drops nothing"
    add("--conditioning_dropout_prob", help=what)


def data_from(args: argparse.Namespace, *, named: bool = True) -> DataSettings:
    """The settings that these flags describe.

    A script without captions has no column for them, and caches are in ``OUTPUT/cache`` by default. A script with
    control images reads them from the column ``conditioning_image`` unless its flags say otherwise.

    Args:
      args: the parsed flags.
      named: whether they must name a data set; False for scripts that make theirs from other images.

    Raises:
      ValueError: a value is out of range, two flags exclude each other, or not exactly one data set is named.
    """
    cache = args.data_cache_dir or Path(args.output_dir) / "cache"
    values = {"caption_column": None, **vars(args), "data_cache_dir": cache}
    if "conditioning" in values and values["conditioning"] is values["conditioning_image_column"] is None:
        values["conditioning_image_column"] = "conditioning_image"
    data = settings_from(argparse.Namespace(**values), DataSettings)
    if named:
        from diffuse_jax.training.data.opening import check_named  # not needed for `--help`

        check_named(data)  # before the model is loaded
    return data
