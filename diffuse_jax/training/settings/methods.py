"""Settings of the training methods: the loss, validation, DreamBooth and textual inversion."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

from diffuse_jax.adapters.targets import CUSTOM_DIFFUSION
from diffuse_jax.bounds import COUNT, FINITE, MODE_SCALE, NATURAL, NONNEGATIVE, PORTION, POSITIVE, SHARE
from diffuse_jax.training.checks import Checked, one_of

TIMESTEP_BIASES = ("none", "earlier", "later", "range", "cubic")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveSettings(Checked):
    """The part of an :class:`~diffuse_jax.training.objective.Objective` that does not depend on the model.

    Attributes:
      snr_gamma, noise_offset, input_perturbation: as for ``Objective``.
      timestep_bias_strategy, timestep_bias_multiplier, timestep_bias_portion, timestep_bias_begin, timestep_bias_end:
        which timesteps are sampled more often, see
        :func:`~diffuse_jax.training.objective.timestep_probabilities`.

    Raises:
      ValueError: a number is out of range, or the strategy is unknown.
    """

    snr_gamma: Annotated[float, POSITIVE] | None = None
    noise_offset: Annotated[float, NONNEGATIVE] = 0.0
    input_perturbation: Annotated[float, NONNEGATIVE] = 0.0
    timestep_bias_strategy: str = "none"
    timestep_bias_multiplier: Annotated[float, POSITIVE] = 1.0
    timestep_bias_portion: Annotated[float, PORTION] = 0.25
    timestep_bias_begin: Annotated[int, NATURAL] = 0
    timestep_bias_end: Annotated[int, COUNT] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(TIMESTEP_BIASES, timestep_bias_strategy=self.timestep_bias_strategy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdmSettings(Checked):
    """Training of an EDM network (Karras et al. 2022, arXiv 2206.00364, section 5).

    Attributes:
      p_mean, p_std: mean and standard deviation of the logarithm of the noise level.
      sigma_data: standard deviation of the clean samples; None for that of the scheduler.

    Raises:
      ValueError: a number is out of range.
    """

    p_mean: Annotated[float, FINITE] = -1.2
    p_std: Annotated[float, POSITIVE] = 1.2
    sigma_data: Annotated[float, POSITIVE] | None = None


WEIGHTING_SCHEMES = ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSettings(Checked):
    """Training by flow matching: times, and weights of the squared error (Esser et al. 2024, arXiv 2403.03206).

    Attributes:
      weighting_scheme: one of :data:`WEIGHTING_SCHEMES`, as in diffusers' scripts. Times are uniform ("none"), the
        sigmoid of normal numbers ("logit_normal") or of :func:`~diffuse_jax.training.times.mode` ("mode"), with equal
        weights; or they are uniform and the error is weighted by ``1 / sigma^2`` ("sigma_sqrt") or
        ``2 / (pi (1 - 2 sigma + 2 sigma^2))`` ("cosmap").
      logit_mean, logit_std: of these normal numbers. As in diffusers' scripts, a positive mean favours little noise.
      mode_scale: how much times near the middle are favoured; negative numbers favour both ends.
      flow_shift: how far levels are moved towards noise, in training and sampling; None for that of the scheduler.

    Raises:
      ValueError: a number is out of range, or the scheme is unknown.
    """

    weighting_scheme: str = "logit_normal"
    logit_mean: Annotated[float, FINITE] = 0.0
    logit_std: Annotated[float, POSITIVE] = 1.0
    mode_scale: Annotated[float, MODE_SCALE] = 1.29
    flow_shift: Annotated[float, POSITIVE] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(WEIGHTING_SCHEMES, weighting_scheme=self.weighting_scheme)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationSettings(Checked):
    """The images that are generated during training to show its progress.

    Attributes:
      validation_prompt: prompts of the images; None for no images.
      validation_images: paths of small images that a super-resolution model enlarges, one for each prompt.
      num_validation_images: number of images per prompt.
      validation_inference_steps: number of sampling steps.
      validation_guidance_scale: guidance scale.

    Raises:
      ValueError: a number is out of range, or there is not one image for each prompt.
    """

    validation_prompt: tuple[str, ...] | None = None
    validation_images: tuple[str | Path, ...] | None = None
    num_validation_images: Annotated[int, COUNT] = 4
    validation_inference_steps: Annotated[int, COUNT] = 25
    validation_guidance_scale: Annotated[float, NONNEGATIVE] = 7.5

    def __post_init__(self) -> None:
        super().__post_init__()
        prompts, images = len(self.validation_prompt or ()), len(self.validation_images or ())
        if images and images != prompts:
            raise ValueError(f"--validation_images needs one image for each validation prompt, got {images} images and "
                             f"{prompts} prompts")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationImageSettings(Checked):
    """What networks that read images are shown at validations.

    Attributes:
      validation_image: paths of the images: one for all validation prompts, or one for each.
    """

    validation_image: tuple[str | Path, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BesideSettings(ValidationImageSettings):
    """A network that is trained beside a frozen pipeline and reads control images.

    Attributes:
      validation_image: as for :class:`ValidationImageSettings`.
    """

    prefix: ClassVar[str]
    """What the flags of the network to start from begin with; also the pipeline's component."""

    @property
    def source(self) -> str | Path | None:
        """The network to start from, a folder or a Hub id; None for a new one."""
        return getattr(self, f"{self.prefix}_model_name_or_path")

    @property
    def revision(self) -> str | None:
        """The branch, tag or commit of ``source`` on the Hub."""
        return getattr(self, f"{self.prefix}_revision")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlSettings(BesideSettings):
    """The ControlNet to train, and the control images of the validation.

    Attributes:
      controlnet_model_name_or_path: start from this ControlNet, a folder or a Hub id; None for a new one, made from the
        UNet.
      controlnet_revision: its branch, tag or commit on the Hub; the main branch if None.
      validation_image: as for :class:`BesideSettings`.
    """

    prefix: ClassVar[str] = "controlnet"

    controlnet_model_name_or_path: str | Path | None = None
    controlnet_revision: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings(BesideSettings):
    """The T2I-Adapter to train, and the control images of the validation.

    Attributes:
      adapter_model_name_or_path: start from this T2I-Adapter, a folder or a Hub id; None for a new one.
      adapter_revision: its branch, tag or commit on the Hub; the main branch if None.
      validation_image: as for :class:`BesideSettings`.
    """

    prefix: ClassVar[str] = "adapter"

    adapter_model_name_or_path: str | Path | None = None
    adapter_revision: str | None = None


