"""Which objective, batch size and shape of the UNet learn most of the emoji in the same processor time.

Every choice differs from the first in the respect that its line names. Its UNet and text encoder begin from fresh
weights and are trained on the shipped autoencoder's latents until they have used ``--seconds`` of processor time;
compiling does not count. The time is that of all cores together, so keep the process on one::

    taskset -c 0 python -m benchmarks.emoji_choices                      # an hour and a half
    taskset -c 0 python -m benchmarks.emoji_choices shipped --seed 1     # only this one; the other rows stay

Requires the data set (``python train/emoji/make_dataset.py --output_dir runs/emoji/data``).

All are judged by the same errors: of the velocity (Salimans and Ho 2022), at uniform timesteps of the shipped model's
schedule, for the same images, captions and noise. This is what the first choice minimises, and no measure of image
quality. For flow matching, ``z = (1 - r) x0 + r noise`` with the same signal-to-noise ratio is the shipped model's
``x = a x0 + s noise`` divided by ``a + s``. Both predictions are linear in the clean sample and the input, so that the
error of the velocity is that of the flow divided by ``a + s``.

The learning rate is the same for all. Images are drawn with replacement, a tenth of the captions is left out, and the
weights are evaluated as they are at the end, without a moving average.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks.common import RESULTS, merged, table, write
from benchmarks.emoji_judge import Array, Data, load_data
from benchmarks.emoji_loss import draws
from benchmarks.emoji_retrieval import in_batches
from diffuse_jax import FlowMatchEulerDiscreteScheduler
from diffuse_jax.bounds import COUNT, SEED, number
from diffuse_jax.models.unet_2d_condition import UNet2DConditionModel
from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.families import TrainedFamily, tokens_of, trained_family
from diffuse_jax.training.initial import initial_params
from diffuse_jax.training.latent import loss_of, networks, open_pipeline, whole
from diffuse_jax.training.objective import Draw, Objective, noised, per_sample_error, target
from diffuse_jax.training.optimizer import learning_rate, make_optimizer
from diffuse_jax.training.times import LogitNormalTimes, UniformTimes

MODEL = "diffuse-jax/emoji"
TRAINED = ("unet", "text_encoder")
EMPTY = 0.1
"""How often a caption is left out."""
PARTS = 1000
"""The learning rate depends on the processor time used, in this many parts."""
IMAGES = 256
"""Of each split, in the evaluation."""
FLOW = FlowMatchEulerDiscreteScheduler(shift=1.0)
"""The schedule of flow matching, in training and in the evaluation."""
BANDS = {"low noise": (0, 333), "medium noise": (333, 667), "high noise": (667, 1000)}
"""Timesteps of the shipped model's schedule."""

SHORTEST = 30
"""Seconds; about 15 training steps."""

COLUMNS = ("choice", "seed", "budget")
"""What tells the rows of the result apart."""

