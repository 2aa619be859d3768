"""Tiny Stable Diffusion folders with random weights, written by PyTorch diffusers, to compare the pipelines on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer  # noqa: E402

latent_diffusion = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")

SD_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "projection_dim": 32,
}
UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
}
VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "sample_size": 32,
}
UNET_XL = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}


def images(count: int, edge: int) -> list[Image.Image]:
    """Blurred colours, different in each image."""
    rng = np.random.default_rng(7)
    small = [Image.fromarray(rng.integers(0, 255, (5, 5, 3), np.uint8)) for _ in range(count)]
    return [image.resize((edge, edge), Image.Resampling.BICUBIC) for image in small]


def masks(edge: int) -> list[Image.Image]:
    """Two masks, of a rectangle inside and of the right half."""
    blank = np.zeros((2, edge, edge), np.uint8)
    blank[0, 6:25, 9:20] = blank[1, :, edge // 2 :] = 255
    return [Image.fromarray(mask) for mask in blank]


def tokenizer(**options: Any) -> Any:
    """A CLIP tokenizer of single characters."""
    letters = [chr(c) for c in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(letters + [c + "</w>" for c in letters] + words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16, **options)


def lively(module: Any) -> Any:
    """The module in eval mode, with noise on every parameter: no bias stays zero and no norm the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return module.eval()


