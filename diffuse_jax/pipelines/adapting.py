"""Adapters and new words applied to a pipeline: its components, its parameters and its requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffuse_jax.adapters import custom_diffusion, tokens
from diffuse_jax.adapters.custom_diffusion import read_leaves
from diffuse_jax.adapters.lora_file import read_adapter, torch_shape
from diffuse_jax.adapters.merging import KERNEL, difference, merged
from diffuse_jax.adapters.named import Adapters, by_layer, checked, live_params
from diffuse_jax.models import Model, Params
from diffuse_jax.models.image_attention import check_fits
from diffuse_jax.pipelines.inputs import one_per_image
from diffuse_jax.pipelines.parts.adapted import LORA, SCALE, adapted, adapted_method
from diffuse_jax.weights.names import flatten, unflatten


def with_lora(pipe: Any, source: str | Path, scale: float, **options: Any) -> dict[str, Any]:
    """The networks that a LoRA file targets, with its weights merged; see ``DiffusionPipeline.load_lora_weights``."""
    scale = checked(scale)
    adapter = read_adapter(source, adaptable(pipe), **options)
    return {
        name: (pipe.components[name], merged(pipe.params[name], changes, scale)) for name, changes in adapter.items()
    }


def adaptable(pipe: Any) -> dict[str, Params]:
    """The shapes of the networks of a pipeline that adapters can change: UNet or prior, text encoders, a single
    ControlNet."""
    names = [name for name in pipe.params if name in ("unet", "prior", "controlnet") or name.startswith("text_encoder")]
    return {name: pipe.components[name].shapes() for name in names if isinstance(pipe.components[name], Model)}


def with_adapters(pipe: Any, adapters: Adapters, params: Mapping[str, Params] | None = None) -> Any:
    """The pipeline with these live adapters, whose arrays become part of its parameters."""
    own = {name: tree for name, tree in (pipe.params if params is None else params).items() if name != LORA}
    trees = live_params(adapters, own)
    return dataclasses.replace(pipe, params=own | ({LORA: trees} if trees else {}), adapters=adapters)


def refreshed(pipe: Any, before: Mapping[str, Params]) -> Any:
    """A pipeline after some of its networks were replaced, its adapters made for the new ones.

    Args:
      pipe: the pipeline.
      before: the parameters that it had.

    Raises:
      ValueError: an adapter does not fit a network, or was fused into a network that was replaced.
    """
    for net in pipe.image_adapters.nets:
        check_fits(net.config, pipe.components["unet"].config)
    adapters = pipe.adapters
    replaced = {
        name for name in {*adapters.slots, *adapters.originals} if pipe.params.get(name) is not before.get(name)
    }
    if not replaced:
        return pipe
    for network in replaced:
        new = flatten(pipe.params.get(network, {}))
        for path, slot in adapters.slots.get(network, {}).items():
            kernel, changes = new.get((*path, KERNEL)), [a[network][path] for a in adapters.named.values()
                                                         if path in a.get(network, {})]  # fmt: skip
            if slot and (kernel is None or any(torch_shape(kernel.shape) != change.shape for change in changes)):
                raise ValueError(
                    f"the live adapters do not fit the new {network}, at {'/'.join(path)}; unload_lora_weights first"
                )
        old = flatten(before.get(network, {}))
        if any(new.get((*path, KERNEL)) is not old[(*path, KERNEL)] for path in adapters.originals.get(network, {})):
            raise ValueError(f"{network} has fused adapters; call unfuse_lora or unload_lora_weights first")
    return with_adapters(pipe, adapters)


def fused(pipe: Any, scale: float, names: str | Sequence[str] | None, safe: bool) -> Any:
    """See ``DiffusionPipeline.fuse_lora``."""
    adapters, scale = pipe.adapters, checked(scale)
    names = [*adapters.weights] if names is None else [names] if isinstance(names, str) else [*names]
    adapters.check(names)
    if not names:
        raise ValueError("there is no active adapter to fuse; load one with load_lora_weights(..., adapter_name=...)")
    if again := [name for name in names if name in adapters.fused]:
        raise ValueError(f"{', '.join(again)} is fused already; call unfuse_lora first")
    weights = {name: adapters.weights.get(name, 1.0) for name in names}
    changes = by_layer(dataclasses.replace(adapters, weights=weights, enabled=True))
    params, originals = dict(pipe.params), {name: dict(table) for name, table in adapters.originals.items()}
    for network, layers in changes.items():
        flat, kept = flatten(params[network]), originals.setdefault(network, {})
        for path, found in layers.items():
            kept.setdefault(path, flat[(*path, KERNEL)])
            flat |= {(*path, KERNEL): kernel_with(flat[(*path, KERNEL)], found, scale)}
            if safe and not bool(jnp.isfinite(flat[(*path, KERNEL)]).all()):
                raise ValueError(f"fusing makes {network}/{'/'.join(path)} NaN or infinite; the pipeline is unchanged")
        params[network] = unflatten(flat)
    new = dataclasses.replace(adapters, fused=(*adapters.fused, *names), originals=originals)
    return with_adapters(pipe, new, params)


def kernel_with(kernel: Any, found: Sequence[tuple[Any, float]], scale: float) -> Any:
    """A kernel with several changes, each with its weight, merged into it."""
    total = sum(np.float32(scale * weight) * difference(change, kernel) for change, weight in found)
    return (jnp.asarray(kernel, jnp.float32) + total).astype(kernel.dtype)


def unfused(pipe: Any) -> Any:
    """See ``DiffusionPipeline.unfuse_lora``."""
    if not pipe.adapters.fused:
        raise ValueError("no adapter is fused, so there is nothing to undo")
    params = dict(pipe.params)
    for network, kernels in pipe.adapters.originals.items():
        params[network] = unflatten(
            flatten(params[network]) | {(*path, KERNEL): kernel for path, kernel in kernels.items()}
        )
    return with_adapters(pipe, dataclasses.replace(pipe.adapters, fused=(), originals={}), params)


# Requests


def at_scale(pipe: Any, scale: Any) -> Any:
    """The pipeline whose live adapters act at a strength, one number or one for each image.

    Raises:
      ValueError: no live adapter is active.
    """
    if LORA not in pipe.params:
        raise ValueError(
            "lora_scale needs an active live adapter; load one with load_lora_weights(..., adapter_name=...)"
        )
    return dataclasses.replace(pipe, adapters=dataclasses.replace(pipe.adapters, scale=scale))


def with_live(pipe: Any, request: Any) -> Any:
    """A request whose networks have the pipeline's live adapters."""
    names = tuple(pipe.params.get(LORA, ()))
    method = adapted_method(request.method, names) if names else request.method
    if method == request.method:
        return request
    rows = {SCALE: one_per_image(pipe.adapters.scale, request.images, SCALE)}
    return request._replace(method=method, rows=request.rows | rows)


