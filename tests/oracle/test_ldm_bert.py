"""The text encoder of latent diffusion against PyTorch diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.text import LDMBertConfig, LDMBertModel
from tests.oracle import twins
from tests.oracle.comparisons import TOLERANCE, difference

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")

SMALL = {
    "vocab_size": 50,
    "max_position_embeddings": 12,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_ffn_dim": 40,
    "encoder_attention_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize("changes", [{}, {"activation_function": "relu", "head_dim": 16}])
def test_output_equals_pytorch(changes: dict[str, Any], tmp_path: Path, rng: np.random.Generator) -> None:
    module = theirs.LDMBertModel(theirs.LDMBertConfig(**SMALL | changes))
    module, model, params = twins.twin(module, LDMBertModel, tmp_path / "theirs")
    ids = rng.integers(0, 50, (2, 9)).astype(np.int32)
    run = jax.jit(lambda *given: model.apply({"params": params}, *given).last_hidden_state)
    with torch.no_grad():
        wanted = module(torch.tensor(ids)).last_hidden_state.numpy()
    assert difference(run(ids), wanted) <= TOLERANCE
    model.save_pretrained(tmp_path / "ours", params)
    again = theirs.LDMBertModel.from_pretrained(tmp_path / "ours").state_dict()
    before = module.state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(before[key], again[key]) for key in before)


def test_masked_tokens_have_no_weight(tmp_path: Path, rng: np.random.Generator) -> None:
    """PyTorch's masked output is that of the shorter text, on the tokens that are not masked."""
    module = theirs.LDMBertModel(theirs.LDMBertConfig(**SMALL))
    module, model, params = twins.twin(module, LDMBertModel, tmp_path)
    ids, mask = rng.integers(0, 50, (1, 9)).astype(np.int32), np.arange(9)[None] < 5
    ours = model.apply({"params": params}, ids, mask).last_hidden_state
    with torch.no_grad():
        wanted = module(torch.tensor(ids[:, :5])).last_hidden_state.numpy()
    assert difference(ours[:, :5], wanted) <= TOLERANCE


def test_wrong_settings_and_shapes_are_refused() -> None:
    settings = theirs.LDMBertConfig(**SMALL).to_dict()
    assert not LDMBertConfig.from_json(settings).unknown()
    with pytest.raises(ValueError, match="activation_function='tanh'; expected one of"):
        LDMBertConfig.from_json(settings | {"activation_function": "tanh"})
    with pytest.raises(ValueError, match="got model_type='bert'"):
        LDMBertConfig.from_json(settings | {"model_type": "bert"})
    model = LDMBertModel(LDMBertConfig.from_json(settings))
    with pytest.raises(ValueError, match="L up to 12, got \\(1, 13\\)"):
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 13), np.int32))