def text_config(tok: Any, **changes: Any) -> Any:
    fields = TEXT | {"vocab_size": len(tok), "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}
    return transformers.CLIPTextConfig(**(fields | {"pad_token_id": tok.pad_token_id} | changes))


def stable_diffusion(folder: Path, *, v_prediction: bool = False) -> Path:
    """A folder like SD 1.x, or with ``v_prediction`` like SD 2.1 (linear projections, heads per level, velocity)."""
    torch.manual_seed(0)
    tok = tokenizer(pad_token="!") if v_prediction else tokenizer()
    act = "gelu" if v_prediction else "quick_gelu"
    changes = {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True}
    scheduler = SD_SCHEDULER | ({"prediction_type": "v_prediction"} if v_prediction else {"skip_prk_steps": True})
    if not v_prediction:
        scheduler.pop("clip_sample")
    kind = diffusers.DDIMScheduler if v_prediction else diffusers.PNDMScheduler
    pipe = diffusers.StableDiffusionPipeline(
        vae=lively(diffusers.AutoencoderKL(**VAE)),
        text_encoder=lively(transformers.CLIPTextModel(text_config(tok, hidden_act=act))),
        tokenizer=tok,
        unet=lively(diffusers.UNet2DConditionModel(**UNET | (changes if v_prediction else {}))),
        scheduler=kind(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


CONTROL = {k: v for k, v in UNET.items() if k not in ("sample_size", "up_block_types")} | {
    "conditioning_embedding_out_channels": (8, 16)  # two pixels for each latent, as the tiny autoencoder has
}


def control_net(seed: int, unet: Any = None) -> Any:
    """A ControlNet for Stable Diffusion 1, or for ``unet``, whose exits are far from zero, so that it matters."""
    torch.manual_seed(seed)
    copy = lambda: diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    net = lively(diffusers.ControlNetModel(**CONTROL) if unet is None else copy())
    with torch.no_grad():
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            layer.weight.mul_(8)
    return net


def controlled(folder: Path, nets: int) -> Path:
    """A folder like SD 1.x with one ControlNet or several."""
    plain = stable_diffusion(folder.with_name(f"{folder.name}-plain"))
    found = [control_net(k) for k in range(nets)]
    parts = {"controlnet": found if nets > 1 else found[0], "safety_checker": None, "feature_extractor": None}
    diffusers.StableDiffusionControlNetPipeline.from_pretrained(plain, **parts).save_pretrained(folder)
    return folder


def stable_diffusion_xl(folder: Path) -> Path:
    """A folder like SDXL base: two text encoders, size conditions, deeper transformers at the coarse level."""
    torch.manual_seed(0)
    tok, tok_2 = tokenizer(), tokenizer(pad_token="!")
    scheduler = {k: v for k, v in SD_SCHEDULER.items() if k not in ("clip_sample", "set_alpha_to_one")}
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=lively(diffusers.AutoencoderKL(**VAE, scaling_factor=0.13025)),
        text_encoder=lively(transformers.CLIPTextModel(text_config(tok))),
        text_encoder_2=lively(transformers.CLIPTextModelWithProjection(text_config(tok_2, hidden_act="gelu"))),
        tokenizer=tok,
        tokenizer_2=tok_2,
        unet=lively(diffusers.UNet2DConditionModel(**UNET_XL)),
        scheduler=diffusers.EulerDiscreteScheduler(**scheduler, timestep_spacing="leading"),
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def bert_tokenizer() -> Any:
    """A BERT tokenizer of single characters."""
    letters = [chr(c) for c in (*range(33, 65), *range(91, 127))]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=512)


def latent_diffusion_text(folder: Path, kind: str = "AutoencoderKL") -> Path:
    """A folder like CompVis/ldm-text2im-large-256, with an autoencoder of this class."""
    torch.manual_seed(0)
    tok, levels = bert_tokenizer(), 4  # the pipeline of diffusers takes eight pixels for each latent
    vae = VAE | {
        "block_out_channels": (16,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": 4,
        "sample_size": 64,
    }
    vae |= {"num_vq_embeddings": 32, "scaling_factor": 0.4} if kind == "VQModel" else {}
    bert = latent_diffusion.LDMBertConfig(
        vocab_size=len(tok), d_model=32, encoder_layers=2, encoder_ffn_dim=40, encoder_attention_heads=2, head_dim=8
    )
    pipe = diffusers.LDMTextToImagePipeline(
        vqvae=lively(getattr(diffusers, kind)(**vae)),
        bert=lively(latent_diffusion.LDMBertModel(bert)),
        tokenizer=tok,
        unet=lively(diffusers.UNet2DConditionModel(**UNET | {"sample_size": 8})),
        scheduler=diffusers.DDIMScheduler(**SD_SCHEDULER),
    )
    pipe.save_pretrained(folder)
    return folder


VISION = {
    "hidden_size": 16,
    "projection_dim": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def kandinsky_prior(folder: Path, kind: str = "KandinskyV22PriorPipeline") -> Path:
    """A folder like the prior of Kandinsky, 2.1 or 2.2, whose embeddings have 32 channels."""
    torch.manual_seed(0)
    tok = tokenizer()
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=32, num_embeddings=16
    )
    encoder = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION))
    prior.clip_std.data.fill_(1.0)
    pipe = getattr(diffusers, kind)(
        prior=lively(prior),
        image_encoder=lively(encoder),
        text_encoder=lively(transformers.CLIPTextModelWithProjection(text_config(tok))),
        tokenizer=tok,
        scheduler=diffusers.UnCLIPScheduler(
            prediction_type="sample", clip_sample=True, clip_sample_range=5.0, variance_type="fixed_small_log"
        ),
        image_processor=transformers.CLIPImageProcessor(size=16, crop_size=16),
    )
    pipe.save_pretrained(folder)
    return folder


def exact(scheduler: Any) -> None:
    """Tables in float64: in float32, the variance at the last timestep is the difference of nearly equal numbers, which
    is wrong by a thousandth."""
    scheduler.betas = scheduler.betas.double()
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)


