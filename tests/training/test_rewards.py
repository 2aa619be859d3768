"""Rewards: sizes of JPEG files, an aesthetic predictor, and functions of the user's; and what DDPO makes of them."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from diffuse_jax import DDIMScheduler
from diffuse_jax.batch.lines import lines_of
from diffuse_jax.errors import WeightsError
from diffuse_jax.models import CLIPVisionConfig, CLIPVisionModelWithProjection
from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.data import DataSettings
from diffuse_jax.training.ddpo import PromptStatistics, normalised, rounds_from, run_of_rounds
from diffuse_jax.training.initial import initial_params
from diffuse_jax.training.policy import prompts_from
from diffuse_jax.training.rewards import Reward, aesthetic, check_reward, function_from, jpeg_sizes, reward_from
from diffuse_jax.training.settings import BatchSettings, OptimizerSettings, RewardSettings, RunSettings

SIDE = 16


def test_a_jpeg_reward_is_the_size_of_the_file(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    images = np.stack([pixels / 255, np.full_like(pixels, 0.5, np.float64)]).astype(np.float32)
    more = reward_from(RewardSettings(reward="jpeg_incompressibility"))
    less = reward_from(RewardSettings(reward="jpeg_compressibility"))
    sizes = more.function({}, images, ["a", "b"])
    assert sizes[0] == pytest.approx(len(file.getvalue()) / 1000)
    assert sizes[0] > 2 * sizes[1]
    np.testing.assert_array_equal(less.function({}, images, ["a", "b"]), -jpeg_sizes(images))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, image_size=SIDE, patch_size=8,
        projection_dim=12,
    )  # fmt: skip
    network = CLIPVisionModelWithProjection(config)
    network.save_pretrained(folder, initial_params(network.shapes(), seed=0))
    return folder


def linear(rng: np.random.Generator, *sizes: int) -> dict[str, np.ndarray]:
    """PyTorch's names and shapes of linear layers; the numbers between are of layers without weights."""
    found = {}
    for k, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        found[f"layers.{2 * k}.weight"] = rng.standard_normal((columns, rows)).astype(np.float32)
        found[f"layers.{2 * k}.bias"] = rng.standard_normal(columns).astype(np.float32)
    return found


