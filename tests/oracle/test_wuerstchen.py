"""Würstchen's networks and pipelines against PyTorch diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax import AutoPipelineForText2Image, models
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.pipelines.configured import configured_pipeline
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.weights import WeightsError
from tests.oracle.agreement import require_same

wuerstchen = pytest.importorskip("tests.oracle.wuerstchen", reason="needs PyTorch diffusers and transformers")
from tests.oracle.comparisons import channel_first, channel_last  # noqa: E402

torch = wuerstchen.torch

ACCURACY = 2e-5
"""Largest difference of a network's outputs, relative to their standard deviation."""


def same(ours: Any, wanted: np.ndarray) -> None:
    assert wanted.std() > 0.1
    assert np.abs(np.asarray(ours) - wanted).max() <= ACCURACY * wanted.std()


def test_the_prior(tmp_path: Path, rng: np.random.Generator) -> None:
    module = wuerstchen.network("WuerstchenPrior", wuerstchen.PRIOR)
    module.save_pretrained(tmp_path)
    model, params = models.WuerstchenPrior.from_pretrained(tmp_path)
    x, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 5, 4), (2, 7, 32)))
    for times in (np.float32([0.3, 0.96]), np.float32([1.0, 1.0])):
        with torch.no_grad():
            wanted = channel_last(module(channel_first(x), torch.tensor(times), torch.tensor(c)))
        same(jax.jit(lambda p, t: model.apply({"params": p}, x, t, c))(params, times), wanted)


@pytest.mark.parametrize("size", [(16, 24), (24, 8)])
def test_the_decoder(size: tuple[int, int], tmp_path: Path, rng: np.random.Generator) -> None:
    """The map is enlarged for one level and made smaller for another."""
    module = wuerstchen.network("WuerstchenDiffNeXt", wuerstchen.DECODER)
    module.save_pretrained(tmp_path)
    model, params = models.WuerstchenDiffNeXt.from_pretrained(tmp_path)
    shapes = ((2, *size, 4), (2, 5, 3, 4), (2, 7, 32))
    x, effnet, c = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    times = np.float32([0.3, 0.96])
    with torch.no_grad():
        wanted = module(channel_first(x), torch.tensor(times), channel_first(effnet), torch.tensor(c))
    same(jax.jit(lambda p: model.apply({"params": p}, x, times, effnet, c))(params), channel_last(wanted))


