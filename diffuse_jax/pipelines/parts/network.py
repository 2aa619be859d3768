"""Networks as denoisers: which rows they take, and under which names."""

from __future__ import annotations

import dataclasses

import jax

from diffuse_jax.models.embeddings import sinusoidal_embedding
from diffuse_jax.pipelines.method import Net, Params, Part, Rows, Step


@dataclasses.dataclass(frozen=True)
class UNet(Part):
    """A text-conditioned UNet.

    Reads ``states [B,L,D]``; for SDXL ``pooled [B,P]`` and ``time_ids [B,n]``; ``class_labels``, ``text_mask [B,L]``
    (false where a state is not attended to), ``residuals`` (of ControlNets) and ``inner_residuals`` (of T2I-Adapters)
    if there are any; and if the network takes one more vector, ``timestep_cond [B,D]``, or else
    ``guidance_scale [B]``, which it is made of.
    """

    net: Net

    @property
    def reads(self) -> tuple[str, ...]:
        distilled = self.net.config.time_cond_proj_dim is not None
        return ("states", *(("timestep_cond|guidance_scale",) if distilled else ()))

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        residuals = {}
        if "residuals" in rows:
            down, middle = rows["residuals"]
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        if "inner_residuals" in rows:
            residuals["down_intrablock_additional_residuals"] = rows["inner_residuals"]
        if "text_mask" in rows:
            residuals["encoder_attention_mask"] = rows["text_mask"]
        return self.net.apply(params, x, step.t, rows["states"], **conditions(self.net, rows), **residuals)


def conditions(net: Net, rows: Rows) -> dict[str, jax.Array | dict[str, jax.Array]]:
    """The inputs of a UNet or a ControlNet besides the sample, the timestep and the hidden states, by argument."""
    given: dict[str, jax.Array | dict[str, jax.Array]] = {}
    if "time_ids" in rows:
        given["added_cond_kwargs"] = {"text_embeds": rows["pooled"], "time_ids": rows["time_ids"]}
    if "class_labels" in rows:
        given["class_labels"] = rows["class_labels"]
    dim = getattr(net.config, "time_cond_proj_dim", None)
    if "timestep_cond" in rows:
        given["timestep_cond"] = rows["timestep_cond"]
    elif dim is not None:
        given["timestep_cond"] = guidance_embedding(rows["guidance_scale"], dim)
    return given


def guidance_embedding(scale: jax.Array, dim: int) -> jax.Array:
    """A guidance scale ``[B]`` embedded as ``[B,dim]`` for distilled networks (Meng et al. 2023; Luo et al. 2023)."""
    return strength_embedding(scale - 1, dim)


def strength_embedding(w: jax.Array, dim: int) -> jax.Array:
    """The same of ``w [B]``, the guidance scale less 1."""
    return sinusoidal_embedding(w * 1000, dim, flip_sin_to_cos=False, freq_shift=1)


@dataclasses.dataclass(frozen=True)
class PixelUNet(Part):
    """A UNet without text conditioning; reads ``class_labels`` int32 ``[B]`` if it is class-conditional."""

    net: Net

    @property
    def reads(self) -> tuple[str, ...]:
        return ("class_labels",) if self.net.config.has_classes else ()

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        return self.net.apply(params, x, step.t, rows.get("class_labels"))


@dataclasses.dataclass(frozen=True)
class HalvedUNet(PixelUNet):
    """A variance-exploding network for images in [0, 1], as one for images in [-1, 1] that predicts the negative noise.

    Half the sample and half its noise level are what the network sees; its score times that level is the output
    (Karras et al. 2022, eq. 213).
    """

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        level = step.t / 2
        return level * self.net.apply(params, (x + 1) / 2, level, rows.get("class_labels"))
