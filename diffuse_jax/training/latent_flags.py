"""Flags shared by all trainers of text-to-image models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from diffuse_jax.adapters.targets import CUSTOM_DIFFUSION
from diffuse_jax.training.arguments import add_objective, make_parser
from diffuse_jax.training.data.flags import add_conditioning, add_data, add_edits
from diffuse_jax.training.flags import Parser
from diffuse_jax.training.settings import (
    BesideSettings,
    ConsistencySettings,
    CustomSettings,
    DreamBoothSettings,
    InversionSettings,
    LoraSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    ValidationImageSettings,
    ValidationSettings,
)
from diffuse_jax.training.settings.methods import LOSSES, OTHER_DATA, TEMPLATES
from diffuse_jax.training.settings.model import CLASS_LABELS, PREDICTION_TYPES

PLAIN_LORA = "LoRA here has only --rank and --lora_targets"
SAMPLER = "validation images are sampled with the scheduler of the model"

OF_OTHERS: Mapping[str, str] = {
    "pretrained_vae_name_or_path": "is called --pretrained_vae_model_name_or_path here",
    "tokenizer_name": "the tokenizer is the model's; put another one into the folder tokenizer of the model",
    "offset_noise": "is --noise_offset 0.1 here",
    "pre_compute_text_embeddings": "is called --cache_text_embeddings here",
    "train_shards_path_or_url": "is called --train_shards here, and names files",
    "lora_rank": "is called --rank here",
    "use_dora": PLAIN_LORA,
    "lora_dropout": PLAIN_LORA,
    "lora_bias": PLAIN_LORA,
    "lora_layers": "is called --lora_targets here, a regular expression",
    "loss_type": "the loss is the squared error",
    "huber_c": "the loss is the squared error",
    "dream_training": "is not implemented",
    "adam_weight_decay_text_encoder": "all networks have the same --adam_weight_decay",
    "validation_scheduler": SAMPLER,
    "skip_save_text_encoder": "the result is a whole pipeline; delete its folder text_encoder to save space",
    "pretrained_decoder_model_name_or_path": "the model that is trained is called --pretrained_model_name_or_path here",
}
"""Flags of diffusers' scripts that are unknown here -> what to do."""

AS_THE_MODEL: Mapping[str, tuple[int, str]] = {
    "tokenizer_max_length": (1, "prompts have the length that the model was made for, 77 tokens in DeepFloyd IF"),
    "text_encoder_use_attention_mask": (0, "padding is hidden where the model was made so, as DeepFloyd IF was"),
    "prior_generation_precision": (1, "the precision is that of --mixed_precision"),
}
"""Flags of diffusers' scripts that are not needed here -> their number of values, and why."""


OF_DISTILLATION = ("loss_type", "huber_c", "lora_rank")
"""Those that distillation has."""

NOT_OF_DISTILLATION: Mapping[str, str] = {
    "teacher_revision": "is called --revision here",
    "lora_alpha": "the alpha of a LoRA is its rank here",
    "lora_target_modules": "is called --lora_targets here, a regular expression",
    "use_fix_crop_and_size": "SDXL sees the true size and crop of every image",
    "interpolation_type": "is called --image_interpolation_mode here",
    **dict.fromkeys(
        (field.name for field in dataclasses.fields(ObjectiveSettings)),
        "distillation has a loss of its own, see --loss_type",
    ),
}
"""Flags of other scripts that distillation does not have -> what to do."""

AS_THE_TEACHER: Mapping[str, tuple[int, str]] = {
    "cast_teacher_unet": (0, "the teacher always has the precision of --mixed_precision"),
    "vae_encode_batch_size": (1, "a batch is encoded at once; --cache_latents encodes all images before the run"),
    "encode_batch_size": (1, "a batch is encoded at once; --cache_latents encodes all images before the run"),
}
"""As :data:`AS_THE_MODEL`, for distillation."""


