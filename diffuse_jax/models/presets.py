"""Configurations of the published networks except text encoders as data, each by its differences from another.

``UNet2DConditionModel(SDXL_UNET).shapes()`` is the full-size parameter tree, without a file and without memory. The
number in a comment is the parameter count; the tests compare names, shapes and counts with the PyTorch classes.
"""

from __future__ import annotations

from typing import Any

from diffuse_jax.models.autoencoder_asymmetric import AsymmetricAutoencoderKLConfig
from diffuse_jax.models.autoencoder_kl import AutoencoderKLConfig
from diffuse_jax.models.autoencoder_tiny import AutoencoderTinyConfig
from diffuse_jax.models.bit import BitConfig
from diffuse_jax.models.clip_vision import CLIPVisionConfig
from diffuse_jax.models.consistency_decoder import ConsistencyDecoderVAEConfig
from diffuse_jax.models.controlnet import ControlNetConfig
from diffuse_jax.models.dpt import DEFAULT_BACKBONE, DPTConfig
from diffuse_jax.models.paella_vq import PaellaVQConfig
from diffuse_jax.models.prior_transformer import PriorTransformerConfig
from diffuse_jax.models.t2i_adapter import T2IAdapterConfig
from diffuse_jax.models.unclip_text_proj import UnCLIPTextProjConfig
from diffuse_jax.models.unet_2d import UNet2DConfig
from diffuse_jax.models.unet_2d_condition import UNet2DConditionConfig
from diffuse_jax.models.vq_model import VQConfig
from diffuse_jax.models.wuerstchen import WuerstchenDiffNeXtConfig, WuerstchenPriorConfig

ATTENTION_BELOW_FIRST: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
"""Three levels, the finest without attention."""

SD15_UNET = UNet2DConditionConfig(sample_size=64, cross_attention_dim=768)  #: 859,520,964; 1.1 to 1.5
SD15_INPAINT_UNET = SD15_UNET.replace(in_channels=9)  #: 859,535,364; latents, mask, latents of the masked image
SD15_PIX2PIX_UNET = SD15_UNET.replace(in_channels=8)  #: 859,532,484; latents, latents of the image
SD15_LCM_UNET = SD15_UNET.replace(sample_size=96, time_cond_proj_dim=256)  #: 859,602,884; guidance scale as input

#: 872,300,484; latent diffusion's text to image (CompVis/ldm-text2im-large-256), before Stable Diffusion
LDM_TEXT_UNET = SD15_UNET.replace(sample_size=32, cross_attention_dim=1280)
#: 865,910,724; 2.0, and 2.1 at 512 pixels
SD20_UNET = SD15_UNET.replace(cross_attention_dim=1024, num_attention_heads=(5, 10, 20, 20), use_linear_projection=True)
SD21_UNET = SD20_UNET.replace(sample_size=96, upcast_attention=True)  #: 865,910,724; 768 pixels, predicts velocity
SD20_INPAINT_UNET = SD20_UNET.replace(in_channels=9)  #: 865,925,124
SD20_DEPTH_UNET = SD20_UNET.replace(in_channels=5)  #: 865,913,604; latents, depth
#: 870,173,124; image embedding and its noise level as class; of OpenCLIP H
SD21_UNCLIP_UNET = SD21_UNET.replace(class_embed_type="projection", projection_class_embeddings_input_dim=2048)
SD21_UNCLIP_L_UNET = SD21_UNCLIP_UNET.replace(projection_class_embeddings_input_dim=1536)  #: 869,517,764; of CLIP L
#: 473,398,020; latents, low-resolution pixels; noise level as class
X4_UPSCALER_UNET = SD20_UNET.replace(
    sample_size=128,
    in_channels=7,
    block_out_channels=(256, 512, 512, 1024),
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    only_cross_attention=(True, True, True, False),
    num_attention_heads=8,
    num_class_embeds=1000,
)

#: 372,560,645; latents, low-resolution latents; pooled prompt and noise level as condition of the timestep
X2_UPSCALER_UNET = UNet2DConditionConfig(
    sample_size=128,
    in_channels=8,
    out_channels=5,
    block_out_channels=(384, 384, 768, 768),
    layers_per_block=4,
    down_block_types=("KDownBlock2D",) + ("KCrossAttnDownBlock2D",) * 3,
    up_block_types=("KCrossAttnUpBlock2D",) * 3 + ("KUpBlock2D",),
    mid_block_type=None,
    cross_attention_dim=768,
    num_attention_heads=64,
    act_fn="gelu",
    norm_num_groups=None,
    resnet_time_scale_shift="scale_shift",
    time_embedding_type="fourier",
    timestep_post_act="gelu",
    time_cond_proj_dim=896,
    conv_in_kernel=1,
    conv_out_kernel=1,
)

