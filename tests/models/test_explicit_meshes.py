"""Networks in a user's program on meshes of ``jax.make_mesh``, whose axes are explicit."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffuse_jax.adapters import lora
from diffuse_jax.models import AutoencoderKL, AutoencoderKLConfig, UNet2DConditionConfig, UNet2DConditionModel
from diffuse_jax.models.base import Model
from diffuse_jax.models.intercept import recorded_layers
from diffuse_jax.models.unet_2d import UNet2DConfig, UNet2DModel
from diffuse_jax.sharding import automatic, param_shardings
from diffuse_jax.text import CLIPTextConfig, CLIPTextModel
from tests.models.filling import random_params

P = PartitionSpec
RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.standard_normal(shape).astype(np.float32)
TIMES = np.arange(8, dtype=np.float32)

TEXT = CLIPTextModel(
    CLIPTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
)
VAE = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8,), norm_num_groups=4))
UNET = UNet2DConditionModel(
    UNet2DConditionConfig(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        num_attention_heads=2,
    )
)
CLASSES = UNet2DModel(
    UNet2DConfig(
        block_out_channels=(8,),
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=5,
    )
)

IDS = RNG.integers(0, 32, (8, 6)).astype(np.int32)
CASES: dict[str, tuple[Model, tuple[Any, ...], str]] = {
    "UNet2DConditionModel": (UNET, (normal(8, 4, 4, 4), TIMES, normal(8, 3, 16)), "__call__"),
    "UNet2DModel": (CLASSES, (normal(8, 4, 4, 3), np.int32(3), np.arange(8, dtype=np.int32) % 5), "__call__"),
    "encode": (VAE, (normal(8, 4, 4, 3),), "encode"),
    "decode": (VAE, (normal(8, 4, 4, 4),), "decode"),
    "CLIPTextModel": (TEXT, (IDS,), "__call__"),
}
PARAMS = {model: random_params(model.shapes(), RNG) for model in (UNET, CLASSES, VAE, TEXT)}

each_case = pytest.mark.parametrize(("model", "inputs", "method"), CASES.values(), ids=CASES)


def runner(model: Model, method: str = "__call__") -> Callable[..., Any]:
    return lambda params, *inputs: model.apply({"params": params}, *inputs, method=method)


def loss_of(model: Model, method: str = "__call__") -> Callable[..., jax.Array]:
    run = runner(model, method)
    return lambda params, *inputs: jnp.square(jax.tree.leaves(run(params, *inputs))[0]).mean()


def on(mesh: Mesh, tree: Any, *batch: Any) -> Any:
    """Arrays on the mesh, their first axis sharded along ``batch``; scalars stay where they are."""
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P(*batch))) if np.ndim(x) else x
    return jax.tree.map(put, tree)


def current(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def check(made: Any, wanted: Any, mesh: Mesh, *batch: Any) -> None:
    """The values of one device, on the user's mesh and sharded as the user sharded the batch."""
    assert jax.tree.structure(made) == jax.tree.structure(wanted)
    for ours, one in zip(jax.tree.leaves(made), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(ours, one, atol=1e-5)
        assert ours.sharding == NamedSharding(mesh, P(*batch, *[None] * (ours.ndim - len(batch))))


@each_case
def test_compiled_with_a_batch_sharded_along_data(model: Model, inputs: tuple[Any, ...], method: str) -> None:
    run, mesh = runner(model, method), jax.make_mesh((8,), ("data",))
    wanted = jax.jit(run)(PARAMS[model], *inputs)
    for context in (None, mesh):
        with current(context):
            check(jax.jit(run)(on(mesh, PARAMS[model]), *on(mesh, inputs, "data")), wanted, mesh, "data")


@each_case
def test_op_by_op_with_a_batch_sharded_along_data(model: Model, inputs: tuple[Any, ...], method: str) -> None:
    run, mesh = runner(model, method), jax.make_mesh((8,), ("data",))
    wanted = jax.jit(run)(PARAMS[model], *inputs)
    for context in (None, mesh):
        with current(context):
            check(run(on(mesh, PARAMS[model]), *on(mesh, inputs, "data")), wanted, mesh, "data")


@each_case
def test_gradients_stay_where_the_parameters_are(model: Model, inputs: tuple[Any, ...], method: str) -> None:
    """Parameters are sharded along ``fsdp``, the batch along both axes."""
    gradient, mesh = jax.grad(loss_of(model, method)), jax.make_mesh((2, 4), ("data", "fsdp"))
    cut = param_shardings(model.shapes(), mesh)
    assert any("fsdp" in sharding.spec for sharding in jax.tree.leaves(cut))
    wanted = jax.jit(gradient)(PARAMS[model], *inputs)
    arguments = jax.device_put(PARAMS[model], cut), *on(mesh, inputs, ("data", "fsdp"))
    with current(mesh if model is UNET else None):
        made = jax.jit(gradient)(*arguments)
    jax.tree.map(lambda ours, one: np.testing.assert_allclose(ours, one, atol=1e-5), made, wanted)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, made, cut)))


