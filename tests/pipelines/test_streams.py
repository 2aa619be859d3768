"""``noise=`` of a call without PyTorch: where the rows come from, and what is refused; ``oracle/test_noise.py`` has the
images."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.noise import STREAMS, cuda_normal
from diffuse_jax.pipelines import Part, StableDiffusionImg2ImgPipeline, parts
from diffuse_jax.pipelines.streams import PURPOSES
from diffuse_jax.schedulers import DPMSolverSDEScheduler, EulerAncestralDiscreteScheduler
from tests.pipelines import tiny

CALL = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline()


def test_a_list_of_seeds_is_a_list_of_generators(pipe):
    big = 2**63 + 1
    for kind, stream in STREAMS.items():
        request = pipe.request(["a", "b"], seed=[7, big], noise=kind, **CALL)
        wanted = [stream(seed, SHAPE)[0].transpose(1, 2, 0) for seed in (7, big)]
        np.testing.assert_array_equal(request.rows["noise"], wanted)
        assert request.seeds == [7, big]


def test_one_seed_is_one_generator_for_the_batch(pipe):
    request = pipe.request("a", num_images_per_prompt=3, seed=7, noise="cuda", **CALL)
    wanted = cuda_normal(7, (3, *SHAPE))[0].transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(request.rows["noise"], wanted)


def test_images_are_the_same_one_by_one_and_step_by_step(pipe):
    stochastic = pipe.replace(scheduler=EulerAncestralDiscreteScheduler())
    call = CALL | {"prompt": ["a", "b"], "seed": [1, 2], "noise": "torch"}
    whole = stochastic(**call).images
    np.testing.assert_allclose(stochastic(**call, batch_size=1, progress_bar=True).images, whole, atol=1e-4)


def test_a_seed_that_the_system_chose_is_reported(pipe):
    chosen = pipe.request("a", noise="torch", **CALL)
    again = pipe.request("a", noise="torch", seed=chosen.seeds, **CALL)
    np.testing.assert_array_equal(chosen.rows["noise"], again.rows["noise"])


def test_numbers_of_steps_share_a_program(pipe):
    stochastic = pipe.replace(scheduler=EulerAncestralDiscreteScheduler(), programs=type(pipe.programs)())
    for steps in (5, 7, 8):
        stochastic("a", seed=1, noise="torch", **CALL | {"num_inference_steps": steps})
    assert stochastic.programs.compilations == 1


def test_given_latents_are_not_drawn(pipe):
    latents = np.ones((1, 8, 8, 4), np.float32)
    rows = pipe.request("a", seed=7, noise="torch", latents=latents, **CALL).rows
    np.testing.assert_array_equal(rows["noise"], latents)


@dataclass(frozen=True)
class OwnStep(Part):
    """A step that no other part takes."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": "numpy"}, "noise must be one of 'torch', 'cuda', got 'numpy'"),
        ({"noise": np.zeros((1, 8, 8, 4))}, "got ndarray; an array goes to latents="),
        ({"seed": None, "key": jax.random.key(0)}, 'noise="torch" takes a seed, not a key'),
        ({"seed": 2**64}, "a seed must be an integer from 0 to 18446744073709551615"),
        ({"seed": 2**40, "noise": None}, "a seed must be an integer from 0 to 4294967295"),
        ({"_scheduler": DPMSolverSDEScheduler()}, "cannot be had with DPMSolverSDEScheduler"),
        (
            {"_scheduler": EulerAncestralDiscreteScheduler(), "method": lambda m: replace(m, advance=OwnStep())},
            "needs the steps of PlainStep; OwnStep has none",
        ),
    ],
)
def test_impossible_requests_are_refused(pipe, change: dict[str, Any], message: str):
    change = dict(change)
    pipe = pipe.replace(scheduler=change.pop("_scheduler", pipe.scheduler))
    with pytest.raises(ValueError, match=message):
        pipe.request("a", **CALL | {"seed": 3, "noise": "torch"} | change)


def test_one_seed_for_several_encoded_images_is_refused(pipe):
    pixels = np.zeros((16, 16, 3), np.uint8)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="takes one seed for each image, got one for all; give a list of 2"):
        other.request(["a", "b"], image=pixels, seed=3, noise="torch", **CALL)
    assert other.request("a", image=pixels, seed=3, noise="torch", **CALL).rows["image_noise"].shape == (1, 8, 8, 4)


def test_every_draw_of_a_part_has_a_place_in_the_order():
    """A part that draws for another purpose needs its place in ``PURPOSES``, or other noise would be taken silently."""
    drawn = set()
    for file in Path(parts.__path__[0]).glob("*.py"):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            if getattr(call.func, "id", "") in ("draw", "keys_for", "encode_image"):
                drawn |= {a.value for a in call.args if isinstance(a, ast.Constant)}
    assert drawn
    # The regularisation of an inversion says that it does not follow ``noise=``, and RePaint's steps refuse it.
    own = {"auto-correlation", "known"}
    assert drawn <= {*PURPOSES} | own
