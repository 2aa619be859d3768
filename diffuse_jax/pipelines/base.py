"""Opening, saving and changing pipelines: a pipeline is an immutable set of components, parameters and options."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax import schedulers, weights
from diffuse_jax.models import AutoencoderKL, Model, Params, UNet2DConditionModel, UNet2DModel
from diffuse_jax.pipelines.programs import PROGRAMS, Programs
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.sharding import automatic, param_shardings
from diffuse_jax.text import CLIPTextModel, CLIPTextModelWithProjection
from diffuse_jax.text.tokenizer import clip_tokenizer
from diffuse_jax.weights import Component, WeightsError
from diffuse_jax.weights.files import require_folder

MODELS: dict[str, type[Model]] = {
    cls.__name__: cls
    for cls in (UNet2DConditionModel, UNet2DModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection)
}
"""Networks by the class name that ``model_index.json`` gives them (an old ``Flax`` in front is taken off)."""

TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")

NOT_LOADED = {
    "safety_checker": "pictures are not checked; pass safety_checker=None to say that you know",
    "feature_extractor": None,
    "image_encoder": "image prompts are not available",
    "watermark": None,
}
"""Components of published folders that this library has no class for, and what their absence means for the user."""


@dataclasses.dataclass(frozen=True)
class DiffusionPipeline:
    """What every pipeline is: parts by name, their parameters, and options of the folder.

    Open one with :meth:`from_pretrained`, which chooses the class that the folder names. Pipelines never change;
    :meth:`replace` gives another one that shares everything else.

    Attributes:
      components: name -> network, scheduler, tokenizer or None.
      params: name -> tree of ``jax.Array``, for the networks.
      options: the other values of ``model_index.json``.
      mesh: where to run, with an axis ``data`` (pictures) and, if networks are to be cut, ``fsdp`` and ``tensor``; None
        is JAX's default device.
      vae_tiling: edge in latents of the tiles that pictures are decoded in, or None for one piece.
      vae_slicing: decode one picture after another, in the memory of one.
      programs: the compiled programs, shared by all pipelines unless given.
    """

    components: Mapping[str, Any]
    params: Mapping[str, Params] = dataclasses.field(repr=False)  # thousands of lines of numbers
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None
    vae_tiling: int | None = None
    vae_slicing: bool = False
    programs: Programs = dataclasses.field(default=PROGRAMS, repr=False, compare=False)

    required: ClassVar[tuple[str, ...]] = ()
    """Components without which the pipeline cannot work."""

    def __post_init__(self) -> None:
        missing = [name for name in self.required if self.components.get(name) is None]
        if missing:
            have = [name for name, part in self.components.items() if part is not None]
            raise ValueError(f"{type(self).__name__} needs {', '.join(missing)}; given are {', '.join(have)}")
        if isinstance(self.vae_tiling, bool) or (self.vae_tiling is not None and self.vae_tiling < 1):
            raise ValueError(f"vae_tiling is the edge of a tile in latents, for example 64, got {self.vae_tiling!r}")
        if self.mesh is not None:
            object.__setattr__(self, "mesh", automatic(self.mesh))

    @property
    def scheduler(self) -> Scheduler:
        """The sampler's configuration; exchange it by ``pipe.replace(scheduler=...)``."""
        return self.components["scheduler"]

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
            given as ``(model, params)``.

        Raises:
          WeightsError: no such folder or model, an unknown class, or weights that do not fit. Nothing is half-loaded.
          TypeError: a component that the pipeline does not have.

        Example::

            pipe = DiffusionPipeline.from_pretrained("diffuse-jax/emoji")
            picture = pipe("a red apple, noto style", seed=0).images[0]
        """
        skip = [name for name, part in components.items() if part is None or name in NOT_LOADED]
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

        parts: dict[str, Any] = dict.fromkeys(index.absent)
        params: dict[str, Params] = {}
        wanted = {name: entry for name, entry in index.components.items() if name not in (*skip, *components)}
        check_classes(wanted, folder)
        for name, entry in wanted.items():
            parts[name] = open_component(name, entry, params, dtype, mesh, variant)
        return cast(Self, target(*with_given(parts, params, components), index.options, mesh))

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
        from diffuse_jax.pipelines.single_file import open_single_file

        pipe = open_single_file(
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
        if not isinstance(pipe, cls):
            raise TypeError(f"{path} holds a {type(pipe).__name__}, not a {cls.__name__}")
        return pipe

    def replace(self, **changes: Any) -> Self:
        """A pipeline with other components (``scheduler=...``; a network as ``(model, params)``) or other settings."""
        fields = {f.name for f in dataclasses.fields(self)}
        settings = {name: value for name, value in changes.items() if name in fields}
        given = {name: part for name, part in changes.items() if name not in fields}
        unknown = sorted(set(given) - set(self.components))
        if unknown:
            names = ", ".join(sorted(self.components))
            raise TypeError(f"{type(self).__name__} has no component {unknown[0]!r}; it has {names}")
        parts, params = with_given(self.components, self.params, given)
        return dataclasses.replace(self, **{"components": parts, "params": params} | settings)

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
        entries: dict[str, tuple[str | None, str | None]] = {}
        for name, part in self.components.items():
            entries[name] = library_and_class(part)
            if isinstance(part, Model):
                part.save_pretrained(folder / name, self.params[name], variant=variant, dtype=dtype)
            elif part is not None:
                part.save_pretrained(folder / name)
        weights.write_index(folder, type(self).__name__, entries, self.options)
        return folder

    def save_compiled(self, folder: str | Path) -> list[Path]:
        """Keep this process's compiled programs in ``folder``; :meth:`load_compiled` finds them in the next process."""
        return self.programs.save(folder)

    def load_compiled(self, folder: str | Path) -> Self:
        """Look for compiled programs in ``folder`` (trusted: they are executable code) before compiling; returns self.

        A program is used only if shapes, mesh, versions and the library's own code are those it was compiled for;
        otherwise the call compiles as usual.
        """
        self.programs.load(folder)
        return self


