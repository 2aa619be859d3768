"""Training settings: frozen dataclasses, one for each concern, with the names and defaults of the flags.

The code that uses them is elsewhere: this package does not import JAX, so that `--help` and wrong flags are answered at
once.
"""

from diffuse_jax.training.settings.devices import DeviceSettings, ProcessSettings
from diffuse_jax.training.settings.methods import (
    AdapterSettings,
    BesideSettings,
    ConsistencySettings,
    ControlSettings,
    CustomSettings,
    DreamBoothSettings,
    EdmSettings,
    FlowSettings,
    InversionSettings,
    ObjectiveSettings,
    PriorSettings,
    RewardSettings,
    ValidationImageSettings,
    ValidationSettings,
)
from diffuse_jax.training.settings.model import (
    ComputeSettings,
    HubSettings,
    LoraSettings,
    ModelSettings,
    NetworkSettings,
)
from diffuse_jax.training.settings.run import (
    Average,
    BatchSettings,
    EmaSettings,
    OptimizerSettings,
    ProfileSettings,
    RunSettings,
    TrackerSettings,
    UploadSettings,
)

__all__ = [
    "AdapterSettings",
    "Average",
    "BatchSettings",
    "BesideSettings",
    "ComputeSettings",
    "ConsistencySettings",
    "ControlSettings",
    "CustomSettings",
    "DeviceSettings",
    "DreamBoothSettings",
    "EdmSettings",
    "EmaSettings",
    "FlowSettings",
    "HubSettings",
    "InversionSettings",
    "LoraSettings",
    "ModelSettings",
    "NetworkSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "PriorSettings",
    "ProcessSettings",
    "ProfileSettings",
    "RewardSettings",
    "RunSettings",
    "TrackerSettings",
    "UploadSettings",
    "ValidationImageSettings",
    "ValidationSettings",
]
