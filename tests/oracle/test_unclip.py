"""unCLIP (Karlo) against PyTorch diffusers: its networks, and both pipelines with the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax import models
from diffuse_jax.pipelines import DiffusionPipeline, Request, UnCLIPImageVariationPipeline, UnCLIPPipeline, combined
from diffuse_jax.pipelines.method import image_keys, normal
from diffuse_jax.pipelines.programs import Programs
from tests.oracle import twins, unclip
from tests.oracle.agreement import require_same
from tests.oracle.comparisons import channel_first, channel_last, difference

folders, torch = unclip.folders, unclip.torch

PROMPTS = ["a cat", "two red houses"]
STEPS = {"decoder_num_inference_steps": 4, "super_res_num_inference_steps": 3}
ALL_STEPS = {"prior_num_inference_steps": 3, **STEPS}


def test_the_projection(tmp_path: Path, rng: np.random.Generator) -> None:
    module, model, params = twins.twin(unclip.text_proj(), models.UnCLIPTextProjModel, tmp_path / "theirs")
    normals = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    image, prompts, states = normals(2, 32), normals(4, 32), normals(4, 5, 32)
    given = (np.concatenate([image, image]), prompts, states, np.array([True, True, False, False]))
    ours = model.apply({"params": params}, *given)
    with torch.no_grad():
        theirs = module(
            image_embeddings=torch.tensor(image),
            prompt_embeds=torch.tensor(prompts),
            text_encoder_hidden_states=torch.tensor(states),
            do_classifier_free_guidance=True,
        )
    assert [difference(a, b.numpy()) < 1e-5 for a, b in zip(ours, theirs, strict=True)] == [True, True]
    model.save_pretrained(tmp_path / "ours", params)
    again = type(module).from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("config", [unclip.DECODER, folders.UNET], ids=["joint attention", "cross-attention"])
def test_masked_tokens_are_not_attended_to(config: dict[str, Any], tmp_path: Path, rng: np.random.Generator) -> None:
    module = folders.lively(unclip.diffusers.UNet2DConditionModel(**config))
    module, model, params = twins.twin(module, models.UNet2DConditionModel, tmp_path / "theirs")
    c = model.config
    sample = rng.standard_normal((2, 8, 8, c.in_channels)).astype(np.float32)
    text = rng.standard_normal((2, 5, c.text_width)).astype(np.float32)
    mask = np.array([[1, 1, 0, 1, 0], [1, 0, 1, 1, 1]], bool)
    labels = {} if c.class_embed_type is None else {"class_labels": np.ones((2, c.time_embed_dim), np.float32)}
    run = jax.jit(lambda mask, text: model.apply({"params": params}, sample, 7, text, **labels, **mask))
    ours = run({"encoder_attention_mask": mask}, text)
    with torch.no_grad():
        torches = {name: torch.tensor(value) for name, value in labels.items()}
        given = {"encoder_hidden_states": torch.tensor(text), "encoder_attention_mask": torch.tensor(mask)}
        theirs = channel_last(module(channel_first(sample), torch.tensor(7), **given, **torches).sample)
    assert difference(ours, theirs) < 1e-4
    other = np.where(mask[..., None], text, 3.0).astype(np.float32)
    np.testing.assert_allclose(run({"encoder_attention_mask": mask}, other), ours, atol=1e-5)
    assert difference(run({}, text), theirs) > 1e-3, "without a mask the result is another"
    with pytest.raises(ValueError, match=r"encoder_attention_mask must be \(2, 5\), got \(2, 4\)"):
        run({"encoder_attention_mask": mask[:, :4]}, text)


def noise_of(request: Request) -> list[Any]:
    """The noise of a run, first that of the start: as PyTorch shapes it, in the order in which it draws it."""
    keys = image_keys(request.rows)
    start, steps = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    shape = (request.images, *request.method.latent_shape)
    drawn = [request.plan.draw(i, shape, steps) for i in range(int(request.plan.num_evaluations) - 1)]
    found = [np.asarray(x) for x in (normal(start, shape[1:]), *drawn)]
    return [torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1))) for x in found]


class Both:
    """Our pipeline, and PyTorch's with our noise."""

    def __init__(self, pipe: Any, twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pipe, self.twin, self.noise, self.made = pipe, twin, [], []
        after, take = combined.run, lambda *args, **options: self.noise.pop(0)
        for module in {type(twin).__module__, "diffusers.schedulers.scheduling_unclip"}:
            monkeypatch.setattr(f"{module}.randn_tensor", take)
        monkeypatch.setattr(combined, "run", lambda pipe, request: self.made.append(request) or after(pipe, request))
        for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
            if (scheduler := getattr(twin, name, None)) is not None:
                folders.exact(scheduler)

    def compare(self, **request: Any) -> None:
        self.made.clear()
        last = self.pipe.request(**request, seed=3)  # the earlier stages run meanwhile
        self.noise = [x for stage in (*self.made, last) for x in noise_of(stage)]
        ours = self.pipe(**request, seed=3, output_type="np").images
        theirs = self.twin(**request, output_type="np").images
        assert not self.noise, "all of the noise was drawn"
        require_same(self.pipe, ours, theirs)


def pair(folder: Path, make: Any) -> tuple[Any, Any]:
    """Our pipeline and PyTorch's."""
    twin = make(folder)
    return DiffusionPipeline.from_pretrained(folder).replace(programs=Programs()), twin


@pytest.fixture(scope="module")
def text_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return pair(tmp_path_factory.mktemp("text") / "model", unclip.text_pipeline)


@pytest.fixture(scope="module")
def variation_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return pair(tmp_path_factory.mktemp("variation") / "model", unclip.variation_pipeline)


@pytest.fixture
def text(text_pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Both:
    return Both(*text_pair, monkeypatch)


@pytest.fixture
def variation(variation_pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Both:
    return Both(*variation_pair, monkeypatch)


def test_from_prompts(text: Both) -> None:
    assert type(text.pipe) is UnCLIPPipeline
    text.compare(prompt=PROMPTS, **ALL_STEPS)
    assert text.pipe.programs.compilations == 3, "one for each stage"
    changed = {"prior_num_inference_steps": 4, "decoder_num_inference_steps": 3, "super_res_num_inference_steps": 2}
    text.compare(prompt=PROMPTS, **changed, prior_guidance_scale=2.0, decoder_guidance_scale=3.0)
    assert text.pipe.programs.compilations == 3, "steps, scales and seeds are data"


def encoded(twin: Any, prompts: list[str]) -> dict[str, Any]:
    """What PyTorch's text encoder makes of prompts, and which tokens are not padding."""
    tokens = twin.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        output = twin.text_encoder(tokens.input_ids)
    return {"text_model_output": output, "text_attention_mask": tokens.attention_mask.bool()}


@pytest.mark.slow
def test_from_the_results_of_a_text_encoder(text: Both) -> None:
    """Those of PyTorch as they are: an object with names, or a tuple."""
    given, options = encoded(text.twin, PROMPTS), ALL_STEPS
    text.compare(**given, **options)
    own = text.pipe(PROMPTS, seed=3, output_type="np", **options).images
    same = text.pipe(**given, seed=3, output_type="np", **options).images
    np.testing.assert_allclose(same, own, atol=1e-4)
    pair = given["text_model_output"].text_embeds, given["text_model_output"].last_hidden_state
    mask = np.asarray(given["text_attention_mask"])
    mixed = text.pipe(text_model_output=pair, text_attention_mask=mask, seed=3, output_type="np", **options).images
    np.testing.assert_array_equal(mixed, same)


def test_from_images(variation: Both) -> None:
    assert type(variation.pipe) is UnCLIPImageVariationPipeline
    image = folders.images(1, 40)[0]
    variation.compare(image=image, **STEPS)
    assert variation.pipe.programs.compilations == 2, "one for each stage"
    changed = {"decoder_num_inference_steps": 3, "super_res_num_inference_steps": 4, "decoder_guidance_scale": 3.0}
    variation.compare(image=image, **changed)
    assert variation.pipe.programs.compilations == 2, "steps, scales and seeds are data"


@pytest.mark.slow
def test_without_guidance_and_with_several_images(text: Both) -> None:
    text.compare(prompt="a cat", num_images_per_prompt=2, **ALL_STEPS)
    plain = {**ALL_STEPS, "prior_guidance_scale": 1.0, "decoder_guidance_scale": 1.0}
    text.compare(prompt="a cat", **plain)
    text.compare(**encoded(text.twin, ["a cat"]), **plain, num_images_per_prompt=2)


@pytest.mark.slow
def test_an_image_without_guidance(variation: Both) -> None:
    variation.compare(image=folders.images(1, 40)[0], **STEPS, decoder_guidance_scale=1.0)


@pytest.mark.slow
def test_from_embeddings(variation: Both) -> None:
    image = folders.images(1, 40)[0]
    pipe, twin = variation.pipe, variation.twin
    pixels = channel_first(pipe.components["feature_extractor"](image))
    embeds = twin.image_encoder(pixels).image_embeds.detach().numpy()
    request = {"seed": 1, "output_type": "np", **STEPS}
    same = pipe(image_embeddings=embeds, **request).images
    np.testing.assert_allclose(same, pipe(image, **request).images, atol=1e-4)


def test_saved_folders_open_again(text: Both, tmp_path: Path) -> None:
    pipe = text.pipe
    pipe.save_pretrained(tmp_path / "again")
    index = (tmp_path / "again" / "model_index.json").read_text()
    assert '"unclip",\n    "UnCLIPTextProjModel"' in index
    again = DiffusionPipeline.from_pretrained(tmp_path / "again").replace(programs=pipe.programs)
    one, two = (p(PROMPTS, seed=0, output_type="np", **ALL_STEPS).images for p in (pipe, again))
    np.testing.assert_array_equal(one, two)
    latents = np.asarray(normal(jax.random.split(jax.random.key(0), 2), (16, 16, 3)))
    changed = pipe(PROMPTS, seed=0, super_res_latents=latents, output_type="np", **ALL_STEPS).images
    assert np.abs(changed - one).mean() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "prompt must be a string or a list"),
        ({"noise": "torch", "seed": 0}, "takes no noise="),
        ({"decoder_latents": np.zeros((2, 9, 8, 3), np.float32)}, r"latents must be \(2, 8, 8, 3\)"),
        ({"output_type": "webp"}, "output_type must be one of"),
        ({"num_inference_steps": 3}, "has no argument num_inference_steps"),
    ],
)
def test_bad_arguments(text: Both, options: dict[str, Any], message: str) -> None:
    compiled = text.pipe.programs.compilations
    with pytest.raises((ValueError, TypeError), match=message):
        text.pipe.request(**{"prompt": PROMPTS, **options})
    assert text.pipe.programs.compilations == compiled


def test_bad_images(variation: Both) -> None:
    with pytest.raises(ValueError, match="give either image or image_embeddings"):
        variation.pipe.request()
    with pytest.raises(ValueError, match=r"image_embeddings must be floating-point \[N,32\]"):
        variation.pipe.request(image_embeddings=np.zeros((1, 31), np.float32))
