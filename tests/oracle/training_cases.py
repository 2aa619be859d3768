"""One training step of each latent trainer against PyTorch diffusers: the same weights, noise and timesteps.

Folders, LoRA files and learned words are opened by PyTorch as its users open them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.adapters import custom_diffusion as custom_file
from diffuse_jax.adapters import tokens
from diffuse_jax.models import ControlNetModel, T2IAdapter
from diffuse_jax.pipelines import AutoPipelineForText2Image
from diffuse_jax.sharding import make_mesh
from diffuse_jax.torch_backend import training
from diffuse_jax.torch_backend import training_torch as twin
from diffuse_jax.torch_backend.training_parity import TrainingRequest, resolution_for
from diffuse_jax.torch_backend.training_report import Compared
from diffuse_jax.training import custom
from diffuse_jax.training.control import ADAPTER, adapter_config, with_network
from diffuse_jax.training.data import Example
from diffuse_jax.training.editing import with_image_channels
from diffuse_jax.training.families import trained_family
from diffuse_jax.training.initial import initial_params
from diffuse_jax.training.latent import networks, open_pipeline, with_tokens
from diffuse_jax.training.objective import Objective
from diffuse_jax.training.settings import CustomSettings
from diffuse_jax.weights.names import flatten, to_torch
from tests.oracle import twins
from tests.oracle.training_steps import Steps
from tests.train.latent_models import MIDDLE, save_sd, save_sdxl

torch = twins.torch

WORD = "<cat>"
PROMPTS = ["a cat", "two dogs, one hat", "", "x"]


class Case:
    """A pipeline of each side, and ``count`` captioned images of the pipeline's size."""

    def __init__(
        self,
        folder: Path,
        rng: np.random.Generator,
        count: int,
        prior: bool = False,
        prompts: list[str] = PROMPTS,
    ) -> None:
        self.pipe = open_pipeline(folder, trainable=(), mesh=make_mesh(devices=jax.devices()[:1]))
        self.theirs = twin.open_reference(folder, trainable=(), device="cpu")
        self.objective = Objective(scheduler=self.pipe.scheduler, snr_gamma=5.0, prior_loss_weight=0.7)
        self.prompts = [prompts[i % len(prompts)] for i in range(count)]
        self.prior = np.arange(count) % 2 == 1 if prior else None
        self.size = resolution_for(self.pipe, TrainingRequest())
        self.images = rng.integers(0, 256, (count, self.size, self.size, 3), np.uint8)
        self.kept: list[bool | None] = [None] * count
        self.mask: np.ndarray | None = None
        self.sizes = rng.integers(self.size, 1024, (count, 2))

    @property
    def names(self) -> list[str]:
        """What is trained: all but the autoencoder."""
        return [name for name in self.pipe.params if name != "vae"]

    def batch(self) -> dict[str, np.ndarray]:
        size, rows = (self.size, self.size), zip(self.images, self.prompts, self.sizes.tolist(), self.kept, strict=True)
        reads = {"controlnet", "adapter"} & {*self.pipe.components} or "InstructPix2Pix" in type(self.pipe).__name__
        control = self.images[::-1] if reads else [None] * len(self.images)
        examples = [
            Example(x, text, tuple(own), (1, 2), size, 0, 0, "", image, kept)
            for (x, text, own, kept), image in zip(rows, control, strict=True)
        ]
        made = training.batch_of(self.pipe, examples)
        more = {"prior": self.prior, "loss_mask": self.mask}
        return made | {name: array for name, array in more.items() if array is not None}

    def steps(self, trained: training.Trained, parameters: twin.Parameters) -> Steps:
        """Our step and PyTorch's."""
        batch, theirs, objective = self.batch(), self.theirs, self.objective
        loss = training.recording_loss(trained_family(self.pipe), trained.combine, objective)
        torch_loss = lambda: twin.text_to_image_loss(theirs, objective, batch, 0)
        return Steps(loss, trained, batch, parameters, torch_loss)


def full(
    folder: Path, rng: np.random.Generator, save: Any, count: int = 4, prior: bool = False, names: Any = None
) -> Steps:
    """Full fine-tuning of the UNet and the text encoders, or of what is named."""
    case = Case(save(folder, fresh=False), rng, count, prior)
    names = names or case.names
    return case.steps(training.full(case.pipe, names), twin.full_parameters(case.theirs, names))


