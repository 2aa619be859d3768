"""Command-line flags that every training script has, with the names and meanings they have in diffusers' scripts."""

from __future__ import annotations

import argparse
from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax.models.remat import POLICIES
from diffuse_jax.schedulers.base import Scheduler
from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.objective import TIMESTEP_BIASES, Objective, timestep_probabilities
from diffuse_jax.training.optimizer import OPTIMIZERS, SCHEDULES, learning_rate, make_optimizer
from diffuse_jax.training.state import Average

PRECISIONS: dict[str, DTypeLike] = {"no": jnp.float32, "bf16": jnp.bfloat16}


MESH_FLAGS = (
    ("data", -1, "devices along which batches are divided; -1 is all that remain"),
    ("fsdp", 1, "devices along which batches, parameters and optimiser are divided"),
    ("tensor", 1, "devices along which wide layers are divided"),
)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, and the description keeps its lines."""


class Refused(argparse.Action):
    """A flag of other libraries that has no meaning here: an error that says what to do instead."""

    def __init__(self, option_strings: list[str], dest: str, advice: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.advice = advice

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(f"{self.option_strings[0]}: {self.advice}")


def make_parser(description: str | None, output_dir: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the shared flags; scripts add theirs, and may give other defaults."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=Help,
    )
    add = parser.add_argument
    add("--train_data_dir", required=True, help="image folder with metadata.jsonl: file_name and text on each line")
    add("--output_dir", default=output_dir, help="where checkpoints, the log and the trained model go")
    add("--seed", type=int, default=0, help="decides the order of the data, noise, timesteps and caption dropout")
    add("--train_batch_size", type=int, default=16, help="pictures per device and update")
    add("--max_train_steps", type=int, default=1000, help="updates in all, counted from step 0 also when resuming")
    add("--learning_rate", type=float, default=1e-4, help="highest learning rate")
    add("--lr_scheduler", default="constant", choices=SCHEDULES, help="how the rate changes")
    add("--lr_warmup_steps", type=int, default=500, help="updates of linear warm-up")
    add("--lr_num_cycles", type=int, default=1, help="periods of cosine_with_restarts")
    add("--lr_power", type=float, default=1.0, help="exponent of polynomial")
    add("--lr_step_rules", default="", help='of piecewise_constant, such as "1:10,0.1:20,0.01"')
    add("--optimizer", default="adamw", choices=sorted(OPTIMIZERS), help="lion and adafactor need less memory")
    add("--adam_beta1", type=float, default=None, help="decay of the first moment; the optimiser's own if left out")
    add("--adam_beta2", type=float, default=None, help="decay of the second moment; likewise")
    add("--adam_weight_decay", type=float, default=1e-2, help="weight decay, scaled by the rate only")
    add("--adam_epsilon", type=float, default=None, help="added to the root of the second moment; likewise")
    add(
        "--use_8bit_adam",
        action=Refused,
        advice="JAX has no 8-bit Adam; --optimizer lion or adafactor needs less memory",
    )
    add("--max_grad_norm", type=float, default=1.0, help="global norm to which the gradient is clipped")
    add("--scale_lr", action="store_true", help="multiply learning_rate by the pictures of an update")
    add("--gradient_accumulation_steps", type=int, default=1, help="parts of an update, one in memory at a time")
    add("--gradient_checkpointing", action="store_true", help="the same as --remat_policy blocks")
    add("--remat_policy", default=None, choices=POLICIES, help="what the backward pass computes again to save memory")
    add("--use_ema", action="store_true", help="average the parameters and save the average")
    add("--ema_decay", type=float, default=0.9999, help="decay of that average, reached after a ramp")
    add("--ema_inv_gamma", type=float, default=None, help="use the ramp 1 - (1 + n / this) ** -power instead")
    add("--ema_power", type=float, default=2 / 3, help="power of that ramp")
    for axis, size, what in MESH_FLAGS:
        add(f"--mesh_{axis}", type=int, default=size, help=what)
    add("--mixed_precision", default="no", choices=sorted(PRECISIONS), help="dtype of the computation")
    add("--checkpointing_steps", type=int, default=500, help="write checkpoint-N every so many updates")
    add("--checkpoints_total_limit", type=int, default=None, help="keep at most this many checkpoints")
    add("--resume_from_checkpoint", default=None, help='"latest", a checkpoint of output_dir, or a path')
    add("--logging_steps", type=int, default=50, help="write a line to log.jsonl every so many updates")
    parser.set_defaults(**defaults)
    return parser


def add_objective(parser: argparse.ArgumentParser) -> None:
    """The flags of the loss of denoising networks."""
    add = parser.add_argument_group("loss").add_argument
    add("--snr_gamma", type=float, default=None, help="Min-SNR weighting; 5 is recommended")
    add("--noise_offset", type=float, default=0.0, help="noise that all pixels of a channel share; 0.1 is usual")
    add("--input_perturbation", type=float, default=0.0, help="extra noise in the input only; 0.1 is usual")
    add("--timestep_bias_strategy", default="none", choices=TIMESTEP_BIASES, help="which timesteps to draw more often")
    add("--timestep_bias_multiplier", type=float, default=1.0, help="how many times more often")
    add("--timestep_bias_portion", type=float, default=0.25, help="share of timesteps for earlier and later")
    add("--timestep_bias_begin", type=int, default=0, help="first timestep of range")
    add("--timestep_bias_end", type=int, default=None, help="timestep before which range ends; all if left out")


def objective_from(args: argparse.Namespace, scheduler: Scheduler, prior_loss_weight: float | None = None) -> Objective:
    """The loss that those flags describe.

    Raises:
      ValueError: a flag is impossible.
    """
    bias = timestep_probabilities(
        args.timestep_bias_strategy,
        scheduler.num_train_timesteps,
        multiplier=args.timestep_bias_multiplier,
        portion=args.timestep_bias_portion,
        begin=args.timestep_bias_begin,
        end=args.timestep_bias_end,
    )
    return Objective(
        scheduler=scheduler,
        snr_gamma=args.snr_gamma,
        noise_offset=args.noise_offset,
        input_perturbation=args.input_perturbation,
        timestep_bias=bias,
        prior_loss_weight=prior_loss_weight,
    )


def optimizer_from(args: argparse.Namespace, mesh: Mesh) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser that the flags describe, and its learning rate."""
    rate = learning_rate(
        args.lr_scheduler,
        args.learning_rate * (pictures_per_update(args, mesh) if args.scale_lr else 1),
        args.lr_warmup_steps,
        args.max_train_steps,
        cycles=args.lr_num_cycles,
        power=args.lr_power,
        rules=args.lr_step_rules,
    )
    names = ("beta1", "beta2", "weight_decay", "epsilon")
    settings = {name: getattr(args, f"adam_{name}") for name in names}
    given = {name: value for name, value in settings.items() if value is not None}
    return make_optimizer(args.optimizer, rate, max_grad_norm=args.max_grad_norm, **given), rate


