"""Command-line flags that every training script has, with the names and meanings they have in diffusers' scripts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from diffuse_jax.models.remat import POLICIES
from diffuse_jax.training.batches import BatchSettings
from diffuse_jax.training.compute import ComputeSettings, check_precision
from diffuse_jax.training.devices import DeviceSettings
from diffuse_jax.training.distributed import ProcessSettings
from diffuse_jax.training.flags import Accepted, Parser, Refused
from diffuse_jax.training.hub import HubSettings
from diffuse_jax.training.objective import TIMESTEP_BIASES, ObjectiveSettings
from diffuse_jax.training.optimizer import OPTIMIZERS, SCHEDULES, OptimizerSettings
from diffuse_jax.training.profiling import ProfileSettings
from diffuse_jax.training.run import RunSettings
from diffuse_jax.training.state import EmaSettings
from diffuse_jax.training.trackers import TRACKERS, TrackerSettings
from diffuse_jax.training.upload import UploadSettings

SEVERAL_PROCESSES = "processes are set with --coordinator_address, --num_processes and --process_id"
EVERY_CHECKPOINT = "every checkpoint holds the model: use --checkpointing_steps"


def precision(name: str) -> str:
    """The value of ``--mixed_precision``."""
    try:
        check_precision(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid choice: {error}") from None
    return name


def make_parser(description: str | None, output_dir: str, **defaults: Any) -> Parser:
    """A parser with the shared flags in groups; scripts add theirs, and may give other defaults.

    ``parser.group("model")("--flag", ...)`` adds a flag to a group.
    """
    parser = Parser(description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with flags; the command line wins over it")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, not only its message")
    for add_flags in (
        _add_model,
        _add_output,
        _add_optimisation,
        _add_memory,
        _add_average,
        _add_mesh,
        _add_checkpoints,
        _add_monitoring,
        _add_hub,
    ):
        add_flags(parser)
    parser.set_defaults(**defaults, output_dir=output_dir)
    return parser


def _add_model(parser: Parser) -> None:
    add = parser.group("model", HubSettings)
    add("--revision", help="branch, tag or commit of the model on the Hub")
    add("--variant", help='which weight files to read, such as "fp16"')
    add("--non_ema_revision", action=Refused, advice="all networks come from one branch: --revision")
    add("--cache_dir", help="where downloads are kept, instead of the Hub's own folder")
    add("--from_pt", action=Accepted, note="PyTorch weights are read as they are")


def _add_output(parser: Parser) -> None:
    add = parser.group("output", RunSettings)
    add(
        "--output_dir",
        type=os.path.expanduser,
        help="where checkpoints, logs and the trained model go; all processes must see it",
    )
    add("--overwrite_output_dir", action="store_true", help="remove the checkpoints of an older run from it")
    add("--seed", type=int, help="decides the order of the data, noise, timesteps and caption dropout")
    add("--no_safe_serialization", action=Refused, advice="weights are written as safetensors, which PyTorch reads")


def _add_optimisation(parser: Parser) -> None:
    add = parser.group("optimisation", RunSettings, BatchSettings, OptimizerSettings)
    add("--train_batch_size", type=int, help="images per device and accumulation step")
    add("--num_train_epochs", "--num_epochs", type=int, help="how often every example is seen")
    add("--max_train_steps", type=int, help="updates in all, also when resuming; wins over --num_train_epochs")
    add("--gradient_accumulation_steps", type=int, help="parts of an update, one in memory at a time")
    add("--learning_rate", type=float, help="highest learning rate")
    add("--scale_lr", action="store_true", help="multiply learning_rate by the images of an update")
    add("--lr_scheduler", choices=SCHEDULES, help="how the rate changes")
    add("--lr_warmup_steps", type=int, help="updates of linear warm-up")
    add("--lr_num_cycles", type=int, help="periods of cosine_with_restarts")
    add("--lr_power", type=float, help="exponent of polynomial")
    add("--lr_step_rules", help='of piecewise_constant, such as "1:10,0.1:20,0.01"')
    add(
        "--optimizer",
        type=str.lower,
        choices=sorted(OPTIMIZERS),
        help="lion and adafactor need less memory; prodigy finds its rate, give it --learning_rate 1",
    )
    add("--adam_beta1", type=float, help="decay of the first moment; the optimiser's own if left out")
    add("--adam_beta2", type=float, help="decay of the second moment; likewise")
    add("--adam_weight_decay", type=float, help="weight decay, scaled by the rate only")
    add("--adam_epsilon", type=float, help="added to the root of the second moment; likewise")
    add("--max_grad_norm", type=float, help="global norm to which the gradient is clipped")
    add(
        "--use_8bit_adam",
        action=Refused,
        advice="JAX has no 8-bit Adam; --optimizer lion or adafactor needs less memory",
    )
    add("--set_grads_to_none", action=Accepted, note="gradients live inside one compiled step")


def _add_memory(parser: Parser) -> None:
    add = parser.group("precision and memory", ComputeSettings, DeviceSettings)
    add("--mixed_precision", type=precision, metavar="{no,bf16}", help="dtype of the computation")
    add("--gradient_checkpointing", action="store_true", help="the same as --remat_policy blocks")
    add("--remat_policy", choices=POLICIES, help="what the backward pass computes again to save memory")
    add("--ccache", metavar="FOLDER", help="keep compiled programs there, for the next start")
    note = "XLA uses TF32 for float32 products where the GPU has it; JAX_DEFAULT_MATMUL_PRECISION=highest turns it off"
    add("--allow_tf32", action=Accepted, note=note)
    note = "attention that keeps no matrix of weights is chosen by itself where the device has it"
    add("--enable_xformers_memory_efficient_attention", action=Accepted, note=note)


def _add_average(parser: Parser) -> None:
    add = parser.group("running average of the weights", EmaSettings)
    add("--use_ema", action="store_true", help="average the parameters, and save and validate the average")
    add("--ema_decay", "--ema_max_decay", type=float, help="its decay, reached after a ramp")
    add("--ema_inv_gamma", type=float, help="use the ramp 1 - (1 + n / this) ** -power instead")
    add("--ema_power", type=float, help="power of that ramp")


def _add_mesh(parser: Parser) -> None:
    add = parser.group("devices", DeviceSettings, ProcessSettings)
    add("--mesh_data", type=int, help="devices along which batches are divided; -1 is all that remain")
    add("--mesh_fsdp", type=int, help="devices along which batches, parameters and optimiser are divided")
    add("--mesh_tensor", type=int, help="devices along which wide layers are divided")
    what = "find the other processes of the run (Slurm, MPI, Kubernetes, TPU); TPU machines do so by themselves"
    add("--distributed", action=argparse.BooleanOptionalAction, help=what)
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0, for processes started by hand")
    add("--num_processes", type=int, help="how many there are")
    add("--process_id", type=int, help="which one this is, from 0")
    add("--local_rank", action=Accepted, nargs=1, note=SEVERAL_PROCESSES)


def _add_checkpoints(parser: Parser) -> None:
    add = parser.group("checkpoints", RunSettings)
    add("--checkpointing_steps", type=int, help="write checkpoint-N every so many updates")
    add("--checkpoints_total_limit", type=int, help="keep at most this many checkpoints; the oldest go first")
    add("--resume_from_checkpoint", help='"latest", the name of a checkpoint of output_dir, or a path')
    add("--save_steps", action=Refused, advice=EVERY_CHECKPOINT)
    add("--save_model_epochs", action=Refused, advice=EVERY_CHECKPOINT)


def _add_monitoring(parser: Parser) -> None:
    add = parser.group("monitoring", RunSettings, TrackerSettings, ProfileSettings)
    add("--logging_steps", type=int, help="write a record every so many updates")
    names = (*TRACKERS, "none", "all")
    add("--report_to", "--logger", choices=names, help="besides log.jsonl; tensorboard if installed, where left out")
    add("--logging_dir", help="folder of TensorBoard and W&B files, inside output_dir")
    add("--tracker_project_name", default=Path(parser.prog).stem, help="project on Weights & Biases")
    add("--wandb_entity", help="user or team on Weights & Biases")
    add("--validation_steps", type=int, help="make validation images every so many steps; 100 where left out")
    add("--validation_epochs", "--save_images_epochs", type=int, help="or every so many epochs")
    add("--peak_tflops", type=float, help="what a device could do, for the utilisation; known for TPUs and many GPUs")
    add("--profile_steps", type=int, help="trace so many steps, after the first one")
    add("--profile_validation", action="store_true", help="trace the last validation")
    add(
        "--profile_memory", action="store_true", help="write what is in memory before the first and after the last step"
    )


def _add_hub(parser: Parser) -> None:
    add = parser.group("hub", UploadSettings)
    add("--push_to_hub", action="store_true", help="upload the trained model at the end")
    add("--hub_model_id", help="name of the repository; the name of output_dir if left out")
    add("--hub_private_repo", action="store_true", help="make it a private one")
    add("--hub_token", help="access token; the one that `hf auth login` stored if left out")
    add("--use_auth_token", action=Accepted, note="the stored token is used where there is one")


def add_objective(parser: Parser) -> None:
    """The flags of :class:`~diffuse_jax.training.objective.ObjectiveSettings`."""
    add = parser.group("loss", ObjectiveSettings)
    add("--snr_gamma", type=float, help="Min-SNR weighting; 5 is recommended")
    add("--noise_offset", type=float, help="noise that all pixels of a channel share; 0.1 is usual")
    add("--input_perturbation", type=float, help="extra noise in the input only; 0.1 is usual")
    add("--timestep_bias_strategy", choices=TIMESTEP_BIASES, help="which timesteps to draw more often")
    add("--timestep_bias_multiplier", type=float, help="how many times more often")
    add("--timestep_bias_portion", type=float, help="share of timesteps for earlier and later")
    add("--timestep_bias_begin", type=int, help="first timestep of range")
    add("--timestep_bias_end", type=int, help="timestep before which range ends; all if left out")
