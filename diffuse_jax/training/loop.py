"""A whole training run around the compiled step: batches in; log, checkpoints, images and the trained model out."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diffuse_jax.models.base import Params
from diffuse_jax.sharding import param_shardings, put_params, readable
from diffuse_jax.timing import compile_seconds
from diffuse_jax.training.batches import Batches
from diffuse_jax.training.checkpoint import Checkpoints, Position, shapes_of
from diffuse_jax.training.configuration import values_of, write_config
from diffuse_jax.training.distributed import say
from diffuse_jax.training.flops import count_flops, peak_flops
from diffuse_jax.training.folder import claimed
from diffuse_jax.training.interruption import BEFORE, Interrupted, Phase, interruptions
from diffuse_jax.training.monitor import Monitor, Work
from diffuse_jax.training.optimizer import optimizer_from
from diffuse_jax.training.profiling import Profiler
from diffuse_jax.training.settings import Average, RunSettings
from diffuse_jax.training.start import Counts, begin, counted, divided, local, resumed
from diffuse_jax.training.state import Loss, TrainState, ema_rate, init_state, make_step
from diffuse_jax.training.trackers import Pictures, Tracker, open_trackers, wanted_trackers
from diffuse_jax.training.upload import make_repository

Export = Callable[[Path, Params], None]
Validate = Callable[[Params], Pictures]


def fit(
    run: RunSettings,
    mesh: Mesh,
    *,
    trainable: Params,
    frozen: Params,
    loss: Loss,
    batches: Batches,
    export: Export | None = None,
    validate: Validate | None = None,
    finish: Callable[[Params], None] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Params:
    """Train, and write what belongs to the run into ``run.output_dir``.

    The run ends after ``max_train_steps`` steps, counted from step 0 also when it is resumed. SIGTERM and Ctrl-C end it
    earlier, with a checkpoint of the last finished step; so does an error. Nothing is fetched from the device between
    two records of the log.

    Args:
      run: what the run is; of a script's flags by :func:`~diffuse_jax.training.flags.settings_from`.
      mesh: of :func:`~diffuse_jax.training.devices.mesh_from` or :func:`~diffuse_jax.sharding.make_mesh`.
      trainable: parameters to train, float32.
      frozen: what the loss needs besides; gets neither gradients nor optimiser memory.
      loss: ``loss(trainable, frozen, batch, key) -> (scalar, metrics)``.
      batches: this process's rows of every update, all accumulation steps together. If they know the
        number of examples, ``total``, the run can be counted in epochs; if they have ``close``, it is called.
      export: writes trained parameters (their average with ``use_ema``) in inference format: into every checkpoint
        and, at the end, into ``output_dir``. Called on process 0 only, with arrays that are whole there.
      validate: images of such parameters, ``[(name, PIL.Image), ...]``. Called on every process, with the arrays on
        the mesh as training has them; what process 0 returns is logged.
      finish: completes the trained model in ``output_dir`` when it is written. Called at the end on every process, with
        the trained parameters, readable.
      config: what ``training.yaml`` and trackers are to say of the run, by the names of flags; the settings if None.

    Returns:
      The trained parameters (their average with ``use_ema``), readable on every process.

    Raises:
      ValueError: settings, data and devices do not fit together, or a checkpoint is of another training.
      FileNotFoundError: ``resume_from_checkpoint`` names a checkpoint that is not there.
      FileExistsError: the folder has checkpoints, and no setting says what to do with them.
      RuntimeError: another run writes into the folder.
      OSError: files cannot be written there.
      ImportError: a tracker that ``report_to`` names is not installed.
      ConnectionError: ``push_to_hub``, and the Hub cannot be reached or does not let us write.
      FloatingPointError: loss, gradient or state is not finite; step and batch are named and no checkpoint is made.
      Interrupted: a signal ended the run (a ``SystemExit``).
    """
    output, alone = Path(run.output_dir), jax.process_count() == 1
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(interruptions(BEFORE))
        compiling = stack.enter_context(compile_seconds())

        rows = run.batch.images_per_step(mesh)
        counts = counted(run, rows, batches)
        trackers = wanted_trackers(run.trackers.report_to)
        optimizer, rate = optimizer_from(run.optimizer, counts.steps, rows, trainable)
        average = run.ema.average
        make_repository(run.upload, output)
        if jax.process_index() == 0:
            stack.enter_context(claimed(output))
        folder = begin(run)  # may remove an old run: every setting has been checked
        state = init_state(local(trainable), optimizer, run.ema.use_ema, mesh)
        if folder is not None:
            like = shapes_of(state)
            del state  # the memory of the one is free before the other is read
            say(f"reading {folder}")
            state = resumed(folder, like, batches, rows, counts.steps)
        frozen = put_params(frozen, mesh)
        step = make_step(loss, optimizer, run.seed, average, param_shardings(state, mesh))
        describe(run, counts, mesh, state, frozen, batches)
        first, last = int(state.step), counts.steps
        saver, profiler = Checkpoints(output, run.checkpoints_total_limit), Profiler(run.profile, output, first)
        config = dict(values_of(run) if config is None else config)
        config |= {"max_train_steps": counts.steps, "validation_steps": counts.validation}
        opened = open_records(run, config, trackers, first)
        more = functools.partial(rates, rate, average if run.ema.use_ema else None)
        work = Work(rows, mesh.devices.size, examples=getattr(batches, "total", None))
        monitor = Monitor(opened, first, last, work, more, compiling)
        profiler.memory("initial")
        made, reached = first, batches.get_state()  # what a checkpoint would hold
        start = BEFORE if folder is None else Phase(f"the run ends; no step was finished since {folder}", True, True)

        def save(export: Export | None) -> None:
            position = Position(reached, rows, jax.process_count())
            saver.save(made, state, position, bound(export, state))

        with interrupted.phase(SAVING if alone else NOT_ALONE):
            try:
                for n in range(first, last):
                    with profiler.step(n), interrupted.phase(start) if n == first else contextlib.nullcontext():
                        with interrupted.at_once():  # the data may be slow, and nothing is half done
                            batch = divided(next(batches), mesh, run.batch.gradient_accumulation_steps)
                        if n == first:
                            say("compiling the training step; for a large network this takes minutes, once")
                            monitor.work = measured(run.peak_tflops, work, loss, state.params, frozen, batch)
                        state, metrics = step(state, frozen, batch)
                    made, reached = n + 1, batches.get_state()
                    profiler.after(n, metrics)
                    monitor.add(made, metrics, batches.names)
                    if n == first:
                        say(f"compiled in {compiling():.1f} s; step {made} is done")
                    if interrupted(made):
                        raise interrupted.ended()
                    saves, validates = made % run.checkpointing_steps == 0, made % counts.validation == 0
                    if made % run.logging_steps == 0 or made == last or saves:
                        monitor.flush()
                    if saves:
                        with monitor.aside():
                            save(export)
                    if validate is not None and validates and made < last:
                        with monitor.aside(), interrupted.at_once():
                            show(made, state, validate, monitor)
                with interrupted.at_once():
                    saver.wait()
                    write = bound(export, state)
                    if write is not None and jax.process_index() == 0:
                        write(output)
                    if finish is not None:
                        finish(readable(trained(state)))
                    if validate is not None and first < last:  # whatever becomes of the images, the result is there
                        with profiler.validation():
                            show(last, state, validate, monitor)
                    profiler.memory("final")
            except Interrupted:
                if not (alone or interrupted.agreed):
                    raise
                if made == first:
                    raise interrupted.end(start.then) from None
                raise interrupted.end(rescued(save, saver, monitor, made)) from None
            except FloatingPointError:  # what is not finite is not kept
                raise
            except Exception as error:
                if not alone:  # the others do not know
                    raise
                kept = start.then if made == first else rescued(save, saver, monitor, made)
                if interrupted.signal is not None:  # the run was to end anyway, and the signal may be what went wrong
                    raise interrupted.end(f"{kept} (after an error: {error or type(error).__name__})") from error
                if made > first:
                    say(kept)
                raise
            finally:
                profiler.close()
                monitor.close()
                getattr(batches, "close", lambda: None)()
                saver.close()
        interrupted.rest(DONE)
        return readable(trained(state))


DONE = Phase("the run is complete; the process ends", at_once=True, nothing_to_save=True)
SAVING = Phase(
    "the run ends when the last finished step is saved; a second Ctrl-C stops it at once, without a checkpoint",
    at_once=False,
)
NOT_ALONE = Phase("this process of the run ends, without a checkpoint", at_once=True, nothing_to_save=True)
"""Ctrl-C on one of several processes; their SIGTERM is JAX's affair."""


