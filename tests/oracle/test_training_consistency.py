"""One step of latent consistency distillation against a computation with PyTorch diffusers' networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax import DiffusionPipeline, LCMScheduler, pipelines
from diffuse_jax.adapters import lora
from diffuse_jax.adapters.lora_file import save_lora
from diffuse_jax.adapters.targets import UNET_TARGETS
from diffuse_jax.pipelines.parts.network import strength_embedding
from diffuse_jax.sharding import make_mesh
from diffuse_jax.torch_backend import training
from diffuse_jax.torch_backend.training_report import Tolerance, compare_updates, verdict
from diffuse_jax.training.consistency import (
    UNCONDITIONAL,
    consistency_from,
    consistency_loss_of,
    draw,
    frozen_from,
    with_guidance,
)
from diffuse_jax.training.data import Example
from diffuse_jax.training.initial import initial_params
from diffuse_jax.training.latent import networks, open_pipeline, save_networks, whole, with_lora
from diffuse_jax.training.latent_model import save_rest
from diffuse_jax.training.settings import ConsistencySettings, ModelSettings
from diffuse_jax.training.state import AVERAGE
from tests.oracle.agreement import require_same
from tests.train.latent_models import SIZE, save_sd, save_sdxl

twins = pytest.importorskip("tests.oracle.twins", reason="needs PyTorch diffusers and transformers")
twin = pytest.importorskip("diffuse_jax.torch_backend.training_torch", reason="needs PyTorch diffusers")
torch, diffusers = twins.torch, twins.diffusers

LOSS = 1e-6
"""Relative error of the loss that is accepted."""

TIGHT = Tolerance(values=1e-5, gradients=1e-4, quiet=1e-3, changes=1e-3)
"""A change is at most the learning rate, 1e-3, so this is 1e-6 in parameters of about 0.1."""

WEAK = {"w_min": 0.5, "w_max": 1.5}
"""Guidance multiplies the rounding of predictions: at the default scales, to more than 1e-6 of the loss."""

SAME = 0.01
"""Mean difference of images that is accepted, of 255."""

PROMPTS = ["a cat", "two dogs, one hat", "x", ""]
WIDTH = 8


class Case:
    """A teacher on both sides, captioned images, and the random numbers of the step."""

    def __init__(self, folder: Path, rng: np.random.Generator, settings: ConsistencySettings) -> None:
        self.folder = folder
        self.pipe = open_pipeline(folder, trainable=(), mesh=make_mesh(devices=jax.devices()[:1]))
        self.theirs = twin.open_reference(folder, trainable=(), device="cpu")
        self.distillation = consistency_from(settings, self.pipe)
        self.frozen = frozen_from(self.pipe, ())
        size = (SIZE, SIZE)
        images = rng.integers(0, 256, (len(PROMPTS), *size, 3), np.uint8)
        examples = [Example(x, text, (40, 50), (1, 2), size, 0, 0, "", None, None) for x, text in zip(images, PROMPTS)]
        self.batch = training.batch_of(self.pipe, examples)

    def draws(self) -> tuple[np.ndarray, Any]:
        """The noise of the latents' distribution, and what the loss draws, by the keys of the first step."""
        k_begin, k_draw = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0))
        shape = (len(PROMPTS), SIZE // 2, SIZE // 2, 4)
        drawn = jax.tree.map(np.asarray, draw(self.distillation, k_draw, jnp.zeros(shape)))
        return np.asarray(jax.random.normal(k_begin, shape, jnp.float32)), drawn

    def compare(self, trained: training.Trained, parameters: Any, student: Any, target: Any, teacher: Any) -> None:
        loss = consistency_loss_of(self.pipe, trained.combine, self.distillation)
        ours = training.step_of(loss, trained, self.batch)
        theirs = twin.torch_step(parameters, lambda: torch_loss(self, student, target, teacher))
        np.testing.assert_allclose(ours.values["loss"], theirs.values["loss"], rtol=LOSS)
        compared = compare_updates(ours, theirs, TIGHT)
        assert compared.ok, verdict(compared)
        assert len(compared.changes) > 10


def torch_loss(case: Case, student: Any, target: Any, teacher: Any) -> Any:
    """The loss, from the formulas of the paper, with functions ``(x, t, text, w) -> output``."""
    settings, pipe = case.distillation.settings, case.theirs
    latent_noise, drawn = case.draws()
    noise, w = (torch.tensor(np.asarray(a)) for a in (drawn.noise, drawn.w))
    config = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    alpha_bar = torch.cumprod(1 - config.betas.double(), 0)
    stride = len(alpha_bar) // settings.num_ddim_timesteps
    start = torch.tensor(np.asarray(drawn.position)).long() * stride + stride - 1
    end = (start - stride).clamp(min=0)
    level = lambda t: tuple(f.float().reshape(-1, 1, 1, 1) for f in (alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()))

    with torch.no_grad():
        posterior = pipe.vae.encode(
            torch.tensor(case.batch["pixel_values"]).permute(0, 3, 1, 2) / 127.5 - 1
        ).latent_dist
        last = lambda x: x.permute(0, 2, 3, 1)
        x0 = (last(posterior.mean) + last(posterior.std) * torch.tensor(latent_noise)) * pipe.vae.config.scaling_factor
        text = twin.encode_prompts(pipe, case.batch, x0.device)
        if text.pooled is None:
            ids = pipe.tokenizer([""], padding="max_length", max_length=text.states.shape[1]).input_ids
            empty = text._replace(states=pipe.text_encoder(torch.tensor(ids))[0].expand_as(text.states))
        else:
            empty = twin.Text(torch.zeros_like(text.states), torch.zeros_like(text.pooled))

    def means(x: Any, v: Any, t: Any) -> tuple[Any, Any]:
        alpha, sigma = level(t)
        return alpha * x - sigma * v, alpha * v + sigma * x

    def f(network: Any, x: Any, t: Any) -> Any:
        scaled = (10.0 * t.float()).reshape(-1, 1, 1, 1)
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        return c_skip * x + c_out * means(x, network(x, t, text, w), t)[0]

    alpha, sigma = level(start)
    x = alpha * x0 + sigma * noise
    with torch.no_grad():
        asked, unasked = (means(x, teacher(x, start, prompt, w), start) for prompt in (text, empty))
        clean, eps = (a + w.reshape(-1, 1, 1, 1) * (a - b) for a, b in zip(asked, unasked))
        alpha, sigma = level(end)
        wanted = f(target, alpha * clean + sigma * eps, end)
    difference = f(student, x, start) - wanted
    squares = difference.square()
    loss = squares.mean()
    if settings.loss_type == "huber":
        loss = ((squares + settings.huber_c**2).sqrt() - settings.huber_c).mean()
    return twin.LossAndValues(loss, {})


def caller(case: Case, unet: Any, *, guided: bool = False) -> Any:
    """A UNet as a function of channel-last arrays.

    The embedding of ``w`` is ours, since its angles, up to 15,000, have an error of 1e-4 in float32.
    """

    def call(x: Any, t: Any, text: Any, w: Any) -> Any:
        more: dict[str, Any] = {}
        if text.pooled is not None:
            more["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": torch.tensor(case.batch["time_ids"])}
        if guided:
            more["timestep_cond"] = torch.tensor(np.asarray(strength_embedding(jnp.asarray(w.numpy()), WIDTH)))
        return unet(x.permute(0, 3, 1, 2), t, text.states, **more).sample.permute(0, 2, 3, 1)

    return call


def test_the_embedding_is_that_of_pipelines(rng: np.random.Generator) -> None:
    w = rng.uniform(0, 15, 5).astype(np.float32)
    theirs = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor(w), WIDTH)
    np.testing.assert_allclose(strength_embedding(jnp.asarray(w), WIDTH), theirs, atol=2e-3)


