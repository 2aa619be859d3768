"""Whole pipelines in one file, in the layout of the original (CompVis, Stability) checkpoints."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.weights import infer, original
from diffuse_jax.weights.copy import compact
from diffuse_jax.weights.errors import WeightsError, bad
from diffuse_jax.weights.load import Checkpoint, read_checkpoint
from diffuse_jax.weights.names import IGNORED
from diffuse_jax.weights.safetensors import read_metadata, write_safetensors
from diffuse_jax.weights.torch_file import read_torch_object

RECORD = "diffuse_jax"
"""Key of the metadata under which a written file keeps what its tensors do not say."""

UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."

BUFFERS = re.compile(
    r"^(model_ema\.|betas$|alphas_cumprod|sqrt_|log_one_minus|posterior_|logvar$|lvlb_weights$|scale_factor$"
    r"|denoiser\.|low_scale_model\.|depth_model\.|first_stage_model\.(loss|model_ema)\."
    r"|(cond_stage_model|conditioner\.embedders\.\d+)\.(model\.)?(logit_scale|attn_mask)$)"
)
"""Keys of a training run that no component needs: averages, noise schedules, losses, depth estimators."""

OPENCLIP_UNUSED = re.compile(r"^(text_projection|transformer\.resblocks\.(\d+)\..*)$")
"""What Stable Diffusion 2's text encoder carries along: its projection and its last layer, whose input is used."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A network of a single file: its class in diffusers or transformers, its configuration, and its tensors."""

    library: str
    class_name: str
    config: dict[str, Any]
    checkpoint: Checkpoint


@dataclasses.dataclass(frozen=True)
class SingleFile:
    """What a single file holds, in the terms of a pipeline's folder.

    Attributes:
      class_name: the pipeline's class in diffusers.
      family: a name of :data:`diffuse_jax.weights.infer.FAMILIES`.
      networks: component name -> network; tensors are views of the file under diffusers' names.
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
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> SingleFile:
    """Open a checkpoint in the original layout: Stable Diffusion 1.x, 2.x, the x4 upscaler, SDXL base and refiner.

    Args:
      path: a ``.safetensors`` or ``.ckpt`` file.
      prediction_type: ``"epsilon"`` or ``"v_prediction"``; None takes the family's, or what the step of training says
        for Stable Diffusion 2, whose two kinds have the same tensors.
      ema: take the UNet's averaged weights (``model_ema.``), which some files carry beside the last ones.
      configs: component name -> values that replace those of the file's metadata and those read off its tensors.

    Raises:
      WeightsError: a damaged or hostile file, no known family, or tensors that belong to no component.
    """
    path = Path(path)
    if path.is_dir():
        raise bad(path, "is a folder, and a checkpoint of one file is wanted; from_pretrained opens folders")
    checkpoint = read_checkpoint([path])
    name = infer.family_of(checkpoint.tensors)
    if name is None:
        raise bad(
            path, "not a Stable Diffusion checkpoint in the original layout: no text encoder where one is expected"
        )
    family = infer.FAMILIES[name]
    tensors = _with_ema(path, checkpoint.tensors) if ema else checkpoint.tensors
    groups = _groups(path, tensors, family)
    networks = {part: _network(path, part, group, family, name) for part, group in groups.items()}
    recorded = _recorded(path)
    for changes in (recorded.get("configs", {}), configs or {}):
        for part in changes.keys() & networks.keys():
            networks[part].config.update(changes[part])
    channels = networks["unet"].config["in_channels"]
    if channels not in family.pipelines:
        raise bad(path, f"a UNet with {channels} input channels; {name} files have {sorted(family.pipelines)}")
    prediction = prediction_type or _prediction_type(path, name, family)
    if name == "v2" and prediction == "epsilon":
        networks["unet"].config["sample_size"] = 64
        networks["vae"].config["sample_size"] = 512
    schedulers = {"scheduler": {**family.scheduler, "prediction_type": prediction}}
    if name == "x4-upscaler":
        schedulers["low_res_scheduler"] = dict(infer.LOW_RES)
    if prediction_type is None:
        schedulers |= recorded.get("schedulers", {})
    return SingleFile(family.pipelines[channels], name, networks, schedulers, dict(family.options))


def _recorded(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Configurations that :func:`write_single_file` left in the file's metadata: kind -> component name -> values."""
    if path.suffix != ".safetensors" or RECORD not in (metadata := read_metadata(path)):
        return {}
    try:
        found = json.loads(metadata[RECORD])
        tables = [table for kind in ("configs", "schedulers") for table in found[kind].values()]
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError, RecursionError) as error:
        raise bad(path, f"the configurations in its metadata ({RECORD!r}) are damaged ({error})") from error
    if not all(isinstance(table, dict) for table in tables):
        raise bad(path, f"the configurations in its metadata ({RECORD!r}) are no objects")
    return found


def _prediction_type(path: Path, name: str, family: infer.Family) -> str:
    """The family's, unless the training step of a ``.ckpt`` says that it is a base model."""
    if name == "v2" and path.suffix != ".safetensors":
        step = read_torch_object(path).get("global_step")
        if step in infer.EPSILON_STEPS:
            return "epsilon"
    return family.prediction_type


