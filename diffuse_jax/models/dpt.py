"""Monocular depth by a vision transformer whose layers are read at several depths (DPT; Ranftl et al. 2021)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.allowed import Index, Layers, Range, Share
from diffuse_jax.config import NO_DROPOUT, NOT_QUANTIZED, Config
from diffuse_jax.kernels import attention
from diffuse_jax.messages import brief
from diffuse_jax.models.base import Model
from diffuse_jax.models.bit import STRIDE, BitBackbone, BitConfig
from diffuse_jax.models.clip_layers import HARMLESS
from diffuse_jax.models.layers import ACTIVATIONS, Conv, Dense, LayerNorm, parameter
from diffuse_jax.models.one_file import OneFile
from diffuse_jax.models.resampling import bilinear

READOUTS = ("ignore", "add", "project")
HEAD_WIDTH = 32
MAX_EDGE = 2048
"""The largest map of features, in pixels per side: weights for resizing are computed when the network is traced."""
SEGMENTATION = ("auxiliary_loss_weight", "semantic_classifier_dropout", "semantic_loss_ignore_index")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPTConfig(Config):
    """``config.json`` of a depth estimator, as transformers writes it.

    With ``is_hybrid`` (DPT-hybrid, Stable Diffusion 2's depth model) a convolutional backbone comes before the
    transformer, and its first two stages take the place of two of the layers that are read.
    """

    fixed: ClassVar[Mapping[str, Any]] = {
        **NOT_QUANTIZED,
        "use_batch_norm_in_fusion_residual": False,
        "backbone": None,
        "pruned_heads": {},
    }
    harmless: ClassVar[Mapping[str, str]] = {
        **HARMLESS,
        **dict.fromkeys(("attention_probs_dropout_prob", "hidden_dropout_prob"), NO_DROPOUT),
        **dict.fromkeys((*SEGMENTATION, "use_auxiliary_head"), "for segmentation"),
        **dict.fromkeys(("pooler_act", "pooler_output_size"), "depth estimators have no pooled output"),
        **dict.fromkeys(("backbone_kwargs", "use_pretrained_backbone", "use_timm_backbone"), "of other backbones"),
        "backbone_featmap_shape": "follows from the backbone",
        "neck_ignore_stages": "the backbone's stages, where there is one",
    }

    hidden_size: int = 768
    num_hidden_layers: Layers = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: Share = 1e-12
    image_size: int = 384
    patch_size: int = 16
    num_channels: int = 3
    is_hybrid: bool = False
    qkv_bias: bool = True
    backbone_out_indices: tuple[Index, ...] = (2, 5, 8, 11)
    readout_type: str = "project"
    reassemble_factors: tuple[Annotated[float, Range(1 / 64, 64)], ...] = (4, 2, 1, 0.5)
    neck_hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    fusion_hidden_size: int = 256
    head_in_index: Annotated[int, Range(-64, 63)] = -1
    use_bias_in_fusion_residual: bool | None = None
    add_projection: bool = False
    backbone_config: BitConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.neck_hidden_sizes)
        if self.hidden_act not in ACTIVATIONS or self.readout_type not in READOUTS:
            raise ValueError(
                f"DPT: hidden_act={self.hidden_act!r} (expected one of {sorted(ACTIVATIONS)}), "
                f"readout_type={self.readout_type!r} (expected one of {READOUTS})"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"DPT: hidden_size {self.hidden_size} over {self.num_attention_heads} heads")
        if not count == len(self.backbone_out_indices) == len(self.reassemble_factors):
            raise ValueError(
                f"DPT: {count} neck_hidden_sizes, {len(self.backbone_out_indices)} backbone_out_indices and "
                f"{len(self.reassemble_factors)} reassemble_factors; there must be as many of each"
            )
        if max(self.layers_read, default=-1) >= self.num_hidden_layers or not -count <= self.head_in_index < count:
            raise ValueError(
                f"DPT: backbone_out_indices={list(self.backbone_out_indices)} of {self.num_hidden_layers} layers, "
                f"head_in_index={self.head_in_index} of {count}"
            )
        for factor in self.reassemble_factors:
            if int(max(factor, 1 / factor)) != max(factor, 1 / factor):
                raise ValueError(f"DPT: reassemble_factors must be whole numbers or 1 over one, got {factor}")
        self._check_backbone()
        edge = self.image_size // self.patch_size
        finest = max(edge * max(self.reassemble_factors), self.image_size / 4 if self.is_hybrid else 0)
        if not edge >= 1 or finest > MAX_EDGE:
            raise ValueError(
                f"DPT: image_size={self.image_size}, patch_size={self.patch_size} and reassemble_factors="
                f"{brief(self.reassemble_factors)} make maps of {finest:g} pixels per side; from 1 to {MAX_EDGE} work"
            )

    def _check_backbone(self) -> None:
        if self.is_hybrid != (self.backbone_config is not None):
            raise ValueError(f"DPT: is_hybrid={self.is_hybrid} with backbone_config={self.backbone_config}")
        if self.backbone_config is None:
            return
        widths = self.backbone_config.widths
        if self.readout_type != "project" or widths[:2] != self.neck_hidden_sizes[:2]:
            raise ValueError(
                f"DPT: a hybrid needs readout_type 'project' and neck_hidden_sizes that begin with {widths[:2]}, "
                f"got {self.readout_type!r} and {self.neck_hidden_sizes}"
            )
        if self.patch_size != STRIDE or self.image_size % STRIDE:
            raise ValueError(
                f"DPT: a hybrid has patches of {STRIDE} pixels, got {self.patch_size} of {self.image_size}"
            )

    @property
    def layers_read(self) -> tuple[int, ...]:
        """The transformer's layers whose outputs are read, in order."""
        indices = self.backbone_out_indices[2:] if self.is_hybrid else self.backbone_out_indices
        return tuple(sorted(set(indices)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        if data.get("model_type", "dpt") != "dpt":
            raise ValueError(f"expected the config of a DPT, got model_type={data['model_type']!r}")
        backbone = data.get("backbone_config")
        if backbone is None and data.get("is_hybrid"):
            backbone = DEFAULT_BACKBONE
        return super().from_json({**data, "backbone_config": backbone and BitConfig.from_json(backbone)})

    def to_json(self) -> dict[str, Any]:
        backbone = self.backbone_config
        return super().to_json() | {"backbone_config": backbone and {**backbone.to_json(), "model_type": "bit"}}


DEFAULT_BACKBONE: Mapping[str, Any] = {
    "global_padding": "same",
    "layer_type": "bottleneck",
    "depths": [3, 4, 9],
    "out_features": ["stage1", "stage2", "stage3"],
    "embedding_dynamic_padding": True,
}
"""The backbone of a hybrid whose file does not describe one."""


class DPTForDepthEstimation(OneFile, Model):
    """Relative depth of every pixel, larger where it is nearer."""

    config: DPTConfig = DPTConfig()
    config_class: ClassVar[type[Config]] = DPTConfig
    weights_name: ClassVar[str] = "model"
    model_type: ClassVar[str] = "dpt"

    def setup(self) -> None:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.dpt = Backbone(self.config, **dtypes)
        self.neck = Neck(self.config, **dtypes)
        self.head = DepthHead(self.config, **dtypes)

    def example_inputs(self) -> dict[str, Any]:
        c = self.config
        return {"pixel_values": jax.ShapeDtypeStruct((1, c.image_size, c.image_size, c.num_channels), jnp.float32)}

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """``pixel_values [B,H,W,C]``, normalised by the image processor -> relative depth in ``dtype``.

        The depth is ``[B,H,W]``, or finer where patches are smaller than the 16 pixels of all published estimators.
        Images must be square, with edges that are multiples of ``patch_size``; a hybrid takes only ``image_size``.

        Raises:
          ValueError: another shape.
        """
        c = self.config
        square = pixel_values.ndim == 4 and pixel_values.shape[1] == pixel_values.shape[2]
        size = pixel_values.shape[1] if square else 0
        fits = size == c.image_size or (size > 0 and size % c.patch_size == 0 and not c.is_hybrid)
        if not fits or pixel_values.shape[-1] != c.num_channels:
            edge = c.image_size if c.is_hybrid else f"a multiple of {c.patch_size}"
            raise ValueError(
                f"pixel_values must be [B,H,W,{c.num_channels}] (channel-last) with H = W = {edge}, got "
                f"{pixel_values.shape}"
            )
        return self.head(self.neck(self.dpt(jnp.asarray(pixel_values, self.dtype))))


class Part(nn.Module):
    """Base of the estimator's parts: a config and two dtypes."""

    config: DPTConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def dtypes(self) -> Mapping[str, DTypeLike]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def dense(self, features: int, name: str, **options: Any) -> Dense:
        return Dense(features, **options, **self.dtypes, name=name)

    def conv(self, features: int, name: str, size: int = 3, **options: Any) -> Conv:
        padding = options.pop("padding", size // 2)
        return Conv(features, size, padding=padding, **options, **self.dtypes, name=name)

    def norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.config.layer_norm_eps, **self.dtypes, name=name)


class Backbone(Part):
    """Embeddings and transformer; the outputs that the neck reads: maps ``[B,h,w,C]``, then tokens ``[B,1+N,D]``."""

    @nn.compact
    def __call__(self, images: jax.Array) -> list[jax.Array]:
        x, features = Embeddings(self.config, **self.dtypes, name="embeddings")(images)
        states = Encoder(self.config, **self.dtypes, name="encoder")(x)
        self.norm("layernorm")(states[-1])  # checkpoints have it; only the pooled output would be normalised
        return features + [states[i] for i in self.config.layers_read]


class Embeddings(Part):
    """Class token and patches (of the image, or of the backbone's features) plus position, and the other features."""

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        c, features = self.config, []
        if c.backbone_config is None:
            x = PatchEmbeddings(c, **self.dtypes, name="patch_embeddings")(images)
        else:
            *features, last = BitBackbone(c.backbone_config, **self.dtypes, name="backbone")(images)
            x = self.conv(c.hidden_size, "projection", 1)(last)
        B, h, w, D = x.shape
        grid = c.image_size // c.patch_size
        token = parameter(self, "cls_token", nn.initializers.zeros_init(), (1, 1, D))
        shape = (1, 1 + grid * grid, D)
        table = parameter(self, "position_embeddings", nn.initializers.normal(0.02), shape)
        token, table = jnp.asarray(token, self.dtype), jnp.asarray(table, self.dtype)
        positions = bilinear(table[:, 1:].reshape(1, grid, grid, D), (h, w)).reshape(1, h * w, D)
        first = jnp.broadcast_to(token + table[:, :1], (B, 1, D))
        return jnp.concatenate([first, x.reshape(B, h * w, D) + positions], axis=1), features


class PatchEmbeddings(Part):
    """A projection of each patch, ``[B,H,W,C] -> [B,h,w,D]``."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        c = self.config
        return self.conv(c.hidden_size, "projection", c.patch_size, stride=c.patch_size, padding=0)(images)


class Encoder(Part):
    """All layers; the output of each."""

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        states = []
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, **self.dtypes, name=f"layer_{i}")(x)
            states.append(x)
        return states


class Layer(Part):
    """Self-attention and a two-layer perceptron, each after a norm and with a residual, under ViT's names."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = x + Attention(c, **self.dtypes, name="attention")(self.norm("layernorm_before")(x))
        h = Projection(c, **self.dtypes, features=c.intermediate_size, name="intermediate")(
            self.norm("layernorm_after")(x)
        )
        h = ACTIVATIONS[c.hidden_act](h)
        return x + Projection(c, **self.dtypes, features=c.hidden_size, name="output")(h)


class Attention(Part):
    """Self-attention and its output projection."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = HeadAttention(self.config, **self.dtypes, name="attention")(x)
        return Projection(self.config, **self.dtypes, features=x.shape[-1], name="output")(h)


class HeadAttention(Part):
    """Multi-head self-attention without an output projection."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, L, D = x.shape
        heads, bias = self.config.num_attention_heads, bool(self.config.qkv_bias)
        project = lambda name: self.dense(D, name, use_bias=bias)(x).reshape(B, L, heads, D // heads)
        return attention(project("query"), project("key"), project("value")).reshape(B, L, D)


class Projection(Part):
    """One dense layer, a level deeper in the checkpoint's names."""

    features: int = 0
    layer: str = "dense"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(self.features, self.layer)(x)


class Neck(Part):
    """Turns the hidden states into maps of several resolutions, and fuses them from coarse to fine."""

    @nn.compact
    def __call__(self, states: list[jax.Array]) -> list[jax.Array]:
        c = self.config
        maps = Reassemble(c, **self.dtypes, name="reassemble_stage")(states)
        maps = [self.conv(c.fusion_hidden_size, f"convs_{i}", use_bias=False)(x) for i, x in enumerate(maps)]
        return Fusion(c, **self.dtypes, name="fusion_stage")(maps)


class Reassemble(Part):
    """Tokens -> maps ``[B,h,w,C]``, with the class token mixed into each position; maps of a backbone stay."""

    @nn.compact
    def __call__(self, states: list[jax.Array]) -> list[jax.Array]:
        c, maps = self.config, []
        for i, x in enumerate(states):
            if x.ndim == 3:
                x = self.read_out(x, i)
                width, factor = c.neck_hidden_sizes[i], c.reassemble_factors[i]
                resize = ReassembleLayer(c, **self.dtypes, width=width, factor=factor, name=f"layers_{i}")
                edge = math.isqrt(x.shape[1])
                x = resize(x.reshape(x.shape[0], edge, edge, x.shape[2]))
            maps.append(x)
        return maps

    def read_out(self, x: jax.Array, i: int) -> jax.Array:
        """``[B,1+N,D] -> [B,N,D]`` by ``readout_type``."""
        token, x = x[:, :1], x[:, 1:]
        match self.config.readout_type:
            case "ignore":
                return x
            case "add":
                return x + token
        both = jnp.concatenate([x, jnp.broadcast_to(token, x.shape)], axis=-1)
        name, features = f"readout_projects_{i}", x.shape[-1]
        project = Projection(self.config, **self.dtypes, features=features, layer="0", name=name)
        return ACTIVATIONS[self.config.hidden_act](project(both))


class ReassembleLayer(Part):
    """A pointwise convolution, then ``factor`` times the resolution."""

    width: int = 0
    factor: float = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(self.width, "projection", 1)(x)
        if self.factor > 1:
            return Enlarge(int(self.factor), **self.dtypes, name="resize")(x)
        return x if self.factor == 1 else self.conv(self.width, "resize", stride=int(1 / self.factor))(x)


class Enlarge(nn.Module):
    """A transposed convolution in which each pixel becomes a square, ``[B,H,W,C] -> [B,fH,fW,C]``.

    Its kernel is ``[f,f,out,in]``: PyTorch has inputs first for transposed convolutions.
    """

    factor: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        (B, H, W, C), f = x.shape, self.factor
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (f, f, C, C))
        bias = parameter(self, "bias", nn.initializers.zeros_init(), (C,))
        y = jnp.einsum("bhwc,ijoc->bhiwjo", x, jnp.asarray(kernel, self.dtype))
        return y.reshape(B, H * f, W * f, C) + jnp.asarray(bias, self.dtype).reshape(1, 1, 1, -1)


class Fusion(Part):
    """From the last map to the first: add it, refine, double the resolution."""

    @nn.compact
    def __call__(self, maps: list[jax.Array]) -> list[jax.Array]:
        fused: list[jax.Array] = []
        for i, x in enumerate(reversed(maps)):
            layer = FusionLayer(self.config, **self.dtypes, name=f"layers_{i}")
            fused.append(layer(fused[-1], x) if fused else layer(x, None))
        return fused


class FusionLayer(Part):
    """Adds a refined map to the fused ones, refines the sum and doubles its resolution."""

    @nn.compact
    def __call__(self, x: jax.Array, finer: jax.Array | None) -> jax.Array:
        refine = lambda name: Refine(self.config, **self.dtypes, name=name)
        size = (x.shape[1], x.shape[2])
        # The first has nothing to add, but checkpoints have the parameters; their output is dropped.
        refined = refine("residual_layer1")(x if finer is None else bilinear(finer, size))
        x = refine("residual_layer2")(x if finer is None else x + refined)
        x = bilinear(x, (2 * size[0], 2 * size[1]), align_corners=True)
        return self.conv(self.config.fusion_hidden_size, "projection", 1)(x)


class Refine(Part):
    """Two convolutions, each after a rectifier, and a residual."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bias = self.config.use_bias_in_fusion_residual is not False
        conv = lambda name: self.conv(self.config.fusion_hidden_size, name, use_bias=bias)
        return x + conv("convolution2")(nn.relu(conv("convolution1")(nn.relu(x))))


class DepthHead(Part):
    """The depth of every pixel, from one of the fused maps at half the resolution."""

    @nn.compact
    def __call__(self, fused: list[jax.Array]) -> jax.Array:
        c = self.config
        x = fused[c.head_in_index]
        if c.add_projection:
            x = nn.relu(self.conv(c.fusion_hidden_size, "projection")(x))
        x = self.conv(c.fusion_hidden_size // 2, "head_0")(x)
        x = bilinear(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=True)
        x = nn.relu(self.conv(HEAD_WIDTH, "head_2")(x))
        return nn.relu(self.conv(1, "head_4", 1)(x))[..., 0]
