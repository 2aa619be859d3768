"""What a caller can rely on: one compilation, images that depend on their own request only, early errors."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

from diffuse_jax import schedulers
from diffuse_jax.adapters import tokens
from diffuse_jax.models import UNet2DConditionModel
from diffuse_jax.pipelines import (
    DiffusionPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffuse_jax.pipelines.families import STABLE_DIFFUSION_XL
from diffuse_jax.pipelines.family import Call
from diffuse_jax.pipelines.inputs import image_seeds
from diffuse_jax.pipelines.options import argument_names
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.pipelines.running import padded_size
from diffuse_jax.sharding import make_mesh, param_shardings
from diffuse_jax.weights import WeightsError
from tests.pipelines.tiny import pipeline

ROOT = Path(__file__).parents[2]
SAMPLERS = [
    schedulers.DDIMScheduler,
    schedulers.DDPMScheduler,
    schedulers.DPMSolverMultistepScheduler,
    schedulers.EulerAncestralDiscreteScheduler,
    schedulers.EulerDiscreteScheduler,
    schedulers.LCMScheduler,
    schedulers.PNDMScheduler,
    schedulers.UniPCMultistepScheduler,
]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return pipeline()


def pixels(pipe, *args, **request) -> np.ndarray:
    """Images as integers, for differences in steps of 1/255."""
    images = pipe(*args, **{"num_inference_steps": 3} | request).images
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_only_the_shape_of_a_request_compiles(pipe: StableDiffusionPipeline):
    request = {"prompt": "a cat", "seed": 0, "num_inference_steps": 2}
    pipe(**request)
    before = pipe.programs.compilations
    traces = []
    with jax.log_compiles(False):
        for change in (
            {"prompt": "longer prompt"},
            {"negative_prompt": "not this"},
            {"seed": 7},
            {"num_inference_steps": 5},
            {"timesteps": [900, 500, 100], "num_inference_steps": None},
            {"guidance_scale": 3.25},
            {"guidance_rescale": 0.7},
        ):
            traces.append(pipe(**request | change).images)
        for sampler in SAMPLERS:
            other = pipe.replace(scheduler=sampler.from_config(pipe.scheduler))
            other(**request | {"num_inference_steps": 4})
    assert pipe.programs.compilations == before
    assert len(traces) == 7


def test_another_size_or_no_guidance_is_another_program(pipe: StableDiffusionPipeline):
    pixels(pipe, "a", seed=0)
    before = pipe.programs.compilations
    assert pixels(pipe, "a", seed=0, height=24, width=8).shape == (1, 24, 8, 3)
    pixels(pipe, "a", seed=0, guidance_scale=1.0)
    pixels(pipe, "b", seed=1, guidance_scale=0.0)
    assert pipe.programs.compilations == before + 2


def test_an_image_does_not_depend_on_its_batch(pipe: StableDiffusionPipeline):
    prompts, seeds = ["one", "two", "three"], [5, 6, 7]
    together = pixels(pipe, prompts, seed=seeds)
    for i in (0, 2):
        assert np.abs(together[i] - pixels(pipe, prompts[i], seed=seeds[i])[0]).max() <= 1
    in_pairs = pixels(pipe, prompts, seed=seeds, batch_size=2)
    assert np.abs(together - in_pairs).max() <= 1


def test_images_of_one_seed_differ_and_the_first_is_that_of_the_seed_alone(pipe: StableDiffusionPipeline):
    many = pixels(pipe, "a", num_images_per_prompt=2, seed=11)
    assert np.abs(many[0] - pixels(pipe, "a", seed=[11])[0]).max() <= 1
    assert np.abs(many[0] - many[1]).max() > 5


MESHES = {
    "data": lambda: make_mesh(data=8),
    "all axes": lambda: make_mesh(data=2, fsdp=2, tensor=2),
    "explicit axes": lambda: jax.make_mesh((8,), ("data",)),
}


# Explicit axes have tests of their own: of networks, and of where each array lies.
SLOWLY = {"explicit axes": pytest.mark.slow}


@pytest.mark.parametrize("make", [pytest.param(MESHES[name], id=name, marks=SLOWLY.get(name, ())) for name in MESHES])
def test_eight_devices_give_the_same_images_as_one(pipe: StableDiffusionPipeline, make: Callable[[], Mesh]):
    prompts = [f"number {i}" for i in range(9)]  # 9 images on 8 devices: padded to 16
    alone = pixels(pipe, prompts, seed=list(range(9)), batch_size=1)
    mesh = make()
    params = {k: jax.device_put(v, param_shardings(v, mesh)) for k, v in pipe.params.items()}
    shared = pixels(pipe.replace(mesh=mesh, params=params), prompts, seed=list(range(9)))
    assert np.abs(alone - shared).max() <= 1


def test_a_mesh_without_an_axis_for_images_is_refused_before_anything_is_read(pipe: StableDiffusionPipeline):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    advice = re.escape("jax.make_mesh((1, 4, 2), ('data', 'fsdp', 'tensor'))")
    with pytest.raises(ValueError, match=advice):
        pipe.replace(mesh=mesh)
    for opened in (StableDiffusionPipeline.from_pretrained, StableDiffusionPipeline.from_single_file):
        with pytest.raises(ValueError, match=advice):
            opened("no-such-file", mesh=mesh)


def test_step_by_step_is_the_same_computation_and_a_callback_may_change_it(pipe: StableDiffusionPipeline):
    seen = []

    def look(pipe, step, timestep, values):
        seen.append((step, timestep, values["latents"].shape))

    request = {"prompt": "a", "seed": 3, "num_inference_steps": 3}
    watched = pixels(pipe, **request, callback_on_step_end=look)
    assert np.abs(watched - pixels(pipe, **request)).max() <= 1
    assert [s[0] for s in seen] == [0, 1, 2]
    assert [s[1] for s in seen] == sorted((s[1] for s in seen), reverse=True)
    assert seen[0][2] == (1, 8, 8, 4)

    black_out = lambda pipe, step, timestep, values: {"latents": jnp.zeros_like(values["latents"])}
    assert np.abs(pixels(pipe, **request, callback_on_step_end=black_out) - watched).max() > 5


def test_output_types(pipe: StableDiffusionPipeline):
    request = {"prompt": "a", "seed": 0, "num_inference_steps": 2}
    image = pipe(**request).images[0]
    assert isinstance(image, Image.Image)
    assert image.size == (16, 16)
    array = pipe(**request, output_type="np").images
    assert array.dtype == np.float32
    assert np.array_equal(np.round(array[0] * 255).astype(np.uint8), np.asarray(image))
    latents = pipe(**request, output_type="latent").images
    assert isinstance(latents, jax.Array)
    assert latents.shape == (1, 8, 8, 4)


def test_given_latents_embeddings_and_keys_replace_what_is_drawn_or_encoded(pipe: StableDiffusionPipeline, rng):
    encoder = pipe.components["text_encoder"]
    ids = pipe.components["tokenizer"]("hi", padding="max_length", max_length=16, return_tensors="np")["input_ids"]
    states = encoder.apply({"params": pipe.params["text_encoder"]}, jnp.asarray(ids, jnp.int32)).last_hidden_state
    by_prompt = pixels(pipe, "hi", seed=0)
    assert np.abs(pixels(pipe, prompt_embeds=states, seed=0) - by_prompt).max() <= 1
    assert np.abs(pixels(pipe, "hi", key=jax.random.key(0)) - by_prompt).max() <= 1
    noise = rng.standard_normal((1, 8, 8, 4))
    assert np.array_equal(pixels(pipe, "hi", latents=noise, seed=1), pixels(pipe, "hi", latents=noise, seed=2))


def test_a_prompt_that_is_too_long_is_cut_and_the_rest_named(pipe: StableDiffusionPipeline):
    with pytest.warns(UserWarning, match="'o p q'") as caught:
        long = pixels(pipe, " ".join("abcdefghijklmnopq"), seed=0)
    assert {warning.filename for warning in caught} == {__file__}, "it points at the caller's line"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(long, pixels(pipe, " ".join("abcdefghijklmn"), seed=0))


def test_two_encoders_warn_once_of_what_they_both_cut(pipe: StableDiffusionPipeline):
    second = {"text_encoder_2": pipe.components["text_encoder"], "tokenizer_2": pipe.components["tokenizer"]}
    both = types.SimpleNamespace(components={**pipe.components, **second})
    call = Call({"prompt": " ".join("abcdefghijklmnopq")}, 1, 1, (16, 16))
    with pytest.warns(UserWarning, match="'o p q'") as caught:
        ids = STABLE_DIFFUSION_XL.text_rows(both, call, ("",))["ids"]
    assert len(caught) == 1
    assert {*ids} == {"text_encoder", "text_encoder_2"}


def test_guidance_of_one_is_the_conditional_prediction_alone(pipe: StableDiffusionPipeline):
    guided = pixels(pipe, ["a", "b"], seed=[0, 1], guidance_scale=[1.0, 4.0])
    plain = pixels(pipe, ["a", "b"], seed=[0, 1], guidance_scale=1.0, batch_size=1)
    assert np.abs(guided[0] - plain[0]).max() <= 1
    assert np.abs(guided[1] - plain[1]).max() > 1


def test_a_scale_below_one_is_no_guidance_in_a_batch_too(pipe: StableDiffusionPipeline):
    together = pixels(pipe, ["a", "b"], seed=[0, 1], guidance_scale=[0.0, 4.0])
    assert np.abs(together[0] - pixels(pipe, "a", seed=[0], guidance_scale=0.0)[0]).max() <= 1
    with pytest.raises(ValueError, match="guidance_scale must be finite, got nan"):
        pipe("a", guidance_scale=float("nan"))


def test_tiling_and_slicing_decode_the_same_image(pipe: StableDiffusionPipeline):
    whole = pixels(pipe, ["a", "b"], seed=[0, 1])
    assert np.abs(pixels(pipe.replace(vae_slicing=True), ["a", "b"], seed=[0, 1]) - whole).max() <= 1
    tiled = pixels(pipe.replace(vae_tiling=6), "a", seed=0)
    assert tiled.shape == (1, 16, 16, 3)
    assert np.abs(tiled[0] - whole[0]).mean() < 20  # each tile has its own norms, so alike but not equal
    for edge in (True, 0):
        with pytest.raises(
            ValueError, match=f"vae_tiling must be the edge length of a tile in latent pixels, .* got {edge}"
        ):
            pipe.replace(vae_tiling=edge)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"height": 15}, "height must be a multiple of 2, got 15; try 14 or 16"),
        ({"prompt": None}, "give either prompt or prompt_embeds"),
        ({"prompt": 3}, "prompt must be a string"),
        ({"prompt": []}, "at least one string"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries for 1 prompts"),
        ({"seed": [1, 2]}, "seed has 2 entries for 1 images"),
        ({"seed": -1}, "a seed must be an integer from 0 to 4294967295"),
        ({"seed": 0, "key": jax.random.key(0)}, "seed or key, not both"),
        ({"latents": np.zeros((1, 4, 8, 8))}, r"latents must be \(1, 8, 8, 4\)"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale has 2 entries"),
        ({"output_type": "jpg"}, "output_type must be one of pil, np, jax, latent"),
        ({"clip_skip": 2}, "clip_skip must be from 0 to 1, got 2"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": 2, "timesteps": [1]}, "exactly one of"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1"),
        (
            {"prompt": None, "prompt_embeds": np.zeros((1, 20, 16))},
            "the prompt has 20 tokens and the negative prompt 16, .* give prompt_embeds and negative_prompt_embeds",
        ),
        (
            {"negative_prompt": "b", "negative_prompt_embeds": np.zeros((1, 16, 16))},
            "give negative_prompt or negative_prompt_embeds, not both",
        ),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_compiled(pipe, request_: dict, message: str):
    before = pipe.programs.compilations
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**{"prompt": "a"} | request_)
    assert pipe.programs.compilations == before


@pytest.mark.parametrize(
    ("unused", "message"),
    [
        ({"negative_prompt": 3}, "negative_prompt must be a string"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt has 3 entries for 1 prompts"),
        ({"negative_prompt_embeds": np.zeros((1, 16))}, r"negative_prompt_embeds must be floating-point \[1, L, 16\]"),
        ({"negative_prompt_embeds": np.zeros((1, 16, 8))}, r"got float64 \[1, 16, 8\]"),
        ({"negative_prompt": "a", "negative_prompt_embeds": np.zeros((1, 16, 16))}, "not both"),
        ({"guidance_rescale": [0.5, 0.5]}, "guidance_rescale has 2 entries"),
    ],
)
def test_what_guidance_alone_would_use_is_checked_without_it(pipe, unused: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        pipe("a", guidance_scale=1.0, **unused)


def test_an_unknown_argument_is_answered_with_all_that_there_are(pipe: StableDiffusionPipeline):
    """Those that the call names, those of its options, and those that a subclass passes on."""

    class Passing(StableDiffusionPipeline):
        def compose(self, prompt=None, *, limit=5, **options):  # type: ignore[override]
            return super().compose(prompt, **options)

    assert {"limit", "prompt", "height", "guidance_scale", "seed", "batch_size"} <= argument_names(Passing)
    assert {"strength", "image", "control_image"} <= argument_names(StableDiffusionControlNetImg2ImgPipeline)
    assert "mask_image" not in argument_names(StableDiffusionImg2ImgPipeline), "that is inpainting"
    with pytest.raises(TypeError, match="Pipeline has no argument size; it has .*guidance_scale, height"):
        pipe("a", size=16)


def test_the_index_says_which_sampler_it_is(pipe: StableDiffusionPipeline, tmp_path: Path):
    """As in diffusers, also where the sampler's own file names another."""
    index = pipe.save_pretrained(tmp_path) / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "EulerDiscreteScheduler"))
    assert type(DiffusionPipeline.from_pretrained(tmp_path).scheduler) is schedulers.EulerDiscreteScheduler
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", "MyScheduler"))
    with pytest.raises(WeightsError, match="component 'scheduler' is an unknown 'MyScheduler'"):
        DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["scheduler", "tokenizer", "vae"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(
    name: str, pipe: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(pipe.save_pretrained(tmp_path / "model").parent)
    shutil.rmtree(tmp_path / "model" / name)
    with pytest.raises(WeightsError, match=f"^model/{name}: no such folder$"):
        DiffusionPipeline.from_pretrained("model")


def test_components_of_another_kind_are_refused(pipe: StableDiffusionPipeline, tmp_path: Path):
    folder, (vae, params) = pipe.save_pretrained(tmp_path), (pipe.components["vae"], pipe.params["vae"])
    for wrong in (vae, (params, vae)):
        with pytest.raises(TypeError, match=r"vae: pass a network as \(model, params\)"):
            DiffusionPipeline.from_pretrained(folder, vae=wrong)
    with pytest.raises(TypeError, match=r"scheduler must be a diffuse_jax Scheduler, got builtins\.str"):
        pipe.replace(scheduler="euler")
    assert pipe.replace(vae=vae.clone(dtype=jnp.bfloat16)).params["vae"] is params  # computes in another dtype


def test_a_tokenizer_of_another_model_is_refused(pipe: StableDiffusionPipeline):
    """JAX takes an id without an embedding as another one's and says nothing."""
    more = tokens.with_words(pipe.components["tokenizer"], "<thing>", 1)
    pixels(pipe.replace(tokenizer=more), "no such word", num_inference_steps=1)
    with pytest.raises(ValueError, match="the tokenizer produces id 190, but the text encoder has only 190 embeddings"):
        pipe.replace(tokenizer=more)("a <thing>")


def test_pipelines_are_immutable_and_replaced(pipe: StableDiffusionPipeline):
    other = pipe.replace(scheduler=schedulers.EulerDiscreteScheduler())
    assert isinstance(pipe.scheduler, schedulers.DDIMScheduler)
    assert isinstance(other.scheduler, schedulers.EulerDiscreteScheduler)
    assert other.params["unet"] is pipe.params["unet"]
    with pytest.raises(AttributeError):
        pipe.mesh = None  # type: ignore[misc]
    with pytest.raises(TypeError, match="no component 'sheduler'"):
        pipe.replace(sheduler=1)
    assert "UNet2DConditionModel" in repr(pipe)
    assert "Array(" not in repr(pipe)  # a prompt of Python or a notebook shows what it consists of, not the values


def test_saved_folders_open_again_and_components_can_be_exchanged(pipe: StableDiffusionPipeline, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path).replace(programs=pipe.programs)
    assert type(again) is StableDiffusionPipeline
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), again.params, pipe.params))
    assert np.array_equal(pixels(again, "a", seed=0), pixels(pipe, "a", seed=0))
    euler = schedulers.EulerDiscreteScheduler(steps_offset=1)
    assert DiffusionPipeline.from_pretrained(tmp_path, scheduler=euler).scheduler == euler
    with pytest.raises(TypeError, match="no component sheduler"):
        DiffusionPipeline.from_pretrained(tmp_path, sheduler=euler)


