"""Tiny and asymmetric autoencoders against PyTorch diffusers, alone and as the autoencoder of a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.models import AsymmetricAutoencoderKL, AutoencoderTiny, presets
from diffuse_jax.models.tiling import tiled_decode, tiled_encode
from diffuse_jax.pipelines import Net, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffuse_jax.pipelines.parts.decode import decode_latents
from diffuse_jax.weights import match, place, read_checkpoint
from diffuse_jax.weights.load import Checkpoint
from tests.oracle import twins
from tests.oracle.agreement import require_same
from tests.oracle.comparisons import (
    TOLERANCE,
    channel_first,
    channel_last,
    compare_asymmetric,
    compare_tiny,
    difference,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffuse_jax.torch_backend.twins import CALLS  # noqa: E402
from tests.oracle import folders  # noqa: E402

KINDS: dict[str, Any] = {"tiny": (twins.tiny_twin, "TAESD"), "asymmetric": (twins.asymmetric_twin, "widths double")}


@pytest.mark.parametrize("name", twins.TINIES)
def test_tiny_latents_and_images_equal_pytorch(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    differences = compare_tiny(twins.tiny_twin(name, tmp_path), rng)
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.parametrize("name", twins.ASYMMETRICS)
def test_asymmetric_outputs_equal_pytorch(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    differences = compare_asymmetric(twins.asymmetric_twin(name, tmp_path), rng)
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_opens_what_is_saved_here(kind: str, tmp_path: Path) -> None:
    make, name = KINDS[kind]
    module, model, params = make(name, tmp_path / "theirs")
    assert not model.config.unknown()
    model.save_pretrained(tmp_path / "ours", params)
    again, report = type(module).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)
    plain = lambda config: {k: json.dumps(v) for k, v in config.items() if not k.startswith("_")}
    assert plain(again.config) == plain(module.config)


@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_backend_takes_the_same_arguments(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    make, name = KINDS[kind]
    module, model, params = make(name, tmp_path)
    images = rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    mask = np.ones((2, 16, 16, 1), np.float32)
    mask[:, 8:] = 0
    apply = lambda method, *args: jax.jit(lambda p, *a: model.apply({"params": p}, *a, method=method))(params, *args)
    call = lambda method, *args: CALLS[type(model).__name__, method](module, *map(torch.tensor, args))
    latents = np.array(apply("encode", images).mode())
    given = (latents, images, mask) if kind == "asymmetric" else (latents,)
    with torch.no_grad():
        pairs = [(apply("encode", images), call("encode", images)), (apply("decode", *given), call("decode", *given))]
    for ours, theirs in pairs:
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert difference(a, b.numpy()) <= TOLERANCE


def test_images_go_through_bytes(tmp_path: Path, rng: np.random.Generator) -> None:
    module, model, params = twins.tiny_twin("TAESD", tmp_path)
    images = rng.uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    ours = model.apply({"params": params}, images)
    with torch.no_grad():
        theirs = channel_last(module(channel_first(images)).sample)
    assert np.mean(np.abs(ours - theirs) > 1e-3) < 0.2, "a latent between two bytes may be rounded either way"
    assert difference(ours, theirs) < 0.1


def test_tiles_of_a_tiny_autoencoder_are_those_of_the_whole(tmp_path: Path, rng: np.random.Generator) -> None:
    """It has no norms, so beyond the reach of its convolutions a tile is exactly that part of the whole image."""
    _, model, params = twins.tiny_twin("TAESD", tmp_path)
    images = rng.uniform(-1, 1, (1, 16, 160, 3)).astype(np.float32)
    encode = lambda x: model.apply({"params": params}, x, method="encode")
    decode = lambda z: model.apply({"params": params}, z, method="decode")
    latents = encode(images).latents
    middle = slice(4, 12)
    tiled = jax.jit(lambda x: tiled_encode(encode, x, 24, 0, model.config.scale))(images).latents
    np.testing.assert_allclose(tiled[:, :, middle], latents[:, :, middle], atol=1e-5)
    pixels = jax.jit(lambda z: tiled_decode(decode, z, 24, 0, model.config.scale))(latents)
    np.testing.assert_allclose(pixels[:, :, 16:48], decode(latents)[:, :, 16:48], atol=1e-5)


def test_masks_without_their_image_are_refused() -> None:
    config = twins.ASYMMETRICS["widths double"]
    model = AsymmetricAutoencoderKL(AsymmetricAutoencoderKL.config_class(**config))
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, "float32")
    decode = lambda p, *given: model.apply({"params": p}, *given, method="decode")
    with pytest.raises(ValueError, match=r"image must be \(1, 32, 32, 3\) for these latents, got None"):
        jax.eval_shape(decode, model.shapes(), shape(1, 8, 8, 4), None, shape(1, 32, 32, 1))
    with pytest.raises(ValueError, match=r"mask must be \(1, 32, 32, 1\) for these latents, got \(1, 8, 8, 1\)"):
        jax.eval_shape(decode, model.shapes(), shape(1, 8, 8, 4), shape(1, 32, 32, 3), shape(1, 8, 8, 1))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (AutoencoderTiny, {"num_encoder_blocks": [1, 1]}, "must be one width, repeated for each of the 2"),
        (AutoencoderTiny, {"decoder_block_out_channels": [64, 64, 64, 32]}, "must be one width"),
        (AutoencoderTiny, {"upsampling_scaling_factor": 4}, "makes 8 pixels a latent, .* make a latent 64 pixels"),
        (AutoencoderTiny, {"upsample_fn": "bicubic"}, "upsample_fn='bicubic'; expected one of"),
        (AutoencoderTiny, {"act_fn": "tanh"}, "act_fn='tanh'"),
        (AsymmetricAutoencoderKL, {"up_block_out_channels": [64, 64]}, "1 levels in the encoder and 2 in the decoder"),
        (AsymmetricAutoencoderKL, {"out_channels": 4}, "must be equal, got 3 and 4"),
    ],
)
def test_configurations_that_cannot_work_are_refused(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind.config_class.from_json(changes)


def test_an_asymmetric_decoder_whose_widths_do_not_double_is_refused_by_name() -> None:
    widths = {"up_block_out_channels": (32, 96, 128), "down_block_out_channels": (32, 32, 32)}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    with pytest.raises(ValueError, match="96 channels at .* widths must double up to the last one"):
        AsymmetricAutoencoderKL(AsymmetricAutoencoderKL.config_class(**widths, **blocks)).shapes()


def test_pipelines_take_a_tiny_autoencoder(tmp_path: Path, rng: np.random.Generator) -> None:
    """Text to image and image to image; there is no noise in its latents, so only the run's noise is shared."""
    plain = folders.stable_diffusion(tmp_path / "plain")
    config = {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    tiny = twins.randomise(diffusers.AutoencoderTiny(**config, **blocks, scaling_factor=0.7))
    off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(plain, vae=tiny, **off)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "model")
    ours = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    latents = rng.standard_normal((2, 16, 16, 4)).astype(np.float32)
    request: dict[str, Any] = {"prompt": ["a cat", "two dogs!"], "num_inference_steps": 4, "output_type": "np"}
    with torch.no_grad():
        expected = theirs(latents=channel_first(latents), **request).images
    require_same(ours, ours(latents=latents, **request).images, expected)

    image = rng.uniform(0, 1, (1, 32, 32, 3)).astype(np.float32)
    request |= {"prompt": "a cat", "strength": 0.6}
    painter = StableDiffusionImg2ImgPipeline.from_pipe(ours)
    found = painter(image=image, latents=latents[:1], **request).images
    again = diffusers.StableDiffusionImg2ImgPipeline(**theirs.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.randn_tensor"
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, lambda *args, **kwargs: channel_first(latents[:1]))
        expected = again(image=channel_first(image), **request).images
    require_same(painter, found, expected)

    ours.save_pretrained(tmp_path / "again")
    assert type(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "again", **off).vae) is type(tiny)


