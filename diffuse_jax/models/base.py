"""What all networks of the library share: a frozen config, two dtypes, and a tree of shapes."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax import weights
from diffuse_jax.config import Config
from diffuse_jax.habits import refuse_habits
from diffuse_jax.limits import refuse_links
from diffuse_jax.messages import brief
from diffuse_jax.models.layers import SHAPES_ONLY
from diffuse_jax.sharding import as_mesh, on_automatic_axes, param_shardings
from diffuse_jax.weights.files import unchanged
from diffuse_jax.writing import expanded

logger = logging.getLogger(__name__)

Params = dict[str, Any]
"""A tree of arrays: nested dicts whose joined keys are the checkpoint's names."""


_REGISTRY: dict[tuple[str, str], type[Model]] = {}
"""Every network class by library and name; filled as the classes are defined."""


MISFIT = re.compile(r'"([^"]*)" in "/?([^"]*)".* shape (\([^)]*\)),.* shape (\([^)]*\))')
"""What Flax says about a parameter whose shape is not that of the input: name, module, wanted and found shape."""


class Model(nn.Module):
    """A pure network: ``model.apply({"params": params}, ...)``; its only collection is ``params``.

    Attributes:
      config: the frozen configuration, which alone determines the tree of parameters.
      dtype: the dtype of computations; norms, softmax and timesteps stay in float32.
      param_dtype: the dtype of newly initialised parameters; loaded ones keep the dtype they were loaded with.
    """

    config: Config
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    config_class: ClassVar[type[Config]]
    weights_name: ClassVar[str] = "diffusion_pytorch_model"
    """Stem of the weight files in a folder; transformers' encoders use ``model``."""

    model_type: ClassVar[str] = ""
    """The ``model_type`` in transformers' ``config.json``; empty for networks of diffusers."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__module__.startswith("flax.") and hasattr(cls, "config_class"):  # not a base of others
            _REGISTRY[cls.library(), cls.__name__] = cls

    def __post_init__(self) -> None:
        for name in ("dtype", "param_dtype"):  # "float32" and jnp.float32 are the same network, and one program
            if getattr(self, name) is not None:
                object.__setattr__(self, name, jnp.dtype(getattr(self, name)))
        super().__post_init__()

    @classmethod
    def library(cls) -> str:
        """The library that ``model_index.json`` names: diffusers or transformers, or the module of a user's class."""
        if cls.__module__.partition(".")[0] != "diffuse_jax":
            return cls.__module__
        return "transformers" if cls.model_type else "diffusers"

    @property
    def initial_deviations(self) -> Mapping[str, float]:
        """Path of a parameter -> its standard deviation at the start of training, where the name alone does not say."""
        return {}

    def example_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Keyword arguments of ``__call__`` as shapes, the smallest that use every parameter."""
        raise NotImplementedError

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``flax.linen.Module.apply``, on any mesh.

        Explicit axes (the default of ``jax.make_mesh``) become automatic inside the network. Outputs ``[B,...]`` are
        sharded along the batch as the inputs are, and replicated along all other explicit axes.

        Raises:
          ValueError: parameters and inputs are on different meshes, or an input has another width than the network
            takes, as the output of another checkpoint's network may have.
        """
        run = lambda variables, args, kwargs: super(Model, self).apply(variables, *args, **kwargs)
        try:
            return on_automatic_axes(run, (variables, args, kwargs), batch=(args, kwargs))
        except ScopeParamShapeError as error:
            if (said := MISFIT.search(str(error))) is None:  # in other words than those of today's Flax
                raise
            name, scope, wanted, found = said.groups()
            raise ValueError(
                f"{type(self).__name__}: the {name} of {scope} has shape {found}, and this input would need {wanted}; "
                "give an input of the width that the network was made for"
            ) from None

    @nn.nowrap
    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``flax.linen.Module.init_with_output``, on any mesh; results are replicated along explicit axes."""
        run = lambda rngs, args, kwargs: super(Model, self).init_with_output(rngs, *args, **kwargs)
        return on_automatic_axes(run, (rngs, args, kwargs))

    def shapes(self) -> Params:
        """The tree of parameters as ``jax.ShapeDtypeStruct`` in ``param_dtype``; allocates and compiles nothing."""
        return jax.tree.map(lambda leaf: leaf, _shapes(self))  # a copy, which the caller may change

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        subfolder: str | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        variant: str | None = None,
        mesh: Mesh | str | None = None,
        shardings: Any = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        **unknown: Any,
    ) -> tuple[Self, Params]:
        """Load a network and its parameters.

        Args:
          source: a local folder in diffusers or transformers layout, or a Hub id.
          subfolder: the component's folder inside a pipeline folder, for example ``"unet"``.
          dtype: the dtype of computations.
          param_dtype: the dtype that floating-point parameters are cast to on loading; ``dtype`` if None.
          variant: for example ``"fp16"``: only weight files of that variant are used.
          mesh: the mesh to shard parameters over, by :func:`diffuse_jax.sharding.param_shardings`: a mesh, whose axes
            may be automatic or explicit (``jax.make_mesh``), or its text, such as ``"data=4,fsdp=2"``. Each device
            reads only its part.
          shardings: instead of ``mesh``, a ``jax.sharding.Sharding`` for all parameters or a tree of them.
          revision, local_files_only, token, cache_dir: for the Hub, as in :func:`diffuse_jax.weights.resolve`.
          unknown: nothing; an argument of other libraries is answered with what to write here.

        Raises:
          TypeError: an unknown argument.
          WeightsError: the model does not exist, the config is of another class, or the weights do not match it one to
            one.
          ValueError: ``dtype`` is not a floating-point type, or both ``mesh`` and ``shardings`` are given.

        Example::

            model, params = UNet2DConditionModel.from_pretrained("my-pipeline", subfolder="unet", dtype="bfloat16")
        """
        refuse_habits(unknown)
        if unknown:
            raise TypeError(f"{cls.__name__}.from_pretrained has no argument {', '.join(unknown)}")
        if mesh is not None and shardings is not None:
            raise ValueError("mesh and shardings exclude each other; pass only one of them")
        mesh = as_mesh(mesh)
        folder = weights.resolve(
            source,
            subfolder=subfolder,
            variant=variant,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
        )
        with unchanged(folder):
            model = cls.from_config(folder, dtype=dtype)
            shapes = model.shapes()
            params = weights.load_params(
                folder,
                shapes,
                stem=cls.weights_name,
                variant=variant,
                dtype=floating_type(dtype if param_dtype is None else param_dtype),
                shardings=shardings if mesh is None else param_shardings(shapes, mesh),
            )
        return model, params

    @classmethod
    def from_config(cls, source: str | Path | Mapping[str, Any], *, dtype: DTypeLike = jnp.float32) -> Self:
        """Build a network from a ``config.json`` (its contents, or the local folder that holds it), without parameters.

        Raises:
          WeightsError: the file is missing or malformed, is for another class, or has values the network refuses.
          ValueError: ``dtype`` is not a floating-point type.
        """
        dtype = floating_type(dtype)
        folder = None if isinstance(source, Mapping) else refuse_links(expanded(source))
        file = "config" if folder is None else folder / "config.json"
        data: Any = source if folder is None else weights.read_json(folder / "config.json")
        named = [data["_class_name"]] if "_class_name" in data else data.get("architectures") or []
        if not isinstance(named, list):
            raise weights.WeightsError(f"{file}: architectures must be a list of names, got {brief(named)}")
        if named and cls.__name__ not in {name.removeprefix("Flax") for name in named if isinstance(name, str)}:
            raise weights.WeightsError(
                f"{file}: is the config of {', '.join(map(_shown, named))}, not of {cls.__name__}"
            )
        try:
            model = cls(config=cls.config_class.from_json(data), dtype=dtype)
            if unknown := model.config.unknown():
                logger.warning("%s: %s ignores unknown settings: %s", file, cls.__name__, brief(unknown))
            if not isinstance(source, Mapping):
                model.shapes()  # so that impossible sizes are reported as an error of this file
            return model
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            first = str(error).partition("\n")[0]  # errors of JAX continue with advice for programmers
            raise weights.WeightsError(f"{file}: not a config of {cls.__name__}: {first}") from error

    def save_pretrained(
        self,
        folder: str | Path,
        params: Params,
        *,
        dtype: DTypeLike | None = None,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write ``config.json`` and safetensors that PyTorch diffusers or transformers open unchanged.

        Args:
          folder: created if needed.
          params: the parameters; names and shapes must be those of this network.
          dtype: the dtype that floating-point parameters are cast to; None keeps theirs.
          variant: for example ``"fp16"``, which becomes part of the file names.
          max_shard_size: bytes, or a string such as ``"2GB"``; larger networks are split into files and an index.

        Raises:
          WeightsError: the parameters are not this network's.
          ValueError: ``dtype`` is not a floating-point type.
        """
        dtype = None if dtype is None else floating_type(dtype)
        weights.check_params(params, self.shapes(), label=type(self).__name__)
        weights.save_params(
            folder, params, stem=self.weights_name, dtype=dtype, variant=variant, max_shard_size=max_shard_size
        )
        weights.write_json(expanded(folder) / "config.json", self.config_json())

    def config_json(self) -> dict[str, Any]:
        """The object that :meth:`save_pretrained` writes to ``config.json``."""
        head = {"architectures": [type(self).__name__], "model_type": self.model_type} if self.model_type else {}
        return {**self.config.to_json(), **head}