def test_a_saved_program_is_used_and_a_damaged_one_is_compiled_again(pipe: StableDiffusionPipeline, tmp_path):
    saver = pipe.replace(programs=Programs())
    expected = pixels(saver, "a", seed=0)
    files = saver.save_compiled(tmp_path)
    assert len(files) == 1
    fresh = pipe.replace(programs=Programs()).load_compiled(tmp_path)
    assert np.array_equal(pixels(fresh, "a", seed=0), expected)
    assert fresh.programs.compilations == 0
    for file in files:
        file.write_bytes(b"damaged")
    fresh = pipe.replace(programs=Programs()).load_compiled(tmp_path)
    with pytest.warns(UserWarning, match="compiled again"):
        fresh.compile()
    assert fresh.programs.compilations == 1


@pytest.mark.slow
def test_another_process_finds_the_same_program(pipe: StableDiffusionPipeline):
    """A key must not hold anything that differs between processes, such as an address."""
    code = """
from diffuse_jax.pipelines import programs, saved_programs
from tests.pipelines.tiny import pipeline
programs.Programs._compile = lambda self, key, args: print("key", saved_programs.file_name(key, args))
pipeline().compile()
"""
    run = lambda: subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = run(), run()
    assert first.stdout.startswith("key ")
    assert first.stdout == second.stdout


