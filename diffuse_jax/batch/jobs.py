"""A row of prompts as a job: checked settings, one seed for each image, and what is stored with each image."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diffuse_jax.bounds import COUNT, FINITE, SHARE, TORCH_SEED, Number
from diffuse_jax.messages import brief
from diffuse_jax.pipelines.parts.safety import FLAGGED

Fields = Mapping[str, Any]
"""Name of a setting -> its value."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a text, got {brief(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"must be valid Unicode, got {brief(value)}") from None
    return value


def _number(kind: Number) -> Callable[[Any], Any]:
    """Reads a number, or the text of one; counts may be floats without a fraction, as tables with gaps have them."""

    def read(value: Any) -> Any:
        if isinstance(value, str):
            return kind.read(value.removesuffix(".0") if kind.kind is int else value)
        if kind.kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not kind.allows(value):
            raise ValueError(f"must be {kind.words}, got {brief(value)}")
        return value

    return read


def _seeds(value: Any) -> list[int]:
    """One seed, or several; as text with spaces between them."""
    values = value.split() if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    seeds = [_number(TORCH_SEED)(one) for one in values]
    if not seeds:
        raise ValueError("must be at least one number")
    if len({*seeds}) < len(seeds):
        raise ValueError(f"must not name a seed twice, got {brief(value)}")
    return seeds


def _flag(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    found = value if isinstance(value, bool) else known.get(str(value).lower())
    if found is None:
        raise ValueError(f"must be true or false, got {brief(value)}")
    return found


def _choice(*names: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in names:
            raise ValueError(f"must be {' or '.join(names)}, got {brief(value)}")
        return value

    return read


def _lora(value: Any) -> dict[str, float]:
    """LoRA files with their weights: ``{"style.safetensors": 0.8}``, its text in JSON, or ``style.safetensors=0.8``."""
    if isinstance(value, str):
        text = value.strip()
        try:
            value = json.loads(text) if text.startswith("{") else [_pair(word) for word in text.split()]
        except (ValueError, RecursionError):
            raise ValueError(f'must be FILE=WEIGHT, or {{"FILE": WEIGHT}} in JSON, got {brief(value)}') from None
    try:
        found = {str(name): weight for name, weight in dict(value).items() if weight is not None}
    except (TypeError, ValueError):
        raise ValueError(f'must be {{"FILE": WEIGHT}}, got {brief(value)}') from None
    for name, weight in found.items():
        if not FINITE.allows(weight):
            raise ValueError(f"must have a finite number for {name}, got {brief(weight)}")
    return {name: float(found[name]) for name in sorted(found)}


def _pair(word: str) -> tuple[str, float]:
    name, _, weight = word.rpartition("=")
    return (name, float(weight)) if name else (word, 1.0)


FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "prompt": _text,
    "prompt_2": _text,
    "negative_prompt": _text,
    "negative_prompt_2": _text,
    "seed": _seeds,
    "num_images_per_prompt": _number(COUNT),
    "height": _number(COUNT),
    "width": _number(COUNT),
    "num_inference_steps": _number(COUNT),
    "guidance_scale": _number(FINITE),
    "guidance_rescale": _number(SHARE),
    "clip_skip": _number(COUNT),
    "prompt_syntax": _choice("a1111", "compel"),
    "long_prompts": _flag,
    "noise": _choice("torch", "cuda"),
    "lora": _lora,
}
"""What a row may say -> what reads its value; a ``ValueError`` says what the value must be."""

OF_IMAGES = ("file_name", "text", "line", FLAGGED)
"""What is stored with an image besides its settings."""

OWN = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "guidance_scale", "guidance_rescale")
"""Settings that each image of a batch has for itself, besides its seed and the strength of a LoRA file."""


