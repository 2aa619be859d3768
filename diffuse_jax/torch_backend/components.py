"""Each network on its own, on both sides, with the inputs that a run of the pipeline gives it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from diffuse_jax.models.autoencoder_kl import scale_latents, unscale_latents
from diffuse_jax.pipelines.task import decoder
from diffuse_jax.torch_backend import text_to_image as twin
from diffuse_jax.torch_backend.networks import channels_first, channels_last, exact, to_numpy, to_torch
from diffuse_jax.torch_backend.trace import Trace

Outputs = dict[str, Any]
"""What a network gave, by name; the name is empty where there is only one."""


class Call(NamedTuple):
    """One application of a network.

    Attributes:
      component: its name in the pipeline.
      kind: one of :data:`KINDS`.
      label: what is special about this call, for example ``timestep 981``.
      inputs: keyword -> array, the same for both sides.
    """

    component: str
    kind: str
    label: str
    inputs: dict[str, Any]

    def row(self, output: str) -> str:
        """The name of the row for one of the outputs."""
        return " ".join(word for word in (self.component, self.label, output) if word)


def text_ours(model: Any, params: Any, ids: Any) -> Outputs:
    """The final states, those before the last layer (which SDXL takes) and the projected pooled state."""
    out = model.apply({"params": params}, ids)
    found = {"last state": out.last_hidden_state, "state before": out.hidden_states[-2]}
    return found if out.text_embeds is None else found | {"text embeds": out.text_embeds}


def text_theirs(module: Any, ids: torch.Tensor) -> Outputs:
    out = module(ids.long(), output_hidden_states=True)
    found = {"last state": out.last_hidden_state, "state before": out.hidden_states[-2]}
    embeds = getattr(out, "text_embeds", None)
    return found if embeds is None else found | {"text embeds": embeds}


def unet_ours(
    model: Any, params: Any, x: Any, t: Any, states: Any, pooled: Any, time_ids: Any, guidance: Any
) -> Outputs:
    added = None if time_ids is None else {"text_embeds": pooled, "time_ids": time_ids}
    return {"": model.apply({"params": params}, x, t, states, added, timestep_cond=guidance)}


def unet_theirs(module: Any, x: Any, t: Any, states: Any, pooled: Any, time_ids: Any, guidance: Any) -> Outputs:
    return {"": twin.run_unet(module, x, float(t), states, pooled, time_ids, guidance)}


def decode_ours(model: Any, params: Any, latents: Any) -> Outputs:
    return {"": model.apply({"params": params}, unscale_latents(latents, model.config), method="decode")}


def decode_theirs(module: Any, latents: torch.Tensor) -> Outputs:
    return {"": twin.decode(module, twin.unscale_latents(latents, module.config))}


def encode_ours(model: Any, params: Any, images: Any) -> Outputs:
    posterior = model.apply({"params": params}, images, method="encode")
    return {"mean": scale_latents(posterior.mean, model.config), "logvar": posterior.logvar}


def encode_theirs(module: Any, images: torch.Tensor) -> Outputs:
    posterior = module.encode(channels_first(images.to(module.dtype))).latent_dist
    mean, logvar = (channels_last(x).float() for x in (posterior.mean, posterior.logvar))
    return {"mean": twin.scale_latents(mean, module.config), "logvar": logvar}


class Kind(NamedTuple):
    """What one kind of network does, here and in PyTorch."""

    ours: Callable[..., Outputs]  # (model, params, **inputs)
    theirs: Callable[..., Outputs]  # (module, **inputs)


KINDS = {
    "text": Kind(text_ours, text_theirs),
    "unet": Kind(unet_ours, unet_theirs),
    "decode": Kind(decode_ours, decode_theirs),
    "encode": Kind(encode_ours, encode_theirs),
}


def calls_of(trace: Trace) -> list[Call]:
    """What the run asked of each network: its prompts, three of its steps, its final latents, its pictures."""
    return [*text_calls(trace), *unet_calls(trace), *vae_calls(trace)]


def text_calls(trace: Trace) -> list[Call]:
    """The token ids of both prompts, negative first."""
    halves = [half for half in (trace.batch.negative, trace.batch.prompt) if half is not None]
    ids = {
        name: np.concatenate([np.asarray(half.ids[name]) for half in halves]) for name, _ in trace.task.text_encoders
    }
    return [Call(name, "text", "", {"ids": rows}) for name, rows in ids.items()]


def unet_calls(trace: Trace) -> list[Call]:
    """The first, a middle and the last evaluation, with the positive prompts."""
    evaluations, images = int(trace.plan.num_evaluations), len(trace.images)
    padded = len(np.asarray(trace.batch.guidance_scale))
    text, time_ids = trace.prepared.text, trace.prepared.time_ids
    positive = lambda rows: None if rows is None else np.asarray(rows, np.float32)[-padded:][:images]
    dim = trace.task.unet.config.time_cond_proj_dim
    scale = jax.numpy.asarray(trace.batch.guidance_scale)[:images]
    shared = {
        "states": positive(text.states),
        "pooled": positive(text.pooled),
        "time_ids": positive(time_ids),
        "guidance": None if dim is None else np.asarray(twin.verbs.guidance_embedding(scale, dim)),
    }
    calls = []
    for i in sorted({0, evaluations // 2, evaluations - 1}):
        t = np.float32(trace.plan.timesteps[i])
        x = np.asarray(trace.plan.input_scale[i] * trace.latents[i])
        calls.append(Call("unet", "unet", f"timestep {t:g}", {"x": x, "t": t, **shared}))
    return calls


def vae_calls(trace: Trace) -> list[Call]:
    """Final latents to pixels, and those pixels to latents."""
    images = 2 * trace.images - 1
    return [
        Call("vae", "decode", "decode", {"latents": trace.latents[-1]}),
        Call("vae", "encode", "encode", {"images": images}),
    ]


def network(components: Mapping[str, Any], name: str) -> Any:
    """Our network as pipelines run it."""
    return decoder(components[name]) if name == "vae" else components[name]


@functools.partial(jax.jit, static_argnames=("kind", "model"))
def apply(params: Any, inputs: Any, *, kind: str, model: Any) -> Outputs:
    """Our network's outputs, compiled once for each network and shape."""
    return KINDS[kind].ours(model, params, **inputs)


def run_ours(call: Call, model: Any, params: Any) -> dict[str, np.ndarray]:
    """Our outputs as float32, with matrix products in full precision."""
    with jax.default_matmul_precision("highest"):
        outputs = apply(params, call.inputs, kind=call.kind, model=model)
    return {name: np.asarray(value, np.float32) for name, value in outputs.items()}


def run_theirs(call: Call, module: Any) -> dict[str, np.ndarray]:
    """PyTorch's outputs as float32."""
    with exact():
        outputs = KINDS[call.kind].theirs(module, **tensors(call, module.device))
    return {name: to_numpy(value) for name, value in outputs.items()}


def tensors(call: Call, device: torch.device) -> dict[str, Any]:
    """The inputs of a call for PyTorch."""
    return {name: None if value is None else to_torch(value, device) for name, value in call.inputs.items()}
