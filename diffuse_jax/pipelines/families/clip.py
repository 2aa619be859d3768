"""The common code of the families with CLIP text encoders and a latent-space UNet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffuse_jax.messages import brief, warning_once
from diffuse_jax.pipelines.family import Call, asks_for_guidance, check_output
from diffuse_jax.pipelines.image_prompts import image_encoders, image_prompt_rows, with_image_prompts
from diffuse_jax.pipelines.inputs import number_array, one_per_image, one_per_prompt, token_mask, tokenize
from diffuse_jax.pipelines.method import Method, Net, Params, Part, Rows
from diffuse_jax.pipelines.options import TextOptions
from diffuse_jax.pipelines.parts.decode import Raw, ToImages, autoencoder
from diffuse_jax.pipelines.parts.guidance import Branches, ClassifierFree
from diffuse_jax.pipelines.parts.network import UNet
from diffuse_jax.pipelines.parts.start import FromNoise
from diffuse_jax.pipelines.parts.text import EncodeText
from diffuse_jax.pipelines.prompts import Layout, aligned, rows_of
from diffuse_jax.pipelines.running import apply
from diffuse_jax.text.prompts import PLAIN, Style

NEGATIVE, POSITIVE = "negative_", ""
"""The branches of guidance, as prefixes of the arguments' names."""


def no_conditioning(pipe: Any, call: Call, branches: tuple[str, ...]) -> Rows:
    """No conditioning besides the text."""
    return {}


