"""``diffuse-jax parity MODEL --training``: one training step of a checkpoint on both sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax import weights
from diffuse_jax.pipelines import DiffusionPipeline, Net
from diffuse_jax.pipelines.parts.decode import decode_latents, to_uint8
from diffuse_jax.sharding import make_mesh
from diffuse_jax.torch_backend import differences
from diffuse_jax.torch_backend.command import PROMPTS
from diffuse_jax.torch_backend.differences import Difference
from diffuse_jax.torch_backend.training import Trained, Update, batch_of, full, low_rank, our_step
from diffuse_jax.torch_backend.training_command import METHODS
from diffuse_jax.torch_backend.training_report import TOLERANCES, Compared, compare_updates
from diffuse_jax.torch_backend.training_torch import (
    full_parameters,
    low_rank_parameters,
    open_reference,
    text_to_image_loss,
    torch_step,
)
from diffuse_jax.training.batches import Batch
from diffuse_jax.training.data import Example, FolderSource, Transform
from diffuse_jax.training.families import check_method, family_of
from diffuse_jax.training.latent import open_pipeline
from diffuse_jax.training.objective import Objective

ENCODER_NAMES = ("text_encoder", "text_encoder_2")
RANK = 4
NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
"""The scheduler settings that training uses; the others are only for sampling."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What to train, and the data.

    Attributes:
      method: "full", or "lora" for random LoRA pairs on all attention projections.
      train_text_encoder: train the text encoders as well as the UNet.
      snr_gamma: Min-SNR weighting; None for none.
      batch_size: number of images in the step.
      resolution: width and height of the images in pixels; the model's default if None.
      seed: seed of noise, timesteps and synthetic images.
      dtype: the dtype that networks compute in, "float32" or "bfloat16"; trained parameters are float32.
      train_data_dir: an image folder with captions in ``metadata.jsonl``, of which the first images are used; if None,
        the model's autoencoder decodes synthetic images from noise.
      captions: captions of synthetic images, used cyclically; one is empty, as in training for guidance.
    """

    method: str = "full"
    train_text_encoder: bool = False
    snr_gamma: float | None = None
    batch_size: int = 2
    resolution: int | None = None
    seed: int = 0
    dtype: str = "float32"
    train_data_dir: Path | None = None
    captions: tuple[str, ...] = (*PROMPTS, "")

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be {' or '.join(METHODS)}, got {self.method!r}")
        if self.dtype not in TOLERANCES:
            raise ValueError(f"training steps are compared in {' or '.join(TOLERANCES)}, got {self.dtype}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


def compare_training(
    source: str | Path,
    request: TrainingRequest = TrainingRequest(),
    *,
    reference: str | Path | None = None,
    device: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    reference_variant: str | None = None,
    reference_revision: str | None = None,
) -> Compared:
    """Compare one training step here and on PyTorch with the same weights, images, captions, noise and timesteps.

    The PyTorch side finishes and frees its memory before ours starts, so the total memory is that of our step plus
    three copies of the parameters.

    Args:
      source: Stable Diffusion 1.x, 2.x or XL: a folder in diffusers layout or a Hub id.
      request: what to train, and the data.
      reference: the checkpoint that PyTorch opens instead of ``source``.
      device: PyTorch's device, "cpu" or "cuda"; if None, CUDA if available.
      variant, revision: variant and revision of ``source``.
      reference_variant, reference_revision: variant and revision of ``reference``.

    Raises:
      WeightsError: one side cannot open its model.
      ValueError: the request does not fit the model, or the two models have different parameters.
      FileNotFoundError: ``train_data_dir`` has no images with captions.
    """
    pipe = open_for(source, request, variant=variant, revision=revision)
    names = trained_networks(pipe, request)
    batch = batch_of(pipe, examples_for(pipe, request))
    objective = Objective(scheduler=pipe.scheduler, snr_gamma=request.snr_gamma)
    trained = full(pipe, names) if request.method == "full" else low_rank(pipe, names, RANK, request.seed)
    theirs = open_reference(
        reference or source,
        trainable=names if request.method == "full" else (),
        dtype=request.dtype,
        device=device,
        variant=reference_variant if reference else variant,
        revision=reference_revision if reference else revision,
    )
    found = list(differences_of(pipe, theirs))
    if any(difference.what == "shape" for difference in found):
        return Compared([], [], [], [], found)
    wanted = reference_step(theirs, trained, objective, batch, request)
    del theirs
    with jax.default_matmul_precision("highest"):
        ours = our_step(pipe, trained, objective, batch, request.seed)
    return compare_updates(ours, wanted, TOLERANCES[request.dtype])._replace(differences=found)


def differences_of(pipe: DiffusionPipeline, theirs: Any) -> Iterator[Difference]:
    """Configurations and parameters that differ before the step."""
    modules = {name: part for name, part in theirs.components.items() if hasattr(part, "state_dict")}
    yield from differences.of_networks(pipe.components, pipe.params, modules)
    ours, config = pipe.scheduler.to_json(), dict(theirs.scheduler.config)
    yield from differences.of_configs("scheduler", {k: ours[k] for k in NOISE_SCHEDULE if k in ours}, config)


def reference_step(pipe: Any, trained: Trained, objective: Objective, batch: Batch, request: TrainingRequest) -> Update:
    """The training step of PyTorch's pipeline."""
    if request.method == "full":
        parameters = full_parameters(pipe, list(trained.trainable))
    else:
        parameters = low_rank_parameters(pipe, trained.trainable)
    return torch_step(
        parameters, lambda: text_to_image_loss(pipe, objective, batch, seed=request.seed, dtype=request.dtype)
    )