def test_compile_runs_nothing_and_the_call_then_compiles_nothing(pipe: StableDiffusionPipeline):
    fresh = pipe.replace(programs=Programs()).compile()
    assert fresh.programs.compilations == 1
    pixels(fresh, "a", seed=0)
    assert fresh.programs.compilations == 1


@pytest.mark.parametrize(
    ("images", "devices", "size"), [(1, 1, 1), (3, 1, 4), (5, 1, 8), (1, 8, 8), (9, 8, 16), (17, 8, 32)]
)
def test_padding_uses_few_sizes(images: int, devices: int, size: int):
    assert padded_size(images, devices) == size


def test_threads_share_a_pipeline(pipe: StableDiffusionPipeline):
    """Each thread gets the images that it would get alone: no call affects another."""
    prompts = ["a", "a long prompt", "b c", "something else"] * 4
    draw = lambda prompt: pixels(pipe, prompt, seed=0, num_inference_steps=1)
    alone = {prompt: draw(prompt) for prompt in set(prompts)}
    with ThreadPoolExecutor(4) as pool:
        for prompt, images in zip(prompts, pool.map(draw, prompts), strict=True):
            np.testing.assert_array_equal(images, alone[prompt])


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_pipeline_copies_and_pickles_before_and_after_calls(twin: Callable):
    fresh = pipeline()
    before = twin(fresh)
    images = pixels(fresh, "a cat", seed=0, num_inference_steps=1)
    for other in (before, twin(fresh)):
        np.testing.assert_array_equal(pixels(other, "a cat", seed=0, num_inference_steps=1), images)


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("torch_dtype", "float16", "dtype="),
        ("use_safetensors", True, "leave it out"),
        ("from_pt", True, "leave it out"),
        ("device_map", "auto", "mesh="),
    ],
)
def test_arguments_of_diffusers_are_answered_with_those_of_here(name: str, value: object, advice: str, tmp_path: Path):
    opened = [kind.from_pretrained for kind in (DiffusionPipeline, UNet2DConditionModel, schedulers.DDIMScheduler)]
    for load in (*opened, DiffusionPipeline.from_single_file):
        with pytest.raises(TypeError, match=f"there is no {name}= here: .*{advice}"):
            load(tmp_path / "nothing is read", **{name: value})