#: 2,567,463,684
SDXL_UNET = UNet2DConditionConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10),
    num_attention_heads=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    **ATTENTION_BELOW_FIRST,
)
SDXL_INPAINT_UNET = SDXL_UNET.replace(in_channels=9)  #: 2,567,478,084
SDXL_PIX2PIX_UNET = SDXL_UNET.replace(in_channels=8)  #: 2,567,475,204
SDXL_LCM_UNET = SDXL_UNET.replace(time_cond_proj_dim=256)  #: 2,567,545,604
#: 2,259,526,660; five time ids, the last an aesthetic score
SDXL_REFINER_UNET = SDXL_UNET.replace(
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=4,
    num_attention_heads=(6, 12, 24, 24),
    cross_attention_dim=1280,
    projection_class_embeddings_input_dim=2560,
)
#: 1,331,334,404; Segmind's SSD-1B, with fewer transformer blocks and none in the middle
SSD_1B_UNET = SDXL_UNET.replace(
    mid_block_type="UNetMidBlock2D",
    transformer_layers_per_block=(1, (2, 2), (4, 4)),
    reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
)
#: 745,225,604; Segmind's Vega
VEGA_UNET = SDXL_UNET.replace(mid_block_type="UNetMidBlock2D", transformer_layers_per_block=(1, 1, 2))

#: 371,605,830; DeepFloyd IF's first stage, M. Sizes agree with the published counts: 400 million, L 900, XL 4.3 billion
IF_I_M_UNET = UNet2DConditionConfig(
    sample_size=64,
    in_channels=3,
    out_channels=6,
    block_out_channels=(192, 384, 576, 768),
    layers_per_block=3,
    down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
    num_attention_heads=64,
    act_fn="gelu",
    cross_attention_dim=768,
    cross_attention_norm="group_norm",
    encoder_hid_dim=4096,
    encoder_hid_dim_type="text_proj",
    addition_embed_type="text",
    resnet_time_scale_shift="scale_shift",
)
#: 935,365,830
IF_I_L_UNET = IF_I_M_UNET.replace(block_out_channels=(320, 640, 960, 1280), cross_attention_dim=1280)
#: 4,304,695,110
IF_I_XL_UNET = IF_I_M_UNET.replace(block_out_channels=(704, 1408, 2112, 2816), cross_attention_dim=2816)
#: 466,183,686; the second stage: sample, upscaled image; its noise level as class. Widths and levels with attention are
#: chosen to agree with the published counts (450 million, L 1.2 billion), the only source for them
IF_II_M_UNET = IF_I_M_UNET.replace(
    sample_size=256,
    in_channels=6,
    block_out_channels=(192, 192, 384, 576, 768),
    layers_per_block=(2, 2, 3, 5, 5),
    down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("SimpleCrossAttnDownBlock2D",) * 2,
    up_block_types=("SimpleCrossAttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",) * 3,
    only_cross_attention=True,
    class_embed_type="timestep",
    time_embedding_dim=768,
    time_embedding_act_fn="gelu",
    resnet_skip_time_act=True,
    resnet_out_scale_factor=1 / 0.7071,
    mid_block_scale_factor=1 / 0.7071,
)
#: 1,198,017,030
IF_II_L_UNET = IF_II_M_UNET.replace(
    block_out_channels=(320, 320, 640, 960, 1280), cross_attention_dim=1280, time_embedding_dim=1280
)

#: 1,228,661,768; states and embeddings of M-CLIP, image embeddings of CLIP L
KANDINSKY21_UNET = UNet2DConditionConfig(
    sample_size=64,
    out_channels=8,
    block_out_channels=(384, 768, 1152, 1536),
    layers_per_block=3,
    down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
    num_attention_heads=64,
    cross_attention_dim=768,
    encoder_hid_dim=1024,
    encoder_hid_dim_type="text_image_proj",
    addition_embed_type="text_image",
    resnet_time_scale_shift="scale_shift",
)
KANDINSKY21_INPAINT_UNET = KANDINSKY21_UNET.replace(in_channels=9)  #: 1,228,679,048
#: 1,253,057,288; image embeddings of OpenCLIP bigG, no text
KANDINSKY22_UNET = KANDINSKY21_UNET.replace(
    encoder_hid_dim=1280, encoder_hid_dim_type="image_proj", addition_embed_type="image"
)
KANDINSKY22_INPAINT_UNET = KANDINSKY22_UNET.replace(in_channels=9)  #: 1,253,074,568
#: 1,253,429,212; features of a map of depth beside the latents
KANDINSKY22_DEPTH_UNET = KANDINSKY22_UNET.replace(in_channels=8, addition_embed_type="image_hint")
#: 885,439,686; Karlo's decoder at 64 pixels; embeddings as class. Fields of Karlo's networks are those of the script
#: that converted them to diffusers
KARLO_UNET = IF_I_L_UNET.replace(
    act_fn="silu",
    cross_attention_dim=1536,
    cross_attention_norm=None,
    encoder_hid_dim=None,
    encoder_hid_dim_type=None,
    addition_embed_type=None,
    class_embed_type="identity",
)

