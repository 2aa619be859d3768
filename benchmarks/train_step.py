"""One training step of Stable Diffusion, from pixels and token ids: this library against PyTorch diffusers.

Both sides encode the images and the prompts, run the UNet, clip the gradient and update with AdamW, from the same
random weights, noise and timesteps. Each has its own process and they take turns; see ``common.py``::

    python benchmarks/train_step.py --method lora                  # SD 1.5 with LoRA, 256 pixels, float32; 8 GB
    python benchmarks/train_step.py --apart                        # all of SD 1.5's UNet; 18 GB
    python benchmarks/train_step.py --width 2                      # a UNet with half the channels; 12 GB
    python benchmarks/train_step.py --model sdxl --method lora --apart                           # 18 GB
    python benchmarks/train_step.py --device cuda --compile --batch 8 --pixels 512    # bfloat16, with torch.compile
    python benchmarks/train_step.py --trainers all --batch 4       # every script of train/; see trainer_steps.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.train_step

from common import compete, merged, table, write
from unet_step import weights

Run = Callable[[], np.ndarray]
RATE = 1e-5
ABOUT = (
    "One training step: encoding images and prompts, loss, gradient clipping, AdamW; in float32 on a CPU, on a GPU in "
    "bfloat16 with float32 parameters. `UNet` is its parameter count in millions (860 for SD 1.5, 2567 for SDXL). "
    "`images_per_second` is that of the fastest of interleaved runs, `ratio` the speed relative to PyTorch diffusers "
    "run eagerly, `cpu_ratio` the same by CPU time, `peak_gib` the peak memory of a step. `difference` is that of the "
    "first convolution's (or first LoRA pair's) gradient in the first step, in standard deviations. Rows named "
    "after a script of `train/` take its step with the networks of `model` (`one-level`: a UNet of one level with 64 "
    "channels); there `step_gib` is the peak of networks, optimiser and step without the process's code, "
    "`memory_ratio` relates it to PyTorch's, and the difference is that of the largest trained tensor's gradient."
)
COLUMNS = ("model", "trained", "batch", "pixels", "remat", "device", "side")
"""They tell the trainers' rows apart."""


def trainer_of(task: argparse.Namespace) -> Any:
    """The training step as shapes, from which both sides build their networks."""
    import jax.numpy as jnp
    from trainers import make_trainer

    dtype = jnp.float32 if task.device == "cpu" else jnp.bfloat16
    return make_trainer(task.model, task.method, dtype=dtype, remat=task.remat, rank=task.rank, width=task.width)


def batch_of(task: argparse.Namespace) -> dict[str, np.ndarray]:
    """Random images and token ids; SDXL's micro-conditioning is this size, without a crop."""
    from trainers import batch_shapes

    rng = np.random.default_rng(1)
    batch = {}
    for name, x in batch_shapes(task.model, task.batch, task.pixels).items():
        if name == "time_ids":
            batch[name] = np.tile(
                np.float32([task.pixels, task.pixels, 0, 0, task.pixels, task.pixels]), (x.shape[0], 1)
            )
        else:
            batch[name] = rng.integers(0, 256 if name == "pixel_values" else 49407, x.shape).astype(x.dtype)
    return batch


def pairs_of(trainer: Any) -> dict[tuple[str, ...], np.ndarray]:
    """LoRA pairs by path, the same on both sides; ``up`` is not zero, so that ``down`` has a gradient too."""
    from diffuse_jax.weights.names import flatten

    rng = np.random.default_rng(2)
    draw = lambda shape: (0.02 * rng.standard_normal(shape)).astype(np.float32)
    return {path: draw(leaf.shape) for path, leaf in flatten(trainer.trainable["unet"]).items()}