def latent_parser(
    description: str | None,
    output_dir: str,
    *,
    text_encoders: bool = True,
    loss: Callable[[Parser], None] = add_objective,
    names: tuple[str, ...] = (),
    refused: Mapping[str, str] = OF_OTHERS,
    **defaults: Any,
) -> Parser:
    """A parser with the shared flags of :func:`~diffuse_jax.training.arguments.make_parser` and those of latent models.

    Args:
      description, output_dir, defaults: as for ``make_parser``.
      text_encoders: whether the script can train the text encoders together with the UNet.
      loss: adds the flags of the loss.
      names: further names of the flag of the model.
      refused: flags that the script does not have -> what to do.
    """
    parser = make_parser(description, output_dir)
    add_model(parser, *names)
    add = parser.group("model", ModelSettings, OptimizerSettings)
    what = "folder or Hub id of the prior whose image encoder a decoder of Kandinsky 2.2 reads"
    add("--pretrained_prior_model_name_or_path", help=what)
    what = "file with the EfficientNet for a prior of Würstchen: model_v2_stage_b.pt of dome272/wuerstchen"
    add("--effnet_path", help=what)
    what = (
        "class labels of a super-resolution model of DeepFloyd IF: the noise_level of the small image, or the timesteps"
    )
    add("--class_labels_conditioning", choices=CLASS_LABELS, help=what)
    if text_encoders:
        add("--train_text_encoder", action="store_true", help="train the text encoders together with the UNet")
        add("--text_encoder_lr", help="peak learning rate of the text encoders; --learning_rate if omitted")
    add_validation(parser)
    what = "small images that a super-resolution model of DeepFloyd IF enlarges, one for each prompt"
    parser.group("monitoring", ValidationSettings)("--validation_images", nargs="+", help=what)
    loss(parser)
    parser.refuse(refused)
    parser.accept(AS_THE_MODEL)
    parser.set_defaults(**defaults)
    return parser


def add_model(parser: Parser, *names: str) -> None:
    """Add the flags of the model to start from; ``names`` are further names of the first one."""
    add = parser.group("model", ModelSettings)
    add(
        "--pretrained_model_name_or_path",
        *names,
        required=True,
        help="folder or Hub id of the model, such as Stable Diffusion 1.x, 2.x or XL",
    )
    add("--pretrained_vae_model_name_or_path", help="folder or Hub id of an autoencoder to use instead")
    add("--prediction_type", choices=PREDICTION_TYPES, help="overrides the prediction type of the scheduler")


def add_validation(parser: Parser) -> None:
    """Add the flags of the images that are generated during training."""
    add = parser.group("monitoring", ValidationSettings)
    add(
        "--validation_prompt",
        "--validation_prompts",
        nargs="+",
        help="generate images of these prompts during training",
    )
    add("--num_validation_images", help="images per prompt")
    add("--validation_inference_steps", help="sampling steps of validation images")
    add("--validation_guidance_scale", help="guidance scale of validation images")


def add_lora(parser: Parser, *names: str, **defaults: Any) -> None:
    """Add the flags of LoRA, with further names of ``--rank`` and other defaults than those of the settings."""
    add = parser.group("LoRA", LoraSettings)
    add("--rank", *names, help="rank of the LoRA matrices")
    add("--lora_targets", help="regular expression for the paths of the layers to adapt")
    parser.set_defaults(**defaults)


def consistency_parser(description: str | None, output_dir: str, **defaults: Any) -> Parser:
    """A parser of latent consistency distillation, with the flags of the data; arguments as for ``make_parser``.

    The running average, where there is one, is the target network, and has its decay from the first step on.
    """
    refused = {name: advice for name, advice in OF_OTHERS.items() if name not in OF_DISTILLATION}
    of_average: dict[str, Any] = {"ema_decay": 0.95, "ema_ramp": False}
    parser = latent_parser(
        description,
        output_dir,
        text_encoders=False,
        loss=add_consistency,
        names=("--pretrained_teacher_model",),
        refused={**refused, **NOT_OF_DISTILLATION},
        **of_average | {"validation_inference_steps": 4} | defaults,
    )
    parser.accept(AS_THE_TEACHER)
    add_data(parser, caches=True)
    return parser


def add_consistency(parser: Parser) -> None:
    """Add the flags of distillation that both kinds of students have."""
    add = parser.group("distillation", ConsistencySettings)
    add("--w_min", help="smallest guidance scale of the teacher, less 1")
    add("--w_max", help="largest guidance scale of the teacher, less 1")
    add("--num_ddim_timesteps", help="steps of the solver; samplers take their timesteps from these")
    add("--loss_type", choices=LOSSES, help="squared error or pseudo-Huber loss")
    add("--huber_c", help="where the pseudo-Huber loss turns from quadratic to linear")
    add("--timestep_scaling_factor", help="factor of the timestep in the boundary condition")


def add_student(parser: Parser) -> None:
    """Add the flag of a student that is a whole UNet, and what to do for a LoRA."""
    add = parser.group("distillation", ConsistencySettings)
    add("--unet_time_cond_proj_dim", help="width of the student's embedding of the guidance scale")
    parser.refuse(dict.fromkeys(("rank", "lora_rank"), "a LoRA is made by train/lcm_distillation_lora.py"))


