"""The device side of a job: requests for batches of images, and calls of one size for each kind of program."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from diffuse_jax.batch.jobs import OWN, Image
from diffuse_jax.command import lacks_memory
from diffuse_jax.memory import analysed, statistics
from diffuse_jax.messages import warn
from diffuse_jax.pipelines.identity import identity
from diffuse_jax.pipelines.parts.safety import FLAGGED
from diffuse_jax.pipelines.running import Request, device_call
from diffuse_jax.sharding import make_mesh, spans_processes

AUTO = "auto"

AHEAD = 2
"""How many calls wait behind the one that runs, so that the device is never without work."""

ADAPTED = 4
"""How many mixtures of LoRA files are kept ready."""

ON_CPU = 4
"""Images for each device where memory does not set the limit: more of them make a CPU no faster."""

MOST = 64
"""The largest number of images for each device: more make no device faster."""

SHARE = 0.85
"""The part of a device's free memory that is used; the allocator needs gaps, and two calls are under way."""


class Batch(NamedTuple):
    """A request that is ready to run.

    Attributes:
      pipe: the pipeline, with the adapters of the request.
      request: one row for each image.
      images: the images.
      kind: batches of one kind run the same program.
    """

    pipe: Any
    request: Any
    images: Sequence[Image]
    kind: Hashable


class Made(NamedTuple):
    """An image that was made.

    Attributes:
      image: which.
      pixels: uint8 ``[H,W,3]``.
      flagged: what the safety checker says; None if there is none.
    """

    image: Image
    pixels: np.ndarray
    flagged: bool | None


class Call(NamedTuple):
    """A device call that is under way: some images of a batch, the size it was padded to, and its results."""

    batch: Batch
    begin: int
    end: int
    size: int
    results: Future[list[Made]]


class Clock:
    """How long the device has had nothing to do.

    Attributes:
      waited: seconds without a call, between the first call and the last; those of compilation are left out.
      seconds: seconds between the first call and the end of the last, without compilation.
    """

    def __init__(self) -> None:
        self.waited = self.seconds = 0.0
        self._running, self._since, self._mutex = 0, 0.0, threading.Lock()

    def begin(self, compiling: float) -> None:
        """A call has been handed to the device, after this many seconds of compiling its program."""
        now = time.perf_counter()
        with self._mutex:
            if self._since and not self._running:
                idle = max(0.0, now - self._since - compiling)
                self.waited += idle
                self.seconds += idle
            if not self._running:
                self._since = now
            self._running += 1

    def end(self) -> None:
        """The oldest call has ended."""
        now = time.perf_counter()
        with self._mutex:
            self.seconds += now - self._since
            self._running -= 1
            self._since = now

    @property
    def share(self) -> float:
        """The part of the time in which the device waited."""
        return self.waited / self.seconds if self.seconds else 0.0


