"""Text encoders in Flax; tokenizers come from transformers."""

from diffuse_jax.text.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTextOutput
from diffuse_jax.text.ldm_bert import LDMBertConfig, LDMBertModel, LDMBertOutput
from diffuse_jax.text.multilingual_clip import MultilingualCLIP, MultilingualCLIPConfig, MultilingualCLIPOutput
from diffuse_jax.text.t5 import T5Config, T5EncoderModel, T5Output

__all__ = [
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTextOutput",
    "LDMBertConfig",
    "LDMBertModel",
    "LDMBertOutput",
    "MultilingualCLIP",
    "MultilingualCLIPConfig",
    "MultilingualCLIPOutput",
    "T5Config",
    "T5EncoderModel",
    "T5Output",
]
