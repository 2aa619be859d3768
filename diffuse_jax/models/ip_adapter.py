"""IP-Adapters: images as prompts, with separate keys and values in a UNet's cross-attentions (Ye et al. 2023,
2308.06721). The UNet, its parameters and its configuration stay as they are; :mod:`.image_attention` connects both."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax.allowed import Layers, Length
from diffuse_jax.config import NOT_QUANTIZED, Config
from diffuse_jax.kernels import attention
from diffuse_jax.layouts import read_ip_adapter
from diffuse_jax.layouts.ip_adapter import HEAD_WIDTH
from diffuse_jax.models.base import Model, Params
from diffuse_jax.models.layers import ACTIVATIONS, Dense, LayerNorm, parameter
from diffuse_jax.models.one_file import open_part

PROJECTIONS = ("linear", "mlp", "face", "resampler", "face_resampler")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IPAdapterConfig(Config):
    """Sizes of an IP-Adapter, which are read off its file; published files have no configuration.

    ``projection``: "linear" makes ``tokens`` of one image embedding, "mlp" (full face) one of each hidden state of the
    image encoder, "face" ``tokens`` of a face's embedding, "resampler" (plus) ``tokens`` of all hidden states, and
    "face_resampler" (face ID plus) of both; with ``shortcut`` (its version 2) the face's own are added.
    ``layer_widths`` are those of the UNet's cross-attentions: downward path, upward path, middle block.
    """

    class_name: ClassVar[str] = "IPAdapter"
    fixed: ClassVar[Mapping[str, Any]] = NOT_QUANTIZED

    projection: str = "linear"
    image_width: int = 1024
    cross_attention_dim: int = 768
    layer_widths: Annotated[tuple[int, ...], Length(192)] = (320,) * 4 + (640,) * 4 + (1280,) * 8
    tokens: int = 4
    hidden_width: int = 768
    heads: int = 12
    depth: Layers = 4
    mlp_width: int = 3072
    face_width: int = 512
    face_hidden_width: int = 1024
    shortcut: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection not in PROJECTIONS:
            raise ValueError(f"IPAdapter: projection={self.projection!r}; expected one of {PROJECTIONS}")
        if not self.layer_widths:
            raise ValueError("IPAdapter: layer_widths must have at least one entry")
        if self.shortcut and self.projection != "face_resampler":
            raise ValueError(f"IPAdapter: shortcut is of projection='face_resampler', not of {self.projection!r}")

    @property
    def takes_states(self) -> bool:
        """Whether an image is a sequence of hidden states ``[T,D]`` instead of one embedding ``[D]``."""
        return self.projection in ("mlp", "resampler")

    @property
    def takes_faces(self) -> bool:
        """Whether an image is a face's embedding together with hidden states."""
        return self.projection == "face_resampler"


