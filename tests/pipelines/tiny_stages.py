"""Tiny pipelines with image embeddings or semantic maps between their stages, in memory, with random weights."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import transformers

from diffuse_jax import models
from diffuse_jax.models import presets
from diffuse_jax.pipelines import (
    DiffusionPipeline,
    KandinskyCombinedPipeline,
    KandinskyPipeline,
    KandinskyPriorPipeline,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    StableDiffusionPipeline,
    StableUnCLIPImg2ImgPipeline,
    StableUnCLIPPipeline,
    UnCLIPImageVariationPipeline,
    UnCLIPPipeline,
    WuerstchenCombinedPipeline,
    WuerstchenDecoderPipeline,
    WuerstchenPriorPipeline,
)
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.processors import CLIPImageProcessor
from diffuse_jax.schedulers import DDIMScheduler, DDPMScheduler, DDPMWuerstchenScheduler, UnCLIPScheduler
from diffuse_jax.text import CLIPTextModelWithProjection, MultilingualCLIP
from diffuse_jax.text.presets import M_CLIP
from tests.models.filling import random_params

WIDTH = 16
"""Of embeddings of images and prompts."""

VISION = models.CLIPVisionConfig(
    hidden_size=16,
    intermediate_size=16,
    num_attention_heads=2,
    num_hidden_layers=1,
    image_size=16,
    patch_size=8,
    projection_dim=WIDTH,
)
PRIOR = presets.UNCLIP_PRIOR.replace(
    num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=WIDTH, num_embeddings=16
)
LEVEL: dict[str, Any] = {"block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 4}
"""Of UNets."""

SMALL: dict[str, Any] = LEVEL | {
    "sample_size": 8,
    "down_block_types": ("SimpleCrossAttnDownBlock2D",),
    "up_block_types": ("SimpleCrossAttnUpBlock2D",),
    "cross_attention_dim": 16,
    "num_attention_heads": 8,
}
LARGE: dict[str, Any] = LEVEL | {
    "sample_size": 16,
    "down_block_types": ("ResnetDownsampleBlock2D",),
    "up_block_types": ("ResnetUpsampleBlock2D",),
}
TEXT_PROJ = models.UnCLIPTextProjConfig(clip_embeddings_dim=WIDTH, time_embed_dim=64, cross_attention_dim=16)
MOVQ = presets.MOVQ.replace(
    block_out_channels=(32,) * 2,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    num_vq_embeddings=8,
    norm_num_groups=4,
)
SEMANTIC_PRIOR = models.WuerstchenPriorConfig(c_in=4, c=16, c_cond=WIDTH, c_r=8, depth=1, nhead=2)
SEMANTIC_DECODER = models.WuerstchenDiffNeXtConfig(
    c_hidden=(8, 16),
    nhead=(-1, 2),
    blocks=(1, 1),
    level_config=("CT", "CTA"),
    inject_effnet=(False, True),
    c_cond=12,
    clip_embd=WIDTH,
    effnet_embd=4,
    c_r=8,
)
PAELLA = models.PaellaVQConfig(embed_dim=16, bottleneck_blocks=1, num_vq_embeddings=16)


class Parts:
    """Networks with parameters, and the rest of what the pipelines below are made of.

    Attributes:
      base: what Stable Diffusion's parts are taken from.
    """

    def __init__(self, base: StableDiffusionPipeline) -> None:
        self.base, self.rng = base, np.random.default_rng(0)
        self.tokenizer, self.text = base.components["tokenizer"], base.components["text_encoder"]
        config = self.text.config.replace(projection_dim=WIDTH)
        self.projected = self.filled(CLIPTextModelWithProjection(config))
        self.encoder = self.filled(models.CLIPVisionModelWithProjection(VISION))
        self.prior = self.filled(models.PriorTransformer(PRIOR))
        self.processor = CLIPImageProcessor(size=16, crop_size=(16, 16))
        self.sampler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)

    def filled(self, network: Any) -> tuple[Any, Any]:
        return network, random_params(network.shapes(), self.rng)

    def made(self, kind: Any, **parts: Any) -> Any:
        """A pipeline with programs of its own; networks are given with their parameters."""
        pairs = {name: part for name, part in parts.items() if isinstance(part, tuple)}
        components = parts | {name: network for name, (network, _) in pairs.items()}
        return kind(components, {name: params for name, (_, params) in pairs.items()}, programs=Programs())

    def karlo(self) -> tuple[UnCLIPPipeline, UnCLIPImageVariationPipeline]:
        """Text to image, and image variation."""
        larger = lambda: self.filled(models.UNet2DModel(presets.KARLO_SUPER_RESOLUTION_UNET.replace(**LARGE)))
        shared = {
            "decoder": self.filled(models.UNet2DConditionModel(presets.KARLO_UNET.replace(**SMALL))),
            "text_encoder": self.projected,
            "tokenizer": self.tokenizer,
            "text_proj": self.filled(models.UnCLIPTextProjModel(TEXT_PROJ)),
            "super_res_first": larger(),
            "super_res_last": larger(),
            "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
            "super_res_scheduler": UnCLIPScheduler(),
        }
        seen = {"feature_extractor": self.processor, "image_encoder": self.encoder}
        return (
            self.made(UnCLIPPipeline, **shared, prior=self.prior, prior_scheduler=self.sampler),
            self.made(UnCLIPImageVariationPipeline, **shared, **seen),
        )

    def stable_unclip(self) -> tuple[StableUnCLIPPipeline, StableUnCLIPImg2ImgPipeline]:
        """Text to image, and image variation."""
        config = self.base.components["unet"].config.replace(
            class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH
        )
        both = lambda name: (self.base.components[name], self.base.params[name])
        normalizer = models.StableUnCLIPImageNormalizerConfig(embedding_dim=WIDTH)
        shared = {
            "image_normalizer": self.filled(models.StableUnCLIPImageNormalizer(normalizer)),
            "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            "tokenizer": self.tokenizer,
            "text_encoder": both("text_encoder"),
            "unet": self.filled(models.UNet2DConditionModel(config)),
            "scheduler": self.base.scheduler,
            "vae": both("vae"),
        }
        prior = {"prior": self.prior, "prior_text_encoder": self.projected, "prior_tokenizer": self.tokenizer}
        prior["prior_scheduler"] = DDPMScheduler(prediction_type="sample")
        seen = {"feature_extractor": self.processor, "image_encoder": self.encoder}
        return (
            self.made(StableUnCLIPPipeline, **shared, **prior),
            self.made(StableUnCLIPImg2ImgPipeline, **shared, **seen),
        )

    def kandinsky(self) -> tuple[KandinskyCombinedPipeline, KandinskyV22CombinedPipeline]:
        """2.1 and 2.2, both stages in one."""
        stage = {
            "prior": self.prior,
            "image_encoder": self.encoder,
            "text_encoder": self.projected,
            "tokenizer": self.tokenizer,
            "scheduler": self.sampler,
            "image_processor": self.processor,
        }
        words = multilingual_tokenizer()
        width = {"hidden_size": 32, "transformerDimensions": 32, "numDims": WIDTH, "intermediate_size": 32}
        reader = M_CLIP.replace(
            vocab_size=len(words), num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=80, **width
        )
        unet = lambda preset, width: self.filled(
            models.UNet2DConditionModel(preset.replace(**SMALL, encoder_hid_dim=width))
        )
        movq = self.filled(models.VQModel(MOVQ))
        first = self.made(
            KandinskyPipeline,
            text_encoder=self.filled(MultilingualCLIP(reader)),
            tokenizer=words,
            unet=unet(presets.KANDINSKY21_UNET, reader.transformerDimensions),
            scheduler=DDIMScheduler(),
            movq=movq,
        )
        second = self.made(
            KandinskyV22Pipeline,
            unet=unet(presets.KANDINSKY22_UNET, WIDTH),
            scheduler=DDPMScheduler(variance_type="learned_range"),
            movq=movq,
        )
        return (
            KandinskyCombinedPipeline.from_stages(self.made(KandinskyPriorPipeline, **stage), first),
            KandinskyV22CombinedPipeline.from_stages(self.made(KandinskyV22PriorPipeline, **stage), second),
        )

    def wuerstchen(self) -> WuerstchenCombinedPipeline:
        """Both stages in one."""
        text = {
            "text_encoder": (self.text, self.base.params["text_encoder"]),
            "tokenizer": self.tokenizer,
            "scheduler": DDPMWuerstchenScheduler(),
        }
        vqgan, params = self.filled(models.PaellaVQModel(PAELLA))
        params["down_blocks_3"]["1"]["running_var"] = np.ones(4, np.float32)
        prior = self.made(WuerstchenPriorPipeline, **text, prior=self.filled(models.WuerstchenPrior(SEMANTIC_PRIOR)))
        decoder = self.filled(models.WuerstchenDiffNeXt(SEMANTIC_DECODER))
        second: DiffusionPipeline = self.made(WuerstchenDecoderPipeline, **text, decoder=decoder, vqgan=(vqgan, params))
        object.__setattr__(second, "options", {"latent_dim_scale": 8.0})
        return WuerstchenCombinedPipeline.from_stages(prior, second)


def multilingual_tokenizer() -> transformers.XLMRobertaTokenizer:
    """Single letters."""
    special = [(word, 0.0) for word in ("<s>", "<pad>", "</s>", "<unk>")]
    letters = [(letter, -3.0) for letter in string.ascii_lowercase]
    return transformers.XLMRobertaTokenizer(vocab=[*special, ("▁", -2.0), *letters, ("<mask>", 0.0)])
