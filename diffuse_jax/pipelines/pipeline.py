"""The base class of pipelines: immutable components, parameters and options, and the methods all pipelines share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

import numpy as np
from jax import tree
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax import weights
from diffuse_jax.adapters.named import Adapters
from diffuse_jax.habits import refuse_habits
from diffuse_jax.messages import brief, warn
from diffuse_jax.models import Params
from diffuse_jax.pipelines import adapting
from diffuse_jax.pipelines.adapter_methods import AdapterMethods
from diffuse_jax.pipelines.arguments import plain_arguments
from diffuse_jax.pipelines.catalogue import NOT_LOADED, OPTIONAL, not_downloaded
from diffuse_jax.pipelines.family import given_rows
from diffuse_jax.pipelines.image_adapter_methods import ImageAdapterMethods
from diffuse_jax.pipelines.image_adapters import ImageAdapters
from diffuse_jax.pipelines.method import Replace, check_rows
from diffuse_jax.pipelines.modifiers.request import listed, modified
from diffuse_jax.pipelines.opening import (
    open_components,
    refuse_family,
    save_components,
    with_overrides,
    without_unused_text,
)
from diffuse_jax.pipelines.options import RunOptions
from diffuse_jax.pipelines.placement import params_to_default_device, params_to_mesh
from diffuse_jax.pipelines.programs import PROGRAMS, Programs, signature_of
from diffuse_jax.pipelines.running import Modifier, Output, Request, check_running, compile_request, run
from diffuse_jax.pipelines.safety import CHECKER, REQUIRED, check_processor, warn_if_off, with_check
from diffuse_jax.pipelines.settings import corrected, log_ignored, split_settings
from diffuse_jax.pipelines.single_file import open_single_file, read_file, refuse_other, save_single_file
from diffuse_jax.pipelines.streams import with_noise
from diffuse_jax.registry import Registry
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.sharding import automatic, mesh_of_images
from diffuse_jax.weights import WeightsError
from diffuse_jax.writing import expanded

T = TypeVar("T")

PIPELINES = Registry("pipeline")
"""Pipeline classes by their name in ``model_index.json``; a class is registered when it is defined."""


@dataclasses.dataclass(frozen=True)
class DiffusionPipeline(AdapterMethods, ImageAdapterMethods):
    """Base class of all pipelines: components by name, their parameters, and the options of the folder.

    Open one with :meth:`from_pretrained`, which chooses the class that the folder names. Pipelines are immutable;
    :meth:`replace` returns a new one that shares everything that was not replaced. A subclass defines :meth:`compose`.

    Attributes:
      components: name -> network, tuple of networks, scheduler, tokenizer or None.
      params: name -> tree of ``jax.Array`` for the networks (a tuple of trees for a tuple of networks).
      options: the other values of ``model_index.json``.
      mesh: the device mesh to run on, or its text (``"data=4,fsdp=2"``), with an axis ``data`` (images) and, to shard
        the networks, ``fsdp`` and ``tensor``; parameters on other devices are moved to it. If None, runs take place
        where the parameters are; ``replace(mesh=None)`` moves them to JAX's default device.
      vae_tiling: edge length in latent pixels of the tiles in which images are decoded; None decodes without tiling.
      vae_slicing: decode one image at a time, which needs the memory of only one.
      adapters: the live adapters; see :meth:`load_lora_weights`.
      image_adapters: the IP-Adapters; see :meth:`load_ip_adapter`.
      programs: the compiled programs; by default those of the process, which all pipelines share.
    """

    components: Mapping[str, Any]
    params: Mapping[str, Params] = dataclasses.field(repr=False)  # its repr has thousands of lines
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None
    vae_tiling: int | None = None
    vae_slicing: bool = False
    adapters: Adapters = dataclasses.field(default=Adapters(), repr=False, compare=False)
    image_adapters: ImageAdapters = dataclasses.field(default=ImageAdapters(), repr=False, compare=False)
    programs: Programs = dataclasses.field(default=PROGRAMS, repr=False, compare=False)

    required: ClassVar[tuple[str, ...]] = ()
    """Names of the components that the pipeline requires."""

    settings: ClassVar[Mapping[str, str]] = {}
    """Known settings in ``model_index.json`` besides the components -> their effect in this library."""

    sampler_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings that override the sampler's when a folder is opened; see :mod:`diffuse_jax.pipelines.settings`."""

    family: ClassVar[Any] = None
    """How checkpoints of this class are conditioned; see :mod:`diffuse_jax.pipelines.family`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        PIPELINES.register(cls)
        generated = cls.__call__ is DiffusionPipeline.__call__ or hasattr(cls.__call__, "__wrapped__")
        if "compose" in vars(cls) and generated:
            cls.__call__ = call_from_compose(cls.compose)  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        missing = [name for name in self.required if self.components.get(name) is None]
        if missing:
            have = [name for name, part in self.components.items() if part is not None]
            raise ValueError(f"{type(self).__name__} needs {', '.join(missing)}; it was given {', '.join(have)}")
        if isinstance(self.vae_tiling, bool) or (self.vae_tiling is not None and self.vae_tiling < 1):
            raise ValueError(
                f"vae_tiling must be the edge length of a tile in latent pixels, for example 64, got "
                f"{self.vae_tiling!r}"
            )
        check_processor(type(self), self.components)
        if (mesh := mesh_of_images(self.mesh)) is not None:
            object.__setattr__(self, "mesh", automatic(mesh))
        object.__setattr__(self, "params", params_to_mesh(self.params, self.mesh))

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler; change it with ``pipe.replace(scheduler=...)``."""
        return self.components["scheduler"]

    # Calls

    def compose(self, *args: Any, **options: Any) -> Request:
        """Check the arguments of a call and turn them into a request: its method, rows and plan. Each pipeline class
        defines this method; calling the pipeline takes the same arguments.
        """
        raise TypeError(f"{type(self).__name__} does not define compose, so it cannot be called")

    def __call__(self, *args: Any, **options: Any) -> Output:
        """Run the request that :meth:`compose` builds from these arguments; :class:`RunOptions
        <diffuse_jax.pipelines.options.RunOptions>` control how it is run."""
        running = {name: options.pop(name) for name in self._run_options(options.get("compose")) if name in options}
        check_running(**running)
        return run(self, self.request(*args, **options), **running)

    def request(
        self,
        *args: Any,
        compose: Callable[..., Request] | None = None,
        method: Replace | None = None,
        rows: Mapping[str, Any] | None = None,
        modifiers: Modifier | Sequence[Modifier] = (),
        lora_scale: float | Sequence[float] | None = None,
        **options: Any,
    ) -> Request:
        """The request ``r`` that a call with these arguments would run. ``sample(r.method, pipe.params, r.rows,
        r.plan)`` runs it as a pure function.

        Args:
          *args: positional arguments of :meth:`compose`.
          **options: keyword arguments of :meth:`compose`.
          compose: what makes the request, ``compose(pipe, *args, **options)``; the class's own if None. Other verbs
            (:meth:`StableDiffusionPipeline.invert`) have one of their own.
          method: changes the pipeline's method, for example ``lambda m: replace(m, denoiser=Mine(m.denoiser))``.
          rows: additional rows for custom parts: name -> array with one entry per image.
          modifiers: one or several of :mod:`~diffuse_jax.pipelines.modifiers`, applied in order before ``method``.
          lora_scale: strength of all live adapters, one number or one per image; 1 if None.

        Raises:
          ValueError, TypeError: an argument is invalid, or the rows do not fit the method.
        """
        if wrong := sorted(self._run_options(compose) & {*options}):
            raise TypeError(
                f"{', '.join(wrong)} control how a request is run; pass them to the call, or to pipelines.run"
            )
        pipe = self if lora_scale is None else adapting.at_scale(self, lora_scale)
        changes = listed(modifiers)
        if method is not None and not callable(method):
            raise TypeError(f"method must be a function from the pipeline's method to another, got {brief(method)}")
        if rows is not None and not isinstance(rows, Mapping):
            raise TypeError(f"rows must be a dict, name -> array with an entry for each image, got {brief(rows)}")
        positional, options = plain_arguments(type(pipe), compose, args, options)
        composed = (type(pipe).compose if compose is None else compose)(pipe, *positional, **options)
        if not isinstance(composed, Request):
            name = f"{type(self).__name__}.compose" if compose is None else getattr(compose, "__name__", "compose")
            raise TypeError(f"{name} must return a Request, got {type(composed).__name__}")
        request = modified(composed, pipe, changes)
        request = request._replace(rows=request.rows | given_rows(rows, request.images))
        if method is not None:
            request = request._replace(method=method(request.method))
        request = with_check(pipe, with_noise(adapting.with_live(pipe, request), self.scheduler, options))
        check_rows(request.method, request.rows)
        return request

    def _run_options(self, compose: Callable[..., Request] | None = None) -> set[str]:
        """Names of the arguments of a call that ``compose`` (:meth:`compose` if None) does not take."""
        return {*RunOptions.__annotations__, "batch_size"} - {*inspect.signature(compose or self.compose).parameters}

    def compile(self, *args: Any, **options: Any) -> Self:
        """Compile the program that a call with these arguments would run, without running it. Of arrays, only the
        shapes matter. Returns self."""
        compose = options.get("compose")
        takes = inspect.signature(compose or self.compose).parameters
        batch_size = options.pop("batch_size", None) if "batch_size" in self._run_options(compose) else None
        if not args and "prompt" in takes and "prompt_embeds" not in options:
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
        mesh: Mesh | str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        **components: Any,
    ) -> Self:
        """Open a pipeline from a folder in the diffusers layout.

        Args:
          source: a local folder, a Hub id, or ``"diffuse-jax/emoji"``, the model that ships with the package.
          dtype: the dtype that networks compute in and that parameters are cast to as they are read.
          mesh: the devices to run on: a mesh (see :func:`diffuse_jax.sharding.make_mesh`), or its text, such as
            ``"data=4,fsdp=2"``. Each device reads only its shard.
          variant: variant of the weight files to read, for example ``"fp16"``.
          revision, local_files_only, token, cache_dir: options for the Hub.
          **components: components to use instead of the folder's: ``scheduler=...``, ``safety_checker=None``. Pass a
            network as ``(model, params)``, several ControlNets as a list of such pairs. ``image_encoder``,
            ``feature_extractor`` and ``safety_checker`` may be added to any pipeline; None leaves them out. Settings of
            ``model_index.json`` (``settings`` of the class) are given in the same way, and so is
            ``requires_safety_checker=False``.

        Raises:
          WeightsError: the folder or model does not exist, a class is unknown, or weights do not fit. Nothing is
            partially loaded.
          TypeError: the pipeline has no such component, or the checkpoint belongs to another family.

        Example::

            pipe = DiffusionPipeline.from_pretrained("diffuse-jax/emoji")
            image = pipe("a red apple, noto style", seed=0).images[0]
        """
        refuse_habits(components)
        mesh = mesh_of_images(mesh)
        folder = weights.resolve(
            source,
            variant=variant,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
            skip=not_downloaded(components),
        )
        index = weights.read_index(folder)
        target = pipeline_class(index.class_name, folder / "model_index.json") if cls is DiffusionPipeline else cls
        options, components = split_settings(target, index.options, components)
        required = components.pop(REQUIRED, options.get(REQUIRED, CHECKER in index.components))
        known = {*index.components, *index.absent, *target.required, *OPTIONAL, *NOT_LOADED}
        unknown = sorted(set(components) - known)
        if unknown:
            raise TypeError(
                f"{target.__name__} has no component {', '.join(unknown)}; it has {', '.join(sorted(known))}"
            )
        refuse_family(target, index, {*components}, source)
        absent = [name for name in target.required if name not in index.components and components.get(name) is None]
        if absent:
            raise weights.WeightsError(
                f"{folder / 'model_index.json'}: has no {' and no '.join(absent)}, which {target.__name__} needs; add "
                f"the entry, or pass {absent[0]}="
            )
        given = {name: None if name in NOT_LOADED else part for name, part in components.items()}
        parts, params = open_components(index, given, dtype=dtype, mesh=mesh, variant=variant)
        log_ignored(target, options, source)
        warn_if_off(parts, required)
        return cast(Self, target(corrected(target, parts), params, options, mesh))

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        dtype: DTypeLike = "float32",
        mesh: Mesh | str | None = None,
        tokenizer: Any = None,
        prediction_type: str | None = None,
        ema: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        **components: Any,
    ) -> Self:
        """Open a pipeline from one ``.safetensors`` or ``.ckpt`` file in the original layout (SD 1.x, 2.x, XL).

        ``DiffusionPipeline`` chooses the class; another class opens the files of its own task, and plain text-to-image
        files for any task of their family.

        Args:
          path: the file; its architecture is inferred from its tensors.
          dtype, mesh, components: as in :meth:`from_pretrained`.
          tokenizer: a folder or Hub id with CLIP's tokenizer, which such files do not contain; by default OpenAI's
            repository on the Hub.
          prediction_type: "epsilon" or "v_prediction", if the file does not determine it (SD 2.x).
          ema: use the UNet's averaged weights (``model_ema.``), which files for training hold beside the last ones.
          revision, local_files_only, token, cache_dir: options for the tokenizer on the Hub.

        Raises:
          WeightsError: the file is damaged or of an unknown kind, its tensors do not fit, or no tokenizer was found.
          TypeError: the file is for another pipeline class.
        """
        refuse_habits(components)
        mesh = mesh_of_images(mesh)
        file = read_file(path, components, prediction_type=prediction_type, ema=ema)
        own = pipeline_class(file.class_name, path)
        target = own if cls is DiffusionPipeline else cls
        options, components = split_settings(target, file.options, components)
        components.pop(REQUIRED, None)  # there is no checker in a single file to miss
        refuse_other(target, own, file, components, path)
        found = open_single_file(
            path,
            file,
            dtype=dtype,
            mesh=mesh,
            tokenizer=tokenizer,
            components=components,
            revision=revision or "main",
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
        )
        log_ignored(target, options, path)
        return cast(Self, target(corrected(target, found.parts), found.params, options, mesh))

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline, **components: Any) -> Self:
        """A pipeline for another task with the components of ``pipe``; parameters are shared, not copied.

        Args:
          pipe: any pipeline with the components that this class requires.
          **components: missing components or replacements, and settings, as in :meth:`from_pretrained`:
            ``controlnet=(model, params)``.

        Raises:
          ValueError: a component is missing.
          TypeError: ``pipe`` is of a family with more text encoders than this class uses.
        """
        options, components = split_settings(cls, pipe.options, components)
        parts, params = with_overrides(pipe.components, pipe.params, components)
        parts, params = without_unused_text(cls, type(pipe), parts, params)
        fields = {f.name: getattr(pipe, f.name) for f in dataclasses.fields(DiffusionPipeline)}
        made = cls(**fields | {"components": corrected(cls, parts), "params": params, "options": options})
        return cast(Self, adapting.refreshed(made, pipe.params))

    def replace(self, **changes: Any) -> Self:
        """A pipeline with components (``scheduler=...``; a network as ``(model, params)``) or settings replaced, those
        of ``model_index.json`` too.

        Raises:
          TypeError: the pipeline has no such component.
        """
        options, changes = split_settings(type(self), self.options, changes)
        if options != self.options:
            changes = {"options": options} | changes
        fields = {f.name for f in dataclasses.fields(self)}
        settings = {name: value for name, value in changes.items() if name in fields}
        given = {name: part for name, part in changes.items() if name not in fields}
        unknown = sorted(set(given) - {*self.components, *OPTIONAL})
        if unknown:
            names = ", ".join(sorted(self.components))
            raise TypeError(f"{type(self).__name__} has no component {unknown[0]!r}; it has {names}")
        leaves_mesh = self.mesh is not None and settings.get("mesh", self.mesh) is None
        params = params_to_default_device(self.params) if leaves_mesh else self.params
        parts, params = with_overrides(self.components, params, given)
        new = dataclasses.replace(self, **{"components": parts, "params": params} | settings)
        return cast(Self, adapting.refreshed(new, self.params)) if given else new

    def offload(self, *names: str) -> Self:
        """A pipeline whose named networks (all if none is named) have their parameters in host memory.

        The parameters are on the device only during a run that reads them, so stages that do not fit into device memory
        together can take turns.

        Raises:
          TypeError: the pipeline has no network of that name.
        """
        names = names or tuple(self.params)
        if unknown := sorted(set(names) - set(self.params)):
            raise TypeError(f"{type(self).__name__} has no network {unknown[0]!r}; it has {', '.join(self.params)}")
        host = {name: tree.map(np.asarray, self.params[name]) for name in names}
        return dataclasses.replace(self, params={**self.params, **host})

    def save_pretrained(
        self, folder: str | Path, *, variant: str | None = None, dtype: DTypeLike | None = None
    ) -> Path:
        """Write a folder that PyTorch diffusers can open: safetensors with PyTorch names, ``model_index.json`` last.

        Args:
          folder: created if needed; files are written under temporary names and then renamed.
          variant: variant in the names of the weight files, for example ``"fp16"``.
          dtype: cast floating-point tensors to this dtype; None leaves them unchanged.
        """
        self._warn_of_adapters()
        folder = expanded(folder)
        folder.mkdir(parents=True, exist_ok=True)
        entries = save_components(folder, self.components, self.params, variant=variant, dtype=dtype)
        weights.write_index(folder, type(self).__name__, entries, self.options)
        return folder

    def save_single_file(self, path: str | Path, *, dtype: DTypeLike | None = None) -> Path:
        """Write one ``.safetensors`` file in the original layout, for programs that open such files.

        Settings that its tensors do not show are in its metadata. Tokenizers and optional components, such as a safety
        checker, have no place in it and are left out.

        Args:
          path: the file; it is replaced if it exists.
          dtype: cast floating-point tensors to this dtype; None leaves them unchanged.

        Raises:
          WeightsError: the layout has no place for one of the networks.
          ValueError: the name does not end in ``.safetensors``.
        """
        self._warn_of_adapters()
        return save_single_file(self, path, dtype)

    def _warn_of_adapters(self) -> None:
        if self.adapters.live():
            names = ", ".join(name for name, _ in self.adapters.live())
            warn(f"live adapters are not part of the saved model ({names}); fuse_lora merges them into it")
        if self.image_adapters.nets:
            warn("IP-Adapters are not part of the saved model; load_ip_adapter adds them again")

    # Programs

    def save_compiled(self, folder: str | Path) -> list[Path]:
        """Save the programs compiled in this process to ``folder``, for :meth:`load_compiled` in another process."""
        return self.programs.save(folder)

    def load_compiled(self, folder: str | Path) -> Self:
        """Look for saved programs in ``folder`` before compiling. They are executable code, so the folder must be
        trusted.

        A program is used only if shapes, mesh, versions and the library's source match those that it was compiled for;
        otherwise the call compiles as usual. Returns self.

        Raises:
          PermissionError: other users can write to the folder.
        """
        self.programs.load(folder)
        return self

    def signature_of(self, params: Mapping[str, Params]) -> Any:
        """The :func:`~diffuse_jax.pipelines.programs.signature_of` of the parameters that a run reads. It is cached for
        the pipeline's own trees, because they have thousands of arrays."""
        for name in params:
            if name not in self._signatures and params[name] is self.params.get(name):
                self._signatures[name] = signature_of(params[name])
        cached = lambda name, tree: tree is self.params.get(name)
        return tuple(
            (name, self._signatures[name] if cached(name, tree) else signature_of(tree))
            for name, tree in params.items()
        )

    @functools.cached_property
    def _signatures(self) -> dict[str, Any]:
        return {}


