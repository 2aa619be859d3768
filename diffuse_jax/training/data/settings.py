"""Settings of the training data, and of how its images and captions are prepared."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Annotated

from diffuse_jax.bounds import AT_LEAST_ONE, COUNT, NATURAL, POSITIVE, SEED, SHARE, THIRD
from diffuse_jax.training.checks import Checked, one_of
from diffuse_jax.training.data.buckets import bucket_sizes
from diffuse_jax.training.data.tags import TagSettings
from diffuse_jax.training.data.transform import CONDITIONS, INTERPOLATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings(Checked):
    """The size of training images, and how they are cropped.

    Attributes:
      resolution: height and width, in pixels.
      center_crop: crop images at the centre instead of at random.
      random_flip: mirror each image with probability 1/2.
      image_interpolation_mode: interpolation for resizing images, a key of
        :data:`~diffuse_jax.training.data.transform.INTERPOLATIONS`.
      aspect_ratio_buckets: group images of similar aspect ratio, with about ``resolution ** 2`` pixels, instead of
        cropping squares.
      bucket_step: sides of the buckets are multiples of this, in pixels.
      bucket_max_aspect: largest ratio of the longer to the shorter side of a bucket.

    Raises:
      ValueError: a size is impossible, or the interpolation is unknown.
    """

    resolution: Annotated[int, COUNT] = 512
    center_crop: bool = False
    random_flip: bool = False
    image_interpolation_mode: str = "bilinear"
    aspect_ratio_buckets: bool = False
    bucket_step: Annotated[int, COUNT] = 64
    bucket_max_aspect: Annotated[float, AT_LEAST_ONE] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(INTERPOLATIONS, image_interpolation_mode=self.image_interpolation_mode)
        if self.aspect_ratio_buckets:
            bucket_sizes(self.resolution, self.bucket_step, self.bucket_max_aspect)  # which checks them


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSettings(Checked):
    """What is computed once, before the first step, and stored on disk.

    Attributes:
      cache_latents: encode the centre crop of every image once and train on the latents.
      cache_text_embeddings: encode every caption once and train on the prompt embeddings.
      data_cache_dir: folder for these caches and for the sizes of images.
    """

    cache_latents: bool = False
    cache_text_embeddings: bool = False
    data_cache_dir: str | Path = "cache"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(Checked):
    """The data set, and how its rows become examples.

    One of ``train_data_dir``, ``dataset_name`` and ``train_shards`` names the data set; none of them does if a trainer
    provides its own source.

    Attributes:
      train_data_dir: image folder, or several; captions in ``metadata.jsonl``.
      data_repeats: how often an epoch has the images of each folder; once if None.
      data_weights: the share of each folder among the examples, as positive numbers of any sum; None for shares
        proportional to the images.
      dataset_name: data set on the Hub, or a local folder that ``datasets`` can read.
      dataset_config_name: configuration of that data set.
      train_shards: ``.tar`` (WebDataset) or ``.array_record`` files, such as ``("a-{000..127}.tar",)``.
      load_from_disk: ``train_data_dir`` was written by ``datasets`` with ``save_to_disk``.
      streaming: read ``dataset_name`` while training instead of downloading it first.
      shuffle_buffer_size: size of the shuffle buffer when streaming, in rows.
      image_column: column of the images (not used for image folders and shards).
      caption_column: column of the caption, or of a list of captions of which one is chosen at random; None if captions
        are not needed.
      conditioning: makes the control image from the training image, one of
        :data:`~diffuse_jax.training.data.transform.CONDITIONS`; None if there are no control images, or a column of
        them.
      conditioning_image_column: column of the control images; None if there is none. In image folders, the key of
        their paths.
      mask_column: column of grey images of the size of the images, whose values weight the pixels in the loss, 255 for
        the full weight; None if there is none. In image folders, the key of their paths.
      proportion_empty_prompts: fraction of captions replaced by the empty string.
      conditioning_dropout_prob: probability of dropping the caption alone, of dropping the control image alone, and of
        dropping both.
      max_train_samples: use a random subset of this many images, determined by ``seed``; all if None.
      dataloader_num_workers: number of processes that prepare batches; 0 for threads of this process.
      cache_dir: where data sets from the Hub are stored; the default folder of ``datasets`` if None.
      seed: determines the order of the examples, and how they are cropped, mirrored and captioned.
      tags: how captions that are lists of tags are changed.
      images: size and cropping of the images.
      caches: what is computed in advance.

    Raises:
      ValueError: a value is out of range, or two settings exclude each other.
    """

    train_data_dir: str | Path | tuple[str | Path, ...] | None = None
    data_repeats: tuple[Annotated[int, COUNT], ...] | None = None
    data_weights: tuple[Annotated[float, POSITIVE], ...] | None = None
    dataset_name: str | Path | None = None
    dataset_config_name: str | None = None
    train_shards: tuple[str | Path, ...] | None = None
    load_from_disk: bool = False
    streaming: bool = False
    shuffle_buffer_size: Annotated[int, COUNT] = 1000
    image_column: str = "image"
    caption_column: str | None = "text"
    conditioning: str | None = None
    conditioning_image_column: str | None = None
    mask_column: str | None = None
    proportion_empty_prompts: Annotated[float, SHARE] = 0.0
    conditioning_dropout_prob: Annotated[float, THIRD] = 0.0
    max_train_samples: Annotated[int, COUNT] | None = None
    dataloader_num_workers: Annotated[int, NATURAL] = 0
    cache_dir: str | Path | None = None
    seed: Annotated[int, SEED] = 0
    tags: TagSettings = field(default_factory=TagSettings)
    images: ImageSettings = field(default_factory=ImageSettings)
    caches: CacheSettings = field(default_factory=CacheSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(CONDITIONS, conditioning=self.conditioning)
        self._check_shares()
        if self.conditioning is not None and self.conditioning_image_column is not None:
            raise ValueError(
                f"--conditioning {self.conditioning} computes the control images; leave out "
                f"--conditioning_image_column {self.conditioning_image_column}"
            )
        if self.caches.cache_latents and self.images.random_flip:
            raise ValueError("--cache_latents stores one version of each image; leave out --random_flip")
        if self.caches.cache_text_embeddings and self.tags.changes:
            raise ValueError(
                "--cache_text_embeddings stores one version of each caption; leave out --shuffle_tags and --tag_dropout"
            )
        everything = {
            "aspect_ratio_buckets": self.images.aspect_ratio_buckets,
            "cache_latents": self.caches.cache_latents,
            "cache_text_embeddings": self.caches.cache_text_embeddings,
        }
        for name, wanted in everything.items():
            if self.streaming and wanted:
                raise ValueError(f"--{name} has to see all images before training; leave out --streaming")

    @property
    def folders(self) -> tuple[str | Path, ...]:
        """The folders that ``train_data_dir`` names."""
        if not self.train_data_dir:
            return ()
        return self.train_data_dir if isinstance(self.train_data_dir, tuple) else (self.train_data_dir,)

    def _check_shares(self) -> None:
        folders = [Path(folder) for folder in self.folders]
        if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
            raise ValueError(f"--train_data_dir has {twice} twice; name it once, and how often with --data_repeats")
        for name in ("data_repeats", "data_weights"):
            if (values := getattr(self, name)) is None:
                continue
            words = " ".join(map(str, values))
            if len(values) != len(self.folders):
                raise ValueError(
                    f"--{name} {words} must have one number for each folder of --train_data_dir, which names "
                    f"{len(self.folders)}"
                )
            if self.max_train_samples is not None:
                raise ValueError(f"--max_train_samples chooses from all images alike; leave out --{name}")
        if self.data_weights is not None and self.data_repeats is not None:
            raise ValueError("--data_repeats and --data_weights both set the shares of the folders; give one of them")
        if self.data_weights is not None and self.images.aspect_ratio_buckets:
            raise ValueError("--data_weights cannot be kept within buckets; use --data_repeats")