LOSSES = ("l2", "huber")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencySettings(Checked):
    """Latent consistency distillation (Luo et al. 2023).

    Attributes:
      w_min, w_max: range of the guidance scales of the teacher, less 1: at ``w`` the conditional prediction is changed
        by ``w`` times its difference from the unconditional one.
      num_ddim_timesteps: number of steps of the solver over the whole noise schedule; a sampler takes its timesteps
        from these.
      loss_type: one of :data:`LOSSES`, the squared error or the pseudo-Huber loss.
      huber_c: where the pseudo-Huber loss turns from quadratic to linear.
      timestep_scaling_factor: factor of the timestep in the boundary condition.
      unet_time_cond_proj_dim: width of the embedding of ``w`` that the student takes, unless the student is a LoRA.

    Raises:
      ValueError: a number is out of range, or the loss is unknown.
    """

    w_min: Annotated[float, NONNEGATIVE] = 5.0
    w_max: Annotated[float, NONNEGATIVE] = 15.0
    num_ddim_timesteps: Annotated[int, COUNT] = 50
    loss_type: str = "l2"
    huber_c: Annotated[float, POSITIVE] = 1e-3
    timestep_scaling_factor: Annotated[float, POSITIVE] = 10.0
    unet_time_cond_proj_dim: Annotated[int, COUNT] = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(LOSSES, loss_type=self.loss_type)
        if self.w_min > self.w_max:
            raise ValueError(f"--w_min {self.w_min:g} is above --w_max {self.w_max:g}; exchange them")
        if self.unet_time_cond_proj_dim % 2 or self.unet_time_cond_proj_dim < 4:
            raise ValueError(
                f"--unet_time_cond_proj_dim must be even and at least 4, got {self.unet_time_cond_proj_dim}"
            )


