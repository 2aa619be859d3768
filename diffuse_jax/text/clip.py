"""The text encoders of Stable Diffusion: CLIP (Radford et al. 2021) and OpenCLIP (Cherti et al. 2023), in Flax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.allowed import Layers, Range, Share, TokenId
from diffuse_jax.config import NO_DROPOUT, NOT_QUANTIZED, Config
from diffuse_jax.kernels import attention
from diffuse_jax.models.base import Model
from diffuse_jax.models.embeddings import Embedding
from diffuse_jax.models.layers import ACTIVATIONS, Dense, LayerNorm

ABOUT_FILES = (
    "_name_or_path",
    "architectures",
    "model_type",
    "text_config_dict",
    "tokenizer_class",
    "transformers_version",
)
ABOUT_OTHERS = (
    *("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward"),
    *("cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dropout"),
    *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task"),
    *("forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "is_decoder"),
    *("is_encoder_decoder", "label2id", "length_penalty", "logit_scale_init_value", "max_length", "min_length"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions"),
    *("output_hidden_states", "output_scores", "prefix", "problem_type", "remove_invalid_values"),
    *("repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens"),
    *("task_specific_params", "temperature", "text_config", "tf_legacy_loss", "tie_encoder_decoder"),
    *("tie_word_embeddings", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16", "use_cache"),
    *("vision_config", "vision_config_dict"),
)
"""Keys that transformers writes, or once wrote, to every config."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(Config):
    """``config.json`` of a CLIP text encoder, as transformers writes it (or its ``text_config`` part).

    An ``eos_token_id`` of 2 marks files from before the id was corrected; there, the text ends at the largest id. With
    ``use_attention_mask``, pipelines of Stable Diffusion 1.x and 2.x mask the padding.
    """

    fixed: ClassVar[Mapping[str, Any]] = {**NOT_QUANTIZED, "pruned_heads": {}}
    harmless: ClassVar[Mapping[str, str]] = {
        "attention_dropout": NO_DROPOUT,
        "bos_token_id": "the tokenizer writes the text's first token",
        "pad_token_id": "the tokenizer pads",
        **dict.fromkeys(("initializer_factor", "initializer_range"), "for weights before training"),
        **dict.fromkeys(("dtype", "torch_dtype"), "the caller says what the network computes in"),
        **dict.fromkeys(ABOUT_FILES, "about the file"),
        **dict.fromkeys(ABOUT_OTHERS, "of other kinds of model, or of how PyTorch returns outputs"),
    }

    vocab_size: Annotated[int, Range(1, 2**22)] = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Share = 1e-5
    bos_token_id: TokenId | None = 49406
    eos_token_id: TokenId = 49407
    pad_token_id: TokenId | None = 1
    use_attention_mask: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"CLIP text: hidden_act={self.hidden_act!r}; expected one of {sorted(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"CLIP text: hidden_size {self.hidden_size} is not divisible by "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        if isinstance(data.get("text_config"), Mapping):  # the config of a whole CLIP model: use its text part
            top = {"projection_dim": data["projection_dim"]} if "projection_dim" in data else {}
            data = {**data["text_config"], **top}
        if data.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
            raise ValueError(f"expected the config of a CLIP text encoder, got model_type={data['model_type']!r}")
        return super().from_json(data)


class CLIPTextOutput(NamedTuple):
    """The encoder's outputs; ``hidden_states`` are the embeddings and each layer's output, before the final norm."""

    last_hidden_state: jax.Array  # [B,L,D], after the final norm
    pooled_output: jax.Array  # [B,D], the final state at the end-of-text token
    hidden_states: tuple[jax.Array, ...]  # num_hidden_layers + 1 times [B,L,D]
    text_embeds: jax.Array | None  # [B,projection_dim]; None without a projection

    def skipped(self, clip_skip: int) -> jax.Array:
        """The hidden states before the last ``clip_skip`` layers, ``[B,L,D]``, without the final norm.

        Raises:
          ValueError: ``clip_skip`` is out of range.
        """
        if not 0 <= clip_skip < len(self.hidden_states):
            raise ValueError(f"clip_skip must be from 0 to {len(self.hidden_states) - 1}, got {clip_skip}")
        return self.hidden_states[-1 - clip_skip]


