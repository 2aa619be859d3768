"""One UNet step, and one decoding by the autoencoder: this library against PyTorch diffusers.

Published architectures with random weights, the same on both sides, in float32 on a CPU (bfloat16 and the GPU with
``--device``). Each side has its own process and they take turns; see ``common.py``::

    python benchmarks/unet_step.py                       # SD 1.5 UNet, 2 x 64 x 64 latents; 8 GB of memory
    python benchmarks/unet_step.py --model vae           # the SD 1.5 decoder, one image of 512 pixels
    python benchmarks/unet_step.py --model sdxl --apart  # SDXL UNet, 2 x 64 x 64 latents; 13 GB (22 GB side by side)
    python benchmarks/unet_step.py --compile --stock     # also torch.compile, and JAX without our kernels
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.unet_step

from common import RESULTS, compete, write

Run = Callable[[], np.ndarray]


def network(name: str) -> Any:
    """This library's network; its config and shapes also describe the PyTorch side."""
    from diffuse_jax.models import AutoencoderKL, UNet2DConditionModel, presets

    if name == "vae":
        return AutoencoderKL(presets.SD_VAE)
    return UNet2DConditionModel({"sd15": presets.SD15_UNET, "sdxl": presets.SDXL_UNET}[name])


def weights(model: Any) -> dict[tuple[str, ...], np.ndarray]:
    """Random weights of unit gain: activations keep their scale, as in a trained network."""
    from diffuse_jax.weights.names import flatten

    rng = np.random.default_rng(0)

    def leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        if path[-1] in ("kernel", "embedding"):
            x = rng.standard_normal(shape, dtype=np.float32)
            x *= np.float32(np.prod(shape[:-1]) ** -0.5)
            return x
        return np.full(shape, path[-1] == "scale", np.float32)

    return {path: leaf(path, shape.shape) for path, shape in flatten(model.shapes()).items()}


def inputs(name: str, size: int, batch: int) -> dict[str, np.ndarray]:
    """Channel-last latents and conditioning."""
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    if name == "vae":
        return {"latents": normal(batch, size, size, 4)}
    arrays = {"sample": normal(batch, size, size, 4), "text": normal(batch, 77, 2048 if name == "sdxl" else 768)}
    if name == "sdxl":
        arrays |= {"text_embeds": normal(batch, 1280), "time_ids": np.full((batch, 6), 512, np.float32)}
    return arrays


def ours(name: str, size: int, batch: int, dtype: str, stock: bool = False) -> Run:
    """The JAX side; ``stock`` replaces our attention and convolution with those of JAX."""
    import jax

    if stock:
        import diffuse_jax.models.attention as attention_layers
        import diffuse_jax.models.autoencoder_kl as autoencoder
        import diffuse_jax.models.layers as layers
        from diffuse_jax.kernels.convolution import conv2d

        layers.conv2d = partial(conv2d, algorithm="direct")
        for module in (attention_layers, autoencoder):
            if hasattr(module, "attention"):
                module.attention = jax.nn.dot_product_attention
    from diffuse_jax.weights.names import unflatten

    model = network(name).clone(dtype=dtype)
    flat = weights(model)
    params = unflatten({path: jax.device_put(flat.pop(path).astype(dtype)) for path in list(flat)})
    arrays = jax.device_put(inputs(name, size, batch))

    def forward(params: Any, arrays: dict[str, Any]) -> Any:
        if name == "vae":
            return model.apply({"params": params}, arrays["latents"], method="decode")
        added = {k: arrays[k] for k in ("text_embeds", "time_ids") if k in arrays} or None
        return model.apply({"params": params}, arrays["sample"], 500, arrays["text"], added_cond_kwargs=added)

    program = jax.jit(forward).lower(params, arrays).compile()
    return lambda: np.asarray(program(params, arrays), np.float32)


def theirs(name: str, size: int, batch: int, dtype: str, device: str, compiled: bool = False) -> Run:
    """The PyTorch side: diffusers' own class, run eagerly or through ``torch.compile``."""
    import diffusers
    import torch

    from diffuse_jax.weights.names import to_torch, torch_key

    model = network(name)
    flat = weights(model)
    cls = diffusers.AutoencoderKL if name == "vae" else diffusers.UNet2DConditionModel
    with torch.device("meta"):
        module = cls.from_config(model.config.to_json()).eval()
    state = {}
    for path in list(flat):
        state[torch_key(path)] = torch.from_numpy(np.ascontiguousarray(to_torch(path, flat.pop(path))))
    missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
    if unexpected or any(not key.startswith(("encoder.", "quant_conv.")) for key in missing):
        raise ValueError(f"weights do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")
    del state
    module = module.to(device=device, dtype=getattr(torch, dtype))
    call = module.decode if name == "vae" else module
    if compiled:
        call = torch.compile(call)
    arrays = {k: torch.from_numpy(v).to(device, getattr(torch, dtype)) for k, v in inputs(name, size, batch).items()}

    def run() -> np.ndarray:
        with torch.inference_mode():
            if name == "vae":
                out = call(arrays["latents"].movedim(-1, 1)).sample
            else:
                added = {k: arrays[k] for k in ("text_embeds", "time_ids") if k in arrays} or None
                sample = arrays["sample"].movedim(-1, 1)
                out = call(sample, 500, encoder_hidden_states=arrays["text"], added_cond_kwargs=added).sample
        return out.movedim(1, -1).float().cpu().numpy()

    return run


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sd15", "sdxl", "vae"), default="sd15")
    parser.add_argument("--size", type=int, default=64, help="height and width of the latents")
    parser.add_argument("--batch", type=int, help="default 2, for vae 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="add torch.compile")
    parser.add_argument("--stock", action="store_true", help="add JAX with its own attention and convolution")
    parser.add_argument("--apart", action="store_true", help="one side in memory at a time; all rounds twice")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    batch = args.batch or (1 if args.model == "vae" else 2)
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    task = (args.model, args.size, batch, dtype)
    builds: dict[str, tuple[Any, ...]] = {"PyTorch": (theirs, *task, args.device), "diffuse_jax": (ours, *task)}
    if args.compile:
        builds["torch.compile"] = (theirs, *task, args.device, True)
    if args.stock:
        builds["JAX without our kernels"] = (ours, *task, True)
    label = {"model": args.model, "latents": f"{batch} x {args.size} x {args.size}", "device": args.device}
    rows = [label | {"dtype": dtype} | row for row in compete(builds, args.rounds, apart=args.apart)]
    for row in rows:
        print(json.dumps(row), file=sys.stderr)
    path = RESULTS / "unet_step.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    others = [row for row in before if label.items() - row.items()]
    about = (
        "One forward pass: seconds (fastest and median of interleaved runs, and CPU time of the fastest) with ratios "
        "to eager PyTorch diffusers; `difference` is the largest, of outputs scaled to unit variance; `setup_seconds` "
        "is the time to the first result, including random weights; `peak_gib` is the peak memory of a run, where "
        "it was measured."
    )
    print(write("unet_step", "UNet step and decoding", about, others + rows, "jax", "torch", "diffusers"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