def _with_ema(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with the UNet's averages, whose names have lost their dots, in the UNet's place."""
    if not any(key.startswith(EMA) for key in tensors):
        raise bad(path, "has no averaged weights (no key begins with 'model_ema.'); open it with ema=False")
    result = dict(tensors)
    for key in tensors:
        if key.startswith(UNET):
            average = EMA + key.removeprefix("model.").replace(".", "")
            if average not in tensors:
                raise bad(path, f"has averaged weights but not {average!r}")
            result[key] = tensors[average]
    return result


def _groups(path: Path, tensors: Mapping[str, np.ndarray], family: infer.Family) -> dict[str, dict[str, np.ndarray]]:
    """Component name -> its tensors without their prefix; a key of none is an error unless it is a known buffer."""
    prefixes = {"unet": UNET, "vae": VAE} | {part: prefix for part, (prefix, _) in family.text.items()}
    groups: dict[str, dict[str, np.ndarray]] = {part: {} for part in prefixes}
    unknown = []
    for key, array in tensors.items():
        if BUFFERS.search(key) or IGNORED.search(key):
            continue
        part = next((part for part, prefix in prefixes.items() if key.startswith(prefix)), None)
        if part is None:
            unknown.append(key)
        else:
            groups[part][key.removeprefix(prefixes[part])] = array
    if unknown:
        raise bad(path, f"{len(unknown)} tensors belong to no component, e.g. {', '.join(map(repr, unknown[:3]))}")
    empty = [prefixes[part] for part, group in groups.items() if not group]
    if empty:
        raise bad(path, f"no key begins with {' or '.join(map(repr, empty))}")
    return groups


def _network(path: Path, part: str, group: dict[str, np.ndarray], family: infer.Family, name: str) -> Part:
    """One component: its names translated, its configuration read off its tensors."""
    layout = family.text[part][1] if part in family.text else part
    if layout == "openclip" and name in ("v2", "x4-upscaler"):
        group = _without_last_layer(group)
    try:
        tensors = original.to_diffusers(group, original.TABLES[layout](group))
        if part == "unet":
            config = infer.unet_config(tensors, family)
        else:
            config = infer.vae_config(tensors, family) if part == "vae" else infer.text_config(tensors, layout)
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise bad(
            path, f"{part}: cannot read its configuration off its tensors; missing or misshapen: {error}"
        ) from error
    kind = config.get("_class_name") or config["architectures"][0]
    library = "diffusers" if part in ("unet", "vae") else "transformers"
    return Part(library, kind, config, Checkpoint(tensors, dict.fromkeys(tensors, path)))


def _without_last_layer(group: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stable Diffusion 2 reads the last layer but one; a whole encoder is cut there, a cut one has no projection."""
    if "text_projection" not in group:
        return group
    layers = {key: int(found[2]) for key in group if (found := OPENCLIP_UNUSED.match(key)) and found[2]}
    last = max(layers.values(), default=-1)
    return {key: a for key, a in group.items() if key != "text_projection" and layers.get(key) != last}


def family_for(networks: Mapping[str, Mapping[str, Any]]) -> str:
    """The family that a pipeline's configurations (component name -> ``config.json``) belong to.

    Raises:
      WeightsError: the original layout has no place for such a pipeline.
    """
    text = {
        name: "clip" if config.get("hidden_act") == "quick_gelu" else "openclip" for name, config in networks.items()
    }
    for name, family in infer.FAMILIES.items():
        layouts = {part: layout for part, (_, layout) in family.text.items()}
        upscaler = networks.get("unet", {}).get("num_class_embeds") is not None
        parts = {"unet", "vae", *layouts}
        fits = networks.keys() == parts and all(text[part] == layout for part, layout in layouts.items())
        if fits and (name == "x4-upscaler") == upscaler:
            return name
    raise WeightsError(
        f"the components {', '.join(sorted(networks))} fit none of the single-file layouts {', '.join(infer.FAMILIES)}"
    )


def write_single_file(
    path: Path | str,
    networks: Mapping[str, Mapping[str, np.ndarray]],
    family: str,
    cast: Any = lambda array: array.dtype,
    *,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    schedulers: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a pipeline's networks as one ``.safetensors`` file in the original layout.

    Args:
      path: the file.
      networks: component name -> tensors under diffusers' names.
      family: as :func:`family_for` gives it.
      cast: array -> the dtype it is written in.
      configs: component name -> ``config.json``; kept in the file's metadata, for what its tensors do not say.
      schedulers: component name -> ``scheduler_config.json``, kept there too.

    Raises:
      WeightsError: a tensor that the layout has no name for.
    """
    path = Path(path)
    prefixes = {"unet": UNET, "vae": VAE} | {part: row[0] for part, row in infer.FAMILIES[family].text.items()}
    layouts = {"unet": "unet", "vae": "vae"} | {part: row[1] for part, row in infer.FAMILIES[family].text.items()}
    sources: dict[str, list[tuple[np.ndarray, str]]] = {}
    for part, tensors in networks.items():
        groups = original.to_original(tensors, original.TABLES[layouts[part]](tensors))
        for key, members in groups.items():
            sources[prefixes[part] + key] = [(tensors[name], operation) for name, operation in members]
    specs = {key: (np.dtype(cast(parts[0][0])), _shape(parts)) for key, parts in sorted(sources.items())}
    arrays = (compact(original.combine(sources[key]), dtype) for key, (dtype, _) in specs.items())
    record = json.dumps({"configs": configs or {}, "schedulers": schedulers or {}})
    write_safetensors(path, specs, arrays, {RECORD: record} if configs or schedulers else None)


def _shape(parts: list[tuple[np.ndarray, str]]) -> tuple[int, ...]:
    """The shape of the combined tensor, without combining."""
    if len(parts) > 1:
        return (sum(len(array) for array, _ in parts), *parts[0][0].shape[1:])
    return original.combine(parts).shape