def live_part(pipe: Any, part: Any) -> tuple[Any, dict[str, Any]]:
    """A part that runs by itself, its networks with the pipeline's live adapters, and parameters that it needs besides.

    Raises:
      ValueError: the adapters' strength differs between images, which such a part does not see.
    """
    names = tuple(pipe.params.get(LORA, ()))
    new = adapted(part, names) if names else part
    if new is part:
        return part, {}
    if np.ndim(pipe.adapters.scale):
        raise ValueError("lora_scale must be one number where only some of the prompts are given as embeddings")
    return new, {SCALE: jnp.full((1,), pipe.adapters.scale, jnp.float32)}


def with_attention(pipe: Any, source: str | Path, weight_name: str | None) -> dict[str, Any]:
    """The UNet with the cross-attention of a file; see ``DiffusionPipeline.load_attn_procs``."""
    if "unet" not in pipe.params:
        raise ValueError(f"weights of Custom Diffusion are for a UNet, and a {type(pipe).__name__} has none")
    network, params = pipe.components["unet"], pipe.params["unet"]
    return {"unet": (network, custom_diffusion.merged(params, read_leaves(source, network.shapes(), weight_name)))}


def with_word(pipe: Any, source: str | Path, token: str | None) -> dict[str, Any]:
    """The tokenizers and text encoders with one more token; see ``DiffusionPipeline.load_textual_inversion``."""
    word, found = tokens.load_word(source, token)
    known = getattr(pipe.family, "encoders", {"text_encoder": "tokenizer"})
    encoders = {name: tokenizer for name, tokenizer in known.items() if pipe.components.get(name) is not None}
    by_encoder = {tokens.ENCODERS.get(tensor, next(iter(encoders))): rows for tensor, rows in found.items()}
    if by_encoder.keys() - known or encoders.keys() - by_encoder:
        raise ValueError(
            f"{source}: has {' and '.join(found)}, but {type(pipe).__name__} has {' and '.join(encoders)}; "
            f"a word for SDXL has {' and '.join(tokens.ENCODERS)}, any other a single tensor"
        )
    changed: dict[str, Any] = {}
    for name in encoders:
        rows = by_encoder[name]
        network, params = pipe.components[name], pipe.params[name]
        if tokens.TABLE not in flatten(params):
            raise ValueError(
                f"{source}: holds a word for CLIP's text encoders; the {name} of this {type(pipe).__name__} is a "
                f"{type(network).__name__}"
            )
        width = network.config.hidden_size
        if rows.shape[1] != width:
            raise ValueError(f"{source}: embeddings of size {rows.shape[1]} do not fit a text encoder of width {width}")
        table = tokens.table_of(params)
        changed[encoders[name]] = tokens.with_words(pipe.components[encoders[name]], word, len(rows))
        changed[name] = tokens.with_rows(network, params, jnp.asarray(rows, table.dtype))
    return changed
