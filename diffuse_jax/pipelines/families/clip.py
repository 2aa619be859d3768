"""What the families with CLIP text encoders and a UNet over latents share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffuse_jax.pipelines.family import Call, check_output
from diffuse_jax.pipelines.inputs import one_per_image, one_per_prompt, token_mask, tokenize
from diffuse_jax.pipelines.method import Method, Net, Params, Rows
from diffuse_jax.pipelines.options import TextOptions
from diffuse_jax.pipelines.parts.decode import Raw, ToImages, autoencoder
from diffuse_jax.pipelines.parts.guidance import Branches, ClassifierFree
from diffuse_jax.pipelines.parts.network import UNet
from diffuse_jax.pipelines.parts.start import FromNoise
from diffuse_jax.pipelines.parts.text import EncodeText
from diffuse_jax.pipelines.running import apply

NEGATIVE, POSITIVE = "negative_", ""
"""What the arguments of the two branches begin with."""


def no_conditioning(pipe: Any, call: Call, branches: tuple[str, ...]) -> Rows:
    """The text is all."""
    return {}


@dataclasses.dataclass(frozen=True)
class ClipFamily:
    """A family with one or several CLIP text encoders.

    Attributes:
      encoders: text encoder -> its tokenizer, in the order in which hidden states are joined.
      encode: how their outputs become the UNet's inputs.
      embeds: row -> the argument with which a caller gives it (without ``negative_``).
      conditioning: ``(pipe, call, branches) -> rows`` beside the text.
      zeroed: ``(pipe, call)`` -> whether the unconditional embeddings are zeros; None if they never are.
      masked: hide the padding from encoders whose configuration says ``use_attention_mask``.
      options: the arguments of its calls.
      plan_options: those that go to the sampler's plan.
    """

    encoders: dict[str, str]
    encode: type[EncodeText]
    embeds: dict[str, str]
    conditioning: Callable[[Any, Call, tuple[str, ...]], Rows] = no_conditioning
    zeroed: Callable[[Any, Call], bool] | None = None
    masked: bool = False
    options: type = TextOptions
    plan_options: tuple[str, ...] = ()

    def rows(self, pipe: Any, call: Call) -> Rows:
        """Token ids (or prompt embeddings), guidance and micro-conditioning, one row per image.

        Raises:
          ValueError, TypeError: an argument is impossible or contradicts another one.
        """
        branches = (NEGATIVE, POSITIVE) if guides(pipe, call.get("guidance_scale")) else (POSITIVE,)
        rows = self.text_rows(pipe, call, branches) | self.conditioning(pipe, call, branches)
        rows = {name: repeated(value, call.copies) for name, value in rows.items()}
        for name, default in (("guidance_scale", 1.0), ("guidance_rescale", 0.0)):
            rows[name] = one_per_image(call.get(name, default), call.images, name)
        if len(branches) > 1:  # up to 1 there is no guidance, for an image in a batch as for one alone
            rows["guidance_scale"] = np.maximum(rows["guidance_scale"], 1.0)
        return rows

    def text_rows(self, pipe: Any, call: Call, branches: tuple[str, ...]) -> Rows:
        """``ids`` by encoder; or, where the caller gives embeddings for a branch, the embeddings of all of them."""
        embeds = {branch: self.given_embeds(pipe, call, branch) for branch in (NEGATIVE, POSITIVE)}  # used or not
        prompts = {branch: self.prompts(call, branch) for branch in (NEGATIVE, POSITIVE)}
        embeds = {branch: embeds[branch] for branch in branches}
        texts = {branch: self.tokens(pipe, prompts[branch]) for branch in branches}
        if not any(embeds.values()):
            first = texts[branches[0]]
            found = {
                row: {name: joined([texts[b][row][name] for b in branches]) for name in first[row]} for row in first
            }
            return found | self.keep_rows(pipe, call, branches)
        lengths = [embeds[b]["states"] if embeds[b] else next(iter(texts[b]["ids"].values())) for b in branches]
        check_lengths([array.shape[1] for array in lengths])
        part = self.text_part(pipe, call.get("clip_skip"))
        for branch in branches:
            own = part if branch == POSITIVE else dataclasses.replace(part, clip_skip=None)
            given = bool(embeds[branch])
            embeds[branch] = embeds[branch] or apply(pipe, encode_ids, own, texts[branch])
            if branch == NEGATIVE and not given and self.zeroed is not None and self.zeroed(pipe, call):
                embeds[branch] = {name: np.zeros_like(value) for name, value in embeds[branch].items()}
        names = embeds[branches[0]]
        return {name: joined([np.asarray(embeds[b][name]) for b in branches]) for name in names}

    def keep_rows(self, pipe: Any, call: Call, branches: tuple[str, ...]) -> Rows:
        """``keep``: 0 for the branches whose embeddings are replaced by zeros."""
        if self.zeroed is None or len(branches) == 1:
            return {}
        keep = [float(branch == POSITIVE or not self.zeroed(pipe, call)) for branch in branches]
        return {"keep": joined([np.full(call.prompts, value, np.float32) for value in keep])}

    def prompts(self, call: Call, branch: str) -> dict[str, list[str]]:
        """Each encoder's prompts of a branch, one for each of the call's; the first encoder's where it has no others.

        Raises:
          ValueError, TypeError: there are more or fewer, or they are no text.
        """
        found: dict[str, list[str]] = {}
        for encoder, name in zip(self.encoders, self.prompt_names(branch), strict=True):
            alone = call.get(name) is None and found
            found[encoder] = found[next(iter(found))] if alone else one_per_prompt(call.get(name), call.prompts, name)
        return found

    def prompt_names(self, branch: str) -> list[str]:
        """The arguments with a branch's prompts, in the order of the encoders."""
        return [f"{branch}prompt", *(f"{branch}prompt_{k}" for k in range(2, len(self.encoders) + 1))]

    def tokens(self, pipe: Any, prompts: Mapping[str, list[str]]) -> dict[str, dict[str, np.ndarray]]:
        """``ids [prompts,L]`` of prompts for each encoder of the checkpoint, ``attention_mask`` for some."""
        ids, mask = {}, {}
        for encoder, tokenizer in self.encoders.items():
            if (network := pipe.components.get(encoder)) is not None:
                c, words = network.config, pipe.components[tokenizer]
                ids[encoder] = tokenize(words, prompts[encoder], c.max_position_embeddings, c.vocab_size)
                if self.masked and getattr(c, "use_attention_mask", False):
                    mask[encoder] = token_mask(words, prompts[encoder], c.max_position_embeddings)
        return {"ids": ids, "attention_mask": mask} if mask else {"ids": ids}

    def given_embeds(self, pipe: Any, call: Call, branch: str) -> dict[str, np.ndarray]:
        """The embeddings of a branch that the caller gave, by row; nothing where the caller gave none.

        Raises:
          ValueError: there is text as well, one of several is missing, or a shape is wrong.
        """
        names = {row: f"{branch}{argument}" for row, argument in self.embeds.items()}
        given = {row: np.asarray(call.get(name)) for row, name in names.items() if call.get(name) is not None}
        if not given:
            return {}
        for text in self.prompt_names(branch):
            if call.get(text) is not None:
                raise ValueError(f"give {text} or {names['states']}, not both")
        if missing := [name for row, name in names.items() if row not in given]:
            raise ValueError(f"give {', '.join(names.values())} together; {', '.join(missing)} is missing")
        for row, array in given.items():
            axes, width = (3, embeds_width(pipe)) if row == "states" else (2, None)
            fits = array.ndim == axes and len(array) == call.prompts and width in (None, array.shape[-1])
            if not (fits and jnp.issubdtype(array.dtype, jnp.floating)):
                shape = f"{call.prompts}, L, {width or 'D'}" if row == "states" else f"{call.prompts}, D"
                raise ValueError(f"{names[row]} must be numbers [{shape}], got {array.dtype} {list(array.shape)}")
        return given

    def text_part(self, pipe: Any, clip_skip: int | None = None) -> EncodeText:
        """The part that encodes prompts.

        Raises:
          ValueError: ``clip_skip`` lies outside the encoder's layers.
        """
        found = {name: pipe.components.get(name) for name in self.encoders}
        nets = tuple(Net(name, network) for name, network in found.items() if network is not None)
        layers = min((net.config.num_hidden_layers for net in nets), default=1)
        if clip_skip is not None and not 0 <= clip_skip < layers:
            raise ValueError(f"clip_skip must be from 0 to {layers - 1}, got {clip_skip}")
        return self.encode(nets, clip_skip)

    def method(self, pipe: Any, call: Call, rows: Rows) -> Method:
        """Prompts through the encoders, the UNet with classifier-free guidance if there are two branches, the decoder.

        Raises:
          ValueError: an unknown ``output_type``, or ``clip_skip`` outside the encoder's layers.
        """
        text = self.text_part(pipe, call.get("clip_skip"))
        unet = UNet(Net("unet", pipe.components["unet"]))
        vae = Net("vae", autoencoder(pipe.components["vae"]))
        output, scale = check_output(call.get("output_type", "pil")), vae.config.scale
        decode = Raw() if output == "latent" else ToImages(vae, output == "pil", pipe.vae_tiling, pipe.vae_slicing)
        return Method(
            conditions=(text,) if "ids" in rows else (),
            denoiser=ClassifierFree(unet) if guides(pipe, call.get("guidance_scale")) else unet,
            start=FromNoise(),
            decode=decode,
            latent_shape=(call.size[0] // scale, call.size[1] // scale, vae.config.latent_channels),
        )


def embeds_width(pipe: Any) -> int | None:
    """How wide the UNet's prompt embeddings are; None if its blocks do not agree."""
    width = pipe.components["unet"].config.cross_attention_dim
    return width if isinstance(width, int) else None


def encode_ids(part: EncodeText, params: Params, tokens: Rows) -> Rows:
    """Prompt embeddings as a program of its own."""
    return part.encode(params, tokens["ids"], mask=tokens.get("attention_mask", {}))


def guides(pipe: Any, guidance_scale: Any) -> bool:
    """Whether classifier-free guidance runs: a scale above 1, and a network that does not take it as an input."""
    return pipe.components["unet"].config.time_cond_proj_dim is None and bool(np.any(np.asarray(guidance_scale) > 1))


def joined(branches: list[np.ndarray]) -> np.ndarray | Branches:
    """The values of all branches as one row; of a single branch, its value."""
    return branches[0] if len(branches) == 1 else Branches(np.stack(branches, 1))


def repeated(value: Any, copies: int) -> Any:
    """Rows of prompts as rows of images."""
    if isinstance(value, dict):
        return {name: repeated(inner, copies) for name, inner in value.items()}
    if isinstance(value, Branches):
        return Branches(np.repeat(value.values, copies, axis=0))
    return np.repeat(value, copies, axis=0)


def check_lengths(tokens: list[int]) -> None:
    """Refuse branches with different numbers of tokens.

    Raises:
      ValueError: it says both numbers.
    """
    if len(set(tokens)) > 1:
        raise ValueError(
            f"the prompt has {tokens[-1]} tokens and the negative prompt {tokens[0]}, but guidance needs the same "
            "number: give prompt_embeds and negative_prompt_embeds of the same length"
        )
