"""The command ``diffuse-jax parity``: its flags, output and report. Importing it imports nothing heavy."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuse_jax.bounds import COUNT, FINITE, SEED, SHARE, number
from diffuse_jax.mesh_axes import mesh_text
from diffuse_jax.torch_backend import load, training_command
from diffuse_jax.writing import path_flag, path_text

if TYPE_CHECKING:
    from diffuse_jax.torch_backend.parity import Request, Result, Sides

PROMPTS = ("a red apple, noto style", "grinning face, twemoji style")
PACKAGES = ("jax", "torch", "diffusers", "transformers")
TO_CALL = ("guidance_scale", "height", "width", "strength")
IMAGES = {
    "image": "image, for pipelines that take one (default: a synthetic image)",
    "mask_image": "mask, for inpainting (default: a synthetic mask)",
    "control_image": "control image, in the order of the ControlNets (default: synthetic images)",
}
"""Arguments that are image files -> their help."""

DESCRIPTION = """\
Opens the checkpoint here and in PyTorch and compares configurations, parameters, every network on the prompts, the
latents after every step and the pixels. JAX uses its default device or those of --mesh,
PyTorch the one of --device.

exit status: 0 if everything is within the tolerances, 1 if not or if a side cannot be opened, 2 for wrong usage"""


class ParityError(RuntimeError):
    """The two sides differ by more than the tolerances."""


def add_flags(parser: argparse.ArgumentParser, dtypes: tuple[str, ...]) -> None:
    """Add the arguments of the command.

    Args:
      parser: the parser of the command.
      dtypes: the dtypes that networks can compute in.
    """
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("model", type=path_text, metavar="MODEL", help="folder in diffusers layout or Hub id, e.g. diffuse-jax/emoji")
    add(
        "--reference",
        type=path_text,
        metavar="SOURCE",
        help="checkpoint that PyTorch reads instead, e.g. the one that MODEL was converted from",
    )
    for flag, whose in (("--", "MODEL"), ("--reference-", "the reference")):
        add(f"{flag}variant", metavar="NAME", help=f"variant of {whose}'s weight files, e.g. fp16")
        add(f"{flag}revision", metavar="NAME", help=f"branch, tag or commit of {whose} on the Hub")
    add("--device", choices=("cpu", "cuda"), help="where PyTorch runs (default: cuda if available)")
    about = "mesh of JAX's devices, e.g. data=4 or fsdp=2 (default: one device)"
    add("--mesh", type=mesh_text, metavar="AXES", help=about)
    add("--dtype", choices=dtypes, default="float32", help="dtype that networks compute in (default: %(default)s)")
    add("--scheduler", metavar="NAME", help="scheduler to use instead of the model's, e.g. EulerDiscrete or ddim")
    add("--pipeline", metavar="CLASS", help="pipeline class to run, e.g. StableDiffusionInpaintPipeline")
    for name, what in IMAGES.items():
        about = f"{what}; repeat for several"
        add(f"--{name.replace('_', '-')}", type=path_flag, action="append", metavar="FILE", help=about)
    add("--strength", type=number(SHARE), metavar="X", help="strength, for pipelines that start from an image")
    about = "prompt; repeat for several (default: two for the shipped model)"
    add("--prompt", action="append", metavar="TEXT", help=about)
    about = "denoising steps (default: %(default)s)"
    add("--num-inference-steps", type=number(COUNT), default=10, metavar="N", help=about)
    add("--guidance-scale", type=number(FINITE), metavar="X", help="strength of the guidance; 1 or less turns it off")
    add("--seed", type=number(SEED), default=0, metavar="N", help="seed (default: %(default)s)")
    add("--height", type=number(COUNT), metavar="PIXELS", help="height of the images")
    add("--width", type=number(COUNT), metavar="PIXELS", help="width of the images")
    add("--component", nargs="+", metavar="NAME", default=[], help="compare only these networks, e.g. unet vae")
    add("--bisect", action="store_true", help="find the first layer where a network diverges from PyTorch's")
    add("--report", type=path_flag, metavar="DIR", help="write parity.json and parity.png (or training.json) there")
    training_command.add_flags(parser)


def run(args: argparse.Namespace, scheduler: Any = None) -> None:
    """Compare, print the results and write the report.

    Args:
      args: the parsed flags of :func:`add_flags`.
      scheduler: the class that ``--scheduler`` names.

    Raises:
      ParityError: something differs or is outside the tolerances; everything has been printed and written.
      ImportError: PyTorch or diffusers is not installed; the message names the extra.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both frameworks may share one GPU
    training_command.check_flags(args)
    if args.training:
        if different := training_command.run(args):
            raise ParityError(different)
        return
    parity = load("parity")
    request = request_of(parity, args)
    options = {"dtype": args.dtype, "device": args.device, **training_command.hub_options(args)}
    options |= {"scheduler": scheduler, "pipeline_name": args.pipeline, "mesh": args.mesh}
    sides = parity.open_sides(args.model, args.reference, **options)
    result = parity.check(sides, request)
    show(result)
    if args.report is not None:
        write(args.report, args, request, sides, result)
    if not result.ok:
        raise ParityError(verdict(result, args.dtype))
    print(f"the same: {len(result.rows)} comparisons within the tolerances of {args.dtype}, parameters bit for bit")