@pytest.mark.parametrize(("save", "loss"), [(save_sd, "huber"), pytest.param(save_sdxl, "l2", marks=pytest.mark.slow)])
def test_a_whole_student_and_its_average(save: Any, loss: str, tmp_path: Path, rng: np.random.Generator) -> None:
    case = Case(save(tmp_path / "teacher", fresh=False), rng, ConsistencySettings(loss_type=loss, **WEAK))
    student = with_guidance(case.pipe, WIDTH)
    net, params = student.components["unet"], student.params["unet"]
    assert not np.any(params["time_embedding"]["cond_proj"]["kernel"]), "it predicts what the teacher does at first"
    fresh = initial_params(net.shapes(), 5, ())
    params = jax.tree.map(lambda x, r: x + 0.1 * jnp.asarray(r), params, fresh)
    average = jax.tree.map(lambda x, r: x - 0.1 * jnp.asarray(r), params, fresh)
    opened = {}
    for name, tree in {"student": params, "average": average}.items():
        net.save_pretrained(tmp_path / name, tree)
        opened[name] = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / name)
    frozen = {**case.frozen, AVERAGE: {"unet": average}}
    trained = training.Trained({"unet": params}, frozen, whole(networks(student)), training.named_parameters)
    case.theirs.register_modules(unet=opened["student"])
    parameters = twin.full_parameters(case.theirs, ["unet"])
    teacher = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "teacher", subfolder="unet")
    calls = (caller(case, opened[name], guided=True) for name in ("student", "average"))
    case.compare(trained, parameters, *calls, caller(case, teacher))