def rescued(save: Callable[[None], None], saver: Checkpoints, monitor: Monitor, made: int) -> str:
    """Save the state of the last finished step, unless it is on disk already; returns what became of it."""
    with contextlib.suppress(Exception):  # of an earlier save
        saver.wait()
    try:
        monitor.flush()
        if saver.written != made:
            save(None)  # the state alone: there may be seconds left
            saver.wait()
    except Exception as error:
        return f"no checkpoint of step {made} could be written: {error}"
    return f"checkpoint-{made} is written; --resume_from_checkpoint latest goes on"


def trained(state: TrainState) -> Params:
    """The parameters that are the result of the run."""
    return state.params if state.ema is None else state.ema


def bound(export: Export | None, state: TrainState) -> Callable[[Path], None] | None:
    """``export`` of these parameters; all processes must call it, process 0 the result."""
    if export is None:
        return None
    params = readable(trained(state))
    return lambda folder: export(folder, params)


def show(made: int, state: TrainState, validate: Validate, monitor: Monitor) -> None:
    """Validation images; all processes must call it."""
    say(f"making validation images after step {made}")
    start = time.perf_counter()
    pictures = validate(trained(state))
    say(f"validation images are made ({time.perf_counter() - start:.1f} s)")
    if jax.process_index() == 0:
        monitor.pictures(made, pictures)