SD15_CONTROLNET = ControlNetConfig(cross_attention_dim=768)  #: 361,279,120; for 1.1 to 1.5
SD15_SHUFFLE_CONTROLNET = SD15_CONTROLNET.replace(global_pool_conditions=True)  #: 361,279,120; pools its residuals
#: 364,228,240
SD21_CONTROLNET = SD15_CONTROLNET.replace(
    cross_attention_dim=1024, num_attention_heads=(5, 10, 20, 20), use_linear_projection=True, upcast_attention=True
)
#: 1,251,014,160
SDXL_CONTROLNET = ControlNetConfig(
    block_out_channels=(320, 640, 1280),
    down_block_types=ATTENTION_BELOW_FIRST["down_block_types"],
    transformer_layers_per_block=(1, 2, 10),
    num_attention_heads=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)

SD15_T2I_ADAPTER = T2IAdapterConfig()  #: 77,369,280; canny edges, depth and more for 1.4 and 1.5
#: 18,689,200; colours for 1.4
SD15_COLOR_T2I_ADAPTER = T2IAdapterConfig(channels=(320, 640, 1280), num_res_blocks=4, adapter_type="light_adapter")
SDXL_T2I_ADAPTER = SD15_T2I_ADAPTER.replace(downscale_factor=16, adapter_type="full_adapter_xl")  #: 79,028,160

#: 35,746,307; DDPM on 32 pixels (CIFAR-10)
DDPM_CIFAR10_UNET = UNet2DConfig(
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-6,
)
#: 113,673,219; DDPM on 256 pixels (cats, churches, faces)
DDPM_256_UNET = DDPM_CIFAR10_UNET.replace(
    sample_size=256,
    block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
)
#: 65,574,549; NCSN++ on 256 pixels, conditioned on the noise level (churches, bedrooms, celebrities)
NCSNPP_256_UNET = UNet2DConfig(
    sample_size=256,
    block_out_channels=(128, 128) + (256,) * 5,
    down_block_types=("SkipDownBlock2D",) * 4 + ("AttnSkipDownBlock2D",) + ("SkipDownBlock2D",) * 2,
    up_block_types=("SkipUpBlock2D",) * 2 + ("AttnSkipUpBlock2D",) + ("SkipUpBlock2D",) * 4,
    time_embedding_type="fourier",
    attention_head_dim=None,
    norm_num_groups=None,
    norm_eps=1e-6,
    mid_block_scale_factor=2**0.5,
)

#: 295,899,267; consistency models on 64 pixels (ImageNet): labels
CM_IMAGENET64_UNET = UNet2DConfig(
    sample_size=64,
    block_out_channels=(192, 384, 576, 768),
    layers_per_block=3,
    down_block_types=("ResnetDownsampleBlock2D",) + ("AttnDownBlock2D",) * 3,
    up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
    attention_head_dim=64,
    attn_norm_num_groups=32,
    num_class_embeds=1000,
    resnet_time_scale_shift="scale_shift",
    downsample_type="resnet",
    upsample_type="resnet",
)
#: 526,304,771; consistency models on 256 pixels (LSUN's bedrooms and cats)
CM_LSUN256_UNET = UNet2DConfig(
    sample_size=256,
    block_out_channels=(256, 256, 512, 512, 1024, 1024),
    down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
    up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
    attention_head_dim=64,
    downsample_type="resnet",
    upsample_type="resnet",
)
#: 274,056,163; unconditional latent diffusion (celebrities); LDM_VQ is its autoencoder
LDM_CELEBAHQ_UNET = UNet2DConfig(sample_size=64, block_out_channels=(224, 448, 672, 896), attention_head_dim=32)

