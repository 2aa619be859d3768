"""Sampling and training steps of published networks as programs for TPU slices that need not be attached.

libtpu compiles on any CPU. Nothing is allocated: parameters, states and batches are shapes. A process that imports this
module only compiles, possibly next to others.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from trainers import MODELS, batch_shapes, make_trainer

from diffuse_jax.kernels import compiler_options, target_platform
from diffuse_jax.models import UNet2DConditionModel
from diffuse_jax.sharding import make_mesh, param_shardings, train_batch_sharding
from diffuse_jax.training.flops import count_flops
from diffuse_jax.training.optimizer import make_optimizer
from diffuse_jax.training.state import init_state, make_step, mean_gradient

GIB = 1 << 30

jax.config.update("jax_platforms", "cpu")
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # read when libtpu is loaded


class Step(NamedTuple):
    """A step to compile, and its arithmetic on one chip without recomputation, in operations."""

    lowered: jax.stages.Lowered
    flops: float


def slice_mesh(topology: str, chips: int | None = None, **axes: int) -> Mesh:
    """A mesh over the first ``chips``, or all, of a slice such as ``v5e:2x4``, as of
    :func:`diffuse_jax.sharding.make_mesh`."""
    return make_mesh(**{"data": -1} | axes, devices=topologies.get_topology_desc(topology, "tpu").devices[:chips])


def unet_call(
    model: str, images: int, pixels: int, param_dtype: Any = jnp.bfloat16
) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """A UNet in bfloat16 with its named inputs, as shapes, for so many images."""
    config = MODELS[model][0]
    network = UNet2DConditionModel(config, dtype=jnp.bfloat16, param_dtype=param_dtype)
    rows = lambda *shape: jax.ShapeDtypeStruct((images, *shape), jnp.bfloat16)
    inputs = {
        "sample": rows(pixels // 8, pixels // 8, 4),
        "timesteps": jax.ShapeDtypeStruct((), jnp.int32),
        "encoder_hidden_states": rows(77, config.cross_attention_dim),
    }
    if config.addition_embed_type:
        inputs["added_cond_kwargs"] = {"text_embeds": rows(1280), "time_ids": rows(6)}
    return network, inputs


def sampling_step(model: str, mesh: Mesh, batch: int, pixels: int) -> Step:
    """One evaluation of a UNet in bfloat16; ``batch`` counts its inputs per chip, two for an image with guidance."""
    network, inputs = unet_call(model, batch * mesh.shape["data"], pixels)
    step = lambda params, inputs: network.apply({"params": params}, **inputs)
    shapes = network.shapes()
    flops = count_flops(step, shapes, inputs) / mesh.shape["data"]
    over = lambda x: NamedSharding(mesh, PartitionSpec("data") if x.ndim else PartitionSpec())
    arguments = placed(shapes, param_shardings(shapes, mesh)), placed(inputs, jax.tree.map(over, inputs))
    with jax.set_mesh(mesh), target_platform("tpu"):
        traced = jax.jit(step, compiler_options=compiler_options()).trace(*arguments)
        return Step(traced.lower(lowering_platforms=("tpu",)), flops)


def training_step(
    model: str,
    method: str,
    mesh: Mesh,
    batch: int,
    pixels: int,
    *,
    remat: str = "blocks",
    rank: int = 4,
    cached: bool = False,
    ema: bool = False,
    optimizer: str = "adamw",
) -> Step:
    """The step of ``train/text_to_image.py`` or, with ``method="lora"``, of its LoRA sibling; ``batch`` per chip."""
    trainer = make_trainer(model, method, dtype=jnp.bfloat16, remat=remat, rank=rank, cached=cached)
    made = make_optimizer(optimizer, lambda _: jnp.float32(1e-5))
    state = jax.eval_shape(lambda p: init_state(p, made, ema), trainer.trainable)
    shardings = param_shardings(state, mesh)
    with target_platform("tpu"):
        step = make_step(trainer.loss, made, 0, shardings=shardings)
    parts = {
        name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype)
        for name, x in batch_shapes(model, batch * mesh.size, pixels, cached=cached).items()
    }
    gradient = lambda *shapes: mean_gradient(trainer.loss, *shapes, jax.random.key(0))
    flops = count_flops(gradient, trainer.trainable, trainer.frozen, parts) / mesh.size
    inputs = (
        placed(state, shardings),
        placed(trainer.frozen, param_shardings(trainer.frozen, mesh)),
        placed(parts, jax.tree.map(lambda _: train_batch_sharding(mesh), parts)),
    )
    with target_platform("tpu"):
        return Step(step.trace(*inputs).lower(lowering_platforms=("tpu",)), flops)


def placed(tree: Any, shardings: Any) -> Any:
    """The same shapes with shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def needs(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Memory of a compiled program on one chip in GiB, and the compiler's count of its arithmetic."""
    memory = compiled.memory_analysis()
    state = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = state + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    cost = compiled.cost_analysis() or {}
    return {
        "fits": True,
        "state": state / GIB,
        "temporary": memory.temp_size_in_bytes / GIB,
        "program": memory.generated_code_size_in_bytes / GIB,
        "total": total / GIB,
        "peak": memory.peak_memory_in_bytes / GIB,
        "compiler_TFLOP": cost.get("flops", float("nan")) / 1e12,
    }


def refusal(message: str) -> dict[str, Any]:
    """The row of a program that does not fit, from the compiler's message.

    Raises:
      RuntimeError: the compiler failed for another reason.
    """
    found = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", message)
    if found is None:
        raise RuntimeError(message)
    print(message, file=sys.stderr)
    return {"fits": False, "total": float(found[1])}