def test_gradients_and_a_training_step_op_by_op() -> None:
    """JAX itself wants ``jax.set_mesh`` for this, whatever the function."""
    mesh, loss = jax.make_mesh((8,), ("data",)), loss_of(TEXT)
    params, ids = on(mesh, PARAMS[TEXT]), on(mesh, IDS, "data")
    wanted = jax.jit(jax.grad(loss))(PARAMS[TEXT], IDS)
    with jax.set_mesh(mesh):
        gradient = jax.grad(loss)(params, ids)
        updated = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    check(gradient, wanted, mesh)
    check(updated, jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS[TEXT], wanted), mesh)


KINDS = {
    "two explicit": (AxisType.Explicit, AxisType.Explicit),
    "explicit batch": (AxisType.Explicit, AxisType.Auto),
    "explicit parameters": (AxisType.Auto, AxisType.Explicit),
}


@pytest.mark.parametrize("set_mesh", [False, True])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_two_axes_of_any_kinds(kinds: tuple[AxisType, AxisType], set_mesh: bool) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    params = on(mesh, PARAMS[TEXT])
    kernel = params["text_model"]["encoder"]["layers_0"]["mlp"]["fc1"]
    kernel["kernel"] = jax.device_put(kernel["kernel"], NamedSharding(mesh, P(None, "model")))
    with current(mesh if set_mesh else None):
        made = jax.jit(runner(TEXT))(params, on(mesh, IDS, "data"))
    for ours, one in zip(jax.tree.leaves(made), jax.tree.leaves(jax.jit(runner(TEXT))(PARAMS[TEXT], IDS))):
        np.testing.assert_allclose(ours, one, atol=1e-5)
        assert ours.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), ours.ndim)
        assert ours.sharding.mesh == mesh


def test_only_the_batch_of_a_result_is_sharded() -> None:
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"))
    wanted = jax.jit(runner(TEXT))(PARAMS[TEXT], IDS)
    check(jax.jit(runner(TEXT))(on(mesh, PARAMS[TEXT]), on(mesh, IDS, ("c", "a"), "b")), wanted, mesh, ("c", "a"))
    check(jax.jit(runner(TEXT))(on(mesh, PARAMS[TEXT]), on(mesh, IDS)), wanted, mesh)
    mask = on(mesh, np.ones(IDS.shape, bool), "b")
    check(jax.jit(runner(TEXT))(on(mesh, PARAMS[TEXT]), on(mesh, IDS), mask), wanted, mesh, "b")


def test_arrays_that_are_nowhere_yet_follow_the_others() -> None:
    mesh, wanted = jax.make_mesh((8,), ("data",)), jax.jit(runner(TEXT))(PARAMS[TEXT], IDS)
    for run in (runner(TEXT), jax.jit(runner(TEXT))):
        check(run(PARAMS[TEXT], on(mesh, IDS, "data")), wanted, mesh, "data")
        check(run(on(automatic(mesh), PARAMS[TEXT]), on(mesh, IDS, "data")), wanted, mesh, "data")
        with jax.set_mesh(mesh):
            check(run(PARAMS[TEXT], IDS), wanted, mesh)