OTHER_DATA = (
    "train_data_dir",
    "data_repeats",
    "data_weights",
    "dataset_name",
    "dataset_config_name",
    "train_shards",
    "load_from_disk",
    "streaming",
    "max_train_samples",
)
"""Data settings that cannot be used if all images come from one folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorSettings(Checked):
    """Prior preservation: training on images of a class that the model must not forget.

    Attributes:
      with_prior_preservation: also train on images of the class.
      prior_loss_weight: weight of the loss on class images.
      num_class_images: minimum number of class images.
      sample_batch_size: number of class images that are generated at once.
    """

    with_prior_preservation: bool = False
    prior_loss_weight: Annotated[float, NONNEGATIVE] = 1.0
    num_class_images: Annotated[int, COUNT] = 100
    sample_batch_size: Annotated[int, COUNT] = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DreamBoothSettings(PriorSettings):
    """The instance that a model learns, and the class that it must not forget.

    Attributes:
      instance_data_dir: folder with images of the instance; no captions are needed.
      instance_prompt: prompt with a rare word for the instance, such as "a photo of sks dog".
      class_data_dir: folder with images of the class; missing ones are generated by the model.
      class_prompt: prompt for the class, such as "a photo of dog".
      with_prior_preservation, prior_loss_weight, num_class_images, sample_batch_size: as for :class:`PriorSettings`.

    Raises:
      ValueError: prior preservation without a folder and a prompt for the class, or a number out of range.
    """

    instance_data_dir: str | Path
    instance_prompt: str
    class_data_dir: str | Path | None = None
    class_prompt: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [name for name in ("class_data_dir", "class_prompt") if getattr(self, name) is None]
        if self.with_prior_preservation and missing:
            raise ValueError(f"--with_prior_preservation needs --{' and --'.join(missing)}")


_LOOKS = ("", "good ", "bright ", "dark ", "clear ", "blurred ", "cropped ", "close-up ", "small ")


_SIZES = ("", "small ", "large ", "dark ", "bright ", "detailed ")


TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "object": tuple(f"a {look}photo of {which} {{}}" for look in _LOOKS for which in ("a", "the", "my")),
    "style": (
        "a work in the style of {}",
        *(f"a {size}{work} in the style of {{}}" for size in _SIZES for work in ("painting", "drawing", "picture")),
    ),
}
"""Prompt templates by learned property; ``{}`` stands for the new word. Many neutral templates keep the word from
absorbing the meaning of one of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InversionSettings(Checked):
    """The new word of textual inversion, its initial embedding, and the prompts to learn it with.

    Attributes:
      placeholder_token: the new word, such as "<cat-toy>".
      initializer_token: word of a single token whose embedding is the starting point.
      num_vectors: number of token embeddings of the new word.
      learnable_property: which prompt templates are used, a key of :data:`TEMPLATES`.
      caption_column: column of captions in ``metadata.jsonl`` that replace the templates; ``{}`` in them stands for the
        word. None for the templates.
      repeats: number of times each image is used in an epoch.
      save_as_full_pipeline: also write the whole pipeline with the new word.

    Raises:
      ValueError: a count is not positive, or the property is unknown.
    """

    placeholder_token: str
    initializer_token: str
    num_vectors: Annotated[int, COUNT] = 1
    learnable_property: str = "object"
    caption_column: str | None = None
    repeats: Annotated[int, COUNT] = 100
    save_as_full_pipeline: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(TEMPLATES, learnable_property=self.learnable_property)


