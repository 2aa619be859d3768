"""The difference between both twins' outputs for the same inputs.

Inputs are channel-last NumPy arrays; the PyTorch side transposes them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.models import ControlNetModel, UNet2DConditionModel, UNet2DModel
from tests.oracle.twins import Twin

torch = pytest.importorskip("torch")

TOLERANCE = 1e-4
"""Largest absolute difference that is accepted, of outputs scaled to unit variance."""

LENGTH = 20
"""Tokens of a text."""


def unet_inputs(model: UNet2DConditionModel | UNet2DModel, rng: np.random.Generator) -> dict[str, Any]:
    """Inputs for a batch of two, of the size that the config names; one for every condition it has."""
    c = model.config
    size = c.sample_size if isinstance(c.sample_size, tuple) else (c.sample_size, c.sample_size)
    inputs = {
        "sample": rng.standard_normal(
            (2, *size, c.in_channels if isinstance(model, UNet2DModel) else c.sample_channels)
        ).astype(np.float32),
        "timesteps": np.array([3, 701], np.int32),
    }
    if isinstance(model, UNet2DModel):
        return inputs | ({"class_labels": np.array([1, 9], np.int32)} if c.has_classes else {})
    inputs |= conditions(c, rng)
    if c.addition_embed_type != "text_time" and (shapes := model.added_shapes(*size)):
        inputs["added_cond_kwargs"] = {
            name: rng.standard_normal((2, *shape)).astype(np.float32) for name, shape in shapes.items()
        }
    return inputs


def controlnet_inputs(
    model: ControlNetModel, rng: np.random.Generator, size: tuple[int, int] = (8, 8)
) -> dict[str, Any]:
    """The same for a ControlNet and latents of a size, with control images of different colours."""
    c = model.config
    colour = rng.uniform(0, 1, (2, 1, 1, c.conditioning_channels))
    pixels = rng.uniform(0, 1, (2, size[0] * c.scale, size[1] * c.scale, c.conditioning_channels))
    inputs = {
        "sample": rng.standard_normal((2, *size, c.in_channels)).astype(np.float32),
        "timesteps": np.array([3, 701], np.int32),
        "controlnet_cond": ((colour + pixels) / 2).astype(np.float32),
    }
    return inputs | conditions(c, rng)


def conditions(c: Any, rng: np.random.Generator) -> dict[str, Any]:
    """Prompt embeddings and every other condition of a config, for a batch of two."""
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    inputs: dict[str, Any] = {"encoder_hidden_states": normal(2, 5, c.text_width)} if c.reads_text else {}
    if c.addition_embed_type == "text_time":
        count = (c.projection_class_embeddings_input_dim - 20) // c.addition_time_embed_dim
        ids = rng.integers(0, 1025, (2, count)).astype(np.float32)
        inputs["added_cond_kwargs"] = {"text_embeds": normal(2, 20), "time_ids": ids}
    if c.class_embed_type in ("projection", "simple_projection"):
        inputs["class_labels"] = normal(2, c.projection_class_embeddings_input_dim)
    elif c.num_class_embeds or c.class_embed_type == "timestep":
        inputs["class_labels"] = np.array([1, 9], np.int32)
    if c.time_cond_proj_dim:
        inputs["timestep_cond"] = normal(2, c.time_cond_proj_dim)
    return inputs


@functools.cache
def applied(model: Any) -> Any:
    """``(params, named inputs) -> output``, compiled once for each network and form of its inputs."""
    return jax.jit(lambda params, inputs: model.apply({"params": params}, **inputs))


def run_unet(model: UNet2DConditionModel | UNet2DModel, params: Any, inputs: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(applied(model)(params, dict(inputs)))


def run_torch_unet(module: Any, inputs: Mapping[str, Any]) -> np.ndarray:
    given = {k: v for k, v in to_torch(inputs).items() if k not in ("sample", "timesteps")}
    if "hint" in (added := given.get("added_cond_kwargs", {})):
        added["hint"] = channel_first(inputs["added_cond_kwargs"]["hint"])
    if hasattr(module, "encoder_hid_proj"):  # a UNet that reads images takes None for the prompt
        given.setdefault("encoder_hidden_states", None)
    with torch.no_grad():
        return channel_last(module(channel_first(inputs["sample"]), torch.tensor(inputs["timesteps"]), **given).sample)


def run_controlnet(model: ControlNetModel, params: Any, inputs: Mapping[str, Any]) -> list[np.ndarray]:
    """Every residual, the middle's last."""
    output = applied(model)(params, dict(inputs))
    return [np.asarray(residual) for residual in (*output.down_block_res_samples, output.mid_block_res_sample)]


