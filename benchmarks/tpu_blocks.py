"""The blocks of a UNet, one of each kind, as programs for TPU slices that need not be attached.

A whole step takes libtpu up to an hour on one core; a block takes seconds. Blocks that have equal settings, shapes and
shardings are compiled once and counted as often as the network has them, so their sums stand for the whole step. What
lies between blocks (residual connections, reshapes) is in no block, and what the compiler would fuse across the edge of
a block stays apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
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


class Network(NamedTuple):
    """A network on the devices of a slice.

    Attributes:
      model: applied to ``{"params": ...}`` and the named inputs.
      shapes: of its parameters, with their shardings.
      mesh: the devices.
      kinds: the modules that are its blocks.
      around: makes the context in which it is traced.
      options: of the compiler.
    """

    model: Any
    shapes: Any
    mesh: Mesh
    kinds: tuple[type[nn.Module], ...]
    around: Callable[[], AbstractContextManager[Any]]
    options: dict[str, bool] | None = None


@contextlib.contextmanager
def for_tpus(mesh: Mesh) -> Iterator[None]:
    """Trace our networks for TPUs on this mesh."""
    with jax.set_mesh(automatic(mesh)), target_platform("tpu"):
        yield


def ours(model: Model, mesh: Mesh) -> Network:
    """One of our networks, its parameters sharded as pipelines and trainers do it."""
    with target_platform("tpu"):
        options = compiler_options()
    return Network(model, _placed(model.shapes(), mesh), mesh, BLOCKS, functools.partial(for_tpus, mesh), options)


@dataclasses.dataclass
class Block:
    """A kind of block: its module, its inputs (in order, and by name) as shapes, and where in the network they are."""

    module: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
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
        given, named = jax.tree.map(lambda x: next(left) if isinstance(x, jax.ShapeDtypeStruct) else x, self.inputs)
        return self.module.apply({"params": params}, *given, **named)

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


def blocks(network: Network, **inputs: Any) -> list[Block]:
    """The kinds of blocks that an evaluation of a network on named inputs, given as shapes, has; in its order."""
    found: dict[str, Block] = {}
    inside = False

    def note(call: Call) -> Any:
        nonlocal inside
        if inside or not isinstance(call.module, network.kinds):
            return call.output()
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x
        given = jax.tree.map(shape, (call.inputs, dict(call.named)))
        module = call.module.clone(parent=None, name=None)
        found.setdefault(f"{module!r} {given}", Block(module, given, [])).paths.append(call.path)
        inside = True
        try:
            return call.output()
        finally:
            inside = False

    def evaluate(params: Any, inputs: Any) -> Any:
        return network.model.apply({"params": params}, **inputs)

    with network.around(), changed_layers(note):
        jax.eval_shape(evaluate, network.shapes, inputs)
    return list(found.values())


def sampling_parts(network: Network, **inputs: Any) -> Iterator[Part]:
    """The blocks of one evaluation; images are divided among the devices."""
    for block in blocks(network, **inputs):
        yield _part(network, block, "", block.apply, block.part(network.shapes), _by_image(block.arrays, network.mesh))


def training_parts(network: Network, pairs: Any | None, optimizer: str, **inputs: Any) -> Iterator[Part]:
    """The blocks of a training step, each evaluated and then, with its evaluation repeated, differentiated.

    The last part is the optimiser's update.

    Args:
      pairs: shapes of LoRA pairs, which are trained instead of the network's parameters.
      optimizer: its name, as of ``--optimizer``.
    """
    mesh = network.mesh
    trained = network.shapes if pairs is None else _placed(pairs, mesh)
    for block in blocks(network, **inputs):
        frozen = {} if pairs is None else block.part(network.shapes)
        given = block.part(trained), _by_image(block.arrays, mesh)

        def evaluate(mine: Any, arrays: Any, frozen: Any, block: Block = block) -> Any:
            with lora.live(mine if frozen else {}):
                return block.apply(frozen or mine, arrays)

        def gradient(mine: Any, arrays: Any, frozen: Any, cotangent: Any, evaluate: Any = evaluate) -> Any:
            return jax.vjp(lambda *both: evaluate(*both, frozen), mine, arrays)[1](cotangent)

        yield _part(network, block, "", evaluate, *given, frozen)
        with network.around():
            cotangent = _by_image(jax.eval_shape(evaluate, *given, frozen), mesh)
        kept = jax.tree.map(lambda x: x.sharding, given)
        yield _part(network, block, "gradient of ", gradient, *given, frozen, cotangent, out_shardings=kept)
    yield _update(network, trained, optimizer)


def _update(network: Network, trained: Any, optimizer: str) -> Part:
    made = make_optimizer(optimizer, lambda _: jnp.float32(1e-5))
    state = jax.eval_shape(lambda params: fresh_state(params, made, False), trained)

    def update(params: Any, moments: Any, gradient: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            changes, moments = made.update(gradient, moments, params)
        return optax.apply_updates(params, changes), moments

    cut = {path: leaf.sharding for path, leaf in flatten(trained).items()}
    everywhere = NamedSharding(automatic(network.mesh), PartitionSpec())
    keys = lambda path: tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    where = lambda path, leaf: cut.get(keys(path), everywhere)
    moments = placed(state.opt_state, jax.tree_util.tree_map_with_path(where, state.opt_state))
    kept = jax.tree.map(lambda x: x.sharding, (trained, moments))
    given = trained, moments, trained
    return Part("update", 1, _lowered(network, update, *given, donate_argnums=(0, 1), out_shardings=kept))


def _part(network: Network, block: Block, what: str, fun: Any, *given: Any, **options: Any) -> Part:
    return Part(what + block.name, len(block.paths), _lowered(network, fun, *given, **options))


def _lowered(network: Network, fun: Any, *given: Any, **options: Any) -> jax.stages.Lowered:
    with network.around():
        traced = jax.jit(fun, compiler_options=network.options, **options).trace(*given)
        return traced.lower(lowering_platforms=("tpu",))


def _placed(tree: Any, mesh: Mesh) -> Any:
    return placed(tree, param_shardings(tree, automatic(mesh)))


def _by_image(tree: Any, mesh: Mesh) -> Any:
    over = NamedSharding(automatic(mesh), PartitionSpec(tuple(a for a in ("data", "fsdp") if a in mesh.shape)))
    return placed(tree, jax.tree.map(lambda _: over, tree))