ABOUT = (
    "Mean squared error of the velocity, for 256 training pairs and 256 held-out ones with four draws of noise each, "
    "and of the held-out ones in thirds of the timesteps. Every run begins from fresh weights and has `budget` seconds "
    "of processor time; `seed` is that of the weights, batches and noise of training. Learning rate 1e-3 after a "
    "warm-up, falling to zero in the last third; Muon, where nothing else is said."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What is trained, and how.

    Attributes:
      about: for the table.
      unet: fields of the UNet's configuration that differ from the shipped one's.
      times: of flow matching; None for the velocity of the shipped model's schedule.
      snr_gamma, batch, optimizer: as in ``train/text_to_image.py``.
    """

    about: str
    unet: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    times: UniformTimes | None = None
    snr_gamma: float | None = None
    batch: int = 64
    optimizer: str = "muon"


TWO_LEVELS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (80, 144),
    "num_attention_heads": (3, 6),
}
NARROW = {"block_out_channels": (32, 96, 160), "num_attention_heads": (2, 4, 5)}
EVERYWHERE = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}
MIDDLE = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}

CHOICES = {
    "shipped": Choice(about="as shipped: velocity, 64 images, three levels, attention at 8x8 and in the middle"),
    "adamw": Choice(about="AdamW", optimizer="adamw"),
    "min_snr": Choice(about="Min-SNR weights, gamma 5", snr_gamma=5.0),
    "flow": Choice(about="flow matching, logit-normal times", times=LogitNormalTimes()),
    "batch_32": Choice(about="batches of 32 images", batch=32),
    "batch_128": Choice(about="batches of 128 images", batch=128),
    "two_levels": Choice(about="two levels, wider at 16x16 (80, 144 channels)", unet=TWO_LEVELS),
    "narrow": Choice(about="narrower at 16x16, wider below (32, 96, 160)", unet=NARROW),
    "everywhere": Choice(about="attention at all three levels", unet=EVERYWHERE),
    "middle": Choice(about="attention in the middle alone", unet=MIDDLE),
}


def main() -> None:
    args = parse_args()
    data, pipe = load_data(args.data_dir), open_pipeline(MODEL, trainable=(), mesh=make_mesh())
    latents, tokens = moments_of(pipe, data), caption_tokens(pipe, data)
    for name in args.choices:
        choice = CHOICES[name]
        model = fresh(pipe, choice, args.seed)
        params, run = train(model, choice, data, latents, tokens, args)
        row = {"choice": name, "about": choice.about, "seed": args.seed, "budget": args.seconds} | run
        row |= evaluated(model, params, choice, pipe.scheduler, data, latents, tokens)
        print(json.dumps(row), flush=True)
        rows = merged(table("emoji_choices", args.output_folder), [row], *COLUMNS)
        title = "What to train, in equal processor time"
        write("emoji_choices", title, ABOUT, rows, "jax", folder=args.output_folder)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("choices", nargs="*", help=f"some of {', '.join(CHOICES)} (default: all)")
    parser.add_argument("--seconds", type=number(COUNT), default=400, help="of processor time for each (default 400)")
    parser.add_argument("--data_dir", type=Path, default=Path("runs/emoji/data"), help="what make_dataset.py wrote")
    parser.add_argument("--seed", type=number(SEED), default=0, help="of weights, batches and noise (default 0)")
    parser.add_argument("--output_folder", type=Path, default=RESULTS, help="of emoji_choices.json")
    args = parser.parse_args()
    if unknown := [name for name in args.choices if name not in CHOICES]:
        parser.error(f"unknown choices {unknown}; expected some of {', '.join(CHOICES)}")
    if args.seconds < SHORTEST:
        parser.error(f"--seconds {args.seconds}: must be at least {SHORTEST}")
    args.choices = list(dict.fromkeys(args.choices or CHOICES))
    return args


def fresh(pipe: Any, choice: Choice, seed: int) -> Any:
    """The pipeline with an untrained UNet of the choice's shape and an untrained text encoder, and its scheduler."""
    unet = UNet2DConditionModel(pipe.components["unet"].config.replace(**choice.unet))
    components = {**pipe.components, "unet": unet}
    if choice.times:
        components["scheduler"] = FLOW
    new = {name: initial_params(components[name], seed + place) for place, name in enumerate(TRAINED)}
    return dataclasses.replace(pipe, components=components, params={**pipe.params, **new})


def objective_of(choice: Choice, scheduler: Any) -> Objective:
    return Objective(scheduler=scheduler, snr_gamma=choice.snr_gamma, times=choice.times)


def moments_of(pipe: Any, data: Data) -> Array:
    """Mean and log variance of the latents of all images, float32 ``[N,h,w,2c]``."""
    family, models = trained_family(pipe), networks(pipe)

    @jax.jit
    def run(params: Any, pixels: jax.Array) -> jax.Array:
        return family.encode_images(models, {"vae": params}, {"pixel_values": pixels})["moments"]

    encoded = lambda numbers: np.asarray(run(pipe.params["vae"], data.images[numbers]))
    return in_batches(encoded, np.arange(len(data.images)), 100, "latents")


def caption_tokens(pipe: Any, data: Data) -> Callable[[str], Array]:
    """Token ids of a caption, int ``[L]``, each made once."""
    words = trained_family(pipe).words(pipe)
    return functools.cache(lambda caption: np.asarray(tokens_of(words, caption)["text_encoder"]))


def train(
    model: Any, choice: Choice, data: Data, latents: Array, tokens: Callable[[str], Array], args: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """Train for ``args.seconds`` of processor time; the parameters and what the table says of the run."""
    loss = loss_of(model, whole(networks(model)), objective_of(choice, model.components["scheduler"]))
    rate = learning_rate("warmup_stable_decay", 1e-3, PARTS // 20, PARTS)
    optimizer = make_optimizer(choice.optimizer, optax.constant_schedule(1.0), beta2=0.99)
    frozen = {"vae": model.params["vae"]}

    def step(params: Any, state: Any, batch: Any, key: jax.Array, part: jax.Array) -> Any:
        gradient, _ = jax.grad(loss, has_aux=True)(params, frozen, batch, key)
        updates, state = optimizer.update(gradient, state, params)
        # The rate follows the processor time used; a schedule inside of the optimizer would follow the steps.
        return optax.apply_updates(params, jax.tree.map(lambda x: x * rate(part), updates)), state

    rng, count = np.random.default_rng(args.seed), int((~data.held).sum())

    def batch() -> dict[str, Array]:
        chosen = rng.integers(count, size=choice.batch)
        texts = [data.records[i]["text"] for i in chosen]
        captions = ["" if rng.random() < EMPTY else text[rng.integers(len(text))] for text in texts]
        return {"moments": latents[chosen], "text_encoder": np.stack([tokens(caption) for caption in captions])}

    params = {name: jax.tree.map(jnp.array, model.params[name]) for name in TRAINED}
    state, key = optimizer.init(params), jax.random.key(args.seed)
    run = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch(), key, jnp.int32(0)).compile()
    begun, wall, steps, used = time.process_time(), time.perf_counter(), 0, 0.0
    with tqdm(total=args.seconds, desc=choice.about, disable=None) as bar:
        while used < args.seconds:
            part = jnp.int32(used / args.seconds * PARTS)
            params, state = run(params, state, batch(), jax.random.fold_in(key, steps), part)
            jax.block_until_ready(params)
            steps += 1
            now = time.process_time() - begun
            bar.update(now - used)
            used = now
    size = sum(leaf.size for leaf in jax.tree.leaves(params["unet"]))
    return params, {
        "unet_parameters": size,
        "steps": steps,
        "cpu_seconds": round(used, 1),
        "seconds": round(time.perf_counter() - wall, 1),
    }


def evaluated(
    model: Any,
    params: Any,
    choice: Choice,
    shipped: Any,
    data: Data,
    latents: Array,
    tokens: Callable[[str], Array],
) -> dict[str, float]:
    """Mean errors of the velocity, for all timesteps of each split, and for the held-out pairs in bands of noise."""
    family, models = trained_family(model), networks(model)
    run = jax.jit(lambda *args: velocity_errors(family, models, shipped, choice, *args))
    everything = {**model.params, **params}
    errors: dict[str, tuple[Array, Array]] = {}
    for split, held in (("training", False), ("held-out", True)):
        chosen = data.choose(held, IMAGES, 0)
        ids = np.stack([tokens(data.caption(i)) for i in chosen])
        found = [
            run(everything, {"moments": latents[chosen[part]], "text_encoder": ids[part]}, key)
            for part, key in draws(len(chosen), 0)
        ]
        t, error = (np.concatenate([np.asarray(each[place]) for each in found]) for place in (0, 1))
        errors[split] = t, error
    t, error = errors["held-out"]
    bands = {name: error[(t >= low) & (t < high)] for name, (low, high) in BANDS.items()}
    means = {split: error for split, (_, error) in errors.items()} | bands
    return {name: round(float(error.mean()), 4) for name, error in means.items()}


def velocity_errors(
    family: TrainedFamily,
    models: Mapping[str, Any],
    shipped: Any,
    choice: Choice,
    params: Any,
    batch: Any,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Timesteps ``[B]`` of the shipped schedule, uniform, and the squared errors of the velocity there, ``[B]``."""
    k_begin, k_noise, k_time = jax.random.split(key, 3)
    x0, given = family.begin(models, params, family.encoded(models, params, batch), k_begin)
    t = jax.random.randint(k_time, x0.shape[:1], 0, shipped.num_train_timesteps)
    scheduler, at, scale = shipped, t, jnp.ones(t.shape)
    if choice.times:
        scheduler = FLOW
        signal = jnp.sqrt(jnp.asarray(shipped.alpha_bar, jnp.float32))[t]
        noise = jnp.sqrt(1 - jnp.square(signal))
        scale = signal + noise
        at = noise / scale * scheduler.num_train_timesteps
    objective = objective_of(choice, scheduler)
    drawn = Draw(jax.random.normal(k_noise, x0.shape, jnp.float32), None, at)
    prediction = family.predict(models, params, given, noised(objective, x0, drawn), at)
    wanted = target(scheduler, x0, drawn.noise, at)
    return t, per_sample_error(prediction, wanted) / jnp.square(scale)


if __name__ == "__main__":
    main()
