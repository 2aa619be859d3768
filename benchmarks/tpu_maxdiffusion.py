"""MaxDiffusion's UNet on a TPU slice, imported from a checkout of it, for :mod:`tpu_aot` to measure beside ours.

The network is built as MaxDiffusion's configuration for SDXL has it (``base_xl.yml``): bfloat16, flash attention where
sequences are long, its rules for which axes are divided.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning
from jax.sharding import Mesh
from tpu_blocks import Network
from tpu_programs import placed

RULES = (
    ("batch", "data"),
    ("activation_batch", ("data", "fsdp")),
    ("activation_heads", "tensor"),
    ("activation_kv", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("conv_batch", ("data", "fsdp")),
    ("out_channels", "tensor"),
    ("conv_out", "fsdp"),
)
AXES = ("data", "fsdp", "context", "tensor")
FIELDS = (
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "cross_attention_dim",
    "use_linear_projection",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)


def maxdiffusion(
    checkout: Path, config: Any, mesh: Mesh, inputs: dict[str, Any], dtype: str
) -> tuple[Network, dict[str, Any]]:
    """MaxDiffusion's network for one of our configs, and its inputs in its layout.

    Args:
      checkout: folder of the repository.
      config: our config of the UNet.
      mesh: a mesh with ``data`` and ``fsdp``.
      inputs: named inputs of our network, as shapes.
      dtype: of the parameters.

    Raises:
      FileNotFoundError: the folder is no checkout.
    """
    source = checkout / "src"
    if not (source / "maxdiffusion").is_dir():
        raise FileNotFoundError(f"--maxdiffusion {checkout}: there is no src/maxdiffusion; give a checkout of it")
    sys.path.insert(0, str(source))
    from maxdiffusion import max_utils  # type: ignore[import-not-found]
    from maxdiffusion.models import attention_flax, embeddings_flax, resnet_flax  # type: ignore[import-not-found]
    from maxdiffusion.models.unet_2d_condition_flax import (  # type: ignore[import-not-found]
        FlaxUNet2DConditionModel,
    )

    sizes = [mesh.shape.get(axis, 1) for axis in AXES]
    theirs = Mesh(np.asarray(mesh.devices).reshape(sizes), AXES)
    settings = SimpleNamespace(precision="DEFAULT", flash_block_sizes={})
    one = lambda value: value if isinstance(value, int) else tuple(value)
    given = {name: getattr(config, name) for name in FIELDS if getattr(config, name) is not None}
    model = FlaxUNet2DConditionModel(
        **given,
        sample_size=inputs["sample"].shape[1],
        transformer_layers_per_block=config.per_level("transformer_layers_per_block"),
        attention_head_dim=one(config.num_attention_heads),
        dtype=jnp.bfloat16,
        weights_dtype=jnp.dtype(dtype),
        split_head_dim=True,
        norm_num_groups=config.norm_num_groups,
        attention_kernel="flash",
        flash_block_sizes=max_utils.get_flash_block_sizes(settings),
        mesh=theirs,
        precision=max_utils.get_precision(settings),
    )

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with theirs, partitioning.axis_rules(RULES):
            yield

    sample = inputs["sample"]
    inputs = inputs | {
        "sample": jax.ShapeDtypeStruct((sample.shape[0], sample.shape[3], *sample.shape[1:3]), sample.dtype),
        "timesteps": jax.ShapeDtypeStruct(sample.shape[:1], jnp.int32),
    }
    with around():
        boxed = jax.eval_shape(lambda key, inputs: model.init(key, **inputs), jax.random.key(0), inputs)["params"]
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), theirs, RULES)
        cast = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype))
        shapes = placed(jax.tree.map(cast, nn.unbox(boxed)), shardings)
    kinds = (
        resnet_flax.FlaxResnetBlock2D,
        resnet_flax.FlaxDownsample2D,
        resnet_flax.FlaxUpsample2D,
        attention_flax.FlaxBasicTransformerBlock,
        embeddings_flax.FlaxTimestepEmbedding,
        nn.Conv,
        nn.Dense,
        nn.GroupNorm,
    )
    return Network(model, shapes, theirs, kinds, around), inputs
