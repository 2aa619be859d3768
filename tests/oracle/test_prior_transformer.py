"""The prior of unCLIP models against PyTorch diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.models import PriorTransformer, PriorTransformerConfig
from tests.oracle import twins
from tests.oracle.comparisons import difference

torch = pytest.importorskip("torch")

from diffuse_jax.torch_backend.twins import CALLS  # noqa: E402

TOLERANCE = 1e-5

PRIORS: dict[str, dict[str, Any]] = {
    "unCLIP": {"num_embeddings": 7},
    "wider, with norms": {
        "num_embeddings": 7,
        "embedding_proj_dim": 20,
        "clip_embed_dim": 28,
        "time_embed_dim": 40,
        "time_embed_act_fn": "gelu",
        "norm_in_type": "layer",
        "embedding_proj_norm_type": "layer",
    },
    "several vectors, without text": {
        "num_embeddings": 6,
        "additional_embeddings": 0,
        "added_emb_type": None,
        "encoder_hid_proj_type": None,
        "embedding_proj_dim": 20,
        "embedding_proj_norm_type": "layer",
        "norm_in_type": "layer",
    },
}


def prior_twin(name: str, folder: Path) -> twins.Twin:
    small = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": 24}
    return twins.twin(twins.diffusers.PriorTransformer(**small, **PRIORS[name]), PriorTransformer, folder)


def inputs(config: PriorTransformerConfig, rng: np.random.Generator, masked: bool) -> dict[str, Any]:
    """A batch of two, whose prompts have different lengths."""
    normal = lambda *shape: rng.standard_normal((2, *shape)).astype(np.float32)
    several = () if config.added_emb_type else (config.num_embeddings,)
    given = {
        "hidden_states": normal(*several, config.embedding_dim),
        "timesteps": np.array([3.0, 701.0], np.float32),
        "proj_embedding": normal(config.embedding_proj_dim or config.embedding_dim),
    }
    if config.encoder_hid_proj_type:
        given["encoder_hidden_states"] = normal(config.num_embeddings, config.embedding_dim)
    if masked:
        given["attention_mask"] = np.arange(config.num_embeddings) < np.array([[3], [config.num_embeddings]])
    return given


CASES = [(name, False) for name in PRIORS] + [(name, True) for name in PRIORS if "without" not in name]


@pytest.mark.parametrize(("name", "masked"), CASES)
def test_the_prediction_equals_diffusers(name: str, masked: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    module, model, params = prior_twin(name, tmp_path)
    given = inputs(model.config, rng, masked)
    ours = jax.jit(lambda p, x: model.apply({"params": p}, **x))(params, given)
    with torch.no_grad():
        theirs = CALLS["PriorTransformer", "__call__"](module, **{k: torch.tensor(v) for k, v in given.items()})
    assert difference(ours, theirs.numpy()) <= TOLERANCE
    if masked:  # the mask and the order of tokens matter
        unmasked = model.apply(
            {"params": params}, **(given | {"attention_mask": np.ones_like(given["attention_mask"])})
        )
        assert np.abs(np.asarray(unmasked)[0] - np.asarray(ours)[0]).max() > 1e-3


def test_samples_become_embeddings_as_in_diffusers(tmp_path: Path, rng: np.random.Generator) -> None:
    module, model, params = prior_twin("unCLIP", tmp_path)
    sample = rng.standard_normal((2, 24)).astype(np.float32)
    ours = model.apply({"params": params}, sample, method="unnormalised")
    with torch.no_grad():
        theirs = module.post_process_latents(torch.tensor(sample))
    assert difference(ours, theirs.numpy()) <= TOLERANCE
    assert np.abs(np.asarray(ours) - sample).max() > 0.1


def test_a_saved_prior_opens_in_diffusers(tmp_path: Path) -> None:
    module, model, params = prior_twin("wider, with norms", tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", params)
    again = type(module).from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in module.state_dict().items())


def test_missing_and_wrong_inputs_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    _, model, params = prior_twin("unCLIP", tmp_path)
    given = inputs(model.config, rng, False)
    with pytest.raises(ValueError, match="needs encoder_hidden_states"):
        model.apply({"params": params}, **{k: v for k, v in given.items() if k != "encoder_hidden_states"})
    with pytest.raises(ValueError, match="10 tokens, but there are positions for 7 text tokens and 4 more"):
        model.apply({"params": params}, **(given | {"encoder_hidden_states": given["encoder_hidden_states"][:, :6]}))
    with pytest.raises(ValueError, match="added_emb_type='dot'; expected one of"):
        PriorTransformer(PriorTransformerConfig(added_emb_type="dot"))
