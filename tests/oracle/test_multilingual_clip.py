"""M-CLIP, the text encoder of Kandinsky 2.1, against PyTorch diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.text import MultilingualCLIP, MultilingualCLIPConfig
from tests.oracle import twins
from tests.oracle.comparisons import TOLERANCE, difference

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("diffusers.pipelines.kandinsky.text_encoder")

from diffuse_jax.torch_backend.twins import CALLS  # noqa: E402

SMALL = {
    "transformerDimSize": 24,
    "imageDimSize": 20,
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}


@pytest.mark.parametrize("changes", [{}, {"pad_token_id": 3, "type_vocab_size": 1, "hidden_act": "relu"}])
def test_output_equals_pytorch(changes: dict[str, Any], tmp_path: Path, rng: np.random.Generator) -> None:
    """Texts of several lengths: padding has no weight in attention or mean, and shifts no position."""
    module = theirs.MultilingualCLIP(theirs.MCLIPConfig(**SMALL | changes))
    module, model, params = twins.twin(module, MultilingualCLIP, tmp_path / "theirs")
    mask = np.arange(8)[None] < np.array([[8], [3], [5]])
    ids = np.where(mask, rng.integers(4, 50, (3, 8)), model.config.pad_token_id).astype(np.int32)
    run = jax.jit(lambda *given: model.apply({"params": params}, *given))
    with torch.no_grad():
        embeds, states = module(torch.tensor(ids), torch.tensor(mask.astype(int)))
    ours = run(ids, mask)
    assert difference(ours.text_embeds, embeds.numpy()) <= TOLERANCE
    assert difference(ours.last_hidden_state[mask], states.numpy()[mask]) <= TOLERANCE
    backend = CALLS["MultilingualCLIP", "__call__"](module, torch.tensor(ids), torch.tensor(mask))
    assert torch.equal(backend.text_embeds, embeds) and torch.equal(backend.last_hidden_state, states)
    assert difference(run(ids[:1]).text_embeds, embeds[:1].numpy()) <= TOLERANCE, "without a mask all tokens count"
    model.save_pretrained(tmp_path / "ours", params)
    again = theirs.MultilingualCLIP.from_pretrained(tmp_path / "ours")
    assert again.config.numDims == 20
    before, after = module.state_dict(), again.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "tanh"}, "hidden_act='tanh'; expected one of"),
        ({"model_type": "xlm-roberta"}, "expected model_type='M-CLIP', got 'xlm-roberta'"),
        ({"num_attention_heads": 5}, "hidden_size 24 is not divisible by num_attention_heads 5"),
        ({"transformerDimensions": 32}, "transformerDimensions=32 must be hidden_size, 24"),
        ({"pad_token_id": 11}, "pad_token_id must be a token of the vocabulary"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    settings = theirs.MCLIPConfig(**SMALL).to_dict()
    assert not MultilingualCLIPConfig.from_json(settings).unknown()
    with pytest.raises(ValueError, match=message):
        MultilingualCLIPConfig.from_json(settings | changes)


@pytest.mark.parametrize(
    ("shapes", "message"), [([(1, 11)], "L up to 10, got"), ([(1, 4), (1, 5)], r"must be \(1, 4\), as input_ids")]
)
def test_wrong_shapes_are_refused(shapes: list[tuple[int, int]], message: str) -> None:
    model = MultilingualCLIP(MultilingualCLIPConfig.from_json(theirs.MCLIPConfig(**SMALL).to_dict()))
    given = [jax.ShapeDtypeStruct(shape, np.int32) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), *given)