def run_torch_controlnet(module: Any, inputs: Mapping[str, Any]) -> list[np.ndarray]:
    given = to_torch({k: v for k, v in inputs.items() if k not in ("sample", "timesteps", "controlnet_cond")})
    spatial = (channel_first(inputs[name]) for name in ("sample", "controlnet_cond"))
    with torch.no_grad():
        sample, images = spatial
        output = module(sample, torch.tensor(inputs["timesteps"]), controlnet_cond=images, **given)
    return [channel_last(residual) for residual in (*output.down_block_res_samples, output.mid_block_res_sample)]


def to_torch(tree: Any) -> Any:
    return jax.tree.map(torch.tensor, dict(tree))


def channel_first(x: np.ndarray) -> Any:
    return torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def channel_last(x: Any) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 1)


def difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference after scaling the reference to unit variance."""
    theirs = np.asarray(theirs, np.float64)
    ours = np.asarray(ours, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / theirs.std())


def compare_unet(twin: Twin, inputs: Mapping[str, Any]) -> dict[str, float]:
    """Output -> difference."""
    module, model, params = twin
    return {"output": difference(run_unet(model, params, inputs), run_torch_unet(module, inputs))}


def compare_controlnet(twin: Twin, inputs: Mapping[str, Any]) -> dict[str, float]:
    """Each residual -> difference."""
    module, model, params = twin
    ours, theirs = run_controlnet(model, params, inputs), run_torch_controlnet(module, inputs)
    assert len(ours) == len(theirs)
    names = [*(f"down {i}" for i in range(len(ours) - 1)), "middle"]
    return {name: difference(*pair) for name, *pair in zip(names, ours, theirs)}


def compare_t2i_adapter(twin: Twin, images: np.ndarray) -> dict[str, float]:
    """Each stage's features -> difference."""
    module, model, params = twin
    ours = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images)
    with torch.no_grad():
        theirs = module(channel_first(images))
    return {f"stage {i}": difference(a, channel_last(b)) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))}


def control_images(config: Any, rng: np.random.Generator, size: tuple[int, int] = (2, 3)) -> np.ndarray:
    """Two images in [0, 1] for an adapter, ``size`` positions of its coarsest features large."""
    height, width = (n * config.total_downscale_factor for n in size)
    return rng.uniform(0, 1, (2, height, width, config.in_channels)).astype(np.float32)


def compare_vae(twin: Twin, rng: np.random.Generator) -> dict[str, float]:
    """Each output -> difference, for images and for latents of odd sizes."""
    module, model, params = twin
    images = rng.uniform(-1, 1, (2, 24, 20, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 5, 6, model.config.latent_channels)).astype(np.float32)
    posterior = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))(params, images)
    decoded = jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))(params, latents)
    with torch.no_grad():
        theirs = module.encode(channel_first(images)).latent_dist
        pixels = module.decode(channel_first(latents)).sample
    return {
        "mean": difference(posterior.mean, channel_last(theirs.mean)),
        "logvar": difference(posterior.logvar, channel_last(theirs.logvar)),
        "divergence": float(np.abs(posterior.kl() / theirs.kl().numpy() - 1).max()),
        "image": difference(decoded, channel_last(pixels)),
    }


