"""The pipelines of tasks are those that PyTorch diffusers chooses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diffuse_jax import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from diffuse_jax.pipelines import PIPELINES

theirs = pytest.importorskip("diffusers.pipelines.auto_pipeline")

MAPPINGS = {
    AutoPipelineForText2Image: theirs.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    AutoPipelineForImage2Image: theirs.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AutoPipelineForInpainting: theirs.AUTO_INPAINT_PIPELINES_MAPPING,
}
DECODERS = (
    theirs._AUTO_TEXT2IMAGE_DECODER_PIPELINES_MAPPING,
    theirs._AUTO_IMAGE2IMAGE_DECODER_PIPELINES_MAPPING,
    theirs._AUTO_INPAINT_DECODER_PIPELINES_MAPPING,
)


def cases() -> Iterator[tuple[str, type, str]]:
    """What a folder may have been saved for, the task, and the class that diffusers has for it, if it is here too."""
    for auto, chosen in MAPPINGS.items():
        for family, target in chosen.items():
            if target.__name__ in PIPELINES:
                sources = {found[family].__name__ for found in (*MAPPINGS.values(), *DECODERS) if family in found}
                yield from ((name, auto, target.__name__) for name in sorted(sources))


CASES = list(cases())


@pytest.mark.parametrize(("saved_for", "auto", "name"), CASES, ids=[f"{c[0]}-{c[1].__name__}" for c in CASES])
def test_the_class_is_the_one_of_diffusers(saved_for: str, auto: type, name: str) -> None:
    assert auto.pipeline_for(saved_for, "x", {}).__name__ == name


def test_families_of_this_library_are_compared() -> None:
    found = {name for _, _, name in CASES}
    assert {"WuerstchenCombinedPipeline", "KandinskyV22CombinedPipeline", "IFPipeline"} <= found
    assert len(found) > 25
