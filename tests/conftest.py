"""Fixtures and settings that every test shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

from tests.quick_xla import xla_flags

# Before JAX starts its backend: eight virtual devices for the sharding tests, and code that is generated quickly rather
# than code that runs quickly, because the networks of the tests are tiny and their compilation is most of the time.
os.environ.setdefault("XLA_FLAGS", xla_flags(8))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# PyTorch's threads wait for each other by spinning, which is slow where several test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
from hypothesis import settings

from tests.memory import free_programs

ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_compilation_cache_dir", os.environ.get("DIFFUSE_JAX_TEST_CACHE", str(ROOT / ".cache" / "jax")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
os.environ["DIFFUSE_JAX_COMPILATION_CACHE"] = "0"  # commands that tests call leave that folder as it is
jax.config.update("jax_numpy_rank_promotion", "raise")

# Looking for garbage takes a tenth of the time, as PyTorch, transformers and thousands of collected tests are objects
# that stay. They are left out, and the rest, compiled programs among it, is looked through after each file.
gc.set_threshold(100_000, 50, 1_000)

# The same examples every time, so that a change is judged by what it changed; DIFFUSE_JAX_TEST_RANDOM=1 looks for new
# ones (as `make test-slow` does) and prints the blob that repeats a failure.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("random" if os.environ.get("DIFFUSE_JAX_TEST_RANDOM") == "1" else "fixed")


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def collect_garbage() -> Iterator[None]:
    yield
    free_programs()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A NumPy generator whose seed is printed with a failing test; ``DIFFUSE_JAX_TEST_SEED`` repeats a run."""
    seed = int(os.environ.get("DIFFUSE_JAX_TEST_SEED", "0"))
    print(f"seed: {seed} (set DIFFUSE_JAX_TEST_SEED to change it) for {request.node.nodeid}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real images and weights that some machines have beside the checkout."""
    folder = Path(os.environ.get("DIFFUSE_JAX_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set DIFFUSE_JAX_SHARED_DATA to a folder that has it")
    return folder
