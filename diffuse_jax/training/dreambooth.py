"""DreamBooth (Ruiz et al. 2023, arXiv 2208.12242): a few pictures of one instance, and many of its class.

A batch is made of as many pictures of the class as of the instance, in turns, where the prior is preserved
(section 3.2, eq. 2): the class's pictures come from the model itself, so what it knows of the class stays.
"""

from __future__ import annotations

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

from diffuse_jax.images import find_images
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.training.batches import Batch, Batches
from diffuse_jax.training.cached import inputs_from
from diffuse_jax.training.data import DataSettings, FolderSource, Record, batches_from
from diffuse_jax.training.distributed import say
from diffuse_jax.training.latent_model import source_folder
from diffuse_jax.training.settings import BatchSettings, DreamBoothSettings, ModelSettings
from diffuse_jax.training.settings.methods import OTHER_DATA


def check_dreambooth(settings: DreamBoothSettings, data: DataSettings) -> None:
    """Refuse what cannot work, before anything is read.

    Raises:
      ValueError: no pictures of the instance, or another data set is named.
    """
    folder = Path(settings.instance_data_dir)
    if not folder.is_dir() or not pictures_in(folder):
        raise ValueError(f"--instance_data_dir {folder} has no pictures")
    refuse_other_data(data, "instance_data_dir")
    if not settings.with_prior_preservation and (settings.class_data_dir or settings.class_prompt):
        warnings.warn("--class_data_dir and --class_prompt have no use without --with_prior_preservation", stacklevel=2)


def refuse_other_data(data: DataSettings, folder: str) -> None:
    """All pictures come from one folder, whose flag is given: say so of settings for other data.

    Raises:
      ValueError: naming the flag.
    """
    for name in OTHER_DATA:
        if name != folder and getattr(data, name):
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
    return find_images(folder)[0]


def make_class_pictures(settings: DreamBoothSettings, model: ModelSettings, seed: int = 0, **options: Any) -> int:
    """Fill ``class_data_dir`` to ``num_class_images`` pictures of ``class_prompt``; returns how many were made.

    The model to start from makes them, on one device of process 0 while the others wait, before training needs the
    memory. Without prior preservation there is nothing to do. The files are called ``{number}-{SHA-1 of the
    pixels}.png``.

    Args:
      settings: which pictures.
      model: what makes them.
      seed: picture ``n`` has seed ``seed + n``, so an interrupted run goes on where it was.
      **options: of the pipeline's call, such as ``num_inference_steps``.
    """
    if not settings.with_prior_preservation:
        return 0
    assert settings.class_data_dir is not None  # by the settings' own check
    folder = Path(settings.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    have, wanted = len(pictures_in(folder)), settings.num_class_images
    if jax.process_index() == 0 and have < wanted:
        say(f"making {wanted - have} images of the class in {folder} with {model.pretrained_model_name_or_path}")
        pipe: Any = DiffusionPipeline.from_pretrained(
            source_folder(model), dtype=model.compute.dtype, safety_checker=None
        )
        for start in range(have, wanted, settings.sample_batch_size):
            seeds = [seed + n for n in range(start, min(start + settings.sample_batch_size, wanted))]
            images = pipe([settings.class_prompt] * len(seeds), seed=seeds, **options).images
            for number, image in enumerate(images, start):
                write_picture(folder, number, image)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("class pictures")
    return max(0, wanted - have)


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
    settings: DreamBoothSettings,
    data: DataSettings,
    batch: BatchSettings,
    mesh: Mesh,
    model: ModelSettings,
    pipe: DiffusionPipeline,
    *,
    trained: Sequence[str],
) -> tuple[Batches, tuple[str, ...]]:
    """The batches of a run, and the networks whose work is done already.

    Args:
      settings: the two folders and their prompts.
      data: how their pictures are read.
      batch: pictures of the instance in a step; there are as many of the class.
      mesh: along which batches are divided.
      model: where the pipeline came from.
      pipe: the pipeline to train.
      trained: networks that change during the run.
    """

    def batches(folder: str | Path, prompt: str) -> tuple[Batches, tuple[str, ...]]:
        pictures = Prompted(folder, (prompt,))
        times = math.ceil(batch.images_per_step(mesh) / len(pictures))
        inputs = inputs_from(data, model, pipe, trained=trained, source=pictures, times=times, true_sizes=False)
        made = batches_from(data, batch, mesh, inputs.finish, source=inputs.source, pixels=inputs.pixels)
        return made, inputs.unused

    instance, unused = batches(settings.instance_data_dir, settings.instance_prompt)
    if not settings.with_prior_preservation:
        return instance, unused
    assert settings.class_data_dir is not None  # by the settings' own check
    assert settings.class_prompt is not None
    others, _ = batches(settings.class_data_dir, settings.class_prompt)
    return InTurns(instance, others), unused
