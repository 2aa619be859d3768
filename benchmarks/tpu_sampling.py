"""How much memory of a TPU chip sampling takes on a mesh, from compiling it for a slice that need not be attached.

The denoising loop with guidance (Euler) and the decoder are compiled by libtpu on a CPU, for networks whose parameters
are sharded as a pipeline shards them; nothing is allocated. It answers whether a network that is larger than one chip
samples on several. A whole SDXL takes tens of minutes on one core; ``--layers`` compiles fewer transformer blocks::

    python benchmarks/tpu_sampling.py --model small --pixels 64            # a quick trial
    python benchmarks/tpu_sampling.py --mesh fsdp=8                        # SDXL, float32, one image, v5e:2x4
    python benchmarks/tpu_sampling.py --mesh fsdp=8 --layers 1
    python benchmarks/tpu_sampling.py --mesh fsdp=4,sequence=2
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.tpu_sampling

from hlo import collectives
from tpu_programs import GIB, needs, placed, refusal, slice_mesh
from trainers import MODELS

from diffuse_jax.kernels import compiler_options, target_platform
from diffuse_jax.mesh_axes import parse_axes
from diffuse_jax.models import AutoencoderKL, UNet2DConditionModel
from diffuse_jax.sharding import param_shardings


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    mesh = slice_mesh(args.topology, **{"data": 1} | parse_axes(args.mesh))
    row = vars(args) | measure(args, mesh)
    print(json.dumps(row))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=sorted(MODELS), default="sdxl")
    add("--mesh", default="fsdp=8", metavar="AXES", help="the mesh over the slice")
    add("--images", type=int, default=1, help="images per index of the data axis")
    add("--pixels", type=int, default=1024, help="height and width of the images")
    add("--dtype", default="float32")
    add("--steps", type=int, default=30)
    add("--layers", type=int, help="transformer blocks per attention, instead of the model's")
    add("--no-decode", dest="decode", action="store_false", help="without the decoder")
    add("--topology", default="v5e:2x4", help="type and shape of the slice")
    add("--effort", choices=("O0", "O1", "O2", "O3"), default="O1", help="compiler effort")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Compile the loop and read what it needs on one chip."""
    config, vae_config, _ = MODELS[args.model]
    if args.layers is not None:
        config = config.replace(
            transformer_layers_per_block=tuple(min(n, args.layers) for n in config.transformer_layers_per_block)
        )
    unet = UNet2DConditionModel(config, dtype=args.dtype, param_dtype=args.dtype)
    vae = AutoencoderKL(vae_config, dtype=args.dtype, param_dtype=args.dtype)
    shapes = {"unet": unet.shapes()} | ({"vae": vae.shapes()} if args.decode else {})
    rows, edge = mesh.shape["data"] * args.images, args.pixels // 8
    shape = lambda *n: jax.ShapeDtypeStruct(n, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    inputs = {"x": shape(rows, edge, edge, 4), "text": shape(rows, 2, 77, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs |= {"text_embeds": shape(rows, 2, pooled), "time_ids": shape(rows, 2, 6)}

    def sample(params: Any, inputs: Any) -> jax.Array:
        pairs = {name: x.reshape(-1, *x.shape[2:]) for name, x in inputs.items() if name != "x"}
        text = pairs.pop("text")

        def step(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
            both = jnp.repeat(x, 2, 0)
            prediction = unet.apply({"params": params["unet"]}, both, t, text, pairs or None)
            without, with_text = prediction[0::2], prediction[1::2]
            return x - 0.01 * (without + 5.0 * (with_text - without)), None

        x, _ = jax.lax.scan(step, inputs["x"], jnp.arange(args.steps, dtype=jnp.float32))
        return vae.apply({"params": params["vae"]}, x, method="decode") if args.decode else x

    whole, rows_spec = PartitionSpec(), PartitionSpec("data")
    run = jax.shard_map(
        sample, mesh=mesh, in_specs=(whole, rows_spec), out_specs=rows_spec, axis_names={"data"}, check_vma=False
    )
    params = placed(shapes, param_shardings(shapes, mesh))
    start = time.perf_counter()
    with target_platform("tpu"):
        program = jax.jit(run, compiler_options=compiler_options()).trace(params, inputs)
        lowered = program.lower(lowering_platforms=("tpu",))
    print(f"traced in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    jax.config.update("jax_optimization_level", args.effort)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) / GIB
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return refusal(str(error)) | {"parameters": size}
    found = Counter(kind for kind, _ in collectives(compiled.as_text()))
    return needs(compiled) | {
        "parameters": size,
        "collectives": dict(found),
        "compile_seconds": round(time.perf_counter() - start),
    }


if __name__ == "__main__":
    raise SystemExit(main())
