"""Flags of reward tuning, and what to do instead of those of TRL's scripts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from diffuse_jax.training.arguments import make_parser
from diffuse_jax.training.data.settings import CacheSettings, DataSettings, ImageSettings
from diffuse_jax.training.data.tags import TagSettings
from diffuse_jax.training.flags import Parser
from diffuse_jax.training.latent_flags import add_lora, add_model, add_validation
from diffuse_jax.training.settings import ObjectiveSettings, RewardSettings
from diffuse_jax.training.settings.methods import REWARD_METHODS, REWARDS

OF_TRL: Mapping[str, str] = {
    **dict.fromkeys(("pretrained_model", "sd_model"), "is called --pretrained_model_name_or_path here"),
    "reward_fn": "is called --reward here: module:function or path.py:function",
    "prompt_fn": "give a file of --prompts, or the captions of --train_data_dir or --dataset_name",
    **dict.fromkeys(("train_learning_rate", "lr"), "is called --learning_rate here"),
    "train_gradient_accumulation_steps": "is called --gradient_accumulation_steps here",
    "train_max_grad_norm": "is called --max_grad_norm here",
    **{f"train_adam_{name}": f"is called --adam_{name} here" for name in ("beta1", "beta2", "weight_decay", "epsilon")},
    "train_use_8bit_adam": "JAX has no 8-bit Adam; --optimizer lion or adafactor needs less memory",
    "negative_prompts": "guidance is away from the empty prompt",
    "async_reward_computation": "rewards are computed between sampling and training; a function may use threads itself",
    "max_workers": "rewards are computed between sampling and training; a function may use threads itself",
    "log_with": "is called --report_to here",
    "run_name": "the run is named after --output_dir",
    "logdir": "is called --logging_dir here",
    "project_name": "is called --tracker_project_name here",
    "save_freq": "is called --checkpointing_steps here, in training steps",
    "num_checkpoint_limit": "is called --checkpoints_total_limit here",
    "resume_from": "is called --resume_from_checkpoint here",
    "log_image_freq": "is called --validation_steps here, in training steps",
    "lora_rank": "is called --rank here",
    "truncated_backprop_timestep": "is --gradient_steps here: the number of last steps with a gradient",
    "truncated_backprop_rand": "the number of steps with a gradient is fixed: --gradient_steps",
    "truncated_rand_backprop_minmax": "the number of steps with a gradient is fixed: --gradient_steps",
    "train_text_encoder": "only the UNet is tuned to a reward",
    "backprop_strategy": "is --gradient_steps here",
}
"""Flags of TRL's scripts for DDPO and AlignProp that are unknown here -> what to do."""

NOT_OF_REWARDS: Mapping[str, str] = {
    **{
        field.name: "there are no training images; of a data set, the captions alone are read, unchanged, as prompts"
        for kind in (DataSettings, ImageSettings, CacheSettings, TagSettings)
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    },
    **dict.fromkeys((field.name for field in dataclasses.fields(ObjectiveSettings)), "the loss is that of --method"),
}
"""Flags of other scripts that reward tuning does not have -> what to do."""


def reward_parser(description: str | None, output_dir: str, **defaults: Any) -> Parser:
    """A parser with the shared flags and those of reward tuning; arguments as for ``make_parser``."""
    parser = make_parser(description, output_dir)
    add_model(parser)
    add = parser.group("reward", RewardSettings)
    add("--method", choices=REWARD_METHODS, help="ddpo needs only values of the reward, draft needs its gradient")
    what = f"{', '.join(REWARDS)}, or a function (images, prompts) -> values as module:function or path.py:function"
    add("--reward", required=True, help=what)
    what = "aesthetic: .safetensors or .pth file with the linear layers of the predictor"
    add("--aesthetic_model_path", help=what)
    add("--clip_model_path", help="aesthetic: folder of the CLIP vision encoder with its projection")
    add = parser.group("data", RewardSettings, DataSettings)
    add("--prompts", help="file with prompts, .txt, .jsonl, .csv or .parquet; instead of a data set")
    what = "take the captions of an image folder, or of several, in metadata.jsonl"
    add("--train_data_dir", nargs="+", metavar="FOLDER", help=what)
    add("--dataset_name", help="take the captions of a data set on the Hub, or of a local folder")
    add("--dataset_config_name", help="configuration of that data set")
    add("--image_column", help="column of its images, which are not read")
    add("--caption_column", help="column of the captions")
    add("--resolution", help="height and width of the images in pixels; the model's own if omitted")
    add = parser.group("sampling", RewardSettings)
    add("--sample_num_steps", help="number of sampling steps, of DDIM")
    add("--sample_eta", help="noise of the steps, from 0 (none) to 1 (ancestral sampling)")
    add("--sample_guidance_scale", help="guidance scale, also in training; up to 1 there is no guidance")
    add("--sample_batch_size", help="ddpo: images that are sampled at once, per device")
    add("--sample_num_batches_per_epoch", help="ddpo: number of such batches in a round")
    add = parser.group("tuning", RewardSettings)
    what = "train low-rank pairs; --no-use_lora trains the UNet's weights"
    add("--use_lora", action=argparse.BooleanOptionalAction, help=what)
    add("--train_num_inner_epochs", help="ddpo: number of passes over the samples of a round")
    add("--train_timestep_fraction", help="ddpo: share of the steps of each trajectory that are trained on")
    add("--train_clip_range", help="ddpo: how far the ratio of new to old probability may move from 1")
    add("--train_adv_clip_max", help="ddpo: largest absolute advantage")
    what = "ddpo: normalise rewards by the recent ones of the same prompt"
    add("--per_prompt_stat_tracking", action="store_true", help=what)
    add("--per_prompt_stat_tracking_buffer_size", help="ddpo: number of recent rewards that are kept per prompt")
    add("--per_prompt_stat_tracking_min_count", help="ddpo: with fewer, the rewards of the round are used")
    add("--gradient_steps", help="draft: number of last sampling steps that the gradient passes through")
    add_lora(parser)
    add_validation(parser)
    parser.refuse({**OF_TRL, **NOT_OF_REWARDS})
    parser.accept({"train_cfg": ("?", "training has the guidance of sampling, --sample_guidance_scale")})
    parser.set_defaults(**defaults)
    return parser
