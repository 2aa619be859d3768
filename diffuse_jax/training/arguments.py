"""Command-line flags that every training script has, with the names and meanings they have in diffusers' scripts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax.models.remat import POLICIES
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.distributed import initialize_distributed
from diffuse_jax.training.flags import Accepted, Parser, Refused
from diffuse_jax.training.objective import TIMESTEP_BIASES, Objective, timestep_probabilities
from diffuse_jax.training.optimizer import OPTIMIZERS, SCHEDULES, learning_rate, make_optimizer
from diffuse_jax.training.state import Average
from diffuse_jax.training.trackers import TRACKERS

PRECISIONS: dict[str, DTypeLike] = {"no": jnp.float32, "bf16": jnp.bfloat16}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""Networks that ``--text_encoder_lr`` is for."""

SEVERAL_PROCESSES = "processes are set with --coordinator_address, --num_processes and --process_id"
EVERY_CHECKPOINT = "every checkpoint holds the model: use --checkpointing_steps"


def precision(name: str) -> str:
    """The value of ``--mixed_precision``."""
    if name == "fp16":
        raise argparse.ArgumentTypeError(
            "invalid choice: 'fp16' (gradients vanish without loss scaling; bf16 has the range of float32)"
        )
    if name not in PRECISIONS:
        raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(PRECISIONS)})")
    return name


