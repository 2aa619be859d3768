"""What is compiled for TPUs that are not here: libtpu is a compiler as well as a driver."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest

LIBTPU = importlib.util.find_spec("libtpu") is not None
PYTHON = os.environ.get("DIFFUSE_JAX_TPU_PYTHON", sys.executable if LIBTPU else "")
"""An interpreter with ``jax[tpu]``; where the tests' own lacks it, another one can be named."""

ATTENTION = """
    import re, sys, jax, jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
    from diffuse_jax.kernels import attention, target_platform
    from diffuse_jax.models.layers import Dense
    from diffuse_jax.sharding import make_mesh, param_shardings

    devices = topologies.get_topology_desc("v5e:2x4", "tpu").devices

    def compiled(sharding, batch, queries, keys, heads, depth, dtype, grad):
        shape = lambda n: jax.ShapeDtypeStruct((batch, n, heads, depth), dtype, sharding=sharding)
        f = lambda q, k, v: attention(q, k, v)
        if grad:
            f = jax.grad(lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))
        with target_platform("tpu"):
            lowered = jax.jit(f).trace(shape(queries), shape(keys), shape(keys)).lower(lowering_platforms=("tpu",))
        program = lowered.compile()
        return program.as_text().count("tpu_custom_call"), program.memory_analysis().temp_size_in_bytes

    one = SingleDeviceSharding(devices[0])
    for keys, depth, heads, dtype, flash in (
        (4096, 40, 8, jnp.bfloat16, True),    # SD 1.5, 64x64
        (77, 40, 8, jnp.bfloat16, False),     # text
        (4100, 64, 5, jnp.bfloat16, True),    # SD 2.x heads, a length to pad
        (2048, 160, 8, jnp.bfloat16, True),   # a head size to pad
        (4096, 512, 1, jnp.float32, True),    # autoencoder
    ):
        for grad in (False, True):
            calls, temporary = compiled(one, 2, keys if flash else 4096, keys, heads, depth, dtype, grad)
            print(keys, depth, dtype.__name__, "grad" if grad else "", calls, temporary >> 20, "MiB", flush=True)
            assert (calls > 0) == flash
            assert temporary < 1 << 30

    mesh = make_mesh(data=4, tensor=2, devices=devices)
    with jax.set_mesh(mesh):
        spread = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
        calls, temporary = compiled(spread, 8, 4096, 4096, 8, 64, jnp.bfloat16, True)
    print("8 devices", calls, temporary >> 20, "MiB", flush=True)
    assert calls > 0

    # A layer whose kernel is sharded in float32 and that computes in bfloat16: bfloat16 is transferred.
    mesh, layer = make_mesh(data=1, fsdp=8, devices=devices), Dense(512, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    params = jax.tree.map(place, shapes, param_shardings(shapes, mesh))
    loss = lambda p, x: jnp.square(layer.apply({"params": p}, x).astype(jnp.float32)).sum()
    with jax.set_mesh(mesh), target_platform("tpu"):
        program = jax.jit(jax.grad(loss)).trace(params, x).lower(lowering_platforms=("tpu",)).compile()
    moved = set(re.findall(r"= (\\w+\\[[\\d,]*\\])\\S* all-gather", program.as_text()))
    print("gathered", moved, flush=True)
    assert moved == {"bf16[256,512]"}
"""


RESIDUAL_BLOCK = """
    import re, jax, jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding
    from diffuse_jax.kernels import compiler_options, target_platform
    from diffuse_jax.models.resnet import ResnetBlock

    place = SingleDeviceSharding(topologies.get_topology_desc("v5e:2x4", "tpu").devices[0])
    block = ResnetBlock(640, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, 32, 32, 640), jnp.bfloat16)
    put = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
    params = put(jax.eval_shape(block.init, jax.random.key(0), x))

    def cycles(options):
        with target_platform("tpu"):
            traced = jax.jit(block.apply, compiler_options=options).trace(params, put(x))
            program = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
        return sum(map(int, re.findall(r'"estimated_cycles":"(\\d+)"', program.split("ENTRY")[1])))

    with target_platform("tpu"):
        options = compiler_options()
    ours, default = cycles(options), cycles(None)
    print(ours, default)
    assert 0 < ours < 0.8 * default
"""


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="needs libtpu (the tpu extra), here or in DIFFUSE_JAX_TPU_PYTHON")
@pytest.mark.parametrize("script", [ATTENTION, RESIDUAL_BLOCK], ids=["attention", "residual block"])
def test_it_compiles_for_tpus(script: str):
    quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": "", "PYTHONPATH": os.getcwd()}
    result = subprocess.run(
        [PYTHON, "-c", textwrap.dedent(script)], env=os.environ | quiet, capture_output=True, text=True, timeout=900
    )
    print(result.stdout)
    assert result.returncode == 0, result.stderr[-3000:]
