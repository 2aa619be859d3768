"""The training loop around the compiled step: batches in; logs, checkpoints, images and the trained model out."""

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
from diffuse_jax.sharding import param_shardings, parse_mesh, put_params, readable
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
from diffuse_jax.training.rehearsal import STEPS, rehearse
from diffuse_jax.training.settings import Average, RunSettings
from diffuse_jax.training.start import Counts, begin_run, count_steps, local, next_batch, restore, starting_point
from diffuse_jax.training.state import Loss, TrainState, ema_rate, init_state, make_step
from diffuse_jax.training.trackers import Images, Tracker, open_trackers, wanted_trackers
from diffuse_jax.training.upload import make_repository

Export = Callable[[Path, Params], Any]
"""Writes parameters to a folder; what it returns, such as the file, is not read."""
Validate = Callable[[Params], Images]


def fit(
    run: RunSettings,
    mesh: Mesh | str,
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
    """Train, and write everything that belongs to the run to ``run.output_dir``.

    The run ends after ``max_train_steps`` steps, counted from step 0 even when it is resumed. SIGTERM, Ctrl-C or an
    error ends it earlier, with a checkpoint of the last completed step. Nothing is fetched from the device between two
    log records.

    Args:
      run: settings of the run; :func:`~diffuse_jax.training.flags.settings_from` builds them from a script's flags.
      mesh: from :func:`~diffuse_jax.training.devices.mesh_from` or :func:`~diffuse_jax.sharding.make_mesh`, or its
        text, such as ``"data=4,fsdp=2"``.
      trainable: parameters to train, float32.
      frozen: other parameters of the loss, which get neither gradients nor optimiser state.
      loss: ``loss(trainable, frozen, batch, key) -> (scalar, metrics)``.
      batches: the rows of every training step that this process provides, all accumulation steps together. If they have
        ``total``, the number of examples, the length of the run can be given in epochs; if they have ``follow``, it is
        called with the trainable parameters before each batch, for data that the model makes itself; if they have
        ``close``, it is called at the end.
      export: writes trained parameters (their average with ``use_ema``) in inference format: to every checkpoint and,
        at the end, to ``output_dir``. Called on process 0 only, with arrays that it can read in full.
      validate: generates images with such parameters, ``[(name, PIL.Image), ...]``. Called on every process, with the
        arrays on the mesh as in training; the images that process 0 returns are logged.
      finish: completes the trained model in ``output_dir`` after it has been written. Called at the end on every
        process, with the trained parameters, which are readable there.
      config: values by flag name for ``training.yaml`` and the trackers; those of the settings if None.

    Returns:
      The trained parameters (their average with ``use_ema``), readable on every process.

    Raises:
      ValueError: settings, data and devices do not fit together, or the checkpoint belongs to another training.
      FileNotFoundError: ``resume_from_checkpoint`` names a checkpoint that does not exist.
      FileExistsError: the folder has checkpoints, and no setting says what to do with them.
      RuntimeError: another run is writing to the folder.
      OSError: files cannot be written there.
      ImportError: a tracker that ``report_to`` names, or matplotlib for ``plot``, is not installed.
      ConnectionError: ``push_to_hub`` is set, but the Hub cannot be reached or denies write access.
      FloatingPointError: the loss, the gradient or the state is not finite; the message names the step and its batch.
        No checkpoint is written.
      Interrupted: a signal ended the run (a ``SystemExit``).
      SystemExit: the run was only rehearsed (``dry_run``); the status is 0, or a text that says why it cannot succeed.
    """
    output, alone = Path(run.output_dir), jax.process_count() == 1
    mesh = parse_mesh(mesh) if isinstance(mesh, str) else mesh
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(interruptions(BEFORE))
        compiling = stack.enter_context(compile_seconds())

        rows = run.batch.images_per_step(mesh)
        counts = count_steps(run, rows, getattr(batches, "total", None))
        trackers = wanted_trackers(run.trackers.report_to, run.trackers.plot)
        optimizer, rate = optimizer_from(run.optimizer, counts.steps, rows, trainable)
        average = run.ema.average
        if not run.dry_run:
            make_repository(run.upload, output)
            if jax.process_index() == 0:
                stack.enter_context(claimed(output))
        # The beginning of a run may remove an old one, so it comes after all settings have been checked.
        folder = starting_point(run) if run.dry_run else begin_run(run)
        state = init_state(local(trainable), optimizer, run.ema.use_ema, mesh)
        if folder is not None:
            like = shapes_of(state)
            del state  # frees its memory before the checkpoint is read
            say(f"reading {folder}")
            state = restore(folder, like, batches, rows, counts.steps)
        frozen = put_params(frozen, mesh)
        step = make_step(loss, optimizer, run.seed, average, param_shardings(state, mesh))
        describe(run, counts, mesh, state, frozen, batches)
        if run.dry_run:
            stack.callback(getattr(batches, "close", lambda: None))
            show = None if validate is None else lambda state: validate(trained(state))
            with interrupted.at_once():
                found = rehearse(run, mesh, counts, step, state, frozen, batches, compiling, show)
            say(f"dry run: {STEPS} steps are done, and nothing of the run was written\n{found}")
            raise SystemExit("; ".join(found.problems()) or 0)
        first, last = int(state.step), counts.steps
        saver, profiler = Checkpoints(output, run.checkpoints_total_limit), Profiler(run.profile, output, first)
        config = dict(values_of(run) if config is None else config)
        config |= {"max_train_steps": counts.steps, "validation_steps": counts.validation}
        opened = open_run_trackers(run, config, trackers, first)
        more = functools.partial(rates, rate, average if run.ema.use_ema else None)
        work = Work(rows, mesh.devices.size, examples=getattr(batches, "total", None))
        monitor = Monitor(opened, first, last, work, more, compiling)
        profiler.memory("initial")
        done, reached = first, batches.get_state()  # what a checkpoint would contain
        start = BEFORE if folder is None else Phase(f"the run ends; no step was finished since {folder}", True, True)

        def save(export: Export | None) -> None:
            position = Position(reached, rows, jax.process_count())
            saver.save(done, state, position, bind_export(export, state))

        with interrupted.phase(SAVING if alone else NOT_ALONE):
            try:
                for n in range(first, last):
                    with profiler.step(n), interrupted.phase(start) if n == first else contextlib.nullcontext():
                        with interrupted.at_once():  # the data may be slow, and nothing is left half done
                            batch = next_batch(batches, state.params, mesh, run.batch.gradient_accumulation_steps)
                        if n == first:
                            say("compiling the training step; for a large network this takes minutes, once")
                            monitor.work = with_flops(run.peak_tflops, work, loss, state.params, frozen, batch)
                        state, metrics = step(state, frozen, batch)
                    done, reached = n + 1, batches.get_state()
                    profiler.after(n, metrics)
                    monitor.add(done, metrics, batches.names)
                    if n == first:
                        say(f"compiled in {compiling():.1f} s; step {done} is done")
                    if interrupted(done):
                        raise interrupted.ended()
                    saves, validates = done % run.checkpointing_steps == 0, done % counts.validation == 0
                    if done % run.logging_steps == 0 or done == last or saves:
                        monitor.flush()
                    if saves:
                        with monitor.aside():
                            save(export)
                    if validate is not None and validates and done < last:
                        with monitor.aside(), interrupted.at_once():
                            log_validation(done, state, validate, monitor)
                with interrupted.at_once():
                    saver.wait()
                    write = bind_export(export, state)
                    if write is not None and jax.process_index() == 0:
                        write(output)
                    if finish is not None:
                        finish(readable(trained(state)))
                    if validate is not None and first < last:  # even if this fails, the trained model is written
                        with profiler.validation():
                            log_validation(last, state, validate, monitor)
                    profiler.memory("final")
            except Interrupted:
                if not (alone or interrupted.agreed):
                    raise
                if done == first:
                    raise interrupted.end(start.then) from None
                raise interrupted.end(save_before_exit(save, saver, monitor, done)) from None
            except FloatingPointError:  # values that are not finite are not saved
                raise
            except Exception as error:
                if not alone:  # the other processes do not know about the error
                    raise
                kept = start.then if done == first else save_before_exit(save, saver, monitor, done)
                if (
                    interrupted.signal is not None
                ):  # the run was ending anyway, and the signal may have caused the error
                    raise interrupted.end(f"{kept} (after an error: {error or type(error).__name__})") from error
                if done > first:
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
"""Ctrl-C on one of several processes; JAX handles their SIGTERM."""


def save_before_exit(save: Callable[[None], None], saver: Checkpoints, monitor: Monitor, done: int) -> str:
    """Save the state of the last completed step, unless it is already on disk; returns a message with the outcome."""
    with contextlib.suppress(Exception):  # an error of an earlier save
        saver.wait()
    try:
        monitor.flush()
        if saver.written != done:
            save(None)  # the state only: there may be just seconds left
            saver.wait()
    except Exception as error:
        return f"no checkpoint of step {done} could be written: {error}"
    return f"checkpoint-{done} is written; --resume_from_checkpoint latest continues from it"


def trained(state: TrainState) -> Params:
    """The parameters that result from the run."""
    return state.params if state.ema is None else state.ema


def bind_export(export: Export | None, state: TrainState) -> Callable[[Path], None] | None:
    """``export`` of these parameters as a function of the folder; all processes must call this, process 0 the
    result."""
    if export is None:
        return None
    params = readable(trained(state))
    return lambda folder: export(folder, params)


def log_validation(done: int, state: TrainState, validate: Validate, monitor: Monitor) -> None:
    """Generate and log validation images; all processes must call this."""
    say(f"generating validation images after step {done}")
    start = time.perf_counter()
    images = validate(trained(state))
    say(f"validation images are done ({time.perf_counter() - start:.1f} s)")
    if jax.process_index() == 0:
        monitor.images(done, images)


def open_run_trackers(
    run: RunSettings, config: Mapping[str, Any], trackers: tuple[str, ...], first: int
) -> list[Tracker]:
    """Write the configuration and open the trackers, on process 0, for records of the steps after ``first``."""
    if jax.process_index() != 0:
        return []
    output, settings = Path(run.output_dir), run.trackers
    return open_trackers(
        trackers,
        output,
        str(settings.logging_dir),
        first,
        project=settings.tracker_project_name,
        entity=settings.wandb_entity,
        config=write_config(output, config),
    )


def rates(rate: optax.Schedule, average: Average | None, done: int) -> dict[str, float]:
    """Values that a record of step ``done`` has in addition to the metrics."""
    values = {"learning_rate": float(rate(done - 1))}
    return values if average is None else values | {"ema_decay": float(ema_rate(jnp.int32(done), average))}


def with_flops(peak_tflops: float | None, work: Work, loss: Loss, params: Params, frozen: Params, batch: Any) -> Work:
    """``work`` with the operations of a training step, if the speed of the device is known or given by
    ``peak_tflops``."""
    peak = peak_tflops * 1e12 if peak_tflops else peak_flops(jax.devices()[0])
    if peak is None:
        return work
    shape = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    gradient = jax.value_and_grad(loss, has_aux=True)
    part = count_flops(gradient, params, frozen, jax.tree.map(shape, batch), jax.random.key(0))
    return work._replace(flops=part * jax.tree.leaves(batch)[0].shape[0], peak=peak)


def describe(run: RunSettings, counts: Counts, mesh: Mesh, state: TrainState, frozen: Params, batches: Batches) -> None:
    """Print a summary of the run before it starts."""
    count = lambda tree: f"{sum(x.size for x in jax.tree.leaves(tree)):,}"
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    examples, total = getattr(batches, "total", None), run.batch.images_per_step(mesh)
    say(
        f"training {count(state.params)} parameters, {count(frozen)} frozen\n"
        f"  examples                 {'a stream' if examples is None else f'{examples:,}'}\n"
        f"  batch per device         {run.batch.train_batch_size}\n"
        f"  accumulation steps       {run.batch.gradient_accumulation_steps}\n"
        f"  images per step          {total:,}\n"
        f"  devices                  {mesh.devices.size} x {mesh.devices.flat[0].device_kind} ({axes}), "
        f"{jax.process_count()} processes\n"
        f"  steps                    {int(state.step):,} to {counts.steps:,}"
        + ("" if examples is None else f" ({counts.steps * total / examples:.4g} epochs)")
    )
