"""Networks in one file whose layout is not that of a folder: the configuration is read off the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax import layouts, weights
from diffuse_jax.habits import refuse_habits
from diffuse_jax.layouts import Part
from diffuse_jax.models.base import Model, Params, floating_type
from diffuse_jax.sharding import as_mesh, param_shardings
from diffuse_jax.weights import names
from diffuse_jax.writing import expanded

Network = TypeVar("Network", bound=Model)


def open_part(
    cls: type[Network],
    part: Part,
    path: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None,
    mesh: Mesh | str | None,
) -> tuple[Network, Params]:
    """The network of class ``cls`` that a layout's reader found in the file at ``path``.

    Args:
      config: values of ``config.json`` that replace what the tensors say, or the local folder that holds one.
      dtype, param_dtype, mesh: as in ``from_pretrained``.

    Raises:
      WeightsError: the tensors fit no network of this class one to one.
      ValueError: ``dtype`` is not a floating-point type.
    """
    dtype = floating_type(dtype)
    if config is not None and not isinstance(config, Mapping):
        config = weights.read_json(expanded(config) / "config.json")
    try:
        model = cls.from_config(part.config | dict(config or {}), dtype=dtype)
        shapes = model.shapes()
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise weights.WeightsError(f"{path}: its tensors fit no valid {cls.__name__} ({error})") from error
    mesh = as_mesh(mesh)
    views = weights.match(part.checkpoint, shapes, label=str(path))
    return model, weights.place(
        views,
        dtype=floating_type(dtype if param_dtype is None else param_dtype),
        shardings=None if mesh is None else param_shardings(shapes, mesh),
    )


class OneFile:
    """What networks have that are published in files of their own: a base of their classes beside :class:`Model`."""

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        config: str | Path | Mapping[str, Any] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        mesh: Mesh | str | None = None,
        **unknown: Any,
    ) -> tuple[Self, Params]:
        """The network of one ``.safetensors``, ``.bin``, ``.ckpt`` or ``.pth`` file, alone or in a whole checkpoint, in
        the original layout or in that of a folder.

        Args:
          path: the file; its configuration is inferred from its tensors.
          config: values of ``config.json`` that replace those, or the local folder that holds one. What tensors do not
            say (number of heads, ``sample_size``, an autoencoder's ``scaling_factor``) is that of the published
            networks of Stable Diffusion 1, 2 and XL.
          dtype, param_dtype, mesh: as in :meth:`from_pretrained`.

        Raises:
          WeightsError: a damaged file, one without such a network, or tensors that do not fit it one to one.
          ValueError: ``dtype`` is not a floating-point type.

        Example::

            unet = UNet2DConditionModel.from_single_file("sdxl_lightning_4step_unet.safetensors", dtype="bfloat16")
            pipe = DiffusionPipeline.from_pretrained("path/to/sdxl", unet=unet, dtype="bfloat16")
        """
        refuse_habits(unknown)
        if unknown:
            raise TypeError(f"from_single_file has no argument {', '.join(sorted(unknown))}")
        if config is not None and not isinstance(config, Mapping):
            config = weights.read_json(expanded(config) / "config.json")
        part = layouts.read_network(path, cls.__name__, config or ())
        return open_part(cls, part, path, config=config, dtype=dtype, param_dtype=param_dtype, mesh=mesh)  # type: ignore

    def save_single_file(
        self: Any, path: str | Path, params: Params, *, dtype: DTypeLike | None = None, prefix: str | None = None
    ) -> Path:
        """Write one ``.safetensors`` file in the original layout, with the configuration in its metadata.

        Args:
          path: the file; it is replaced if it exists.
          params: the parameters; names and shapes must be those of this network.
          dtype: the dtype that floating-point parameters are cast to; None keeps theirs.
          prefix: what names in the file begin with; None is the prefix of published files (``control_model.`` for
            ControlNets, ``model.diffusion_model.`` for UNets, none for other networks).

        Raises:
          WeightsError: the parameters are not this network's, or the original layout has no names for them.
          ValueError: ``dtype`` is not a floating-point type, or the name does not end in ``.safetensors``.
        """
        kind, path, dtype = type(self).__name__, safetensors_path(path), None if dtype is None else floating_type(dtype)
        weights.check_params(params, self.shapes(), label=kind)
        layouts.write_network(path, kind, in_host_memory(params), self.config_json(), casting(dtype), prefix=prefix)
        return path


def casting(dtype: DTypeLike | None) -> Callable[[np.ndarray], np.dtype]:
    """Array -> the dtype to write it in: ``dtype`` for floating-point arrays, or the array's own if it is None."""
    floats = lambda array: dtype is not None and jnp.issubdtype(array.dtype, jnp.floating)
    return lambda array: jnp.dtype(dtype) if floats(array) else array.dtype


def safetensors_path(path: str | Path) -> Path:
    """The path of a file to write.

    Raises:
      ValueError: it does not end in ``.safetensors``.
    """
    if (path := expanded(path)).suffix != ".safetensors":
        raise ValueError(f"a single file is written as safetensors; {path} does not end in .safetensors")
    return path


def in_host_memory(params: Params) -> dict[str, np.ndarray]:
    """A network's parameters with PyTorch's names and axis order."""
    return names.torch_tensors({path: np.asarray(leaf) for path, leaf in names.flatten(params).items()})