@dataclasses.dataclass(frozen=True)
class ClipFamily:
    """A family with one or several CLIP text encoders.

    Attributes:
      encoders: text encoder -> its tokenizer, in the order in which hidden states are concatenated.
      encode: the part that turns the encoders' outputs into the UNet's inputs.
      embeds: row -> the argument for it (without ``negative_``) if the caller passes embeddings.
      conditioning: ``(pipe, call, branches) -> rows`` for conditioning besides the text.
      zero_negative: ``(pipe, call)`` -> whether the unconditional embeddings are zeros; None if they never are.
      distilled: whether a UNet with ``time_cond_proj_dim`` takes the guidance scale as an input there, so that there is
        no classifier-free guidance.
      masked: mask the padding for encoders with ``use_attention_mask`` in their config.
      options: a ``TypedDict`` of the arguments of its calls.
      plan_options: the names of those that are passed on to the sampler's plan.
      autoencoder: the name of the component that decodes the latents.
    """

    encoders: dict[str, str]
    encode: type[EncodeText]
    embeds: dict[str, str]
    conditioning: Callable[[Any, Call, tuple[str, ...]], Rows] = no_conditioning
    zero_negative: Callable[[Any, Call], bool] | None = None
    distilled: bool = True
    masked: bool = False
    options: type = TextOptions
    plan_options: tuple[str, ...] = ()
    autoencoder: str = "vae"

    def rows(self, pipe: Any, call: Call) -> Rows:
        """Token ids (or prompt embeddings), guidance and micro-conditioning, one row per image.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one.
        """
        branches = (NEGATIVE, POSITIVE) if self.uses_guidance(pipe, call) else (POSITIVE,)
        rows = self.text_rows(pipe, call, branches) | self.conditioning(pipe, call, branches)
        rows = {name: repeat_rows(value, call.copies) for name, value in rows.items()}
        guided = len(branches) > 1
        return rows | guidance_rows(call, guided) | image_prompt_rows(pipe, call, guided)

    def uses_guidance(self, pipe: Any, call: Call) -> bool:
        """Whether to use classifier-free guidance: if a scale is above 1, and the network does not take it as an
        input."""
        takes = self.distilled and pipe.components["unet"].config.time_cond_proj_dim is not None
        return not takes and asks_for_guidance(call)

    def text_rows(
        self,
        pipe: Any,
        call: Call,
        branches: tuple[str, ...],
        checked: tuple[str, ...] = (NEGATIVE, POSITIVE),
    ) -> Rows:
        """``ids`` by encoder; or, if the caller passed embeddings for any branch, the embeddings of all branches.

        Args:
          pipe: the pipeline.
          call: the call.
          branches: the prefixes of the arguments of each branch.
          checked: the prefixes of arguments that are checked, even if their branch is not used.
        """
        embeds = {branch: self.given_embeds(pipe, call, branch) for branch in checked}
        prompts = {branch: self.prompts(call, branch) for branch in checked}
        embeds = {branch: embeds[branch] for branch in branches}
        style = style_of(call)
        with warning_once():  # encoders have the same tokenizer, and cut the same words of a prompt
            texts = {branch: self.tokens(pipe, prompts[branch], style) for branch in branches}
        if not style.is_plain:
            layouts = self.layouts(pipe)
            length = next(iter(layouts.values())).length
            given = max((found["states"].shape[1] // length for found in embeds.values() if found), default=1)
            texts = dict(zip(branches, aligned([*texts.values()], layouts, given), strict=True))
        if not any(embeds.values()):
            first = texts[branches[0]]
            found = {
                row: {name: stack_branches([texts[b][row][name] for b in branches]) for name in first[row]}
                for row in first
            }
            return found | self.mask_rows(pipe, call, branches)
        check_lengths([embeds[b]["states"].shape[1] if embeds[b] else sequence_length(texts[b]) for b in branches])
        part = self.text_part(pipe, call.get("clip_skip"), style)
        for branch in branches:
            encode = part if branch == POSITIVE else dataclasses.replace(part, clip_skip=None)
            given = bool(embeds[branch])
            embeds[branch] = embeds[branch] or apply(pipe, encode_ids, encode, texts[branch])
            if branch == NEGATIVE and not given and self.zero_negative is not None and self.zero_negative(pipe, call):
                embeds[branch] = {name: np.zeros_like(value) for name, value in embeds[branch].items()}
        names = embeds[branches[0]]
        return {name: stack_branches([np.asarray(embeds[b][name]) for b in branches]) for name in names}

    def mask_rows(self, pipe: Any, call: Call, branches: tuple[str, ...]) -> Rows:
        """``embeds_mask``: 0 for branches whose prompt embeddings are replaced by zeros, 1 for the others."""
        if self.zero_negative is None or len(branches) == 1:
            return {}
        mask = [float(branch == POSITIVE or not self.zero_negative(pipe, call)) for branch in branches]
        return {"embeds_mask": stack_branches([np.full(call.prompts, value, np.float32) for value in mask])}

    def prompts(self, call: Call, branch: str) -> dict[str, list[str]]:
        """Encoder -> the prompts of a branch. An encoder without separate prompts gets those of the first encoder.

        Raises:
          ValueError, TypeError: the number of prompts is not the call's, or they are not text.
        """
        found: dict[str, list[str]] = {}
        for encoder, name in zip(self.encoders, self.prompt_names(branch), strict=True):
            shared = call.get(name) is None and found
            found[encoder] = found[next(iter(found))] if shared else one_per_prompt(call.get(name), call.prompts, name)
        return found

    def prompt_names(self, branch: str) -> list[str]:
        """The names of the arguments with the prompts of a branch, in the order of the encoders."""
        return [f"{branch}prompt", *(f"{branch}prompt_{k}" for k in range(2, len(self.encoders) + 1))]

    def tokens(self, pipe: Any, prompts: Mapping[str, list[str]], style: Style = PLAIN) -> Rows:
        """The rows of prompts, each a dict by encoder: ``ids``, and ``attention_mask`` and ``text_weights`` if needed.

        They are ``[prompts,L]``, or ``[prompts,V,K,L]`` in a style that is not plain; see :class:`EncodeText
        <diffuse_jax.pipelines.parts.EncodeText>`.
        """
        layouts = self.layouts(pipe)
        if not style.is_plain:
            return rows_of(prompts, layouts, style)
        rows: Rows = {"ids": {}, "attention_mask": {}}
        for encoder, layout in layouts.items():
            given = layout.tokenizer, prompts[encoder], layout.length
            rows["ids"][encoder] = tokenize(*given, layout.vocabulary, advice=self.advice)
            if layout.hide_padding:
                rows["attention_mask"][encoder] = token_mask(*given)
        return {name: value for name, value in rows.items() if value}

    @property
    def advice(self) -> str:
        """What a warning about a prompt that is cut says at its end: how to keep it, where calls take that argument."""
        return " (long_prompts=True keeps it)" if "long_prompts" in self.options.__annotations__ else ""

    def layouts(self, pipe: Any) -> dict[str, Layout]:
        """How each text encoder of the checkpoint takes tokens."""
        found = {}
        for encoder, tokenizer in self.encoders.items():
            if (network := pipe.components.get(encoder)) is not None:
                c, words = network.config, pipe.components[tokenizer]
                length = min(c.max_position_embeddings, int(words.model_max_length))
                masked = self.masked and bool(getattr(c, "use_attention_mask", False))
                found[encoder] = Layout(words, length, c.vocab_size, masked)
        return found

    def given_embeds(self, pipe: Any, call: Call, branch: str) -> dict[str, np.ndarray]:
        """The embeddings that the caller passed for a branch, by row; empty if there are none.

        Raises:
          ValueError: prompts were passed too, one of several embeddings is missing, or a shape or dtype is wrong.
          TypeError: one is no array of numbers.
        """
        names = {row: f"{branch}{argument}" for row, argument in self.embeds.items()}
        given = {row: number_array(call.get(name), name) for row, name in names.items() if call.get(name) is not None}
        if not given:
            return {}
        for text in self.prompt_names(branch):
            if call.get(text) is not None:
                raise ValueError(f"give {text} or {names['states']}, not both")
        if missing := [name for row, name in names.items() if row not in given]:
            raise ValueError(f"give {', '.join(names.values())} together; {', '.join(missing)} is missing")
        for row, array in given.items():
            axes, width = (3, self.embeds_width(pipe)) if row == "states" else (2, None)
            fits = array.ndim == axes and len(array) == call.prompts and width in (None, array.shape[-1])
            if not (fits and jnp.issubdtype(array.dtype, jnp.floating)):
                shape = f"{call.prompts}, L, {width or 'D'}" if row == "states" else f"{call.prompts}, D"
                raise ValueError(
                    f"{names[row]} must be floating-point [{shape}], got {array.dtype} {list(array.shape)}"
                )
        return given

    def embeds_width(self, pipe: Any) -> int | None:
        """The width of the prompt embeddings that the network takes; None if it differs between blocks."""
        config = pipe.components["unet"].config
        return config.text_width if isinstance(config.cross_attention_dim, int) else None

    def text_part(self, pipe: Any, clip_skip: int | None = None, style: Style = PLAIN) -> EncodeText:
        """The part that encodes the prompts.

        Raises:
          ValueError: ``clip_skip`` is negative, or not less than the number of layers.
        """
        found = {name: pipe.components.get(name) for name in self.encoders}
        nets = tuple(Net(name, network) for name, network in found.items() if network is not None)
        layers = min((net.config.num_hidden_layers for net in nets), default=1)
        if clip_skip is not None and not 0 <= clip_skip < layers:
            raise ValueError(f"clip_skip must be from 0 to {layers - 1}, got {clip_skip}")
        return self.encode(nets, clip_skip, style=style)

    def method(self, pipe: Any, call: Call, rows: Rows) -> Method:
        """Encoders, the UNet with the pipeline's IP-Adapters, guidance if the scale is above 1, and the decoder.

        Raises:
          ValueError: ``output_type`` is unknown, or ``clip_skip`` out of range.
        """
        unet = with_image_prompts(pipe, rows, UNet(Net("unet", pipe.components["unet"])))
        vae = Net(self.autoencoder, autoencoder(pipe.components[self.autoencoder]))
        output, scale = check_output(call.get("output_type", "pil")), vae.config.scale
        decode = Raw() if output == "latent" else ToImages(vae, output == "pil", pipe.vae_tiling, pipe.vae_slicing)
        return Method(
            conditions=(*self.conditions(pipe, call, rows), *image_encoders(pipe, rows)),
            denoiser=ClassifierFree(unet) if self.uses_guidance(pipe, call) else unet,
            start=FromNoise(),
            decode=decode,
            latent_shape=(call.size[0] // scale, call.size[1] // scale, vae.config.latent_channels),
        )

    def conditions(self, pipe: Any, call: Call, rows: Rows) -> tuple[Part, ...]:
        """The parts that encode what the UNet is conditioned on; errors as of :meth:`method`."""
        text = self.text_part(pipe, call.get("clip_skip"), style_of(call))
        return (text,) if "ids" in rows else ()


def encode_ids(part: EncodeText, params: Params, tokens: Rows) -> Rows:
    """Encode token ids as prompt embeddings, outside a run."""
    return part.encode(params, tokens)


def style_of(call: Call) -> Style:
    """How the call's prompts are read.

    Raises:
      ValueError, TypeError: there is no such syntax, or ``long_prompts`` is not a bool.
    """
    return Style(call.get("prompt_syntax"), call.get("long_prompts", False))


def sequence_length(tokens: Rows) -> int:
    """The number of prompt embeddings of each prompt."""
    ids = next(iter(tokens["ids"].values()))
    return ids.shape[-1] * (1 if ids.ndim == 2 else ids.shape[-2])


def guidance_rows(call: Call, guided: bool) -> Rows:
    """The scale and the rescaling of the guidance of each image.

    Raises:
      ValueError, TypeError: one is not finite or no number, or a rescaling is not from 0 to 1.
    """
    defaults = {"guidance_scale": 1.0, "guidance_rescale": 0.0}
    rows = {name: one_per_image(call.get(name, default), call.images, name) for name, default in defaults.items()}
    if np.any((rows["guidance_rescale"] < 0) | (rows["guidance_rescale"] > 1)):
        raise ValueError(f"guidance_rescale must be from 0 to 1, got {brief(call.get('guidance_rescale'))}")
    # 1 or less turns guidance off, in a batch too.
    return rows | {"guidance_scale": np.maximum(rows["guidance_scale"], 1.0)} if guided else rows


def stack_branches(branches: list[np.ndarray]) -> np.ndarray | Branches:
    """The values of all branches as one row; the value itself if there is a single branch."""
    return branches[0] if len(branches) == 1 else Branches(np.stack(branches, 1))


def repeat_rows(value: Any, copies: int) -> Any:
    """Repeat rows of prompts ``copies`` times each, as rows of images."""
    if isinstance(value, dict):
        return {name: repeat_rows(inner, copies) for name, inner in value.items()}
    if isinstance(value, Branches):
        return Branches(np.repeat(value.values, copies, axis=0))
    return np.repeat(value, copies, axis=0)


def check_lengths(tokens: list[int]) -> None:
    """Check that both branches have the same number of tokens.

    Raises:
      ValueError: they do not.
    """
    if len(set(tokens)) > 1:
        raise ValueError(
            f"the prompt has {tokens[-1]} tokens and the negative prompt {tokens[0]}, but guidance needs the same "
            "number: give prompt_embeds and negative_prompt_embeds of the same length"
        )
