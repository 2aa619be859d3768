"""A pipeline: an immutable set of components, parameters and options, with what all pipelines can do."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
from jax import tree
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax import weights
from diffuse_jax.habits import refuse_habits
from diffuse_jax.models import Params
from diffuse_jax.pipelines import adapting
from diffuse_jax.pipelines.catalogue import NOT_LOADED
from diffuse_jax.pipelines.family import given_rows
from diffuse_jax.pipelines.method import Replace, check_rows
from diffuse_jax.pipelines.opening import open_components, refuse_family, save_components, with_given
from diffuse_jax.pipelines.options import RunOptions
from diffuse_jax.pipelines.placement import moved, taken_off
from diffuse_jax.pipelines.programs import PROGRAMS, Programs, signature_of
from diffuse_jax.pipelines.running import Output, Request, compile_request, run
from diffuse_jax.pipelines.settings import corrected, report
from diffuse_jax.pipelines.single_file import open_single_file
from diffuse_jax.registry import Registry
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.sharding import automatic, check_data_axis
from diffuse_jax.weights import WeightsError

PIPELINES = Registry("pipeline")
"""Pipelines by the name in ``model_index.json``; a class is in it as soon as it is defined."""


@dataclasses.dataclass(frozen=True)
class DiffusionPipeline:
    """What every pipeline is: components by name, their parameters, and options of the folder.

    Open one with :meth:`from_pretrained`, which chooses the class that the folder names. Pipelines never change;
    :meth:`replace` gives another one that shares everything else. A subclass defines :meth:`compose`.

    Attributes:
      components: name -> network, tuple of networks, scheduler, tokenizer or None.
      params: name -> tree of ``jax.Array`` for the networks (a tuple of trees for a tuple of networks).
      options: the other values of ``model_index.json``.
      mesh: where to run, with an axis ``data`` (images) and, if networks are to be cut, ``fsdp`` and ``tensor``;
        parameters that lie elsewhere are moved there. None is where the parameters lie; ``replace(mesh=None)`` takes
        them to JAX's default device.
      vae_tiling: edge in latents of the tiles that images are decoded in, or None for one piece.
      vae_slicing: decode one image after another, in the memory of one.
      programs: the compiled programs, shared by all pipelines unless given.
    """

    components: Mapping[str, Any]
    params: Mapping[str, Params] = dataclasses.field(repr=False)  # thousands of lines of arrays
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None
    vae_tiling: int | None = None
    vae_slicing: bool = False
    programs: Programs = dataclasses.field(default=PROGRAMS, repr=False, compare=False)

    required: ClassVar[tuple[str, ...]] = ()
    """Components without which the pipeline cannot work."""

    settings: ClassVar[Mapping[str, str]] = {}
    """Values of ``model_index.json`` beside the components -> what they do here."""

    sampler_settings: ClassVar[Mapping[str, Any]] = {}
    """What samplers get when a folder is opened, as :mod:`diffuse_jax.pipelines.settings` says."""

    family: ClassVar[Any] = None
    """How its checkpoints are conditioned; see :mod:`diffuse_jax.pipelines.family`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        PIPELINES.register(cls)
        generated = cls.__call__ is DiffusionPipeline.__call__ or hasattr(cls.__call__, "__wrapped__")
        if "compose" in vars(cls) and generated:
            cls.__call__ = documented(cls.compose)  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        missing = [name for name in self.required if self.components.get(name) is None]
        if missing:
            have = [name for name, part in self.components.items() if part is not None]
            raise ValueError(f"{type(self).__name__} needs {', '.join(missing)}; given are {', '.join(have)}")
        if isinstance(self.vae_tiling, bool) or (self.vae_tiling is not None and self.vae_tiling < 1):
            raise ValueError(f"vae_tiling is the edge of a tile in latents, for example 64, got {self.vae_tiling!r}")
        check_data_axis(self.mesh)
        if self.mesh is not None:
            object.__setattr__(self, "mesh", automatic(self.mesh))
        object.__setattr__(self, "params", moved(self.params, self.mesh))

    @property
    def scheduler(self) -> Scheduler:
        """The sampler's configuration; exchange it by ``pipe.replace(scheduler=...)``."""
        return self.components["scheduler"]

    # Calls

    def compose(self, *args: Any, **options: Any) -> Request:
        """The request of a call: its method, rows and plan, checked. Every pipeline defines this with arguments of its
        own; they are those of calling it.
        """
        raise TypeError(f"{type(self).__name__} does not define compose, so it cannot be called")

    def __call__(self, *args: Any, **options: Any) -> Output:
        """Run the request that :meth:`compose` makes of these arguments; :class:`RunOptions
        <diffuse_jax.pipelines.options.RunOptions>` decide how."""
        running = {name: options.pop(name) for name in self._run_options() if name in options}
        return run(self, self.request(*args, **options), **running)

    def request(
        self, *args: Any, method: Replace | None = None, rows: Mapping[str, Any] | None = None, **options: Any
    ) -> Request:
        """What a call with these arguments would run: ``sample(r.method, pipe.params, r.rows, r.plan)`` is the same as
        a pure function.

        Args:
          *args: of :meth:`compose`.
          **options: likewise.
          method: changes the pipeline's method, for example ``lambda m: replace(m, denoiser=Mine(m.denoiser))``.
          rows: further rows for parts of your own, name -> array with one entry per image.

        Raises:
          ValueError, TypeError: an argument is impossible, or the rows do not fit the method.
        """
        if wrong := sorted(self._run_options() & {*options}):
            raise TypeError(f"{', '.join(wrong)} say how a request is run; give them to the call, or to pipelines.run")
        request = self.compose(*args, **options)
        if not isinstance(request, Request):
            raise TypeError(f"{type(self).__name__}.compose must return a Request, got {type(request).__name__}")
        request = request._replace(rows=request.rows | given_rows(rows, request.images))
        if method is not None:
            request = request._replace(method=method(request.method))
        check_rows(request.method, request.rows)
        return request

    def _run_options(self) -> set[str]:
        """The arguments of a call that are not of :meth:`compose`."""
        return {*RunOptions.__annotations__, "batch_size"} - {*inspect.signature(self.compose).parameters}

    def compile(self, *args: Any, **options: Any) -> Self:
        """Compile the program that a call with these arguments would run; only their shapes matter. Returns self."""
        batch_size = options.pop("batch_size", None) if "batch_size" in self._run_options() else None
        if not args and "prompt" in inspect.signature(self.compose).parameters and "prompt_embeds" not in options:
            options.setdefault("prompt", "")
        compile_request(self, self.request(*args, **options), batch_size)
        return self

    # Opening, changing, saving

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: DTypeLike = "float32",
        mesh: Mesh | None = None,
        variant: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        **components: Any,
    ) -> Self:
        """Open a pipeline from a folder in diffusers layout.

        Args:
          source: a local folder, a Hub id, or ``"diffuse-jax/emoji"``, the model that ships with the package.
          dtype: what networks compute in and parameters are cast to while they are read.
          mesh: the devices to run on (see :func:`diffuse_jax.sharding.make_mesh`); each reads only its part.
          variant: for example ``"fp16"``: read only weight files of that variant.
          revision, local_files_only, token, cache_dir: for the Hub.
          **components: use these instead of the folder's: ``scheduler=...``, ``safety_checker=None``; a network is
            given as ``(model, params)``, several ControlNets as a list of such pairs.

        Raises:
          WeightsError: no such folder or model, an unknown class, or weights that do not fit. Nothing is half-loaded.
          TypeError: a component that the pipeline does not have, or a checkpoint of another family.

        Example::

            pipe = DiffusionPipeline.from_pretrained("diffuse-jax/emoji")
            image = pipe("a red apple, noto style", seed=0).images[0]
        """
        refuse_habits(components)
        check_data_axis(mesh)
        folder = weights.resolve(
            source,
            variant=variant,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
            skip=NOT_LOADED,
        )
        index = weights.read_index(folder)
        target = pipeline_class(index.class_name, folder / "model_index.json") if cls is DiffusionPipeline else cls
        known = {*index.components, *index.absent, *target.required, *NOT_LOADED}
        unknown = sorted(set(components) - known)
        if unknown:
            raise TypeError(
                f"{target.__name__} has no component {', '.join(unknown)}; it has {', '.join(sorted(known))}"
            )
        refuse_family(target, index, {*components}, source)
        given = {name: None if name in NOT_LOADED else part for name, part in components.items()}
        parts, params = open_components(index, given, dtype=dtype, mesh=mesh, variant=variant)
        report(target, index.options, source)
        return cast(Self, target(corrected(target, parts), params, index.options, mesh))

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        dtype: DTypeLike = "float32",
        mesh: Mesh | None = None,
        tokenizer: Any = None,
        prediction_type: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        **components: Any,
    ) -> Self:
        """Open a pipeline from one ``.safetensors`` or ``.ckpt`` file in the original layout (SD 1.x, 2.x, XL).

        Args:
          path: the file; its architecture is read off its tensors.
          dtype, mesh, components: as in :meth:`from_pretrained`.
          tokenizer: a folder or Hub id with CLIP's tokenizer, which such files do not hold; its usual place on the Hub
            if None.
          prediction_type: "epsilon" or "v_prediction", where the file's family does not say (SD 2.x).
          revision, local_files_only, token, cache_dir: for the tokenizer on the Hub.

        Raises:
          WeightsError: a damaged or unknown file, tensors that do not fit, or no tokenizer.
          TypeError: the file is another pipeline's.
        """
        refuse_habits(components)
        check_data_axis(mesh)
        found = open_single_file(
            path,
            dtype=dtype,
            mesh=mesh,
            tokenizer=tokenizer,
            prediction_type=prediction_type,
            components=components,
            revision=revision or "main",
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
        )
        target = pipeline_class(found.class_name, path)
        if not issubclass(target, cls):
            raise TypeError(f"{path} holds a {target.__name__}, not a {cls.__name__}")
        return target(corrected(target, found.parts), found.params, found.options, mesh)

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline, **components: Any) -> Self:
        """Another task with the components of ``pipe``: the same buffers, no copy.

        Args:
          pipe: any pipeline that has what this one needs.
          **components: those it lacks, or others, as in :meth:`from_pretrained`: ``controlnet=(model, params)``.

        Raises:
          ValueError: a component is missing.
        """
        parts, params = with_given(pipe.components, pipe.params, components)
        fields = {f.name: getattr(pipe, f.name) for f in dataclasses.fields(DiffusionPipeline)}
        return cls(**fields | {"components": corrected(cls, parts), "params": params})

    def replace(self, **changes: Any) -> Self:
        """A pipeline with other components (``scheduler=...``; a network as ``(model, params)``) or other settings.

        Raises:
          TypeError: the pipeline has no such component.
        """
        fields = {f.name for f in dataclasses.fields(self)}
        settings = {name: value for name, value in changes.items() if name in fields}
        given = {name: part for name, part in changes.items() if name not in fields}
        unknown = sorted(set(given) - set(self.components))
        if unknown:
            names = ", ".join(sorted(self.components))
            raise TypeError(f"{type(self).__name__} has no component {unknown[0]!r}; it has {names}")
        off = self.mesh is not None and settings.get("mesh", self.mesh) is None
        parts, params = with_given(self.components, taken_off(self.params) if off else self.params, given)
        return dataclasses.replace(self, **{"components": parts, "params": params} | settings)

    def offload(self, *names: str) -> Self:
        """A pipeline whose named components (all networks if none is named) keep their parameters in host memory.

        They are on the device only while a run that reads them is under way: several stages that do not fit together
        take turns.

        Raises:
          TypeError: the pipeline has no parameters of that name.
        """
        names = names or tuple(self.params)
        if unknown := sorted(set(names) - set(self.params)):
            raise TypeError(f"{type(self).__name__} has no network {unknown[0]!r}; it has {', '.join(self.params)}")
        host = {name: tree.map(np.asarray, self.params[name]) for name in names}
        return dataclasses.replace(self, params={**self.params, **host})

    def save_pretrained(
        self, folder: str | Path, *, variant: str | None = None, dtype: DTypeLike | None = None
    ) -> Path:
        """Write the folder that PyTorch diffusers opens: safetensors with PyTorch names, ``model_index.json`` last.

        Args:
          folder: made if need be; files are written under temporary names and renamed.
          variant: marks the weight files, for example ``"fp16"``.
          dtype: what floating-point tensors are cast to; None keeps them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        entries = save_components(folder, self.components, self.params, variant=variant, dtype=dtype)
        weights.write_index(folder, type(self).__name__, entries, self.options)
        return folder

    # Adapters

    def load_lora_weights(self, source: str | Path, *, scale: float = 1.0) -> Self:
        """A pipeline whose networks have low-rank pairs merged into them (LoRA); this one stays as it is.

        Compiled programs are shared. Several files may be loaded one after another; the opposite scale takes one out.

        Args:
          source: ``pytorch_lora_weights.safetensors`` of this library or of PyTorch diffusers (``.bin`` too), or its
            folder.
          scale: how strongly it acts; 0 changes nothing.

        Raises:
          WeightsError: no such file, or it was made for other networks.
        """
        return self.replace(**adapting.with_lora(self, source, scale))

    def load_textual_inversion(self, source: str | Path, *, token: str | None = None) -> Self:
        """A pipeline that knows one more word (textual inversion, one text encoder); this one stays as it is.

        Args:
          source: ``learned_embeds.safetensors``, a ``.bin`` or ``.pt`` file, or a folder with one.
          token: the placeholder token; the file's own if None.

        Raises:
          WeightsError: no such file, or not the embeddings of one word.
          ValueError: the word is known already, the embeddings have another width, or there are two text encoders.
        """
        return self.replace(**adapting.with_word(self, source, token))

    # Programs

    def save_compiled(self, folder: str | Path) -> list[Path]:
        """Keep this process's compiled programs in ``folder``; :meth:`load_compiled` finds them in the next process."""
        return self.programs.save(folder)

    def load_compiled(self, folder: str | Path) -> Self:
        """Look for compiled programs in ``folder`` (trusted: they are executable code) before compiling; returns self.

        A program is used only if shapes, mesh, versions and the library's own code are those it was compiled for;
        otherwise the call compiles as usual.

        Raises:
          PermissionError: others may write to the folder.
        """
        self.programs.load(folder)
        return self

    def signature_of(self, params: Mapping[str, Params]) -> Any:
        """:func:`~diffuse_jax.pipelines.programs.signature_of` of parameters that a run reads; those of the pipeline's
        own trees are described once, because there are thousands of arrays."""
        for name in params:
            if name not in self._signatures and params[name] is self.params[name]:
                self._signatures[name] = signature_of(params[name])
        known = lambda name, own: own is self.params[name]
        return tuple(
            (name, self._signatures[name] if known(name, own) else signature_of(own)) for name, own in params.items()
        )

    @functools.cached_property
    def _signatures(self) -> dict[str, Any]:
        return {}


def documented(compose: Callable[..., Request]) -> Callable[..., Output]:
    """The ``__call__`` of a pipeline, with the signature and the documentation of its ``compose``."""

    @functools.wraps(compose)
    def call(self: DiffusionPipeline, *args: Any, **options: Any) -> Output:
        return DiffusionPipeline.__call__(self, *args, **options)

    call.__name__ = "__call__"
    return call


def pipeline_class(name: str, named_in: str | Path) -> type[DiffusionPipeline]:
    """The class that an index or a single file names.

    Raises:
      WeightsError: no class of this name has been defined, or two modules define it.
    """
    try:
        return PIPELINES.find(name)
    except ValueError as error:
        raise WeightsError(f"{named_in}: {error}") from None
