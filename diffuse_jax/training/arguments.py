"""Command-line flags that every training script has, with the names and meanings they have in diffusers' scripts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from diffuse_jax.training.flags import Accepted, Parser, Refused
from diffuse_jax.training.settings import (
    BatchSettings,
    ComputeSettings,
    DeviceSettings,
    EmaSettings,
    HubSettings,
    NetworkSettings,
    ObjectiveSettings,
    OptimizerSettings,
    ProcessSettings,
    ProfileSettings,
    RunSettings,
    TrackerSettings,
    UploadSettings,
)
from diffuse_jax.training.settings.methods import TIMESTEP_BIASES
from diffuse_jax.training.settings.model import REMAT_POLICIES, check_precision
from diffuse_jax.training.settings.run import OPTIMIZERS, SCHEDULES, TRACKERS

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
    add("--seed", help="decides the order of the data, noise, timesteps and caption dropout")
    add("--no_safe_serialization", action=Refused, advice="weights are written as safetensors, which PyTorch reads")


def _add_optimisation(parser: Parser) -> None:
    add = parser.group("optimisation", RunSettings, BatchSettings, OptimizerSettings)
    add("--train_batch_size", help="images per device and accumulation step")
    add("--num_train_epochs", "--num_epochs", help="how often every example is seen")
    add("--max_train_steps", help="updates in all, also when resuming; wins over --num_train_epochs")
    add("--gradient_accumulation_steps", help="parts of an update, one in memory at a time")
    add("--learning_rate", help="highest learning rate")
    add("--scale_lr", action="store_true", help="multiply learning_rate by the images of an update")
    add("--lr_scheduler", choices=SCHEDULES, help="how the rate changes")
    add("--lr_warmup_steps", help="updates of linear warm-up")
    add("--lr_num_cycles", help="periods of cosine_with_restarts")
    add("--lr_power", help="exponent of polynomial")
    add("--lr_step_rules", help='of piecewise_constant, such as "1:10,0.1:20,0.01"')
    add(
        "--optimizer",
        type=str.lower,
        choices=OPTIMIZERS,
        help="lion and adafactor need less memory; prodigy finds its rate, give it --learning_rate 1",
    )
    add("--adam_beta1", help="decay of the first moment; the optimiser's own if left out")
    add("--adam_beta2", help="decay of the second moment; likewise")
    add("--adam_weight_decay", help="weight decay, scaled by the rate only")
    add("--adam_epsilon", help="added to the root of the second moment; likewise")
    add("--max_grad_norm", help="global norm to which the gradient is clipped")
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
    add("--remat_policy", choices=REMAT_POLICIES, help="what the backward pass computes again to save memory")
    add("--ccache", metavar="FOLDER", help="keep compiled programs there, for the next start")
    note = "XLA uses TF32 for float32 products where the GPU has it; JAX_DEFAULT_MATMUL_PRECISION=highest turns it off"
    add("--allow_tf32", action=Accepted, note=note)
    note = "attention that keeps no matrix of weights is chosen by itself where the device has it"
    add("--enable_xformers_memory_efficient_attention", action=Accepted, note=note)


def _add_average(parser: Parser) -> None:
    add = parser.group("running average of the weights", EmaSettings)
    add("--use_ema", action="store_true", help="average the parameters, and save and validate the average")
    add("--ema_decay", "--ema_max_decay", help="its decay, reached after a ramp")
    add("--ema_inv_gamma", help="use the ramp 1 - (1 + n / this) ** -power instead")
    add("--ema_power", help="power of that ramp")


def _add_mesh(parser: Parser) -> None:
    add = parser.group("devices", DeviceSettings, ProcessSettings)
    add("--mesh_data", help="devices along which batches are divided; -1 is all that remain")
    add("--mesh_fsdp", help="devices along which batches, parameters and optimiser are divided")
    add("--mesh_tensor", help="devices along which wide layers are divided")
    what = "find the other processes of the run (Slurm, MPI, Kubernetes, TPU); TPU machines do so by themselves"
    add("--distributed", action=argparse.BooleanOptionalAction, help=what)
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0, for processes started by hand")
    add("--num_processes", help="how many there are")
    add("--process_id", help="which one this is, from 0")
    add("--local_rank", action=Accepted, nargs=1, note=SEVERAL_PROCESSES)


def _add_checkpoints(parser: Parser) -> None:
    add = parser.group("checkpoints", RunSettings)
    add("--checkpointing_steps", help="write checkpoint-N every so many updates")
    add("--checkpoints_total_limit", help="keep at most this many checkpoints; the oldest go first")
    add("--resume_from_checkpoint", help='"latest", the name of a checkpoint of output_dir, or a path')
    add("--save_steps", action=Refused, advice=EVERY_CHECKPOINT)
    add("--save_model_epochs", action=Refused, advice=EVERY_CHECKPOINT)


def _add_monitoring(parser: Parser) -> None:
    add = parser.group("monitoring", RunSettings, TrackerSettings, ProfileSettings)
    add("--logging_steps", help="write a record every so many updates")
    names = (*TRACKERS, "none", "all")
    add("--report_to", "--logger", choices=names, help="besides log.jsonl; tensorboard if installed, where left out")
    add("--logging_dir", help="folder of TensorBoard and W&B files, inside output_dir")
    add("--tracker_project_name", default=Path(parser.prog).stem, help="project on Weights & Biases")
    add("--wandb_entity", help="user or team on Weights & Biases")
    add("--validation_steps", help="make validation images every so many steps; 100 where left out")
    add("--validation_epochs", "--save_images_epochs", help="or every so many epochs")
    add("--peak_tflops", help="what a device could do, for the utilisation; known for TPUs and many GPUs")
    add("--profile_steps", help="trace so many steps, after the first one")
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
    add("--snr_gamma", help="Min-SNR weighting; 5 is recommended")
    add("--noise_offset", help="noise that all pixels of a channel share; 0.1 is usual")
    add("--input_perturbation", help="extra noise in the input only; 0.1 is usual")
    add("--timestep_bias_strategy", choices=TIMESTEP_BIASES, help="which timesteps to draw more often")
    add("--timestep_bias_multiplier", help="how many times more often")
    add("--timestep_bias_portion", help="share of timesteps for earlier and later")
    add("--timestep_bias_begin", help="first timestep of range")
    add("--timestep_bias_end", help="timestep before which range ends; all if left out")


def add_network(parser: Parser, subfolder: str, default: str) -> None:
    """The flags that say which network is trained."""
    add = parser.group("model", NetworkSettings)
    add(
        "--pretrained_model_name_or_path",
        help=f"start from these weights: a folder or a Hub id, of the network or of a pipeline with {subfolder}/",
    )
    add(
        "--model_config_name_or_path",
        help=f"train a new network with the config.json of this folder or Hub id; without either flag, {default}",
    )
