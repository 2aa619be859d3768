"""Inversion and DiffEdit, against PyTorch diffusers with its own noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax import pipelines, schedulers
from diffuse_jax.pipelines import DiffusionPipeline, modifiers
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.sharding import make_mesh
from tests.oracle.agreement import require_same

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
torch, diffusers = folders.torch, folders.diffusers

EDGE, SEEDS = 32, [3, 4]
PROMPTS = ["a cat", "two dogs!"]
INVERSE = {"ddim": "DDIMInverseScheduler", "dpm": "DPMSolverMultistepInverseScheduler"}


@pytest.fixture(scope="module")
def images() -> list[Any]:
    return folders.images(2, EDGE)


@pytest.fixture(scope="module")
def diffedit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of DiffEdit, with a sampler for each direction."""
    plain = folders.stable_diffusion(tmp_path_factory.mktemp("diffedit") / "plain")
    down = diffusers.DDIMScheduler(**folders.SD_SCHEDULER)
    up = diffusers.DDIMInverseScheduler.from_config(down.config)
    parts = {"scheduler": down, "inverse_scheduler": up, "safety_checker": None, "feature_extractor": None}
    pipe = diffusers.StableDiffusionDiffEditPipeline.from_pretrained(plain, **parts)
    pipe.save_pretrained(plain.with_name("model"))
    return plain.with_name("model")