def test_the_aesthetic_predictor_is_pytorchs(clip: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """Written down with torch: CLIP, an embedding of length one, the layers; eleven of them, to be put in order."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tensors = linear(rng, 12, *[4] * 10, 1)
    save_file(tensors, tmp_path / "head.safetensors")
    reward = aesthetic(tmp_path / "head.safetensors", clip)
    images = rng.random((2, SIDE, SIDE, 3)).astype(np.float32)
    ours = jax.jit(reward.function)(reward.params, images, None)

    mean, std = (np.array(v, np.float32) for v in ((0.48145466, 0.4578275, 0.40821073),
                                                   (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
    network = transformers.CLIPVisionModelWithProjection.from_pretrained(clip)
    with torch.no_grad():
        x = network(torch.tensor(((images - mean) / std).transpose(0, 3, 1, 2))).image_embeds
        x = torch.nn.functional.normalize(x)
        for k in range(11):
            x = torch.nn.functional.linear(
                x, *(torch.tensor(tensors[f"layers.{2 * k}.{n}"]) for n in ("weight", "bias"))
            )
    np.testing.assert_allclose(ours, x[:, 0], rtol=1e-4)
    check_reward(reward, True, (24, 32), ["a"])  # another size is resized and cropped
    gradient = jax.grad(lambda y: reward.function(reward.params, y, None).sum())(images)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def test_an_aesthetic_predictor_that_does_not_fit_is_refused(
    clip: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    save_file(linear(rng, 8, 4, 1), tmp_path / "head.safetensors")
    save_file(linear(rng, 12, 1) | {"layers.0.bias": np.zeros(3, np.float32)}, tmp_path / "bias.safetensors")
    for name, folder, message in (
        ("head.safetensors", clip, "--aesthetic_model_path .* from CLIP's 12 features to 1; this has 8x4, 4x1"),
        ("bias.safetensors", clip, r"layers.0.bias has the shape \(3,\), layers.0.weight \(1, 12\)"),
        ("none.safetensors", clip, "--aesthetic_model_path must be a file with linear layers: .*none.safetensors"),
        ("head.safetensors", tmp_path, "--clip_model_path must be the folder of a CLIPVisionModelWithProjection: "),
    ):
        with pytest.raises(WeightsError, match=message):
            aesthetic(tmp_path / name, folder)


MINE = """
from __future__ import annotations
import dataclasses


@dataclasses.dataclass
class Scale:
    factor: float = 1.0


def bright(images, prompts):
    return images.mean((1, 2, 3)) * Scale().factor


number = 3
"""


def test_a_function_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE, encoding="utf-8")
    reward = reward_from(RewardSettings(reward=f"{path}:bright"))
    np.testing.assert_array_equal(reward.function({}, np.ones((2, 4, 4, 3), np.float32), ["a", "b"]), [1, 1])
    assert function_from("math:sqrt")(4) == 2
    for name, message in {
        f"{path}:dark": "no callable 'dark'",
        f"{path}:number": "no callable 'number'",
        f"{tmp_path}/other.py:f": "there is no file",
        "no_such_module_at_all:f": "No module named .*; if it is a file, give no_such_module_at_all.py:f",
    }.items():
        with pytest.raises(ValueError, match=message):
            function_from(name)


def reward(function: Any, **options: Any) -> Reward:
    return Reward("mine", lambda params, images, prompts: function(images, prompts), **options)


@pytest.mark.parametrize(
    ("tried", "gradient", "message"),
    [
        (reward(lambda x, p: x.mean()), False, r"mine must return one number for each of 2 images, got \(\)"),
        (reward(lambda x, p: [float("nan")] * 2), False, "mine is not finite"),
        (reward(lambda x, p: 1 / 0), False, "mine failed: division by zero"),
        (reward(lambda x, p: x.mean(), host=True), True, "--reward mine is computed on the host and has no gradient"),
        (reward(lambda x, p: np.asarray(x).mean((1, 2, 3))), True, "cannot be differentiated by JAX .*--method ddpo"),
        (reward(lambda x, p: x.mean((1, 2, 3)) * len(p)), True, "its prompts are what its attribute `encode`"),
        (reward(lambda x, p: x.mean()), True, r"must return floating-point \[2\] for 2 images"),
        (reward(lambda x, p: jnp.log(x.mean((1, 2, 3)) - 2)), True, r"mine is not finite: \[nan, nan\]"),
        (reward(lambda x, p: jnp.sqrt(0 * x.mean((1, 2, 3)))), True, "the gradient of the reward mine is not finite"),
    ],
)
def test_rewards_are_tried_first(tried: Reward, gradient: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_reward(tried, gradient, (8, 8), ["a"])


def test_contrast_can_be_rewarded() -> None:
    """It has no gradient, and its inverse no value, where an image has one colour."""
    check_reward(reward(lambda x, p: 1 / x.std((1, 2, 3))), True, (8, 8), ["a"])
    check_reward(reward(lambda x, p: 1 / x.std((1, 2, 3))), False, (8, 8), ["a"])


def test_a_gradient_of_zero_is_mentioned() -> None:
    with pytest.warns(UserWarning, match="the gradient of the reward mine is zero"):
        check_reward(reward(lambda x, p: jnp.round(x).mean((1, 2, 3))), True, (8, 8), ["a"])


def test_a_reward_with_a_gradient_gets_encoded_prompts() -> None:
    lengths = lambda texts: {"length": np.array([len(t) for t in texts], np.float32)}
    check_reward(reward(lambda x, p: x.mean((1, 2, 3)) * p["length"], encode=lengths), True, (8, 8), ["a", "bc"])


# Advantages, against NumPy


def test_advantages_of_a_round_have_mean_zero_and_deviation_one(rng: np.random.Generator) -> None:
    found = normalised(rng.standard_normal(50) * 3 + 7)
    assert found.mean() == pytest.approx(0, abs=1e-12)
    assert found.std() == pytest.approx(1, rel=1e-6)
    assert not np.any(normalised(np.ones(4)))


def test_advantages_by_prompt_use_its_recent_rewards() -> None:
    tracked = PromptStatistics(size=3, least=2)
    first = tracked.advantages(["a", "a", "b"], np.array([1.0, 3.0, 10.0]))
    assert first[:2] == pytest.approx([-1, 1], rel=1e-5)  # of the rewards of "a"
    whole = np.array([1.0, 3.0, 10.0])
    assert first[2] == pytest.approx((10 - whole.mean()) / whole.std(), rel=1e-5)  # "b" has too few
    second = tracked.advantages(["a", "a"], np.array([5.0, 7.0]))
    kept = np.array([3.0, 5.0, 7.0])  # the oldest is forgotten
    assert second == pytest.approx((np.array([5.0, 7.0]) - kept.mean()) / kept.std(), rel=1e-5)


# Prompts


def test_prompts_come_from_a_file_or_from_captions(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\ntwo dogs\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a cat"}\n"two dogs"\n', encoding="utf-8")
    for name in ("a.txt", "b.jsonl"):
        assert prompts_from(tmp_path / name, DataSettings(), lines_of) == ["a cat", "two dogs"]
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "x.png")
    (images / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "a bird"}\n', encoding="utf-8")
    assert prompts_from(None, DataSettings(train_data_dir=images), lines_of) == ["a bird"]


def test_prompts_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    (tmp_path / "more.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "seed": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="empty.txt has no prompts"):
        prompts_from(tmp_path / "empty.txt", DataSettings(), lines_of)
    with pytest.raises(ValueError, match="row 2: it must have a prompt and nothing else, got prompt, seed"):
        prompts_from(tmp_path / "more.jsonl", DataSettings(), lines_of)
    with pytest.raises(ValueError, match="give one of --prompts, --train_data_dir, --dataset_name; got none"):
        prompts_from(None, DataSettings(), lines_of)


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_eta": 0.0}, "--sample_eta 0 samples without noise"),
        ({"method": "draft", "gradient_steps": 60}, "--gradient_steps must be at most --sample_num_steps 50, got 60"),
        ({"method": "draft", "train_clip_range": 0.1}, "--train_clip_range is for --method ddpo, and would do nothing"),
        ({"gradient_steps": 2}, "--gradient_steps is for --method draft, and would do nothing with ddpo"),
        ({"per_prompt_stat_tracking_min_count": 4}, "min_count has no effect without --per_prompt_stat_tracking"),
        ({"method": "ppo"}, "method must be one of ddpo, draft"),
        ({"reward": "aesthetic"}, "needs --aesthetic_model_path and --clip_model_path"),
        ({"reward": "m:f", "clip_model_path": "x"}, "are for --reward aesthetic"),
        ({"reward": "beauty"}, "reward must be one of jpeg_compressibility"),
        (
            {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_buffer_size": 4},
            "min_count 16 is never reached",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardSettings(**{"reward": "jpeg_compressibility"} | options)


class OnePolicy:
    """Three steps of which the last draws nothing."""

    plan = DDIMScheduler(steps_offset=1).plan(3, eta=1.0)


def test_rounds_are_whole_numbers_of_training_steps(capsys: pytest.CaptureFixture[str]) -> None:
    mesh, batch = make_mesh(devices=jax.devices()[:2]), BatchSettings(train_batch_size=2, gradient_accumulation_steps=2)
    options = RewardSettings(
        reward="m:f", sample_batch_size=4, sample_num_batches_per_epoch=3, train_num_inner_epochs=2
    )
    rounds = rounds_from(options, OnePolicy, batch, mesh)  # type: ignore[arg-type]
    assert (rounds.images, rounds.trained, rounds.accumulated, rounds.updates) == (24, 2, 4, 6)
    run = run_of_rounds(RunSettings(output_dir="x", batch=batch, checkpointing_steps=8), rounds)
    assert (run.batch.gradient_accumulation_steps, run.checkpointing_steps) == (4, 12)
    assert "checkpoints are written every 12 steps" in capsys.readouterr().err
    few = RewardSettings(reward="m:f", sample_batch_size=2)
    with pytest.raises(ValueError, match="a round samples 8 images .* training steps of 16"):
        rounds_from(few, OnePolicy, BatchSettings(train_batch_size=8), mesh)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leaves none of 2 random steps"):
        rounds_from(RewardSettings(reward="m:f", train_timestep_fraction=0.3), OnePolicy, batch, mesh)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--scale_lr counts steps of trajectories"):
        run_of_rounds(RunSettings(output_dir="x", optimizer=OptimizerSettings(scale_lr=True)), rounds)
