"""Würstchen in PyTorch, small and with random weights. diffusers 0.42 has its classes in ``deprecated``, and does not
open a folder with them again, so pipelines are made of parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
from diffusers.pipelines.deprecated import wuerstchen as theirs  # noqa: E402

from tests.oracle import twins  # noqa: E402

torch, diffusers, transformers = folders.torch, folders.diffusers, folders.transformers

PRIOR = {"c_in": 4, "c": 16, "c_cond": 32, "c_r": 8, "depth": 2, "nhead": 2}
DECODER = {
    "c_hidden": [8, 16, 16],
    "nhead": [-1, 2, 4],
    "blocks": [1, 2, 1],
    "level_config": ["CT", "CTA", "CTA"],
    "inject_effnet": [False, True, True],
    "c_cond": 12,
    "clip_embd": 32,
    "effnet_embd": 4,
    "c_r": 9,
}
SHALLOW = DECODER | {
    "c_hidden": [8, 16],
    "nhead": [-1, 2],
    "blocks": [1, 1],
    "level_config": ["CT", "CTA"],
    "inject_effnet": [False, True],
}
VQ = {"embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 16, "latent_channels": 4}


def network(kind: str, config: dict[str, Any]) -> Any:
    """The prior or the decoder. Both divide by a scale that they predict; it is kept away from zero, where PyTorch's
    own rounding is as large as the result."""
    module = getattr(theirs, kind)(**config)
    last = (twins.randomise(module).out if kind == "WuerstchenPrior" else module.clf)[1]
    half = last.out_channels // 2
    last.weight.data[half:] *= 0.2
    last.bias.data[half:] *= 0.2
    return module.eval()


def vqgan(**changes: Any) -> Any:
    """The autoencoder with statistics that are not those of a new one."""
    module = twins.randomise(theirs.PaellaVQModel(**VQ | changes))
    norm = module.down_blocks[-1][1]
    norm.running_mean.copy_(torch.linspace(-0.3, 0.4, len(norm.running_mean)))
    norm.running_var.copy_(torch.linspace(0.4, 2.0, len(norm.running_var)))
    return module


def text_parts() -> dict[str, Any]:
    """A text encoder and its tokenizer."""
    tokenizer = folders.tokenizer()
    encoder = folders.lively(transformers.CLIPTextModel(folders.text_config(tokenizer)))
    return {"tokenizer": tokenizer, "text_encoder": encoder, "scheduler": diffusers.DDPMWuerstchenScheduler()}


def prior_pipeline(folder: Path) -> Any:
    """The first stage, saved to a folder too."""
    torch.manual_seed(0)
    prior = network("WuerstchenPrior", PRIOR)
    return saved(theirs.WuerstchenPriorPipeline(prior=prior, **text_parts()), folder)


def decoder_pipeline(folder: Path) -> Any:
    """The second stage, saved to a folder too."""
    torch.manual_seed(1)
    decoder = network("WuerstchenDiffNeXt", SHALLOW)
    return saved(
        theirs.WuerstchenDecoderPipeline(decoder=decoder, vqgan=vqgan(), latent_dim_scale=8.0, **text_parts()), folder
    )


def combined_pipeline(folder: Path) -> Any:
    """Both stages, saved to a folder too, whose settings of the decoder are not those that diffusers assumes."""
    prior = prior_pipeline(folder.with_name("prior"))
    decoder = decoder_pipeline(folder.with_name("decoder"))
    first = {f"prior_{name}": part for name, part in prior.components.items()}
    pipe = saved(theirs.WuerstchenCombinedPipeline(**first, **decoder.components), folder)
    pipe.prior_pipe, pipe.decoder_pipe = prior, decoder
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"latent_dim_scale": 8.0}))
    return pipe


def saved(pipe: Any, folder: Path) -> Any:
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