def remat_from(args: argparse.Namespace) -> str:
    """What the UNet's ``remat`` should be; ``--remat_policy`` decides over ``--gradient_checkpointing``."""
    return args.remat_policy or ("blocks" if args.gradient_checkpointing else "none")


def average_from(args: argparse.Namespace) -> Average:
    """The running average that the flags describe."""
    return Average(decay=args.ema_decay, inv_gamma=args.ema_inv_gamma, power=args.ema_power)


def mesh_from(args: argparse.Namespace) -> Mesh:
    """The mesh that the flags describe, over all devices."""
    return make_mesh(data=args.mesh_data, fsdp=args.mesh_fsdp, tensor=args.mesh_tensor)


def pictures_per_update(args: argparse.Namespace, mesh: Mesh) -> int:
    """``train_batch_size`` for each device that gets a part of the batch, times the accumulation steps."""
    return args.train_batch_size * mesh.shape["data"] * mesh.shape["fsdp"] * args.gradient_accumulation_steps


def train_options(args: argparse.Namespace) -> dict[str, object]:
    """The flags that :func:`diffuse_jax.training.loop.train` takes."""
    names = ("output_dir", "max_train_steps", "logging_steps", "checkpointing_steps", "checkpoints_total_limit")
    options = {name: getattr(args, name) for name in names}
    return options | {"accumulation_steps": args.gradient_accumulation_steps}