class Job(NamedTuple):
    """The images of one row.

    Attributes:
      number: of the row.
      call: arguments of the pipeline's call, without those for the seed and the adapters.
      lora: LoRA file -> weight.
      seeds: one for each image.
      kept: what else is stored with its images.
    """

    number: int
    call: Fields
    lora: Mapping[str, float]
    seeds: Sequence[int]
    kept: Fields

    @property
    def group(self) -> tuple[Any, ...]:
        """Jobs of equal groups can share a batch: they have the same shapes, steps, kind of guidance and adapters."""
        shared = tuple((name, self.call[name]) for name in sorted(self.call) if name not in OWN)
        guided = self.call.get("guidance_scale", 2.0) > 1
        adapters = tuple(self.lora) if len(self.lora) < 2 else tuple(self.lora.items())
        return tuple(sorted(self.call)), shared, guided, adapters


class Image(NamedTuple):
    """One image to make: a job, and one of its seeds."""

    job: Job
    seed: int

    @property
    def key(self) -> str:
        """The name of its files: the number of the row and the seed."""
        return f"{self.job.number:08d}-{self.seed}"


class Rules(NamedTuple):
    """How rows become jobs.

    Attributes:
      defaults: settings of rows that do not say otherwise, checked as those of rows are.
      seed: row ``n`` has the seed ``seed + n`` unless it says otherwise; with ``num_images_per_prompt`` of ``k`` in the
        defaults, the ``k`` seeds from ``seed + n k`` on.
      keep: names of fields that are stored with the images, and are no settings.
      common: settings of the whole job to store with every image, such as the model.
    """

    defaults: Fields
    seed: int
    keep: Sequence[str]
    common: Fields

    @property
    def known(self) -> list[str]:
        """All names that a row may have."""
        return [*FIELDS, *self.keep]

    def job(self, number: int, fields: Fields) -> Job:
        """The job of a row.

        Raises:
          ValueError: a setting is unknown or its value is wrong, or there is no prompt.
        """
        if unknown := [name for name in fields if name not in FIELDS and name not in self.keep]:
            raise ValueError(f"it has {brief(unknown[0])}, which is no setting; there are {', '.join(self.known)}")
        given = {**self.defaults, **checked({k: v for k, v in fields.items() if k in FIELDS})}
        if not given.get("prompt", "").strip():
            raise ValueError("it has no prompt")
        copies, seeds = given.pop("num_images_per_prompt", 1), given.pop("seed", None)
        if seeds is None:
            first = self.seed + number * self.defaults.get("num_images_per_prompt", 1)
            seeds = [first]
        if len(seeds) == 1:
            seeds = range(seeds[0], seeds[0] + copies)
        elif len(seeds) != copies and "num_images_per_prompt" in fields:
            raise ValueError(f"it has {len(seeds)} seeds for num_images_per_prompt={copies}; give one, or one each")
        most = 2**32 if given.get("noise") is None else 2**64
        largest = seeds[-1] if isinstance(seeds, range) else max(seeds)
        if largest >= most:
            raise ValueError(f"its seed must be less than {most}, got {largest}")
        lora = given.pop("lora", {})
        return Job(number, given, lora, seeds, _storable({name: fields[name] for name in self.keep if name in fields}))

    def record(self, image: Image, file_name: str) -> dict[str, Any]:
        """What is stored with an image: the line of ``metadata.jsonl``, and the settings in the file itself."""
        job = image.job
        lora = {"lora": dict(job.lora)} if job.lora else {}
        negative = {"negative_prompt": job.call.get("negative_prompt", "")}
        own = {**job.kept, **self.common, **job.call, **negative, **lora}
        return {"file_name": file_name, "text": job.call["prompt"], "line": job.number, "seed": image.seed} | own


def _storable(kept: Fields) -> Fields:
    """What is kept as it comes back from a line of metadata."""
    if not kept:
        return {}
    try:
        text = json.dumps(kept, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"it has values to keep that JSON cannot hold ({error})") from None
    return json.loads(text)


def checked(fields: Fields) -> dict[str, Any]:
    """Settings with their values read.

    Raises:
      ValueError: a value is wrong; the message begins with the name of the setting.
    """
    found = {}
    for name, value in fields.items():
        try:
            found[name] = FIELDS[name](value)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return found
