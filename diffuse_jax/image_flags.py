"""The flags of ``diffuse-jax generate`` for images and ControlNets, and the pipeline that takes them."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import diffuse_jax
from diffuse_jax.bounds import FINITE, SHARE, Number, number
from diffuse_jax.writing import path_text

IMAGES: Mapping[str, str] = {
    "image": "image to start from, to edit or to enlarge",
    "mask_image": "white where the image is repainted",
    "control_image": "image for --controlnet",
    "depth_map": "depth for a depth model: a .npy file of an array [H,W], larger where it is nearer",
}
"""Argument of a call -> what it is; a path or URL, given once or once per prompt."""

NUMBERS: Mapping[str, tuple[Number, str]] = {
    "strength": (SHARE, "0 to 1; how much the image is changed"),
    "image_guidance_scale": (FINITE, "how closely InstructPix2Pix keeps to the image"),
    "controlnet_conditioning_scale": (FINITE, "strength of the ControlNets"),
}
"""Argument of a call -> the numbers that it may be, and what it is."""


def add_flags(add: Callable[..., Any]) -> None:
    """Add the flags to a parser, whose ``add_argument`` this is."""
    for name, about in IMAGES.items():
        add(flag(name), type=path_text, action="append", metavar="FILE", help=f"{about}; repeat for several")
    about = "folder, Hub id or single file of a ControlNet; repeat for several"
    add("--controlnet", type=path_text, action="append", metavar="SOURCE", help=about)
    for name, (kind, about) in NUMBERS.items():
        add(flag(name), type=number(kind), metavar="X", help=about)


def flag(name: str) -> str:
    """The flag of an argument."""
    return "--" + name.replace("_", "-")


def for_images(
    pipe: Any, args: argparse.Namespace, open_controlnet: Callable[[str, Any], Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """The pipeline for the images and ControlNets of the command line, and the images by the name of their argument.

    A pipeline that takes no such image becomes that of its family for the task. ``open_controlnet(source, pipe)`` opens
    a ControlNet with its parameters; :func:`controlnet` if None.

    Raises:
      ValueError: a control image without a ControlNet, or the reverse.
      WeightsError: there is no such pipeline, or a ControlNet cannot be opened.
      OSError: a file cannot be read.
    """
    given = {name: [opened(name, x) for x in paths] for name in IMAGES if (paths := getattr(args, name)) is not None}
    if not given and not args.controlnet:
        return pipe, {}
    takes = inspect.signature(pipe.compose).parameters
    if "control_image" in given and not args.controlnet and "ControlNet" not in type(pipe).__name__:
        raise ValueError("--control-image needs --controlnet")
    if args.controlnet and "control_image" not in given:
        raise ValueError("--controlnet needs --control-image")
    if args.controlnet or any(name in given and name not in takes for name in ("image", "mask_image")):
        task = "Inpainting" if "mask_image" in given else "Image2Image" if "image" in given else "Text2Image"
        nets = [(open_controlnet or controlnet)(source, pipe) for source in args.controlnet or ()]
        added = {"controlnet": nets if len(nets) > 1 else nets[0]} if nets else {}
        pipe = getattr(diffuse_jax, f"AutoPipelineFor{task}").from_pipe(pipe, **added)
        takes = inspect.signature(pipe.compose).parameters
    if "control_image" in given and "control_image" not in takes:
        given["image"] = given.pop("control_image")  # a ControlNet's text to image has no other image
    return pipe, {name: images[0] if len(images) == 1 else images for name, images in given.items()}


def opened(name: str, path: str) -> Any:
    """The image or array of a file."""
    if name == "depth_map":
        import numpy as np

        if not path.endswith(".npy"):
            raise ValueError(f"--depth-map takes a .npy file, got {path}")
        return np.load(path, allow_pickle=False)
    from diffuse_jax.utils import load_image

    return load_image(path)


def configured_controlnet(source: str, pipe: Any) -> Any:
    """A ControlNet and the shapes of its parameters, for a pipeline that has only shapes itself."""
    if os.path.isfile(source):
        return controlnet(source, pipe)  # its configuration follows from its tensors
    from diffuse_jax import weights

    net = diffuse_jax.ControlNetModel.from_config(weights.resolve(source, only_small=True))
    return net, net.shapes()


def controlnet(source: str, pipe: Any) -> Any:
    """A ControlNet and its parameters, in the dtype of the pipeline and on its devices."""
    net = diffuse_jax.ControlNetModel
    open_it = net.from_single_file if os.path.isfile(source) else net.from_pretrained
    return open_it(source, dtype=pipe.components["unet"].dtype, mesh=pipe.mesh)