def open_for(source: str | Path, request: TrainingRequest, **hub: Any) -> DiffusionPipeline:
    """Our pipeline as a trainer opens it: fully trained networks in float32, the others in the compute dtype.

    Raises:
      WeightsError: there is no such checkpoint.
      ValueError: it is not of Stable Diffusion.
    """
    folder = weights.resolve(source, only_small=True, revision=hub.get("revision"))
    family_of(weights.read_index(folder).class_name, source, "comparison")
    encoders = ENCODER_NAMES if request.train_text_encoder else ()
    whole = ("unet", *encoders) if request.method == "full" else ()
    mesh = make_mesh(devices=jax.devices()[:1])
    pipe = open_pipeline(source, trainable=whole, mesh=mesh, dtype=jnp.dtype(request.dtype), **hub)
    check_method(pipe, source, "comparison")
    return pipe


def trained_networks(pipe: DiffusionPipeline, request: TrainingRequest) -> list[str]:
    """The names of the trained networks: the UNet and, if requested, the text encoders."""
    encoders = [name for name in ENCODER_NAMES if name in pipe.params]
    return ["unet", *encoders] if request.train_text_encoder else ["unet"]


def examples_for(pipe: DiffusionPipeline, request: TrainingRequest) -> list[Example]:
    """The captioned images of the step.

    Raises:
      ValueError: the resolution does not fit the networks, or the folder has too few images.
      FileNotFoundError: the folder has no images with captions.
    """
    size, count = resolution_for(pipe, request), request.batch_size
    if request.train_data_dir is None:
        whole = (size, size)
        images = synthetic_images(pipe, count, size, request.seed)
        captions = [request.captions[i % len(request.captions)] for i in range(count)]
        return [Example(x, captions[i], whole, (0, 0), whole, i, 0, f"image {i}") for i, x in enumerate(images)]
    source, transform = FolderSource(request.train_data_dir), Transform(size)
    if len(source) < count:
        raise ValueError(f"{request.train_data_dir} has only {len(source)} images for batch_size={count}")
    return [transform.fixed(source[i], i) for i in range(count)]


def resolution_for(pipe: DiffusionPipeline, request: TrainingRequest) -> int:
    """Width and height of the images in pixels.

    Raises:
      ValueError: it is not a multiple of the networks' total downsampling factor.
    """
    unet, scale = pipe.components["unet"].config, pipe.components["vae"].config.scale
    default = unet.sample_size if isinstance(unet.sample_size, int) else min(unet.sample_size)
    size, multiple = request.resolution or default * scale, scale * 2 ** (len(unet.block_out_channels) - 1)
    if size < 1 or size % multiple:
        raise ValueError(f"resolution must be a multiple of {multiple} for this model, got {size}")
    return size


def synthetic_images(pipe: DiffusionPipeline, count: int, size: int, seed: int) -> np.ndarray:
    """Images that the autoencoder decodes from noise, uint8 ``[count,size,size,3]``: colours and textures, no
    objects."""
    vae = Net("vae", pipe.components["vae"])
    side = size // vae.config.scale
    shape = (count, side, side, vae.config.latent_channels)
    latents = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    decode = jax.jit(lambda params, x: to_uint8(decode_latents(vae, params, x)))
    return np.asarray(decode({"vae": pipe.params["vae"]}, latents))
