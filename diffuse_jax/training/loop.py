"""A whole training run around the compiled step: batches in; log, checkpoints, pictures and the trained model out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diffuse_jax.models.base import Params
from diffuse_jax.sharding import param_shardings, readable
from diffuse_jax.training.arguments import average_from, optimizer_from, pictures_per_update
from diffuse_jax.training.batches import Batches
from diffuse_jax.training.checkpoint import Checkpoints, Position, shapes_of
from diffuse_jax.training.configuration import write_config
from diffuse_jax.training.flops import count_flops, peak_flops
from diffuse_jax.training.interruption import interruptions
from diffuse_jax.training.monitor import Monitor, Work
from diffuse_jax.training.profiling import Profiler
from diffuse_jax.training.start import divided, local, place, resumed, say, settled, starting_point
from diffuse_jax.training.state import Loss, TrainState, ema_rate, init_state, make_step
from diffuse_jax.training.trackers import Pictures, open_trackers, wanted_trackers
from diffuse_jax.training.upload import make_repository

Export = Callable[[Path, Params], None]
Validate = Callable[[Params], Pictures]


def fit(
    args: argparse.Namespace,
    mesh: Mesh,
    *,
    trainable: Params,
    frozen: Params,
    loss: Loss,
    batches: Batches,
    export: Export | None = None,
    validate: Validate | None = None,
) -> Params:
    """Train as the flags say, and write what belongs to the run into ``args.output_dir``.

    The run ends at ``max_train_steps`` updates, counted from step 0 also when it is resumed, or after SIGTERM or Ctrl-C
    with a checkpoint. Nothing is fetched from the device between two records of the log.

    Args:
      args: flags of :func:`~diffuse_jax.training.arguments.make_parser`.
      mesh: of :func:`~diffuse_jax.training.arguments.mesh_from`.
      trainable: parameters to train, float32.
      frozen: what the loss needs besides; gets neither gradients nor optimiser memory.
      loss: ``loss(trainable, frozen, batch, key) -> (scalar, metrics)``.
      batches: this process's rows of every update, all accumulation steps together. If they know the
        number of examples, ``total``, the run can be counted in epochs; if they have ``close``, it is called.
      export: writes trained parameters (their average with ``--use_ema``) in inference format: into every checkpoint
        and, at the end, into ``output_dir``. Called on process 0 only, with arrays that are whole there.
      validate: pictures of such parameters, ``[(name, PIL.Image), ...]``. Called on every process, with the arrays on
        the mesh as training has them; what process 0 returns is logged.

    Returns:
      The trained parameters (their average with ``--use_ema``), readable on every process.

    Raises:
      ValueError: flags, data and devices do not fit together, or a checkpoint is of another training.
      FileNotFoundError: ``--resume_from_checkpoint`` names a checkpoint that is not there.
      FileExistsError: the folder has checkpoints, and no flag says what to do with them.
      ImportError: a tracker that ``--report_to`` names is not installed.
      ConnectionError: ``--push_to_hub``, and the Hub cannot be reached or does not let us write.
      FloatingPointError: loss, gradient or state is not finite; step and batch are named and no checkpoint is made.
      Interrupted: a signal ended the run (a ``SystemExit``).
    """
    args = settled(args, mesh, batches)
    trackers = wanted_trackers(args.report_to)
    optimizer, rate = optimizer_from(args, mesh)
    average = average_from(args)
    make_repository(args)
    folder = starting_point(args)  # may remove an old run: every flag has been checked
    state = init_state(local(trainable), optimizer, args.use_ema, mesh)
    rows = pictures_per_update(args, mesh)
    if folder is not None:
        like = shapes_of(state)
        del state  # the memory of the one is free before the other is read
        state = resumed(folder, like, batches, rows, args.max_train_steps)
    frozen = place(frozen, mesh)
    step = make_step(loss, optimizer, args.seed, average, param_shardings(state, mesh))
    describe(args, mesh, state, frozen, batches)
    first, last, output = int(state.step), args.max_train_steps, Path(args.output_dir)
    saver, profiler = Checkpoints(output, args.checkpoints_total_limit), Profiler(args, output, first)
    monitor = open_monitor(args, trackers, first, Work(rows, mesh.devices.size), rate, average)
    profiler.memory("initial")

    def save(made: int, export: Export | None) -> None:
        position = Position(batches.get_state(), rows, jax.process_count())
        saver.save(made, state, position, bound(export, state))

    try:
        with interruptions() as interrupted:
            for n in range(first, last):
                made = n + 1
                with profiler.step(n):
                    batch = divided(next(batches), mesh, args.gradient_accumulation_steps)
                    if n == first:
                        monitor.work = measured(args, monitor.work, loss, state.params, frozen, batch)
                    state, metrics = step(state, frozen, batch)
                profiler.after(n, metrics)
                monitor.add(made, metrics, batches.names)
                if interrupted(made):
                    monitor.flush()
                    save(made, None)  # the state first: there may be seconds left
                    saver.wait()
                    raise interrupted.end(f"checkpoint-{made} is written; --resume_from_checkpoint latest goes on")
                saves, validates = made % args.checkpointing_steps == 0, made % args.validation_steps == 0
                if made % args.logging_steps == 0 or made == last or saves:
                    monitor.flush()
                if saves:
                    with monitor.aside():
                        save(made, export)
                if validate is not None and validates and made < last:
                    with monitor.aside():
                        show(made, state, validate, monitor)
        saver.wait()
        write = bound(export, state)
        if write is not None and jax.process_index() == 0:
            write(output)
        if validate is not None and first < last:  # whatever becomes of the pictures, the result is there
            with profiler.validation():
                show(last, state, validate, monitor)
        profiler.memory("final")
    finally:
        profiler.close()
        monitor.close()
        getattr(batches, "close", lambda: None)()
        saver.close()
    return readable(trained(state))


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
    """Validation pictures; all processes must call it."""
    pictures = validate(trained(state))
    if jax.process_index() == 0:
        monitor.pictures(made, pictures)


def open_monitor(
    args: argparse.Namespace, trackers: tuple[str, ...], first: int, work: Work, rate: optax.Schedule, average: Any
) -> Monitor:
    """The configuration is written, the trackers are opened (on process 0)."""
    opened, output = [], Path(args.output_dir)
    if jax.process_index() == 0:
        config = write_config(output, args)
        names = {"project": args.tracker_project_name, "entity": args.wandb_entity, "config": config}
        opened = open_trackers(trackers, output, args.logging_dir, first, **names)

    def more(made: int) -> dict[str, float]:
        numbers = {"learning_rate": float(rate(made - 1))}
        return numbers | ({"ema_decay": float(ema_rate(jnp.int32(made), average))} if args.use_ema else {})

    return Monitor(opened, first, args.max_train_steps, work, more)


def measured(args: argparse.Namespace, work: Work, loss: Loss, params: Params, frozen: Params, batch: Any) -> Work:
    """With the operations of an update, where a device's speed is known (or given with ``--peak_tflops``)."""
    peak = args.peak_tflops * 1e12 if args.peak_tflops else peak_flops(jax.devices()[0])
    if peak is None:
        return work
    shape = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    gradient = jax.value_and_grad(loss, has_aux=True)
    part = count_flops(gradient, params, frozen, jax.tree.map(shape, batch), jax.random.key(0))
    return work._replace(flops=part * jax.tree.leaves(batch)[0].shape[0], peak=peak)


def describe(args: argparse.Namespace, mesh: Mesh, state: TrainState, frozen: Params, batches: Batches) -> None:
    """Say what the run is going to be."""
    count = lambda tree: f"{sum(x.size for x in jax.tree.leaves(tree)):,}"
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    examples, total = getattr(batches, "total", None), pictures_per_update(args, mesh)
    say(
        f"training {count(state.params)} parameters, {count(frozen)} frozen\n"
        f"  examples                 {'a stream' if examples is None else f'{examples:,}'}\n"
        f"  batch per device         {args.train_batch_size}\n"
        f"  accumulation steps       {args.gradient_accumulation_steps}\n"
        f"  pictures per update      {total:,}\n"
        f"  devices                  {mesh.devices.size} x {mesh.devices.flat[0].device_kind} ({axes}), "
        f"{jax.process_count()} processes\n"
        f"  updates                  {int(state.step):,} to {args.max_train_steps:,}"
        + ("" if examples is None else f" ({args.max_train_steps * total / examples:.4g} epochs)")
    )