def compare_tiny(twin: Twin, rng: np.random.Generator) -> dict[str, float]:
    """Each output -> difference. Latents are spread over the range that is squashed and rounded to bytes."""
    module, model, params = twin
    images = rng.uniform(-1, 1, (2, 24, 20, 3)).astype(np.float32)
    latents = 3 * rng.standard_normal((2, 5, 6, model.config.latent_channels)).astype(np.float32)
    encoded = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))(params, images)
    decoded = jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))(params, latents)
    with torch.no_grad():
        theirs = channel_last(module.encode(channel_first(images)).latents)
        pixels = channel_last(module.decode(channel_first(latents)).sample)
        unit = module.scale_latents(torch.tensor(latents))
        back = module.unscale_latents(unit)
    return {
        "latents": difference(encoded.latents, theirs),
        "image": difference(decoded, pixels),
        "to unit": difference(model.to_unit(latents), unit),
        "from unit": difference(model.from_unit(unit.numpy()), back),
    }


def compare_asymmetric(twin: Twin, rng: np.random.Generator) -> dict[str, float]:
    """Each output -> difference, with and without a mask."""
    module, model, params = twin
    scale = model.config.scale
    images = rng.uniform(-1, 1, (2, 32, 24, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 32 // scale, 24 // scale, model.config.latent_channels)).astype(np.float32)
    mask = (rng.uniform(0, 1, (2, 32, 24, 1)) < 0.5).astype(np.float32)
    mask[1, :, :12] = 0.25  # a soft mask is allowed
    posterior = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))(params, images)
    decode = jax.jit(lambda p, *given: model.apply({"params": p}, *given, method="decode"))
    with torch.no_grad():
        theirs = module.encode(channel_first(images)).latent_dist
        given = [channel_first(x) for x in (latents, images, mask)]
        masked = module.decode(given[0], None, *given[1:]).sample
        plain = module.decode(given[0]).sample
    return {
        "mean": difference(posterior.mean, channel_last(theirs.mean)),
        "logvar": difference(posterior.logvar, channel_last(theirs.logvar)),
        "image": difference(decode(params, latents), channel_last(plain)),
        "masked image": difference(decode(params, latents, images, mask), channel_last(masked)),
    }


def compare_vq(twin: Twin, rng: np.random.Generator) -> dict[str, float]:
    """Latents, images of quantised latents and of codes as they are, and reconstructions."""
    module, model, params = twin
    c = model.config
    run = lambda method, x, *more: jax.jit(lambda p, x: model.apply({"params": p}, x, *more, method=method))(params, x)
    images = rng.uniform(-1, 1, (2, 12, 10, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 5, 6, c.code_channels)).astype(np.float32)
    codes = rng.integers(c.num_vq_embeddings, size=(2, 5, 6)) if c.lookup_from_codebook else latents
    with torch.no_grad():
        raw = torch.tensor(codes) if c.lookup_from_codebook else channel_first(latents)
        theirs = {
            "latents": module.encode(channel_first(images)).latents,
            "image": module.decode(channel_first(latents)).sample,
            "image of codes": module.decode(raw, force_not_quantize=True, shape=(*latents.shape,)).sample,
            "reconstruction": module(channel_first(images)).sample,
        }
    ours = {
        "latents": run("encode", images).mode(),
        "image": run("decode", latents),
        "image of codes": run("decode", codes, True),
        "reconstruction": run("__call__", images),
    }
    return {name: difference(ours[name], channel_last(theirs[name])) for name in theirs}


def compare_consistency_decoder(twin: Twin, rng: np.random.Generator) -> dict[str, float]:
    """Each output -> difference; PyTorch is given the noise of both steps instead of drawing it."""
    module, model, params = twin
    images = rng.uniform(-1, 1, (2, 24, 20, 3)).astype(np.float32)
    latents = (4 * rng.standard_normal((2, 4, 6, 4))).astype(np.float32)
    noise = rng.standard_normal((2, 2, 4 * model.config.scale, 6 * model.config.scale, 3)).astype(np.float32)
    posterior = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))(params, images)
    decode = jax.jit(lambda p, z, e: model.apply({"params": p}, z, noise=e, method="decode"))
    drawn = iter(map(channel_first, noise))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for place in ("models.autoencoders.consistency_decoder_vae", "schedulers.scheduling_consistency_decoder"):
            patch.setattr(f"diffusers.{place}.randn_tensor", lambda *_, **__: next(drawn))
        theirs = module.encode(channel_first(images)).latent_dist
        pixels = module.decode(channel_first(latents)).sample
    return {
        "mean": difference(posterior.mean, channel_last(theirs.mean)),
        "image": difference(decode(params, latents, noise), channel_last(pixels)),
    }


