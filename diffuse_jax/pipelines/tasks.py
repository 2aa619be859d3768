"""Tasks as changes to a request: image to image, inpainting, ControlNets. They combine, and work for every family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from diffuse_jax.models.controlnet import check_fits
from diffuse_jax.pipelines.family import autoencoder_name, output_size
from diffuse_jax.pipelines.inputs import (
    ImageInput,
    finite,
    image_size,
    number_array,
    per_prompt,
    pixels,
    signed,
    stays_on_device,
)
from diffuse_jax.pipelines.method import Net, Rows
from diffuse_jax.pipelines.parts.control import Controlled
from diffuse_jax.pipelines.parts.decode import autoencoder
from diffuse_jax.pipelines.parts.guidance import Guidance
from diffuse_jax.pipelines.parts.start import FromImage, FromLatents
from diffuse_jax.pipelines.pasting import Region, cut_control_images
from diffuse_jax.pipelines.running import Request


def from_image(request: Request, pipe: Any, image: ImageInput) -> Request:
    """Start from an image with noise added (SDEdit, Meng et al. 2021); the plan's ``strength`` sets how much.

    Args:
      request: a text-to-image request whose plan was made with ``strength``.
      pipe: the pipeline.
      image: the image, or one per prompt, of the request's size; or scaled latents ``[B,h,w,c]``.
    """
    rows = image_rows(request, pipe, image, "image")
    return changed(request, rows, start=FromImage(vae_of(pipe)))


def controlled(request: Request, pipe: Any, images: ImageInput, options: Mapping[str, Any], *, scale: float) -> Request:
    """Apply the pipeline's ControlNets to the UNet.

    Args:
      request: a request for any task.
      pipe: the pipeline, with one ``controlnet`` or several.
      images: the control image, or one per prompt. With several ControlNets, a list with one image per ControlNet, or
        one such list per prompt.
      options: the arguments of :class:`~diffuse_jax.pipelines.options.ControlOptions`.
      scale: the default ``controlnet_conditioning_scale``.

    Raises:
      ValueError: the number of images, scales or windows does not match the number of ControlNets, or one is for
        another UNet.
    """
    nets = nets_of(pipe, "controlnet")
    for net in nets:
        check_fits(net.config, pipe.components["unet"].config)
    several = nets[0].index is not None
    size = request_size(request, vae_of(pipe))
    each = images_by_net(images, len(nets)) if several else [images]
    if isinstance(request.finish, Region):
        each = [cut_control_images(request.finish, x, size) for x in each]
    control = tuple(
        per_prompt(pixels(x, size, "control image", holes=True), request.images, request.copies, "control image")
        for x in each
    )
    defaults = {"controlnet_conditioning_scale": scale, "control_guidance_start": 0.0, "control_guidance_end": 1.0}
    scales, starts, ends = (one_per_net(options.get(k, v), len(nets), k) for k, v in defaults.items())
    evaluations = int(request.plan.num_evaluations)
    windows = [window(s, e, evaluations) for s, e in zip(starts, ends, strict=True)]
    guess = bool(options.get("guess_mode")) or nets[0].config.global_pool_conditions
    rows = {
        "control_images": control,
        "control_scale": np.tile(np.array(scales, np.float32), (request.images, 1)),
        "control_window": np.tile(np.array(windows, np.int32), (request.images, 1, 1)),
        "guess_mode": np.full(request.images, guess),
    }
    return changed(request, rows, denoiser=below_guidance(request.method.denoiser, lambda d: Controlled(d, nets)))


def images_by_net(images: Any, nets: int) -> list[Any]:
    """The control images by ControlNet, from a list with one image per ControlNet or one such list per prompt.

    Raises:
      ValueError: a list does not have one image per ControlNet.
    """
    rows = images if isinstance(images, list | tuple) else [images]
    nested = any(isinstance(row, list | tuple) for row in rows)
    lists = [row if isinstance(row, list | tuple) else [row] for row in rows] if nested else [rows]
    if wrong := [len(row) for row in lists if len(row) != nets]:
        raise ValueError(
            f"there are {nets} ControlNets and {wrong[0]} control images; give a list with one per ControlNet"
        )
    return [[row[k] for row in lists] for k in range(nets)] if nested else list(rows)


def changed(request: Request, rows: Rows, **parts: Any) -> Request:
    """The request with rows added and parts of its method replaced."""
    return request._replace(rows=request.rows | rows, method=replace(request.method, **parts))


def below_guidance(denoiser: Any, wrap: Callable[[Any], Any]) -> Any:
    """Wrap the denoiser inside guidance, or the denoiser itself if there is none."""
    if isinstance(denoiser, Guidance):
        return replace(denoiser, inner=wrap(denoiser.inner))
    return wrap(denoiser)


def nets_of(pipe: Any, name: str) -> tuple[Net, ...]:
    """The networks of a component that is one network or several (``controlnet``, ``adapter``)."""
    found = pipe.components[name]
    several = isinstance(found, tuple | list)
    return tuple(Net(name, model, k) for k, model in enumerate(found)) if several else (Net(name, found),)


def vae_of(pipe: Any) -> Net:
    """The pipeline's autoencoder."""
    name = autoencoder_name(pipe)
    return Net(name, autoencoder(pipe.components[name]))


