"""One training step of DeepFloyd IF, Kandinsky 2.2 and Würstchen with PyTorch's modules, from the definitions of their
losses, with our random numbers and arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.sharding import make_mesh
from diffuse_jax.torch_backend import training
from diffuse_jax.torch_backend.training import Trained, Update, step_noise
from diffuse_jax.torch_backend.training_report import TOLERANCES, Compared, compare_updates
from diffuse_jax.training.cached import arrays_of
from diffuse_jax.training.data import Example
from diffuse_jax.training.families.inpainting import random_masks
from diffuse_jax.training.latent import loss_of, open_pipeline
from diffuse_jax.training.objective import Objective

twin = pytest.importorskip("diffuse_jax.torch_backend.training_torch", reason="needs PyTorch diffusers, transformers")
torch = pytest.importorskip("torch")

from diffuse_jax.torch_backend.networks import channels_first, channels_last, to_torch  # noqa: E402

PROMPTS = ["A cat ", "two dogs", "", "bad"]
SEED = 0


def opened(folder: Path, names: tuple[str, ...], **options: Any) -> Any:
    """Our pipeline, as a trainer opens it."""
    return open_pipeline(folder, trainable=names, mesh=make_mesh(devices=jax.devices()[:1]), **options)


def batch_of(
    pipe: Any, edge: int, rng: np.random.Generator, prior: bool = False, masked: bool = False
) -> dict[str, np.ndarray]:
    """Images and captions, as the data workers make them; ``masked``: the first image counts in its left half alone."""
    size = (edge, edge)
    images = rng.integers(0, 256, (len(PROMPTS), edge, edge, 3), np.uint8)
    rows = [Example(x, text, size, (0, 0), size, i, 0, "") for i, (x, text) in enumerate(zip(images, PROMPTS))]
    made = dict(training.batch_of(pipe, rows))
    if masked:
        left = np.zeros(size, np.uint8)
        left[:, : edge // 2] = 255
        make = arrays_of(pipe, True, True)["loss_mask"]
        made["loss_mask"] = np.stack([make(dataclasses.replace(rows[0], mask=left)), *map(make, rows[1:])])
    return made | ({"prior": np.array([False, True] * 2)} if prior else {})


def begin_key() -> jax.Array:
    """The key of what a family draws before the noise and the timesteps of the first step."""
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 0), 0))[0]


class Step(NamedTuple):
    """A step on both sides: all that is compared, and relative differences of the loss and of the parameters after it
    (the median)."""

    compared: Compared
    loss: float
    parameters: float


def compare(
    pipe: Any,
    trained: Trained,
    batch: Mapping[str, np.ndarray],
    objective: Objective,
    parameters: dict[str, Any],
    loss: Callable[[], Any],
    class_labels: str | None = None,
) -> Step:
    """The step on both sides, in which the same parameters are trained."""
    if class_labels is None:
        ours = training.our_step(pipe, trained, objective, batch, SEED)
    else:
        ours = training.step_of(loss_of(pipe, trained.combine, objective, class_labels), trained, batch, SEED)
    before = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    theirs: Update = twin.torch_step(parameters, loss)
    known = theirs._replace(values={name: x for name, x in theirs.values.items() if name in ours.values})
    compared = compare_updates(ours, known, TOLERANCES["float32"])
    assert {*theirs.gradients} == {*ours.gradients}, "the same parameters are trained"
    wanted = float(theirs.values["loss"])
    moved = [np.linalg.norm(ours.changes[n] - theirs.changes[n]) / np.linalg.norm(before[n]) for n in theirs.changes]
    return Step(compared, abs(float(ours.values["loss"]) - wanted) / wanted, float(np.median(moved)))


def text_states(pipe: Any, batch: Mapping[str, np.ndarray]) -> Any:
    """The last states of the text encoder, whose padding is hidden."""
    ids, mask = (
        torch.tensor(np.asarray(batch[name]), dtype=torch.long) for name in ("text_encoder", "text_encoder_mask")
    )
    return pipe.text_encoder(ids, attention_mask=mask)


def pixels_in(batch: Mapping[str, np.ndarray]) -> Any:
    """Channel-last pixels in [-1, 1]."""
    return torch.tensor(batch["pixel_values"]).float() / 127.5 - 1


def if_loss(pipe: Any, objective: Objective, batch: Mapping[str, np.ndarray], class_labels: str | None = None) -> Any:
    """Noise of pixels; the second stage also sees the small image, or as in diffusers' script the noisy one again."""
    x0 = pixels_in(batch)
    _, drawn = step_noise(objective, SEED, tuple(x0.shape))
    with torch.no_grad():
        states = text_states(pipe, batch).last_hidden_state
    large = pipe.unet.config.in_channels == 6
    if large and class_labels is None:
        k_level, k_noise = jax.random.split(begin_key())
        level = torch.tensor(np.array(jax.random.randint(k_level, (len(x0),), 0, 1000, jnp.int32))).long()
        noise = to_torch(np.asarray(jax.random.normal(k_noise, tuple(x0.shape), jnp.float32)), "cpu")
        small = torch.nn.functional.avg_pool2d(channels_first(x0), 2)
        big = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear", align_corners=True)
        beside = pipe.image_noising_scheduler.add_noise(big, channels_first(noise), level)

    def predict(x: Any, t: Any) -> Any:
        x, more = channels_first(x), {}
        if large:
            more = {"class_labels": t if class_labels else level}
            x = torch.cat([x, x if class_labels else beside], 1)
        return channels_last(pipe.unet(x, t, states, **more).sample[:, :3])

    return twin.loss_at(pipe.scheduler, objective, x0, drawn, predict, batch.get("prior"), batch.get("loss_mask"))


