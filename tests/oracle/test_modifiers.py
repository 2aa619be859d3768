"""Guidance beyond classifier-free, FreeU, windows and kept features, against PyTorch diffusers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffuse_jax import pipelines, schedulers
from diffuse_jax.pipelines import modifiers
from diffuse_jax.pipelines.method import Kept, Step
from diffuse_jax.pipelines.parts import combine
from diffuse_jax.pipelines.parts.guidance import rescaled
from diffuse_jax.pipelines.programs import Programs
from tests.oracle import folders
from tests.oracle.agreement import require_same

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPTS, EDGE = ["ab cd", "ef"], 32
REQUEST = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": ["bad", ""]}


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.stable_diffusion(tmp_path_factory.mktemp("sd1") / "model")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.stable_diffusion_xl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    yield
    opened.cache_clear()


Compare = Callable[..., Any]


@pytest.fixture
def compare(rng: np.random.Generator) -> Compare:
    """Our images with modifiers and PyTorch's agree, and the modifiers matter."""

    def check(pipe: Any, twin: Any, given: Any, height: int = EDGE, width: int = EDGE, **request: Any) -> None:
        theirs = {name.removeprefix("_"): value for name, value in request.items()}
        ours = {name: value for name, value in request.items() if not name.startswith("_")}
        size = {"height": height, "width": width}
        prompts = theirs.pop("prompt", PROMPTS)
        ours.pop("prompt", None)
        noise = rng.standard_normal((len(prompts), height // 2, width // 2, 4)).astype(np.float32)
        twin.set_progress_bar_config(disable=True)
        with torch.no_grad():
            latents = torch.tensor(noise.transpose(0, 3, 1, 2))
            wanted = twin(prompt=prompts, latents=latents, output_type="np", **size, **theirs).images
        found = pipe(prompts, latents=noise, output_type="np", modifiers=given, **size, **ours).images
        plain = pipe(prompts, latents=noise, output_type="np", **size, **ours).images
        assert 255 * np.abs(found - plain).mean() > 0.3, "a modifier that changes nothing proves nothing"
        require_same(pipe, found, wanted)

    return check


@functools.cache
def opened(name: str, folder: Path) -> Any:
    """One pipeline for all tests, so that its runs without a modifier are compiled once."""
    return getattr(pipelines, name).from_pretrained(folder).replace(programs=Programs())


def twin_of(name: str, folder: Path, **options: Any) -> Any:
    return getattr(diffusers, name).from_pretrained(folder, safety_checker=None, **options)


def with_ddim(pipe: Any, twin: Any) -> tuple[Any, Any]:
    """DDIM without clipping, which diffusers' pipelines for these methods leave out of their own computations."""
    twin.scheduler = diffusers.DDIMScheduler.from_config(twin.scheduler.config, clip_sample=False)
    return pipe.replace(scheduler=schedulers.DDIMScheduler.from_config(pipe.scheduler, clip_sample=False)), twin


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_perturbed_attention(family: str, request: pytest.FixtureRequest, compare: Compare) -> None:
    folder, kind = request.getfixturevalue(family), "XL" if family == "sdxl" else ""
    pipe = opened(f"StableDiffusion{kind}Pipeline", folder)
    twin = twin_of(f"StableDiffusion{kind}PAGPipeline", folder, pag_applied_layers=["mid"])
    given = modifiers.PerturbedAttention(2.0)
    compare(pipe, twin, given, _pag_scale=2.0, **REQUEST)
    before = pipe.programs.compilations
    compare(
        pipe,
        twin,
        modifiers.PerturbedAttention(1.5, adaptive=0.001),
        **REQUEST,
        _pag_scale=1.5,
        _pag_adaptive_scale=0.001,
    )
    assert pipe.programs.compilations == before, "scales are data"
    rescaled = REQUEST | {"guidance_rescale": 0.7}
    compare(pipe, twin, given, _pag_scale=2.0, **rescaled)


def test_perturbed_attention_of_named_layers_without_guidance(sd1: Path, compare: Compare) -> None:
    pipe = opened("StableDiffusionPipeline", sd1)
    layers = ["down_blocks.0", "up_blocks.1.attentions.1"]
    twin = twin_of("StableDiffusionPAGPipeline", sd1, pag_applied_layers=layers)
    given = modifiers.PerturbedAttention(2.0, layers=layers)
    compare(pipe, twin, given, num_inference_steps=3, guidance_scale=1.0, _pag_scale=2.0)
    with pytest.raises(ValueError, match=r"no self-attention in 'up_blocks.0'; it has down_blocks.0.attentions.0"):
        pipe("a", modifiers=modifiers.PerturbedAttention(2.0, layers="up_blocks.0"))


@pytest.mark.parametrize(
    "scale", [pytest.param(5.0, id="guided"), pytest.param(1.0, id="alone", marks=pytest.mark.slow)]
)
def test_self_attention_guidance(sd1: Path, scale: float, compare: Compare) -> None:
    pipe, twin = opened("StableDiffusionPipeline", sd1), twin_of("StableDiffusionSAGPipeline", sd1)
    pipe, twin = with_ddim(pipe, twin)
    request = {"num_inference_steps": 4, "guidance_scale": scale}
    compare(pipe, twin, modifiers.SelfAttentionGuidance(1.5), _sag_scale=1.5, **request)


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_freeu(family: str, request: pytest.FixtureRequest, compare: Compare) -> None:
    kind = "XL" if family == "sdxl" else ""
    pipe, twin = (f(f"StableDiffusion{kind}Pipeline", request.getfixturevalue(family)) for f in (opened, twin_of))
    compiled = []
    for values in ({"s1": 0.6, "s2": 0.4, "b1": 1.1, "b2": 1.3}, {"s1": 0.9, "s2": 0.2, "b1": 1.5, "b2": 1.6}):
        twin.enable_freeu(**values)
        compare(pipe, twin, modifiers.FreeU(**values), **REQUEST)
        compiled.append(pipe.programs.compilations)
    assert compiled[0] == compiled[1], "the factors are data"


@pytest.mark.parametrize(
    ("batch", "circular"),
    [
        pytest.param(1, False, id="1-flat"),
        pytest.param(3, True, id="3-circular"),
        pytest.param(1, True, id="1-circular", marks=pytest.mark.slow),
        pytest.param(3, False, id="3-flat", marks=pytest.mark.slow),
    ],
)
def test_windows(
    sd1: Path, circular: bool, batch: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch takes 64 latents for a window and eight pixels for a latent; the tiny autoencoder has two. It cannot go
    round with windows above each other."""
    pipe, twin = opened("StableDiffusionPipeline", sd1), twin_of("StableDiffusionPanoramaPipeline", sd1)
    pipe, twin = with_ddim(pipe, twin)
    views = type(twin).get_views
    monkeypatch.setattr(
        type(twin), "get_views", lambda self, h, w, **kw: views(self, h * 4, w * 4, window_size=16, stride=8, **kw)
    )
    height = 32 if circular else 48
    noise = rng.standard_normal((1, height // 2, 40, 4)).astype(np.float32)
    request = {"height": height, "width": 80, "num_inference_steps": 3, "guidance_scale": 4.0}
    with torch.no_grad():
        latents = torch.tensor(noise.transpose(0, 3, 1, 2))
        wanted = twin("ab", latents=latents, circular_padding=circular, output_type="latent", **request).images
    given = modifiers.Windows(16, 8, batch, circular)
    found = pipe("ab", latents=noise, modifiers=given, output_type="latent", **request).images
    np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1), atol=2e-4)


def test_deep_features_are_kept(sd1: Path, rng: np.random.Generator) -> None:
    """PyTorch: the first channels of what the last residual block takes are put back in, two evaluations of three."""
    pipe, twin = (f("StableDiffusionPipeline", sd1) for f in (opened, twin_of))
    calls, kept = [0], [None]

    def put_back(module: Any, args: Any) -> Any:
        x, *others = args
        if calls[0] % 3 == 0:
            kept[0] = x[:, :32]
        calls[0] += 1
        return (torch.cat([kept[0], x[:, 32:]], 1), *others)

    twin.unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(put_back)
    noise = rng.standard_normal((2, 16, 16, 4)).astype(np.float32)
    request = REQUEST | {"num_inference_steps": 7}
    with torch.no_grad():
        latents = torch.tensor(noise.transpose(0, 3, 1, 2))
        wanted = twin(PROMPTS, latents=latents, output_type="latent", **request).images
    found = pipe(PROMPTS, latents=noise, output_type="latent", modifiers=modifiers.DeepCache(3), **request).images
    plain = pipe(PROMPTS, latents=noise, output_type="latent", **request).images
    assert np.abs(found - plain).mean() > 0.01
    np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1), atol=1e-3)
    every = pipe(PROMPTS, latents=noise, output_type="latent", modifiers=modifiers.DeepCache(1, skips=3), **request)
    np.testing.assert_allclose(every.images, plain, atol=1e-4)


# The ways to combine predictions, against diffusers' guiders


def guided(how: Any, rows: dict[str, Any], outputs: list[np.ndarray]) -> list[jax.Array]:
    """Our combination at consecutive evaluations."""
    kept, found = Kept(), []
    for i, output in enumerate(outputs):
        found.append(how(rows, Step(i, jnp.float32(0), None, kept), jnp.asarray(output)))  # type: ignore[arg-type]
    return found


def by_guider(guider: Any, outputs: list[np.ndarray]) -> list[np.ndarray]:
    found = []
    for i, output in enumerate(outputs):
        negative, positive = (torch.tensor(y.transpose(0, 3, 1, 2)) for y in output)
        guider.set_state(i, len(outputs), torch.tensor(0))
        if i == 0:
            guider.momentum_buffer = getattr(guider, "_fresh", lambda: None)()
        found.append(guider.forward(positive, negative).pred.permute(0, 2, 3, 1).numpy())
    return found


@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize("momentum", [None, -0.5])
def test_adaptive_projected(threshold: float, momentum: float | None, rng: np.random.Generator) -> None:
    from diffusers.guiders import AdaptiveProjectedGuidance
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

    outputs = [rng.standard_normal((2, 3, 4, 5, 4)).astype(np.float32) for _ in range(3)]
    guider = AdaptiveProjectedGuidance(4.0, momentum, threshold, eta=0.3)
    if momentum is not None:
        guider._fresh = lambda: MomentumBuffer(momentum)
    rows = {"guidance_scale": jnp.full(3, 4.0), "apg": jnp.tile(jnp.array([momentum or 0.0, threshold, 0.3]), (3, 1))}
    for ours, wanted in zip(
        guided(combine.AdaptiveProjected(), rows, outputs), by_guider(guider, outputs), strict=True
    ):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_zero_star(rng: np.random.Generator) -> None:
    from diffusers.guiders import ClassifierFreeZeroStarGuidance

    outputs = [rng.standard_normal((2, 3, 4, 5, 4)).astype(np.float32) for _ in range(3)]
    guider = ClassifierFreeZeroStarGuidance(4.0, zero_init_steps=1)
    rows = {"guidance_scale": jnp.full(3, 4.0), "zero_steps": jnp.full(3, 1)}
    ours, wanted = guided(combine.ZeroStar(), rows, outputs), by_guider(guider, outputs)
    assert not np.any(ours[0])
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_rescaled_as_by_pytorch(rng: np.random.Generator) -> None:
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    a, b = rng.standard_normal((2, 3, 4, 5, 4)).astype(np.float32)
    wanted = rescale_noise_cfg(torch.tensor(a), torch.tensor(b), 0.7)
    ours = rescaled(jnp.asarray(a), jnp.asarray(b), jnp.full((3, 1, 1, 1), 0.7))
    np.testing.assert_allclose(ours, wanted, rtol=1e-2)  # PyTorch's deviation has n - 1 below


def test_intervals_and_schedules_as_a_guider(rng: np.random.Generator, sd1: Path) -> None:
    """Guidance from the second to the third of four evaluations, then a scale for each."""
    pipe, _ = with_ddim(opened("StableDiffusionPipeline", sd1), twin_of("StableDiffusionPipeline", sd1))
    noise = rng.standard_normal((2, 16, 16, 4)).astype(np.float32)

    def run(*given: Any, **more: Any) -> Any:
        return pipe(PROMPTS, latents=noise, output_type="latent", modifiers=given, **REQUEST | more).images

    inside = run(modifiers.GuidanceInterval(0.25, 0.75))
    compiled = pipe.programs.compilations
    by_hand = run(modifiers.GuidanceSchedule([1.0, 5.0, 5.0, 1.0]))
    np.testing.assert_array_equal(inside, by_hand)
    assert pipe.programs.compilations == compiled
    constant = run(modifiers.GuidanceSchedule(lambda share: 5.0))
    np.testing.assert_array_equal(constant, run(modifiers.GuidanceSchedule([5.0] * 4)))
    np.testing.assert_allclose(constant, run(), atol=1e-5)
    with pytest.raises(ValueError, match="for each of 4 evaluations, got 3"):
        run(modifiers.GuidanceSchedule([1.0] * 3))
    with pytest.raises(ValueError, match="GuidanceInterval changes classifier-free guidance; give a guidance_scale"):
        run(modifiers.GuidanceInterval(0.2), guidance_scale=1.0)


# Further branches, against the formulas in PyTorch


class InPyTorch:
    """DDIM with any combination of a UNet's predictions for several prompts."""

    def __init__(self, folder: Path) -> None:
        self.twin = twin_of("StableDiffusionPipeline", folder)
        self.twin.scheduler = diffusers.DDIMScheduler.from_config(self.twin.scheduler.config, clip_sample=False)

    def __call__(self, prompts: list[str], combine: Callable[..., Any], noise: np.ndarray, steps: int) -> np.ndarray:
        states = [self.twin.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts]
        latents, scheduler = torch.tensor(noise.transpose(0, 3, 1, 2)), self.twin.scheduler
        scheduler.set_timesteps(steps)
        with torch.no_grad():
            for t in scheduler.timesteps:
                output = combine(*(self.twin.unet(latents, t, state).sample for state in states))
                latents = scheduler.step(output, t, latents).prev_sample
        return latents.permute(0, 2, 3, 1).numpy()


def test_perp_neg(sd1: Path, rng: np.random.Generator) -> None:
    def combine(empty: Any, negative: Any, positive: Any) -> Any:
        a, b = positive - empty, negative - empty
        return empty + 4.0 * (a - 0.7 * (b - (a * b).sum() / (a * a).sum() * a))

    noise = rng.standard_normal((1, 16, 16, 4)).astype(np.float32)
    wanted = InPyTorch(sd1)(["", "bad", "ab"], combine, noise, 3)
    pipe, _ = with_ddim(opened("StableDiffusionPipeline", sd1), twin_of("StableDiffusionPipeline", sd1))
    request = {"negative_prompt": "bad", "guidance_scale": 4.0, "num_inference_steps": 3, "output_type": "latent"}
    found = pipe("ab", latents=noise, modifiers=modifiers.PerpNeg(0.7), **request).images
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(found - pipe("ab", latents=noise, **request).images).mean() > 0.01


def test_a_prompt_for_each_region(sd1: Path, rng: np.random.Generator) -> None:
    masks = np.zeros((2, 32, 32), np.float32)
    masks[0, :16, :16] = masks[1, 8:, 20:] = 1
    at_latents = [torch.tensor(mask[::2, ::2]) for mask in masks]
    rest = 1 - at_latents[0] - at_latents[1]

    def combine(empty: Any, everywhere: Any, first: Any, second: Any) -> Any:
        positive = rest * everywhere + at_latents[0] * first + at_latents[1] * second
        return empty + 4.0 * (positive - empty)

    noise = rng.standard_normal((1, 16, 16, 4)).astype(np.float32)
    wanted = InPyTorch(sd1)(["", "ab", "cd", "xyz"], combine, noise, 3)
    pipe, _ = with_ddim(opened("StableDiffusionPipeline", sd1), twin_of("StableDiffusionPipeline", sd1))
    images = [Image.fromarray((mask * 255).astype(np.uint8)) for mask in masks]
    given = modifiers.Regions(["cd", "xyz"], images)
    request = {"guidance_scale": 4.0, "num_inference_steps": 3, "output_type": "latent"}
    found = pipe("ab", latents=noise, modifiers=given, **request).images
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    several = pipe(["ab"] * 2, seed=[1, 2], num_images_per_prompt=1, modifiers=given, **request).images
    alone = pipe("ab", seed=2, modifiers=given, **request).images
    np.testing.assert_allclose(several[1:], alone, atol=1e-4)


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_further_branches_of_every_family(family: str, request: pytest.FixtureRequest) -> None:
    """With the prompt as every further branch, nothing changes: sizes and pooled embeddings come along."""
    pipe = opened(f"StableDiffusion{'XL' if family == 'sdxl' else ''}Pipeline", request.getfixturevalue(family))
    white = np.ones((EDGE, EDGE), np.float32)
    call = {"seed": 0, "output_type": "latent"} | REQUEST | {"negative_prompt": "bad", "num_inference_steps": 2}
    plain = pipe("ab", **call).images
    np.testing.assert_allclose(
        pipe("ab", modifiers=modifiers.Regions(["ab"], [white]), **call).images, plain, atol=1e-4
    )
    pipe("ab", modifiers=[modifiers.PerpNeg(), modifiers.GuidanceInterval(0, 0.5)], **call)
    with pytest.raises(ValueError, match="give a mask for each of 2 prompts, got 1 masks"):
        pipe("ab", modifiers=modifiers.Regions(["a", "b"], [white]), **call)


def test_modifiers_combine_with_control_and_each_other(tmp_path: Path) -> None:
    """ControlNet x inpainting x perturbed attention x FreeU x adaptive projection x kept features, step by step too."""
    folder = folders.controlled(tmp_path / "model", 1)
    pipe = opened("StableDiffusionControlNetInpaintPipeline", folder)
    image, mask = np.full((EDGE, EDGE, 3), 0.5, np.float32), np.tri(EDGE, dtype=np.float32)
    call: dict[str, Any] = {"image": image, "mask_image": mask, "control_image": image, "seed": 3, "output_type": "np"}
    call |= {"height": EDGE, "width": EDGE} | REQUEST | {"negative_prompt": "bad"}
    given = [
        modifiers.PerturbedAttention(2.0),
        modifiers.FreeU(),
        modifiers.DeepCache(2),
        modifiers.AdaptiveProjected(-0.5),
        modifiers.GuidanceInterval(0.2),
    ]
    whole = pipe("ab", modifiers=given, **call).images
    steps: list[int] = []
    note = lambda pipe, i, t, values: steps.append(i)
    watched = pipe("ab", modifiers=given, callback_on_step_end=note, **call).images
    np.testing.assert_allclose(whole, watched, atol=1e-5)
    assert len(steps) > 2
    assert np.abs(whole - pipe("ab", **call).images).mean() > 1e-3
