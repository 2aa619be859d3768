"""What a call may change about a run, whatever the task: ``pipe(prompt, ..., modifiers=[PerturbedAttention(3.0)])``.

A modifier is a frozen dataclass (any function will do) that takes a request and its pipeline and returns the changed
request: parts of its method are exchanged, and its values become rows, so changing them compiles nothing. Modifiers
combine; each acts on the result of the ones before it. Custom ones are written in the same way.
"""

from diffuse_jax.pipelines.modifiers.features import DeepCache, FreeU, Windows
from diffuse_jax.pipelines.modifiers.guidance import (
    AdaptiveProjected,
    GuidanceInterval,
    GuidanceSchedule,
    PerpNeg,
    Regions,
    ZeroStar,
)
from diffuse_jax.pipelines.modifiers.perturbation import PerturbedAttention, SelfAttentionGuidance
from diffuse_jax.pipelines.modifiers.request import Number, modified
from diffuse_jax.pipelines.running import Modifier

__all__ = [
    "AdaptiveProjected",
    "DeepCache",
    "FreeU",
    "GuidanceInterval",
    "GuidanceSchedule",
    "Modifier",
    "Number",
    "PerpNeg",
    "PerturbedAttention",
    "Regions",
    "SelfAttentionGuidance",
    "Windows",
    "ZeroStar",
    "modified",
]