def _shown(name: Any) -> str:
    """A class name from a file, which need not be a string, for an error message."""
    return name[:80] if isinstance(name, str) else brief(name)


def network_class(library: str, name: str) -> type[Model] | None:
    """The network class that an entry of ``model_index.json`` names; None if no such class has been defined.

    A user's class is found by its module and name, or by its name alone if its module had another name when the folder
    was saved; this package's classes are found by name, whatever the library.
    """
    if (library, name) in _REGISTRY:
        return _REGISTRY[library, name]
    found = [cls for (_, known), cls in _REGISTRY.items() if known == name]
    published = [cls for cls in found if cls.library() in ("diffusers", "transformers")]
    return next(iter(published or found), None) if len(published or found) == 1 else None


def network_names() -> list[str]:
    """Names of all network classes."""
    return sorted({name for _, name in _REGISTRY})


def floating_type(dtype: DTypeLike) -> jnp.dtype:
    """``dtype`` as a ``jnp.dtype``.

    Raises:
      ValueError: it is not a floating-point type, as networks need.
    """
    with contextlib.suppress(TypeError):
        if jnp.issubdtype(found := jnp.dtype(dtype), jnp.floating):
            return found
    raise ValueError(f"dtype must be a floating-point type such as 'float32', 'bfloat16' or 'float16', got {dtype!r}")


@functools.lru_cache(maxsize=128)
def _shapes(model: Model) -> Params:
    """Cached, because tracing a large network takes a second, and loading, checking and saving all need its shapes."""
    token = SHAPES_ONLY.set(True)
    try:
        init = lambda inputs: model.init(jax.random.key(0), **inputs)["params"]
        shapes = jax.eval_shape(init, model.example_inputs())
    finally:
        SHAPES_ONLY.reset(token)
    # Under jax.set_mesh the shapes carry the current mesh, which need not be that of later calls.
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
