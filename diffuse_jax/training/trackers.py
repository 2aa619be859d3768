"""Where the metrics and images of a run are logged: a JSONL file, a plot, TensorBoard, Weights & Biases."""

from __future__ import annotations

import datetime
import importlib.util
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from diffuse_jax.training.checks import one_of
from diffuse_jax.training.runs import LOG_FILE, plot, pyplot, read_run
from diffuse_jax.training.settings.run import TRACKERS

Images = Sequence[tuple[str, Image.Image]]

INSTALL = {"tensorboard": "pip install tensorboard", "wandb": "pip install wandb, then `wandb login`"}


class Tracker(Protocol):
    """A destination for the records of a run; :class:`JsonLines` is the simplest one."""

    def scalars(self, step: int, record: Mapping[str, float]) -> None: ...

    def images(self, step: int, images: Images) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One object per line in ``OUTPUT/log.jsonl``, and images in ``OUTPUT/validation/step-N``.

    A run that resumes from a checkpoint drops the lines after it, so each step is in the file once.
    """

    def __init__(self, output_dir: Path, first_step: int) -> None:
        self.folder, self.path = output_dir, output_dir / LOG_FILE
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        kept = [line for line in lines if _step(line) <= first_step]
        new = self.path.with_suffix(".new")
        new.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        new.replace(self.path)

    def scalars(self, step: int, record: Mapping[str, float]) -> None:
        # Nine digits distinguish any two float32 values.
        rounded = {k: float(f"{v:.9g}") for k, v in record.items()}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": now, **rounded}) + "\n")

    def images(self, step: int, images: Images) -> None:
        folder = self.folder / "validation" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        for n, (name, image) in enumerate(images):
            image.save(folder / f"{n:02d}-{_file_name(name)}.png")

    def close(self) -> None:
        pass


def _step(line: str) -> float:
    """The step of a line; a line that a killed run left half-written belongs to no step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")


def _file_name(text: str) -> str:
    kept = "".join(c if c.isalnum() else "-" for c in text[:60])
    return "-".join(part for part in kept.split("-") if part) or "image"


class Curves:
    """``OUTPUT/curves.svg``, drawn from ``log.jsonl`` when the run ends, interrupted or not."""

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir

    def scalars(self, step: int, record: Mapping[str, float]) -> None:
        pass

    def images(self, step: int, images: Images) -> None:
        pass

    def close(self) -> None:
        plot([read_run(self.folder)], self.folder / "curves.svg")


class TensorBoard:
    """Event files in ``OUTPUT/LOGGING_DIR``, written by the package ``tensorboard`` alone."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event = Event
        self._writer = EventFileWriter(str(folder))
        # Tells TensorBoard to discard what the resumed run had written after this step.
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=first_step + 1, session_log=start))

    def _add(self, step: int, values: Sequence[Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def scalars(self, step: int, record: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, [Summary.Value(tag=f"train/{k}", simple_value=v) for k, v in record.items()])

    def images(self, step: int, images: Images) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = []
        for n, (name, image) in enumerate(images):
            encoded = io.BytesIO()
            image.convert("RGB").save(encoded, "PNG")
            summary = Summary.Image(
                height=image.height, width=image.width, colorspace=3, encoded_image_string=encoded.getvalue()
            )
            values.append(Summary.Value(tag=f"validation/{n:02d} {name}", image=summary))
        self._add(step, values)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of ``wandb``; its id is stored in the folder, so that a resumed run continues the same curves."""

    def __init__(self, folder: Path, first_step: int, project: str, entity: str | None, config: dict[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "wandb-id"
        name = known.read_text(encoding="utf-8") if first_step and known.is_file() else os.urandom(4).hex()
        self._wandb = wandb
        self._run = wandb.init(project=project, entity=entity, config=config, dir=str(folder), id=name, resume="allow")
        known.write_text(name, encoding="utf-8")

    def scalars(self, step: int, record: Mapping[str, float]) -> None:
        self._run.log({f"train/{k}": v for k, v in record.items()}, step=step)

    def images(self, step: int, images: Images) -> None:
        logged = [self._wandb.Image(image, caption=name) for name, image in images]
        self._run.log({"validation": logged}, step=step)

    def close(self) -> None:
        self._run.finish()


def wanted_trackers(report_to: str | None, plot: bool = False) -> tuple[str, ...]:
    """The trackers that ``--report_to`` names: None means TensorBoard if it is installed, "all" all installed ones.

    With ``plot``, "curves" comes first.

    Raises:
      ImportError: the named tracker, or matplotlib for ``plot``, is not installed; the message says how to install it.
      ValueError: the name is unknown.
    """
    if plot:
        pyplot()
        return ("curves", *wanted_trackers(report_to))
    installed = tuple(name for name in TRACKERS if importlib.util.find_spec(name) is not None)
    if report_to in (None, "all"):
        return installed if report_to == "all" else tuple(name for name in installed if name == "tensorboard")
    if report_to == "none":
        return ()
    one_of((*TRACKERS, "none", "all"), report_to=report_to)
    if report_to not in installed:
        raise ImportError(f"--report_to {report_to} needs the package {report_to}: {INSTALL[report_to]}")
    return (report_to,)


def open_trackers(
    names: Sequence[str],
    output_dir: Path,
    logging_dir: str,
    first_step: int,
    *,
    project: str,
    entity: str | None,
    config: dict[str, Any],
) -> list[Tracker]:
    """Open the JSONL file and the named trackers (:func:`wanted_trackers`), for records of steps after
    ``first_step``."""
    folder = output_dir / logging_dir
    trackers: list[Tracker] = [JsonLines(output_dir, first_step)]
    if "curves" in names:
        trackers.append(Curves(output_dir))
    if "tensorboard" in names:
        trackers.append(TensorBoard(folder, first_step))
    if "wandb" in names:
        trackers.append(WeightsAndBiases(folder, first_step, project, entity, config))
    return trackers
