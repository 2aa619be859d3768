"""Command-line flags that all training scripts have, with the names and meanings of diffusers' scripts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffuse_jax.mesh_axes import mesh_text
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
from diffuse_jax.writing import path_text

SEVERAL_PROCESSES = "processes are set with --coordinator_address, --num_processes and --process_id"
EVERY_CHECKPOINT = "every checkpoint contains the model: use --checkpointing_steps"


def precision(name: str) -> str:
    """Argument type of ``--mixed_precision``."""
    try:
        check_precision(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid choice: {error}") from None
    return name


def make_parser(description: str | None, output_dir: str, **defaults: Any) -> Parser:
    """A parser with the shared flags in groups; scripts add their own flags, and may change the defaults.

    ``parser.group("model")("--flag", ...)`` adds a flag to a group.
    """
    parser = Parser(description=description)
    parser.add_argument(
        "--config", type=path_text, metavar="FILE", help="YAML or JSON file with flags; the command line overrides it"
    )
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
    add("--non_ema_revision", action=Refused, advice="all networks come from the same branch: --revision")
    add("--cache_dir", help="where downloads are kept, instead of the Hub's default folder")
    add("--from_pt", action=Accepted, note="PyTorch weights are read directly")


def _add_output(parser: Parser) -> None:
    add = parser.group("output", RunSettings)
    add(
        "--output_dir",
        help="folder for checkpoints, logs and the trained model; all processes must be able to access it",
    )
    add(
        "--overwrite_output_dir",
        action="store_true",
        help="remove the checkpoints of an older run from the output folder",
    )
    what = "check everything, compile, take two steps, say what the run needs in memory and time, and write nothing"
    add("--dry_run", action="store_true", help=what)
    add("--seed", help="determines the order of the data, the noise, the timesteps and caption dropout")
    add("--no_safe_serialization", action=Refused, advice="weights are written as safetensors, which PyTorch reads")


def _add_optimisation(parser: Parser) -> None:
    add = parser.group("optimisation", RunSettings, BatchSettings, OptimizerSettings)
    add("--train_batch_size", help="images per device and accumulation step")
    add("--num_train_epochs", "--num_epochs", help="number of passes over the data set")
    add("--max_train_steps", help="total number of training steps, also when resuming; overrides --num_train_epochs")
    add("--gradient_accumulation_steps", help="accumulate the gradients of this many batches before each update")
    add("--learning_rate", help="peak learning rate")
    add("--scale_lr", action="store_true", help="multiply learning_rate by the number of images per training step")
    what = "other peak learning rates for parameters whose path a regular expression matches, such as attn2=1e-5"
    add("--lr_rules", nargs="+", metavar="REGEX=RATE", help=what)
    add("--lr_scheduler", choices=SCHEDULES, help="learning-rate schedule")
    add("--lr_warmup_steps", help="training steps of linear warm-up")
    add("--lr_num_cycles", help="number of cycles of cosine_with_restarts")
    add("--lr_power", help="exponent of the polynomial schedule")
    add("--lr_step_rules", help='rules of piecewise_constant, such as "1:10,0.1:20,0.01"')
    add(
        "--optimizer",
        type=str.lower,
        choices=OPTIMIZERS,
        help="lion, adafactor and muon need less memory; prodigy finds the learning rate itself: set --learning_rate 1",
    )
    add("--adam_beta1", help="decay of the first moment; the optimiser's default if omitted")
    add("--adam_beta2", help="decay of the second moment; the optimiser's default if omitted")
    add("--adam_weight_decay", help="weight decay, multiplied by the learning rate only")
    add("--adam_epsilon", help="added to the root of the second moment; the optimiser's default if omitted")
    add("--max_grad_norm", help="clip the gradient to this global norm")
    add(
        "--use_8bit_adam",
        action=Refused,
        advice="JAX has no 8-bit Adam; --optimizer lion or adafactor needs less memory",
    )
    add("--set_grads_to_none", action=Accepted, note="gradients exist only inside the compiled step")


def _add_memory(parser: Parser) -> None:
    add = parser.group("precision and memory", ComputeSettings, DeviceSettings)
    add("--mixed_precision", type=precision, metavar="{no,bf16}", help="dtype of the computation")
    add("--gradient_checkpointing", action="store_true", help="the same as --remat_policy blocks")
    add("--remat_policy", choices=REMAT_POLICIES, help="what the backward pass recomputes to save memory")
    add("--ccache", metavar="FOLDER", help="keep compiled programs in this folder, for the next start")
    note = "XLA uses TF32 for float32 products where the GPU has it; JAX_DEFAULT_MATMUL_PRECISION=highest turns it off"
    add("--allow_tf32", action=Accepted, note=note)
    note = "memory-efficient attention is used automatically where the device supports it"
    add("--enable_xformers_memory_efficient_attention", action=Accepted, note=note)
    add("--enable_npu_flash_attention", action=Accepted, note=note)


def _add_average(parser: Parser) -> None:
    add = parser.group("running average of the weights", EmaSettings)
    add(
        "--use_ema", action="store_true", help="keep a running average of the parameters; save and validate the average"
    )
    add("--ema_decay", "--ema_max_decay", help="decay of the average, reached after a ramp")
    add("--ema_inv_gamma", help="use the ramp 1 - (1 + n / this) ** -power instead")
    add("--ema_power", help="power of that ramp")
    what = "let the decay of the average rise to --ema_decay instead of beginning with it"
    add("--ema_ramp", action=argparse.BooleanOptionalAction, help=what)


def _add_mesh(parser: Parser) -> None:
    add = parser.group("devices", DeviceSettings, ProcessSettings)
    about = "the mesh as text, such as data=4,fsdp=2, instead of --mesh_data, --mesh_fsdp and --mesh_tensor"
    add("--mesh", type=mesh_text, metavar="AXES", help=about)
    add("--mesh_data", help="number of devices across which batches are divided; -1 means all remaining ones")
    add("--mesh_fsdp", help="number of devices across which batches, parameters and optimiser state are divided")
    add("--mesh_tensor", help="number of devices across which wide layers are divided")
    what = "find the other processes of the run (Slurm, MPI, Kubernetes, TPU); automatic on TPU machines"
    add("--distributed", action=argparse.BooleanOptionalAction, help=what)
    add("--coordinator_address", metavar="HOST:PORT", help="address of process 0, for processes started by hand")
    add("--num_processes", help="number of processes")
    add("--process_id", help="index of this process, from 0")
    add("--local_rank", action=Accepted, nargs=1, note=SEVERAL_PROCESSES)


def _add_checkpoints(parser: Parser) -> None:
    add = parser.group("checkpoints", RunSettings)
    add("--checkpointing_steps", help="write checkpoint-N every this many training steps")
    add("--checkpoints_total_limit", help="keep at most this many checkpoints; the oldest are removed first")
    add("--resume_from_checkpoint", help='"latest", the name of a checkpoint of output_dir, or a path')
    add("--save_steps", action=Refused, advice=EVERY_CHECKPOINT)
    add("--save_model_epochs", action=Refused, advice=EVERY_CHECKPOINT)


def _add_monitoring(parser: Parser) -> None:
    add = parser.group("monitoring", RunSettings, TrackerSettings, ProfileSettings)
    add("--logging_steps", help="log every this many training steps")
    names = (*TRACKERS, "none", "all")
    add(
        "--report_to",
        "--logger",
        choices=names,
        help="tracker used besides log.jsonl; if omitted, tensorboard if installed",
    )
    add("--logging_dir", help="folder for TensorBoard and W&B files, inside output_dir")
    add("--tracker_project_name", default=Path(parser.prog).stem, help="project on Weights & Biases")
    add("--wandb_entity", help="user or team on Weights & Biases")
    add("--plot", action="store_true", help="draw loss and learning rate into output_dir/curves.svg (needs matplotlib)")
    add("--validation_steps", help="generate validation images every this many training steps; 100 if omitted")
    add("--validation_epochs", "--save_images_epochs", help="or every this many epochs")
    add("--peak_tflops", help="peak speed of a device, for the FLOPs utilisation; known for TPUs and many GPUs")
    add("--profile_steps", help="profile this many training steps, after the first one")
    add("--profile_validation", action="store_true", help="profile the last validation")
    add("--profile_memory", action="store_true", help="write memory profiles before the first and after the last step")


def _add_hub(parser: Parser) -> None:
    add = parser.group("hub", UploadSettings)
    add("--push_to_hub", action="store_true", help="upload the trained model at the end")
    add("--hub_model_id", help="name of the repository; the name of output_dir if omitted")
    add("--hub_private_repo", action="store_true", help="make the repository private")
    add("--hub_token", help="access token; the one stored by `hf auth login` if omitted")
    add("--use_auth_token", action=Accepted, note="the stored token is used if there is one")


def add_objective(parser: Parser) -> None:
    """Add the flags of :class:`~diffuse_jax.training.settings.ObjectiveSettings`."""
    add = parser.group("loss", ObjectiveSettings)
    add("--snr_gamma", help="Min-SNR weighting; 5 is recommended")
    add("--noise_offset", help="scale of noise shared by all pixels of a channel; typically 0.1")
    add("--input_perturbation", help="scale of additional noise in the input only; typically 0.1")
    add("--timestep_bias_strategy", choices=TIMESTEP_BIASES, help="which timesteps to sample more often")
    add("--timestep_bias_multiplier", help="how many times more often")
    add("--timestep_bias_portion", help="fraction of the timesteps for earlier and later")
    add("--timestep_bias_begin", help="first timestep for range")
    add("--timestep_bias_end", help="end of range, exclusive; all remaining timesteps if omitted")


def add_network(parser: Parser, subfolder: str, default: str) -> None:
    """Add the flags that select the network to train."""
    add = parser.group("model", NetworkSettings)
    add(
        "--pretrained_model_name_or_path",
        help=f"start from these weights: folder or Hub id of the network, or of a pipeline with {subfolder}/",
    )
    add(
        "--model_config_name_or_path",
        help=f"train a new network with the config.json of this folder or Hub id; without either flag, {default}",
    )