def test_explicit_arrays_under_an_automatic_mesh() -> None:
    mesh = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(automatic(mesh)):
        made = jax.jit(runner(TEXT))(on(mesh, PARAMS[TEXT]), on(mesh, IDS, "data")).pooled_output
    np.testing.assert_allclose(made, jax.jit(runner(TEXT))(PARAMS[TEXT], IDS).pooled_output, atol=1e-5)
    assert made.sharding.is_equivalent_to(NamedSharding(automatic(mesh), P("data")), 2)


def test_inside_shard_map_and_vmap() -> None:
    mesh, wanted = jax.make_mesh((4, 2), ("data", "model")), jax.jit(runner(TEXT))(PARAMS[TEXT], IDS)
    params, ids = on(mesh, PARAMS[TEXT]), on(mesh, IDS, "data")
    specs = {"in_specs": (P(), P("data")), "out_specs": P("data"), "axis_names": {"data"}}
    check(jax.jit(jax.shard_map(runner(TEXT), mesh=mesh, **specs))(params, ids), wanted, mesh, "data")
    alone = jax.vmap(lambda params, one: jax.tree.map(lambda x: x[0], runner(TEXT)(params, one[None])), (None, 0))
    check(jax.jit(alone)(params, ids), wanted, mesh, "data")


COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(")


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}], ids=str)
def test_devices_exchange_what_they_do_on_an_automatic_mesh(axes: dict[str, int]) -> None:
    """That is nothing but parameters in parts, and gradients."""
    model, inputs, method = CASES["encode"]

    def exchanged(mesh: Mesh) -> list[str]:
        cut = param_shardings(model.shapes(), mesh)
        arguments = jax.device_put(PARAMS[model], cut), *on(mesh, inputs, tuple(axes))
        with jax.set_mesh(mesh):
            program = jax.jit(jax.grad(loss_of(model, method))).lower(*arguments).compile()
        return sorted(COLLECTIVE.findall(program.as_text()))

    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes))
    found = exchanged(mesh)
    assert found == exchanged(automatic(mesh))
    assert set(found) == ({"all-reduce"} if axes == {"data": 8} else {"all-reduce", "all-gather"})


@pytest.mark.parametrize("axis_type", [None, AxisType.Auto])
def test_without_explicit_axes_nothing_is_added(axis_type: AxisType | None) -> None:
    params, ids = PARAMS[TEXT], IDS
    if axis_type is not None:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
        params, ids = on(mesh, params), on(mesh, ids, "data")
    plain = lambda params, ids: nn.Module.apply(TEXT, {"params": params}, ids)
    lowered = lambda run: jax.jit(run).lower(params, ids).as_text().replace(run.__name__, "run")
    assert lowered(runner(TEXT)) == lowered(plain)


@pytest.mark.parametrize("explicit", [False, True])
def test_a_network_is_traced_once(explicit: bool) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,))
    with recorded_layers() as layers:
        jax.eval_shape(runner(TEXT), on(mesh, PARAMS[TEXT]), on(mesh, IDS, "data"))
    assert [layer.path for layer in layers].count(()) == 1


