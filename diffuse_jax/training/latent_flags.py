"""Flags that all trainers of latent text-to-image models have."""

from __future__ import annotations

from typing import Any

from diffuse_jax.training.arguments import add_objective, make_parser
from diffuse_jax.training.flags import Parser
from diffuse_jax.training.latent_model import PREDICTION_TYPES, ModelSettings
from diffuse_jax.training.low_rank import LoraSettings
from diffuse_jax.training.optimizer import OptimizerSettings
from diffuse_jax.training.validation import ValidationSettings


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
        add("--text_encoder_lr", type=float, help="their highest learning rate, if not --learning_rate")
    add = parser.group("monitoring", ValidationSettings)
    add("--validation_prompt", "--validation_prompts", nargs="+", help="make pictures of these prompts while training")
    add("--num_validation_images", type=int, help="pictures per prompt")
    add("--validation_inference_steps", type=int, help="sampling steps of such a picture")
    add("--validation_guidance_scale", type=float, help="guidance of such a picture")
    add_objective(parser)
    parser.set_defaults(**defaults)
    return parser


def add_lora(parser: Parser) -> None:
    """The flags of low-rank adaptation."""
    add = parser.group("LoRA", LoraSettings)
    add("--rank", type=int, help="inner dimension of the pairs")
    add("--lora_targets", help="regular expression: paths of the dense layers that get a pair")