class Device:
    """Makes images with a pipeline; used from one thread.

    Attributes:
      largest: the number of images that a batch should have.
      ahead: how many calls may wait behind the one that runs. A CPU would run them all at the same time.
      clock: when the device worked.
    """

    def __init__(self, pipe: Any, batch_size: int | str) -> None:
        check_pipeline(pipe)
        self.pipe, self.clock = on_a_mesh(pipe), Clock()
        self._data = self.pipe.mesh.shape["data"]
        self._auto = batch_size == AUTO
        on_cpu = self.pipe.mesh.devices.flat[0].platform == "cpu"
        self._measures = self._auto and not on_cpu
        self.ahead = 0 if on_cpu else AHEAD
        if self._measures:
            self.largest = MOST * self._data
        else:
            self.largest = -(-(ON_CPU * self._data if self._auto else int(batch_size)) // self._data) * self._data
        self._sizes: dict[Hashable, int] = {}
        self._adapted: dict[tuple[Any, ...], Any] = {}
        self._fetcher = ThreadPoolExecutor(1, "fetch")
        self._per_element = 0.0

    def close(self) -> None:
        """Wait for what is under way, and end the thread."""
        self._fetcher.shutdown()

    # Requests

    def group(self, image: Image) -> Hashable:
        """Images of equal groups can share a batch.

        Raises:
          ValueError, TypeError: the pipeline refuses the settings of an image whose prompt has to be read for this.
        """
        call = image.job.call
        if call.get("prompt_syntax") is None and not call.get("long_prompts"):
            return image.job.group
        # The number of chunks depends on the prompt. A batch with longer ones would pad this one with empty chunks,
        # which the network sees, so the image would depend on its batch.
        alone = self.pipe.request(**arguments([image]))
        return image.job.group, shapes(alone.rows)

    def batch(self, images: Sequence[Image]) -> Batch:
        """The batch of images of one group.

        Raises:
          ValueError, TypeError, OSError: the pipeline refuses a setting, or a LoRA file cannot be used.
        """
        lora = images[0].job.lora
        pipe = self._with_adapters(tuple(lora.items()) if len(lora) > 1 else tuple((name, 1.0) for name in lora))
        options = arguments(images)
        if len(lora) == 1:
            options["lora_scale"] = [image.job.lora[name] for image in images for name in lora]
        request: Request = pipe.request(**options)
        kind = identity(request.method), shapes(request.rows), shapes(request.plan)
        return Batch(pipe, request, images, kind)

    def _with_adapters(self, mix: tuple[tuple[str, float], ...]) -> Any:
        """The pipeline with live adapters, those of these rows alone, so that an image depends on nothing else."""
        if not mix:
            return self.pipe
        if mix not in self._adapted:
            pipe = self.pipe
            for name, _ in mix:
                pipe = pipe.load_lora_weights(name, adapter_name=name)
            pipe = pipe.set_adapters([name for name, _ in mix], [weight for _, weight in mix])
            while len(self._adapted) >= ADAPTED:  # the oldest goes
                del self._adapted[next(iter(self._adapted))]
            self._adapted[mix] = pipe
        return self._adapted[mix]

    # Calls

    def start(self, batch: Batch, begin: int = 0) -> Iterator[Call]:
        """Start the device calls of a batch, one whenever the next is asked for; the first compiles if it has to.

        Raises:
          RuntimeError: the device has too little memory for the smallest call.
        """
        while begin < len(batch.images):
            try:
                size = self.size(batch)
                call = self._call(batch, begin, min(begin + size, len(batch.images)), size)
            except Exception as error:
                if not self._smaller(error, batch, size):
                    raise
                continue
            begin = call.end
            yield call

    def finish(self, call: Call) -> list[Made]:
        """Wait for a call. If it lacked memory and the size is not fixed, its images are made in smaller calls."""
        try:
            return call.results.result()
        except Exception as error:
            if not self._smaller(error, call.batch, call.size):
                raise
            rest = call.batch._replace(images=call.batch.images[: call.end])
            return [made for again in self.start(rest, call.begin) for made in self.finish(again)]

    def size(self, batch: Batch) -> int:
        """The number of images of the program for a batch, the same for all batches of one kind."""
        if batch.kind not in self._sizes:
            self._sizes[batch.kind] = self._measured(batch) if self._measures else self.largest
        return self._sizes[batch.kind]

    def _call(self, batch: Batch, begin: int, end: int, size: int) -> Call:
        before, start = batch.pipe.programs.compilations, time.perf_counter()
        _, run = device_call(batch.pipe, batch.request, begin, end, size)
        compiled = batch.pipe.programs.compilations > before
        self.clock.begin(time.perf_counter() - start if compiled else 0.0)
        try:
            results = run()
        except BaseException:
            self.clock.end()
            raise
        return Call(batch, begin, end, size, self._fetcher.submit(self._fetch, batch.images[begin:end], results))

    def _fetch(self, images: Sequence[Image], results: dict[str, Any]) -> list[Made]:
        try:
            jax.block_until_ready(results)
        finally:
            self.clock.end()
        pixels = np.asarray(results["images"])
        flags = np.asarray(results[FLAGGED]).tolist() if FLAGGED in results else [None] * len(images)
        return [Made(image, own, flag) for image, own, flag in zip(images, pixels, flags, strict=False)]

    # Memory

    def _smaller(self, error: Exception, batch: Batch, size: int) -> bool:
        """After an error for lack of memory, halve the size for batches of this kind; whether that can help."""
        if not self._auto or not lacks_memory(error) or size <= self._data:
            return False
        if self._sizes.get(batch.kind) == size:  # else an earlier error has done so
            self._sizes[batch.kind] = self._rounded(size // 2)
            warn(f"{size} images at once do not fit into memory; going on with {self._sizes[batch.kind]}")
        return True

    def _measured(self, batch: Batch) -> int:
        """A size that fits, from what the compiler says that a program needs; compiles one, or two for the first."""
        free = free_memory(self.pipe)
        elements = float(np.prod(batch.request.method.latent_shape))
        if not self._per_element:
            program, _ = device_call(batch.pipe, batch.request, 0, 1, self._data)
            needed = needed_memory(program)
            if free is None or needed is None:
                return ON_CPU * self._data
            self._per_element = needed / elements
        each = self._per_element * elements
        return self._rounded(int(SHARE * (free or 0) / each) * self._data)

    def _rounded(self, size: int) -> int:
        """The largest power of two for each device that is not more than ``size`` in all; at least one."""
        each = max(1, min(size // self._data, MOST))
        return self._data << (each.bit_length() - 1)


def arguments(images: Sequence[Image]) -> dict[str, Any]:
    """The arguments of a call for images of one group, each with its own prompt, seed and guidance."""
    first = images[0].job.call
    each = {name: [image.job.call[name] for image in images] for name in OWN if name in first}
    return {**first, **each, "seed": [image.seed for image in images]}


def shapes(tree: Any) -> Hashable:
    """The structure, shapes and dtypes of rows, whatever their number, or of a plan."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf)[1:], np.asarray(leaf).dtype) for leaf in leaves)


def check_pipeline(pipe: Any) -> None:
    """Refuse a pipeline that does not make images from prompts alone, or whose mesh spans several processes.

    Raises:
      TypeError: it needs images.
      ValueError: the mesh spans several processes.
    """
    takes = inspect.signature(pipe.compose).parameters
    if "prompt" not in takes or "image" in takes:
        raise TypeError(f"a job makes images from prompts alone, but {type(pipe).__name__} needs images, or no prompts")
    if spans_processes(pipe.mesh):
        raise ValueError(
            "the mesh spans several processes, but each makes images of its own rows; give each a mesh of its own "
            "devices: make_mesh(devices=jax.local_devices())"
        )


def on_a_mesh(pipe: Any) -> Any:
    """A pipeline without a mesh on one of its single device, because the program for a share of a mesh rounds as that
    for any other share does, but not as one without a mesh."""
    if pipe.mesh is not None:
        return pipe
    arrays = (x for x in jax.tree.leaves(dict(pipe.params)) if isinstance(x, jax.Array))
    device = next((next(iter(x.devices())) for x in arrays), jax.local_devices()[0])
    return pipe.replace(mesh=make_mesh(devices=[device]))


def needed_memory(program: Any) -> float | None:
    """Bytes that a program takes on a device besides its arguments; None if the compiler does not say."""
    found = analysed(program)
    return None if found is None else float(found.temp_size_in_bytes + found.output_size_in_bytes)


def free_memory(pipe: Any) -> float | None:
    """Bytes that are free on the fullest device of a pipeline; None if the device does not say."""
    found = statistics(pipe.mesh)
    return None if found is None else float(min(one["bytes_limit"] - one["bytes_in_use"] for one in found))
