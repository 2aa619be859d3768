"""One update of each latent trainer against PyTorch diffusers: the same weights, noise and timesteps.

Folders, LoRA files and learned words are opened by PyTorch as its users open them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.adapters import lora, tokens
from diffuse_jax.adapters.lora_file import save_lora
from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.latent import (
    ENCODERS,
    loss_of,
    networks,
    open_pipeline,
    tokenizers_of,
    whole,
    with_lora,
    with_tokens,
)
from diffuse_jax.training.latent import token_ids as ids_of
from diffuse_jax.training.objective import Objective, draw
from diffuse_jax.training.optimizer import make_optimizer
from diffuse_jax.training.state import init_state, make_step
from diffuse_jax.weights.names import flatten, to_torch, torch_key
from tests.oracle import twins
from tests.train.latent_models import SIZE, save_sd, save_sdxl

torch, diffusers = twins.torch, twins.diffusers

RATE, BATCH, WORD = 1e-3, 4, "<cat>"
PROMPTS = ["a cat", "two dogs, one hat", "", "x"]


class Case:
    """A pipeline of each side, a batch, and the random numbers that our step will draw for it."""

    def __init__(
        self, folder: Path, rng: np.random.Generator, prior: bool = False, prompts: list[str] = PROMPTS
    ) -> None:
        self.folder, self.prompts = folder, prompts
        self.pipe = open_pipeline(folder, trainable=("unet", "text_encoder", "text_encoder_2"), mesh=one_device())
        self.theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
        self.objective = Objective(scheduler=self.pipe.scheduler, snr_gamma=5.0, prior_loss_weight=0.7)
        self.batch = {"pixel_values": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)}
        if self.xl:
            self.batch["time_ids"] = rng.integers(0, 1024, (BATCH, 6)).astype(np.float32)
        if prior:
            self.batch["prior"] = np.array([False, True] * (BATCH // 2))

    @property
    def xl(self) -> bool:
        return "text_encoder_2" in self.pipe.components

    def update(self, combine: Any, trainable: Any, frozen: Any) -> tuple[Any, float]:
        """What our step trains to, and its loss."""
        words = {
            name: np.stack([ids_of(*own, p) for p in self.prompts]) for name, own in tokenizers_of(self.pipe).items()
        }
        self.batch |= words
        optimizer = make_optimizer("adamw", lambda _: RATE, weight_decay=0.01)
        step = make_step(loss_of(self.pipe, combine, self.objective), optimizer, seed=0)
        batch = jax.tree.map(lambda x: x[None], self.batch)
        state, metrics = step(init_state(trainable, optimizer, use_ema=False), frozen, batch)
        return state.params, float(metrics["loss"])

    def torch_loss(self, pipe: Any) -> Any:
        """The loss of a PyTorch pipeline, from its modules, with our noise and timesteps."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)
        k_latent, k_draw = jax.random.split(key)
        first = lambda x: torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())
        posterior = pipe.vae.encode(first(self.batch["pixel_values"].astype(np.float32) / 127.5 - 1)).latent_dist
        shape = tuple(np.moveaxis(posterior.mean.detach().numpy(), 1, -1).shape)
        eps = first(jax.random.normal(k_latent, shape))
        x0 = (posterior.mean + posterior.std * eps) * pipe.vae.config.scaling_factor
        drawn = draw(self.objective, k_draw, jnp.zeros(shape))
        noise, t = first(drawn.noise), torch.tensor(np.asarray(drawn.t)).long()
        scheduler = diffusers.DDPMScheduler.from_pretrained(self.folder, subfolder="scheduler")
        states, added = self.torch_text(pipe)
        more = {"added_cond_kwargs": added} if added else {}
        prediction = pipe.unet(scheduler.add_noise(x0, noise, t), t, states, **more).sample
        error = (prediction - scheduler.get_velocity(x0, noise, t)).square().mean((1, 2, 3))
        s = diffusers.training_utils.compute_snr(scheduler, t) + 1
        error = error * torch.minimum(s, torch.full_like(s, 5.0)) / s
        if "prior" not in self.batch:
            return error.mean()
        prior = torch.tensor(self.batch["prior"])
        return error[~prior].mean() + 0.7 * error[prior].mean()

    def torch_text(self, pipe: Any) -> tuple[Any, Any]:
        ids = {name: torch.tensor(self.batch[name]).long() for name in ENCODERS[type(self.pipe)][0]}
        if not self.xl:
            return pipe.text_encoder(ids["text_encoder"])[0], None
        out = [getattr(pipe, name)(ids[name], output_hidden_states=True) for name in ids]
        states = torch.cat([o.hidden_states[-2] for o in out], -1)
        return states, {"text_embeds": out[1][0], "time_ids": torch.tensor(self.batch["time_ids"])}


def one_device() -> Any:
    return make_mesh(devices=jax.devices()[:1])


def torch_update(loss: Any, parameters: list[Any]) -> float:
    """One clipped update of AdamW, as PyTorch's scripts make it."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01).step()
    return float(loss.detach())


def largest_difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, Any]) -> float:
    """Of trained numbers by PyTorch key. Where a gradient is all rounding, Adam may step to either side: left out."""
    assert set(ours) == set(theirs)
    differences = []
    for key, value in theirs.items():
        settled = np.abs(value.grad.numpy()) > 1e-6
        differences.append(np.abs(ours[key][settled] - value.detach().numpy()[settled]).max(initial=0.0))
    return float(max(differences))


def by_key(params: Any) -> dict[str, np.ndarray]:
    return {torch_key(path): np.asarray(to_torch(path, leaf)) for path, leaf in flatten(params).items()}


class Errors(NamedTuple):
    """How far one update is from PyTorch's: the loss, relative; what was trained, absolute."""

    loss: float
    parameters: float


def relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs)


def full(folder: Path, rng: np.random.Generator, save: Any, prior: bool = False) -> Errors:
    """Full fine-tuning of the UNet and the text encoders."""
    case = Case(save(folder, fresh=False), rng, prior)
    names = [name for name in case.pipe.params if name != "vae"]
    trainable = {name: case.pipe.params[name] for name in names}
    trained, loss = case.update(whole(networks(case.pipe)), trainable, {"vae": case.pipe.params["vae"]})

    modules = {name: getattr(case.theirs, name) for name in names}
    parameters = [p for module in modules.values() for p in module.parameters()]
    off = relative(loss, torch_update(case.torch_loss(case.theirs), parameters))
    worst = 0.0
    for name, module in modules.items():
        used = {key: p for key, p in module.named_parameters() if p.grad is not None}
        prefix = "" if name == "unet" or any(key.startswith("text_model") for key in used) else "text_model."
        theirs = {key if key.startswith("text_projection") else prefix + key: p for key, p in used.items()}
        ours = {key: value for key, value in by_key(trained[name]).items() if key in theirs}
        worst = max(worst, largest_difference(ours, theirs))
    return Errors(off, worst)


def low_rank(folder: Path, rng: np.random.Generator, save: Any, prior: bool = False) -> Errors:
    """Low-rank pairs of all networks, from a file that PyTorch opens."""
    case = Case(save(folder, fresh=False), rng, prior)
    names = [name for name in case.pipe.params if name != "vae"]
    fresh = {name: lora.init(case.pipe.components[name].shapes(), 3, jax.random.key(0)) for name in names}
    pairs = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32) / 8, fresh)
    file = save_lora(folder / "lora", pairs)
    case.theirs.load_lora_weights(file.parent, adapter_name="own")
    trained, loss = case.update(with_lora(networks(case.pipe)), pairs, dict(case.pipe.params))

    theirs = {}
    for name in names:
        for key, p in getattr(case.theirs, name).named_parameters():
            p.requires_grad_("lora_" in key)
            if "lora_" in key:
                theirs[f"{name} {key.removeprefix('text_model.')}".replace(".own.weight", "")] = p
    off = relative(loss, torch_update(case.torch_loss(case.theirs), list(theirs.values())))
    ours = {}
    for name, tree in trained.items():
        for path, pair in lora.pairs_of(tree).items():
            stem = f"{name} " + torch_key((*path, "kernel")).removesuffix(".weight").removeprefix("text_model.")
            ours |= {f"{stem}.lora_{half}": np.asarray(pair[own]).T for half, own in (("A", "down"), ("B", "up"))}
    used = {key: p for key, p in theirs.items() if p.grad is not None}  # SDXL leaves the last layer of an encoder out
    assert len(used) > len(theirs) / 2
    return Errors(off, largest_difference({key: ours[key] for key in used}, used))


def inversion(folder: Path, rng: np.random.Generator) -> Errors:
    """The rows of a new word, from a file that PyTorch opens."""
    case = Case(save_sd(folder, fresh=False), rng, prompts=[f"a {WORD}", f"{WORD}, one hat", WORD, "x"])
    rows = jnp.asarray(rng.standard_normal((2, 16)), jnp.float32) / 4
    case.theirs.load_textual_inversion(tokens.save_rows(folder / tokens.FILE, WORD, rows))
    tokenizer = tokens.with_words(case.pipe.components["tokenizer"], WORD, 2)
    encoder = tokens.with_rows(case.pipe.components["text_encoder"], case.pipe.params["text_encoder"], rows)
    case.pipe = case.pipe.replace(tokenizer=tokenizer, text_encoder=encoder)
    trained, loss = case.update(with_tokens(networks(case.pipe)), {"text_encoder": rows}, dict(case.pipe.params))

    spelled = [case.theirs.maybe_convert_prompt(prompt, case.theirs.tokenizer) for prompt in case.prompts]
    length = case.batch["text_encoder"].shape[1]
    ids = case.theirs.tokenizer(spelled, padding="max_length", truncation=True, max_length=length).input_ids
    np.testing.assert_array_equal(ids, case.batch["text_encoder"])
    embedding = case.theirs.text_encoder.get_input_embeddings()
    table = torch.nn.Parameter(embedding.weight[-2:].detach().clone())
    embedding.forward = (
        lambda ids: torch.nn.functional.embedding(  # the two rows alone are a parameter
            ids, torch.cat([embedding.weight.detach()[:-2], table])
        )
    )
    off = relative(loss, torch_update(case.torch_loss(case.theirs), [table]))
    return Errors(off, largest_difference({"rows": np.asarray(trained["text_encoder"])}, {"rows": table}))


CASES: dict[str, Callable[[Path, np.random.Generator], Errors]] = {
    "text to image, SD": functools.partial(full, save=save_sd),
    "text to image, SDXL": functools.partial(full, save=save_sdxl),
    "text to image with LoRA, SD": functools.partial(low_rank, save=save_sd),
    "text to image with LoRA, SDXL": functools.partial(low_rank, save=save_sdxl),
    "DreamBooth with prior preservation": functools.partial(full, save=save_sd, prior=True),
    "DreamBooth with LoRA and prior preservation, SDXL": functools.partial(low_rank, save=save_sdxl, prior=True),
    "textual inversion": inversion,
}
"""One update of each trainer, by what the documentation calls it."""