def described_by(compose: Callable[..., Request], returns: Any) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """A decorator of what runs the request of ``compose``: its signature and docstring, but with the annotation
    ``returns``."""

    def decorate(call: Callable[..., T]) -> Callable[..., T]:
        call = functools.wraps(compose)(call)
        call.__annotations__ = {**compose.__annotations__, "return": returns}
        call.__signature__ = inspect.signature(compose).replace(return_annotation=returns)  # type: ignore[attr-defined]
        return call

    return decorate


def call_from_compose(compose: Callable[..., Request]) -> Callable[..., Output]:
    """The ``__call__`` of a pipeline, with the signature and docstring of its ``compose``."""

    @described_by(compose, Output)
    def call(self: DiffusionPipeline, *args: Any, **options: Any) -> Output:
        return DiffusionPipeline.__call__(self, *args, **options)

    call.__name__ = "__call__"
    return call


def verb(compose: Callable[..., Request]) -> Callable[..., Output]:
    """A method of pipelines besides calling them, which runs the request of ``compose(pipe, *args, **options)`` and
    takes the arguments that every call takes (``modifiers``, ``callback_on_step_end`` ...)."""

    @described_by(compose, Output)
    def call(self: DiffusionPipeline, *args: Any, **options: Any) -> Output:
        return DiffusionPipeline.__call__(self, *args, compose=compose, **options)

    return call


def pipeline_class(name: str, named_in: str | Path) -> type[DiffusionPipeline]:
    """The pipeline class that an index or a single file names.

    Raises:
      WeightsError: no class of this name has been defined, or two modules define one.
    """
    try:
        return PIPELINES.find(name)
    except ValueError as error:
        raise WeightsError(f"{named_in}: {error}") from None
