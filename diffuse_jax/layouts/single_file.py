"""Reading whole pipelines from a single file in the layout of the original (CompVis, Stability) checkpoints."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.errors import WeightsError, bad
from diffuse_jax.layouts.configs import text_config, unet_config, vae_config
from diffuse_jax.layouts.families import EPSILON_STEPS, FAMILIES, UNET, Family, identify
from diffuse_jax.layouts.kinds import held
from diffuse_jax.layouts.markers import MARKERS, read_markers
from diffuse_jax.layouts.midas import depth_config
from diffuse_jax.layouts.original import TABLES
from diffuse_jax.layouts.record import Configs, read_record
from diffuse_jax.layouts.rows import to_diffusers
from diffuse_jax.limits import absence
from diffuse_jax.messages import brief
from diffuse_jax.weights.load import Checkpoint, read_checkpoint
from diffuse_jax.weights.names import IGNORED
from diffuse_jax.weights.torch_file import read_torch_object
from diffuse_jax.writing import expanded

Tensors = Mapping[str, np.ndarray]

EMA = "model_ema."

BUFFERS = re.compile(
    r"^(model_ema\.|betas$|alphas_cumprod|sqrt_|log_one_minus|posterior_|logvar$|lvlb_weights$|scale_factor$"
    rf"|({'|'.join(map(re.escape, MARKERS))})$|denoiser\.|low_scale_model\.|first_stage_model\.(loss|model_ema)\."
    r"|depth_model\.model\.pretrained\.model\.head\."
    r"|(optimizer_states|lr_schedulers|callbacks|loops|amp_scaler|embedding_manager)\."
    r"|(cond_stage_model|conditioner\.embedders\.\d+)\.((model|transformer)\.)?(logit_scale|attn_mask)$"
    r"|(cond_stage_model|conditioner\.embedders\.\d+)\.model\.visual\."
    r"|(cond_stage_model|conditioner\.embedders\.\d+)\.transformer\.(vision_model|visual_projection|text_projection)\.)"
)
"""Keys that training left in the file and no component needs: EMA weights, noise schedules, losses, optimizers, the
classifier of a depth network, and CLIP's image encoder and projections beside its text encoder."""

OPENCLIP_UNUSED = re.compile(r"^(text_projection|transformer\.resblocks\.(\d+)\..*)$")
"""What goes unused in a text encoder that is read at its penultimate layer: its projection and its last layer."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A network of a single file: its class in diffusers or transformers, its configuration, and its tensors."""

    library: str
    class_name: str
    config: dict[str, Any]
    checkpoint: Checkpoint


@dataclasses.dataclass(frozen=True)
class SingleFile:
    """What a single file holds, in terms of a pipeline's folder.

    Attributes:
      class_name: the pipeline's class in diffusers.
      family: a name of :data:`diffuse_jax.layouts.families.FAMILIES`.
      networks: component name -> network, whose tensors are views of the file under diffusers' names.
      schedulers: component name -> ``scheduler_config.json``.
      options: further values of ``model_index.json``.
    """

    class_name: str
    family: str
    networks: dict[str, Part]
    schedulers: dict[str, dict[str, Any]]
    options: dict[str, Any]


def read_single_file(
    path: Path | str,
    *,
    prediction_type: str | None = None,
    ema: bool = False,
    configs: Configs | None = None,
    given: Configs | None = None,
    tensors: Tensors | None = None,
) -> SingleFile:
    """Open a checkpoint in the original layout: Stable Diffusion 1.x, 2.x, the x4 upscaler, SDXL base and refiner, and
    their inpainting, editing and depth models.

    Args:
      path: a ``.safetensors`` or ``.ckpt`` file.
      prediction_type: ``"epsilon"`` or ``"v_prediction"``. If None, a marker tensor in the file decides
        (:mod:`~diffuse_jax.layouts.markers`), else the family; a Stable Diffusion 2 ``.ckpt``, where both kinds have
        the same tensors, is classified by its training step.
      ema: use the UNet's EMA weights (``model_ema.``), which some files hold beside the last ones.
      configs: component name -> values that override the file's metadata and what its tensors imply.
      given: component name -> configuration (may be empty) of the components that the caller provides. The file need
        not contain these; if it does, they are ignored.
      tensors: those of the file, if it is open already (:func:`open_file`).

    Raises:
      WeightsError: the file is damaged or hostile, fits no known family, or has tensors that belong to no component.
    """
    path, tensors = open_file(path) if tensors is None else (Path(path), tensors)
    given = given or {}
    name, lacks = identify(tensors, given)
    if name is None:
        raise bad(path, _no_family(lacks) + f".{held(tensors)}")
    family = FAMILIES[name]
    groups = _groups(path, _with_ema(path, tensors) if ema else tensors, name, given)
    networks = {part: _network(path, part, group, family) for part, group in groups.items()}
    unet = networks["unet"].config if "unet" in networks else given["unet"]
    channels = unet.get("in_channels", min(family.pipelines))
    if type(channels) is not int or channels not in family.pipelines:
        raise bad(path, _other_channels(channels, name, lacks))
    default = _prediction_type(path, family, channels)
    marks = read_markers(path, tensors, family, prediction_type, default)
    if marks.scheduler["prediction_type"] == "epsilon" and family.epsilon_sizes:
        for part, size in zip(("unet", "vae"), family.epsilon_sizes, strict=True):
            if part in networks:
                networks[part].config["sample_size"] = size
    record = read_record(path)
    for changes in ({"vae": marks.vae}, record.get("configs", {}), configs or {}):
        for part in changes.keys() & networks.keys():
            networks[part].config.update(changes[part])
    schedulers = {"scheduler": marks.scheduler}
    schedulers |= {part: dict(config) for part, config in family.other_schedulers.items()}
    if prediction_type is None:
        schedulers |= record.get("schedulers", {})
    class_name = family.pipelines[channels]
    return SingleFile(class_name, name, networks, schedulers, {**family.options, **marks.options.get(class_name, {})})