CONCEPT = ("instance_data_dir", "instance_prompt", "class_data_dir", "class_prompt")
"""What describes one concept of Custom Diffusion: flags, and keys of the entries of ``concepts_list``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CustomSettings(PriorSettings):
    """The concepts that Custom Diffusion teaches, their new words, and what of the UNet is trained.

    Attributes:
      instance_data_dir, instance_prompt, class_data_dir, class_prompt: the concept, as for
        :class:`DreamBoothSettings`.
      concepts_list: JSON file with a list of concepts, each a dict with these four; instead of them.
      with_prior_preservation, prior_loss_weight, num_class_images, sample_batch_size: as for :class:`PriorSettings`.
      real_prior: the class images are photographs with captions, which must be in their folders; none is generated.
      modifier_token: new words, joined by ``+``, such as "<new1>+<new2>"; None for none.
      initializer_token: for each new word, one of a single token whose embedding is the starting point, joined by
        ``+``; surplus ones are not used.
      freeze_model: what is trained, a key of :data:`~diffuse_jax.adapters.targets.CUSTOM_DIFFUSION`.
      noaug: keep the size of the images, instead of giving them random sizes.
      no_safe_serialization: write ``.bin`` files instead of ``.safetensors``.

    Raises:
      ValueError: no concept is described, or in two ways; new words are missing, repeated or more than initializers.
    """

    instance_data_dir: str | Path | None = None
    instance_prompt: str | None = None
    class_data_dir: str | Path | None = None
    class_prompt: str | None = None
    concepts_list: str | Path | None = None
    real_prior: bool = False
    modifier_token: str | None = None
    initializer_token: str = "ktn+pll+ucd"
    freeze_model: str = "crossattn_kv"
    noaug: bool = False
    no_safe_serialization: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(CUSTOM_DIFFUSION, freeze_model=self.freeze_model)
        given = [f"--{name}" for name in CONCEPT if getattr(self, name) is not None]
        if self.concepts_list is not None and given:
            raise ValueError(f"--concepts_list has all concepts; leave out {', '.join(given)}")
        if self.concepts_list is None and None in (self.instance_data_dir, self.instance_prompt):
            raise ValueError("give --instance_data_dir and --instance_prompt, or several concepts with --concepts_list")
        if self.real_prior and not self.with_prior_preservation:
            raise ValueError("--real_prior is about class images, which are not used without --with_prior_preservation")
        words = self.modifiers
        if not all(words) or any(set(word) & set("/\\\0") for word in words):
            raise ValueError(
                f"--modifier_token must be words joined by +, which name files, got {self.modifier_token!r}"
            )
        if len(set(words)) < len(words):
            raise ValueError(f"--modifier_token has a word twice: {self.modifier_token!r}")
        if len(words) > len(self.initializers):
            raise ValueError(
                f"--initializer_token needs a word for each of the {len(words)} of --modifier_token, got "
                f"{len(self.initializers)}: {self.initializer_token!r}"
            )

    @property
    def modifiers(self) -> tuple[str, ...]:
        """The new words."""
        return () if self.modifier_token is None else tuple(self.modifier_token.split("+"))

    @property
    def initializers(self) -> tuple[str, ...]:
        """The words whose embeddings are starting points."""
        return tuple(self.initializer_token.split("+"))


REWARD_METHODS = ("ddpo", "draft")
"""How a reward is maximised: by policy gradients, which need its values only, or by its own gradient."""

OF_REWARD_METHOD: Mapping[str, tuple[str, ...]] = {
    "ddpo": (
        "sample_batch_size",
        "sample_num_batches_per_epoch",
        "train_num_inner_epochs",
        "train_timestep_fraction",
        "train_clip_range",
        "train_adv_clip_max",
        "per_prompt_stat_tracking",
        "per_prompt_stat_tracking_buffer_size",
        "per_prompt_stat_tracking_min_count",
    ),
    "draft": ("gradient_steps",),
}
"""Settings that only one method has."""

REWARDS = ("jpeg_compressibility", "jpeg_incompressibility", "aesthetic")
"""The rewards of the library; any other name is the user's ``module:function`` or ``path.py:function``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings(Checked):
    """The reward, how it is maximised, and how images are sampled meanwhile; most names are those of TRL's DDPO.

    Attributes:
      method: one of :data:`REWARD_METHODS`.
      reward: one of :data:`REWARDS`, or the user's function, ``module:function`` or ``path.py:function``.
      prompts: file with prompts, of any kind that ``diffuse-jax generate --prompts`` reads; None takes the captions of
        a data set.
      aesthetic_model_path: file with the linear layers of an aesthetic predictor, for the reward ``aesthetic``.
      clip_model_path: folder with the CLIP whose image embeddings it rates.
      resolution: height and width of the images in pixels; the model's own if None.
      use_lora: train low-rank pairs beside the UNet's layers instead of its weights.
      sample_num_steps: number of sampling steps.
      sample_eta: noise of DDIM's steps, from 0 (none) to 1.
      sample_guidance_scale: guidance scale; up to 1 there is no guidance.
      sample_batch_size: DDPO: images that are sampled at once, per device.
      sample_num_batches_per_epoch: DDPO: number of such batches in a round.
      train_num_inner_epochs: DDPO: number of passes over the samples of a round.
      train_timestep_fraction: DDPO: share of the random steps of each trajectory that are trained on.
      train_clip_range: DDPO: how far the ratio of new to old probability may move from 1.
      train_adv_clip_max: DDPO: largest absolute advantage.
      per_prompt_stat_tracking: DDPO: normalise rewards by the recent ones of the same prompt instead of the
        round's.
      per_prompt_stat_tracking_buffer_size: DDPO: number of recent rewards that are kept per prompt.
      per_prompt_stat_tracking_min_count: DDPO: with fewer, the rewards of the round are used.
      gradient_steps: DRaFT: number of last sampling steps that the gradient passes through.

    Raises:
      ValueError: a number is out of range, the method is unknown, or the settings contradict each other.
    """

    method: str = "ddpo"
    reward: str
    prompts: str | Path | None = None
    aesthetic_model_path: str | Path | None = None
    clip_model_path: str | Path | None = None
    resolution: Annotated[int, COUNT] | None = None
    use_lora: bool = True
    sample_num_steps: Annotated[int, COUNT] = 50
    sample_eta: Annotated[float, SHARE] = 1.0
    sample_guidance_scale: Annotated[float, NONNEGATIVE] = 5.0
    sample_batch_size: Annotated[int, COUNT] = 1
    sample_num_batches_per_epoch: Annotated[int, COUNT] = 2
    train_num_inner_epochs: Annotated[int, COUNT] = 1
    train_timestep_fraction: Annotated[float, PORTION] = 1.0
    train_clip_range: Annotated[float, POSITIVE] = 1e-4
    train_adv_clip_max: Annotated[float, POSITIVE] = 5.0
    per_prompt_stat_tracking: bool = False
    per_prompt_stat_tracking_buffer_size: Annotated[int, COUNT] = 16
    per_prompt_stat_tracking_min_count: Annotated[int, COUNT] = 16
    gradient_steps: Annotated[int, COUNT] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(REWARD_METHODS, method=self.method)
        changed = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default}
        for method, names in OF_REWARD_METHOD.items():
            if method != self.method and (useless := [name for name in names if name in changed]):
                raise ValueError(f"--{useless[0]} is for --method {method}, and would do nothing with {self.method}")
        sizes = [name for name in changed if name.startswith("per_prompt_stat_tracking_")]
        if sizes and not self.per_prompt_stat_tracking:
            raise ValueError(f"--{min(sizes)} has no effect without --per_prompt_stat_tracking")
        if self.method == "ddpo" and self.sample_eta == 0:
            raise ValueError("--sample_eta 0 samples without noise, and DDPO needs random steps: give more, up to 1")
        if self.method == "draft" and self.gradient_steps > self.sample_num_steps:
            raise ValueError(f"--gradient_steps must be at most --sample_num_steps {self.sample_num_steps}, got "
                             f"{self.gradient_steps}")  # fmt: skip
        needs = {name: getattr(self, name) is None for name in ("aesthetic_model_path", "clip_model_path")}
        if self.reward == "aesthetic" and any(needs.values()):
            missing = " and ".join(f"--{name}" for name, absent in needs.items() if absent)
            raise ValueError(f"--reward aesthetic needs {missing}: weights of yours, none are downloaded")
        if self.reward != "aesthetic" and not all(needs.values()):
            raise ValueError("--aesthetic_model_path and --clip_model_path are for --reward aesthetic")
        if self.reward not in REWARDS and not all(self.reward.rpartition(":")[::2]):
            raise ValueError(
                f"reward must be one of {', '.join(REWARDS)}, or a function as module:function or path.py:function, "
                f"got {self.reward!r}"
            )
        least, most = self.per_prompt_stat_tracking_min_count, self.per_prompt_stat_tracking_buffer_size
        if self.per_prompt_stat_tracking and least > most:
            raise ValueError(
                f"--per_prompt_stat_tracking_min_count {least} is never reached: "
                f"--per_prompt_stat_tracking_buffer_size keeps only {most} rewards"
            )
