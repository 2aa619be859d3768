"""Which modifiers act together, and which are refused before anything is compiled; no images are made here."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from diffuse_jax.pipelines import StableDiffusionPipeline, modifiers
from diffuse_jax.pipelines.method import all_parts
from diffuse_jax.pipelines.parts import ClassifierFree, Guidance
from diffuse_jax.pipelines.parts.combine import AdaptiveProjected
from tests.pipelines.tiny import pipeline

REQUEST = {"num_inference_steps": 2, "seed": 0, "guidance_scale": 4.0}
KEEPING, WINDOWS = modifiers.AdaptiveProjected(), modifiers.Windows(4, 2)
SELF, DEEP = modifiers.SelfAttentionGuidance(), modifiers.DeepCache()


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return pipeline()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([KEEPING, modifiers.ZeroStar()], "AdaptiveProjected and ZeroStar both say how the branches"),
        ([KEEPING, WINDOWS], "Windows and AdaptiveProjected cannot be used together"),
        ([WINDOWS, DEEP], "Windows and DeepCache cannot be used together"),
        ([SELF, DEEP], "AttentionMap and DeepCache cannot be used together"),
        ([DEEP, SELF], "DeepCache and AttentionMap cannot be used together"),
        ([SELF, SELF], "SelfAttentionGuidance is given twice"),
        ([modifiers.PerturbedAttention()] * 2, "PerturbedAttention is given twice"),
    ],
)
def test_what_cannot_act_together_is_refused(pipe: Any, given: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.request("a", modifiers=given, **REQUEST)


@pytest.mark.parametrize("given", [[SELF, KEEPING], [KEEPING, SELF]], ids=["after", "before"])
def test_self_attention_guidance_takes_every_combination_inside(pipe: Any, given: list[Any]) -> None:
    parts = [*all_parts(pipe.request("a", modifiers=given, **REQUEST).method.denoiser)]
    (guidance,) = (part for part in parts if isinstance(part, ClassifierFree))
    assert guidance.combine == AdaptiveProjected()


@dataclasses.dataclass(frozen=True)
class Own(Guidance):
    """Only its type matters here."""


class WithOwnGuidance(StableDiffusionPipeline):
    def compose(self, *args: Any, **options: Any) -> Any:
        request = super().compose(*args, **options)
        own = dataclasses.replace(request.method, denoiser=Own(request.method.denoiser.inner))
        return request._replace(method=own)


def test_custom_guidance_is_not_wrapped_in_another(pipe: Any) -> None:
    with pytest.raises(ValueError, match="the guidance Own cannot be changed by modifiers"):
        WithOwnGuidance.from_pipe(pipe).request("a", modifiers=KEEPING, **REQUEST)