def decoder_loss(pipe: Any, encoder: Any, objective: Objective, batch: Mapping[str, np.ndarray]) -> Any:
    """Noise of MoVQ's latents, from the embedding of the same image."""
    with torch.no_grad():
        x0 = channels_last(pipe.movq.encode(channels_first(pixels_in(batch))).latents)
        embeds = encoder(channels_first(torch.tensor(batch["image_pixels"]))).image_embeds
    _, drawn = step_noise(objective, SEED, tuple(x0.shape))

    def predict(x: Any, t: Any) -> Any:
        added = {"image_embeds": embeds}
        found = pipe.unet(channels_first(x), t, encoder_hidden_states=None, added_cond_kwargs=added).sample
        return channels_last(found[:, : x.shape[-1]])

    return twin.loss_at(pipe.scheduler, objective, x0, drawn, predict, batch.get("prior"), batch.get("loss_mask"))


def inpainting_loss(pipe: Any, objective: Objective, batch: Mapping[str, np.ndarray]) -> Any:
    """Noise of latents, beside a mask and the latents of the image that is grey inside it."""
    pixels = channels_first(pixels_in(batch))
    keys = jax.random.split(begin_key(), 3)
    mask = np.asarray(random_masks(keys[1], len(pixels), *pixels.shape[2:]))
    assert 0 < mask.mean() < 1
    mask = channels_first(torch.tensor(mask))

    def latents(images: Any, key: jax.Array) -> Any:
        with torch.no_grad():
            found = pipe.vae.encode(images).latent_dist
        count, channels, height, width = found.mean.shape
        noise = to_torch(np.asarray(jax.random.normal(key, (count, height, width, channels), jnp.float32)), "cpu")
        return (found.mean + found.std * channels_first(noise)) * pipe.vae.config.scaling_factor

    x0, around = latents(pixels, keys[0]), latents(pixels * (mask < 0.5), keys[2])
    small = torch.nn.functional.interpolate(mask, size=x0.shape[2:])
    x0 = channels_last(x0)
    _, drawn = step_noise(objective, SEED, tuple(x0.shape))
    with torch.no_grad():
        states = pipe.text_encoder(torch.tensor(np.asarray(batch["text_encoder"])).long()).last_hidden_state

    def predict(x: Any, t: Any) -> Any:
        return channels_last(pipe.unet(torch.cat([channels_first(x), small, around], 1), t, states).sample)

    scheduler = twin.diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    return twin.loss_at(scheduler, objective, x0, drawn, predict, batch.get("prior"), batch.get("loss_mask"))


def prior_loss(pipe: Any, objective: Objective, batch: Mapping[str, np.ndarray]) -> Any:
    """Normalised embeddings of images, from noisy ones and captions."""
    ids, mask = (torch.tensor(np.asarray(batch[name])) for name in ("text_encoder", "text_encoder_mask"))
    with torch.no_grad():
        text = pipe.text_encoder(ids.long())
        embeds = pipe.image_encoder(channels_first(torch.tensor(batch["image_pixels"]))).image_embeds
        x0 = (embeds - pipe.prior.clip_mean) / pipe.prior.clip_std
    _, drawn = step_noise(objective, SEED, tuple(x0.shape))
    schedule = twin.diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    whole = lambda x: x[:, None, None]

    def predict(x: Any, t: Any) -> Any:
        found = pipe.prior(x[:, 0, 0], t, text.text_embeds, text.last_hidden_state, mask)
        return whole(found.predicted_image_embedding)

    flat = drawn._replace(noise=np.asarray(drawn.noise)[:, None, None])
    computed = twin.loss_at(schedule, objective, whole(x0), flat, predict, batch.get("prior"))
    return computed._replace(values={name: x[:, 0, 0] if x.ndim else x for name, x in computed.values.items()})


def semantic_loss(pipe: Any, encoder: Any, objective: Objective, batch: Mapping[str, np.ndarray]) -> Any:
    """Noise of semantic maps, in continuous time."""
    unit = channels_first(torch.tensor(batch["pixel_values"]).float() / 255)
    each = lambda *values: torch.tensor(values).reshape(1, 3, 1, 1)
    with torch.no_grad():
        states = text_states(pipe, batch).last_hidden_state
        maps = (encoder((unit - each(0.485, 0.456, 0.406)) / each(0.229, 0.224, 0.225)) + 1) / 42
    x0 = channels_last(maps)
    weight = torch.tensor(batch.get("loss_mask", np.ones(x0.shape[:3], np.float32)))[..., None]
    _, drawn = step_noise(objective, SEED, tuple(x0.shape))
    noise, t = to_torch(drawn.noise, "cpu"), torch.tensor(np.asarray(drawn.t))
    assert t.dtype == torch.float32
    x = twin.diffusers.DDPMWuerstchenScheduler().add_noise(maps, channels_first(noise), t)
    prediction = channels_last(pipe.prior(x, t, states))
    mse = ((prediction - noise).square() * weight / weight.mean((1, 2, 3), keepdim=True)).mean()
    return twin.LossAndValues(mse, {"noised latents": channels_last(x), "prediction": prediction, "mse": mse})
