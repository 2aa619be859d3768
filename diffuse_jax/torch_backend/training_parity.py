"""``diffuse-jax parity MODEL --training``: one training step of a checkpoint on both sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
"""What training uses of a scheduler's configuration; the rest is the sampler's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What is trained, and on what.

    Attributes:
      method: "full", or "lora" for random low-rank pairs beside all projections of attention.
      train_text_encoder: train the text encoders too, not the UNet alone.
      snr_gamma: Min-SNR weighting; None for none.
      batch_size: pictures in the step.
      resolution: their width and height in pixels; the model's own if None.
      seed: of noise, timesteps and, where they are made, of pictures.
      dtype: what networks compute in, "float32" or "bfloat16"; trained parameters are float32.
      train_data_dir: an image folder with captions in ``metadata.jsonl``, whose first pictures are taken; None: the
        model's own autoencoder makes pictures from noise.
      captions: of pictures that are made, in turn; one is empty, as guidance needs it.
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
    """One training step here and on PyTorch from the same weights, pictures, captions, noise and timesteps.

    The PyTorch side is done, and its memory free, before ours begins: together they need what our step needs, plus the
    parameters three times.

    Args:
      source: Stable Diffusion 1.x, 2.x or XL: a folder in diffusers layout or a Hub id.
      request: what is trained, and on what.
      reference: what PyTorch opens instead of ``source``.
      device: of PyTorch, "cpu" or "cuda"; CUDA where there is one, if None.
      variant, revision: of ``source``.
      reference_variant, reference_revision: of ``reference``.

    Raises:
      WeightsError: one side cannot open its model.
      ValueError: the request does not fit the model, or both models have other parameters.
      FileNotFoundError: ``train_data_dir`` has no pictures with captions.
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
        made = our_step(pipe, trained, objective, batch, request.seed)
    return compare_updates(made, wanted, TOLERANCES[request.dtype])._replace(differences=found)


def differences_of(pipe: DiffusionPipeline, theirs: Any) -> Iterator[Difference]:
    """Configurations and parameters that are not the same before the step."""
    modules = {name: part for name, part in theirs.components.items() if hasattr(part, "state_dict")}
    yield from differences.of_networks(pipe.components, pipe.params, modules)
    ours, config = pipe.scheduler.to_json(), dict(theirs.scheduler.config)
    yield from differences.of_configs("scheduler", {k: ours[k] for k in NOISE_SCHEDULE if k in ours}, config)


def reference_step(pipe: Any, trained: Trained, objective: Objective, batch: Batch, request: TrainingRequest) -> Update:
    """The step of PyTorch's pipeline."""
    if request.method == "full":
        parameters = full_parameters(pipe, list(trained.trainable))
    else:
        parameters = low_rank_parameters(pipe, trained.trainable)
    return torch_step(
        parameters, lambda: text_to_image_loss(pipe, objective, batch, seed=request.seed, dtype=request.dtype)
    )


def open_for(source: str | Path, request: TrainingRequest, **hub: Any) -> DiffusionPipeline:
    """Our pipeline as a trainer opens it: what is trained whole is float32, the rest what networks compute in."""
    encoders = ENCODER_NAMES if request.train_text_encoder else ()
    whole = ("unet", *encoders) if request.method == "full" else ()
    mesh = make_mesh(devices=jax.devices()[:1])
    return open_pipeline(source, trainable=whole, mesh=mesh, dtype=jnp.dtype(request.dtype), **hub)


def trained_networks(pipe: DiffusionPipeline, request: TrainingRequest) -> list[str]:
    """The UNet, and the text encoders if they are asked for."""
    encoders = [name for name in ENCODER_NAMES if name in pipe.params]
    return ["unet", *encoders] if request.train_text_encoder else ["unet"]


def examples_for(pipe: DiffusionPipeline, request: TrainingRequest) -> list[Example]:
    """The captioned pictures of the step.

    Raises:
      ValueError: the resolution does not fit the networks, or the folder has too few pictures.
      FileNotFoundError: the folder has no pictures with captions.
    """
    size, count = resolution_for(pipe, request), request.batch_size
    if request.train_data_dir is None:
        whole = (size, size)
        pictures = made_pictures(pipe, count, size, request.seed)
        captions = [request.captions[i % len(request.captions)] for i in range(count)]
        return [Example(x, captions[i], whole, (0, 0), whole, i, 0, f"picture {i}") for i, x in enumerate(pictures)]
    source, transform = FolderSource(request.train_data_dir), Transform(size)
    if len(source) < count:
        raise ValueError(f"{request.train_data_dir} has {len(source)} pictures, batch_size asks for {count}")
    return [transform.fixed(source[i], i) for i in range(count)]


def resolution_for(pipe: DiffusionPipeline, request: TrainingRequest) -> int:
    """Width and height of the pictures in pixels.

    Raises:
      ValueError: it is no multiple of what the networks halve it by.
    """
    unet, scale = pipe.components["unet"].config, pipe.components["vae"].config.scale
    own = unet.sample_size if isinstance(unet.sample_size, int) else min(unet.sample_size)
    size, multiple = request.resolution or own * scale, scale * 2 ** (len(unet.block_out_channels) - 1)
    if size < 1 or size % multiple:
        raise ValueError(f"resolution must be a multiple of {multiple} for this model, got {size}")
    return size


def made_pictures(pipe: DiffusionPipeline, count: int, size: int, seed: int) -> np.ndarray:
    """What the autoencoder makes of noise, uint8 ``[count,size,size,3]``: its colours and textures, without things."""
    vae = Net("vae", pipe.components["vae"])
    side = size // vae.config.scale
    shape = (count, side, side, vae.config.latent_channels)
    latents = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    decode = jax.jit(lambda params, x: to_uint8(decode_latents(vae, params, x)))
    return np.asarray(decode({"vae": pipe.params["vae"]}, latents))
