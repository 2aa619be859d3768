"""Training on any mesh is training on one device, and recomputing blocks changes nothing."""

from __future__ import annotations

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffuse_jax.models.layers import Conv, Dense
from diffuse_jax.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from diffuse_jax.schedulers import DDPMScheduler
from diffuse_jax.sharding import make_mesh, param_shardings, put_params, shard_batch, train_batch_sharding
from diffuse_jax.training.initial import initial_params
from diffuse_jax.training.objective import Objective, draw, errors, noised
from diffuse_jax.training.optimizer import make_optimizer
from diffuse_jax.training.state import init_state, make_step
from tests.models.small import one_level

CONFIG = UNet2DConditionConfig(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=16,
    num_attention_heads=2,
)
UNET = UNet2DConditionModel(CONFIG)
SMALL = UNet2DConditionModel(one_level(CONFIG))
OBJECTIVE = Objective(scheduler=DDPMScheduler(), snr_gamma=5.0)
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}


def loss(unet: UNet2DConditionModel, params: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
    drawn = draw(OBJECTIVE, key, batch["x0"])
    prediction = unet.apply({"params": params}, noised(OBJECTIVE, batch["x0"], drawn), drawn.t, batch["text"])
    return errors(OBJECTIVE, prediction, batch["x0"], drawn)


def curve(mesh: jax.sharding.Mesh, unet: UNet2DConditionModel = SMALL, parts: int = 1) -> tuple[list[float], Any]:
    """Losses of four training steps, and the state."""
    optimizer = make_optimizer("adamw", lambda _: 1e-3)
    state = put_params(init_state(initial_params(SMALL.shapes(), 0), optimizer, use_ema=True), mesh)
    step = make_step(functools.partial(loss, unet), optimizer, 0, shardings=param_shardings(state, mesh))
    losses = []
    for n in range(4):
        rng = np.random.default_rng(n)
        normal = lambda *shape, r=rng: r.standard_normal((parts, 8 // parts, *shape)).astype(np.float32)
        batch = {"x0": normal(4, 4, 4), "text": normal(3, 16)}
        state, metrics = step(state, {}, jax.device_put(batch, train_batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], Any]:
    return curve(make_mesh(devices=jax.devices()[:1]))


# "all" divides along each axis at once; the others alone find out which one is wrong.
EACH_MESH = [pytest.param(MESHES[name], marks=() if name == "all" else pytest.mark.slow) for name in MESHES]


@pytest.mark.parametrize("axes", EACH_MESH, ids=MESHES)
def test_losses_are_those_of_one_device(alone: tuple[list[float], Any], axes: dict[str, int]) -> None:
    losses, state = curve(make_mesh(**axes))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-4)
    if axes.get("fsdp", 1) > 1:
        moments = jax.tree.leaves(state.opt_state)
        assert any(not leaf.sharding.is_fully_replicated for leaf in moments), "the optimiser is divided too"


def test_a_mesh_with_explicit_axes_trains_as_an_automatic_one(alone: tuple[list[float], Any]) -> None:
    losses, _ = curve(jax.make_mesh((2, 4), ("data", "fsdp")))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-4)


# Gradients with "blocks" are compared in tests/models/test_intercept.py too.
@pytest.mark.parametrize("policy", [pytest.param("blocks", marks=pytest.mark.slow), "full"])
def test_recomputation_does_not_change_the_losses(alone: tuple[list[float], Any], policy: str) -> None:
    losses, _ = curve(make_mesh(devices=jax.devices()[:1]), SMALL.clone(remat=policy))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)


def test_what_each_policy_recomputes() -> None:
    batch = {"x0": jnp.zeros((1, 4, 4, 4)), "text": jnp.zeros((1, 3, 16))}
    forward = lambda unet: jax.make_jaxpr(lambda p: loss(unet, p, {}, batch, jax.random.key(0))[0])(UNET.shapes())
    parts = lambda unet: sum(e.primitive.name in ("remat2", "checkpoint") for e in forward(unet).eqns)
    assert parts(UNET) == 0
    assert parts(UNET.clone(remat="blocks")) == 8 + 4, "residual blocks and transformer blocks"
    assert parts(UNET.clone(remat="full")) == 5, "two levels down, the middle, two levels up"


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="remat must be one of none, blocks, full, got 'all'"):
        jax.eval_shape(UNET.clone(remat="all").init, jax.random.key(0), **UNET.example_inputs())


def test_each_policy_keeps_less_than_the_one_before() -> None:
    """What the forward pass hands to the backward pass, in bytes; parameters and inputs apart."""
    unet = UNET.clone(config=UNET.config.replace(layers_per_block=2))
    batch = {"x0": jnp.zeros((1, 16, 16, 4)), "text": jnp.zeros((1, 3, 16))}
    params = initial_params(unet.shapes(), 0)

    def kept(policy: str) -> int:
        run = lambda p: loss(unet.clone(remat=policy), p, {}, batch, jax.random.key(0))[0]
        backward = jax.eval_shape(lambda p: jax.vjp(run, p)[1], params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    none, blocks, full = map(kept, ("none", "blocks", "full"))
    assert none > 2 * blocks > 2 * full


def test_layers_gather_their_parameters_and_leave_activations_where_they_are() -> None:
    """A batch sharded along ``fsdp`` does not move between devices; each keeps its part of a gradient."""
    mesh = make_mesh(data=1, fsdp=8)
    layers = nn.Sequential([Conv(16), lambda x: x.mean((1, 2)), Dense(24)])
    shapes = jax.eval_shape(layers.init, jax.random.key(0), jnp.zeros((1, 4, 4, 8)))["params"]
    cut = param_shardings(shapes, mesh)
    cut_over_fsdp = jax.tree.map(lambda s: "fsdp" in s.spec, cut)
    assert cut_over_fsdp == {name: {"kernel": True, "bias": False} for name in ("layers_0", "layers_2")}
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, cut)
    batch = jax.ShapeDtypeStruct((16, 4, 4, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    def gradient(params: Any, x: jax.Array) -> Any:
        return jax.grad(lambda p: jnp.square(layers.apply({"params": p}, x)).sum())(params)

    with jax.set_mesh(mesh):
        program = jax.jit(gradient).lower(params, batch).compile()
    moved = set(re.findall(r"= f32\[([\d,]*)\]\S* all-gather", program.as_text()))
    assert moved == {"3,3,8,16", "16,24"}
    assert not re.search("all-to-all|collective-permute", program.as_text())
    as_stored = lambda made, stored, x: made.is_equivalent_to(stored, x.ndim)
    assert all(jax.tree.leaves(jax.tree.map(as_stored, program.output_shardings, cut, shapes)))


def test_a_batch_is_sharded_along_the_data_axis() -> None:
    made = jax.jit(lambda n: shard_batch(jnp.arange(n)), static_argnums=0)
    with jax.set_mesh(make_mesh(data=2, fsdp=4)):
        assert made(16).sharding.spec == PartitionSpec(("data", "fsdp"))
        assert made(12).sharding.is_fully_replicated
    assert made(16).sharding.device_set == {jax.devices()[0]}