class CLIPTextModel(Model):
    """A causal transformer over token ids, without projection of the pooled state (SD 1.x, 2.x, SDXL's first
    encoder)."""

    config: CLIPTextConfig = CLIPTextConfig()
    config_class: ClassVar[type[Config]] = CLIPTextConfig
    weights_name: ClassVar[str] = "model"
    model_type: ClassVar[str] = "clip_text_model"
    has_projection: ClassVar[bool] = False

    def setup(self) -> None:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.text_model = TextTransformer(self.config, **dtypes)
        if self.has_projection:
            self.text_projection = Dense(self.config.projection_dim, use_bias=False, **dtypes)

    def example_inputs(self) -> dict[str, Any]:
        return {"input_ids": jax.ShapeDtypeStruct((1, 2), jnp.int32)}

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> CLIPTextOutput:
        """Encode ``input_ids`` ``[B,L]`` int32, ``L <= max_position_embeddings``.

        Args:
          input_ids: token ids. They are not checked against the vocabulary, since that is impossible under ``jit``.
          attention_mask: ``[B,L]``, true where a token may be attended to; Stable Diffusion passes one only if the
            config has ``use_attention_mask``.

        Raises:
          ValueError: the sequence is longer than the position embedding table.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids must be [B,L] with L up to {self.config.max_position_embeddings}, got {input_ids.shape}"
            )
        last, states = self.text_model(input_ids, attention_mask)
        ends = end_of_text(input_ids, self.config.eos_token_id)
        pooled = jnp.take_along_axis(last, ends[:, None, None], axis=1)[:, 0]
        return CLIPTextOutput(last, pooled, states, self.text_projection(pooled) if self.has_projection else None)

    def final_norm(self, states: jax.Array) -> jax.Array:
        """The encoder's final layer norm, for hidden states selected by ``clip_skip`` in SD 1.x and 2.x."""
        return self.text_model.final_layer_norm(states)


class CLIPTextModelWithProjection(CLIPTextModel):
    """A :class:`CLIPTextModel` with ``text_embeds``, the projected pooled state (SDXL's second encoder, the
    refiner's)."""

    has_projection: ClassVar[bool] = True


def end_of_text(input_ids: jax.Array, eos_token_id: int) -> jax.Array:
    """Position of the first end-of-text token, ``[B,L] -> [B]``; with the old id 2, the position of the largest id."""
    return jnp.argmax(input_ids if eos_token_id == 2 else input_ids == eos_token_id, axis=-1)


class Part(nn.Module):
    """Base of the encoder's modules: a config and two dtypes."""

    config: CLIPTextConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def dtypes(self) -> Mapping[str, DTypeLike]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def norm(self, name: str | None = None) -> LayerNorm:
        return LayerNorm(self.config.layer_norm_eps, **self.dtypes, name=name)


class TextTransformer(Part):
    """Embeddings, layers and the final norm."""

    def setup(self) -> None:
        self.embeddings = TextEmbeddings(self.config, **self.dtypes)
        self.encoder = TextLayers(self.config, **self.dtypes)
        self.final_layer_norm = self.norm()

    def __call__(self, ids: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        states = self.encoder(self.embeddings(ids), mask)
        return self.final_layer_norm(states[-1]), states


class TextEmbeddings(Part):
    """Token plus position embeddings: ``[B,L] -> [B,L,D]``."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        c = self.config
        tokens = Embedding(c.vocab_size, c.hidden_size, **self.dtypes, name="token_embedding")(ids)
        table = Embedding(c.max_position_embeddings, c.hidden_size, **self.dtypes, name="position_embedding")
        return tokens + table(jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :])


class TextLayers(Part):
    """All layers; returns their input and the output of each."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, ...]:
        states = [x]
        for i in range(self.config.num_hidden_layers):
            states.append(TextLayer(self.config, **self.dtypes, name=f"layers_{i}")(states[-1], mask))
        return tuple(states)


class TextLayer(Part):
    """Causal self-attention and an MLP, each with a pre-norm and a residual connection."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        c = self.config
        x = x + CausalAttention(c, **self.dtypes, name="self_attn")(self.norm("layer_norm1")(x), mask)
        return x + MLP(c, **self.dtypes, name="mlp")(self.norm("layer_norm2")(x))


class CausalAttention(Part):
    """Self-attention in which each token attends to itself and the tokens before it."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        B, L, D = x.shape
        heads = self.config.num_attention_heads
        project = lambda name: Dense(D, **self.dtypes, name=name)(x).reshape(B, L, heads, D // heads)
        query, key, value = project("q_proj"), project("k_proj"), project("v_proj")
        mask = None if mask is None else mask.astype(bool)[:, None, None, :]
        h = attention(query, key, value, mask=mask, is_causal=True)
        return Dense(D, **self.dtypes, name="out_proj")(h.reshape(B, L, D))


class MLP(Part):
    """``fc2(act(fc1(x)))``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = Dense(self.config.intermediate_size, **self.dtypes, name="fc1")(x)
        return Dense(x.shape[-1], **self.dtypes, name="fc2")(ACTIVATIONS[self.config.hidden_act](h))
