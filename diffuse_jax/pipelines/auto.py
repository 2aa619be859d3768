"""Pipelines chosen by task, whatever the checkpoint's architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from diffuse_jax import weights
from diffuse_jax.pipelines.catalogue import not_downloaded
from diffuse_jax.pipelines.combined import Combined
from diffuse_jax.pipelines.family import autoencoder_name
from diffuse_jax.pipelines.pipeline import PIPELINES, DiffusionPipeline, pipeline_class
from diffuse_jax.pipelines.tasks import vae_of

COMBINED = ("Kandinsky", "KandinskyV22", "StableCascade", "Wuerstchen")
"""Families whose checkpoints are decoders of embeddings; the classes that take prompts run their prior first."""

FAMILIES = (
    *("StableDiffusion", "StableDiffusionXL", "LatentConsistencyModel", "LDMTextToImage", "IF"),
    *("UnCLIP", "StableUnCLIP"),
    *COMBINED,
)
NAME = re.compile(
    f"({'|'.join(FAMILIES)})(ControlNet|)(PAG|)(Img2Img|Inpaint|Inpainting|)(?:Combined|Decoder|)Pipeline"
)
"""Class names in ``model_index.json``, split into family, ControlNet, perturbed-attention guidance, and the task that
the folder was saved for."""
TASKS = {"IFInpaintPipeline": "IFInpaintingPipeline"}
"""Class names that follow from family and task -> what they are called instead."""
SHARED = {"LatentConsistencyModel": "StableDiffusion"}
"""Families whose checkpoints are run by the classes of another family, for tasks without a class of their own."""


class AutoPipeline:
    """Base of the classes below, one for each task.

    With a ControlNet in the checkpoint or pipeline, or with ``controlnet=``, the task's ControlNet class is used;
    ``controlnet=None`` leaves the ControlNet out. With ``enable_pag=True``, or where the checkpoint or pipeline has it,
    the class is the one with perturbed-attention guidance; ``enable_pag=False`` leaves that out.
    """

    task: ClassVar[str]
    """The part of the class names between the family and ``Pipeline``."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> DiffusionPipeline:
        """Like :meth:`DiffusionPipeline.from_pretrained`, with the class chosen by the checkpoint's architecture.

        Raises:
          WeightsError: the checkpoint does not exist, or its architecture does not support the task.
        """
        hub = ("revision", "local_files_only", "token", "cache_dir", "variant")
        chosen = {name: value for name, value in options.items() if name in hub}
        folder = weights.resolve(source, **chosen, skip=not_downloaded(options))
        target = cls.pipeline_for(weights.read_index(folder).class_name, source, options)
        pipe = target.from_pretrained(folder, **{k: v for k, v in options.items() if k != "enable_pag"})
        return cls.checked(pipe, source)

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline, **components: Any) -> DiffusionPipeline:
        """The task's pipeline with the components of another pipeline; parameters are shared, not copied. Pipelines of
        other tasks (T2I-Adapters, panoramas, self-attention guidance, DiffEdit) become the plain one of their family. A
        decoder of embeddings becomes the pipeline of both stages, with ``prior=`` an open prior.

        Raises:
          WeightsError: the architecture does not support the task.
        """
        target = cls.pipeline_for(type(pipe), "this pipeline", components)
        made = target.from_pipe(pipe, **{k: v for k, v in components.items() if k != "enable_pag"})
        return cls.checked(made, f"this {type(pipe).__name__}")

    @classmethod
    def checked(cls, pipe: DiffusionPipeline, source: Any) -> DiffusionPipeline:
        """The pipeline, if its UNet takes what the task gives it.

        Raises:
          WeightsError: it takes more, such as the depth of an image.
        """
        if isinstance(pipe, Combined) or "unet" not in pipe.components:
            return pipe  # decoders of embeddings check their networks themselves
        over_pixels = pipe.components.get(autoencoder_name(pipe)) is None
        latents = 3 if over_pixels else vae_of(pipe).config.latent_channels
        channels = pipe.components["unet"].config.in_channels
        takes = (latents, 2 * latents + 1) if cls.task == "Inpaint" and not over_pixels else (latents,)
        if channels not in takes:
            raise weights.WeightsError(
                f"{source} has a UNet with {channels} input channels, and a {type(pipe).__name__} gives it "
                f"{' or '.join(map(str, takes))}; pass the UNet of a plain checkpoint, unet=(model, params)"
            )
        return pipe

    @classmethod
    def pipeline_for(cls, own: str | type, source: Any, given: Mapping[str, Any]) -> type[DiffusionPipeline]:
        """The class for this task and the architecture of a class, or of the one of a name, with or without a
        ControlNet and perturbed-attention guidance. A class of no such task counts as what it inherits from."""
        if isinstance(own, str) and own in PIPELINES and not NAME.fullmatch(own):
            own = pipeline_class(own, source)
        names = [own] if isinstance(own, str) else [base.__name__ for base in own.__mro__]
        name, found = names[0], next((match for base in names if (match := NAME.fullmatch(base))), None)
        if found is None:
            raise cls.refused(name, source)
        family, control, perturbed, _ = found.groups()
        has_control = given["controlnet"] is not None if "controlnet" in given else bool(control)
        kind = ("ControlNet" if has_control else "") + ("PAG" if given.get("enable_pag", bool(perturbed)) else "")
        rest = f"{kind}{cls.task}{'Combined' if family in COMBINED else ''}Pipeline"
        target = (family if family + rest in PIPELINES else SHARED.get(family, family)) + rest
        target = TASKS.get(target, target)
        if target not in PIPELINES and not kind:
            raise cls.refused(name, source)
        return pipeline_class(target, source)

    @classmethod
    def refused(cls, name: str, source: Any) -> weights.WeightsError:
        """The error that no class for this task has the architecture of the class of this name."""
        known = ", ".join(k for k in sorted(PIPELINES) if NAME.fullmatch(k))
        return weights.WeightsError(f"{source}: {name} has no {cls.__name__}; known: {known}")


class AutoPipelineForText2Image(AutoPipeline):
    """Opens any text-to-image checkpoint, including one that was saved for another task."""

    task = ""


class AutoPipelineForImage2Image(AutoPipeline):
    """Opens any text-to-image checkpoint for image to image."""

    task = "Img2Img"


class AutoPipelineForInpainting(AutoPipeline):
    """Opens any text-to-image checkpoint for inpainting."""

    task = "Inpaint"
