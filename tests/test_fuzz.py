"""A thousand damaged files of all kinds: each opens or is refused by name, quickly, in little memory, and runs nothing.

The seed files are generated. ``make fuzz`` tries more: ``DIFFUSE_JAX_FUZZ`` is the number of files, and
``DIFFUSE_JAX_TEST_SEED`` begins elsewhere.
"""

from __future__ import annotations

import json
import os
import random
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np
import pytest
import yaml

from diffuse_jax.adapters import tokens
from diffuse_jax.adapters.lora_file import load_lora
from diffuse_jax.schedulers import DPMSolverMultistepScheduler, Scheduler
from diffuse_jax.text import CLIPTextConfig, CLIPTextModel
from diffuse_jax.training.configuration import read_config
from diffuse_jax.weights import match, read_checkpoint, read_index, write_index
from diffuse_jax.weights.files import shards
from diffuse_jax.weights.safetensors import write_safetensors
from tests.bounds import bounded
from tests.weights.tiny import torch_tensors
from tests.weights.torch_files import mapping, storage, tensor, write_stream, write_zip

FILES = int(os.environ.get("DIFFUSE_JAX_FUZZ", "1000"))
SECONDS = 5.0
MODEL = CLIPTextModel(
    CLIPTextConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        projection_dim=8,
        max_position_embeddings=4,
        bos_token_id=0,
        eos_token_id=2,
    )
)
SHAPES = MODEL.shapes()
LAYER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
NUMBERS = np.arange(24, dtype=np.float32)
PROGRAM = mapping(**{f"w{i}": tensor(storage("0", 24), i, (4, 2), (2, 1)) for i in range(4)})
FLAGS = {"learning_rate": 1e-4, "validation_prompt": ["a", "b"], "use_ema": True}


def save(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    write_safetensors(path, {k: (v.dtype, v.shape) for k, v in arrays.items()}, arrays.values(), metadata)


def open_network(path: Path) -> None:
    match(read_checkpoint([path]), SHAPES, label=str(path))


def seed_lora(path: Path) -> None:
    pair = {
        f"{LAYER}.lora_A.weight": np.ones((2, 8), np.float16),
        f"{LAYER}.lora_B.weight": np.ones((8, 2), np.float16),
    }
    settings = {"text_encoder.lora_alpha": 4, "text_encoder.alpha_pattern": {r"layers.\d+.self_attn.[qk]_proj": 2}}
    save(path, pair, {"lora_adapter_metadata": json.dumps(settings)})


def seed_index(path: Path) -> None:
    write_index(path.parent, "StableDiffusionPipeline", {"unet": ("diffusers", "UNet2DConditionModel")}, {"a": [1]})


def seed_shards(path: Path) -> None:
    (path.parent / "a.safetensors").touch()
    path.write_text(json.dumps({"metadata": {"total_size": 4}, "weight_map": {"x": "a.safetensors"}}))


KINDS: dict[str, tuple[str, Callable[[Path], Any], Callable[[Path], Any]]] = {
    "a network": ("model.safetensors", lambda p: save(p, torch_tensors(MODEL, np.random.default_rng(0))), open_network),
    "PyTorch's archive": ("a.bin", lambda p: write_zip(p, PROGRAM, {"0": NUMBERS.tobytes()}), open_network),
    "PyTorch's older format": ("b.pt", lambda p: write_stream(p, PROGRAM, {"0": NUMBERS}), open_network),
    "Flax": (
        "a.msgpack",
        lambda p: p.write_bytes(flax.serialization.to_bytes({"dense": {"kernel": np.ones((2, 3), np.float32)}})),
        open_network,
    ),
    "LoRA": ("lora.safetensors", seed_lora, lambda p: load_lora(p, {"text_encoder": SHAPES})),
    "a word": ("word.safetensors", lambda p: save(p, {"<a>": np.ones((2, 8), np.float16)}), tokens.load_rows),
    "a network's config": (
        "config.json",
        lambda p: p.write_text(json.dumps(MODEL.config_json())),
        lambda p: CLIPTextModel.from_config(p.parent),
    ),
    "a scheduler's config": (
        "scheduler_config.json",
        lambda p: p.write_text(json.dumps(DPMSolverMultistepScheduler().to_json())),
        lambda p: Scheduler.from_pretrained(p.parent),
    ),
    "an index": ("model_index.json", seed_index, lambda p: read_index(p.parent)),
    "shards": ("model.safetensors.index.json", seed_shards, shards),
    "flags": ("flags.yaml", lambda p: p.write_text(yaml.safe_dump(FLAGS)), read_config),
}
VALUES = [
    *("null", "true", '"text"', "-1", "0", "1e308", "NaN", "-Infinity", "2147483648", "9" * 5000, "[]", "{}"),
    *("[" * 3000, "[[[[1]]]]", '{"a": 1}', '"\\ud800"', '"' + "x" * 5000 + '"'),
]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to three changes: bits, bytes, pieces cut, doubled or moved, numbers and values replaced."""
    for _ in range(rng.randint(1, 3)):
        at, size = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 8, 64])
        head, piece, tail = data[:at], data[at : at + size], data[at + size :]
        change = rng.randrange(8)
        if change == 0 and data:
            i = rng.randrange(len(data))
            data = data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]
        elif change == 1:
            data = head + rng.randbytes(len(piece)) + tail
        elif change == 2:
            data = head + rng.choice([b"\xff", b"\0", b"\x7f"]) * len(piece) + tail
        elif change == 3:
            data = head + tail
        elif change == 4:
            data = head + piece * rng.choice([2, 3, 500]) + tail
        elif change == 5:
            data = head
        else:
            data = replaced(data, rng)
    return data


def replaced(data: bytes, rng: random.Random) -> bytes:
    """A run of letters or digits replaced by a value of JSON, or by another run of the same length."""
    letters = (string.ascii_letters + string.digits + "_.").encode()
    starts = [i for i in range(len(data)) if data[i] in letters and (i == 0 or data[i - 1] not in letters)]
    if not starts:
        return data
    begin = end = rng.choice(starts)
    while end < len(data) and data[end] in letters:
        end += 1
    same = bytes(rng.choice(b"0123456789") for _ in range(end - begin))
    return data[:begin] + rng.choice([rng.choice(VALUES).encode(), same]) + data[end:]


RAN: list[str] = []
"""What was run while a file was open; a hook cannot be taken out again, so there is one for the whole process."""
WATCH = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect"}


@pytest.fixture(scope="module", autouse=True)
def watched() -> None:
    sys.addaudithook(lambda event, _: RAN.append(event) if event in WATCH else None)


def message_of(read: Callable[[Path], Any], path: Path) -> str | None:
    """What the error says with which a file is refused; None if it opens."""
    try:
        read(path)
    except (ValueError, OSError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_opens_or_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    name, make, read = KINDS[kind]
    path = tmp_path / name
    make(path)
    read_whole = path.read_bytes()
    if kind not in ("PyTorch's archive", "PyTorch's older format", "Flax"):  # of another network
        read(path)
    rng = random.Random(f"{os.environ.get('DIFFUSE_JAX_TEST_SEED', '0')} {kind}")
    refused = 0
    for _ in range(-(-FILES // len(KINDS))):
        data = mutate(read_whole, rng)
        path.write_bytes(data)
        RAN.clear()
        with bounded(SECONDS, 2 << 30):
            text = message_of(read, path)
        refused += text is not None
        # A folder's files are sometimes named by their folder.
        assert text is None or (str(path.parent) in text and len(text) < 20_000), (data[:2000], text)
        assert not RAN, (data[:2000], RAN)
    assert refused > 0