@pytest.mark.parametrize("changes", [{}, {"levels": 3, "up_down_scale_factor": 1, "in_channels": 4}])
def test_the_autoencoder(changes: dict[str, Any], tmp_path: Path, rng: np.random.Generator) -> None:
    module = wuerstchen.vqgan(**changes)
    module.save_pretrained(tmp_path / "theirs")
    model, params = models.PaellaVQModel.from_pretrained(tmp_path / "theirs")
    images = rng.uniform(0, 1, (2, 12, 16, model.config.in_channels)).astype(np.float32)
    run = lambda name, *args, **options: model.apply({"params": params}, *args, method=name, **options)
    with torch.no_grad():
        z = module.encode(channel_first(images)).latents
        plain, quantized = (module.decode(z, force_not_quantize=keep).sample for keep in (True, False))
    latents = run("encode", images)
    same(latents, channel_last(z))
    same(run("decode", channel_last(z)), channel_last(plain))
    same(run("decode", channel_last(z), quantize=True), channel_last(quantized))
    assert np.abs(channel_last(plain - quantized)).max() > 0.1
    assert latents.shape == (2, 12 // model.config.scale, 16 // model.config.scale, 4)

    model.save_pretrained(tmp_path / "ours", params)
    again, found = type(module).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not found["missing_keys"], found
    for key, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_configurations_that_cannot_be_are_refused() -> None:
    decoder = models.WuerstchenDiffNeXtConfig.from_json(wuerstchen.DECODER)
    for config, changes, message in [
        (decoder, {"nhead": (-1, 2)}, "nhead has 2 entries for the 3 levels"),
        (decoder, {"level_config": ("CT", "CTX", "CTA")}, "unknown block 'X' in level_config; known: C, T, A"),
        (decoder, {"nhead": (-1, 3, 4)}, "16 channels cannot be split into nhead=3 heads"),
        (decoder, {"kernel_size": 2}, "kernel_size must be odd, got 2"),
        (decoder, {"c_out": 5}, "c_in and c_out must be equal, got 4 and 5"),
        (decoder, {"level_config": ("CT" * 200, "C", "C")}, "at most 192"),
        (models.WuerstchenPriorConfig(), {"nhead": 7}, "1280 channels cannot be split into nhead=7 heads"),
        (models.PaellaVQConfig(), {"embed_dim": 4, "levels": 4}, "embed_dim=4 cannot be halved for 4 levels"),
    ]:
        with pytest.raises(ValueError, match=message):
            config.replace(**changes)
    model = models.WuerstchenDiffNeXt(decoder)
    inputs = model.example_inputs() | {"sample": jax.ShapeDtypeStruct((1, 8, 12, 4), np.float32)}
    with pytest.raises(ValueError, match=r"multiples of 8, got \(8, 12\)"):
        jax.eval_shape(lambda p, i: model.apply({"params": p}, **i), model.shapes(), inputs)


PROMPTS = ["a cat", "two dogs!"]
SEEDS = [3, 4]


def opened(folder: Path) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(folder).replace(programs=Programs())


def generators(seeds: list[int] = SEEDS) -> list[Any]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_prior_pipeline(tmp_path: Path) -> None:
    twin = wuerstchen.prior_pipeline(tmp_path)
    pipe = opened(tmp_path)
    assert type(pipe).__name__ == "WuerstchenPriorPipeline"

    def compare(**request: Any) -> Any:
        with torch.no_grad():
            wanted = channel_last(twin(generator=generators(), **request).image_embeddings)
        ours = pipe(seed=SEEDS, noise="torch", **request).image_embeddings
        assert wanted.std() > 1
        assert np.abs(ours - wanted).max() <= 1e-4 * wanted.std()
        return ours

    request = {"prompt": PROMPTS, "num_inference_steps": 4, "height": 100, "width": 170, "guidance_scale": 3.0}
    assert compare(**request, negative_prompt=["bad", ""]).shape == (2, 3, 4, 4)
    compiled = pipe.programs.compilations
    compare(**request | {"guidance_scale": 8.0})
    compare(**request | {"num_inference_steps": 3})
    pipe(**request | {"num_inference_steps": 20, "guidance_scale": [1.0, 9.0]}, seed=8)
    assert pipe.programs.compilations == compiled + 1, "with noise and without"
    compare(**request | {"guidance_scale": 1.0})
    compare(**request | {"num_inference_steps": 3, "timesteps": [1.0, 0.8, 0.35, 0.0]})
    embeds = np.random.default_rng(0).standard_normal((2, 2, 16, 32)).astype(np.float32)
    names = ("prompt_embeds", "negative_prompt_embeds")
    with torch.no_grad():
        given = dict(zip(names, map(torch.tensor, embeds), strict=True))
        wanted = twin(generator=generators(), **request | {"prompt": None}, **given).image_embeddings
    given = dict(zip(names, embeds, strict=True))
    ours = pipe(seed=SEEDS, noise="torch", **request | {"prompt": None}, **given).image_embeddings
    np.testing.assert_allclose(ours, channel_last(wanted), atol=1e-4 * wanted.std().item())
    for changes, message in [
        ({"height": 0}, "height must be from 1 to 65536, got 0"),
        ({"width": 100.5}, "width must be an integer"),
        ({"prompt": None, "prompt_embeds": embeds[0, ..., :8]}, r"prompt_embeds must be floating-point \[2, L, 32\]"),
        ({"num_inference_steps": None, "sigmas": [1.0, 0.5]}, "timesteps= from 1 to 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe.request(**request | changes)
    with pytest.raises(ValueError, match="latent_mean .* must be a positive number, got 'x'"):
        pipe.replace(latent_mean="x").request(**request)


def test_the_decoder_pipeline(tmp_path: Path) -> None:
    twin = wuerstchen.decoder_pipeline(tmp_path / "theirs")
    pipe = opened(tmp_path / "theirs")
    maps = np.random.default_rng(0).standard_normal((2, 3, 2, 4)).astype(np.float32)

    def compare(**request: Any) -> None:
        """Against one call for each map: PyTorch takes a single prompt."""
        wanted = []
        for one, prompt, generator in zip(maps, PROMPTS, generators(), strict=True):
            with torch.no_grad():
                given = {"image_embeddings": channel_first(one[None]), "prompt": prompt}
                wanted.append(twin(**given, generator=generator, output_type="np", **request).images[0])
        ours = pipe(maps, PROMPTS, seed=SEEDS, noise="torch", output_type="np", **request).images
        require_same(pipe, ours, wanted)

    compare(num_inference_steps=4)
    compiled = pipe.programs.compilations
    compare(num_inference_steps=3)
    compare(timesteps=[1.0, 0.8, 0.35, 0.0])
    assert pipe.programs.compilations == compiled
    compare(num_inference_steps=4, guidance_scale=3.0, negative_prompt="bad")

    for copies in (1, 2):
        run = pipe.request([maps[:1], maps[1:]], "a cat", num_images_per_prompt=copies)
        assert (run.images, run.method.latent_shape) == (2 * copies, (24, 16, 4))
    assert pipe(maps, PROMPTS, seed=0, num_inference_steps=2).images[0].size == (16 * 4, 24 * 4)
    for given, prompt, message in [
        (None, "x", "give image_embeddings, as WuerstchenPriorPipeline returns them"),
        (maps[..., :3], "x", r"floating-point \[B,k,l,4\] \(channel-last\), got float32 \(2, 3, 2, 3\)"),
        (maps * np.nan, "x", "image_embeddings must be finite"),
        (maps, ["x"] * 3, "prompt has 3 entries for 2 image_embeddings"),
        (maps, None, "give either prompt or prompt_embeds"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe.request(given, prompt)
    with pytest.raises(ValueError, match="prompt_embeds has 1 entries for 2 image_embeddings"):
        pipe.request(maps, prompt_embeds=np.zeros((1, 16, 32), np.float32))
    with pytest.raises(ValueError, match="3x2 give latents of 15x10, and the decoder takes multiples of 4"):
        pipe.replace(latent_dim_scale=5.0).request(maps, "x")

    pipe.save_pretrained(tmp_path / "ours")
    found = wuerstchen.theirs.WuerstchenDiffNeXt.from_pretrained(tmp_path / "ours" / "decoder").state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in twin.decoder.state_dict().items())
    assert opened(tmp_path / "ours").options["latent_dim_scale"] == 8.0


@pytest.mark.slow
def test_both_stages_as_one_pipeline(tmp_path: Path) -> None:
    """PyTorch's second stage begins its noise anew too, because its generator is reset."""
    twin = wuerstchen.combined_pipeline(tmp_path / "both")
    pipe = opened(tmp_path / "both")
    assert type(pipe).__name__ == "WuerstchenCombinedPipeline"
    generator, decode = generators()[0], twin.decoder_pipe
    twin.decoder_pipe = lambda **given: decode(**given | {"generator": generator.manual_seed(SEEDS[0])})
    request = {"prompt": "a cat", "height": 100, "width": 86, "prior_num_inference_steps": 3, "num_inference_steps": 4}
    with torch.no_grad():
        wanted = twin(generator=generator, output_type="np", **request).images
    require_same(pipe, pipe(seed=SEEDS[:1], noise="torch", output_type="np", **request).images, wanted)
    assert configured_pipeline(tmp_path / "both").request(**request).images == 1, "checked, not run"

    # The same as the stages by themselves, several images per prompt.
    prior, decoder = (opened(tmp_path / name) for name in ("prior", "decoder"))
    joined = pipe.from_stages(prior, decoder)
    assert joined.params["prior_prior"] is prior.params["prior"]
    with pytest.raises(WeightsError, match="names no prior; give prior="):
        type(pipe).from_pretrained(tmp_path / "decoder")
    (tmp_path / "decoder" / "README.md").write_text(f"---\nprior:\n  - {tmp_path / 'prior'}\n---\n")
    for given in ({"prior": prior}, {"prior": tmp_path / "prior"}, {}):
        two = type(pipe).from_pretrained(tmp_path / "decoder", **given)
        assert two.components.keys() == joined.components.keys()
        assert two.options == joined.options
    auto = AutoPipelineForText2Image
    for two in (auto.from_pretrained(tmp_path / "decoder"), auto.from_pipe(decoder, prior=prior)):
        assert type(two) is type(pipe)
        assert (two.components.keys(), two.options) == (joined.components.keys(), joined.options)
    assert auto.from_pipe(pipe).components == pipe.components
    with pytest.raises(ValueError, match="WuerstchenCombinedPipeline needs prior_prior"):
        auto.from_pipe(decoder)
    seeds = [1, 2, 3, 4]
    images = joined(**request | {"prompt": PROMPTS}, num_images_per_prompt=2, seed=seeds, output_type="np").images
    sizes = {"height": 100, "width": 86, "guidance_scale": 4.0, "num_inference_steps": 3}
    maps = prior(PROMPTS, num_images_per_prompt=2, seed=seeds, **sizes).image_embeddings
    np.testing.assert_array_equal(
        images, decoder(maps, PROMPTS, num_inference_steps=4, seed=seeds, output_type="np").images
    )
    compiled = joined.programs.compilations
    for changes, message in [
        ({"prior_num_inference_steps": 0}, "num_inference_steps"),
        ({"decoder_timesteps": [3.0]}, "timesteps must lie between 0 and 1"),
        ({"width": 0}, "width must be from 1"),
        ({"prompt": None}, "give either prompt or prompt_embeds"),
    ]:
        with pytest.raises(ValueError, match=message):
            joined.request(**request | changes)
    with pytest.raises(TypeError, match="has no argument timesteps"):
        joined.request(**request, timesteps=[1.0])
    assert joined.programs.compilations == compiled
