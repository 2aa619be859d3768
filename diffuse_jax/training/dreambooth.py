"""DreamBooth (Ruiz et al. 2023, arXiv 2208.12242): a few pictures of one instance, and many of its class.

A batch is made of as many pictures of the class as of the instance, in turns, where the prior is preserved
(section 3.2, eq. 2): the class's pictures come from the model itself, so what it knows of the class stays.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.training.arguments import PRECISIONS, pictures_per_update
from diffuse_jax.training.batches import Batch, Batches
from diffuse_jax.training.cached import inputs_from
from diffuse_jax.training.data import FolderSource, Record, add_data, batches_from
from diffuse_jax.training.data.transform import is_picture
from diffuse_jax.training.flags import Parser
from diffuse_jax.training.latent_flags import source_folder


def add_dreambooth(parser: Parser) -> None:
    """The flags of the instance, its class, and how their pictures are read."""
    add = parser.group("DreamBooth")
    add("--instance_data_dir", required=True, help="folder with pictures of the instance; no captions are needed")
    add("--instance_prompt", required=True, help='a prompt with a rare word for it, such as "a photo of sks dog"')
    add("--with_prior_preservation", action="store_true", help="train on pictures of the class too")
    add("--prior_loss_weight", type=float, default=1.0, help="how much those count")
    add("--class_data_dir", help="folder with pictures of the class; missing ones are made by the model")
    add("--class_prompt", help='a prompt of the class, such as "a photo of dog"')
    add("--num_class_images", type=int, default=100, help="how many pictures of the class there shall be")
    add("--sample_batch_size", type=int, default=4, help="how many of them are made at once")
    add_data(parser, captions=False, caches=True)


def check_dreambooth(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is read.

    Raises:
      ValueError: no pictures of the instance, or prior preservation without a folder and a prompt of the class.
    """
    folder = Path(args.instance_data_dir)
    if not folder.is_dir() or not pictures_in(folder):
        raise ValueError(f"--instance_data_dir {folder} has no pictures")
    refuse_other_data(args, "instance_data_dir")
    missing = [name for name in ("class_data_dir", "class_prompt") if getattr(args, name) is None]
    if args.with_prior_preservation and missing:
        raise ValueError(f"--with_prior_preservation needs --{' and --'.join(missing)}")
    if not args.with_prior_preservation and len(missing) < 2:
        warnings.warn("--class_data_dir and --class_prompt have no use without --with_prior_preservation", stacklevel=2)


def refuse_other_data(args: argparse.Namespace, folder: str) -> None:
    """All pictures come from one folder, whose flag is given: say so of flags for other data.

    Raises:
      ValueError: naming the flag.
    """
    others = "train_data_dir", "dataset_name", "dataset_config_name", "train_shards", "load_from_disk", "streaming"
    for name in (*others, "max_train_samples"):
        if name != folder and getattr(args, name):
            raise ValueError(f"--{name} has no use here; the pictures are those of --{folder}")


class Prompted:
    """Every picture of a folder with the same captions; those of a ``metadata.jsonl`` are not looked at."""

    def __init__(self, folder: str | Path, captions: tuple[str, ...]) -> None:
        self._source, self._captions = FolderSource(folder, caption_column=None), captions
        self.fingerprint = f"{self._source.fingerprint}-{hashlib.sha1(repr(captions).encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return self._source[index]._replace(captions=self._captions)


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder and of those below it."""
    return sorted(path for path in folder.rglob("*") if is_picture(path))


def make_class_pictures(args: argparse.Namespace, **options: Any) -> int:
    """Fill ``--class_data_dir`` to ``--num_class_images`` pictures of ``--class_prompt``; returns how many were made.

    The model to start from makes them, on one device of process 0 while the others wait, before training needs the
    memory. Picture ``n`` has seed ``--seed + n``, so an interrupted run goes on where it was. The files are called
    ``{number}-{SHA-1 of the pixels}.png``.

    Args:
      **options: of the pipeline's call, such as ``num_inference_steps``.
    """
    folder = Path(args.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    have = len(pictures_in(folder))
    if jax.process_index() == 0 and have < args.num_class_images:
        pipe: Any = DiffusionPipeline.from_pretrained(
            source_folder(args), dtype=PRECISIONS[args.mixed_precision], safety_checker=None
        )
        for start in range(have, args.num_class_images, args.sample_batch_size):
            seeds = [args.seed + n for n in range(start, min(start + args.sample_batch_size, args.num_class_images))]
            images = pipe([args.class_prompt] * len(seeds), seed=seeds, **options).images
            for number, image in enumerate(images, start):
                write_picture(folder, number, image)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("class pictures")
    return max(0, args.num_class_images - have)


def write_picture(folder: Path, number: int, image: Image.Image) -> None:
    """Write one picture, whole or not at all."""
    name = f"{number}-{hashlib.sha1(image.tobytes()).hexdigest()}"
    image.save(folder / f".{name}.tmp", format="PNG")
    (folder / f".{name}.tmp").rename(folder / f"{name}.png")


class InTurns:
    """Batches of two sources, rows in turns: instance, class, instance, class ...; ``prior`` marks the class."""

    def __init__(self, instance: Batches, others: Batches) -> None:
        self._both = instance, others
        self.names: Sequence[str] = ()
        self.total = max(part.total for part in self._both)  # type: ignore[attr-defined]

    def __next__(self) -> Batch:
        first, second = (next(part) for part in self._both)
        rows = len(next(iter(first.values())))
        first["prior"], second["prior"] = np.zeros(rows, bool), np.ones(rows, bool)
        self.names = tuple(name for part in self._both for name in part.names)
        turns = lambda a, b: np.stack([a, b], 1).reshape(2 * rows, *a.shape[1:])
        return {name: turns(first[name], second[name]) for name in first}

    def get_state(self) -> dict[str, Any]:
        return {"instance": self._both[0].get_state(), "class": self._both[1].get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        for part, name in zip(self._both, ("instance", "class"), strict=True):
            part.set_state(state[name])

    def close(self) -> None:
        """End the threads and worker processes of both."""
        for part in self._both:
            getattr(part, "close", lambda: None)()


def dreambooth_batches(
    args: argparse.Namespace, mesh: Mesh, pipe: DiffusionPipeline, *, trained: Sequence[str]
) -> tuple[Batches, tuple[str, ...]]:
    """The batches that the flags describe, and the networks whose work is done already.

    Args:
      pipe: the pipeline to train.
      trained: networks that change during the run.
    """

    def batches(folder: str, prompt: str) -> tuple[Batches, tuple[str, ...]]:
        pictures = Prompted(folder, (prompt,))
        times = math.ceil(pictures_per_update(args, mesh) / len(pictures))
        inputs = inputs_from(args, pipe, trained=trained, source=pictures, times=times, true_sizes=False)
        return batches_from(args, mesh, inputs.finish, source=inputs.source, pixels=inputs.pixels), inputs.unused

    instance, unused = batches(args.instance_data_dir, args.instance_prompt)
    if not args.with_prior_preservation:
        return instance, unused
    others, _ = batches(args.class_data_dir, args.class_prompt)
    return InTurns(instance, others), unused