def token_ids(config: Any, rng: np.random.Generator) -> np.ndarray:
    """Three texts of different lengths, padded with the end token; by the old rule the largest id ends the text."""
    end = 98 if config.eos_token_id == 2 else config.eos_token_id
    ids = rng.integers(3, 96, (3, LENGTH)).astype(np.int32)
    if config.eos_token_id != 2:
        ids[:, 1] = 98  # a larger id before the end must not be taken for it
    for row, length in zip(ids, (4, 11, 19)):
        row[length:] = end
    return ids


def compare_text(twin: Twin, ids: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float]:
    """Each output -> difference; ``clip_skip`` is the state before the last layer through the final norm (SD 1.x)."""
    module, model, params = twin

    def encode(params: Any, ids: jax.Array, mask: jax.Array | None) -> tuple[Any, jax.Array]:
        output = model.apply({"params": params}, ids, mask)
        return output, model.apply({"params": params}, output.skipped(1), method="final_norm")

    ours, skipped = jax.jit(encode)(params, ids, mask)
    given = {} if mask is None else {"attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        theirs = module(torch.tensor(ids), output_hidden_states=True, **given)
        norm = getattr(module, "text_model", module).final_layer_norm
        reference = norm(theirs.hidden_states[-2])
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    assert (ours.text_embeds is None) == (not model.has_projection)
    pairs = {"last_hidden_state": (ours.last_hidden_state, theirs.last_hidden_state), "clip_skip": (skipped, reference)}
    for i in range(model.config.num_hidden_layers):  # the last is before the final norm here and after it there
        pairs[f"hidden_states[{i}]"] = (ours.hidden_states[i], theirs.hidden_states[i])
    if model.has_projection:
        pairs["text_embeds"] = (ours.text_embeds, theirs.text_embeds)
    else:
        pairs["pooled_output"] = (ours.pooled_output, theirs.pooler_output)
    return {name: difference(*pair) for name, pair in pairs.items()}


def vision_inputs(config: Any, rng: np.random.Generator) -> np.ndarray:
    """Three normalised images of the size that a vision encoder takes."""
    return rng.standard_normal((3, config.image_size, config.image_size, config.num_channels)).astype(np.float32)


def compare_vision(twin: Twin, rng: np.random.Generator) -> dict[str, float]:
    """Each output -> difference."""
    module, model, params = twin
    images = vision_inputs(model.config, rng)
    ours = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images)
    with torch.no_grad():
        theirs = module(channel_first(images), output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    pairs = {"last_hidden_state": (ours.last_hidden_state, theirs.last_hidden_state)}
    for i, states in enumerate(ours.hidden_states):
        pairs[f"hidden_states[{i}]"] = (states, theirs.hidden_states[i])
    if model.has_projection:
        pairs["image_embeds"] = (ours.image_embeds, theirs.image_embeds)
    else:
        pairs["pooler_output"] = (ours.pooler_output, theirs.pooler_output)
    return {name: difference(*pair) for name, pair in pairs.items()}


def compare_depth(twin: Twin, rng: np.random.Generator) -> dict[str, float]:
    """The depth -> difference."""
    module, model, params = twin
    images = vision_inputs(model.config, rng)
    ours = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images)
    with torch.no_grad():
        theirs = module(channel_first(images)).predicted_depth
    assert (theirs > 0).float().mean() > 0.3, "the last rectifier leaves little to compare"
    return {"depth": difference(ours, theirs)}