def ours(task: argparse.Namespace) -> Run:
    """The JAX side."""
    import jax
    import optax

    from diffuse_jax.training.optimizer import make_optimizer
    from diffuse_jax.training.state import init_state, make_step
    from diffuse_jax.weights.names import flatten, unflatten

    trainer = trainer_of(task)

    def parameters(name: str, shapes: Any) -> Any:
        flat, dtypes = weights(trainer.networks[name]), flatten(shapes)
        return unflatten({path: jax.device_put(flat.pop(path).astype(dtypes[path].dtype)) for path in list(flat)})

    frozen = {name: parameters(name, shapes) for name, shapes in trainer.frozen.items()}
    trained = unflatten(pairs_of(trainer)) if task.method == "lora" else parameters("unet", trainer.trainable["unet"])
    optimizer = make_optimizer("adamw", lambda _: RATE)
    state = init_state({"unet": trained}, optimizer, use_ema=False)
    del trained
    batch = jax.device_put({name: x[None] for name, x in batch_of(task).items()})
    step = make_step(trainer.loss, optimizer, seed=0).lower(state, frozen, batch).compile()

    def run() -> np.ndarray:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)
        moments = optax.tree.get(state.opt_state, "mu")["unet"]
        return np.asarray(flatten(moments)[watched(task, moments)], np.float32)

    return run


def watched(task: argparse.Namespace, trained: Any) -> tuple[str, ...]:
    """The parameter whose gradient is compared."""
    from diffuse_jax.weights.names import flatten

    return ("conv_in", "kernel") if task.method == "full" else min(p for p in flatten(trained) if p[-1] == "up")


def theirs(task: argparse.Namespace, compiled: bool = False) -> Run:
    """The PyTorch side: classes of diffusers and transformers, used as in diffusers' training scripts."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # for random numbers only
    import torch

    trainer = trainer_of(task)
    modules = torch_modules(task, trainer)
    unet = modules["unet"]
    inputs = {name: torch.from_numpy(x).to(task.device) for name, x in {**batch_of(task), **first_draw(task)}.items()}
    trained = [p for p in unet.parameters() if p.requires_grad]
    names = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=1e-2)
    forward = torch.compile(unet) if compiled else unet
    bfloat16 = torch.autocast(task.device, torch.bfloat16) if task.device != "cpu" else contextlib.nullcontext()

    def run() -> np.ndarray:
        with bfloat16:
            loss = torch_loss(modules, forward, inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        name = "conv_in.weight" if task.method == "full" else torch_pair(watched(task, trainer.trainable["unet"]))
        moment = optimizer.state[names[name]]["exp_avg"]
        axes = (2, 3, 1, 0) if moment.ndim == 4 else (1, 0)
        return moment.permute(axes).float().cpu().numpy()

    return run


def torch_modules(task: argparse.Namespace, trainer: Any) -> dict[str, Any]:
    """The networks by our names, with our weights; all but the trained parameters are frozen."""
    import diffusers
    import torch
    import transformers

    from diffuse_jax.weights.names import flatten, to_torch, torch_key

    modules = {}
    for name, network in trainer.networks.items():
        kind = type(network).__name__
        with torch.device("meta"):
            if name.startswith("text_encoder"):
                config = transformers.CLIPTextConfig(**network.config_json())
                module = getattr(transformers, kind)(config)
            else:
                module = getattr(diffusers, kind).from_config(network.config.to_json())
        flat, dtypes = weights(network), flatten(trainer.frozen.get(name, trainer.trainable.get(name)))
        state = {torch_key(p): torch.from_numpy(np.ascontiguousarray(to_torch(p, flat.pop(p)))) for p in list(flat)}
        known = set(module.state_dict())
        state = {key if key in known else key.removeprefix("text_model."): x for key, x in state.items()}
        missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
        if unexpected or [key for key in missing if not key.endswith("position_ids")]:
            raise ValueError(f"{name}: weights do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")
        for key, buffer in list(module.named_buffers()):
            if buffer.is_meta:  # position ids, which no file has
                owner, _, leaf = key.rpartition(".")
                setattr(module.get_submodule(owner), leaf, torch.arange(buffer.shape[-1])[None])
        half = task.device != "cpu" and next(iter(dtypes.values())).dtype != np.float32
        module = module.to(task.device, torch.bfloat16 if half else torch.float32)
        modules[name] = module.requires_grad_(name == "unet" and task.method == "full")
    if task.method == "lora":
        add_pairs(task, trainer, modules["unet"])
    modules["unet"].train()
    if task.remat != "none":
        modules["unet"].enable_gradient_checkpointing()
    return modules


def add_pairs(task: argparse.Namespace, trainer: Any, unet: Any) -> None:
    """LoRA by PEFT, as in diffusers' scripts, with our initial values."""
    import peft
    import torch

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=task.rank, lora_alpha=task.rank, target_modules=targets))
    parameters = dict(unet.named_parameters())
    for path, value in pairs_of(trainer).items():
        parameters[torch_pair(path)].data = torch.from_numpy(np.ascontiguousarray(value.T)).to(task.device)


