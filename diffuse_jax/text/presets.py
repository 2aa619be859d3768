"""Configurations of the published text encoders, as data; the number in a comment counts parameters."""

from __future__ import annotations

from typing import Any

from diffuse_jax.text.clip import CLIPTextConfig
from diffuse_jax.text.ldm_bert import LDMBertConfig
from diffuse_jax.text.multilingual_clip import MultilingualCLIPConfig
from diffuse_jax.text.t5 import T5Config

OLD_IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2}
"""The ids in the published files, from before they were corrected; see :class:`CLIPTextConfig`."""

#: 123,060,480; SD 1.x and SDXL's first encoder
CLIP_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12, **OLD_IDS)
#: 340,387,840; SD 2.x: 23 of the original's 24 layers, since it uses the penultimate one
OPENCLIP_H = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
    **OLD_IDS,
)
#: 694,659,840 with its projection; SDXL's second encoder and the refiner's only one
OPENCLIP_BIGG = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1280,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    **OLD_IDS,
)
#: 4,762,310,656; DeepFloyd IF, PixArt and others: the encoder of T5 1.1 XXL
T5_XXL = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
#: 581,994,042; latent diffusion's text to image (CompVis/ldm-text2im-large-256), its layer ``to_logits`` included
LDM_BERT = LDMBertConfig()
#: 560,677,632; Kandinsky 2.1 (M-CLIP/XLM-Roberta-Large-Vit-L-14), its pooling layer included
M_CLIP = MultilingualCLIPConfig(
    vocab_size=250002,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    max_position_embeddings=514,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
)