def low_rank(
    folder: Path, rng: np.random.Generator, save: Any, count: int = 4, prior: bool = False, names: Any = None
) -> Steps:
    """Low-rank pairs of all networks, or of those named, from a file that PyTorch opens."""
    case = Case(save(folder, fresh=False), rng, count, prior)
    trained = training.low_rank(case.pipe, names or case.names, rank=3, seed=0)
    return case.steps(trained, twin.low_rank_parameters(case.theirs, trained.trainable))


def inversion(folder: Path, rng: np.random.Generator, save: Any = save_sd, count: int = 4) -> Steps:
    """The rows of a new word, from a file that PyTorch opens."""
    case = Case(save(folder, fresh=False), rng, count, prompts=[f"a {WORD}", f"{WORD}, one hat", WORD, "x"])
    width = case.pipe.components["text_encoder"].config.hidden_size
    rows = jnp.asarray(rng.standard_normal((2, width)), jnp.float32) / 4
    case.theirs.load_textual_inversion(tokens.save_rows(folder / tokens.FILE, WORD, rows))
    tokenizer = tokens.with_words(case.pipe.components["tokenizer"], WORD, 2)
    encoder = tokens.with_rows(case.pipe.components["text_encoder"], case.pipe.params["text_encoder"], rows)
    case.pipe = case.pipe.replace(tokenizer=tokenizer, text_encoder=encoder)

    expanded = [case.theirs.maybe_convert_prompt(prompt, case.theirs.tokenizer) for prompt in case.prompts]
    wanted = case.batch()["text_encoder"]
    ids = case.theirs.tokenizer(expanded, padding="max_length", truncation=True, max_length=wanted.shape[1]).input_ids
    np.testing.assert_array_equal(ids, wanted)
    embedding = case.theirs.text_encoder.get_input_embeddings()
    table = torch.nn.Parameter(embedding.weight[-2:].detach().clone())
    embedding.forward = (
        lambda ids: torch.nn.functional.embedding(  # the two rows alone are a parameter
            ids, torch.cat([embedding.weight.detach()[:-2], table])
        )
    )
    named = lambda tree: {"rows": np.asarray(tree["text_encoder"])}
    trainable, frozen = {"text_encoder": rows}, dict(case.pipe.params)
    trained = training.Trained(trainable, frozen, with_tokens(networks(case.pipe)), named)
    return case.steps(trained, {"rows": table})


def custom_diffusion(folder: Path, rng: np.random.Generator, save: Any = save_sd, count: int = 4) -> Steps:
    """New projections of the cross-attention, from a file that PyTorch opens, and the rows of two new words; with prior
    preservation and a mask."""
    words = ["<c>", "<h>"]
    prompts = ["a <c>", "cat", "<h>, <c>", "hat"]
    case = Case(save(folder, fresh=False), rng, count, prior=True, prompts=prompts)
    settings = CustomSettings(
        instance_data_dir="cats", instance_prompt="a", modifier_token="+".join(words), initializer_token="a+b",
        freeze_model="crossattn",
    )  # fmt: skip
    case.pipe, trainable = custom.with_concepts(settings, case.pipe)
    trainable = jax.tree.map(lambda x: x + rng.standard_normal(x.shape).astype(np.float32) / 8, trainable)
    custom.save_custom(settings, case.pipe, folder, trainable)
    case.theirs.unet.load_attn_procs(folder, weight_name=custom_file.FILE, _pipeline=case.theirs)
    for word in words:
        case.theirs.load_textual_inversion(folder, weight_name=f"{word}.safetensors")
    side = case.size // case.pipe.components["vae"].config.scale
    case.mask = rng.uniform(0, 1, (count, side, side)).astype(np.float32)
    case.mask[:2] = case.mask[:2] > 0.5

    embedding = case.theirs.text_encoder.get_input_embeddings()
    table = torch.nn.Parameter(embedding.weight[-2:].detach().clone())
    embedding.forward = lambda ids: torch.nn.functional.embedding(
        ids, torch.cat([embedding.weight.detach()[:-2], table])
    )
    named = lambda tree: (
        {"rows": np.asarray(tree["text_encoder"])}
        | {custom_file.key_of(path): to_torch(path, np.asarray(leaf)) for path, leaf in flatten(tree["unet"]).items()}
    )
    parameters = {"rows": table}
    for name, processor in case.theirs.unet.attn_processors.items():
        parameters |= {f"{name}.{key}": value for key, value in processor.named_parameters()}
    trained = training.Trained(trainable, dict(case.pipe.params), custom.with_attention(networks(case.pipe)), named)
    return case.steps(trained, parameters)