def torch_pair(path: tuple[str, ...]) -> str:
    """PEFT's name for one half of a pair."""
    from diffuse_jax.weights.names import torch_key

    layer = torch_key((*path[:-1], "kernel")).removesuffix(".weight")
    return f"{layer}.lora_{'A' if path[-1] == 'down' else 'B'}.default.weight"


def first_draw(task: argparse.Namespace) -> dict[str, np.ndarray]:
    """Noise and timesteps of our first step."""
    import jax
    import jax.numpy as jnp
    from trainers import SCHEDULE

    from diffuse_jax.schedulers import DDPMScheduler
    from diffuse_jax.training.objective import Objective, draw

    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)
    k_latent, k_draw = jax.random.split(key)
    shape = (task.batch, task.pixels // 8, task.pixels // 8, 4)
    draws = draw(Objective(scheduler=DDPMScheduler(**SCHEDULE)), k_draw, jnp.zeros(shape))
    arrays = {"latent_noise": jax.random.normal(k_latent, shape), "noise": draws.noise, "t": draws.t}
    return {name: np.array(x) for name, x in arrays.items()}


def torch_loss(modules: dict[str, Any], unet: Any, inputs: dict[str, Any]) -> Any:
    """The forward pass of diffusers' training scripts."""
    import diffusers
    import torch
    from trainers import SCHEDULE

    scheduler = diffusers.DDPMScheduler(**SCHEDULE)
    first = lambda x: x.movedim(-1, 1)
    with torch.no_grad():
        vae = modules["vae"]
        pixels = first(inputs["pixel_values"]).to(vae.dtype) / 127.5 - 1
        with torch.autocast(pixels.device.type, enabled=False):
            posterior = vae.encode(pixels).latent_dist
        x0 = (posterior.mean + posterior.std * first(inputs["latent_noise"])) * vae.config.scaling_factor
        ids = inputs["text_encoder"].long()
        if "text_encoder_2" in modules:
            text = [modules[n](inputs[n].long(), output_hidden_states=True) for n in ("text_encoder", "text_encoder_2")]
            states = torch.cat([out.hidden_states[-2] for out in text], -1)
            added = {"text_embeds": text[1].text_embeds, "time_ids": inputs["time_ids"]}
        else:
            states, added = modules["text_encoder"](ids).last_hidden_state, None
        noise, t = first(inputs["noise"]), inputs["t"].long()
        x = scheduler.add_noise(x0, noise, t)
    prediction = unet(x, t, encoder_hidden_states=states, added_cond_kwargs=added).sample
    return torch.nn.functional.mse_loss(prediction.float(), noise.float())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=("sd15", "sdxl", "small"), default="sd15")
    add("--method", choices=("full", "lora"), default="full")
    add("--rank", type=int, default=4, help="LoRA rank")
    add("--width", type=int, default=1, help="divide the UNet's channels by this")
    add("--batch", type=int, default=1)
    add("--pixels", type=int, default=256, help="height and width of the images")
    add("--remat", choices=("none", "blocks", "full"), default="none", help="PyTorch only has gradient checkpointing")
    add("--rounds", type=int, default=5)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--compile", action="store_true", help="add torch.compile")
    add("--print-only", action="store_true", help="leave docs/results unchanged")
    add("--apart", action="store_true", help="one side in memory at a time; all rounds twice")
    add("--trainers", nargs="+", metavar="NAME", help="scripts of train/ (see TRAINERS in trainer_steps.py), or all")
    add("--source", default="one-level", help="folder or id of the Stable Diffusion whose sizes --trainers takes")
    add("--cores", type=int, default=0, help="processor cores that each side of --trainers has; all of them if 0")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    task = parse(argv)
    if task.trainers:
        os.environ["JAX_PLATFORMS"] = "cpu"
        from trainer_steps import rows as each

        for rows in each(task, figures):
            keep(task, rows, lambda old, rows=rows: merged(old, rows, *COLUMNS))
        return 0
    builds: dict[str, tuple[Any, ...]] = {"PyTorch": (theirs, task), "diffuse_jax": (ours, task)}
    if task.compile:
        builds["torch.compile"] = (theirs, task, True)
    measured = compete(builds, task.rounds, apart=task.apart)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    about = label(task)
    rows = [about | figures(task, row) for row in measured]
    keep(task, rows, lambda old: [row for row in old if about.items() - row.items()] + rows)
    return 0