def open_file(path: Path | str) -> tuple[Path, dict[str, np.ndarray]]:
    """The path of a single file, and its tensors.

    Raises:
      WeightsError: it is a folder, an address on the Web or missing, or the file is damaged or hostile.
    """
    if re.match(r"(https?://|(www\.)?(huggingface|hf)\.co/)", str(path)):
        raise WeightsError(
            f"{path}: is an address, but a local file is needed; download it, for example with "
            "huggingface_hub.hf_hub_download"
        )
    path = expanded(path)
    if path.is_dir():
        raise bad(path, "is a folder, but a single-file checkpoint is needed; from_pretrained opens folders")
    if not path.exists():
        raise bad(path, absence(path))
    return path, read_checkpoint([path]).tensors


def _no_family(lacks: Mapping[str, list[str]]) -> str:
    """The error for a file that fits no family: what it lacks for each, the nearest first."""
    nearest = sorted(lacks, key=lambda name: len(lacks[name]))
    missing = "; ".join(f"for {name}: {', '.join(lacks[name])}" for name in nearest)
    return (
        "not a complete Stable Diffusion checkpoint in the original layout; missing are "
        f"{missing}. Missing components can be passed to from_single_file, for example vae=(model, params)"
    )


def _other_channels(channels: Any, name: str, lacks: Mapping[str, list[str]]) -> str:
    """The error for a UNet whose number of input channels no pipeline of its family has."""
    text = f"the UNet has {brief(channels)} input channels; {name} files have {sorted(FAMILIES[name].pipelines)}"
    others = [other for other in lacks if lacks[other] and channels in FAMILIES[other].pipelines]
    hints = [f"; missing for {other}: {', '.join(lacks[other])}" for other in others]
    return text + "".join(hints)


def _prediction_type(path: Path, family: Family, channels: int) -> str:
    """The family's, unless the UNet's channels, or the training step of a ``.ckpt`` (SD 2 base), says otherwise."""
    if channels in family.epsilon_channels:
        return "epsilon"
    if not family.epsilon_sizes or path.suffix.lower() == ".safetensors":
        return family.prediction_type
    found = read_torch_object(path)
    step = found.get("global_step") if isinstance(found, Mapping) else None
    return "epsilon" if isinstance(step, int) and step in EPSILON_STEPS else family.prediction_type


def _with_ema(path: Path, tensors: Tensors) -> dict[str, np.ndarray]:
    """The tensors with the UNet's weights replaced by their EMA, whose keys have no dots."""
    if not any(key.startswith(EMA) for key in tensors):
        raise bad(path, "has no EMA weights (no key begins with 'model_ema.'); open it with ema=False")
    result = dict(tensors)
    for key in tensors:
        if key.startswith(UNET):
            average = EMA + key.removeprefix("model.").replace(".", "")
            if average not in tensors:
                raise bad(path, f"has EMA weights but not {average!r}")
            result[key] = tensors[average]
    return result


def is_unused(key: str) -> bool:
    """Whether a tensor is one that training left in a file and no network needs."""
    return bool(BUFFERS.search(key) or IGNORED.search(key))


def _groups(path: Path, tensors: Tensors, name: str, given: Collection[str]) -> dict[str, dict[str, np.ndarray]]:
    """Component name -> its tensors without their prefix; keys that belong to none must be known buffers."""
    prefixes = {part: prefix for part, (prefix, _) in FAMILIES[name].places.items()}
    groups: dict[str, dict[str, np.ndarray]] = {part: {} for part in prefixes}
    unknown = []
    for key, array in tensors.items():
        if is_unused(key):
            continue
        part = next((part for part, prefix in prefixes.items() if key.startswith(prefix)), None)
        if part is None:
            unknown.append(key)
        else:
            groups[part][key.removeprefix(prefixes[part])] = array
    if unknown:
        examples = ", ".join(map(repr, unknown[:3]))
        raise bad(
            path, f"{len(unknown)} tensors belong to no component of {name} files, e.g. {examples}.{held(unknown)}"
        )
    return {part: group for part, group in groups.items() if part not in given}


def _network(path: Path, part: str, group: dict[str, np.ndarray], family: Family) -> Part:
    """One component, with its keys renamed and its configuration inferred from its tensors."""
    table = family.places[part][1]
    if table == "openclip" and family.penultimate_text:
        group = without_last_layer(group)
    try:
        tensors = to_diffusers(group, TABLES[table](group))
        config = _config(tensors, table, family)
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise bad(
            path, f"{part}: cannot infer its configuration from its tensors; missing or misshapen: {error}"
        ) from error
    kind = config.get("_class_name") or config["architectures"][0]
    library = "diffusers" if part in ("unet", "vae") else "transformers"
    return Part(library, kind, config, Checkpoint(tensors, dict.fromkeys(tensors, path)))


def _config(tensors: Tensors, table: str, family: Family) -> dict[str, Any]:
    """``config.json`` of a table's network."""
    if table == "unet":
        return unet_config(tensors, family)
    if table == "midas":
        return depth_config(tensors)
    return vae_config(tensors, family) if table == "vae" else text_config(tensors, table)


def without_last_layer(group: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stable Diffusion 2 uses the penultimate layer: drop a full encoder's last layer; a cut one has no projection."""
    if "text_projection" not in group:
        return group
    layers = {key: int(found[2]) for key in group if (found := OPENCLIP_UNUSED.match(key)) and found[2]}
    last = max(layers.values(), default=-1)
    return {key: a for key, a in group.items() if key != "text_projection" and layers.get(key) != last}