def test_layers_can_be_recorded_and_changed_from_outside() -> None:
    mesh = jax.make_mesh((8,), ("data",))
    pairs = lora.init(TEXT.shapes(), 2, jax.random.key(0))
    pairs = jax.tree.map(lambda x: x + 0.1, pairs)

    def run(params: Any, pairs: Any, ids: jax.Array) -> Any:
        with recorded_layers() as layers:
            out = lora.Adapted(TEXT, pairs).apply({"params": params}, ids).pooled_output
        return out, next(layer.output for layer in layers if layer.path == ("text_model", "embeddings"))

    def loss(pairs: Any, params: Any, ids: jax.Array) -> jax.Array:
        return jnp.square(run(params, pairs, ids)[0]).mean()

    arguments = on(mesh, PARAMS[TEXT]), on(mesh, pairs), on(mesh, IDS, "data")
    wanted = jax.jit(run)(PARAMS[TEXT], pairs, IDS)
    made = jax.jit(run)(*arguments)
    check(made[0], wanted[0], mesh, "data")
    np.testing.assert_allclose(made[1], wanted[1], atol=1e-5)
    assert made[1].sharding.is_equivalent_to(NamedSharding(automatic(mesh), P("data")), 3)
    gradient = jax.jit(jax.grad(loss))(arguments[1], arguments[0], arguments[2])
    check(gradient, jax.jit(jax.grad(loss))(pairs, PARAMS[TEXT], IDS), mesh)


def test_recomputation_does_not_change_gradients() -> None:
    mesh, (model, inputs, method) = jax.make_mesh((8,), ("data",)), CASES["decode"]
    arguments = on(mesh, PARAMS[model]), *on(mesh, inputs, "data")
    wanted = jax.jit(jax.grad(loss_of(model, method)))(PARAMS[model], *inputs)
    check(jax.jit(jax.grad(loss_of(model.clone(remat="full"), method)))(*arguments), wanted, mesh)


def test_arrays_on_different_meshes_are_refused() -> None:
    mesh, other = jax.make_mesh((8,), ("data",)), jax.make_mesh((2, 4), ("data", "model"))
    wanted = r"\[8, 6\] is on a mesh {'data': 8}.*uses {'data': 2, 'model': 4}; put parameters and inputs on one mesh"
    with pytest.raises(ValueError, match=wanted):
        jax.jit(runner(TEXT))(on(other, PARAMS[TEXT]), on(mesh, IDS, "data"))
    with jax.set_mesh(other), pytest.raises(ValueError, match="is on a mesh {'data': 8}, but jax.set_mesh"):
        runner(TEXT)(on(mesh, PARAMS[TEXT]), IDS)


def test_fresh_parameters_and_shapes_under_an_explicit_mesh() -> None:
    mesh, model = jax.make_mesh((8,), ("data",)), TEXT.clone(config=TEXT.config.replace(vocab_size=40))
    with jax.set_mesh(mesh):
        shapes = model.shapes()
        made = jax.jit(lambda key, ids: model.init(key, ids))(jax.random.key(0), on(mesh, IDS, "data"))["params"]
    assert all(leaf.sharding is None for leaf in jax.tree.leaves(shapes)), "they are kept for calls without the mesh"
    same = lambda leaf, x: x.shape == leaf.shape and x.sharding.is_equivalent_to(NamedSharding(mesh, P()), x.ndim)
    assert all(jax.tree.leaves(jax.tree.map(same, shapes, made))), "a row of biases as long as the batch stays whole"


def test_parameters_are_read_onto_a_mesh(tmp_path: Path) -> None:
    TEXT.save_pretrained(tmp_path, PARAMS[TEXT])
    for mesh in (explicit := jax.make_mesh((2, 4), ("data", "fsdp")), automatic(explicit)):
        model, params = CLIPTextModel.from_pretrained(tmp_path, mesh=mesh)
        assert jax.tree.map(lambda x: x.sharding, params) == param_shardings(TEXT.shapes(), mesh)
        table = params["text_model"]["embeddings"]["token_embedding"]["embedding"]
        assert table.sharding == NamedSharding(mesh, P(None, "fsdp"))
        made = jax.jit(runner(model))(params, on(mesh, IDS, "data"))
        np.testing.assert_allclose(
            made.pooled_output, jax.jit(runner(TEXT))(PARAMS[TEXT], IDS).pooled_output, atol=1e-5
        )
    with pytest.raises(ValueError, match="mesh and shardings exclude each other"):
        CLIPTextModel.from_pretrained(tmp_path, mesh=mesh, shardings=NamedSharding(mesh, P()))
