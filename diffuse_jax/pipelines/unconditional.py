"""Pictures from noise alone: DDPM (Ho et al. 2020) and DDIM (Song et al. 2020) over pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.models.base import Params
from diffuse_jax.models.unet_2d import UNet2DConfig, UNet2DModel
from diffuse_jax.pipelines import denoise as verbs
from diffuse_jax.pipelines.base import DiffusionPipeline
from diffuse_jax.pipelines.run import (
    ImagePipelineOutput,
    Job,
    StepCallback,
    compile_job,
    make_draws,
    program_output,
    run_job,
)
from diffuse_jax.pipelines.sampling import Draws, Rows, first_noise
from diffuse_jax.schedulers import DDIMScheduler
from diffuse_jax.schedulers.plan import Plan, State


class Batch(NamedTuple):
    """A batch of requests."""

    draws: Draws
    class_labels: Rows | None  # int32 [B]


class Prepared(NamedTuple):
    """What the loop needs beside the state."""

    keys: jax.Array


@dataclasses.dataclass(frozen=True)
class Unconditional:
    """The static half of a request: the network, the size and the form of the result."""

    unet: UNet2DModel
    latent_shape: tuple[int, int, int]
    output: str

    def start(self, params: dict[str, Params], batch: Batch, plan: Plan) -> tuple[Prepared, State]:
        """Draw the noise."""
        noise, keys = first_noise(batch.draws, self.latent_shape)
        return Prepared(keys), plan.init(noise)

    def denoiser(self, params: dict[str, Params], batch: Batch, prepared: Prepared) -> verbs.Denoiser:
        """The UNet."""
        return lambda x, t: self.unet.apply({"params": params["unet"]}, x, t, batch.class_labels)

    def finish(self, params: dict[str, Params], state: State) -> jax.Array:
        """[-1, 1] to pixels."""
        if self.output == "latent":
            return state.sample
        images = jnp.clip(state.sample / 2 + 0.5, 0.0, 1.0)
        return verbs.to_uint8(images) if self.output == "uint8" else images


class DDPMPipeline(DiffusionPipeline):
    """Pictures by the sampler of the folder, with as many steps as the training had unless told otherwise."""

    required: ClassVar[tuple[str, ...]] = ("unet", "scheduler")
    default_steps: ClassVar[int] = 1000

    def __call__(
        self,
        batch_size: int = 1,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        class_labels: int | Sequence[int] | None = None,
        seed: int | Sequence[int] | None = None,
        key: jax.Array | None = None,
        latents: Any = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress_bar: bool = False,
        compile_only: bool = False,
    ) -> ImagePipelineOutput | None:
        """Make ``batch_size`` pictures.

        Args:
          batch_size: how many.
          num_inference_steps: 1000 (:class:`DDIMPipeline`: 50) if ``timesteps``, the sampler's own grid, is None too.
          eta, use_clipped_model_output: of DDIM; other samplers refuse them.
          class_labels: for networks that were trained with classes, one or one per picture.
          seed, key: as in :class:`~diffuse_jax.pipelines.call.CallOptions`.
          latents: the standard normal noise ``[B,h,w,channels]`` to start from, instead of drawing it.
          output_type: "pil", "np" (float32 ``[B,h,w,channels]`` in [0, 1]) or "latent" (in [-1, 1], not clipped).
          callback_on_step_end, progress_bar: run the program step by step.
          compile_only: compile the program and return None.

        Raises:
          ValueError: an argument is impossible or contradicts another one; nothing has been compiled.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        config = self.components["unet"].config
        task = Unconditional(self.components["unet"], sample_shape(config), program_output(output_type))
        draws, seeds = make_draws(batch_size, seed, key, latents, task.latent_shape, self.mesh)
        batch = Batch(draws, check_labels(class_labels, config, batch_size))
        if num_inference_steps is None and timesteps is None:
            num_inference_steps = min(self.default_steps, self.scheduler.num_train_timesteps)
        options = {"eta": eta, "use_clipped_model_output": use_clipped_model_output}
        given = {name: value for name, value in options.items() if value is not None}
        plan = self.scheduler.plan(num_inference_steps, timesteps=timesteps, **given)
        job = Job(task, batch, plan, batch_size, seeds)
        if compile_only:
            compile_job(self, job, None)
            return None
        return run_job(self, job, output_type, callback=callback_on_step_end, progress_bar=progress_bar)


class DDIMPipeline(DDPMPipeline):
    """Pictures by DDIM, whatever sampler the folder names."""

    default_steps: ClassVar[int] = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.scheduler, DDIMScheduler):
            components = {**self.components, "scheduler": DDIMScheduler.from_config(self.scheduler)}
            object.__setattr__(self, "components", components)


def sample_shape(config: UNet2DConfig) -> tuple[int, int, int]:
    """Height, width and channels of the network's pictures.

    Raises:
      ValueError: the config does not say.
    """
    size = config.sample_size
    if size is None:
        raise ValueError("the network's config has no sample_size; give it one, pixels or (height, width)")
    return (*((size, size) if isinstance(size, int) else size), config.in_channels)


def check_labels(labels: int | Sequence[int] | None, config: UNet2DConfig, images: int) -> np.ndarray | None:
    """One class for each picture, int32.

    Raises:
      ValueError: labels are missing or not wanted, outside the classes, or not as many as pictures.
    """
    if (labels is None) == config.has_classes:
        wants = "needs class_labels" if config.has_classes else "takes no class_labels"
        raise ValueError(f"this network {wants} (num_class_embeds={config.num_class_embeds})")
    if labels is None:
        return None
    array = np.asarray(labels, np.int32)
    if array.shape not in ((), (images,)):
        raise ValueError(f"class_labels has shape {array.shape} for {images} pictures; give one class or one each")
    classes = config.num_class_embeds
    if classes is not None and not np.all((array >= 0) & (array < classes)):
        raise ValueError(f"class_labels must be from 0 to {classes - 1}, got {labels}")
    return np.broadcast_to(array, (images,))