def request_size(request: Request, vae: Net) -> tuple[int, int]:
    """(height, width) of the request's images in pixels."""
    height, width, _ = request.method.latent_shape
    return height * vae.config.scale, width * vae.config.scale


def image_rows(request: Request, pipe: Any, image: ImageInput, name: str) -> Rows:
    """``image [B,H,W,3]`` in [-1, 1]; or ``image_latents [B,h,w,c]`` if latents were given.

    Raises:
      ValueError: the image is missing.
    """
    require_image(image, name)
    vae = vae_of(pipe)
    if is_latents(image, vae):
        return {"image_latents": latent_rows(image, request, name)}
    array = signed(pixels(image, request_size(request, vae), name))
    return {"image": per_prompt(array, request.images, request.copies, name)}


def require_image(image: Any, name: str) -> None:
    """Check that an image was given.

    Raises:
      ValueError: it was not.
    """
    if image is None:
        raise ValueError(f"give {name}: a PIL image, an array, or one per prompt")


def is_latents(image: Any, vae: Net) -> bool:
    """Whether an image is given as latents: a float array with the autoencoder's latent channels (not 3)."""
    channels = vae.config.latent_channels
    floating = isinstance(image, np.ndarray | jax.Array) and jax.dtypes.issubdtype(image.dtype, np.floating)
    return floating and image.ndim == 4 and image.shape[-1] == channels != 3


def latent_rows(latents: Any, request: Request, name: str, shape: tuple[int, ...] | None = None) -> Any:
    """The caller's latents as float32, one row per image; those on a device stay there.

    Args:
      latents: the latents.
      request: the request.
      name: of the argument.
      shape: of each; that of the request's if None.

    Raises:
      ValueError: they do not have this shape, or those on the host are not finite.
    """
    on_device = stays_on_device(latents)
    array: Any = latents.astype(np.float32) if on_device else number_array(latents, name).astype(np.float32)
    shape = request.method.latent_shape if shape is None else shape
    if array.ndim != 4 or array.shape[1:] != shape:
        want = ", ".join(map(str, shape))
        raise ValueError(f"{name} as latents must be [B, {want}], got {array.shape}")
    return per_prompt(array, request.images, request.copies, name)


def input_size(pipe: Any, image: ImageInput, name: str) -> tuple[int, int]:
    """The output size (height, width) in pixels for an input image: its size, rounded down to whole latent pixels.

    Raises:
      ValueError: the image is missing.
    """
    require_image(image, name)
    vae = vae_of(pipe)
    if is_latents(image, vae):
        return image.shape[1] * vae.config.scale, image.shape[2] * vae.config.scale
    return image_size(image, name, vae.config.scale)


def one_per_net(value: float | Sequence[float], nets: int, name: str, kind: str = "ControlNet") -> list[float]:
    """One value per network of a ``kind``, from a single number or a list.

    Raises:
      ValueError: the list does not have one value per network, or a value is not finite.
      TypeError: a value is not a number.
    """
    array = finite(value, name)
    if array.shape not in ((), (nets,)):
        raise ValueError(f"{name} has {array.size} entries for {nets} {kind}s; give one number, or one per {kind}")
    return [float(v) for v in np.broadcast_to(array, (nets,))]


def window(start: float, end: float, evaluations: int) -> tuple[int, int]:
    """The evaluations ``[first, last + 1)`` at which a ControlNet acts: those that lie within its share of the run.

    Raises:
      ValueError: the window is empty or extends beyond [0, 1].
    """
    if not 0 <= start < end <= 1:
        raise ValueError(
            f"control_guidance_start={start:g} must be smaller than control_guidance_end={end:g}, both in [0, 1]"
        )
    inside = [i for i in range(evaluations) if i / evaluations >= start and (i + 1) / evaluations <= end]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def from_latents(request: Request, pipe: Any, latents: Any) -> Request:
    """Continue from another model's noisy latents; the plan must be made with ``denoising_start``.

    Raises:
      ValueError: they are not latents, or do not have the request's size.
    """
    rows = image_rows(request, pipe, latents, "image")
    return changed(request, {"latents": continued(rows, vae_of(pipe))}, start=FromLatents())


def continued(rows: Rows, vae: Net) -> Any:
    """The latents of a run to continue, among the rows of its image.

    Raises:
      ValueError: the image is pixels.
    """
    if "image_latents" not in rows:
        raise ValueError(f"denoising_start needs image= as latents [B,h,w,{vae.config.latent_channels}]")
    return rows["image_latents"]


def chosen_size(pipe: Any, image: ImageInput, name: str, height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width) in pixels: as given, or that of the image; see :func:`input_size` and ``output_size``."""
    default = input_size(pipe, image, name)
    return output_size(pipe, default[0] if height is None else height, default[1] if width is None else width)


def control_size(pipe: Any, images: ImageInput, name: str, height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width) in pixels: as given, or that of the (first) control image."""
    if images is not None and isinstance(nets := pipe.components["controlnet"], tuple | list):
        images = images_by_net(images, len(nets))[0]
    return chosen_size(pipe, images, name, height, width)