class ImageStates(NamedTuple):
    """Keys and values of images for each cross-attention of a UNet, each ``[B,images,tokens,width]``."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


class Layer(nn.Module):
    """Base of the layers below: two dtypes, and dense layers and norms with them."""

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def dense(self, width: int, name: str, x: jax.Array, *, bias: bool = True) -> jax.Array:
        return Dense(width, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name)(x)

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        return LayerNorm(dtype=self.dtype, param_dtype=self.param_dtype, name=name)(x)


class ResamplerLayer(Layer):
    """Latents ``[B,Q,D]`` attend to the states ``[B,T,D]`` and to themselves; then a feed-forward layer."""

    heads: int = 12
    mlp_width: int = 3072

    @nn.compact
    def __call__(self, states: jax.Array, latents: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        latents = latents + ResamplerAttention(heads=self.heads, **dtypes, name="0")(states, latents)
        h = self.dense(self.mlp_width, "1_1", self.norm("1_0", latents), bias=False)
        return latents + self.dense(latents.shape[-1], "1_3", ACTIVATIONS["gelu"](h), bias=False)


class ResamplerAttention(Layer):
    """The attention of :class:`ResamplerLayer`, without the residual (Alayrac et al. 2022, 3.1.1)."""

    heads: int = 12

    @nn.compact
    def __call__(self, states: jax.Array, latents: jax.Array) -> jax.Array:
        width = self.heads * HEAD_WIDTH
        queries = self.norm("norm2", latents)
        context = jnp.concatenate([self.norm("norm1", states), queries], 1)
        split = lambda x: x.reshape(*x.shape[:2], self.heads, HEAD_WIDTH)
        query = split(self.dense(width, "to_q", queries, bias=False))
        key, value = map(split, jnp.split(self.dense(2 * width, "to_kv", context, bias=False), 2, -1))
        h = attention(query, key, value).reshape(*queries.shape[:2], width)
        return self.dense(latents.shape[-1], "to_out", h, bias=False)


class Resampler(Layer):
    """States ``[B,T,image_width]`` and latents ``[B,Q,hidden_width]`` to tokens ``[B,Q,cross_attention_dim]``."""

    config: IPAdapterConfig = IPAdapterConfig()

    @nn.compact
    def __call__(self, states: jax.Array, latents: jax.Array | None = None) -> jax.Array:
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        states = self.dense(c.hidden_width, "proj_in", states)
        if latents is None:
            shape = (1, c.tokens, c.hidden_width)
            own = parameter(self, "latents", nn.initializers.normal(c.hidden_width**-0.5), shape)
            latents = jnp.broadcast_to(jnp.asarray(own, self.dtype), (len(states), *shape[1:]))
        for i in range(c.depth):
            latents = ResamplerLayer(heads=c.heads, mlp_width=c.mlp_width, **dtypes, name=f"layers_{i}")(
                states, latents
            )
        return self.norm("norm_out", self.dense(c.cross_attention_dim, "proj_out", latents))


class ImageProjection(Layer):
    """One image, ``[B,D]`` or ``[B,T,D]``, to tokens ``[B,tokens,cross_attention_dim]``."""

    config: IPAdapterConfig = IPAdapterConfig()

    @nn.compact
    def __call__(self, image: jax.Array, states: jax.Array | None, shortcut_scale: jax.Array) -> jax.Array:
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        match c.projection:
            case "linear":
                tokens = self.dense(c.tokens * c.cross_attention_dim, "proj", image)
                return self.norm("norm", tokens.reshape(-1, c.tokens, c.cross_attention_dim))
            case "mlp":
                return self.norm("proj_3", self.two_layers(image, c.hidden_width, c.cross_attention_dim))
            case "face":
                tokens = self.two_layers(image, c.hidden_width, c.tokens * c.cross_attention_dim)
                return self.norm("norm", tokens.reshape(-1, c.tokens, c.cross_attention_dim))
            case "resampler":
                resampler = Resampler(config=c, **dtypes, name=None)
                nn.share_scope(self, resampler)
                return resampler(image)
        faces = self.two_layers(image, c.face_hidden_width, c.tokens * c.hidden_width)
        faces = self.norm("norm", faces.reshape(-1, c.tokens, c.hidden_width))
        assert states is not None
        tokens = Resampler(config=c, **dtypes, name="perceiver_resampler")(states, faces)
        return faces + jnp.asarray(shortcut_scale, tokens.dtype) * tokens if c.shortcut else tokens

    def two_layers(self, x: jax.Array, hidden: int, width: int) -> jax.Array:
        return self.dense(width, "proj_2", ACTIVATIONS["gelu"](self.dense(hidden, "proj_0", x)))


class KeyValue(Layer):
    """Tokens ``[B,N,T,D]`` to keys and values of one cross-attention, each ``[B,N,T,width]``."""

    width: int = 320

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        project = lambda name: self.dense(self.width, name, tokens, bias=False)
        return project("to_k_ip"), project("to_v_ip")


class IPAdapter(Model):
    """Computes keys and values of images for a UNet, once for all steps; the names are those of published files.

    A folder that :meth:`save_pretrained` writes is opened by PyTorch diffusers with
    ``pipe.load_ip_adapter(folder, subfolder="", weight_name="diffusion_pytorch_model.safetensors")``.
    """

    config: IPAdapterConfig = IPAdapterConfig()
    config_class: ClassVar[type[Config]] = IPAdapterConfig

    @classmethod
    def from_single_file(
        cls,
        path: str | pathlib.Path,
        *,
        config: str | pathlib.Path | Mapping[str, Any] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        mesh: Mesh | str | None = None,
    ) -> tuple[Self, Params]:
        """The IP-Adapter of a published file, such as ``ip-adapter_sd15.safetensors`` or ``ip-adapter-plus_sd15.bin``.

        Args:
          path: the file; all sizes are read off its tensors.
          config: what the tensors do not show: ``{"shortcut": True}`` for version 2 of face ID plus.
          dtype, param_dtype, mesh: as in :meth:`from_pretrained`.

        Raises:
          WeightsError: a damaged file, one without an IP-Adapter, or tensors that do not fit it one to one.
          ValueError: ``dtype`` is not a floating-point type.
        """
        part = read_ip_adapter(path).part
        return open_part(cls, part, path, config=config, dtype=dtype, param_dtype=param_dtype, mesh=mesh)

    def example_inputs(self) -> dict[str, Any]:
        c = self.config
        array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        if c.takes_faces:
            return {"images": array(1, 1, c.face_width), "states": array(1, 1, 1, c.image_width)}
        return {"images": array(1, 1, 1, c.image_width) if c.takes_states else array(1, 1, c.image_width)}

    @nn.compact
    def __call__(
        self, images: jax.Array, states: jax.Array | None = None, shortcut_scale: jax.Array | float = 1.0
    ) -> ImageStates:
        """Keys and values of ``N`` images for each element of the batch.

        Args:
          images: embeddings ``[B,N,image_width]`` (of faces ``[B,N,face_width]``), or hidden states
            ``[B,N,T,image_width]`` for the projections "mlp" and "resampler".
          states: for "face_resampler", hidden states of the image encoder too, ``[B,N,T,image_width]``.
          shortcut_scale: with ``shortcut``, the strength of what ``states`` add to the face.

        Returns: arrays ``[B,N,tokens,width]`` in ``dtype``.

        Raises:
          ValueError: an input is missing, or its shape does not match the configuration.
        """
        c = self.config
        _check(c, images, states)
        B, N = images.shape[:2]
        merged = lambda x: None if x is None else jnp.asarray(x, self.dtype).reshape(B * N, *x.shape[2:])
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        project = ImageProjection(config=c, **dtypes, name="image_proj")
        tokens = project(merged(images), merged(states), shortcut_scale)
        tokens = tokens.reshape(B, N, *tokens.shape[1:])
        pairs = [
            KeyValue(width=width, **dtypes, name=f"ip_adapter_{2 * i + 1}")(tokens)
            for i, width in enumerate(c.layer_widths)
        ]
        keys, values = zip(*pairs)
        return ImageStates(keys, values)


def _check(c: IPAdapterConfig, images: jax.Array, states: jax.Array | None) -> None:
    """Refuse inputs of other shapes than the configuration's."""
    width = c.face_width if c.takes_faces else c.image_width
    if images.ndim != 3 + c.takes_states or images.shape[-1] != width:
        wanted = f"[B,N,T,{width}] (hidden states)" if c.takes_states else f"[B,N,{width}]"
        raise ValueError(f"images of this IP-Adapter must be {wanted}, got {images.shape}")
    if (states is not None) != c.takes_faces:
        raise ValueError(
            f"an IP-Adapter with projection={c.projection!r} takes {'' if c.takes_faces else 'no '}states beside images"
        )
    if states is not None and (
        states.ndim != 4 or states.shape[:2] != images.shape[:2] or states.shape[-1] != c.image_width
    ):
        B, N = images.shape[:2]
        raise ValueError(f"states must be [{B},{N},T,{c.image_width}], got {states.shape}")
