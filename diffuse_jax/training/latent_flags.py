"""Flags that all trainers of latent text-to-image models have."""

from __future__ import annotations

from typing import Any

from diffuse_jax.training.arguments import add_objective, make_parser
from diffuse_jax.training.data.flags import add_data
from diffuse_jax.training.flags import Parser
from diffuse_jax.training.settings import (
    DreamBoothSettings,
    InversionSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    ValidationSettings,
)
from diffuse_jax.training.settings.methods import OTHER_DATA, TEMPLATES
from diffuse_jax.training.settings.model import PREDICTION_TYPES


def latent_parser(description: str | None, output_dir: str, *, text_encoders: bool = True, **defaults: Any) -> Parser:
    """The shared flags of :func:`~diffuse_jax.training.arguments.make_parser` and those of latent models.

    Args:
      description, output_dir, defaults: as there.
      text_encoders: whether the script can train them beside the UNet.
    """
    parser = make_parser(description, output_dir)
    add = parser.group("model", ModelSettings, OptimizerSettings)
    add("--pretrained_model_name_or_path", required=True, help="Stable Diffusion 1.x, 2.x or XL: a folder or a Hub id")
    add("--pretrained_vae_model_name_or_path", help="folder or Hub id whose vae/ replaces the pipeline's")
    add("--prediction_type", choices=PREDICTION_TYPES, help="instead of the scheduler's")
    if text_encoders:
        add("--train_text_encoder", action="store_true", help="train the text encoders together with the UNet")
        add("--text_encoder_lr", help="their highest learning rate, if not --learning_rate")
    add = parser.group("monitoring", ValidationSettings)
    add("--validation_prompt", "--validation_prompts", nargs="+", help="make pictures of these prompts while training")
    add("--num_validation_images", help="pictures per prompt")
    add("--validation_inference_steps", help="sampling steps of such a picture")
    add("--validation_guidance_scale", help="guidance of such a picture")
    add_objective(parser)
    parser.set_defaults(**defaults)
    return parser


def add_lora(parser: Parser) -> None:
    """The flags of low-rank adaptation."""
    add = parser.group("LoRA", LoraSettings)
    add("--rank", help="inner dimension of the pairs")
    add("--lora_targets", help="regular expression: paths of the dense layers that get a pair")


def add_dreambooth(parser: Parser) -> None:
    """The flags of the instance, its class, and how their pictures are read."""
    add = parser.group("DreamBooth", DreamBoothSettings)
    add("--instance_data_dir", required=True, help="folder with pictures of the instance; no captions are needed")
    add("--instance_prompt", required=True, help='a prompt with a rare word for it, such as "a photo of sks dog"')
    add("--with_prior_preservation", action="store_true", help="train on pictures of the class too")
    add("--prior_loss_weight", help="how much those count")
    add("--class_data_dir", help="folder with pictures of the class; missing ones are made by the model")
    add("--class_prompt", help='a prompt of the class, such as "a photo of dog"')
    add("--num_class_images", help="how many pictures of the class there shall be")
    add("--sample_batch_size", help="how many of them are made at once")
    add_data(parser, captions=False, caches=True)
    parser.hide(OTHER_DATA)


def add_inversion(parser: Parser) -> None:
    """The flags of the new word, and of how the pictures are read."""
    add = parser.group("textual inversion", InversionSettings)
    add("--placeholder_token", required=True, help='the new word, such as "<cat-toy>"')
    add("--initializer_token", required=True, help="a word of one token whose meaning is the start")
    add("--num_vectors", help="rows of the table that the word stands for")
    add("--learnable_property", choices=sorted(TEMPLATES), help="which prompts are used")
    add("--caption_column", help="instead of those, captions of metadata.jsonl, in which {} stands for the word")
    add("--repeats", help="how often a picture counts in an epoch")
    add("--save_as_full_pipeline", action="store_true", help="write the whole pipeline with the new word too")
    add_data(parser, captions=False, caches=True)
    parser.hide(name for name in OTHER_DATA if name != "train_data_dir")