#: 691,579,523; Karlo's two networks of super-resolution: sample, enlarged image
KARLO_SUPER_RESOLUTION_UNET = UNet2DConfig(
    sample_size=256,
    in_channels=6,
    block_out_channels=(320, 640, 960, 1280),
    layers_per_block=3,
    down_block_types=("ResnetDownsampleBlock2D",) * 4,
    up_block_types=("ResnetUpsampleBlock2D",) * 4,
    add_attention=False,
)

#: 83,653,863; 1.x and 2.x
SD_VAE = AutoencoderKLConfig(
    sample_size=512,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
LDM_TEXT_VAE = SD_VAE.replace(sample_size=256)  #: 83,653,863; latent diffusion's text to image
SD21_VAE = SD_VAE.replace(sample_size=768)  #: 83,653,863
SDXL_VAE = SD_VAE.replace(sample_size=1024, scaling_factor=0.13025)  #: 83,653,863; needs float32 (force_upcast)
#: 55,325,927; four pixels per latent
X4_UPSCALER_VAE = AutoencoderKLConfig(
    sample_size=256,
    block_out_channels=(128, 256, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    scaling_factor=0.08333,
)

#: 55,322,782; four pixels per latent: latent diffusion without prompts (CelebA-HQ), and its upscaler
LDM_VQ = VQConfig(
    sample_size=256,
    block_out_channels=(128, 256, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    num_vq_embeddings=8192,
)
#: 67,832,495; Kandinsky 2.1 and 2.2
MOVQ = VQConfig(
    block_out_channels=(128, 256, 256, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
    up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
    latent_channels=4,
    num_vq_embeddings=16384,
    vq_embed_dim=4,
    norm_type="spatial",
)

TINY_VAE = AutoencoderTinyConfig()  #: 2,445,063; latents of 1.x and 2.x, or of XL
TINY_FLUX2_VAE = AutoencoderTinyConfig(latent_channels=32, use_midblock_gn=True)  #: 2,677,027; latents of FLUX.2
#: 194,300,519; the decoder is 1.5 times as wide
ASYMMETRIC_VAE = AsymmetricAutoencoderKLConfig(
    sample_size=256,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    down_block_out_channels=(128, 256, 512, 512),
    up_block_out_channels=(192, 384, 768, 768),
    layers_per_down_block=2,
    layers_per_up_block=3,
)
ASYMMETRIC_X2_VAE = ASYMMETRIC_VAE.replace(
    up_block_out_channels=(256, 512, 1024, 1024), layers_per_up_block=5
)  #: 406,130,151

#: 303,966,208 with its projection; image variations, the safety checker
CLIP_L_VISION = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
    projection_dim=768,
)
#: 632,076,800 with its projection; IP-Adapter, unCLIP of SD 2.1
OPENCLIP_H_VISION = CLIP_L_VISION.replace(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, hidden_act="gelu", projection_dim=1024
)
#: 1,844,907,264 with its projection; IP-Adapter of SDXL
OPENCLIP_BIGG_VISION = OPENCLIP_H_VISION.replace(
    hidden_size=1664, intermediate_size=8192, num_hidden_layers=48, projection_dim=1280
)

#: 122,377,985; Stable Diffusion 2's depth model, dpt-hybrid-midas
HYBRID_DEPTH = DPTConfig(
    is_hybrid=True,
    backbone_config=BitConfig.from_json(DEFAULT_BACKBONE),
    reassemble_factors=(1, 1, 1, 0.5),
    neck_hidden_sizes=(256, 512, 768, 768),
)
#: 343,030,465; dpt-large
LARGE_DEPTH = DPTConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    backbone_out_indices=(5, 11, 17, 23),
    neck_hidden_sizes=(256, 512, 1024, 1024),
)
CONSISTENCY_DECODER_VAE = ConsistencyDecoderVAEConfig()  #: 655,441,366; for the latents of 1.x

WUERSTCHEN_PRIOR = WuerstchenPriorConfig(
    c=1536, c_cond=1280, depth=32, nhead=24
)  #: 993,636,896; states of OpenCLIP bigG
WUERSTCHEN_DECODER = WuerstchenDiffNeXtConfig()  #: 1,055,365,280; states of OpenCLIP H
PAELLA_VQ_VAE = PaellaVQConfig()  #: 18,406,903; Würstchen's autoencoder, four pixels per latent
UNCLIP_PRIOR = PriorTransformerConfig()  #: 1,022,030,080; Karlo and Kandinsky 2.1
KARLO_TEXT_PROJ = UnCLIPTextProjConfig()  #: 7,878,400; the conditions of KARLO_UNET
KANDINSKY22_PRIOR = UNCLIP_PRIOR.replace(embedding_dim=1280)  #: 1,026,225,920; Kandinsky 2.2
