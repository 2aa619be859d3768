"""This library's pipelines on PyTorch: our methods unchanged, with PyTorch's modules instead of our networks.

Prompts, seeds, noise, guidance and the sampler are ours on both sides, so the two differ only in the networks, and new
pipelines can be compared without further code.
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

    It is called like our pipelines and uses the same noise for the same seeds; its networks are
    :class:`~diffuse_jax.torch_backend.adapter.TorchNetwork`. TF32 is off.

    Args:
      source: a folder in diffusers layout with safetensors or ``.bin`` files, a Hub id, or ``"diffuse-jax/emoji"``.
      dtype: "float32", "bfloat16" or "float16".
      device: "cpu" or "cuda"; if None, CUDA if available.
      variant, revision: as for our pipelines.
      **components: components to use instead of the folder's: ``scheduler=...``, ``tokenizer=...``.

    Raises:
      WeightsError: the model does not exist, a network has no PyTorch counterpart, or PyTorch cannot open it.
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
            members.append((wrap_module(model, open_network(kind, member.folder, dtype, where, variant)), {}))
        networks[name] = members if entry.class_name in catalogue.LISTS else members[0]
    pipe = DiffusionPipeline.from_pretrained(folder, **networks, **components)
    return pipe.replace(programs=Programs())


def wrap_module(model: Model, module: Any) -> TorchNetwork:
    """The PyTorch module with our network's interface. If the module has another dtype, it computes in that (SDXL's
    autoencoder)."""
    dtype = jnp.dtype(str(next(module.parameters()).dtype).removeprefix("torch."))
    return TorchNetwork(model if model.dtype == dtype else model.clone(dtype=dtype), module)