def keep(task: argparse.Namespace, rows: list[dict[str, Any]], among: Callable[[list[Any]], list[Any]]) -> None:
    """Print the rows, and write them into the table, which ``among`` makes of its old rows."""
    for row in rows:
        print(json.dumps(row), file=sys.stderr)
    if not task.print_only:
        found = among(table("train_step"))
        print(write("train_step", "Training steps", ABOUT, found, "jax", "torch", "diffusers"))


def label(task: argparse.Namespace) -> dict[str, Any]:
    """The columns that identify these rows."""
    import jax

    unet = trainer_of(task).networks["unet"]
    millions = sum(leaf.size for leaf in jax.tree.leaves(unet.shapes())) / 1e6
    return {
        "model": task.model,
        "UNet": round(millions),
        "trained": "UNet" if task.method == "full" else f"LoRA, rank {task.rank}",
        "batch": task.batch,
        "pixels": task.pixels,
        "remat": task.remat,
        "device": task.device,
    }


def figures(task: argparse.Namespace, row: dict[str, Any]) -> dict[str, Any]:
    """Speeds instead of seconds; on a GPU also the MFU."""
    found = {
        "side": row["side"],
        "images_per_second": task.batch / row["seconds_min"],
        "ratio": round(1 / row["ratio_of_min"], 3),
        "ratio_of_median": round(1 / row["ratio_of_median"], 3),
        "cpu_ratio": round(1 / row["ratio_of_cpu_min"], 3),
        **({} if task.trainers else {"peak_gib": row["peak_gib"]}),
        "setup_seconds": row["setup_seconds"],
        "difference": row["difference"],
    }
    return found if task.device == "cpu" else found | {"MFU": utilisation(task, row["seconds_min"])}


def utilisation(task: argparse.Namespace, seconds: float) -> float | None:
    """Model FLOPs utilisation: the step's arithmetic without recomputation over the GPU's bfloat16 peak."""
    import jax
    import torch

    from diffuse_jax.training.flops import PEAK_FLOPS, count_flops
    from diffuse_jax.training.state import mean_gradient

    trainer, batch = trainer_of(task), {name: x[None] for name, x in batch_of(task).items()}
    gradient = lambda *shapes: mean_gradient(trainer.loss, *shapes, jax.random.key(0))
    work, kind = count_flops(gradient, trainer.trainable, trainer.frozen, batch), torch.cuda.get_device_name()
    peak = next((peak for start, peak in PEAK_FLOPS if kind.startswith(start)), None)
    return None if peak is None else work / seconds / peak


if __name__ == "__main__":
    raise SystemExit(main())