def add_control(parser: Parser, settings: type[BesideSettings], name: str) -> None:
    """Add the flags of a network that reads control images, and of its data; images are cropped at the centre, as in
    diffusers."""
    add = parser.group("model", settings)
    what = f"start from this {name}: folder or Hub id; a new one if omitted"
    add(f"--{settings.prefix}_model_name_or_path", help=what)
    add(f"--{settings.prefix}_revision", help=f"branch, tag or commit of that {name} on the Hub")
    add = parser.group("monitoring", settings)
    what = "images for the validation prompts, one for all or one for each: control images, or with --conditioning "
    add("--validation_image", nargs="+", help=f"{what}the images that they are made from")
    add_data(parser, caches=True, center_crop=True)
    add_conditioning(parser)
    advice = "the model always sees the images as uncropped, as pipelines do by default"
    parser.refuse({f"crops_coords_top_left_{side}": advice for side in ("h", "w")})


def add_edit(parser: Parser) -> None:
    """Add the flags of images before and after an edit, and of the images to edit at validations."""
    add = parser.group("monitoring", ValidationImageSettings)
    what = "images to edit as the validation prompts say, one for all or one for each"
    add("--validation_image", nargs="+", help=what)
    add_edits(parser)
    parser.refuse(
        dict.fromkeys(("val_image_url", "val_image_url_or_path"), "is called --validation_image here, a file")
    )
    advice = "is --conditioning_dropout_prob here, which drops instructions and original images"
    parser.refuse({"proportion_empty_prompts": advice})


def add_dreambooth(parser: Parser) -> None:
    """Add the flags of the instance, its class, and how their images are read."""
    add = parser.group("DreamBooth", DreamBoothSettings)
    add("--instance_data_dir", required=True, help="folder with images of the instance; no captions are needed")
    add(
        "--instance_prompt",
        required=True,
        help='prompt with a rare word for the instance, such as "a photo of sks dog"',
    )
    _add_class(add)
    add_data(parser, captions=False, caches=True, masks=True)
    parser.hide(OTHER_DATA)


def _add_class(add: Callable[..., Any]) -> None:
    """Add the flags of prior preservation."""
    add("--with_prior_preservation", action="store_true", help="also train on images of the class")
    add("--prior_loss_weight", help="weight of the loss on class images")
    add("--class_data_dir", help="folder with images of the class; missing ones are generated by the model")
    add("--class_prompt", help='prompt for the class, such as "a photo of dog"')
    add("--num_class_images", help="minimum number of class images")
    add("--sample_batch_size", help="number of class images that are generated at once")


def add_custom(parser: Parser) -> None:
    """Add the flags of the concepts and their new words, and of how their images are read."""
    add = parser.group("Custom Diffusion", CustomSettings)
    add("--instance_data_dir", help="folder with images of the concept; no captions are needed")
    add("--instance_prompt", help='prompt with the new word, such as "photo of a <new1> cat"')
    _add_class(add)
    add("--real_prior", action="store_true", help="the class images are photographs, with captions; none is generated")
    what = (
        "JSON file with a list of concepts, each with instance_data_dir, instance_prompt, class_data_dir, class_prompt"
    )
    add("--concepts_list", help=what)
    add("--modifier_token", help='new words, joined by +, such as "<new1>+<new2>"')
    add("--initializer_token", help="for each new word, one whose embedding is the starting point, joined by +")
    add("--freeze_model", choices=CUSTOM_DIFFUSION, help="train keys and values of cross-attention, or all of it")
    add("--noaug", action="store_true", help="keep the size of the images, instead of giving them random sizes")
    parser.drop("--no_safe_serialization")
    add("--no_safe_serialization", action="store_true", help="write .bin files instead of .safetensors")
    add_data(parser, captions=False, caches=True)
    parser.group("images")("--hflip", dest="random_flip", action="store_true", help="the same as --random_flip")
    parser.hide(OTHER_DATA)


def add_inversion(parser: Parser) -> None:
    """Add the flags of the new word, and of how the images are read."""
    add = parser.group("textual inversion", InversionSettings)
    add("--placeholder_token", required=True, help='the new word, such as "<cat-toy>"')
    add("--initializer_token", required=True, help="word of a single token whose embedding is the starting point")
    add("--num_vectors", help="number of token embeddings of the new word")
    add("--learnable_property", choices=sorted(TEMPLATES), help="which prompt templates are used")
    add("--caption_column", help="use captions of metadata.jsonl instead, in which {} stands for the word")
    add("--repeats", help="number of times each image is used in an epoch")
    add("--save_as_full_pipeline", action="store_true", help="also write the whole pipeline with the new word")
    add_data(parser, captions=False, caches=True)
    parser.hide(name for name in OTHER_DATA if name != "train_data_dir")