@pytest.fixture(scope="module")
def twin(diffedit: Path) -> Any:
    pipe = diffusers.StableDiffusionDiffEditPipeline.from_pretrained(diffedit, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_inverse(pipe: Any, twin: Any, kind: str) -> Any:
    """Both pipelines with another sampler from images to noise; ours is returned."""
    config = {name: value for name, value in twin.scheduler.config.items() if name != "clip_sample"}
    twin.inverse_scheduler = getattr(diffusers, INVERSE[kind]).from_config(config, clip_sample=False)
    inverse = getattr(schedulers, INVERSE[kind]).from_config(pipe.scheduler)
    return pipe.replace(inverse_scheduler=inverse) if "inverse_scheduler" in pipe.components else pipe, inverse


def generators(seeds: list[int] = SEEDS) -> list[Any]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def channel_last(latents: Any) -> np.ndarray:
    """``[..., c, h, w]`` of PyTorch as ours."""
    return np.moveaxis(latents.numpy(), -3, -1)


# The verb of every pipeline


@pytest.mark.parametrize("kind", INVERSE)
def test_inversion(kind: str, diffedit: Path, twin: Any, images: list[Any]) -> None:
    """The same trajectory as PyTorch's, with guidance and without; numbers are data."""
    plain = pipelines.StableDiffusionPipeline.from_pretrained(diffedit).replace(programs=Programs())
    _, inverse = with_inverse(plain, twin, kind)
    for scale, steps, strength in ((1.0, 4, 1.0), (3.0, 4, 1.0), (2.0, 6, 0.7)):
        request = {"num_inference_steps": steps, "guidance_scale": scale, "negative_prompt": ["bad", ""]}
        wanted = twin.invert(
            image=images, prompt=PROMPTS, inpaint_strength=strength, generator=generators(), **request
        ).latents
        ours = {"scheduler": inverse, "strength": strength, "seed": SEEDS, "noise": "torch", **request}
        found = plain.invert(images, PROMPTS, **ours).latents
        np.testing.assert_allclose(found, channel_last(wanted[:, 0]), atol=2e-4)
    assert plain.programs.compilations == 2, "with guidance and without"
    whole = plain.invert(images, PROMPTS, return_trajectory=True, **ours).trajectory
    np.testing.assert_allclose(whole[:, :0:-1], channel_last(wanted), atol=2e-4)


def test_inversion_with_sdxl(tmp_path: Path, images: list[Any]) -> None:
    folder = folders.stable_diffusion_xl(tmp_path / "xl")
    pipe = pipelines.StableDiffusionXLPipeline.from_pretrained(folder)
    twin = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    inverse = diffusers.DDIMInverseScheduler.from_config(twin.scheduler.config, clip_sample=False)
    inverse.set_timesteps(5)
    states, _, pooled, _ = twin.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[EDGE, EDGE, 0, 0, EDGE, EDGE]] * 2)}
    rng = np.random.default_rng(0)
    start = rng.standard_normal((2, EDGE // 2, EDGE // 2, 4)).astype(np.float32)
    latents = torch.tensor(start.transpose(0, 3, 1, 2))
    with torch.no_grad():
        for t in inverse.timesteps:
            output = twin.unet(latents, t, states, added_cond_kwargs=added).sample
            latents = inverse.step(output, t, latents).prev_sample
    found = pipe.invert(start, PROMPTS, num_inference_steps=5).latents
    np.testing.assert_allclose(found, channel_last(latents), atol=2e-4)


@pytest.mark.slow
def test_an_inverted_image_comes_back(diffedit: Path, rng: np.random.Generator) -> None:
    """Up to the error of the discretisation, which falls with the number of steps; with modifiers and on a mesh too.
    The random network's predictions are made smaller, because they change more from step to step than those of a
    trained one."""
    pipe = pipelines.StableDiffusionPipeline.from_pretrained(diffedit)
    last = jax.tree.map(lambda x: 0.1 * x, pipe.params["unet"]["conv_out"])
    pipe = pipe.replace(unet=(pipe.components["unet"], pipe.params["unet"] | {"conv_out": last}))
    start = rng.standard_normal((2, EDGE // 2, EDGE // 2, 4)).astype(np.float32)

    def error(steps: int, **given: Any) -> float:
        request = {"num_inference_steps": steps} | given
        latents = pipe.invert(start, PROMPTS, **request).latents
        back = pipe(PROMPTS, latents=latents, output_type="latent", **{"guidance_scale": 1.0} | request).images
        return float(np.abs(back - start).mean())

    coarse = error(5)
    assert error(40) < 0.5 * coarse
    assert error(40, modifiers=modifiers.FreeU(), guidance_scale=1.5) < coarse
    sharded = pipe.replace(mesh=make_mesh(data=2, devices=jax.devices()[:2]))
    one, other = (p.invert(start, PROMPTS, num_inference_steps=4).latents for p in (pipe, sharded))
    np.testing.assert_allclose(one, np.asarray(other), atol=1e-4)


def test_what_cannot_be_inverted(diffedit: Path, images: list[Any], tmp_path: Path) -> None:
    pipe = pipelines.StableDiffusionPipeline.from_pretrained(diffedit)
    with pytest.raises(ValueError, match="give image: a PIL image"):
        pipe.invert(None, "a")
    with pytest.raises(TypeError, match="an inversion takes no output_type: the result is latents"):
        pipe.invert(images, PROMPTS, output_type="np")
    with pytest.raises(TypeError, match="an inversion takes no latents: the run starts from image"):
        pipe.invert(images, PROMPTS, latents=np.zeros((2, 16, 16, 4)))
    with pytest.raises(ValueError, match="DDIMScheduler does not run from an image to noise; give a DDIMInverse"):
        pipe.invert(images, PROMPTS, scheduler=pipe.scheduler)
    with pytest.raises(ValueError, match="strength must lie in"):
        pipe.invert(images, PROMPTS, strength=0)
    with pytest.raises(ValueError, match="no option eta"):
        pipe.invert(images, PROMPTS, eta=0.5)
    flow = pipe.replace(scheduler=schedulers.FlowMatchEulerDiscreteScheduler(), inverse_scheduler=None)
    with pytest.raises(ValueError, match="has no schedule of betas to invert; give scheduler="):
        flow.invert(images, PROMPTS)
    with pytest.raises(TypeError, match="progress_bar control how a request is run"):
        pipe.request(images, PROMPTS, compose=pipelines.inversion.invert, progress_bar=True)


# DiffEdit


def test_diffedit(diffedit: Path, twin: Any, images: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask, inversion and call, one after the other; every number but the number of noise maps is data.

    PyTorch's ``generate_mask`` takes the prompts' embeddings for the negative ones' and the other way round. The masks
    are the same as long as both negative prompts are, and it cannot do without guidance; else we turn them back.
    """
    pipe = DiffusionPipeline.from_pretrained(diffedit).replace(programs=Programs())
    assert type(pipe) is pipelines.StableDiffusionDiffEditPipeline
    with_inverse(pipe, twin, "ddim")
    maps = 3
    encode = twin.encode_prompt
    for scale, ratio, strength, steps, negative in ((7.5, 3.0, 0.5, 4, None), (3.0, 1.5, 0.8, 5, "bad")):
        more = {"guidance_scale": scale, "mask_thresholding_ratio": ratio, "mask_encode_strength": strength}
        more |= {"num_inference_steps": steps, "num_maps_per_mask": maps, "target_negative_prompt": negative}
        if negative:
            monkeypatch.setattr(twin, "encode_prompt", lambda *args, **given: encode(*args, **given)[::-1])
        prompts = {"target_prompt": "two dogs!", "source_prompt": "a cat"}
        seeds = [5, 6, 7]
        wanted = twin.generate_mask(images[0], generator=generators(seeds), **prompts, **more)
        found = pipe.generate_mask(images[0], seed=seeds, noise="torch", **prompts, **more)
        assert 0.01 < wanted.mean() < 0.99
        assert (found != wanted).mean() < 0.01
    assert pipe.programs.compilations == 1
    pil = pipe.generate_mask(images[0], seed=seeds, noise="torch", output_type="pil", **prompts, **more)
    np.testing.assert_array_equal(np.asarray(pil[0]) / 255, found[0])
    alone = {"guidance_scale": 1.0, "num_inference_steps": 4, "num_maps_per_mask": maps}
    wanted = twin.generate_mask(images[0], generator=generators(seeds), **prompts, **alone)
    assert (pipe.generate_mask(images[0], seed=seeds, noise="torch", **prompts, **alone) != wanted).mean() < 0.01

    monkeypatch.setattr(twin, "encode_prompt", encode)

    mask = np.stack([found[0], 1 - found[0]])
    request = {"num_inference_steps": 5, "inpaint_strength": 0.7, "guidance_scale": 3.0}
    wanted = twin.invert(PROMPTS, images, generator=generators(), decode_latents=True, **request)
    ours = pipe.invert(PROMPTS, images, seed=SEEDS, noise="torch", decode_latents=True, **request)
    np.testing.assert_allclose(ours.latents, channel_last(wanted.latents), atol=2e-4)
    assert len(ours.images) == len(wanted.images) == 6
    far = [np.abs(np.asarray(a, float) - np.asarray(b)).mean() for a, b in zip(ours.images, wanted.images, strict=True)]
    assert max(far) < 0.02 * 255 / 100
    call = {"prompt": ["a dog", "red cats"], "negative_prompt": ["bad", ""], **request}
    with torch.no_grad():
        images_there = twin(
            mask_image=torch.tensor(mask), image_latents=wanted.latents, output_type="np", **call
        ).images
    before = pipe.programs.compilations
    images_here = pipe(mask_image=mask, image_latents=ours.latents, output_type="np", **call).images
    require_same(pipe, images_here, images_there)
    more_steps = request | {"num_inference_steps": 4, "inpaint_strength": 1.0, "guidance_scale": 4.0}
    again = pipe.invert(PROMPTS, images, seed=SEEDS, noise="torch", **more_steps).latents
    pipe(mask_image=1 - mask, image_latents=again, output_type="np", **call | more_steps)
    assert pipe.programs.compilations == before + 1
    each = [ours.latents[:1], ours.latents[1:]]
    whole = pipe(mask_image=mask, image_latents=each, num_images_per_prompt=2, output_type="np", **call)
    np.testing.assert_allclose(whole.images[::2], images_here, atol=1e-4)


@pytest.mark.parametrize("prediction", [pytest.param("epsilon", marks=pytest.mark.slow), "v_prediction"])
def test_regularised_inversion(
    prediction: str, diffedit: Path, twin: Any, images: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same shifts on both sides, for a single image: PyTorch takes the variance of the whole batch, and for
    v-prediction with guidance that of both of its branches."""
    from diffuse_jax.pipelines.parts import regularised

    pipe = DiffusionPipeline.from_pretrained(diffedit).replace(programs=Programs())
    inverse = pipe.components["inverse_scheduler"].replace(prediction_type=prediction, clip_sample=False)
    pipe = pipe.replace(inverse_scheduler=inverse)
    twin.inverse_scheduler = diffusers.DDIMInverseScheduler.from_config(
        twin.scheduler.config, prediction_type=prediction, clip_sample=False
    )
    monkeypatch.setattr(torch, "randint", lambda n, size, generator=None: torch.tensor([min(3, n - 1)]))
    constant = lambda key, height, channels: np.full(channels, min(3, height // 2 - 1))
    monkeypatch.setattr(regularised, "random_shifts", constant)
    scale = 2.0 if prediction == "epsilon" else 1.0
    request = {"num_inference_steps": 3, "guidance_scale": scale, "inpaint_strength": 1.0}
    plain = pipe.invert("a cat", images[0], seed=3, noise="torch", **request).latents
    numbers = [(20.0, 20.0, 2, 3), (0.0, 30.0, 1, 5), (300.0, 0.0, 1, 2)]
    for auto_corr, kl, steps, rolls in numbers:
        given = {"lambda_auto_corr": auto_corr, "lambda_kl": kl, "num_reg_steps": steps, "num_auto_corr_rolls": rolls}
        wanted = twin.invert("a cat", images[0], generator=generators([3])[0], **request, **given).latents
        with pytest.warns(UserWarning, match=rf'noise="torch" with num_reg_steps={steps}: the regularisation draws'):
            found = pipe.invert("a cat", images[0], seed=3, noise="torch", **request, **given).latents
        np.testing.assert_allclose(found, channel_last(wanted), atol=1e-3)
        assert np.abs(found - plain).mean() > 1e-3
    assert pipe.programs.compilations == 6, "begin, advance and finish, plain and regularised"


def test_shifts_are_random_and_an_image_s_own(diffedit: Path, images: list[Any]) -> None:
    pipe = DiffusionPipeline.from_pretrained(diffedit)
    request = {"num_inference_steps": 2, "num_reg_steps": 1, "lambda_auto_corr": 300.0, "guidance_scale": 1.0}
    both = pipe.invert(PROMPTS, images, seed=[1, 2], **request).latents
    alone = pipe.invert(PROMPTS[1], images[1], seed=2, **request).latents
    np.testing.assert_allclose(both[1:], alone, atol=1e-4)


def test_what_diffedit_refuses(diffedit: Path, images: list[Any]) -> None:
    pipe = DiffusionPipeline.from_pretrained(diffedit)
    prompts = {"target_prompt": "a", "source_prompt": "b"}
    for given, message in (
        (prompts | {"image": None}, "give image: a PIL image"),
        (prompts | {"source_prompt": None}, "give either source_prompt or source_prompt_embeds"),
        (prompts | {"source_prompt": ["a", "b"]}, "there are 1 target prompts and 2 source prompts"),
        (prompts | {"num_maps_per_mask": 0}, "num_maps_per_mask must be at least 1, got 0"),
        (prompts | {"mask_thresholding_ratio": 0}, "mask_thresholding_ratio must be positive, got 0"),
        (prompts | {"mask_encode_strength": 2}, "strength must lie in"),
        (prompts | {"output_type": "latent"}, 'output_type must be "np" or "pil"'),
        (prompts | {"source_negative_prompt": ["a", "b"]}, "source_negative_prompt has 2 entries for 1 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.generate_mask(**{"image": images[0]} | given)
    with pytest.raises(ValueError, match="num_reg_steps must be at least 0, got -1"):
        pipe.invert("a", images[0], num_reg_steps=-1)
    mask, latents = np.ones((1, 16, 16), np.float32), np.zeros((1, 4, 16, 16, 4), np.float32)
    request: dict[str, Any] = {"num_inference_steps": 5, "mask_image": mask, "image_latents": latents}
    for given, message in (
        ({"mask_image": None}, "give mask_image: generate_mask finds one"),
        ({"image_latents": None}, "give image_latents: the latents that invert finds"),
        ({"image_latents": latents[:, :3]}, r"must have 4 samples for each of 1 prompts, got \(1, 3\)"),
        ({"image_latents": latents[..., :3]}, r"image_latents must be \[prompts,steps,h,w,4\]"),
        ({"mask_image": images[0]}, "mask_image must have the size of the latents, 16x16, .* got 32x32"),
        ({"mask_image": mask * 2}, "floating-point in"),
        ({"inpaint_strength": 0}, "strength must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("a", **request | given)
    with pytest.raises(ValueError, match="image_latents as a list must have arrays of one shape"):
        pipe("a", **request | {"image_latents": [latents[0], latents[0, :, :8]]})
    with pytest.raises(TypeError, match="image_latents must be an array of numbers, got 'x'"):
        pipe("a", **request | {"image_latents": "x"})
    with pytest.raises(TypeError, match="DiffEdit takes no latents"):
        pipe("a", latents=latents[:, 0], **request)