# The real weights of FLUX.2's tiny autoencoder, in the original layout.


class Reference(torch.nn.Module):
    """The original network, built from the names of its tensors; it maps images in [0, 1]."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        super().__init__()
        self.tensors = {key: value.float() for key, value in tensors.items()}

    def conv(self, x: Any, name: str, stride: int = 1) -> Any:
        weight = self.tensors[f"{name}.weight"]
        bias = self.tensors.get(f"{name}.bias")
        return torch.nn.functional.conv2d(x, weight, bias, stride=stride, padding=weight.shape[2] // 2)

    def block(self, x: Any, name: str) -> Any:
        if f"{name}.pool.0.weight" in self.tensors:
            weight, bias = (self.tensors[f"{name}.pool.1.{part}"] for part in ("weight", "bias"))
            h = torch.nn.functional.group_norm(self.conv(x, f"{name}.pool.0"), 4, weight, bias)
            x = x + self.conv(h.relu(), f"{name}.pool.3")
        h = self.conv(self.conv(x, f"{name}.conv.0").relu(), f"{name}.conv.2").relu()
        return (self.conv(h, f"{name}.conv.4") + x).relu()

    def forward(self, x: Any, decoder: bool) -> Any:
        x = torch.tanh(x / 3) * 3 if decoder else x
        for index in sorted({int(key.split(".")[0]) for key in self.tensors}):
            if f"{index}.conv.0.weight" in self.tensors:
                x = self.block(x, str(index))
                continue
            strided = f"{index}.bias" not in self.tensors  # such convolutions change the resolution
            if decoder and strided:
                x = torch.nn.functional.interpolate(x, scale_factor=2)
            x = self.conv(x, str(index), stride=2 if strided and not decoder else 1)
            x = x.relu() if decoder and index == 1 else x
        return x


def test_the_real_weights_of_flux_2(shared_data: Path) -> None:
    files = {half: shared_data / f"taef2_{half}.pth" for half in ("encoder", "decoder")}
    if not all(file.is_file() for file in files.values()):
        pytest.skip(f"no taef2_encoder.pth and taef2_decoder.pth in {shared_data}")
    tensors = {}
    for half, file in files.items():
        first = half == "decoder"  # its list begins with a layer that diffusers has outside of it
        for key, tensor in read_checkpoint([file]).tensors.items():
            index, _, rest = key.partition(".")
            tensors[f"{half}.layers.{int(index) - first}.{rest}"] = tensor
    model = AutoencoderTiny(presets.TINY_FLUX2_VAE)
    assert sum(tensor.size for tensor in tensors.values()) == 2_677_027
    checkpoint = Checkpoint(tensors, dict.fromkeys(tensors, shared_data))
    params = place(match(checkpoint, model.shapes(), label="TAEF2"), dtype="float32")
    images = np.load(shared_data / "emoji64.npz")["images"][[0, 700, 4000]].astype(np.float32) / 127.5 - 1
    latents = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))(params, images).latents
    pixels = jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))(params, latents)
    encoder, decoder = (Reference(torch.load(file, weights_only=True)) for file in files.values())
    with torch.no_grad():
        expected = encoder(channel_first((images + 1) / 2), decoder=False)
        restored = decoder(expected, decoder=True)
    assert difference(latents, channel_last(expected)) <= TOLERANCE
    assert difference(pixels, channel_last(restored) * 2 - 1) <= TOLERANCE
    error = np.mean((np.clip(pixels, -1, 1) - images) ** 2, axis=(1, 2, 3))
    assert (10 * np.log10(4 / error)).min() > 18, "decibels of signal over noise: the images are there again"


def test_a_panorama_may_have_a_known_part() -> None:
    """The known part is continued past the seam as the latents are."""
    model = AsymmetricAutoencoderKL(AsymmetricAutoencoderKL.config_class(**twins.ASYMMETRICS["widths double"]))
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, "float32")
    known = (shape(1, 32, 32, 3), shape(1, 32, 32, 1))
    decode = lambda p, z, known: decode_latents(Net("vae", model), {"vae": p}, z, wrap=2, known=known)
    assert jax.eval_shape(decode, model.shapes(), shape(1, 8, 8, 4), known).shape == (1, 32, 32, 3)
