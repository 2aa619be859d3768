"""The blocks of a UNet, one of each kind, as programs for TPU slices that need not be attached.

A whole step takes libtpu up to an hour on one core; a block takes seconds. Blocks that have equal settings, shapes and
shardings are compiled once and counted as often as the network has them, so their sums stand for the whole step. What
lies between blocks (residual connections, reshapes) is in no block, and what the compiler would fuse across the edge of
a block stays apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tpu_programs import placed

from diffuse_jax.adapters import lora
from diffuse_jax.kernels import compiler_options, target_platform
from diffuse_jax.models import Model
from diffuse_jax.models.attention import TransformerBlock
from diffuse_jax.models.embeddings import TimestepEmbedding
from diffuse_jax.models.intercept import Call, changed_layers
from diffuse_jax.models.layers import Conv, Dense, GroupNorm
from diffuse_jax.models.resnet import Downsample, ResnetBlock, Upsample
from diffuse_jax.models.unet_blocks import Join
from diffuse_jax.sharding import automatic, param_shardings
from diffuse_jax.training.optimizer import make_optimizer
from diffuse_jax.training.state import fresh_state
from diffuse_jax.weights.names import flatten, unflatten

BLOCKS = (ResnetBlock, TransformerBlock, Downsample, Upsample, TimestepEmbedding, Conv, Dense, GroupNorm, Join)
"""Recomputed blocks, and the layers that stand outside them."""


@dataclasses.dataclass
class Block:
    """A kind of block: its module, its inputs as shapes, and where in the network such blocks are."""

    module: nn.Module
    inputs: tuple[Any, ...]
    paths: list[tuple[str, ...]]

    @property
    def name(self) -> str:
        return f"{type(self.module).__name__} {self.paths[0]} x {len(self.paths)}"

    @property
    def arrays(self) -> list[jax.ShapeDtypeStruct]:
        """The inputs that are arrays."""
        return [x for x in jax.tree.leaves(self.inputs) if isinstance(x, jax.ShapeDtypeStruct)]

    def apply(self, params: Any, arrays: list[Any]) -> Any:
        """The block's result for other arrays in the place of its own."""
        left = iter(arrays)
        inputs = jax.tree.map(lambda x: next(left) if isinstance(x, jax.ShapeDtypeStruct) else x, self.inputs)
        return self.module.apply({"params": params}, *inputs)

    def part(self, tree: Any) -> Any:
        """The part of the network's parameters, or of a tree like it, that the first block of the kind has."""
        path = self.paths[0]
        own = {name[len(path) :]: leaf for name, leaf in flatten(tree).items() if name[: len(path)] == path}
        return unflatten(own)


class Part(NamedTuple):
    """A program of a step, and how often the step has it."""

    name: str
    count: int
    lowered: jax.stages.Lowered


def blocks(network: Model, **inputs: Any) -> list[Block]:
    """The kinds of blocks that an evaluation of a network on named inputs, given as shapes, has; in its order."""
    found: dict[str, Block] = {}
    inside = False

    def note(call: Call) -> Any:
        nonlocal inside
        if inside or not isinstance(call.module, BLOCKS):
            return call.output()
        given = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x, call.inputs
        )
        module = call.module.clone(parent=None, name=None)
        found.setdefault(f"{module!r} {given}", Block(module, given, [])).paths.append(call.path)
        inside = True
        try:
            return call.output()
        finally:
            inside = False

    def evaluate(params: Any, inputs: Any) -> Any:
        return network.apply({"params": params}, **inputs)

    shapes = network.shapes()  # not inside the context: it evaluates the network on another input
    with changed_layers(note):
        jax.eval_shape(evaluate, shapes, inputs)
    return list(found.values())


def sampling_parts(network: Model, mesh: Mesh, **inputs: Any) -> Iterator[Part]:
    """The blocks of one evaluation; images are divided among the devices."""
    shapes = _placed(network.shapes(), mesh)
    for block in blocks(network, **inputs):
        yield _part(block, "", mesh, block.apply, block.part(shapes), _by_image(block.arrays, mesh))


def training_parts(network: Model, mesh: Mesh, pairs: Any | None, optimizer: str, **inputs: Any) -> Iterator[Part]:
    """The blocks of a training step, each evaluated and then, with its evaluation repeated, differentiated.

    The last part is the optimiser's update.

    Args:
      pairs: shapes of LoRA pairs, which are trained instead of the network's parameters.
      optimizer: its name, as of ``--optimizer``.
    """
    shapes = _placed(network.shapes(), mesh)
    trained = shapes if pairs is None else _placed(pairs, mesh)
    for block in blocks(network, **inputs):
        frozen = {} if pairs is None else block.part(shapes)
        given = block.part(trained), _by_image(block.arrays, mesh)

        def evaluate(mine: Any, arrays: Any, frozen: Any, block: Block = block) -> Any:
            with lora.live(mine if frozen else {}):
                return block.apply(frozen or mine, arrays)

        def gradient(mine: Any, arrays: Any, frozen: Any, cotangent: Any, evaluate: Any = evaluate) -> Any:
            return jax.vjp(lambda *both: evaluate(*both, frozen), mine, arrays)[1](cotangent)

        yield _part(block, "", mesh, evaluate, *given, frozen)
        with jax.set_mesh(automatic(mesh)), target_platform("tpu"):
            cotangent = _by_image(jax.eval_shape(evaluate, *given, frozen), mesh)
        kept = jax.tree.map(lambda x: x.sharding, given)
        yield _part(block, "gradient of ", mesh, gradient, *given, frozen, cotangent, out_shardings=kept)
    yield _update(trained, optimizer, mesh)


def _update(trained: Any, optimizer: str, mesh: Mesh) -> Part:
    made = make_optimizer(optimizer, lambda _: jnp.float32(1e-5))
    state = jax.eval_shape(lambda params: fresh_state(params, made, False), trained)

    def update(params: Any, moments: Any, gradient: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            changes, moments = made.update(gradient, moments, params)
        return optax.apply_updates(params, changes), moments

    given = trained, _placed(state.opt_state, mesh)
    kept = jax.tree.map(lambda x: x.sharding, given)
    return Part("update", 1, _lowered(update, mesh, *given, trained, donate_argnums=(0, 1), out_shardings=kept))


def _part(block: Block, what: str, mesh: Mesh, fun: Any, *given: Any, **options: Any) -> Part:
    return Part(what + block.name, len(block.paths), _lowered(fun, mesh, *given, **options))


def _lowered(fun: Any, mesh: Mesh, *given: Any, **options: Any) -> jax.stages.Lowered:
    with jax.set_mesh(automatic(mesh)), target_platform("tpu"):
        traced = jax.jit(fun, compiler_options=compiler_options(), **options).trace(*given)
        return traced.lower(lowering_platforms=("tpu",))


def _placed(tree: Any, mesh: Mesh) -> Any:
    return placed(tree, param_shardings(tree, automatic(mesh)))


def _by_image(tree: Any, mesh: Mesh) -> Any:
    over = NamedSharding(automatic(mesh), PartitionSpec(tuple(a for a in ("data", "fsdp") if a in mesh.shape)))
    return placed(tree, jax.tree.map(lambda _: over, tree))