def test_another_familys_folder_is_refused_when_it_is_opened(tmp_path: Path):
    """The UNet alone would refuse it at the first call, with a less helpful message."""
    components = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    entries = {name: ["diffusers", kind] for name, kind in components.items()}
    entries["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"} | entries))
    with pytest.raises(
        TypeError, match=r"is a StableDiffusionXLPipeline with text_encoder_2, which StableDiffusionPipe"
    ):
        StableDiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("seed", [np.int64(7), np.uint32(7), np.array(7), jnp.int32(7), jnp.array(7, jnp.uint32)])
def test_a_seed_is_an_integer_of_any_library(seed: object):
    (seeds, indices), (wanted, order) = image_seeds(seed, 2), image_seeds(7, 2)
    np.testing.assert_array_equal(seeds, wanted)
    np.testing.assert_array_equal(indices, order)
    for several in ([seed, 3], (seed, np.int64(3)), np.array([7, 3]), jnp.array([7, 3])):
        np.testing.assert_array_equal(image_seeds(several, 2)[0], [7, 3])
        np.testing.assert_array_equal(image_seeds(several, 2)[1], [0, 0])


LARGE, KEY = 2**32, jax.random.key(7)


@pytest.mark.parametrize("seed", [np.float32(7), jnp.float32(7), -1, np.int64(-1), LARGE, "7", KEY, [1.5]])
def test_an_impossible_seed_is_named(seed: object):
    with pytest.raises(ValueError, match=r"(?s)a seed must be an integer from 0 to 4294967295, got ") as error:
        image_seeds(seed, 1)
    otherwise = "2**64" if seed is LARGE else "key=" if seed is KEY else ""
    assert otherwise in str(error.value)
    assert bool(otherwise) == ("key=" in str(error.value))
