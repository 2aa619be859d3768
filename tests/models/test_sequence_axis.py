"""The axis ``sequence``: images divided by rows and attention by queries give what one device gives, in less memory."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffuse_jax.kernels import attention
from diffuse_jax.models.base import Model
from diffuse_jax.models.layers import Conv
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.sharding import make_mesh, param_shardings
from tests.models.test_explicit_meshes import CASES, PARAMS, loss_of, runner
from tests.pipelines import tiny

RNG = np.random.default_rng(0)
MESH = make_mesh(data=2, sequence=4)


def on(mesh: Mesh, *arrays: Any) -> Any:
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))


SHAPES = {"divides evenly": (64, 64), "text": (64, 77), "stays whole": (77, 77), "one query": (1, 64)}


@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradient(lengths: tuple[int, int], masked: bool) -> None:
    rows, columns = lengths
    make = lambda n: RNG.standard_normal((2, n, 2, 8)).astype(np.float32)
    q, k, v = make(rows), make(columns), make(columns)
    mask = RNG.random((2, 1, rows, columns)) > 0.3 if masked else None
    run = lambda q, k, v: attention(q, k, v, mask=mask)
    both = lambda q, k, v: (run(q, k, v), jax.grad(lambda *x: jnp.square(run(*x)).sum(), (0, 1, 2))(q, k, v))
    wanted = jax.jit(both)(q, k, v)
    with jax.set_mesh(MESH):
        made = jax.jit(both)(*on(MESH, q, k, v))
    jax.tree.map(lambda ours, one: np.testing.assert_allclose(ours, one, atol=1e-5), made, wanted)
    assert ("sequence" in str(made[0].sharding.spec)) == (rows % 4 == 0)


@pytest.mark.parametrize(("model", "inputs", "method"), CASES.values(), ids=CASES)
def test_networks(model: Model, inputs: tuple[Any, ...], method: str) -> None:
    wanted = jax.jit(runner(model, method))(PARAMS[model], *inputs)
    params = jax.device_put(PARAMS[model], param_shardings(model.shapes(), MESH))
    inputs = [on(MESH, x)[0] if np.ndim(x) else x for x in inputs]
    with jax.set_mesh(MESH):
        made = jax.jit(runner(model, method))(params, *inputs)
    jax.tree.map(lambda ours, one: np.testing.assert_allclose(ours, one, atol=1e-5), made, wanted)


def test_gradients_of_a_network() -> None:
    model, inputs, method = CASES["UNet2DConditionModel"]
    gradient = jax.grad(loss_of(model, method))
    wanted = jax.jit(gradient)(PARAMS[model], *inputs)
    with jax.set_mesh(MESH):
        made = jax.jit(gradient)(
            jax.device_put(PARAMS[model], param_shardings(model.shapes(), MESH)), *on(MESH, *inputs)
        )
    jax.tree.map(lambda ours, one: np.testing.assert_allclose(ours, one, atol=1e-5), made, wanted)


class Levels(nn.Module):
    """Three levels down by convolutions of stride 2, and up again."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        skips = [x]
        for i in range(3):
            skips.append(Conv(4, stride=2, name=f"down_{i}")(skips[-1]))
        h = skips.pop()
        for i in range(3):
            h = Conv(4, name=f"up_{i}")(jnp.repeat(jnp.repeat(h, 2, 1), 2, 2)) + skips.pop()
        return jnp.tanh(h)


@pytest.mark.parametrize(("rows", "devices"), [(16, 8), (8, 4), (24, 8), (8, 8)])
def test_levels_with_fewer_rows_than_devices_in_a_loop(rows: int, devices: int) -> None:
    """Such levels stay whole: what XLA computed with uneven parts in a loop was wrong, and right outside of one."""
    levels, x = Levels(), RNG.standard_normal((1, rows, 16, 4)).astype(np.float32)
    params = levels.init(jax.random.key(0), x)
    run = lambda params, x: jax.lax.fori_loop(0, 2, lambda _, x: levels.apply(params, x), x)
    wanted, mesh = jax.jit(run)(params, x), make_mesh(data=1, sequence=devices, devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        made = jax.jit(run)(*jax.device_put((params, x), NamedSharding(mesh, PartitionSpec())))
    np.testing.assert_allclose(made, wanted, atol=1e-6)


CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": [0, 1], "output_type": "np"}


@pytest.mark.parametrize("size", [16, pytest.param(24, marks=pytest.mark.slow)])
def test_a_pipeline_gives_the_images_of_one_device(size: int) -> None:
    """Also step by step, and where an image has rows that the axis does not divide at some level (12, 6)."""
    alone, sizes = tiny.pipeline(), {"height": size, "width": size}
    wanted = alone(["a", "b"], **CALL, **sizes).images
    there = alone.replace(mesh="data=2,sequence=4" if size == 24 else "data=1,sequence=8")
    np.testing.assert_allclose(there(["a", "b"], **CALL, **sizes).images, wanted, atol=1e-4)
    if size == 16:
        by_steps = there(["a", "b"], **CALL, **sizes, callback_on_step_end=lambda pipe, i, t, values: None)
        np.testing.assert_allclose(by_steps.images, wanted, atol=1e-4)


@pytest.mark.slow
def test_each_device_needs_less_memory_for_activations() -> None:
    """Four devices along the axis, at most 0.55 of the temporary memory of a run; gathered keys are part of it."""
    pipe, needed = tiny.pipeline(), []
    for size in (1, 4):
        there = pipe.replace(mesh=make_mesh(data=1, sequence=size, devices=jax.devices()[:size]), programs=Programs())
        there.compile("a", height=64, width=64, num_inference_steps=2, seed=0)
        (program,) = [p for key, p in there.programs._programs.items() if key.fn.__name__ == "sample"]
        needed.append(program.memory_analysis().temp_size_in_bytes)
    assert needed[1] < 0.55 * needed[0], needed
