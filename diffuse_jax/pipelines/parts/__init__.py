"""Parts that methods are composed of: conditioning, guidance, control, start, step and decoding."""

from diffuse_jax.pipelines.parts.control import Beside, BesideScaled, Controlled, Steered
from diffuse_jax.pipelines.parts.decode import Raw, ToImages, ToPixels, UnitPixels
from diffuse_jax.pipelines.parts.guidance import Branches, ClassifierFree, Guidance, branches
from diffuse_jax.pipelines.parts.image import EncodeMaskedImage, LatentMask
from diffuse_jax.pipelines.parts.ip_adapter import EncodeImages, ImagePrompted
from diffuse_jax.pipelines.parts.network import HalvedUNet, PixelUNet, UNet
from diffuse_jax.pipelines.parts.safety import Checked
from diffuse_jax.pipelines.parts.start import FromImage, FromNoise, FromPixels
from diffuse_jax.pipelines.parts.step import KeepClean, KeepKnown, KeepKnownAnew, Langevin
from diffuse_jax.pipelines.parts.text import EncodeText

__all__ = [
    "Beside",
    "BesideScaled",
    "Branches",
    "Checked",
    "ClassifierFree",
    "Controlled",
    "EncodeImages",
    "EncodeMaskedImage",
    "EncodeText",
    "FromImage",
    "FromNoise",
    "FromPixels",
    "Guidance",
    "HalvedUNet",
    "ImagePrompted",
    "KeepClean",
    "KeepKnown",
    "KeepKnownAnew",
    "Langevin",
    "LatentMask",
    "PixelUNet",
    "Raw",
    "Steered",
    "ToImages",
    "ToPixels",
    "UNet",
    "UnitPixels",
    "branches",
]
