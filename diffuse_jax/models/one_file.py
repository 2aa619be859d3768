"""A network from one file whose layout is not that of a folder: its configuration is read off the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax import weights
from diffuse_jax.layouts import Part
from diffuse_jax.models.base import Model, Params, floating_type
from diffuse_jax.sharding import param_shardings

Network = TypeVar("Network", bound=Model)


def open_part(
    cls: type[Network],
    part: Part,
    path: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None,
    mesh: Mesh | None,
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
        config = weights.read_json(Path(config) / "config.json")
    try:
        model = cls.from_config(part.config | dict(config or {}), dtype=dtype)
        shapes = model.shapes()
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise weights.WeightsError(f"{path}: its tensors fit no valid {cls.__name__} ({error})") from error
    views = weights.match(part.checkpoint, shapes, label=str(path))
    return model, weights.place(
        views,
        dtype=floating_type(dtype if param_dtype is None else param_dtype),
        shardings=None if mesh is None else param_shardings(shapes, mesh),
    )
