"""Data sets read with Hugging Face ``datasets``: from the Hub, a local folder, or written by ``save_to_disk``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from diffuse_jax.limits import refuse_links
from diffuse_jax.training.data.sources import OTHER_IMAGES, captions_of, fingerprint, other_columns
from diffuse_jax.training.data.transform import Record


class TableSource:
    """The rows of a ``datasets.Dataset``, whose table stays on disk, in worker processes too."""

    def __init__(
        self,
        dataset: Any,
        image_column: str = "image",
        caption_column: str | None = "text",
        conditioning_column: str | None = None,
        mask_column: str | None = None,
    ) -> None:
        """See :func:`undecoded` for the errors."""
        self._name = str(dataset.info.dataset_name or "row")
        self._columns = image_column, caption_column, conditioning_column, mask_column
        self._dataset = undecoded(dataset, *self._columns)
        self.fingerprint = fingerprint("table", [self._dataset._fingerprint])

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Record:
        where = f"{self._name}[{index}]"
        return record_of(self._dataset[int(index)], *self._columns, where)


@dataclasses.dataclass(frozen=True)
class Stream:
    """A data set that is streamed, and the share of it that is read.

    Attributes:
      dataset: a ``datasets.IterableDataset``.
      image_column: column of the images.
      caption_column: column of the captions; None if they are not needed.
      conditioning_column, mask_column: columns of the control images and masks; None if they are not needed.
      seed: seed of the order.
      window: number of rows that are shuffled with each other.
      count: number of rows to use, the first ones after the files are shuffled; all if None.
      part: index of the share that is read; shares belong to processes and, within a process, to workers.
      parts: number of shares. It should divide the number of files; otherwise every share reads all files.
    """

    dataset: Any
    image_column: str = "image"
    caption_column: str | None = "text"
    conditioning_column: str | None = None
    mask_column: str | None = None
    seed: int = 0
    window: int = 1000
    count: int | None = None
    part: int = 0
    parts: int = 1

    @property
    def columns(self) -> tuple[str, str | None, str | None, str | None]:
        """The columns of images, captions, control images and masks."""
        return self.image_column, self.caption_column, self.conditioning_column, self.mask_column

    def share(self, part: int, parts: int) -> Stream:
        """A share of this share."""
        return dataclasses.replace(self, part=self.part * parts + part, parts=self.parts * parts)


def load(
    name: str,
    config: str | None = None,
    *,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    split: str = "train",
) -> Any:
    """``datasets.load_dataset`` for a Hub id or a local folder; the split must exist."""
    import datasets

    if Path(name).is_dir():
        refuse_links(Path(name), deep=True)
    folder = None if cache_dir is None else str(cache_dir)
    return datasets.load_dataset(name, config, split=split, streaming=streaming, cache_dir=folder)


def load_saved(folder: str | Path, split: str = "train") -> Any:
    """Load what ``save_to_disk`` wrote: a data set, or one of several splits.

    Raises:
      ValueError: the split does not exist.
    """
    import datasets

    loaded = datasets.load_from_disk(str(refuse_links(Path(folder), deep=True)))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{folder} has no split {split!r}; it has {sorted(loaded)}")
        return loaded[split]
    return loaded


def undecoded(
    dataset: Any,
    image_column: str,
    caption_column: str | None,
    conditioning_column: str | None = None,
    mask_column: str | None = None,
) -> Any:
    """The columns of a data set or stream that are used, with images as undecoded files.

    Raises:
      ValueError: a column is missing, or captions are neither strings nor lists of strings.
    """
    import datasets

    if dataset.features is None:  # streams of files without a schema
        dataset = dataset._resolve_features()
    features = dataset.features
    columns = {
        "--image_column": image_column,
        "--caption_column": caption_column,
        "--conditioning_image_column": conditioning_column,
        "--mask_column": mask_column,
    }
    wanted = {flag: column for flag, column in columns.items() if column is not None}
    for flag, column in wanted.items():
        if column not in features:
            raise ValueError(f"{flag} {column!r}: the data set has the columns {sorted(features)}")
    if caption_column is not None and not _is_text(features[caption_column]):
        raise ValueError(
            f"--caption_column {caption_column!r} must hold texts or lists of texts, but it is "
            f"{features[caption_column]}; the columns are {sorted(features)}"
        )
    dataset = dataset.select_columns(list(wanted.values()))
    for name in (image_column, conditioning_column, mask_column):
        if name is not None and isinstance(features[name], datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _is_text(feature: Any) -> bool:
    feature = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
    return getattr(feature, "dtype", None) in ("string", "large_string")


def record_of(
    row: dict[str, Any],
    image_column: str,
    caption_column: str | None,
    conditioning_column: str | None,
    mask_column: str | None,
    where: str,
) -> Record:
    """The record of a row of an :func:`undecoded` data set.

    Raises:
      ValueError: the row has neither the bytes nor the path of an image, or no caption.
    """
    image, path = _image(row, image_column, "--image_column", where)
    columns = other_columns(conditioning_column, mask_column)
    others = {field: _image(row, column, OTHER_IMAGES[field][0], where)[0] for field, column in columns.items()}
    name = f"{where} ({path})" if isinstance(path, str) else where
    return Record(image, captions_of(row, caption_column, where), name, **others)


def _image(row: dict[str, Any], column: str, flag: str, where: str) -> tuple[bytes | str, Any]:
    """The image of a row, as the bytes of its file or its path, and the path if it is known."""
    value = row[column]
    path = value.get("path") if isinstance(value, dict) else value
    image = value.get("bytes") if isinstance(value, dict) else value
    image = image if image is not None else path
    if not isinstance(image, bytes | str):
        raise ValueError(f"{where}: {column!r} is not an image file but {type(value).__name__}; see {flag}")
    return image, path
