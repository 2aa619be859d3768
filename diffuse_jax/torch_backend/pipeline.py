"""This library's pipelines on PyTorch: our methods unchanged, with PyTorch's modules in the place of the networks.

Prompts, seeds, noise, guidance and the sampler are ours on both sides, so the two differ in nothing but the networks,
and a new pipeline is compared the day it exists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from diffuse_jax import weights
from diffuse_jax.models import Model
from diffuse_jax.pipelines import DiffusionPipeline, catalogue
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.torch_backend.adapter import TorchNetwork
from diffuse_jax.torch_backend.networks import choose_device, open_network


def from_pretrained(
    source: str | Path,
    *,
    dtype: str = "float32",
    device: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    **components: Any,
) -> DiffusionPipeline:
    """Open a pipeline whose networks are PyTorch's, read by diffusers and transformers.

    It is called like ours and gives images from the same seeds; its components are
    :class:`~diffuse_jax.torch_backend.adapter.TorchNetwork`. Noise is JAX's. In float32 there is no TF32.

    Args:
      source: a folder in diffusers layout with safetensors or ``.bin`` files, a Hub id, or ``"diffuse-jax/emoji"``.
      dtype: "float32", "bfloat16" or "float16".
      device: "cpu" or "cuda"; CUDA where there is one, if None.
      variant, revision: as for ours.
      **components: ``scheduler=...``, ``tokenizer=...`` instead of the folder's.

    Raises:
      WeightsError: no such model, a pipeline or network without a twin, or PyTorch cannot open it.
      ValueError: there is no such device.

    Example::

        pipe = torch_backend.from_pretrained("diffuse-jax/emoji")
        image = pipe("a red apple, noto style", seed=0).images[0]
    """
    where = choose_device(device)
    folder = weights.resolve(source, variant=variant, revision=revision)
    networks: dict[str, Any] = {}
    for name, entry in weights.read_index(folder).components.items():
        if name in components or not catalogue.is_network(entry):
            continue
        members: list[tuple[TorchNetwork, dict[str, Any]]] = []
        for member in catalogue.folders(name, entry):
            kind = catalogue.network(member)
            assert kind is not None
            model = kind.from_config(member.folder, dtype=jnp.dtype(dtype))
            members.append((in_place_of(model, open_network(kind, member.folder, dtype, where, variant)), {}))
        networks[name] = members if entry.class_name in catalogue.LISTS else members[0]
    pipe = DiffusionPipeline.from_pretrained(folder, **networks, **components)
    return pipe.replace(programs=Programs())


def in_place_of(model: Model, module: Any) -> TorchNetwork:
    """PyTorch's module for our network; one that was read in another dtype also computes in it (SDXL's autoencoder)."""
    dtype = jnp.dtype(str(next(module.parameters()).dtype).removeprefix("torch."))
    return TorchNetwork(model if model.dtype == dtype else model.clone(dtype=dtype), module)
