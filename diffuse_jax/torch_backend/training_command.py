"""``diffuse-jax parity --training``: its flags, output and report. Importing it imports nothing heavy."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuse_jax.bounds import COUNT, POSITIVE, number
from diffuse_jax.torch_backend import load
from diffuse_jax.writing import path_flag

if TYPE_CHECKING:
    from diffuse_jax.torch_backend.training_report import Compared

METHODS = ("full", "lora")
PACKAGES = ("jax", "optax", "torch", "diffusers", "transformers", "peft")
OF_TRAINING = ("method", "train_text_encoder", "snr_gamma", "batch_size", "resolution", "train_data_dir")
OF_SAMPLING = ("mesh", "scheduler", "guidance_scale", "height", "width", "component", "bisect")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that apply only to training steps.

    Args:
      parser: the parser of the command.
    """
    add = parser.add_argument_group("training steps").add_argument
    add("--training", action="store_true", help="compare one training step instead: loss, gradients, AdamW update")
    add("--method", choices=METHODS, help="train full networks or LoRA (default: full)")
    add("--train-text-encoder", action="store_true", default=None, help="train the text encoders too")
    add("--snr-gamma", type=number(POSITIVE), metavar="X", help="Min-SNR weighting of the loss")
    add("--batch-size", type=number(COUNT), metavar="N", help="images in the step (default: 2)")
    about = "width and height of the images (default: the model's)"
    add("--resolution", type=number(COUNT), metavar="PIXELS", help=about)
    about = (
        "image folder with captions (default: images decoded from noise by the model's VAE, captioned with --prompt)"
    )
    add("--train-data-dir", type=path_flag, metavar="DIR", help=about)


def check_flags(args: argparse.Namespace) -> None:
    """Check that the flags are compatible.

    Raises:
      ValueError: they are not; the message names them.
    """
    wrong, text = (OF_SAMPLING, "leave out --training") if args.training else (OF_TRAINING, "add --training")
    given = [f"--{name.replace('_', '-')}" for name in wrong if getattr(args, name) not in (None, False, [])]
    if given:
        kind = "sampling" if args.training else "training steps"
        raise ValueError(f"{', '.join(given)}: only for comparisons of {kind}; {text}, or leave it out")
    if args.train_data_dir is not None and args.prompt:
        raise ValueError("--prompt: captions come from --train-data-dir; leave out one of the two")
    for name in ("variant", "revision"):
        value = getattr(args, f"reference_{name}")
        if value is not None and args.reference is None:
            raise ValueError(f"--reference-{name} {value}: there is no --reference; for MODEL use --{name}")


def hub_options(args: argparse.Namespace) -> dict[str, Any]:
    """The Hub options of MODEL and of the reference."""
    names = ("variant", "revision", "reference_variant", "reference_revision")
    return {name: getattr(args, name) for name in names}


def run(args: argparse.Namespace) -> str | None:
    """Compare, print the results and write the report.

    Returns:
      None if both steps are the same, else what differs.

    Raises:
      ImportError: PyTorch, diffusers or (for LoRA) peft is not installed.
      WeightsError, ValueError, FileNotFoundError: see :func:`training_parity.compare_training`.
    """
    parity = load("training_parity")
    given = {name: getattr(args, name) for name in OF_TRAINING if getattr(args, name) is not None}
    if args.prompt:
        given["captions"] = tuple(args.prompt)
    request = parity.TrainingRequest(seed=args.seed, dtype=args.dtype, **given)
    options = {"reference": args.reference, "device": args.device, **hub_options(args)}
    compared = parity.compare_training(args.model, request, **options)
    text = show(compared)
    if args.report is not None:
        write(args.report, args, request, compared)
    if not compared.ok:
        return text
    print(text)
    return None


def show(compared: Compared) -> str:
    """Print the table and differences, and return the verdict."""
    from diffuse_jax.torch_backend.differences import summary_lines
    from diffuse_jax.torch_backend.report import table
    from diffuse_jax.torch_backend.training_report import shown, verdict

    if compared.rows:
        print(table(shown(compared)))
    for line in summary_lines(compared.differences):
        print(line)
    return verdict(compared)


def write(folder: Path, args: argparse.Namespace, request: Any, compared: Compared) -> None:
    """Write ``training.json`` with all rows."""
    import jax

    from diffuse_jax.torch_backend.networks import choose_device
    from diffuse_jax.torch_backend.report import write_report

    fields = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(request).items()}
    context: dict[str, Any] = {
        "model": args.model,
        "reference": args.reference or args.model,
        **fields,
        "device": choose_device(args.device).type,
        "jax_device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES if installed(name)},
        "same": compared.ok,
        "differences": [found._asdict() for found in compared.differences],
    }
    print(write_report(folder / "training.json", compared.rows, **context))


def installed(name: str) -> bool:
    """Whether a distribution is installed; peft is only needed for LoRA."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