def make_parser(description: str | None, output_dir: str, **defaults: Any) -> Parser:
    """A parser with the shared flags in groups; scripts add theirs, and may give other defaults.

    ``parser.group("model")("--flag", ...)`` adds a flag to a group.
    """
    parser = Parser(description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with flags; the command line wins over it")
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
    add = parser.group("model")
    add("--revision", help="branch, tag or commit of the model on the Hub")
    add("--variant", help='which weight files to read, such as "fp16"')
    add("--non_ema_revision", action=Refused, advice="all networks come from one branch: --revision")
    add("--cache_dir", help="where downloads are kept, instead of the Hub's own folder")
    add("--from_pt", action=Accepted, note="PyTorch weights are read as they are")


def _add_output(parser: Parser) -> None:
    add = parser.group("output")
    add("--output_dir", help="where checkpoints, logs and the trained model go; all processes must see it")
    add("--overwrite_output_dir", action="store_true", help="remove the checkpoints of an older run from it")
    add("--seed", type=int, default=0, help="decides the order of the data, noise, timesteps and caption dropout")
    add("--no_safe_serialization", action=Refused, advice="weights are written as safetensors, which PyTorch reads")


def _add_optimisation(parser: Parser) -> None:
    add = parser.group("optimisation")
    add("--train_batch_size", type=int, default=16, help="pictures per device and accumulation step")
    add("--num_train_epochs", "--num_epochs", type=int, default=100, help="how often every example is seen")
    add("--max_train_steps", type=int, help="updates in all, also when resuming; wins over --num_train_epochs")
    add("--gradient_accumulation_steps", type=int, default=1, help="parts of an update, one in memory at a time")
    add("--learning_rate", type=float, default=1e-4, help="highest learning rate")
    add("--scale_lr", action="store_true", help="multiply learning_rate by the pictures of an update")
    add("--lr_scheduler", default="constant", choices=SCHEDULES, help="how the rate changes")
    add("--lr_warmup_steps", type=int, default=500, help="updates of linear warm-up")
    add("--lr_num_cycles", type=int, default=1, help="periods of cosine_with_restarts")
    add("--lr_power", type=float, default=1.0, help="exponent of polynomial")
    add("--lr_step_rules", default="", help='of piecewise_constant, such as "1:10,0.1:20,0.01"')
    add(
        "--optimizer",
        default="adamw",
        type=str.lower,
        choices=sorted(OPTIMIZERS),
        help="lion and adafactor need less memory; prodigy finds its rate, give it --learning_rate 1",
    )
    add("--adam_beta1", type=float, help="decay of the first moment; the optimiser's own if left out")
    add("--adam_beta2", type=float, help="decay of the second moment; likewise")
    add("--adam_weight_decay", type=float, default=1e-2, help="weight decay, scaled by the rate only")
    add("--adam_epsilon", type=float, help="added to the root of the second moment; likewise")
    add("--max_grad_norm", type=float, default=1.0, help="global norm to which the gradient is clipped")
    add(
        "--use_8bit_adam",
        action=Refused,
        advice="JAX has no 8-bit Adam; --optimizer lion or adafactor needs less memory",
    )
    add("--set_grads_to_none", action=Accepted, note="gradients live inside one compiled step")


def _add_memory(parser: Parser) -> None:
    add = parser.group("precision and memory")
    add("--mixed_precision", default="no", type=precision, metavar="{no,bf16}", help="dtype of the computation")
    add("--gradient_checkpointing", action="store_true", help="the same as --remat_policy blocks")
    add("--remat_policy", choices=POLICIES, help="what the backward pass computes again to save memory")
    add("--ccache", metavar="FOLDER", help="keep compiled programs there, for the next start")
    note = "XLA uses TF32 for float32 products where the GPU has it; JAX_DEFAULT_MATMUL_PRECISION=highest turns it off"
    add("--allow_tf32", action=Accepted, note=note)
    note = "attention that keeps no matrix of weights is chosen by itself where the device has it"
    add("--enable_xformers_memory_efficient_attention", action=Accepted, note=note)


def _add_average(parser: Parser) -> None:
    add = parser.group("running average of the weights")
    add("--use_ema", action="store_true", help="average the parameters, and save and validate the average")
    add("--ema_decay", "--ema_max_decay", type=float, default=0.9999, help="its decay, reached after a ramp")
    add("--ema_inv_gamma", type=float, help="use the ramp 1 - (1 + n / this) ** -power instead")
    add("--ema_power", type=float, default=2 / 3, help="power of that ramp")


def _add_mesh(parser: Parser) -> None:
    add = parser.group("devices")
    add("--mesh_data", type=int, default=-1, help="devices along which batches are divided; -1 is all that remain")
    add("--mesh_fsdp", type=int, default=1, help="devices along which batches, parameters and optimiser are divided")
    add("--mesh_tensor", type=int, default=1, help="devices along which wide layers are divided")
    what = "find the other processes of the run (Slurm, MPI, Kubernetes, TPU); TPU machines do so by themselves"
    add("--distributed", action=argparse.BooleanOptionalAction, help=what)
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0, for processes started by hand")
    add("--num_processes", type=int, help="how many there are")
    add("--process_id", type=int, help="which one this is, from 0")
    add("--local_rank", action=Accepted, nargs=1, note=SEVERAL_PROCESSES)


def _add_checkpoints(parser: Parser) -> None:
    add = parser.group("checkpoints")
    add("--checkpointing_steps", type=int, default=500, help="write checkpoint-N every so many updates")
    add("--checkpoints_total_limit", type=int, help="keep at most this many checkpoints; the oldest go first")
    add("--resume_from_checkpoint", help='"latest", the name of a checkpoint of output_dir, or a path')
    add("--save_steps", action=Refused, advice=EVERY_CHECKPOINT)
    add("--save_model_epochs", action=Refused, advice=EVERY_CHECKPOINT)


def _add_monitoring(parser: Parser) -> None:
    add = parser.group("monitoring")
    add("--logging_steps", type=int, default=50, help="write a record every so many updates")
    names = (*TRACKERS, "none", "all")
    add("--report_to", "--logger", choices=names, help="besides log.jsonl; tensorboard if installed, where left out")
    add("--logging_dir", default="logs", help="folder of TensorBoard and W&B files, inside output_dir")
    add("--tracker_project_name", default=Path(parser.prog).stem, help="project on Weights & Biases")
    add("--wandb_entity", help="user or team on Weights & Biases")
    add("--validation_steps", type=int, help="make validation pictures every so many updates; 100 where left out")
    add("--validation_epochs", "--save_images_epochs", type=int, help="or every so many epochs")
    add("--peak_tflops", type=float, help="what a device could do, for the utilisation; known for TPUs and many GPUs")
    add("--profile_steps", type=int, default=0, help="trace so many steps, after the first one")
    add("--profile_validation", action="store_true", help="trace the last validation")
    add(
        "--profile_memory", action="store_true", help="write what is in memory before the first and after the last step"
    )


def _add_hub(parser: Parser) -> None:
    add = parser.group("hub")
    add("--push_to_hub", action="store_true", help="upload the trained model at the end")
    add("--hub_model_id", help="name of the repository; the name of output_dir if left out")
    add("--hub_private_repo", action="store_true", help="make it a private one")
    add("--hub_token", help="access token; the one that `hf auth login` stored if left out")
    add("--use_auth_token", action=Accepted, note="the stored token is used where there is one")


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


def objective_from(args: argparse.Namespace, scheduler: Scheduler, prior_loss_weight: float = 1.0) -> Objective:
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
    """The optimiser that the flags describe, and its learning rate (that of the networks without one of their own)."""
    scale = pictures_per_update(args, mesh) if args.scale_lr else 1

    def rate_up_to(peak: float) -> optax.Schedule:
        shape = {"cycles": args.lr_num_cycles, "power": args.lr_power, "rules": args.lr_step_rules}
        return learning_rate(args.lr_scheduler, peak * scale, args.lr_warmup_steps, args.max_train_steps, **shape)

    rate, encoders = rate_up_to(args.learning_rate), getattr(args, "text_encoder_lr", None)
    own = {} if encoders is None else dict.fromkeys(TEXT_ENCODERS, rate_up_to(encoders))
    names = ("beta1", "beta2", "weight_decay", "epsilon")
    settings = {name: getattr(args, f"adam_{name}") for name in names}
    given = {name: value for name, value in settings.items() if value is not None}
    return make_optimizer(args.optimizer, rate, max_grad_norm=args.max_grad_norm, own_rates=own, **given), rate


def remat_from(args: argparse.Namespace) -> str:
    """What the UNet's ``remat`` should be; ``--remat_policy`` decides over ``--gradient_checkpointing``."""
    return args.remat_policy or ("blocks" if args.gradient_checkpointing else "none")


def average_from(args: argparse.Namespace) -> Average:
    """The running average that the flags describe."""
    return Average(decay=args.ema_decay, inv_gamma=args.ema_inv_gamma, power=args.ema_power)


def mesh_from(args: argparse.Namespace) -> Mesh:
    """The mesh that the flags describe, over all devices of all processes.

    To be called before anything that needs a device: this is where several processes become one run.

    Raises:
      ValueError: the mesh does not fit the devices, or the processes are described incompletely.
    """
    initialize_distributed(args)
    if args.ccache:
        jax.config.update("jax_compilation_cache_dir", args.ccache)
    return make_mesh(data=args.mesh_data, fsdp=args.mesh_fsdp, tensor=args.mesh_tensor)


def pictures_per_update(args: argparse.Namespace, mesh: Mesh) -> int:
    """``train_batch_size`` for each device that gets a part of the batch, times the accumulation steps.

    Raises:
      ValueError: one of the two is not positive.
    """
    for name in ("train_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    return args.train_batch_size * mesh.shape["data"] * mesh.shape["fsdp"] * args.gradient_accumulation_steps