def with_given(
    parts: Mapping[str, Any], params: Mapping[str, Params], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Params]]:
    """Components and parameters with those that the caller gave; a network comes as ``(model, params)``.

    Raises:
      TypeError: a network came without parameters, or what came is not of this library.
    """
    pairs = {name: part for name, part in given.items() if isinstance(part, tuple)}
    for name, part in given.items():
        wrong = isinstance(part, Model) and name not in params
        if wrong or (name in pairs and not (len(part) == 2 and isinstance(part[0], Model))):
            raise TypeError(f"{name}: give a network as (model, params), as its from_pretrained returns it")
        if name == "scheduler" and not isinstance(part, Scheduler):
            raise TypeError(f"scheduler must be one of diffuse_jax, got {type(part).__module__}.{type(part).__name__}")
    models = {name: model for name, (model, _) in pairs.items()}
    return {**parts, **given, **models}, {**params, **{name: own for name, (_, own) in pairs.items()}}


def pipeline_class(name: str, named_in: str | Path) -> type[DiffusionPipeline]:
    """The class that an index or a single file names."""
    from diffuse_jax.pipelines import PIPELINES

    if name not in PIPELINES:
        raise WeightsError(f"{named_in}: no pipeline is called {name!r}; known: {', '.join(PIPELINES)}")
    return PIPELINES[name]


def check_classes(entries: Mapping[str, Component], folder: Path) -> None:
    """Refuse unknown classes before anything is read."""
    for name, entry in entries.items():
        plain = entry.class_name.removeprefix("Flax")
        if name not in NOT_LOADED and plain not in (*MODELS, *TOKENIZERS) and not plain.endswith("Scheduler"):
            known = ", ".join((*MODELS, *TOKENIZERS))
            raise WeightsError(
                f"{folder}/model_index.json: component {name!r} is a {entry.class_name!r}; known: {known}, schedulers"
            )


def open_component(
    name: str, entry: Component, params: dict[str, Params], dtype: DTypeLike, mesh: Mesh | None, variant: str | None
) -> Any:
    """One component from its folder; the parameters of a network go into ``params``."""
    plain = entry.class_name.removeprefix("Flax")
    if name in NOT_LOADED:
        if NOT_LOADED[name]:
            warnings.warn(f"{name} ({entry.class_name}) is not loaded: {NOT_LOADED[name]}", stacklevel=4)
        return None
    require_folder(entry.folder)  # what opens tokenizers and schedulers would look for its name on the Hub
    if plain in MODELS:
        model = MODELS[plain].from_config(entry.folder, dtype=dtype)
        shapes = model.shapes()
        params[name] = weights.load_params(
            entry.folder,
            shapes,
            stem=model.weights_name,
            variant=variant,
            dtype=dtype,
            shardings=None if mesh is None else param_shardings(shapes, automatic(mesh)),
        )
        return model
    if plain in TOKENIZERS:
        return clip_tokenizer(entry.folder)
    return scheduler_class(plain, entry.folder).from_pretrained(entry.folder)


def scheduler_class(name: str, folder: Path) -> type[Scheduler]:
    """The class that the index names, which counts, as in diffusers, where the scheduler's own file names another.

    Raises:
      WeightsError: there is no such scheduler.
    """
    found = getattr(schedulers, name, None)
    if not (isinstance(found, type) and issubclass(found, Scheduler)):
        raise WeightsError(f"{folder.parent}/model_index.json: component {folder.name!r} is an unknown {name!r}")
    return found


def library_and_class(part: Any) -> tuple[str | None, str | None]:
    """What ``model_index.json`` says of a component."""
    if part is None:
        return None, None
    name = type(part).__name__
    return ("transformers" if name.startswith("CLIP") else "diffusers"), name
