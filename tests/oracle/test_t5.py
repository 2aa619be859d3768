"""T5's encoder against PyTorch transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.text import T5Config, T5EncoderModel
from diffuse_jax.text.t5 import buckets
from diffuse_jax.text.tokenizer import open_tokenizer
from diffuse_jax.weights import WeightsError
from tests.oracle import twins
from tests.oracle.comparisons import TOLERANCE, difference

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
numpy = pytest.importorskip("safetensors.numpy")

SMALL = {"vocab_size": 50, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "1.1": SMALL | {"feed_forward_proj": "gated-gelu"},
    "1.0, few buckets": SMALL
    | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "layer_norm_epsilon": 1e-3},
}


def twin(name: str, folder: Path) -> Any:
    return twins.twin(transformers.T5EncoderModel(transformers.T5Config(**CONFIGS[name])), T5EncoderModel, folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_output_equals_pytorch(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    module, model, params = twin(name, tmp_path)
    ids = rng.integers(0, 50, (2, 40)).astype(np.int32)
    mask = np.arange(40)[None] < np.array([[40], [7]])
    run = jax.jit(lambda *given: model.apply({"params": params}, *given).last_hidden_state)
    for given in ((ids,), (ids, mask)):
        with torch.no_grad():
            theirs = module(*(torch.tensor(array) for array in given)).last_hidden_state.numpy()
        assert difference(run(*given), theirs) <= TOLERANCE
    assert difference(run(ids), run(ids, mask)) > 100 * TOLERANCE, "the mask has no weight"


def test_buckets_equal_those_of_pytorch() -> None:
    config = T5Config()
    at = np.arange(400)
    attention = transformers.models.t5.modeling_t5.T5Attention
    theirs = attention._relative_position_bucket(torch.tensor(at[None] - at[:, None])).numpy()
    np.testing.assert_array_equal(buckets(config, 400), theirs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_does_not_overflow(dtype: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """The feed-forward layers of the large sizes add up to more than float16 can hold."""
    _, model, params = twin("1.1", tmp_path)
    params["encoder"]["block_0"]["layer_1"]["DenseReluDense"]["wo"]["kernel"] *= 1e6
    ids = rng.integers(0, 50, (2, 9)).astype(np.int32)
    exact = model.apply({"params": params}, ids).last_hidden_state
    half = model.clone(dtype=jnp.dtype(dtype)).apply({"params": params}, ids).last_hidden_state
    assert half.dtype == dtype
    assert difference(half, exact) < (0.01 if dtype == "float16" else 0.08)


def test_a_file_with_the_embedding_twice_opens(tmp_path: Path) -> None:
    twin("1.1", tmp_path)
    (file,) = tmp_path.rglob("model.safetensors")
    tensors = numpy.load_file(file)
    numpy.save_file(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].copy()}, file)
    T5EncoderModel.from_pretrained(file.parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu'; expected one of"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"model_type": "umt5"}, "got model_type='umt5'"),
        ({"relative_attention_num_buckets": 5}, "must be even"),
    ],
)
def test_other_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        T5Config.from_json({**transformers.T5Config().to_dict(), **changes})


def test_every_setting_is_known() -> None:
    config = T5Config.from_json(transformers.T5Config(feed_forward_proj="gated-gelu").to_dict())
    assert not config.unknown()


def test_tokenizer_opens(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    found = open_tokenizer("T5TokenizerFast", tmp_path)
    assert found(["a cat"], padding="max_length", max_length=6)["input_ids"][0][-1] == 0
    with pytest.raises(WeightsError, match=r"spiece\.model"):
        open_tokenizer("T5Tokenizer", write_empty(tmp_path / "empty"))


def tokenizer(folder: Path) -> None:
    words = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{w}" for w in ("a", "cat", "red", "x"))]
    vocabulary = [(word, -float(i)) for i, word in enumerate(words)]
    transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)


def write_empty(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    return folder