def request_of(parity: Any, args: argparse.Namespace) -> Request:
    """The request that the flags describe."""
    given = {name: getattr(args, name) for name in TO_CALL if getattr(args, name) is not None}
    for name in IMAGES:
        if files := [opened(path) for path in getattr(args, name) or ()]:
            given[name] = files if len(files) > 1 else files[0]
    options = {"num_inference_steps": args.num_inference_steps, "seed": args.seed, **given}
    return parity.Request(tuple(args.prompt or PROMPTS), options, tuple(args.component), args.bisect)


def opened(path: Path) -> Any:
    """An image from a file."""
    from diffuse_jax import images

    with images.opened(path, str(path)) as image:
        return images.rgb(image, str(path))


def show(result: Result) -> None:
    """Print the table, the differences, and where networks diverge."""
    from diffuse_jax.torch_backend.differences import summary_lines
    from diffuse_jax.torch_backend.report import table

    if result.rows:
        print(table(result.rows))
    for line in summary_lines(result.differences):
        print(line)
    for first in result.first:
        print(f"first diverges in {first['call']}: {first['message']}")


def verdict(result: Result, dtype: str) -> str:
    """A line that says why the sides are not the same."""
    outside = [row for row in result.rows if not row.ok]
    parts = []
    if outside:
        parts.append(
            f"{len(outside)} of {len(result.rows)} comparisons are outside the tolerances of {dtype},"
            f" the first is {outside[0].name}"
        )
    if result.differences:
        more = f", and {len(result.differences) - 1} more" if len(result.differences) > 1 else ""
        parts.append(f"{result.differences[0]}{more}")
    if not result.rows:
        parts.append("networks of different shapes were not run")
    return "not the same: " + "; ".join(parts)


def write(folder: Path, args: argparse.Namespace, request: Request, sides: Sides, result: Result) -> None:
    """Write ``parity.json`` and, if there are images, ``parity.png``."""
    from diffuse_jax.torch_backend.comparison_image import amplification, save_image
    from diffuse_jax.torch_backend.report import write_report

    files = {name: [*map(str, getattr(args, name))] for name in IMAGES if name in request.options}
    context: dict[str, Any] = {
        "model": args.model,
        "reference": args.reference or args.model,
        "dtype": args.dtype,
        "mesh": args.mesh,
        **devices(sides),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "scheduler": type(sides.ours.scheduler).__name__,
        "prompts": list(request.prompts),
        "options": request.options | files,
        "same": result.ok,
        "differences": [found._asdict() for found in result.differences],
        "first_layers": result.first,
    }
    if result.images is not None:
        context["amplification"] = amplification(*result.images)
        print(save_image(folder / "parity.png", *result.images))
    print(write_report(folder / "parity.json", result.rows, **context))


def devices(sides: Sides) -> dict[str, str]:
    """The devices that each side ran on."""
    import jax
    import torch

    from diffuse_jax.torch_backend.trace import networks

    device = next(next(iter(networks(sides.theirs).values())).module.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": device.type, "torch_device": name, "jax_device": jax.devices()[0].device_kind}
