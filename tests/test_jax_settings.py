"""JAX's own settings change no result: 64-bit types, strict promotion of dtypes, and running without ``jit``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffuse_jax import pipelines, schedulers
from diffuse_jax.models import ControlNetConfig, ControlNetModel, UNet2DConfig, UNet2DModel
from diffuse_jax.text import CLIPTextModelWithProjection
from diffuse_jax.training.latent import loss_of, networks, whole
from diffuse_jax.training.objective import Objective
from diffuse_jax.training.optimizer import learning_rate, make_optimizer
from diffuse_jax.training.state import init_state, make_step
from tests.models.filling import random_params
from tests.pipelines import tiny
from tests.schedulers.samplers import NAMES, make
from tests.train.latent_models import SIZE, save_sd

SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "64-bit types": lambda: jax.enable_x64(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no jit": jax.disable_jit,
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)


@functools.cache
def plain(fn: Callable[..., Any], *args: Any) -> Any:
    """What ``fn`` returns without any of the settings."""
    return jax.tree.map(np.asarray, fn(*args))


def check(setting: str, fn: Callable[..., Any], *args: Any) -> None:
    """What ``fn`` returns has the dtypes and values that it has without the setting."""
    wanted = plain(fn, *args)
    with SETTINGS[setting]():
        found = jax.tree.map(np.asarray, fn(*args))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()), found, wanted)
    assert jax.tree.map(lambda a: a.dtype, found) == jax.tree.map(lambda a: a.dtype, wanted)


@every_setting
@pytest.mark.parametrize("name", NAMES)
def test_every_sampler(name: str, setting: str) -> None:
    check(setting, two_steps, name)


def two_steps(name: str) -> Any:
    """Two steps called from Python, the first with one key, the second with one per sample, and what goes with them."""
    plan = make(name).plan(8)
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    x0, known = np.zeros_like(noise), np.ones(noise.shape, bool)
    state, found = plan.init(noise), []
    for i, key in ((0, jax.random.key(1)), (1, jax.random.split(jax.random.key(2)))):
        output = 0.3 * jnp.tanh(plan.model_input(state, i)) + 0 * plan.timestep(i)
        found.append((plan.predict_x0(state, i, output), plan.draw(i, noise.shape, key)))
        state = plan.step(state, i, output, key)
    return found, state, plan.blend(state, 1, x0, noise, known), plan.noised(x0, noise, 3)


@every_setting
def test_samplers_that_are_not_tables(setting: str) -> None:
    check(setting, other_steps)


def other_steps() -> Any:
    """Steps of class indices and of Langevin dynamics, and what training asks of a scheduler."""
    noise, at = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32), np.arange(2, dtype=np.int32)
    key = jax.random.key(0)
    vq = schedulers.VQDiffusionScheduler(num_vec_classes=5).plan(10)
    classes = vq.step(vq.init(2, 16), 0, np.full((2, 16, 4), -np.log(4), np.float32), key)
    decoder = schedulers.ConsistencyDecoderScheduler().plan(2)
    ve = schedulers.ScoreSdeVeScheduler()
    state = ve.plan(5).init(noise)
    corrected = ve.correct(state, 0, -0.1 * state.sample, key)
    ddpm = schedulers.DDPMScheduler()
    trained = ddpm.add_noise(noise, noise, at), ddpm.velocity(noise, noise, at)
    flow = schedulers.FlowMatchEulerDiscreteScheduler().add_noise(noise, noise, at)
    return classes, decoder.step(decoder.init(noise), 0, noise, key), corrected, trained, flow


# Pipelines


def sd(cls: str = "StableDiffusionPipeline", **components: Any) -> pipelines.DiffusionPipeline:
    pipe = tiny.pipeline()
    return getattr(pipelines, cls).from_pipe(pipe, **components)


def controlled() -> pipelines.DiffusionPipeline:
    fields = {k: v for k, v in tiny.UNET.to_json().items() if k in ControlNetConfig.__dataclass_fields__}
    net = ControlNetModel(
        ControlNetConfig(**fields | {"conditioning_embedding_out_channels": (4, 8)} | {"num_attention_heads": 2})
    )
    return sd(
        "StableDiffusionControlNetPipeline", controlnet=(net, random_params(net.shapes(), np.random.default_rng(1)))
    )


def xl() -> pipelines.DiffusionPipeline:
    plain = tiny.pipeline()
    rng = np.random.default_rng(2)
    unet = type(plain.components["unet"])(
        tiny.UNET.replace(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
        )
    )
    second = CLIPTextModelWithProjection(plain.components["text_encoder"].config.replace(projection_dim=16))
    nets = {"unet": unet, "text_encoder_2": second}
    params = {name: random_params(net.shapes(), rng) for name, net in nets.items()}
    return pipelines.StableDiffusionXLPipeline(
        {**plain.components, **nets, "tokenizer_2": tiny.tokenizer()}, {**plain.params, **params}
    )


def unconditional() -> pipelines.DiffusionPipeline:
    config = UNet2DConfig(
        sample_size=8, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4, num_class_embeds=3,
    )  # fmt: skip
    net = UNet2DModel(config)
    params = {"unet": random_params(net.shapes(), np.random.default_rng(0))}
    return pipelines.DDPMPipeline({"unet": net, "scheduler": schedulers.DDPMScheduler()}, params)


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
MASK = Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 4))
PROMPT = {"prompt": "a", "num_inference_steps": 2, "guidance_rescale": 0.5}
RUNS: dict[str, tuple[Callable[[], pipelines.DiffusionPipeline], dict[str, Any]]] = {
    "SD": (sd, PROMPT | {"clip_skip": 1}),
    "img2img": (lambda: sd("StableDiffusionImg2ImgPipeline"), PROMPT | {"image": IMAGE, "strength": 0.9}),
    "inpainting": (lambda: sd("StableDiffusionInpaintPipeline"), PROMPT | {"image": IMAGE, "mask_image": MASK}),
    "ControlNet": (controlled, PROMPT | {"image": IMAGE}),
    "SDXL": (xl, PROMPT),
    "unconditional": (unconditional, {"num_inference_steps": 2, "class_labels": 1}),
}


SHORT = {"SD": ["64-bit types", "strict promotion"], "unconditional": ["no jit"]}
"""What runs each time; the other kinds of pipeline share nearly all of their code with these."""


def runs() -> list[Any]:
    """Every kind of pipeline with every setting; those that take long are marked slow."""
    mark = lambda run, setting: () if setting in SHORT.get(run, ()) else pytest.mark.slow
    return [pytest.param(run, setting, marks=mark(run, setting)) for run in RUNS for setting in SETTINGS]


@pytest.mark.parametrize(("run", "setting"), runs())
def test_every_kind_of_pipeline(run: str, setting: str) -> None:
    check(setting, images, run)


def images(run: str) -> np.ndarray:
    build, request = RUNS[run]
    return build()(seed=0, output_type="np", **request).images


# Without jit every operation is compiled for every shape; the ordinary suite runs the parts of a step so, in
# test_samplers_that_are_not_tables and in test_every_kind_of_pipeline.
@pytest.mark.parametrize(
    "setting",
    ["strict promotion", *(pytest.param(name, marks=pytest.mark.slow) for name in ("64-bit types", "no jit"))],
)
def test_a_training_step(setting: str, latent_model: Path) -> None:
    check(setting, update, latent_model)


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("model"))


def update(folder: Path) -> Any:
    """The state after one step of two accumulated parts, and its metrics."""
    pipe = pipelines.DiffusionPipeline.from_pretrained(folder)
    rng = np.random.default_rng(0)
    batch = {
        "pixel_values": rng.integers(0, 255, (2, 1, SIZE, SIZE, 3), np.uint8),
        "text_encoder": rng.integers(0, 90, (2, 1, 16), np.int32),
        "prior": np.array([[True], [False]]),
    }
    objective = Objective(scheduler=schedulers.DDPMScheduler(), snr_gamma=5.0, noise_offset=0.1)
    optimizer = make_optimizer("adamw", learning_rate("cosine", 1e-3, 2, 10))
    state = init_state({"unet": pipe.params["unet"]}, optimizer, use_ema=True)
    frozen = {name: tree for name, tree in pipe.params.items() if name != "unet"}
    step = make_step(loss_of(pipe, whole(networks(pipe)), objective), optimizer, seed=0)
    state, metrics = step(state, frozen, batch)
    return state, metrics