KANDINSKY_SCHEDULER = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
UNET_K22 = {
    "sample_size": 8,
    "out_channels": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
    "encoder_hid_dim": 32,
    "encoder_hid_dim_type": "image_proj",
    "addition_embed_type": "image",
}
MOVQ = {
    "block_out_channels": (32, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 16,
    "norm_num_groups": 8,
    "norm_type": "spatial",
}


def kandinsky_decoder(folder: Path, kind: str = "KandinskyV22Pipeline", **changes: Any) -> Path:
    """A folder like a decoder of Kandinsky 2.2, for the embeddings of :func:`kandinsky_prior`."""
    torch.manual_seed(0)
    unet = lively(diffusers.UNet2DConditionModel(**UNET_K22 | changes))
    scheduler = diffusers.DDPMScheduler(**KANDINSKY_SCHEDULER, variance_type="learned_range")
    movq = lively(diffusers.VQModel(**MOVQ))
    getattr(diffusers, kind)(unet=unet, scheduler=scheduler, movq=movq).save_pretrained(folder)
    return folder


UNET_K21 = UNET_K22 | {
    "cross_attention_dim": 32,
    "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "text_image_proj",
    "addition_embed_type": "text_image",
}
M_CLIP = {
    "transformerDimSize": 24,
    "imageDimSize": 32,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 90,
    "layer_norm_eps": 1e-5,
}


def multilingual_tokenizer() -> Any:
    """XLM-RoBERTa's tokenizer of single characters."""
    letters = [(chr(c), -3.0) for c in range(97, 123)]
    special = [(word, 0.0) for word in ("<s>", "<pad>", "</s>", "<unk>")]
    vocab = [*special, ("\u2581", -2.0), *letters, ("<mask>", 0.0)]
    return transformers.XLMRobertaTokenizer(vocab=vocab, model_max_length=512)


def kandinsky21_decoder(folder: Path, kind: str = "KandinskyPipeline", **changes: Any) -> Path:
    """A folder like a decoder of Kandinsky 2.1, for the embeddings of :func:`kandinsky_prior`."""
    from diffusers.pipelines.kandinsky import text_encoder

    torch.manual_seed(0)
    tok = multilingual_tokenizer()
    parts = {
        "text_encoder": lively(text_encoder.MultilingualCLIP(text_encoder.MCLIPConfig(**M_CLIP, vocab_size=len(tok)))),
        "tokenizer": tok,
        "unet": lively(diffusers.UNet2DConditionModel(**UNET_K21 | changes)),
        "scheduler": diffusers.DDIMScheduler(**KANDINSKY_SCHEDULER, set_alpha_to_one=False, steps_offset=1),
        "movq": lively(diffusers.VQModel(**MOVQ)),
    }
    getattr(diffusers, kind)(**parts).save_pretrained(folder)
    return folder


UNET_UNCLIP = UNET | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 64}
"""For embeddings with 32 channels, each with as much of the noise level."""


def embedding_parts() -> dict[str, Any]:
    """What both forms of stable unCLIP have: Stable Diffusion 2.1, and what adds noise to embeddings."""
    torch.manual_seed(0)
    tok = tokenizer(pad_token="!")
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=32)
    normalizer.std.data.fill_(0.7)
    return {
        "image_normalizer": lively(normalizer),
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "tokenizer": tok,
        "text_encoder": lively(transformers.CLIPTextModel(text_config(tok, hidden_act="gelu"))),
        "unet": lively(diffusers.UNet2DConditionModel(**UNET_UNCLIP)),
        "scheduler": diffusers.DDIMScheduler(**SD_SCHEDULER, prediction_type="v_prediction"),
        "vae": lively(diffusers.AutoencoderKL(**VAE)),
    }


def stable_unclip(folder: Path) -> Path:
    """A folder like Stable unCLIP with Karlo's prior; the prior's sampler draws no noise."""
    parts = embedding_parts()
    tok = tokenizer()
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=32, num_embeddings=16
    )
    prior.clip_std.data.fill_(1.0)
    diffusers.StableUnCLIPPipeline(
        prior_tokenizer=tok,
        prior_text_encoder=lively(transformers.CLIPTextModelWithProjection(text_config(tok))),
        prior=lively(prior),
        prior_scheduler=diffusers.DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample_range=5.0
        ),
        **parts,
    ).save_pretrained(folder)
    return folder


def stable_unclip_img2img(folder: Path) -> Path:
    """A folder like SD 2.1 unCLIP."""
    encoder = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION))
    diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=transformers.CLIPImageProcessor(size=16, crop_size=16),
        image_encoder=lively(encoder),
        **embedding_parts(),
    ).save_pretrained(folder)
    return folder