def controlnet(folder: Path, rng: np.random.Generator, save: Any, count: int = 4) -> Steps:
    """All parameters of a ControlNet, whose folder PyTorch opens; none is zero, so all of them have gradients."""
    case = Case(save(folder, fresh=False, middle=MIDDLE), rng, count)
    unet, params = case.pipe.components["unet"], case.pipe.params["unet"]
    net, _ = ControlNetModel.from_unet(unet, params, conditioning_embedding_out_channels=(4, 8))
    params = initial_params(net.shapes(), 1, ())
    net.save_pretrained(folder / "controlnet", params)
    case.pipe = AutoPipelineForText2Image.from_pipe(case.pipe, controlnet=(net, params))
    case.theirs.controlnet = twins.diffusers.ControlNetModel.from_pretrained(folder / "controlnet")
    names = ["controlnet"]
    return case.steps(training.full(case.pipe, names), twin.full_parameters(case.theirs, names))


def t2i_adapter(folder: Path, rng: np.random.Generator, save: Any, count: int = 4) -> Steps:
    """All parameters of a T2I-Adapter, whose folder PyTorch opens."""
    case = Case(save(folder, fresh=False), rng, count)
    net = T2IAdapter(adapter_config(case.pipe.components["unet"].config, case.pipe.components["vae"].config.scale))
    params = initial_params(net.shapes(), 1, ())
    net.save_pretrained(folder / "adapter", params)
    case.pipe = with_network(ADAPTER, case.pipe, adapter=(net, params))
    case.theirs.adapter = twins.diffusers.T2IAdapter.from_pretrained(folder / "adapter")
    names = ["adapter"]
    return case.steps(training.full(case.pipe, names), twin.full_parameters(case.theirs, names))


def instruct_pix2pix(folder: Path, rng: np.random.Generator, save: Any, count: int = 4) -> Steps:
    """A UNet that also reads the latents of images, of which two are dropped; PyTorch opens the folder as its own."""
    case = Case(save(folder / "base", fresh=False), rng, count)
    case.pipe = with_image_channels(case.pipe)
    net = case.pipe.components["unet"]
    case.pipe = case.pipe.replace(unet=(net, initial_params(net.shapes(), 1, ())))  # none is zero: all have gradients
    case.pipe.save_pretrained(folder / "edit")
    case.theirs = twin.open_reference(folder / "edit", trainable=(), device="cpu")
    assert type(case.theirs).__name__ == type(case.pipe).__name__
    case.kept = [i % 4 in (0, 3) for i in range(count)]
    names = ["unet"]
    return case.steps(training.full(case.pipe, names), twin.full_parameters(case.theirs, names))


STEPS: dict[str, Callable[[Path, np.random.Generator], Steps]] = {
    "text to image, SD": functools.partial(full, save=save_sd),
    "text to image, SDXL": functools.partial(full, save=save_sdxl),
    "text to image with LoRA, SD": functools.partial(low_rank, save=save_sd),
    "text to image with LoRA, SDXL": functools.partial(low_rank, save=save_sdxl),
    "DreamBooth with prior preservation": functools.partial(full, save=save_sd, prior=True),
    "DreamBooth with LoRA and prior preservation, SDXL": functools.partial(low_rank, save=save_sdxl, prior=True),
    "textual inversion": inversion,
    "Custom Diffusion with prior preservation and a mask": custom_diffusion,
    "T2I-Adapter, SD": functools.partial(t2i_adapter, save=save_sd),
    "T2I-Adapter, SDXL": functools.partial(t2i_adapter, save=save_sdxl),
    "InstructPix2Pix, SD": functools.partial(instruct_pix2pix, save=save_sd),
    "InstructPix2Pix, SDXL": functools.partial(instruct_pix2pix, save=save_sdxl),
    "ControlNet, SD": functools.partial(controlnet, save=save_sd),
    "ControlNet, SDXL": functools.partial(controlnet, save=save_sdxl),
}
"""One training step of each trainer, by its name in the documentation."""


def compared(make: Callable[[Path, np.random.Generator], Steps], folder: Path, rng: np.random.Generator) -> Compared:
    """The comparison of a step."""
    return make(folder, rng).compared()


CASES = {name: functools.partial(compared, make) for name, make in STEPS.items()}