def open_records(run: RunSettings, config: Mapping[str, Any], trackers: tuple[str, ...], first: int) -> list[Tracker]:
    """The configuration is written, the trackers are opened (on process 0); records are of steps after ``first``."""
    if jax.process_index() != 0:
        return []
    output, where = Path(run.output_dir), run.trackers
    return open_trackers(
        trackers,
        output,
        where.logging_dir,
        first,
        project=where.tracker_project_name,
        entity=where.wandb_entity,
        config=write_config(output, config),
    )


def rates(rate: optax.Schedule, average: Average | None, made: int) -> dict[str, float]:
    """What a record says of step ``made`` besides its metrics."""
    numbers = {"learning_rate": float(rate(made - 1))}
    return numbers if average is None else numbers | {"ema_decay": float(ema_rate(jnp.int32(made), average))}


def measured(peak_tflops: float | None, work: Work, loss: Loss, params: Params, frozen: Params, batch: Any) -> Work:
    """With the operations of an update, where a device's speed is known (or given as ``peak_tflops``)."""
    peak = peak_tflops * 1e12 if peak_tflops else peak_flops(jax.devices()[0])
    if peak is None:
        return work
    shape = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    gradient = jax.value_and_grad(loss, has_aux=True)
    part = count_flops(gradient, params, frozen, jax.tree.map(shape, batch), jax.random.key(0))
    return work._replace(flops=part * jax.tree.leaves(batch)[0].shape[0], peak=peak)


def describe(run: RunSettings, counts: Counts, mesh: Mesh, state: TrainState, frozen: Params, batches: Batches) -> None:
    """Say what the run is going to be."""
    count = lambda tree: f"{sum(x.size for x in jax.tree.leaves(tree)):,}"
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    examples, total = getattr(batches, "total", None), run.batch.images_per_step(mesh)
    say(
        f"training {count(state.params)} parameters, {count(frozen)} frozen\n"
        f"  examples                 {'a stream' if examples is None else f'{examples:,}'}\n"
        f"  batch per device         {run.batch.train_batch_size}\n"
        f"  accumulation steps       {run.batch.gradient_accumulation_steps}\n"
        f"  images per update        {total:,}\n"
        f"  devices                  {mesh.devices.size} x {mesh.devices.flat[0].device_kind} ({axes}), "
        f"{jax.process_count()} processes\n"
        f"  updates                  {int(state.step):,} to {counts.steps:,}"
        + ("" if examples is None else f" ({counts.steps * total / examples:.4g} epochs)")
    )