@pytest.mark.parametrize(("save", "loss"), [pytest.param(save_sd, "l2", marks=pytest.mark.slow), (save_sdxl, "huber")])
def test_low_rank_pairs_whose_target_is_themselves(
    save: Any, loss: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Steps are long, as those of a student that is its own target differ by little more than rounding otherwise."""
    pytest.importorskip("peft", reason="PyTorch diffusers loads LoRA through peft")
    case = Case(save(tmp_path, fresh=False), rng, ConsistencySettings(loss_type=loss, num_ddim_timesteps=5, **WEAK))
    trained = training.low_rank(case.pipe, ["unet"], rank=3, seed=0)
    trained = trained._replace(frozen=case.frozen, combine=with_lora(networks(case.pipe)))
    parameters = twin.low_rank_parameters(case.theirs, trained.trainable)
    teacher = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    student = caller(case, case.theirs.unet)
    case.compare(trained, parameters, student, student, caller(case, teacher))
    states = case.frozen[UNCONDITIONAL]["states"]
    assert np.any(states) == (save is save_sd), "SDXL's guidance takes zeros"


PROMPT = "two dogs, one hat"


def images_of(pipe: Any, theirs: Any, **call: Any) -> tuple[np.ndarray, np.ndarray]:
    """Four steps on both sides, from the same noise."""
    theirs.set_progress_bar_config(disable=True)
    call |= {"prompt": PROMPT, "num_inference_steps": 4, "output_type": "np", "height": SIZE, "width": SIZE}
    with torch.no_grad():
        wanted = theirs(generator=torch.Generator().manual_seed(3), **call).images
    return pipe(seed=3, noise="torch", **call).images, wanted


@pytest.mark.parametrize("save", [save_sd, pytest.param(save_sdxl, marks=pytest.mark.slow)])
def test_pytorch_samples_the_folder_of_a_student(save: Any, tmp_path: Path) -> None:
    """As the pipeline that its index names and, for SD, as diffusers' own of latent consistency models."""
    model = ModelSettings(pretrained_model_name_or_path=save(tmp_path / "teacher", fresh=False))
    teacher = open_pipeline(tmp_path / "teacher", trainable=("unet",), mesh=make_mesh(devices=jax.devices()[:1]))
    sampler = consistency_from(ConsistencySettings(num_ddim_timesteps=20), teacher).sampler
    student = with_guidance(teacher, WIDTH)
    params = initial_params(student.components["unet"].shapes(), 7, ())
    save_networks(student, tmp_path / "student", {"unet": params})
    save_rest(model, student, tmp_path / "student", ("unet",), sampler=sampler)
    pipe, theirs = (
        kind.from_pretrained(tmp_path / "student") for kind in (DiffusionPipeline, diffusers.DiffusionPipeline)
    )
    assert type(theirs).__name__ == type(pipe).__name__ == type(teacher).__name__
    assert type(theirs.scheduler).__name__ == "LCMScheduler"
    assert theirs.scheduler.config.original_inference_steps == 20
    ours, wanted = images_of(pipe, theirs, guidance_scale=7.5)
    require_same(pipe, ours, wanted, SAME)
    assert np.abs(ours - images_of(pipe, theirs, guidance_scale=12.0)[0]).max() > 1e-4
    if save is save_sd:
        lcm = diffusers.LatentConsistencyModelPipeline.from_pretrained(tmp_path / "student")
        kept = pipelines.LatentConsistencyModelPipeline.from_pretrained(tmp_path / "student")
        require_same(kept, *images_of(kept, lcm, guidance_scale=7.5), SAME)


def test_pytorch_samples_with_the_pairs(tmp_path: Path) -> None:
    """Those of every dense layer that has them by default."""
    pytest.importorskip("peft", reason="PyTorch diffusers loads LoRA through peft")
    pipe = DiffusionPipeline.from_pretrained(save_sdxl(tmp_path / "teacher", fresh=False))
    fresh = lora.init(pipe.components["unet"].shapes(), 4, jax.random.key(1), UNET_TARGETS)
    pairs = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) / 8, fresh)
    adapted = {path[-1] for path in lora.pairs_of(pairs)}
    assert adapted == {"to_q", "to_k", "to_v", "to_out_0", "proj_in", "proj_out", "proj", "net_2", "time_emb_proj"}
    save_lora(tmp_path / "lora", {"unet": pairs})
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    plain = pipe = pipe.replace(scheduler=LCMScheduler.from_config(pipe.scheduler))
    theirs.scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config)
    theirs.load_lora_weights(tmp_path / "lora")
    pipe = pipe.load_lora_weights(tmp_path / "lora")
    ours, wanted = images_of(pipe, theirs, guidance_scale=1.0)
    require_same(pipe, ours, wanted, SAME)
    again = plain(PROMPT, num_inference_steps=4, guidance_scale=1.0, seed=3, noise="torch", output_type="np",
                  height=SIZE, width=SIZE).images  # fmt: skip
    assert np.abs(ours - again).max() > 1e-3
