"""Dtypes: what a network computes in, what it returns, and that nothing is promoted silently."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from diffuse_jax.models import (
    AsymmetricAutoencoderKL,
    AsymmetricAutoencoderKLConfig,
    AutoencoderKL,
    AutoencoderKLConfig,
    AutoencoderTiny,
    AutoencoderTinyConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ConsistencyDecoderVAE,
    ConsistencyDecoderVAEConfig,
    ControlNetConfig,
    ControlNetModel,
    DPTConfig,
    DPTForDepthEstimation,
    IPAdapter,
    IPAdapterConfig,
    Model,
    StableDiffusionSafetyChecker,
    T2IAdapter,
    T2IAdapterConfig,
    UNet2DConditionConfig,
    UNet2DConditionModel,
    UNet2DConfig,
    UNet2DModel,
    VQConfig,
    VQModel,
)
from diffuse_jax.models.bit import BitConfig
from diffuse_jax.models.dpt import DEFAULT_BACKBONE
from diffuse_jax.text import CLIPTextConfig, CLIPTextModelWithProjection
from tests.models.filling import random_params

UNET = UNet2DConditionConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
    num_attention_heads=4,
    norm_num_groups=4,
)
CONTROLNET = ControlNetConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    cross_attention_dim=24,
    num_attention_heads=4,
    norm_num_groups=4,
    conditioning_embedding_out_channels=(4, 8, 12),
)
VAE = AutoencoderKLConfig(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
)
CONSISTENCY_DECODER = ConsistencyDecoderVAEConfig(
    encoder_block_out_channels=(8, 16),
    encoder_down_block_types=("DownEncoderBlock2D",) * 2,
    encoder_norm_num_groups=4,
    decoder_block_out_channels=(8, 16),
    decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
    decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
    decoder_layers_per_block=1,
    decoder_norm_num_groups=4,
)
TEXT = CLIPTextConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TINY = AutoencoderTinyConfig(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 1),
    num_decoder_blocks=(1, 1),
)
ASYMMETRIC = AsymmetricAutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    down_block_out_channels=(8, 8),
    up_block_out_channels=(8, 16),
    norm_num_groups=4,
)
VQ = VQConfig(
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    block_out_channels=(8, 8),
    norm_num_groups=4,
    num_vq_embeddings=10,
)
MOVQ = VQ.replace(block_out_channels=(32, 32), norm_type="spatial")
VISION = CLIPVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
)
DEPTH = DPTConfig(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=64,
    backbone_out_indices=(0, 1, 2, 3),
    neck_hidden_sizes=(16, 32, 8, 8),
    fusion_hidden_size=8,
)
HYBRID = DEPTH.replace(
    is_hybrid=True,
    reassemble_factors=(1, 1, 1, 0.5),
    backbone_config=BitConfig.from_json(
        DEFAULT_BACKBONE | {"depths": [1, 1, 1], "hidden_sizes": [16, 32, 32], "embedding_size": 8, "num_groups": 4}
    ),
)
CONDITIONED = UNET.replace(
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=40,
    num_class_embeds=10,
    time_cond_proj_dim=8,
    resnet_time_scale_shift="scale_shift",
    center_input_sample=True,
    use_linear_projection=True,
)
K_BLOCKS = UNet2DConditionConfig(
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
    up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    mid_block_type=None,
    cross_attention_dim=24,
    num_attention_heads=16,
    norm_num_groups=None,
    time_embedding_type="fourier",
    timestep_post_act="gelu",
    time_cond_proj_dim=8,
)
NCSNPP = UNet2DConfig(
    block_out_channels=(32, 32),
    down_block_types=("SkipDownBlock2D",) * 2,
    up_block_types=("SkipUpBlock2D",) * 2,
    layers_per_block=1,
    norm_num_groups=None,
    time_embedding_type="fourier",
    attention_head_dim=None,
)
NETWORKS = {
    "unet": (UNet2DConditionModel, UNET),
    "unet with every condition": (UNet2DConditionModel, CONDITIONED),
    "unet of K blocks": (UNet2DConditionModel, K_BLOCKS),
    "NCSN++": (UNet2DModel, NCSNPP),
    "controlnet": (ControlNetModel, CONTROLNET),
    "controlnet with means": (ControlNetModel, CONTROLNET.replace(global_pool_conditions=True, num_class_embeds=10)),
    "T2I-Adapter": (T2IAdapter, T2IAdapterConfig(channels=(8, 12), num_res_blocks=1)),
    "light T2I-Adapter": (T2IAdapter, T2IAdapterConfig(channels=(8, 12), adapter_type="light_adapter")),
    "IP-Adapter": (IPAdapter, IPAdapterConfig(projection="face_resampler", layer_widths=(16, 32), depth=1)),
    "IP-Adapter plus": (IPAdapter, IPAdapterConfig(projection="resampler", layer_widths=(16, 32), depth=1)),
    "autoencoder": (AutoencoderKL, VAE),
    "tiny autoencoder": (AutoencoderTiny, TINY),
    "tiny autoencoder with norms": (AutoencoderTiny, TINY.replace(use_midblock_gn=True, upsample_fn="bilinear")),
    "asymmetric autoencoder": (AsymmetricAutoencoderKL, ASYMMETRIC),
    "quantised autoencoder": (VQModel, VQ),
    "MoVQ": (VQModel, MOVQ),
    "consistency decoder": (ConsistencyDecoderVAE, CONSISTENCY_DECODER),
    "text encoder": (CLIPTextModelWithProjection, TEXT),
    "depth estimator": (DPTForDepthEstimation, DEPTH),
    "hybrid depth estimator": (DPTForDepthEstimation, HYBRID),
    "vision encoder": (CLIPVisionModelWithProjection, VISION),
}
DTYPES = [jnp.float32, jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)]


def parameter_shapes(model: Model, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), model.shapes())


def dtypes_inside(jaxpr: Any) -> Iterator[Any]:
    """The dtype of every value that a traced program makes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.dtype for v in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from dtypes_inside(inner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_value_is_promoted(name: str, dtype: Any) -> None:
    """Under strict promotion, and with 64-bit types allowed, nothing mixes dtypes and nothing becomes float64."""
    kind, config = NETWORKS[name]
    model = kind(config, dtype=dtype)
    forward = lambda params, inputs: model.apply({"params": params}, **inputs)
    shapes, inputs = parameter_shapes(model, dtype), model.example_inputs()
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        program, outputs = jax.make_jaxpr(forward, return_shape=True)(shapes, inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(dtype)}
    assert jnp.dtype(jnp.float64) not in set(dtypes_inside(program.jaxpr))


def test_the_safety_checker_compares_in_float32() -> None:
    model = StableDiffusionSafetyChecker(VISION, dtype=jnp.bfloat16)
    forward = lambda params, x: model.apply({"params": params}, x)
    shapes = parameter_shapes(model, jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        program, flags = jax.make_jaxpr(forward, return_shape=True)(shapes, *model.example_inputs().values())
    assert flags.dtype == jnp.bool_
    assert jnp.dtype(jnp.float64) not in set(dtypes_inside(program.jaxpr))
    compared = [e for e in program.jaxpr.eqns if e.primitive.name in ("gt", "dot_general")][-3:]
    assert {v.aval.dtype for e in compared for v in e.invars} == {jnp.dtype(jnp.float32)}


def test_posterior_is_float32_whatever_the_network_computes_in() -> None:
    model = AutoencoderKL(VAE, dtype=jnp.bfloat16)
    encode = lambda params, x: model.apply({"params": params}, x, method="encode")
    image = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.bfloat16)
    posterior = jax.eval_shape(encode, parameter_shapes(model, jnp.bfloat16), image)
    assert posterior.mean.dtype == posterior.logvar.dtype == jnp.float32


@pytest.mark.slow
def test_bfloat16_stays_near_float32(rng: np.random.Generator) -> None:
    """bfloat16 rounds to 2^-9 of a value; through some thirty layers that adds up to a few per cent, not more."""
    inputs = {
        "sample": jnp.asarray(rng.standard_normal((2, 8, 8, 4)), jnp.float32),
        "timesteps": jnp.array([10, 900]),
        "encoder_hidden_states": jnp.asarray(rng.standard_normal((2, 5, 24)), jnp.float32),
    }
    exact = UNet2DConditionModel(UNET)
    params = random_params(exact.shapes(), rng)
    run = lambda model, p: jax.jit(lambda p, i: model.apply({"params": p}, **i))(p, inputs)
    expected = np.asarray(run(exact, params))
    output = run(UNet2DConditionModel(UNET, dtype=jnp.bfloat16), jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    assert output.dtype == jnp.bfloat16
    error = np.asarray(output, np.float32) - expected
    assert np.sqrt(np.mean(error**2)) < 0.03 * expected.std()
