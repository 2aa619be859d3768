"""Command-line flags that every training script has, with the names and meanings they have in diffusers' scripts."""

from __future__ import annotations

import argparse

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from diffuse_jax.training.optimizer import SCHEDULES, adamw, learning_rate

PRECISIONS: dict[str, DTypeLike] = {"no": jnp.float32, "bf16": jnp.bfloat16}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, and the description keeps its lines."""


def make_parser(description: str, output_dir: str) -> argparse.ArgumentParser:
    """A parser with the shared flags; scripts add theirs."""
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
    add("--lr_scheduler", default="constant", choices=sorted(SCHEDULES), help="how the rate changes")
    add("--lr_warmup_steps", type=int, default=500, help="updates of linear warm-up")
    add("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    add("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    add("--adam_weight_decay", type=float, default=1e-2, help="weight decay, not scaled by the gradient")
    add("--adam_epsilon", type=float, default=1e-8, help="added to the root of the second moment")
    add("--max_grad_norm", type=float, default=1.0, help="global norm to which the gradient is clipped")
    add("--use_ema", action="store_true", help="average the parameters and save the average")
    add("--ema_decay", type=float, default=0.9999, help="decay of that average, reached after a ramp")
    add("--mixed_precision", default="no", choices=sorted(PRECISIONS), help="dtype of the computation")
    add("--checkpointing_steps", type=int, default=500, help="write checkpoint-N every so many updates")
    add("--checkpoints_total_limit", type=int, default=None, help="keep at most this many checkpoints")
    add("--resume_from_checkpoint", default=None, help='"latest", a checkpoint of output_dir, or a path')
    add("--logging_steps", type=int, default=50, help="write a line to log.jsonl every so many updates")
    return parser


def make_optimizer(args: argparse.Namespace) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser that the flags describe, and its learning rate."""
    rate = learning_rate(args.lr_scheduler, args.learning_rate, args.lr_warmup_steps, args.max_train_steps)
    optimizer = adamw(
        rate,
        beta1=args.adam_beta1,
        beta2=args.adam_beta2,
        weight_decay=args.adam_weight_decay,
        epsilon=args.adam_epsilon,
        max_grad_norm=args.max_grad_norm,
    )
    return optimizer, rate


def train_options(args: argparse.Namespace) -> dict[str, object]:
    """The flags that :func:`diffuse_jax.training.loop.train` takes."""
    names = ("output_dir", "max_train_steps", "logging_steps", "checkpointing_steps", "checkpoints_total_limit")
    return {name: getattr(args, name) for name in names}
