"""PyTorch's networks, opened with diffusers and transformers, and conversions between the two frameworks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.deprecated import unclip, wuerstchen
from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as latent_diffusion

from diffuse_jax.models import Model
from diffuse_jax.weights import WeightsError

LIBRARIES = {
    "diffusers": diffusers,
    "transformers": transformers,
    "deepfloyd_if": diffusers.pipelines.deepfloyd_if.safety_checker,
    "kandinsky": diffusers.pipelines.kandinsky,
    "latent_diffusion": latent_diffusion,
    "stable_diffusion": diffusers.pipelines.stable_diffusion,
    "unclip": unclip.text_proj,
    "wuerstchen": wuerstchen,
}
"""What ``model_index.json`` calls a library -> the module that has its classes."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_class(kind: type[Model]) -> Any:
    """The PyTorch class with the same name as our network class.

    Raises:
      WeightsError: neither diffusers nor transformers has one.
    """
    found = getattr(LIBRARIES.get(kind.library()), kind.__name__, None)
    if found is None:
        raise WeightsError(f"{kind.__name__} of {kind.library()} has no PyTorch counterpart")
    return found


def choose_device(name: str | None) -> torch.device:
    """The device ``name``, "cpu" or "cuda"; if None, CUDA if available.

    Raises:
      ValueError: PyTorch has no such device here.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': this PyTorch sees no CUDA device; use --device cpu, or install its CUDA build")
    return device


def open_network(
    kind: type[Model], folder: Path, dtype: str, device: torch.device, variant: str | None = None
) -> torch.nn.Module:
    """A network in evaluation mode, opened with PyTorch's own loader.

    Raises:
      WeightsError: PyTorch finds no weights, or their names and shapes do not fit the configuration.
    """
    cls = torch_class(kind)
    options = {"torch_dtype" if cls.__module__.startswith("diffusers") else "dtype": DTYPES[dtype], "variant": variant}
    try:
        with quiet():
            module, found = cls.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{folder}: PyTorch cannot open it: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in found[what] if not str(key).endswith("position_ids"))
        if keys:
            problem = what.replace("_", " ")
            raise WeightsError(f"{folder}: PyTorch finds {len(keys)} {problem}, e.g. {', '.join(keys[:3])}")
    if dtype == "float16" and getattr(module.config, "force_upcast", False):
        module = module.float()  # SDXL's autoencoder overflows in float16; parts.decode.autoencoder does the same
    return module.eval().requires_grad_(False).to(device)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the libraries' progress bars and loading messages; the relevant ones are raised as errors."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)  # diffusers logs an error if a .bin has no safetensors beside it
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        for library in bars:
            library.enable_progress_bar()


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Disable gradients, TF32 and reductions in half precision, so that float32 is float32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    flags = (
        (matmul, "allow_tf32"),
        (cudnn, "allow_tf32"),
        (matmul, "allow_fp16_reduced_precision_reduction"),
        (matmul, "allow_bf16_reduced_precision_reduction"),
    )
    before = [getattr(owner, name) for owner, name in flags]
    for owner, name in flags:
        setattr(owner, name, False)
    try:
        with torch.no_grad():
            yield
    finally:
        for (owner, name), value in zip(flags, before, strict=True):
            setattr(owner, name, value)


def to_torch(array: Any, device: torch.device) -> torch.Tensor:
    """A copy of an array as a tensor; bfloat16 becomes float32, which represents it exactly."""
    host = np.asarray(array)
    host = host if host.dtype.kind in "iub" else host.astype(np.float32)
    return torch.tensor(host, device=device)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as a NumPy array; floating-point numbers become float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """``[B,H,W,C]`` -> ``[B,C,H,W]``, contiguous."""
    return x.permute(0, 3, 1, 2).contiguous()


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``[B,C,H,W]`` -> ``[B,H,W,C]``."""
    return x.permute(0, 2, 3, 1)
